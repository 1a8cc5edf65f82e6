"""The command line as a user meets it: output, exit codes, one-line errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tests.support.builders import write_fake_run
from wapo_analysis.cli import COMMANDS, application, run
from wapo_analysis.cli.train import step_lines
from wapo_analysis.store import open_run

TINY = "--steps 2 --prompts 4 --rollouts 4 --minibatches 2 --threads 1".split()


def refused(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line a refused command prints; exit code 2 and no traceback are checked here."""
    assert run(list(arguments)) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    return lines[0]


def test_train_then_every_reading_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    assert run(["train", "--objective", "wapo", "--out", out, *TINY]) == 0
    assert f"wapo diagnose {out}" in capfd.readouterr().out
    assert run(["diagnose", out, "--format", "json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["verdict"] == "insufficient_data"
    assert run(["figures", out, "--only", "entropy,reward", "--out", str(tmp_path / "f")]) == 0
    assert (tmp_path / "f" / "entropy.png").stat().st_size > 10_000
    assert run(["report", out]) == 0
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    capfd.readouterr()
    assert run(["compare", out, "--format", "json"]) == 0
    json.loads(capfd.readouterr().out)


def test_resume_goes_on_and_keeps_the_settings(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    assert run(["train", "--objective", "dapo", "--out", out, *TINY]) == 0
    assert run(["train", "--out", out, "--resume", "--steps", "3", "--threads", "1"]) == 0
    opened = open_run(out)
    assert opened.steps.step.tolist() == [1, 2, 3]
    assert opened.objective == "dapo"


def test_settings_from_a_file_yield_to_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('objective = "gspo"\nsteps = 9\nlr = 1e-4\ninclude_bins = ["pos"]\n')
    assert run(["train", "--config", str(file), "--out", str(tmp_path / "r"), *TINY]) == 0
    config = open_run(tmp_path / "r").manifest["config"]
    assert (config["objective"], config["steps"], config["include_bins"]) == ("gspo", 2, ["pos"])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--objective", "grop"], "unknown objective 'grop'; allowed: grpo"),
        (["--include-bins", "neg_peek"], "neg_peek"),
        (["--include-bins", "pos", "--exclude-bins", "neg"], "include_bins"),
        (["--task", "gsm9k"], "unknown task 'gsm9k'; allowed: chain-sum, two-hop"),
        (["--model", "no/such/model"], "cannot load model 'no/such/model'"),
        (["--model", "absent.gguf"], "no model file at absent.gguf"),
        (["--steps", "-1"], "steps must be at least 1, got -1"),
        (["--lr", "nan"], "lr must be positive and finite, got nan"),
        (["--prompts", "0"], "prompts_per_step must be at least 1"),
        (["--rollouts", "1"], "rollouts_per_prompt must be at least 2"),
        (["--minibatches", "7"], "minibatches must be a divisor of 128"),
        (["--device", "tpu"], "device must be auto, cpu or cuda"),
        (["--config", "absent.toml"], "cannot read config absent.toml"),
    ],
)
def test_train_refuses_bad_settings_in_one_line(
    arguments: list[str],
    expected: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "run"
    assert expected in refused(capfd, "train", *arguments, "--out", str(out))
    assert not out.exists(), "a refused command must leave nothing behind"


def test_an_unknown_setting_in_a_file_is_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.toml"
    file.write_text("stepz = 3\n")
    assert "unknown setting 'stepz'" in refused(capfd, "train", "--config", str(file))
    file.write_text('steps = "three"\n')
    assert "steps must be of type" in refused(capfd, "train", "--config", str(file))


def test_a_refused_run_leaves_its_folder_to_the_corrected_command(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    new, mine = tmp_path / "new", tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.txt").write_text("mine")
    for out in (new, mine):
        line = refused(capfd, "train", "--out", str(out), *TINY, "--max-new-tokens", "4096")
        assert "do not fit the model's 64" in line
    assert not new.exists()
    assert [file.name for file in mine.iterdir()] == ["notes.txt"]
    assert run(["train", "--out", str(new), *TINY, "--max-new-tokens", "6"]) == 0
    assert run(["train", "--out", str(new), "--resume"]) == 0
    assert "nothing to do: step 2 is done" in capfd.readouterr().out


def test_without_a_terminal_training_prints_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", "--out", str(tmp_path / "r"), *TINY]) == 0
    out, err = capfd.readouterr()
    assert re.fullmatch(r"capture: passive .*\n", err)
    assert re.fullmatch(
        r"(step \d/2  reward \d\.\d\d  entropy \d\.\d\d nats  \d+ s\n){2}"
        r"run: .*\nnext: .*\n",
        out,
    )


def test_of_a_long_run_only_some_steps_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    for steps, expected in ((100, 20 + 1), (2000, 200 + 1), (7, 7)):
        show = step_lines(steps)
        for step in range(1, steps + 1):
            show({"step": step, "reward": 0.5, "entropy": 1.0})
        assert len(capsys.readouterr().out.splitlines()) == expected


@pytest.mark.parametrize("command", ["diagnose", "report", "compare", "figures"])
def test_reading_commands_refuse_a_folder_that_is_no_run(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "no run folder at" in refused(capfd, command, str(tmp_path / "absent"))
    assert "is not a run" in refused(capfd, command, str(tmp_path))


def test_broken_files_are_named_and_not_touched(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_fake_run(tmp_path / "r", steps=6, loose=True)
    part = sorted((path / "classes").glob("*.parquet"))[2]
    part.write_bytes(part.read_bytes()[:50])
    assert part.name in refused(capfd, "diagnose", str(path))
    assert part.read_bytes()[:4] == b"PAR1"
    (path / "steps.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    assert "line 2" in refused(capfd, "report", str(path))


def test_an_existing_run_or_demo_is_not_overwritten(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = write_fake_run(tmp_path / "r", steps=3)
    assert "already holds a run" in refused(capfd, "train", "--out", str(path), *TINY)
    assert "is not empty" in refused(capfd, "demo", "--out", str(path))
    assert "no checkpoint to resume from" in refused(
        capfd, "train", "--out", str(path), "--resume", *TINY
    )


def test_a_folder_of_runs_is_diagnosed_whole_and_audited_one_by_one(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_fake_run(tmp_path / "runs" / "bad", steps=60, drift="explosion")
    write_fake_run(tmp_path / "runs" / "good", steps=60, drift="healthy")
    folder = str(tmp_path / "runs")
    assert run(["diagnose", folder, f"{folder}/bad", "--format", "json"]) == 0
    verdicts = [one["verdict"] for one in json.loads(capfd.readouterr().out)]
    assert verdicts == ["entropy_explosion", "healthy"], "each run once"
    assert "name one" in refused(capfd, "diagnose", folder, "--step", "3")
    assert "holds 2 runs; name one" in refused(capfd, "audit", folder)


def test_fail_on_sets_the_exit_code(tmp_path: Path) -> None:
    bad = write_fake_run(tmp_path / "bad", steps=60, drift="explosion")
    good = write_fake_run(tmp_path / "good", steps=60, drift="healthy")
    assert run(["diagnose", str(bad), "--fail-on", "critical"]) == 1
    assert run(["diagnose", str(bad)]) == 0
    assert run(["diagnose", str(good), "--fail-on", "critical"]) == 0


def test_unknown_figure_lists_the_known_ones(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = refused(capfd, "figures", "--only", "entropie", "--out", str(tmp_path))
    assert line.startswith("wapo: unknown figure 'entropie'")
    assert line.endswith("did you mean 'entropy'?")
    line = refused(capfd, "figures", "--only", " ,", "--out", str(tmp_path))
    assert line == "wapo: --only names no figure; wapo figures --list shows them"


def test_theory_figures_need_no_run(tmp_path: Path) -> None:
    assert run(["figures", "--only", "theory_map", "--format", "svg", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "theory_map.svg").read_text().startswith("<?xml")


def test_schema_names_every_column(capfd: pytest.CaptureFixture[str]) -> None:
    from wapo_analysis.schema import TABLES

    assert run(["schema", "--format", "json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert set(shown) == set(TABLES)
    assert run(["schema"]) == 0
    text = capfd.readouterr().out
    assert all(column.name in text for table in TABLES.values() for column in table)
    assert run(["schema", "topk", "--format", "json"]) == 0
    assert list(json.loads(capfd.readouterr().out)) == ["topk"]
    assert run(["schema", "topk", "--format", "markdown"]) == 0
    assert capfd.readouterr().out.count("## ") == 1
    assert run(["schema", "toknes"]) == 2
    assert capfd.readouterr().err.endswith("did you mean 'tokens'?\n")


def test_verify_proves_the_identities(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "--trials", "200"]) == 0
    assert "identities hold" in capfd.readouterr().out


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["train", "--help"], ["diagnose", "-h"], ["--version"]]
)
def test_help_and_version(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    code = run(arguments)
    assert code == (2 if not arguments else 0)
    assert "wapo" in capfd.readouterr().out


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_alone_is_that_of_all(name: str) -> None:
    whole = typer.main.get_command(application()).commands  # type: ignore[attr-defined]
    assert sorted(whole) == sorted(COMMANDS)
    alone = typer.main.get_command(application(name)).commands  # type: ignore[attr-defined]
    assert list(alone) == [name]
    options = [[param.opts for param in each[name].params] for each in (alone, whole)]
    assert options[0] == options[1] != []
    assert alone[name].help == whole[name].help


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_shows_its_default(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """What happens without it, of flags too."""
    assert run([name, "--help"]) == 0
    shown = capfd.readouterr().out.partition("Options:")[2]
    for text in re.split(r"\n  (?=-)", shown)[1:]:
        option = " ".join(text.split())
        shows = "required]" in option or "default: " in option
        assert shows or option.startswith("-h, --help"), option


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "--objctive", "grpo"], "Did you mean --objective?"),
        (["figures", "--format", "pnf"], "Did you mean 'png'?"),
        (["diagnose", ".", "--fail-on", "waning"], "Did you mean 'warning'?"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_closest(
    arguments: list[str], expected: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(capfd, *arguments)


def test_examples_keep_their_lines_and_completion_is_on(capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["train", "--help"]) == 0
    assert "\n      wapo train --probe-every 5 --out runs/mine\n" in capfd.readouterr().out
    assert run(["--help"]) == 0
    assert "--install-completion" in capfd.readouterr().out


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m wapo_analysis schema | head -1"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_demo_smoke_writes_everything(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo"
    assert run(["demo", "--smoke", "--out", str(out)]) == 0
    text = capfd.readouterr().out
    assert "GRPO" in text
    assert "WAPO" in text
    assert f"report: {out / 'report.html'}" in text
    grpo, wapo = open_run(out / "grpo-0"), open_run(out / "wapo-0")
    first = [r.rollouts[r.rollouts.step == 1].prompt.tolist() for r in (grpo, wapo)]
    assert first[0] == first[1], "both objectives see the same prompts"
    assert (out / "figures" / "entropy.png").exists()
