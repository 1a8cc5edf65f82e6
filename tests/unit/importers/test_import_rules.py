"""Rules of the importers one by one: what repeats mean, what counts, which start, which name."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wapo_analysis.errors import UserError
from wapo_analysis.importers.boards import _last_start, is_panel, metric_of
from wapo_analysis.importers.console import _bars_count, _Counter, _dict, _end_of, _step_before
from wapo_analysis.importers.mapping import Feed, NameTable, likely_trainer, nearest
from wapo_analysis.importers.official import OfficialTree, step_of
from wapo_analysis.importers.printed import PrintedLog
from wapo_analysis.importers.repeats import Repeats, way_of
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.run import _raise_alarms
from wapo_analysis.importers.steplog import StepLog, _fed

LOG = Path("logs/train.jsonl")


def log_of(rows: Sequence[tuple[int, float]], key: str = "reward", **more: float) -> StepLog:
    log = StepLog(ImportReport("table", "logs"))
    for step, value in rows:
        log.add({key: value, **more}, step, "table", (LOG, step))
    return log


def settled(log: StepLog, key: str = "reward") -> dict[int, float]:
    return {step: row[key] for step, row in log.finish(NameTable({})).items() if key in row}


# ---- several records of one step

TWICE = [*range(1, 7), *range(4, 9)]


def test_after_a_resume_the_later_run_is_read() -> None:
    log = log_of([(s, 0.1 * n) for n, s in enumerate(TWICE)])
    log.end_of_file(LOG, 1, 8)
    found = settled(log)
    assert found == pytest.approx({1: 0, 2: 0.1, 3: 0.2, 4: 0.6, 5: 0.7, 6: 0.8, 7: 0.9, 8: 1.0})
    assert log.report.events == [
        "steps 4 to 6 were logged again after a resume: the later run is read"
    ]
    assert log.report.repeated_steps == {4, 5, 6}


def test_a_start_from_the_first_step_is_a_later_start() -> None:
    log = log_of([(s, 0.1 * n) for n, s in enumerate([1, 2, 3, 1, 2, 3, 4])])
    log.end_of_file(LOG, 1, 4)
    assert settled(log) == pytest.approx({1: 0.3, 2: 0.4, 3: 0.5, 4: 0.6})
    assert log.report.events == [
        "steps 1 to 3 were logged again by a later start: the later run is read"
    ]


@pytest.mark.parametrize(
    ("key", "result"),
    [
        ("reward", 0.2), ("actor/num_tokens", 0.3), ("count", 0.4), ("reward/max", 0.3),
        ("kl_min", 0.1), ("tokens", 0.4), ("count_mean", 0.2), ("train/total", 0.3),
        ("n_rate", 0.2), ("nonfinite", 0.4),
    ],
)  # fmt: skip
def test_records_of_ranks_become_one_by_their_name(key: str, result: float) -> None:
    log = log_of([(s, v) for s in range(1, 6) for v in (0.1, 0.3)], key)
    rows = log.finish(NameTable({}))
    (name,) = rows[1]
    assert rows[1][name] == pytest.approx(result)
    assert "steps 1 to 5 have several records each" in log.report.events[0]
    assert ("summed instead: " in log.report.events[0]) is (result == 0.4)


@pytest.mark.parametrize(
    ("key", "way"),
    [("train/num_x", "sum"), ("counts", "sum"), ("max_x", "max"), ("x/min", "min"),
     ("x_p95", "mean"), ("kept_tokens", "sum"), ("min_x_mean", "mean"), ("total_x", "max")],
)  # fmt: skip
def test_how_numbers_of_several_ranks_make_one(key: str, way: str) -> None:
    assert way_of(key) == way


def test_ranks_that_take_turns_go_back_all_the_time() -> None:
    steps = np.array([1, 2, 1, 2, 3, 4, 3, 4, 5, 6, 5, 6])
    turns = Repeats.of(steps, np.arange(12.0))
    assert turns is not None
    assert (turns.jumps, turns.alternates) == (3, True)
    again = Repeats.of(np.array(TWICE), np.arange(11.0))
    assert again is not None
    assert (again.jumps, again.alternates) == (1, False)
    assert again.back.tolist() == again.differing.tolist() == [4, 5, 6]
    assert Repeats.of(np.arange(5), np.zeros(5)) is None
    same = Repeats.of(np.array([1, 1, 2]), np.array([np.nan, np.nan, 1.0]))
    assert same is not None
    assert (same.jumps, len(same.differing)) == (0, 0)
    assert same.settled(False, "mean")[2] == 1.0


def test_two_files_of_the_same_steps_are_two_runs_and_one_that_goes_on_is_not() -> None:
    both = log_of([(s, 0.1 * n) for n, s in enumerate([1, 2, 3, 4, 1, 2, 3, 4])])
    for name in ("a", "b"):
        both.end_of_file(Path(f"logs/{name}.jsonl"), 1, 4)
    with pytest.raises(UserError, match="2 files of logs hold .* look like 2 runs; .*: a.jsonl, b"):
        settled(both)
    goes_on = log_of([(s, 0.1 * n) for n, s in enumerate([1, 2, 3, 4, 3, 4, 5, 6])])
    goes_on.end_of_file(Path("logs/a.jsonl"), 1, 4)
    goes_on.end_of_file(Path("logs/b.jsonl"), 3, 6)
    assert settled(goes_on)[3] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("values", "counts"),
    [([1, 2, 3], True), ([0, 1, 2], True), ([1], False), ([1, 1, 2], False), ([1, 2.5, 3], False),
     ([-1, 0, 1], False), ([1, 2, 1, 2], False), ([3, 2, 1], False), ([1, 2], True)],
)  # fmt: skip
def test_what_counts_records(values: list[float], counts: bool) -> None:
    log = log_of(list(enumerate(values)), "epoch")
    assert log.counts("epoch", 1) is counts
    assert log.counts("epoch", 2) is (counts or values == [1, 2, 1, 2])
    assert log.counts("epoch", 3) is (counts or values == [1, 2, 1, 2]), "some must rise"
    assert not log.counts("other", 1)


def test_names_that_may_count_the_steps_the_most_steplike_first() -> None:
    log = StepLog(ImportReport("table", "logs"))
    for n in range(5):
        row = {"my_step": 10 * n, "when": n * n, "count": n, "tokens": 7 * n, "reward": 0.1 * n,
               "flat": 3, "back": -n, "below": n - 1, "seen": n**2, "batch_tokens": n,
               "half_step": n / 2, "last_step": n if n < 3 else np.inf,
               "zigzag_step": n ^ 1, "pair_step": n // 2}  # fmt: skip
        if n < 2:
            row["twice"] = n
        log.add(row, n, "table", (LOG, n))
    assert list(log.step_candidates().items()) == [
        ("batch_tokens", [0, 1, 2]), ("my_step", [0, 10, 20]), ("pair_step", [0, 0, 1]),
        ("when", [0, 1, 4]), ("count", [0, 1, 2]), ("twice", [0, 1]), ("seen", [0, 1, 4]),
    ]  # fmt: skip
    assert not log.counts("last_step", 1)
    log.count_by("my_step")
    assert sorted(log.finish(NameTable({}))) == [0, 10, 20, 30, 40]


def test_a_column_of_several_names_is_their_mean_where_all_are_there() -> None:
    columns = {"a": {1: 1.0, 2: 2.0}, "b": {2: 4.0, 3: 6.0}, "c": {4: 9.0, 2: 7.0}, "d": {9: 1.0}}
    assert _fed(Feed(("a", "b")), columns) == {2: 3.0}
    assert _fed(Feed(("a", "d")), columns) == {1: 1.0, 2: 2.0}
    assert _fed(Feed(("a",), ("c",)), columns) == {1: 1.0, 2: 2.0, 4: 9.0}
    assert _fed(Feed(("a",), complement=True), columns) == {1: 0.0, 2: -1.0}
    assert _fed(Feed(("a",), negative=True), columns) == {1: -1.0, 2: -2.0}


@pytest.mark.parametrize(("updates", "each"), [(24, 3), (16, 2), (8, 1)])
def test_updates_are_at_the_step_of_their_batch(updates: int, each: int) -> None:
    log = StepLog(ImportReport("table", "logs"))
    for n in range(8):
        log.add({"rollout/x": n}, n, "table", (LOG, n))
    for n in range(updates):
        log.add({"train/loss": n}, n, "table", (LOG, n), step_key="train/step")
    rows = log.finish(NameTable({}))
    assert sorted(rows) == list(range(8))
    assert rows[2]["loss"] == pytest.approx(np.arange(2 * each, 3 * each).mean())
    assert any(f"{each} a batch" in said for said in log.report.events) is (each > 1)


# ---- printed records


@pytest.mark.parametrize(
    ("bars", "count"),
    [([1, 2, 3], True), ([1], False), ([1, None, 3], False), ([1, 1, 1], False),
     ([*range(10), 9], True), ([*range(9), 8, 8], False), ([3, 2, 1], False), ([1, 2], True)],
)  # fmt: skip
def test_a_bar_counts_if_it_moves_between_nearly_all_records(
    bars: list[int | None], count: bool
) -> None:
    assert _bars_count(bars) is count


def test_records_are_numbered_and_a_start_again_goes_back_by_its_epoch() -> None:
    counter = _Counter()
    epochs = [0.1, 0.2, 0.3, 0.2, 0.3, 0.4]
    steps = [counter.step({"reward": 1, "summary/epoch": e}, None) for e in epochs]
    assert steps == [1, 2, 3, 2, 3, 4]
    assert counter.step({"eval/reward": 1, "summary/epoch": 0.4}, None) == 4, "of the step before"
    assert counter.count == 6
    assert counter.step({"reward": 1}, None) == 5
    assert counter.step({"reward": 1}, 30) == 30
    assert counter.step({"eval/reward": 1}, 20) == 30
    assert counter.step({"eval/reward": 1}, 40) == 40


@pytest.mark.parametrize(
    ("text", "end"),
    [("{'a': 1} rest", 8), ("{'a': {'b': 1}}", 15), ("{'a': '}'}", 10), ("{'a': 'x\\'}'}", 13),
     ("{'a': 1", None), ('{"a": "{"} {', 10)],
)  # fmt: skip
def test_where_a_printed_dict_ends(text: str, end: int | None) -> None:
    assert _end_of(text) == end


@pytest.mark.parametrize(
    ("text", "step"),
    [("step 3: ", 3), ("iter=12 ", 12), ("[rollout #4]", None), ("perf 5: metrics=", 5), ("", None),
     ("epoch 3: ", None), ("Iteration: 7", 7)],
)  # fmt: skip
def test_the_step_before_a_printed_dict(text: str, step: int | None) -> None:
    assert _step_before(text) == step


@pytest.mark.parametrize(
    ("text", "record"),
    [
        ("{'loss': 0.5, 'x': nan}", {"loss": 0.5, "x": "nan"}),
        ("{'loss': tensor(0.5, device='cuda:0'), 'n': np.float64(2.5)}", {"loss": 0.5, "n": 2.5}),
        ('{"loss": 0.5, "flag": true}', {"loss": 0.5, "flag": True}),
        ("{'a': 'text'}", None), ("{1: 2}", None), ("{broken", None),
    ],
)  # fmt: skip
def test_a_printed_dict_is_read_with_numbers_of_numpy_and_torch(
    text: str, record: dict[str, Any] | None
) -> None:
    assert _dict(text) == record


def printed(lines: list[str]) -> list[tuple[int | None, dict[str, float]]]:
    log = PrintedLog(lambda keys: "reward" in keys)
    for number, line in enumerate(lines, start=1):
        log.add(number, line)
    return [(record.step, record.values) for record in log.records()]


def test_a_bar_of_every_epoch_goes_on_where_the_last_ended() -> None:
    bar = "epoch {}: {}/4 [00:01<00:02, 1.2it/s, reward=0.{}]"
    lines = [bar.format(e, n, e * 4 + n) for e in (0, 1) for n in (2, 4)]
    assert printed(lines) == [(2, {"reward": 0.2}), (4, {"reward": 0.4}),
                              (6, {"reward": 0.6}), (8, {"reward": 0.8})]  # fmt: skip


def test_a_bar_within_every_step_counts_none_of_them() -> None:
    bar = "{}/2 [00:01<00:02, 1.2it/s, reward=0.{}]"
    lines = [bar.format(n, 2 * s + n) for s in range(3) for n in (1, 2)]
    assert printed(lines) == [(None, {"reward": 0.2}), (None, {"reward": 0.4}),
                              (None, {"reward": 0.6})]  # fmt: skip


def test_lines_below_a_heading_are_of_its_step() -> None:
    lines = [line for s in (1, 2, 3) for line in (f"=== Step {s}/9 ===", f"reward: 0.{s}")]
    assert printed(lines) == [(s, {"reward": s / 10}) for s in (1, 2, 3)]
    one = ["=== Step 1/9 ===", *(f"reward: 0.{n}" for n in range(1, 5))]
    assert printed(one) == [(None, {"reward": n / 10}) for n in range(1, 5)]


def test_lines_without_a_step_are_one_record_until_a_name_comes_again() -> None:
    lines = ["reward: 0.1", "reward: 0.2", "entropy=0.4 reward=0.3", "other=3"]
    assert printed(lines) == [(None, {"reward": 0.1}), (None, {"reward": 0.2}),
                              (None, {"entropy": 0.4, "reward": 0.3})]  # fmt: skip


# ---- boards


def scalars(*steps: int, name: str = "reward") -> list[tuple[str, int, float]]:
    return [(name, step, 0.5) for step in steps]


@pytest.mark.parametrize(
    ("starts", "read"),
    [
        ([range(1, 5)], ["0"]),
        ([range(1, 11), range(1, 9)], ["1"]),
        ([range(1, 11), range(1, 8)], ["0"]),
        ([range(1, 5), range(1, 4)], ["0"]),
        ([range(1, 5), range(1, 5)], ["1"]),
        ([range(1, 11), range(11, 21)], ["0", "1"]),
        ([range(1, 11), range(5, 21), range(0, 9)], ["2"]),
        ([range(1, 11), range(0)], ["0", "1"]),
        ([range(1, 11), range(5, 21)], ["0", "1"]),
    ],
)
def test_of_several_starts_the_last_that_is_long_enough_is_read(
    starts: list[range], read: list[str]
) -> None:
    report = ImportReport("tensorboard", "runs")
    files = {Path(str(n)): scalars(*steps) for n, steps in enumerate(starts)}
    assert [f.name for f in _last_start(files, report)] == read
    assert bool(report.events) is (len(read) < len([s for s in starts if s]))


def test_a_file_of_other_names_is_of_the_same_start() -> None:
    files = {Path("a"): scalars(*range(10)), Path("b"): scalars(*range(10), name="loss")}
    assert len(_last_start(files, ImportReport("tensorboard", "runs"))) == 2


@pytest.mark.parametrize(
    ("stem", "name"),
    [("run-1_tag_reward", "reward"), ("train_loss", "loss"), ("entropy", "entropy"),
     ("myentropy", None), ("notes", None), ("run_critic_score_mean", "critic/score/mean")],
)  # fmt: skip
def test_the_metric_in_the_name_of_a_file(stem: str, name: str | None) -> None:
    assert metric_of(stem) == name


@pytest.mark.parametrize(
    ("names", "panel"),
    [(["Step", "a - reward"], True), (["Step", "a - reward", "a - reward__MIN"], True),
     (["Step", "reward"], False), (["a - reward"], False), (["Step"], False),
     (["Relative Time (Process)", "Step", "a - b"], True), (["Step", "a - b", "c"], False)],
)  # fmt: skip
def test_what_is_a_chart_of_wandb(names: list[str], panel: bool) -> None:
    assert is_panel(names) is panel


# ---- words, trainers, trees


@pytest.mark.parametrize(
    ("keys", "trainer"),
    [
        (["actor/entropy", "critic/score/mean", "response_length/mean"], "verl"),
        (["reward", "loss", "entropy"], None),
        (["global_step/max_steps", "reward"], "ms-swift"),
        (["current_steps", "loss"], "LLaMA-Factory"),
        (["actor/pg_clipfrac"], None),
        ([], None),
    ],
)
def test_the_trainer_is_known_by_two_of_its_names(keys: list[str], trainer: str | None) -> None:
    assert likely_trainer(keys) == trainer


def test_what_looks_like_a_column_is_taken_by_the_first_it_fits() -> None:
    assert nearest(["mean_return", "ent"]) == {"reward": "mean_return", "entropy": "ent"}
    assert nearest(["lossy"], ("loss",)) == {"loss": "lossy"}
    assert nearest(["rewad"], ("reward",)) == {"reward": "rewad"}
    assert nearest(["xyz"], ("reward",)) == {}
    assert nearest(["bert"], ("reward",)) == {}
    assert nearest(["comment"], ("entropy",)) == nearest(["silence"], ("length",)) == {}
    assert nearest(["my_len"], ("length",)) == {"length": "my_len"}


@pytest.mark.parametrize(
    ("lines", "broken", "alarm"),
    [(10, 5, False), (10, 6, True), (0, 1, True), (0, 0, False)],
)
def test_most_lines_lost_is_an_alarm(lines: int, broken: int, alarm: bool) -> None:
    report = ImportReport("table", "t", lines=lines, broken_lines=broken, mapped={"reward": "r"})
    _raise_alarms(report)
    assert bool(report.alarms) is alarm
    if alarm:
        assert report.alarms == [f"{broken} of {max(lines, broken)} lines were not read"]


def test_trees_of_an_official_run_lie_beside_each_other(tmp_path: Path) -> None:
    file = tmp_path / "plots" / "plots-b" / "run" / "data" / "token_bins" / "token_bins.jsonl"
    texts = tmp_path / "plots" / "completions-b" / "run"
    for folder in (file.parent, texts):
        folder.mkdir(parents=True)
    for step in (10, 2):
        (texts / f"step_{step}.json").write_text("[]")
    file.write_text("")
    tree = OfficialTree.of((file,))
    assert tree.run == file.parents[2]
    assert [f.name for f in tree.texts("completions")] == ["step_2.json", "step_10.json"]
    assert tree.bins() == [file]
    assert not tree.shared
    assert (step_of(Path("scatter_step_12.npz")), step_of(Path("x.npz"))) == (12, -1)
    other = tmp_path / "plots" / "run2" / "data" / "rewards" / "reward_step_1.npy"
    with pytest.raises(UserError, match="several official runs here"):
        OfficialTree.of((file, other))
