"""What detectors read of a run: checkpoints, weights of functions, usual sizes, pay for length."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.step_logs import finding, judge, names, ramp, reopened, write_flows, write_steps
from wapo_analysis.diagnose.context import (
    Context,
    driver_advice,
    driver_words,
    entropy_drivers,
    grades_form,
)
from wapo_analysis.diagnose.result import Driver
from wapo_analysis.diagnose.samples import length_pay
from wapo_analysis.schema import ALL_TOKENS, PROBES
from wapo_analysis.store import open_run
from wapo_analysis.table import Records

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


def test_a_checkpoint_earns_what_its_policy_earned_in_the_next_step(tmp_path: Path) -> None:
    context = Context(open_run(write_steps(tmp_path, {"reward": 0.01 * np.arange(1, 21)})))
    earned = [context.earned_by(saved) for saved in (0, 5, 9, 19, 30)]
    assert earned == pytest.approx([0.015, 0.06, 0.1, 0.195, 0.195])


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
    assert exact.evidence["latest_step"] == exact.evidence["arrival_step"] == 87
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


# ---- columns ------------------------------------------------------------------------------------


def seen(tmp_path: Path, columns: dict[str, Any], **manifest: Any) -> Context:
    """What detectors see of a run with a step log alone."""
    run = open_run(write_steps(tmp_path / "run", columns, source=manifest.pop("source", "loop")))
    return Context(replace(run, manifest=run.manifest.changed(manifest)))


@pytest.mark.parametrize(
    ("columns", "solved"),
    [
        ({"reward": [0.0, 0.5, 1.0, 0.9, 0.9]}, True),
        ({"reward": [0.0, 0.5, 0.7, 0.7, 0.7]}, False),
        ({"reward": [-0.01, 0.5, 0.9, 0.9, 0.9]}, False),  # no score
        ({"reward": [0.0, 0.5, 1.01, 0.9, 0.9]}, False),
        ({"reward": [0.5, 5.0, 0.9, 0.9, 0.9]}, False),
        ({"reward": [-4.0, 0.5, 0.9, 0.9, 0.9]}, False),
        ({"reward": [0.2] * 5, "pass_rate": [0.9] * 5}, True),
        ({"reward": [0.9] * 5, "pass_rate": [0.2] * 5}, False),
        ({"reward": [3.0] * 5, "eval_reward": [0.9] * 5}, True),
        ({"reward": [3.0] * 5, "eval/reward": [0.9] * 5}, True),
        ({"reward": [3.0] * 5, "rewards/correct/mean": [0.9] * 5}, True),
        ({"reward": [3.0] * 5, "rewards/correct/mean": [0.8] * 5}, True),
        ({"reward": [3.0] * 5, "rewards/correct/mean": [0.79] * 5}, False),
        ({"reward": [3.0] * 5, "rewards/correct/mean": [1.0] * 5}, True),
        ({"reward": [3.0] * 5, "rewards/correct/mean": [1.1] * 5}, False),
        ({"reward": [3.0] * 5, "rewards/format/mean": [0.9] * 5}, False),
        ({"reward": [3.0] * 5, "rewards/a/mean": [0.9] * 5, "rewards/b/mean": [0.1] * 5}, False),
        ({"reward": [3.0] * 5, "rewards/a/mean": [0.9] * 5, "rewards/format/mean": [0.1] * 5},
         True),
        ({"reward": [3.0] * 5}, False),
    ],
)  # fmt: skip
def test_a_task_is_solved_by_the_first_score_within_0_and_1(
    tmp_path: Path, columns: dict[str, list[float]], solved: bool
) -> None:
    reward = seen(tmp_path, columns).reward
    assert reward is not None
    assert reward.solved is solved


def test_a_run_without_a_reward_has_no_reward_to_judge(tmp_path: Path) -> None:
    context = seen(tmp_path, {"loss": FLAT})
    assert context.reward is None
    assert context.fall is None
    assert not context.second_engine


def test_columns_of_reward_functions_are_known_by_their_names(tmp_path: Path) -> None:
    columns = {"rewards/a/b/mean": FLAT, "rewards/a/std": FLAT, "rewards/mean": FLAT,
               "reward/a/mean": FLAT, "rewards/c/max": FLAT,
               "rewards/empty/mean": FLAT * np.nan}  # fmt: skip
    context = seen(tmp_path, columns)
    assert list(context.reward_functions) == ["a/b"]
    assert list(context.reward_spreads) == ["a"]


def test_held_out_scores_are_by_set_where_the_log_has_several(tmp_path: Path) -> None:
    columns = {"eval_reward": FLAT, "eval_reward/math": FLAT, "eval_reward/none": FLAT * np.nan}
    context = seen(tmp_path / "a", columns)
    assert list(context.held_out_sets) == ["math"]
    alone = seen(tmp_path / "b", {"eval/reward": FLAT})
    assert list(alone.held_out_sets) == [""]
    assert len(alone.held_out) == N
    assert not len(seen(tmp_path / "c", {"reward": FLAT}).held_out)


def test_the_spread_of_advantages_is_their_std_or_their_range(tmp_path: Path) -> None:
    ends = {"critic/advantages/max": [1.0, 2.0, np.nan], "critic/advantages/min": [-1.0, 0.5, 0.0]}
    spread = seen(tmp_path / "a", ends).advantage_spread
    assert (spread.steps.tolist(), spread.values.tolist()) == ([1, 2], [2.0, 1.5])
    told = seen(tmp_path / "b", ends | {"advantage_std": [0.1, 0.2, 0.3]}).advantage_spread
    assert told.values.tolist() == [0.1, 0.2, 0.3]


def test_parts_of_the_kl_end_at_the_first_that_is_missing(tmp_path: Path) -> None:
    columns = {f"kl_positional/{n}": FLAT for n in (0, 1, 3)}
    assert len(seen(tmp_path, columns | {"loss": FLAT}).kl_parts) == 2


@pytest.mark.parametrize(
    ("columns", "values"),
    [
        ({"groups_flat": [0.5, 0.6], "groups_all_wrong": [0.1, 0.1]}, [0.5, 0.6]),
        ({"groups_all_wrong": [0.5, 0.25], "groups_all_right": [0.25, 0.5]}, [0.75, 0.75]),
        ({"groups_all_wrong": [0.5, 0.25]}, [0.5, 0.25]),
        ({"groups_all_right": [0.5, 0.25]}, [0.5, 0.25]),
        ({"groups_all_wrong": [0.5, np.nan], "groups_all_right": [0.25, 0.5]}, [0.5]),
        ({"loss": [1.0, 1.0]}, []),
    ],
)
def test_flat_groups_are_counted_as_the_source_counts_them(
    tmp_path: Path, columns: dict[str, list[float]], values: list[float]
) -> None:
    assert seen(tmp_path, columns).flat_groups.values.tolist() == values


@pytest.mark.parametrize(
    ("source", "config", "columns", "engine"),
    [
        ("built-in", {}, {}, False), ("trl", {"use_vllm": True}, {}, True), ("trl", {}, {}, False),
        ("loop", {}, {}, None), ("loop", {}, {"engine_kl": FLAT}, True),
        ("trl", {"use_vllm": False}, {"engine_prob_diff": FLAT}, True),
    ],
)  # fmt: skip
def test_another_engine_is_known_by_what_is_logged(
    tmp_path: Path, source: str, config: dict[str, Any], columns: Any, engine: bool | None
) -> None:
    context = seen(tmp_path, {"reward": FLAT} | columns, source=source, config=config)
    assert context.second_engine is engine


@pytest.mark.parametrize(
    ("name", "form"), [("Format_Reward", True), ("json_ok", True), ("accuracy", False)]
)
def test_names_tell_what_grades_the_form(name: str, form: bool) -> None:
    assert grades_form(name) is form


@pytest.mark.parametrize(
    ("source", "step", "said"),
    [
        ("built-in", 1, "No checkpoint from before step 1 is left: start again"),
        ("built-in", 5, "No checkpoint from before step 5 is left: start again"),
        ("loop", 0, "Start again: nothing is from before it."),
        ("loop", 1, "Start again: nothing is from before it."),
        ("loop", 2, "Go back to the last checkpoint before step 2."),
    ],
)
def test_where_to_go_back_to(tmp_path: Path, source: str, step: int, said: str) -> None:
    context = Context(open_run(write_steps(tmp_path, {"reward": FLAT}, source=source)))
    assert str(context.go_back(step)).startswith(said)


# ---- flows and drivers --------------------------------------------------------------------------


def flowing(tmp_path: Path, flows: dict[tuple[int, int], Any], n: int = 20) -> Context:
    path = write_steps(tmp_path / "run", {"reward": np.full(n, 0.3)})
    write_flows(path, flows)
    return Context(open_run(path))


def test_flows_are_by_class_and_0_where_a_class_had_no_token(tmp_path: Path) -> None:
    missing = np.where(np.arange(20) == 4, np.nan, 2.0)
    context = flowing(tmp_path, {(1, 1): np.ones(20), (-1, 0): missing, (0, 1): np.full(20, 9.0)})
    assert context.pred_dentropy.columns.tolist() == [
        "pos_peak",
        "pos_valley",
        "neg_peak",
        "neg_valley",
    ]
    assert context.pred_dentropy.loc[5].tolist() == [1.0, 0.0, 0.0, 0.0]
    assert context.pred_dentropy.loc[6].tolist() == [1.0, 0.0, 0.0, 2.0]
    assert context.has_prediction
    some = flowing(tmp_path / "b", {(1, 1): missing})
    assert some.has_prediction
    assert not flowing(tmp_path / "c", {(1, 1): missing * np.nan}).has_prediction


@pytest.mark.parametrize(
    ("direction", "shares"),
    [
        (1, {"neg_peak": 0.75, "pos_valley": 0.25, "pos_peak": -0.5}),
        (-1, {"pos_peak": 1.0, "pos_valley": -0.5, "neg_peak": -1.5}),
        (0, {"neg_peak": 0.75, "pos_valley": 0.25, "pos_peak": -0.5}),
    ],
)
def test_drivers_are_ranked_by_what_they_predict_in_the_direction(
    tmp_path: Path, direction: int, shares: dict[str, float]
) -> None:
    flows = {(-1, 1): np.full(20, 3.0), (1, 0): np.ones(20), (1, 1): np.full(20, -2.0),
             (-1, 0): np.zeros(20)}  # fmt: skip
    found = entropy_drivers(flowing(tmp_path, flows), None, None, direction)
    assert {d.cls: pytest.approx(d.share) for d in found} == shares
    assert [d.cls for d in found] == list(shares)
    assert {d.cls: d.predicted_dentropy for d in found}["pos_peak"] == pytest.approx(-40)


@pytest.mark.parametrize(
    ("peak", "valley", "first"), [(1.0, -1.0, "pos_peak"), (0.9, -1.0, "pos_valley")]
)
def test_without_a_direction_a_total_of_0_counts_as_a_rise(
    tmp_path: Path, peak: float, valley: float, first: str
) -> None:
    context = flowing(tmp_path, {(1, 1): np.full(20, peak), (1, 0): np.full(20, valley)})
    assert entropy_drivers(context, None, None, 0)[0].cls == first


def test_classes_that_all_predict_the_opposite_drive_nothing(tmp_path: Path) -> None:
    context = flowing(tmp_path, {(1, 1): np.full(20, -1.0), (1, 0): np.zeros(20)})
    assert entropy_drivers(context, None, None, 1) == ()
    assert [d.cls for d in entropy_drivers(context, None, None, -1)] == ["pos_peak"]
    small = flowing(tmp_path / "small", {(1, 1): np.full(20, 1e-6), (1, 0): np.full(20, 0.05)})
    assert [d.cls for d in entropy_drivers(small, None, None, 1)] == ["pos_valley", "pos_peak"]
    bare = Context(open_run(write_steps(tmp_path / "bare", {"reward": FLAT})))
    assert entropy_drivers(bare, None, None, 1) == ()


@pytest.mark.parametrize(
    ("first", "last", "total"),
    [
        (None, None, 2**20 - 1),
        (None, 3, 0b111),
        (15, None, 2**20 - 2**14),
        (16, None, 2**20 - 2**15),
        (17, None, 2**20 - 2**15),  # four steps are widened to five
        (6, 10, 2**10 - 2**5),
        (7, 10, 2**10 - 2**5),
        (7, 11, 2**11 - 2**6),
        (10, 10, 2**10 - 2**5),
        (2, 3, 0b111),  # nothing is before it
    ],
)
def test_drivers_are_of_the_window_and_of_five_steps_at_least(
    tmp_path: Path, first: int | None, last: int | None, total: int
) -> None:
    context = flowing(tmp_path, {(1, 1): 2.0 ** np.arange(20)})
    (driver,) = entropy_drivers(context, first, last, 1)
    assert driver.predicted_dentropy == total
    bits = [step for step in range(1, 21) if total >> (step - 1) & 1]
    assert driver.steps == (bits[0], bits[-1])


def test_what_a_class_does_alone_is_summed_over_the_window(tmp_path: Path) -> None:
    context = flowing(tmp_path, {(1, 1): np.ones(20), (-1, 1): np.ones(20)})
    rows = [(2, 0, 9.0), (8, 0, 0.25), (9, 0, 0.5), (9, 2, math.nan), (9, 7, 4.0)]
    writer = reopened(context.run.path)
    for step in (2, 8, 9):
        mine = [row for row in rows if row[0] == step]
        columns = {
            "step": [step] * len(mine), "minibatch": [0] * len(mine),
            "part": [part for _, part, _ in mine], "tokens_of": [ALL_TOKENS] * len(mine),
            "tokens": [5] * len(mine),
            "counterfactual_dentropy": [value for *_, value in mine],
        }  # fmt: skip
        writer.write_part(Records.build(PROBES, columns), step)
    writer.close("finished")
    found = entropy_drivers(Context(open_run(context.run.path)), 6, 10, 1)
    alone = {driver.cls: driver.counterfactual_dentropy for driver in found}
    assert alone == {"pos_peak": 0.75, "neg_peak": None}


@pytest.mark.parametrize(
    ("flows", "direction", "said"),
    [
        ((3.0, -1.0), 1, "neg_peak tokens account for 75% of the predicted rise"),
        ((-3.0, 1.0), -1, "neg_peak tokens account for 75% of the predicted fall"),
        ((0.3, 0.1), 1, "neg_peak tokens account for 75% of the predicted rise"),
        ((1.0, -1.0), 1, "neg_peak tokens account for 75% of the predicted rise"),
        ((1.0, -3.0), 1, "neg_peak tokens account for 75% of the predicted rise, though all "
         "classes together predict a fall"),
        ((-1.0, 3.0), -1, "neg_peak tokens account for 75% of the predicted fall, though all "
         "classes together predict a rise"),
        ((), 1, ""),
    ],
)  # fmt: skip
def test_drivers_in_words(flows: tuple[float, ...], direction: int, said: str) -> None:
    pairs = zip(("neg_peak", "pos_peak"), flows, strict=False)
    drivers = tuple(Driver(cls, flow, None, 0.75) for cls, flow in pairs)
    assert driver_words(drivers, direction) == said
    advice = str(driver_advice(drivers))
    assert advice.startswith("neg_peak pushes" if drivers else "Which tokens drive it is not")
