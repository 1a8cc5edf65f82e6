"""A number beyond what a command can do is refused before anything is done."""

from pathlib import Path

import pytest
import torch

from wapo_analysis.cli import run


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("verify --seed -1", "--seed"),
        ("verify --trials 99", "--trials"),
        ("verify --trials 99999999999", "--trials"),
        ("eval runs/x --threads 99999999", "--threads"),
        ("fork runs/x --at 0 --threads 99999999", "--threads"),
        ("train --threads 99999999", "--threads"),
        ("bench --threads 99999999", "--threads"),
        ("bench --seconds inf", "--seconds"),
        ("bench --seconds nan", "--seconds"),
        ("tasks chain-sum --show 99999999", "--show"),
    ],
)
def test_a_number_out_of_range_is_one_line(
    line: str, option: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(line.split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith(f"wapo: Invalid value for '{option}'")
    assert err.count("\n") == 1


def test_ctrl_c_is_one_line_and_its_own_code(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupt(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("wapo_analysis.verify.run_identities", interrupt)
    assert run(["verify"]) == 130
    assert capfd.readouterr().err == "wapo: interrupted\n"


def test_a_run_is_not_continued_to_before_its_end(
    tiny_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before = (tiny_run / "manifest.json").read_bytes()
    assert run(["train", "--resume", "--out", str(tiny_run), "--steps", "2"]) == 2
    err = capfd.readouterr().err
    assert err == f"wapo: {tiny_run} has done 3 steps; steps cannot be fewer, got 2\n"
    assert (tiny_run / "manifest.json").read_bytes() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_refused_demo_leaves_no_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["demo", "--device", "cuda", "--out", str(tmp_path / "demo")]) == 2
    assert "device cuda is not available here" in capfd.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("model", ["/nowhere/x", "./nowhere", "../nowhere/x", "~/nowhere"])
def test_a_path_that_is_not_there_is_no_name_of_the_hub(
    model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "--model", model, "--out", str(tmp_path / "run")]) == 2
    assert capfd.readouterr().err == f"wapo: no model folder at {model}\n"
