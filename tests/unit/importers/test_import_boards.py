"""TensorBoard and W&B: folders, downloads, exported charts."""

import csv
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.logged import STEPS, read, records, trl
from wapo_analysis.errors import UserError


def events(folder: Path, make: Callable[[int], Mapping[str, Any]], steps: Iterable[int]) -> Path:
    summary = pytest.importorskip("torch.utils.tensorboard")
    with summary.SummaryWriter(str(folder)) as writer:
        for step in steps:
            for name, value in make(step).items():
                writer.add_scalar(f"train/{name}", value, step)
    return folder


def test_tensorboard(tmp_path: Path) -> None:
    events(tmp_path / "tb", trl, range(1, STEPS + 1))
    (written,) = (tmp_path / "tb").iterdir()
    written.rename(tmp_path / "tb" / "renamed")
    steps, report = read(tmp_path / "tb", tmp_path / "out")
    assert steps.index.tolist() == list(range(1, STEPS + 1))
    assert steps.loc[3, ["reward", "entropy", "kl_ref"]].tolist() == pytest.approx(
        [0.03, 0.4, 0.03]
    )
    assert (report.format, report.trainer) == ("tensorboard", "TRL")
    assert steps.loc[3, "rewards/exact/mean"] == pytest.approx(0.03)


def test_several_tensorboard_runs_are_asked_for(tmp_path: Path) -> None:
    for name in ("seed-0", "seed-1"):
        events(tmp_path / "runs" / name, trl, range(1, 4))
    with pytest.raises(UserError, match=r"2 runs; choose one with --run NAME: .*seed-0.*seed-1"):
        read(tmp_path / "runs", tmp_path / "out")
    steps, _ = read(tmp_path / "runs", tmp_path / "out", run="seed-1")
    assert len(steps) == 3
    with pytest.raises(UserError, match="--run seed is not one of"):
        read(tmp_path / "runs", tmp_path / "x", run="seed")


def test_a_damaged_event_file_keeps_what_comes_before(tmp_path: Path) -> None:
    (file,) = events(tmp_path / "tb", trl, range(1, STEPS + 1)).iterdir()
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    steps, report = read(tmp_path / "tb", tmp_path / "out")
    assert 3 <= len(steps) < STEPS
    assert any("is cut or damaged after step" in event for event in report.events)


def table(file: Path, header: list[str], rows: Iterable[list[Any]]) -> Path:
    with file.open("w", newline="") as stream:
        writer = csv.writer(stream, quoting=csv.QUOTE_NONNUMERIC)
        writer.writerows([header, *rows])
    return file


def test_a_scalar_downloaded_from_tensorboard(tmp_path: Path) -> None:
    rows = [[1.76e9 + s, s, s / 10] for s in range(1, 5)]
    head = ["Wall time", "Step", "Value"]
    named = table(tmp_path / "run-one-tag-train_completions_mean_length.csv", head, rows)
    assert read(named, tmp_path / "a")[0]["length"].tolist() == [0.1, 0.2, 0.3, 0.4]
    other = table(tmp_path / "scalars.csv", head, rows)
    with pytest.raises(UserError, match="--map entropy=Value"):
        read(other, tmp_path / "b")
    assert read(other, tmp_path / "b", reward="Value")[0]["reward"].tolist()[-1] == 0.4


def test_wandb_history_and_panel(tmp_path: Path) -> None:
    head = ["_step", "train/global_step", "train/reward", "eval/reward", "train/entropy"]
    rows = [[0, 1, 0.5, "", 0.4], [1, "", "", 0.75, ""], [2, 2, 0.25, "", 0.3]]
    steps, report = read(table(tmp_path / "history.csv", head, rows), tmp_path / "a")
    assert steps["reward"].tolist() == [0.5, 0.25], "the run's own step, not W&B's row counter"
    assert steps.loc[1, "eval_reward"] == 0.75, "an evaluation belongs to the step before it"
    assert not report.broken_lines
    head = ["Step"]
    for run in ("grpo-a", "b"):
        head += [f"{run} - {metric}{end}" for metric in ("_step", "train/entropy")
                 for end in ("", "__MIN", "__MAX")]  # fmt: skip
    rows = [[s, *[s, s, s, 0.1 * s, 9, 9], *["", "", "", "", "", ""]] for s in range(1, 4)]
    panel = table(tmp_path / "panel.csv", head, rows)
    with pytest.raises(UserError, match="2 runs; choose one with --run NAME: grpo-a, b"):
        read(panel, tmp_path / "b")
    steps, _ = read(panel, tmp_path / "b", run="grpo-a")
    assert steps["entropy"].tolist() == pytest.approx([0.1, 0.2, 0.3])


def wandb_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    wandb = pytest.importorskip("wandb")
    pytest.importorskip("wandb.sdk.internal.datastore", reason="wandb 0.30 has no reader")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with wandb.init(dir=str(root), project="p", settings=wandb.Settings(console="off")) as run:
        for step in range(1, STEPS + 1):
            run.log({f"train/{name}": value for name, value in trl(step).items()}
                    | {"train/global_step": 10 * step})  # fmt: skip
        run.log({"eval/reward": 0.75})
    (folder,) = (root / "wandb").glob("offline-run-*")
    return folder


@pytest.mark.slow
def test_a_run_folder_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = wandb_folder(tmp_path, monkeypatch)
    steps, report = read(folder, tmp_path / "out")
    assert steps.index.tolist() == [10 * s for s in range(1, STEPS + 1)]
    assert steps.loc[30, ["reward", "entropy"]].tolist() == [0.03, 0.4]
    assert steps.loc[10 * STEPS, "eval_reward"] == 0.75
    assert (report.format, report.trainer) == ("wandb", "TRL")


def test_a_wandb_folder_without_its_library_gives_what_was_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb.sdk.internal.datastore", None)
    folder = tmp_path / "run-1"
    (folder / "files").mkdir(parents=True)
    (folder / "run-1.wandb").write_bytes(b":W&B\xe1\xbe\x00rest")
    printed = "\n".join(repr(record) for record in records(trl))
    (folder / "files" / "output.log").write_text(printed + "\n")
    (folder / "files" / "wandb-summary.json").write_text('{"train/reward": 0.5, "_step": 7}')
    steps, report = read(folder, tmp_path / "out")
    assert len(steps) == STEPS
    assert any("pip install 'wandb<0.30'" in note for note in report.notes)
    (folder / "files" / "output.log").unlink()
    steps, report = read(folder, tmp_path / "summary")
    assert steps["reward"].to_dict() == {7: 0.5}
    assert any("last value of each metric" in event for event in report.events)
