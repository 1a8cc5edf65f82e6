"""TensorBoard and W&B: folders, downloads, exported charts."""

import csv
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.logged import STEPS, read, records, trl
from wapo_analysis.errors import UserError
from wapo_analysis.importers.boards import _last_start, pick
from wapo_analysis.importers.report import ImportReport


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
    with pytest.raises(
        UserError, match="holds 2 runs that fit 'seed'; choose one with --run NAME: "
    ):
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


@pytest.mark.parametrize(
    ("runs", "chosen", "told"),
    [
        (8, None, "holds 8 runs; choose one with --run NAME: r1, r2, r3, r4, r5, r6, r7, r8"),
        (
            9,
            None,
            "holds 9 runs; choose one with --run NAME: r1, r2, r3, r4, r5, r6, r7, r8 and 1 more",
        ),
        (
            9,
            "r",
            "holds 9 runs that fit 'r'; choose one with --run NAME: "
            "r1, r2, r3, r4, r5, r6, r7, r8 and 1 more",
        ),
        (2, "x", "unknown --run of logs 'x'; allowed: r1, r2"),
    ],
)
def test_of_many_runs_eight_are_named(runs: int, chosen: str | None, told: str) -> None:
    with pytest.raises(UserError) as error:
        pick([f"r{n}" for n in range(1, runs + 1)], chosen, Path("logs"))
    assert str(error.value).endswith(told)


def test_a_run_is_chosen_by_its_name_before_a_part_of_one() -> None:
    runs = ["seed-1", "seed-10", "other"]
    assert [pick(runs, name, Path()) for name in ("seed-1", "10", "oth")] == [
        "seed-1", "seed-10", "other"
    ]  # fmt: skip
    assert pick(["alone"], None, Path()) == "alone"


def test_of_event_files_finite_scalars_of_steps_from_0_on_are_read(tmp_path: Path) -> None:
    summary = pytest.importorskip("torch.utils.tensorboard")
    with summary.SummaryWriter(str(tmp_path / "tb")) as writer:
        for step in range(-1, 3):
            writer.add_scalar("reward", step / 10, step)
            writer.add_scalar("entropy", 0.5, step, new_style=True)
        writer.add_text("notes", "3", 1)
        writer.add_histogram("weights", np.arange(4.0), 1)
    (file,) = (tmp_path / "tb").iterdir()
    steps, report = read(tmp_path / "tb", tmp_path / "out")
    assert steps.index.tolist() == [0, 1, 2]
    assert steps["reward"].tolist() == pytest.approx([0, 0.1, 0.2])
    assert steps["entropy"].tolist() == [0.5] * 3
    assert (report.files, dict(report.kept_keys), report.events) == (1, {}, [])
    file.write_bytes(file.read_bytes()[:-3])
    _, report = read(tmp_path / "tb", tmp_path / "cut")
    assert f"{file.name} is cut or damaged after step 2" in report.events


def test_event_files_of_one_second_are_read_in_the_order_they_were_begun(tmp_path: Path) -> None:
    for number, steps in ((9, range(1, 10)), (10, range(7, 16))):
        made = tmp_path / str(number)
        (file,) = events(made, lambda _, part=number: {"reward": part / 10}, steps).iterdir()
        (tmp_path / "tb").mkdir(exist_ok=True)
        file.rename(tmp_path / "tb" / f"events.out.tfevents.1780000000.host.77.{number}")
    steps, _ = read(tmp_path / "tb", tmp_path / "out")
    assert steps["reward"].tolist() == pytest.approx([0.9] * 6 + [1.0] * 9)


def starts(*firsts: int) -> dict[Path, list[tuple[str, int, float]]]:
    return {Path(f"f{n}"): [("reward", first + s, 0.5) for s in range(9)]
            for n, first in enumerate(firsts)}  # fmt: skip


@pytest.mark.parametrize(
    ("firsts", "told"),
    [
        ((1, 1), "2 starts are in this folder; read is f1, the last with 8 steps or more; name "
         "another file to read it: f0"),
        ((1, 1, 1, 1), "4 starts are in this folder; read is f3, the last with 8 steps or more; "
         "name another file to read it: f0, f1, f2"),
        ((1, 1, 1, 1, 1), "5 starts are in this folder; read is f4, the last with 8 steps or more; "
         "name another file to read it: f0, f1, f2 and 1 more"),
        ((1, 10, 5), None), ((1, 10, 1), "2 starts are in this folder; read is f2, the last with "
         "8 steps or more; name another file to read it: f0, f1"),
    ],
)  # fmt: skip
def test_other_starts_in_a_folder_are_named(firsts: tuple[int, ...], told: str | None) -> None:
    report = ImportReport("tensorboard", "runs")
    _last_start(starts(*firsts), report)
    assert report.events == ([told] if told else [])


def test_of_short_starts_the_longest_is_read_and_its_steps_are_said() -> None:
    report = ImportReport("tensorboard", "runs")
    files = {Path(n): [("reward", s, 0.5) for s in range(size)] for n, size in (("a", 5), ("b", 3))}
    assert _last_start(files, report) == [Path("a")]
    assert "read is a, the last with 5 steps or more" in report.events[0]


def mlflow(root: Path, **metrics: str) -> Path:
    for name, lines in metrics.items():
        file = root / name.replace("__", "/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(lines)
    return root


TIME = 1_760_000_000_000


def test_numbers_of_mlflow_are_named_by_their_place_below_metrics(tmp_path: Path) -> None:
    lines = f"{TIME} 0.5 1\n{TIME} 0.75 2\n"
    bad = f"{TIME} 0.4 1\n{TIME} x 2\n{TIME} 0.6 x\n{TIME} 0.5\n"
    root = mlflow(tmp_path / "run", metrics__reward=lines, metrics__train__entropy=bad)
    steps, report = read(root, tmp_path / "out")
    assert steps["reward"].to_dict() == {1: 0.5, 2: 0.75}
    assert steps["entropy"].dropna().to_dict() == {1: 0.4}
    assert (report.files, report.lines, report.broken_lines) == (2, 6, 3)
    assert report.broken[0] == "entropy:2: not a time, a number and a step"
    several = tmp_path / "several"
    for name in ("a", "b"):
        mlflow(several / name, metrics__reward=lines)
    with pytest.raises(UserError, match=r"several holds 2 runs; .*several/a, .*several/b"):
        read(several, tmp_path / "x")
    loose = mlflow(tmp_path / "loose", reward=lines, entropy=lines)
    assert read(loose, tmp_path / "y")[0].loc[2, ["reward", "entropy"]].tolist() == [0.75, 0.75]


def test_a_scalar_downloaded_as_json_is_a_list_of_time_step_and_number(tmp_path: Path) -> None:
    rows = [[1.76e9, 1, 0.5], [1.76e9, 2, None], [1.76e9, None, 0.5], [1.76e9, 4], [1.76e9, 5, 0.1]]
    file = tmp_path / "run-tag-reward.json"
    file.write_text(json.dumps(rows))
    steps, report = read(file, tmp_path / "out")
    assert steps["reward"].to_dict() == {1: 0.5, 5: 0.1}
    assert (report.files, report.lines, report.broken_lines) == (1, 5, 3)
    assert [told.split(":")[1] for told in report.broken] == ["2", "3", "4"]
    assert "run-tag-reward.json is read as reward" in report.events


@pytest.mark.parametrize(
    "head",
    [["Step"], ["_step"], ["Relative Time (Process)", "Step"], ["Step", "Wall Time"],
     ["Relative Time (Process)", "run - _step"], ["run - _step", "Wall Time"]],
)  # fmt: skip
def test_a_chart_of_wandb_is_read_by_its_steps_whatever_times_stand_beside(
    head: list[str], tmp_path: Path
) -> None:
    cells = {name: [s if "tep" in name else 0.5 * s for s in range(1, 4)] for name in head}
    columns = cells | {"run - reward": [0.1, "", 0.3], "run - reward__MAX": [1, 1, 1]}
    rows = [list(row) for row in zip(*columns.values(), strict=True)]
    steps, report = read(table(tmp_path / "panel.csv", list(columns), rows), tmp_path / "out")
    assert steps["reward"].to_dict() == {1: 0.1, 3: 0.3}
    assert (report.broken_lines, dict(report.counts)) == (0, {})
    assert report.format == "wandb"
