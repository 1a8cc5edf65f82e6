"""What detectors read of a run: checkpoints, weights of functions, usual sizes, pay for length."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.support.step_logs import finding, judge, names, ramp, write_steps
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.samples import length_pay
from wapo_analysis.store import open_run

N = 60
FLAT = np.full(N, 0.3)
WAVE = np.random.default_rng(5).normal(0, 1, N)


def test_the_checkpoint_before_a_step_still_behaved_as_before(tmp_path: Path) -> None:
    reward = np.r_[np.full(6, 0.2), np.full(6, 0.6), np.full(8, 0.4)]
    path = write_steps(tmp_path / "run", {"reward": reward})
    for step in (0, 5, 9, 14):
        (path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    context = Context(open_run(path))
    assert context.checkpoints == (0, 5, 9, 14)
    before = {step: context.checkpoint_before(step) for step in (1, 2, 6, 7, 10, 11, 99)}
    assert before == {1: None, 2: 0, 6: 0, 7: 5, 10: 5, 11: 9, 99: 14}
    assert [context.earned_by(s) for s in (0, 5, 9, 14, 30)] == [0.2, 0.2, 0.6, 0.4, 0.4]
    assert context.best_checkpoint() == 9
    assert context.best_checkpoint(9) == 5
    assert context.best_checkpoint(5) is None
    assert str(context.go_back(11)) == "Go back to the checkpoint of step 9."
    assert "No checkpoint from before step 1 is left" in str(context.go_back(1))


@pytest.mark.parametrize(("step", "said"), [(1, "Start again"), (2, "the last checkpoint before")])
def test_without_a_checkpoint_one_starts_again_or_looks_for_one(
    tmp_path: Path, step: int, said: str
) -> None:
    context = Context(open_run(write_steps(tmp_path, {"reward": FLAT}, source="trl")))
    assert said in str(context.go_back(step))


def test_functions_count_by_their_weights_in_the_reward(tmp_path: Path) -> None:
    form, content = 0.3 + 0.01 * WAVE, 0.25 + 0.01 * WAVE[::-1]
    functions = {"rewards/format/mean": form, "rewards/correct/mean": content}
    told = judge(tmp_path / "a", reward=0.9 * form + 0.2 * content, **functions)
    share = finding(told, "one_reward_takes_over").evidence["share"]
    assert share == pytest.approx(0.27 / 0.32, rel=0.02)
    for reward in (form + content, 2 * content - 0.5 * form, FLAT + 9 * WAVE):
        even = judge(tmp_path / str(reward[0]), reward=reward, **functions)
        assert "one_reward_takes_over" not in names(even)


@pytest.mark.parametrize(("left", "stalled"), [(8e-3, False), (5e-3, True)])
def test_no_gradient_is_judged_by_what_is_usual_in_the_first_third(
    tmp_path: Path, left: float, stalled: bool
) -> None:
    grad = np.repeat([10, 1, left], [10, 20, 30])
    assert ("stalled" in names(judge(tmp_path, reward=FLAT, grad_norm=grad))) is stalled


@pytest.mark.parametrize(("scale", "stalled"), [(1.0, True), (4.0, False)])
def test_a_climb_to_the_top_of_its_own_scale_is_no_stall(
    tmp_path: Path, scale: float, stalled: bool
) -> None:
    reward, grad = scale * ramp(0.2, 0.6, N, 5, 15), np.repeat([1.0, 0.0], [25, 35])
    assert ("stalled" in names(judge(tmp_path, reward=reward, grad_norm=grad))) is stalled


@pytest.mark.parametrize(
    ("wrong", "right", "side"),
    [(0.4, 0.2, "too_hard"), (0.2, 0.4, "too_easy"), (0.3, 0.3, ""), (0.25, 0.0, "too_hard")],
)
def test_flat_groups_are_hard_or_easy_at_twice_the_other(
    tmp_path: Path, wrong: float, right: float, side: str
) -> None:
    shares = {"groups_flat": 0.6, "groups_all_wrong": wrong, "groups_all_right": right}
    told = judge(tmp_path, reward=FLAT + 0.2, **{n: np.full(N, v) for n, v in shares.items()})
    assert names(told) == {f"zero_signal_{side}" if side else "zero_signal"}


def test_the_latest_arrival_is_that_of_the_slow_end_of_the_interval(tmp_path: Path) -> None:
    entropy = 0.4 * np.exp(0.015 * np.clip(np.arange(N) - 40, 0, None))
    exact = finding(judge(tmp_path / "exact", reward=FLAT, entropy=entropy), "entropy_arrival")
    assert exact.evidence["latest_step"] == exact.evidence["arrival_step"] == 88
    wavy = entropy * np.exp(0.01 * WAVE)
    rough = finding(judge(tmp_path / "wavy", reward=FLAT, entropy=wavy), "entropy_arrival")
    first, latest = rough.evidence["arrival_step"], rough.evidence["latest_step"]
    assert 80 < first < latest < 130


def test_rows_without_a_reward_or_a_length_say_nothing_of_their_pay() -> None:
    rng = np.random.default_rng(0)
    rows = pd.DataFrame({"step": np.repeat([1, 2], 8), "group": np.tile(np.repeat([0, 1], 4), 2),
                         "length": rng.integers(5, 50, 16).astype(float)})  # fmt: skip
    rows["reward"] = rows["length"] / 50 + rng.normal(0, 0.1, 16)
    bare = rows.assign(reward=np.nan, length=rows["length"] * 9)
    short = rows.assign(length=np.nan, reward=5.0)
    pay = length_pay(rows)
    assert pay.steps.tolist() == [1, 2]
    assert (pay.values > 0.5).all()
    np.testing.assert_allclose(length_pay(pd.concat([rows, bare, short])).values, pay.values)
    assert not len(length_pay(bare))
    assert not len(length_pay(rows.assign(length=7.0)))
    against = length_pay(rows.assign(reward=-rows["reward"]))
    np.testing.assert_allclose(against.values, -pay.values)
