"""A reward that is not what it stands for: held-out scores that fall or stand, lost answers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.step_logs import Columns, found_by, ramp, reopened, seen
from wapo_analysis.diagnose import Finding
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors.heldout import held_out_follows
from wapo_analysis.schema import ROLLOUTS
from wapo_analysis.store import open_run
from wapo_analysis.table import Records

N = 60
FLAT = np.full(N, 0.3)
SAW = np.where(np.arange(N) % 2, 1.0, -1.0)


def moved(start: float, end: float) -> np.ndarray:
    return ramp(start, end, N, 20, 15)


# ---- the held-out score falls -------------------------------------------------------------------


def falls(path: Path, columns: Columns, every: int = 1) -> list[Finding]:
    return found_by("held_out_falls", seen(path / "run", columns, every=every))


FALLS: dict[str, tuple[Columns, tuple[int, float, float] | None]] = {
    # (columns, (step of the last best evaluation, its mean of three, the last mean of three))
    "by 15% of its best": ({"eval_reward": moved(0.8, 0.68)}, (20, 0.8, 0.68)),
    "by less": ({"eval_reward": moved(0.8, 0.681)}, None),
    "by 15% of a low one": ({"eval_reward": moved(0.18, 0.151)}, None),
    "by 0.03 of a low one": ({"eval_reward": moved(0.18, 0.149)}, (20, 0.18, 0.149)),
    "of a scale of its own": ({"eval_reward": moved(-2.0, -2.31)}, (20, -2, -2.31)),
    "of a scale of its own, by less": ({"eval_reward": moved(-2.0, -2.29)}, None),
    "in five evaluations": (
        {"eval_reward": np.array([0.9, 0.8, 0.6, 0.5, 0.4])}, (2, 2.3 / 3, 0.5)
    ),
    "in four": ({"eval_reward": np.array([0.9, 0.7, 0.5, 0.3])}, None),
    "from its last best": (
        {"eval_reward": np.r_[np.repeat([0.7, 0.6, 0.7], [10, 10, 20]), ramp(0.7, 0.4, 20, 0, 10)]},
        (40, 0.7, 0.4),
    ),
    "and came back": ({"eval_reward": ramp(0.7, 0.4, N, 5, 20) + ramp(0, 0.3, N, 30, 20)}, None),
    # Second differences of a saw of 0.03 are 0.12: a noise of 0.12 / sqrt(6), four times that.
    "by more than its noise": (
        {"eval_reward": moved(0.8, 0.58) + 0.03 * SAW}, (19, 0.81, 0.59)
    ),
    "within its noise": ({"eval_reward": np.repeat([0.8, 0.66], [52, 8]) + 0.03 * SAW}, None),
    # Seven evaluations on a line of four times the error of its rise are a fall all the same.
    "steadily, within its noise": (
        {"eval_reward": moved(0.8, 0.63) + 0.03 * SAW}, (19, 0.81, 0.64)
    ),
    "in more noise": (
        {"eval_reward": ramp(0.8, 0.6, N, 10, 40) + 0.1 * SAW}, (9, 2.5 / 3, 1.9 / 3)
    ),
    "in too much": ({"eval_reward": ramp(0.8, 0.6, N, 10, 40) + 0.12 * SAW}, None),
    "in seven evaluations": (
        {"eval_reward": np.array([0.5, 0.8, 0.8, 0.79, 0.72, 0.74, 0.65, 0.67, 0.6])},
        (3, 2.39 / 3, 0.64),
    ),
    "in six": ({"eval_reward": np.array([0.5, 0.8, 0.8, 0.72, 0.74, 0.65, 0.67, 0.6])}, None),
    "as the reward does": ({"eval_reward": moved(0.8, 0.5), "reward": moved(0.6, 0.4)}, None),
    "while the reward stands": ({"eval_reward": moved(0.8, 0.5), "reward": FLAT}, (20, 0.8, 0.5)),
    "beside a reward that is lost": (
        {"eval_reward": moved(0.8, 0.5), "reward": moved(0.8, 0.1)}, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FALLS)
def test_a_held_out_score_that_falls(tmp_path: Path, case: str) -> None:
    columns, expected = FALLS[case]
    told = [(f.step, f.evidence["best"], f.evidence["end"]) for f in falls(tmp_path, columns)]
    assert told == ([pytest.approx(expected)] if expected else [])


@pytest.mark.parametrize(
    ("reward", "gain", "said"),
    [
        (None, 0.0, "."),
        (FLAT, 0.0, "."),
        (ramp(0.3, 0.5, N, 30, 20), 0.2, " while the training reward rose by 0.20."),
        (ramp(0.5, 0.4, N, 0, 10), 0.0, "."),  # it fell before, not since
    ],
)
def test_what_the_training_reward_did_meanwhile(
    tmp_path: Path, reward: np.ndarray | None, gain: float, said: str
) -> None:
    columns = {"eval_reward": moved(0.8, 0.5)} | ({} if reward is None else {"reward": reward})
    (found,) = falls(tmp_path, columns, every=10)
    start = "The held-out score fell from 0.80 at step 200 to 0.50 at step 600"
    assert found.message == start + said
    assert found.evidence["training_gain"] == pytest.approx(gain, abs=1e-3)
    assert found.evidence["evaluations"] == N
    assert "set" not in found.evidence


SETS: dict[str, tuple[dict[str, np.ndarray], str]] = {
    # The larger part of its best, not the larger number, is the worse.
    "worst": (
        {"gsm": moved(0.9, 0.6), "aime": moved(0.2, 0.05)},
        "The held-out score of aime fell from 0.20 at step 20 to 0.05 at step 60. So did that of "
        "gsm.",
    ),
    "one stands": (
        {"gsm": moved(0.9, 0.6), "aime": moved(0.2, 0.2)},
        "The held-out score of gsm fell from 0.90 at step 20 to 0.60 at step 60.",
    ),
    "from nothing, last": (
        {"gsm": moved(0.9, 0.6), "signed": moved(0.0, -0.5)},
        "The held-out score of gsm fell from 0.90 at step 20 to 0.60 at step 60. So did that of "
        "signed.",
    ),
    "sorted": (
        {"b": moved(0.9, 0.6), "c": moved(0.8, 0.2), "a": moved(0.9, 0.6)},
        "The held-out score of c fell from 0.80 at step 20 to 0.20 at step 60. So did that of a, "
        "b.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SETS)
def test_of_several_held_out_sets_the_worst_is_told(tmp_path: Path, case: str) -> None:
    sets, said = SETS[case]
    columns = {"eval_reward": FLAT} | {f"eval_reward/{name}": s for name, s in sets.items()}
    (found,) = falls(tmp_path, columns)
    assert found.message == said
    assert found.evidence["set"] == said.split()[4]


# ---- the held-out score stands ------------------------------------------------------------------


def stands(path: Path, columns: Columns) -> list[Finding]:
    return found_by("held_out_stands", seen(path / "run", columns))


STANDS: dict[str, tuple[Columns, bool]] = {
    "the reward rose by 0.15": ({"reward": moved(0, 0.15), "eval_reward": FLAT}, True),
    "by less": ({"reward": moved(0, 0.149), "eval_reward": FLAT}, False),
    "by 15% of its scale": ({"reward": moved(0, 10), "eval_reward": FLAT}, True),
    "by less of its scale": ({"reward": moved(8.6, 10), "eval_reward": FLAT}, False),
    "by a little more": ({"reward": moved(8.4, 10), "eval_reward": FLAT - 0.25}, True),
    # The noise of a score is a hundredth of its highest, at least: twice 0.015 is a fifth of 0.15.
    "a fifth of the rise is noise": (
        {"reward": moved(0, 0.15), "eval_reward": np.full(N, 1.5)}, True,
    ),
    "more is noise": ({"reward": moved(0, 0.15), "eval_reward": np.full(N, 1.51)}, False),
    "it shows a fifth": ({"reward": moved(0, 0.8), "eval_reward": moved(0.3, 0.45)}, True),
    "it shows more": ({"reward": moved(0, 0.8), "eval_reward": moved(0.3, 0.453)}, False),
    "a fifth on the scale of the reward": (
        {"reward": moved(0, 8), "eval_reward": moved(0.3, 0.49)}, True,
    ),
    "more on that scale": ({"reward": moved(0, 8), "eval_reward": moved(0.3, 0.5)}, False),
    "a fifth, noise taken off": (
        {"reward": moved(0, 0.8), "eval_reward": moved(0.3, 0.35) + 0.03 * SAW}, True,
    ),
    "more, noise taken off": (
        {"reward": moved(0, 0.8), "eval_reward": moved(0.3, 0.37) + 0.03 * SAW}, False,
    ),
    "it falls, which is another finding": (
        {"reward": moved(0, 0.8), "eval_reward": moved(0.8, 0.5)}, False,
    ),
    "the rise may be noise": (
        {"reward": moved(0.3, 0.5) + 0.25 * SAW, "eval_reward": FLAT}, False,
    ),
    "without a reward": ({"eval_reward": FLAT}, False),
    "the reward stands too": ({"reward": FLAT, "eval_reward": FLAT}, False),
}  # fmt: skip


@pytest.mark.parametrize("case", STANDS)
def test_a_held_out_score_that_stands(tmp_path: Path, case: str) -> None:
    columns, told = STANDS[case]
    assert bool(stands(tmp_path, columns)) is told


@pytest.mark.parametrize(("evaluations", "told"), [(5, True), (4, False)])
def test_five_evaluations_show_that_a_score_stands(
    tmp_path: Path, evaluations: int, told: bool
) -> None:
    score: list[float | None] = [None] * N
    score[9::10] = [0.30, 0.32, 0.33, 0.31, 0.31, 0.31][:evaluations] + [None] * (6 - evaluations)
    found = stands(tmp_path, {"reward": moved(0.1, 0.7), "eval_reward": score})
    assert bool(found) is told
    if found:
        assert found[0].step == 10
        assert found[0].message == (
            "The training reward rose from 0.10 to 0.70, yet the held-out score stands (0.31 to "
            "0.31)."
        )
        assert found[0].evidence == pytest.approx(
            {"start": 0.31, "end": 0.31, "training_gain": 0.6, "evaluations": 5}
        )


@pytest.mark.parametrize(
    ("score", "follows"), [(moved(0.3, 0.6), True), (FLAT, False), (moved(0.8, 0.3), False)]
)
def test_a_score_follows_the_reward_unless_it_stands_or_falls(
    tmp_path: Path, score: np.ndarray, follows: bool
) -> None:
    context = seen(tmp_path / "run", {"reward": moved(0.1, 0.7), "eval_reward": score})
    assert held_out_follows(context) is follows


# ---- completions without the answer -------------------------------------------------------------


def answered(
    path: Path, held: list[int], without: list[int], rows: int = 20, **columns: Any
) -> Context:
    """Completions of which the first half is rewarded: those with the answer, and rewarded without.

    Steps that the step log has beyond these have no completions.
    """
    seen(path / "run", {"reward": np.full(len(held), 0.5)} | columns)
    writer, records, half = reopened(path / "run"), {}, rows // 2
    for step, (right, wrong) in enumerate(zip(held, without, strict=True), start=1):
        rest = right - (half - wrong)  # of those that earn nothing
        has = [i >= wrong if i < half else i < half + rest for i in range(rows)]
        cells = {
            "step": [step] * rows, "rank": [0] * rows, "group": [0] * rows,
            "rollout": list(range(rows)), "answer": ["42"] * rows,
            "completion": ["it is 42" if x else "it is 7" for x in has],
            "reward": [float(i < half) for i in range(rows)],
        }  # fmt: skip
        records[step] = Records.build(ROLLOUTS, cells)
    writer.write_steps(records)
    writer.close("finished")
    return Context(open_run(path / "run"))


def then(before: int, after: int, at: int = 10, count: int = 30) -> list[int]:
    return [before] * at + [after] * (count - at)


WITHOUT: dict[str, tuple[list[int], list[int], dict[str, Any], str | None]] = {
    "a quarter of the answers": (then(8, 6), then(3, 4), {"rows": 16}, "warning"),
    "less": (then(8, 7), then(3, 4), {"rows": 16}, None),
    "three in ten are unearned": (then(14, 7), then(0, 3), {}, "warning"),
    "two in ten": (then(14, 8), then(0, 2), {}, None),
    "a tenth had it at best": (then(2, 0), then(8, 10), {}, "warning"),
    "fewer had it": (then(1, 0), then(9, 10), {}, None),
    "half are gone": (then(8, 4), then(3, 6), {"rows": 16}, "critical"),
    "not quite half": (then(8, 5), then(3, 6), {"rows": 16}, "warning"),
    "most of what earns has none": (then(12, 4), then(0, 6), {}, "critical"),
    "half of what earns": (then(12, 5), then(0, 5), {}, "warning"),
    "a fifth had it": (then(4, 0), then(6, 10), {}, "critical"),
    "fewer than a fifth": (then(3, 0), then(7, 10), {}, "warning"),
    "in eight steps": (then(12, 4, 4, 8), then(0, 6, 4, 8), {}, "critical"),
    "in seven": (
        then(12, 4, 4, 7), then(0, 6, 4, 7), {"reward": np.full(8, 0.5)}, None,
    ),
    "as the reward falls": (
        then(12, 4), then(0, 6), {"reward": ramp(0.8, 0.6, 30, 10, 10)}, None,
    ),
    "while the reward rises": (
        then(12, 4), then(0, 6), {"reward": ramp(0.4, 0.8, 30, 5, 20)}, "critical",
    ),
    "while the reward is lost": (
        then(12, 4, 25), then(0, 6, 25), {"reward": ramp(0.9, 0.1, 30, 5, 10)}, None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WITHOUT)
def test_rewarded_completions_lose_the_answer(tmp_path: Path, case: str) -> None:
    held, without, given, severity = WITHOUT[case]
    found = found_by("reward_without_answer", answered(tmp_path, held, without, **given))
    begins = held.index(held[-1]) + 1
    told = [(f.step, f.severity) for f in found]
    assert told == ([(begins, severity)] if severity else [])


def test_what_is_said_of_answers_that_are_gone(tmp_path: Path) -> None:
    context = answered(tmp_path, held=[10, *then(12, 5, 9, 29)], without=then(0, 6))
    (found,) = found_by("reward_without_answer", context)
    assert found.message == (
        "Completions that hold the reference answer fell from 60% to 25% from step 11 on, yet the "
        "reward does not fall; 60% of those that earn it are without the answer."
    )
    assert found.evidence == pytest.approx({"best": 0.6, "end": 0.25, "rewarded_without": 0.6})
