"""``wapo tasks``: the list, the check of a file, a look at its problems."""

import json
from pathlib import Path

import pytest

from wapo_analysis.cli import run
from wapo_analysis.train.tasks import KINDS

SAMPLE = str(Path(__file__).parents[2] / "data" / "tasks" / "hotpotqa.json")


def test_the_list_names_every_kind(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["tasks"]) == 0
    printed = capfd.readouterr().out
    for kind in KINDS:
        assert f"{kind.name}\n    {kind.description}\n" in printed
        assert not kind.data or f"--data: {kind.data}; e.g. {kind.example}" in printed
    assert "pip install 'wapo-analysis[math]'" in printed


def test_a_file_is_checked_and_shown(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["tasks", "hotpotqa", "--data", SAMPLE, "--show", "3"]) == 0
    printed = capfd.readouterr().out
    assert f"{SAMPLE}: 24 rows, 24 used, 0 skipped, 0 repeated\n" in printed
    assert printed.count("--- problem ") == printed.count(" earns 1\n") == 3
    assert run(["tasks", "hotpotqa", "--data", SAMPLE, "--show", "3"]) == 0
    assert capfd.readouterr().out == printed
    assert run(["tasks", "hotpotqa", "--data", SAMPLE, "--show", "3", "--held-out"]) == 0
    assert "--- problem 1" in capfd.readouterr().out


def test_a_refused_file_shows_all_its_bad_rows(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"q{n}"}) for n in range(12)))
    assert run(["tasks", "hotpotqa", "--data", str(file)]) == 2
    out, err = capfd.readouterr()
    assert out.count("skipped line") == 12
    assert err.count("\n") == 1
    assert "12 of 12 rows" in err


def test_an_answer_that_cannot_be_earned_is_an_error(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wapo_analysis.train.tasks.hotpotqa import HotpotQA

    monkeypatch.setattr(HotpotQA, "solution", lambda self, problem: "Answer: something else")
    assert run(["tasks", "hotpotqa", "--data", SAMPLE, "--show", "1"]) == 2
    assert "the right answer" in capfd.readouterr().err


def test_embedded_tasks_and_mistakes(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["tasks", "chain-sum", "--show", "2"]) == 0
    assert "generated, no data" in capfd.readouterr().out
    assert run(["tasks", "hotpotqa"]) == 2
    assert run(["tasks", "sudoku"]) == 2
    assert capfd.readouterr().err.count("\n") == 2


def test_data_sets_of_reasoning_gym(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("reasoning_gym", reason="needs the extra [reasoning-gym]")
    assert run(["tasks", "reasoning-gym"]) == 0
    assert "reasoning-gym:chain_sum\n" in capfd.readouterr().out
    chain = ["tasks", "reasoning-gym:chain_sum", "--data", "seed=1,size=50", "--show", "2"]
    assert run(chain) == 0
    printed = capfd.readouterr().out
    assert "50 entries, seed=1, size=50" in printed
    assert printed.count(" earns 1\n") == 2
