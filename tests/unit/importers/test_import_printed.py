"""Lines that people print, one by one: which numbers, of which step, below which heading."""

from pathlib import Path

import pytest

from tests.support.logged import read
from wapo_analysis.errors import UserError
from wapo_analysis.importers.printed import PrintedLog, line_of


@pytest.mark.parametrize(
    ("text", "step", "values"),
    [
        ("reward mean=1.0 std=2.0", None, {"reward_mean": 1, "reward_std": 2}),
        ("mean=1.0 max=2.0", None, {"mean": 1, "max": 2}),
        ("loss=3 reward (mean=0.5 max=1) min=0", None,
         {"loss": 3, "reward_mean": 0.5, "reward_max": 1, "reward_min": 0}),
        ("reward mean=1 loss=3 std=2", None, {"reward_mean": 1, "loss": 3, "std": 2}),
        (f"{'x' * 90} reward: mean=1", None, {"reward_mean": 1}),
        ("acc=50% loss=2", None, {"acc": 0.5, "loss": 2}),
        ("tokens=1_000 loss=2", None, {"tokens": 1000, "loss": 2}),
        ("tokens: 12,345 loss: 2", None, {"tokens": 12345, "loss": 2}),
        ("loss=1.5 loss=2.5", None, {"loss": 1.5}),
        ("loss: 0.5", None, {"loss": 0.5}),
        ("loss:0.5 reward:0.25", None, {"loss": 0.5, "reward": 0.25}),
        ("loss:0.5", None, None),
        ("loss:0.5 mean reward: 2", None, {"mean_reward": 2}),
        ("| reward | 0.5 | loss | 2 |", None, {"reward": 0.5, "loss": 2}),
        ("reward 0.5, loss 2", None, {"reward": 0.5, "loss": 2}),
        ("reward 0.5 loss 2", None, {"reward": 0.5, "loss": 2}),
        ("reward 0.5", None, None),
        ("reward 0.5, text", None, None),
        ("step 3 reward=tensor(0.45) loss=tensor(0.5, device='cuda:0')", 3,
         {"reward": 0.45, "loss": 0.5}),
        ("Step: 3, Loss: tensor(-0.01, grad_fn=<MeanBackward0>)", 3, {"Loss": -0.01}),
        ("step 3 \u2014 reward 0.45 \u2014 loss 0.5", 3, {"reward": 0.45, "loss": 0.5}),
        ("Step 3, Reward: 0.45. Loss: 0.5.", 3, {"Reward": 0.45, "Loss": 0.5}),
        ("{step: 3, reward: 0.45, loss: 0.5}", 3, {"reward": 0.45, "loss": 0.5}),
        # a decimal comma is no end of a number
        ("step 3 reward: 0,45 loss: 0,50", None, None),
        ("step 3 reward=0,45 loss=0,50", None, None),
        ("step 3 reward:0,45 loss:0,50", None, None),
        ("step 3 reward 0,45, loss 0,50", None, None),
        ("step 3 reward=0.5,loss=0.25", 3, {"reward": 0.5, "loss": 0.25}),
        ("nothing here", None, None),
        # the step
        ("step 5 loss=1", 5, {"loss": 1}),
        ("loss=1 step=5", 5, {"loss": 1}),
        ("step 5 global_step 100 loss=1", 100, {"loss": 1}),
        ("step 5 train_step 7 loss=1", 7, {"loss": 1}),
        ("iter 3 step 5 loss=1", 5, {"loss": 1}),
        ("update 2 iteration 3 loss=1", 3, {"loss": 1}),
        ("step: 7 iter 3 loss=1", 7, {"loss": 1}),
        ("train:step:45 - step 3 loss=1", 3, {"loss": 1}),
        ("3/60 [00:01<00:02, 1.2it/s, loss=0.5]", 3, {"loss": 0.5}),
        ("Epoch:[1/1](7/9751) loss:0.5 lr:0.1", 7, {"loss": 0.5, "lr": 0.1}),
        # headings
        ("Step 3", 3, {}),
        ("running step 3/9 now", 3, {}),
        ("=== running step 3 ===", 3, {}),
        ("== running step 3 ==", None, None),
        ("running step 3 now", None, None),
    ],
)  # fmt: skip
def test_what_a_line_says(text: str, step: int | None, values: dict[str, float] | None) -> None:
    line = line_of(text)
    assert (line.values if line else None) == values
    if line is not None:
        assert line.step == step
        assert line.heading is (values == {})
        assert line.bar == ((3, 60) if "3/60" in text else (7, 9751) if "9751" in text else None)


def nested(*lines: str) -> list[tuple[int | None, dict[str, float]]]:
    log = PrintedLog(lambda keys: any("loss" in key for key in keys))
    for number, line in enumerate(["=== Step 4/9 ===", *lines], start=1):
        log.add(number, line)
    return [(record.step, record.values) for record in log.records()]


@pytest.mark.parametrize(
    ("lines", "values"),
    [
        (["actor:", "  loss: 0.5"], [{"actor/loss": 0.5}]),
        (["actor:", "  a:", "    loss: 1_0", "  b:", "    loss: 2"],
         [{"actor/a/loss": 10}, {"actor/b/loss": 2}]),
        (["actor:", "  loss: 1", "critic:", "  loss: 2"], [{"actor/loss": 1}, {"critic/loss": 2}]),
        (["actor:", "    loss: 1", "  loss: 2"], [{"actor/loss": 1}, {"actor/loss": 2}]),
        (["actor:", "words between", "  loss: 1"], [{"loss": 1}]),
        (["loss: 1", "speed: 2"], [{"loss": 1}]),
    ],
)  # fmt: skip
def test_numbers_below_a_heading_are_named_by_what_stands_above_them(
    lines: list[str], values: list[dict[str, float]]
) -> None:
    assert nested(*lines) == [(4, found) for found in values]


EPOCHS = "epoch {}: {}/4 [00:01<00:02, 1.2it/s, loss=0.{}]"


@pytest.mark.parametrize(
    ("bars", "steps"),
    [
        pytest.param([(0, 2), (0, 4), (1, 2), (1, 4)], [2, 4, 6, 8], id="a bar each"),
        pytest.param([(0, 4), (1, 4), (2, 4)], [4, 8, 12], id="at its end alone"),
        pytest.param([(0, 3), (1, 1), (2, 1)], [3, 5], id="of a shorter one the last counts"),
        pytest.param([(0, 2), (1, 2), (1, 4)], [2, 4], id="an epoch within the bar"),
        pytest.param([(0, 2), (1, 3), (1, 4)], [2, 3, 4], id="a bar over all epochs"),
        pytest.param([(0, 4), (0, 4)], [4], id="the end of a bar, printed twice"),
        pytest.param([(1, 2), (0, 1), (0, 2)], [2, 1], id="an epoch before"),
    ],
)
def test_bars_of_epochs_go_on_where_the_last_one_ended(
    bars: list[tuple[int, int]], steps: list[int]
) -> None:
    log = PrintedLog(lambda keys: True)
    for number, (epoch, place) in enumerate(bars, start=1):
        log.add(number, EPOCHS.format(epoch, place, number))
    found = {record.step: record.values["loss"] for record in log.records()}
    assert sorted(found) == sorted(steps)
    assert max(found.values()) == len(bars) / 10, "the last is there"


@pytest.mark.parametrize(
    ("line", "steps", "told"),
    [
        ("step={0} reward=0.{0} entropy=0.4", 8, []),
        ("{{'reward': 0.{0}, 'entropy': 0.4, 'step': {0}}}", 8, []),
        ("iter {0}: {{'reward': 0.{0}, 'entropy': 0.4}}", 8, []),
        ("step:{0} - actor/entropy:0.4 - critic/score/mean:0.{0}", 8, []),
        ("{{'reward': 0.{0}, 'entropy': 0.4}}", 8,
         ["the 8 printed records carry no step, so they are counted from 1"]),
        ("{{'reward': 0.{0}, 'entropy': 0.4, 'epoch': 0.0{0}}}", 8,
         ["the 8 printed records carry no step, so they are counted from 1: with logging_steps = n "
          "a step here is n of the trainer's"]),
        ("reward=0.{0} entropy=0.4", 8,
         ["the 8 printed records carry no step, so they are counted from 1"]),
    ],
)  # fmt: skip
def test_each_printed_record_is_a_line_and_a_step(
    line: str, steps: int, told: list[str], tmp_path: Path
) -> None:
    (tmp_path / "t.log").write_text("".join(line.format(n) + "\n" for n in range(1, steps + 1)))
    rows, report = read(tmp_path / "t.log", tmp_path / "out")
    assert rows["reward"].tolist() == pytest.approx([n / 10 for n in range(1, steps + 1)])
    assert rows.index.tolist() == list(range(1, steps + 1))
    assert (report.files, report.lines, report.events) == (1, steps, told)


@pytest.mark.parametrize("records", [29, 30])
def test_a_number_printed_alone_is_a_log_of_thirty_of_them(records: int, tmp_path: Path) -> None:
    (tmp_path / "t.log").write_text("reward = 0.5\n" * records)
    if records < 30:
        with pytest.raises(UserError, match="nothing to import|no known file"):
            read(tmp_path / "t.log", tmp_path / "out")
    else:
        assert len(read(tmp_path / "t.log", tmp_path / "out")[0]) == records


@pytest.mark.parametrize(
    ("after", "told"),
    [("", True), ("step=9 reward=0.9 entropy=0.4\n", False), ("some words\n", True)],
)
def test_a_log_that_ends_in_an_error_says_so(after: str, told: bool, tmp_path: Path) -> None:
    lines = "".join(f"step={n} reward=0.{n} entropy=0.4\n" for n in range(1, 9))
    error = "torch.cuda.OutOfMemoryError: CUDA out of memory"
    (tmp_path / "t.log").write_text(f"{lines}{error}\n{after}")
    _, report = read(tmp_path / "t.log", tmp_path / "out")
    assert report.events == ([f"t.log ends in an error (line 9): {error}"] if told else [])


def test_the_last_line_is_named_by_its_number_also_without_a_line_feed(tmp_path: Path) -> None:
    lines = [f"{{'reward': 0.{n}, 'entropy': 0.4, 'step': {n}}}" for n in range(1, 9)]
    lines.append("{'reward': 0.5, 'entropy': 0.4, 'step': -1}")
    (tmp_path / "t.log").write_text("\n".join(lines))
    rows, report = read(tmp_path / "t.log", tmp_path / "out")
    assert (len(rows), report.broken) == (8, ["t.log:9: no step"])


def taken(known: str, *lines: str) -> list[tuple[int | None, dict[str, float]]]:
    log = PrintedLog(lambda keys: known in keys)
    for number, line in enumerate(lines, start=1):
        log.add(number, line)
    return [(record.step, record.values) for record in log.records()]


def test_records_of_unknown_names_count_where_no_others_are() -> None:
    lines = [f"step={n} a={n} b=1" for n in (1, 2)]
    assert taken("reward", *lines) == [(1, {"a": 1, "b": 1}), (2, {"a": 2, "b": 1})]
    assert taken("reward", *lines, "step=3 reward=1 c=2") == [(3, {"reward": 1, "c": 2})]
    assert taken("reward", "=== Step 1/9 ===", "a = 1") == [], "below a heading known ones alone"
    assert taken("reward", "a = 1") == []


@pytest.mark.parametrize("headings", [2, 3])
def test_many_lines_of_a_name_below_a_heading_are_of_its_step_if_three_have_them(
    headings: int,
) -> None:
    lines = []
    for step in range(1, headings + 1):
        lines += [f"=== Step {step}/9 ===", *(f"reward: 0.{n}" for n in range(1, 5))]
    steps = [step for step, _ in taken("reward", *lines)]
    each = [step for step in range(1, headings + 1) for _ in range(4)]
    assert steps == (each if headings > 2 else [None] * 8)


def test_bars_of_one_batch_between_longer_ones_are_records_too() -> None:
    bar = "{0}/{0} [00:01<00:02, 1.2it/s, reward=0.{1}]"
    lines = [bar.format(1 + n % 2, n + 1) for n in range(6)]
    assert taken("reward", *lines) == [(None, {"reward": n / 10}) for n in range(1, 7)]
