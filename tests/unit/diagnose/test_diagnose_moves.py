"""What is told of completions and of how far the policy moves: bounds, words and numbers."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.support.step_logs import Columns, judge, ramp, reopened, write_steps
from wapo_analysis.diagnose import Diagnosis, Finding, diagnose
from wapo_analysis.schema import ROLLOUTS, TOKENS
from wapo_analysis.store import open_run
from wapo_analysis.table import Records

N = 60
FLAT = np.full(N, 0.3)
GAINS = ramp(0.2, 0.7, N, 5, 55)
WAVE = np.random.default_rng(5).normal(0, 1, N)


def then(count: int, before: float, after: float, records: int = N) -> np.ndarray:
    return np.r_[np.full(count, before), np.full(records - count, after)]


def told(diagnosis: Diagnosis, name: str) -> Finding | None:
    return next((f for f in diagnosis.findings if f.name == name), None)


def by_position(count: int, top: int, high: np.ndarray, low: float) -> Columns:
    """KL to the reference in parts of the completions: one is high, the others rise slowly."""
    return {
        f"kl_positional/{n}": high if n == top else np.full(N, low * (n + 1)) for n in range(count)
    }


# ---- step columns


# A log, the finding looked at, its severity and step, words, and numbers.
TOLD = {
    "more are cut": (
        {"reward": FLAT, "truncated": then(40, 0.1, 0.8)}, "truncation_drift", "warning", 41,
        "Many completions are cut at the limit from step 41 on (10% at first, 80% at the end).",
        {"start": 0.1, "end": 0.8},
    ),
    "in each third half are cut": (
        {"reward": FLAT, "truncated": np.repeat([0.4, 0.7, 0.6], [10, 10, 40])},
        "truncation_drift", "warning", 1,
        "Many completions are cut at the limit from step 1 on (40% at first, 60% at the end).",
        {"start": 0.4, "end": 0.6},
    ),
    "just half of them": (
        {"reward": FLAT, "truncated": np.tile([0.25, 0.75], 30)}, "truncation_drift", "warning", 1,
        "Many completions are cut at the limit from step 1 on (25% at first, 50% at the end).",
        {"start": 0.25, "end": 0.5},
    ),
    "they repeat themselves": (
        {"reward": FLAT, "repetition": then(40, 0.1, 0.8)}, "repetition_drift", "warning", 41,
        "Completions repeat themselves from step 41 on (10% at first, 80% at the end).",
        {"start": 0.1, "end": 0.8},
    ),
    "longer": (
        {"reward": FLAT, "length": then(40, 100, 160)}, "length_drift", "warning", 41,
        "Completions keep getting longer from step 41 on (100 at first, 160 at the end).",
        {"start": 100, "end": 160, "ratio": 1.6},
    ),
    "longer without a reward": (
        {"length": then(40, 100, 160)}, "length_drift", "warning", 41,
        "Completions keep getting longer from step 41 on (100 at first, 160 at the end).",
        {"start": 100, "end": 160, "ratio": 1.6},
    ),
    "shorter, which the reward pays for": (
        {"reward": GAINS, "length": then(40, 150, 90)}, "length_drift", "info", 41,
        "Completions keep getting shorter from step 41 on (150 at first, 90 at the end).",
        {"start": 150, "end": 90, "ratio": 0.6},
    ),
    "longer, which the training reward alone pays for": (
        {"reward": GAINS, "length": then(40, 100, 160), "eval_reward": np.full(N, 0.4)},
        "length_drift", "warning", 41,
        "Completions keep getting longer, which the training reward pays for and the held-out "
        "score does not, from step 41 on (100 at first, 160 at the end).",
        {"start": 100, "end": 160, "ratio": 1.6},
    ),
    "less diverse": (
        {"reward": FLAT, "distinct": then(40, 1, 0)}, "diversity_falls", "warning", 41,
        "Completions resemble each other more and more (their diversity as logged) from step 41 "
        "on (100% at first, 0% at the end).",
        {"start": 1, "end": 0},
    ),
    "both clips, of the column that is long enough": (
        {"reward": FLAT, "clip_any": then(40, 0.02, 0.3),
         "clip_ratio/region_mean": np.where(np.arange(N) < 7, 0.3, np.nan)},
        "clip_saturation", "warning", 41,
        "The clip takes the gradient from a fifth of the tokens or more from step 41 on (2% at "
        "first, 30% at the end).",
        {"start": 0.02, "end": 0.3},
    ),
    "far from the reference": (
        {"reward": FLAT, "kl_ref": then(40, 0.01, 0.7)}, "kl_drift", "warning", 41,
        "The policy is far from the reference model (KL in nats per token) from step 41 on (0.01 "
        "at first, 0.7 at the end).",
        {"start": 0.01, "end": 0.7, "reward_start": 0.3, "reward_peak": 0.3, "reward_end": 0.3},
    ),
    "far from it without a reward, and below nothing at first": (
        {"kl_ref": then(40, -0.01, 0.7)}, "kl_drift", "warning", 41,
        "The policy is far from the reference model (KL in nats per token) from step 41 on (-0.01 "
        "at first, 0.7 at the end).",
        {"start": -0.01, "end": 0.7},
    ),
    "far at the beginning": (
        by_position(4, 0, then(40, 0.01, 0.9), 0.05), "kl_by_position", "warning", 41,
        "The policy leaves the reference model at the beginning of completions: 0.9 nats a token "
        "in part 1 of 4, 0.15 in the others (from step 41 on).",
        {"part": 1, "end": 0.9, "others": 0.15},
    ),
    "far in the middle": (
        by_position(4, 2, then(40, 0.01, 0.9), 0.05), "kl_by_position", "warning", 41,
        "The policy leaves the reference model at part 3 of 4 of completions: 0.9 nats a token "
        "in part 3 of 4, 0.1 in the others (from step 41 on).",
        {"part": 3, "end": 0.9, "others": 0.1},
    ),
    "far at the end": (
        by_position(3, 2, then(40, 0.01, 0.9), 0.05), "kl_by_position", "warning", 41,
        "The policy leaves the reference model at the end of completions: 0.9 nats a token in "
        "part 3 of 3, 0.075 in the others (from step 41 on).",
        {"part": 3, "end": 0.9, "others": 0.075},
    ),
    "two engines, by the measure that is off first": (
        {"reward": FLAT, "engine_kl": then(40, 0.001, 0.05),
         "engine_logp_diff": then(20, 0.001, 0.2), "engine_prob_diff": np.full(N, 0.01)},
        "train_inference_mismatch", "warning", 21,
        "The sampling engine and the trainer give different probabilities (mean difference in "
        "nats) from step 21 on (0.001 at first, 0.2 at the end).",
        {"start": 0.001, "end": 0.2, "engine_kl": 0.05, "engine_logp_diff": 0.2,
         "engine_prob_diff": 0.01},
    ),
    "older and older samples": (
        {"reward": FLAT, "staleness": then(40, 1, 6)}, "staleness", "warning", 41,
        "The samples come from an older policy than the one they train (updates behind) from step "
        "41 on (1 at first, 6 at the end).",
        {"start": 1, "end": 6},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_all_that_is_told_of_it(tmp_path: Path, case: str) -> None:
    columns, name, severity, step, message, numbers = TOLD[case]
    found = told(judge(tmp_path, **columns), name)
    assert found is not None
    assert (found.severity, found.step, found.message) == (severity, step, message)
    assert found.evidence == pytest.approx(numbers)


@pytest.mark.parametrize(
    "columns",
    [
        {"length": then(30, 0, 100)},
        {"distinct": np.r_[-0.1, then(39, 0.8, 0.3, N - 1)]},  # no share
        {"distinct": np.r_[1.2, then(39, 0.8, 0.3, N - 1)]},
        by_position(2, 0, then(40, 0.01, 0.9), 0.05),
        {"engine_kl": np.full(N, 0.009), "engine_logp_diff": np.full(N, 0.04)},
    ],
)
def test_nothing_is_told_of_it(tmp_path: Path, columns: Columns) -> None:
    assert not judge(tmp_path, reward=FLAT, **columns).findings


# A finding, its severity, a log with one number in it, a value just inside and one just beyond.
BOUNDS: dict[str, tuple[str, str, Callable[[float], Columns], float, float]] = {
    "half are cut, wherever it began": ("truncation_drift", "warning",
        lambda x: {"reward": FLAT, "truncated": ramp(0.4, x, N, 30, 10)}, 0.499, 0.5),
    "half repeat themselves, wherever it began": ("repetition_drift", "warning",
        lambda x: {"reward": FLAT, "repetition": ramp(0.4, x, N, 30, 10)}, 0.499, 0.5),
    "half of the diversity is left": ("diversity_falls", "warning",
        lambda x: {"reward": FLAT, "distinct": then(40, 0.5, x)}, 0.251, 0.25),
    "the diversity fell by six sigma": ("diversity_falls", "warning",
        lambda x: {"reward": FLAT, "distinct": np.clip(then(30, 0.6, x) + 0.04 * WAVE, 0, 1)},
        0.136, 0.132),
    "a gain before the distance doubled pays for nothing": ("kl_drift", "info",
        lambda x: {"reward": np.r_[ramp(0.2, 0.5, 40, 0, 39), np.full(20, 0.5)],
                   "kl_ref": ramp(0.01, 1.5, N, int(x), 59 - int(x))}, 22, 21),
    "the distance doubled from where it was half": ("kl_drift", "info",
        lambda x: {"reward": then(35, 0.2, 0.2 + x),
                   "kl_ref": ramp(0.01, 1.5, N, 0, 59)}, 0.0057, 0.0059),
    "a part is half of all": ("kl_by_position", "warning",
        lambda x: {f"kl_positional/{n}": then(40, 0.01, x) if n == 0 else np.full(N, 0.125)
                   for n in range(9)}, 0.999, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("case", BOUNDS)
def test_it_begins_at_its_bound(tmp_path: Path, case: str) -> None:
    name, severity, columns, inside, beyond = BOUNDS[case]
    within = told(judge(tmp_path / "inside", **columns(inside)), name)
    found = told(judge(tmp_path / "beyond", **columns(beyond)), name)
    assert within is None or within.severity != severity
    assert found is not None
    assert found.severity == severity


def test_a_clip_that_is_logged_by_sides_is_told_by_sides(tmp_path: Path) -> None:
    sides = {"clip_low": then(40, 0.02, 0.3), "clip_high": then(30, 0.02, 0.3)}
    d = judge(tmp_path, reward=FLAT, **sides, clip_any=np.full(N, 0.6))
    assert [(f.name, f.step) for f in d.findings] == [
        ("clip_saturation_high", 31), ("clip_saturation_low", 41)
    ]  # fmt: skip
    low, high = (told(d, f"clip_saturation_{side}") for side in ("low", "high"))
    assert low is not None
    assert high is not None
    assert (low.message[:14], high.message[:14]) == ("The lower clip", "The upper clip")


def test_a_clip_is_judged_from_eight_records_on(tmp_path: Path) -> None:
    for count, names in ((7, []), (8, ["clip_saturation"])):
        columns = {"reward": FLAT[:10], "clip_any": np.where(np.arange(10) < count, 0.3, np.nan)}
        found = judge(tmp_path / str(count), **columns).findings
        assert [f.name for f in found if f.name.startswith("clip")] == names


def test_a_length_that_the_training_reward_alone_pays_for_is_not_fine(tmp_path: Path) -> None:
    columns = {"reward": GAINS, "length": then(40, 100, 160)}
    fine = told(judge(tmp_path / "fine", **columns), "length_drift")
    alone = judge(tmp_path / "alone", **columns, eval_reward=np.full(N, 0.4))
    warned = told(alone, "length_drift")
    assert fine is not None
    assert warned is not None
    assert str(fine.advice).startswith("Fine while the reward rises")
    assert str(warned.advice).startswith("Read the longest completions")


def test_what_the_reward_gained_before_the_distance_was_half_pays_for_nothing(
    tmp_path: Path,
) -> None:
    columns = {"reward": then(30, 0.2, 0.5), "kl_ref": np.repeat([0.1, 0.5, 1.0], 20)}
    found = told(judge(tmp_path, **columns), "kl_drift")
    assert found is not None
    assert found.severity == "warning"


@pytest.mark.parametrize(
    ("name", "columns"),
    [
        ("off_policy_drift", {"kl_old": then(40, 0.001, 0.01)}),
        ("length_drift", {"length": then(40, 0.9, 2)}),
    ],
)
def test_just_so_much_is_told(tmp_path: Path, name: str, columns: Columns) -> None:
    assert told(judge(tmp_path, reward=FLAT, **columns), name) is not None


# ---- completions


def rolled(
    path: Path, steps: Columns, made: Mapping[int, Mapping[str, Iterable[object]]]
) -> Diagnosis:
    """A run with completions, by step."""
    writer = reopened(write_steps(path, steps))
    for step, columns in made.items():
        count = len(list(next(iter(columns.values()))))
        rows = {name: np.zeros(count) for name in ("rank", "group", "reward")}
        rows |= {"step": np.full(count, step), "rollout": np.arange(count)}
        writer.write_part(Records.build(ROLLOUTS, rows | dict(columns)), step)
    writer.close("finished")
    return diagnose(open_run(path))


OFFSETS, OTHER = np.array([-3, -1, 1, 3]), np.array([1, -1, -1, 1]) / 2


def pays(path: Path, length: np.ndarray, correlations: np.ndarray) -> Diagnosis:
    """A group a step whose reward goes so with the length, over the last steps of a run."""
    made = {}
    for step, r in enumerate(correlations, start=len(length) - len(correlations) + 1):
        reward = r * OFFSETS / np.linalg.norm(OFFSETS) + np.sqrt(1 - r * r) * OTHER
        made[step] = {"length": 100 + OFFSETS, "reward": reward}
    return rolled(path, {"reward": FLAT[: len(length)], "length": length}, made)


def last(count: float, records: int, before: float, after: float) -> np.ndarray:
    return then(records - int(count), before, after, records)


PAYS: dict[str, tuple[str, Callable[[float], tuple[np.ndarray, np.ndarray]], float, float]] = {
    "longer ones earn more": (
        "info", lambda x: (then(30, 100, 110), np.full(N, x)), 0.1495, 0.1505),
    "shorter ones earn more": (
        "warning", lambda x: (then(30, 100, 90), np.full(N, -x)), 0.1495, 0.1505),
    "length all but decides": (
        "warning", lambda x: (then(30, 100, 160), np.full(N, x)), 0.4995, 0.5005),
    "and has grown by half": (
        "warning", lambda x: (then(30, 100, x), np.full(N, 0.8)), 149.9, 150),
    "the length moved": ("info", lambda x: (then(30, 100, 100 + x), np.full(N, 0.4)), 5.99, 6),
    "by four sigma": (
        "info", lambda x: (then(30, 100, 100 + x) + 4 * WAVE, np.full(N, 0.4)), 22.7, 22.8),
    "over the later half": (
        "info", lambda x: (then(30, 100, 110)[:40], last(x, 40, -0.2, 0.2)), 10, 12),
    "of eight steps at least": (
        "info", lambda x: (then(25, 100, 110, 40), last(x, 12, -0.2, 0.2)), 4, 5),
    "and surely": (
        "warning",
        lambda x: (then(30, 100, 160)[10:50], np.where(np.arange(40) % 5 < 3, 0.6, 0.6 - x)),
        0.825, 0.822),
}  # fmt: skip


@pytest.mark.parametrize("case", PAYS)
def test_a_reward_pays_for_length_where(tmp_path: Path, case: str) -> None:
    severity, made, inside, beyond = PAYS[case]
    within = told(pays(tmp_path / "inside", *made(inside)), "reward_pays_for_length")
    found = told(pays(tmp_path / "beyond", *made(beyond)), "reward_pays_for_length")
    assert within is None or within.severity != severity
    assert found is not None
    assert found.severity == severity


def test_what_is_told_of_a_reward_that_pays_for_length(tmp_path: Path) -> None:
    shorter = pays(tmp_path / "run", then(30, 100, 90), np.full(N, -0.3))
    found = told(shorter, "reward_pays_for_length")
    assert found is not None
    assert found.message == (
        "Within groups shorter completions earn more (correlation -0.30), and from step 31 on "
        "they are shorter (100 to 90 tokens)."
    )
    assert found.evidence == pytest.approx({"correlation": -0.3, "start": 100, "end": 90}, abs=1e-6)
    none = pays(tmp_path / "none", then(30, 0, 90), np.full(N, -0.3))
    assert told(none, "reward_pays_for_length") is None


def answered(path: Path, shared: int, reward: np.ndarray = FLAT) -> Diagnosis:
    """Of twenty completions to each of two prompts some are the same, in the last third."""
    made = {}
    for step in range(1, N + 1):
        same = ["the same"] * (shared if step > 40 else 0)
        texts = [same + [f"{prompt} {n}" for n in range(20 - len(same))] for prompt in "ab"]
        made[step] = {"completion": sum(texts, []), "prompt": ["a"] * 20 + ["b"] * 20}
    return rolled(path, {"reward": reward}, made)


def test_a_quarter_more_answers_that_other_prompts_got_too_are_told(tmp_path: Path) -> None:
    assert told(answered(tmp_path / "inside", 4), "degenerate_completions") is None
    found = told(answered(tmp_path / "beyond", 5), "degenerate_completions")
    assert found is not None
    assert found.message == (
        "Different prompts get the same completion from step 42 on (0% at first, 25% at the end)."
    )
    assert str(found.advice).startswith("Answers no longer depend on the question.")
    paid = told(answered(tmp_path / "paid", 5, GAINS), "degenerate_completions")
    assert paid is not None
    assert str(paid.advice).startswith("The reward rises while answers stop depending")


@pytest.mark.parametrize(("early", "late", "step"), [(0, 2, 0), (0, 3, 42), (8, 9, 0), (8, 10, 42)])
def test_noise_is_told_from_a_rise_or_from_half_of_the_completions(
    tmp_path: Path, early: int, late: int, step: int
) -> None:
    made = {}
    for number in range(1, N + 1):
        noise = late if number > 40 else early
        made[number] = {"completion": ["!" * 40] * noise + ["the answer is 42"] * (20 - noise)}
    found = told(rolled(tmp_path / "run", {"reward": FLAT}, made), "garbled_completions")
    assert (0 if found is None else found.step) == step


# ---- another policy than the one that sampled


def sampled(path: Path, ratios: Iterable[Iterable[float]]) -> Diagnosis:
    """Tokens by step whose probability is so many times what it was when they were sampled."""
    rows = [np.asarray(list(step), float) for step in ratios]
    steps = {"reward": np.full(len(rows), 0.5)}
    writer = reopened(write_steps(path, steps, source="loop"))
    for step, ratio in enumerate(rows, start=1):
        count = len(ratio)
        keys = {name: np.zeros(count) for name in ("minibatch", "rank", "group", "rollout")}
        columns = keys | {"step": np.full(count, step), "position": np.arange(count)}
        columns |= {"token_id": np.zeros(count), "advantage": np.ones(count)}
        columns |= {"logp": np.full(count, np.log(0.5)), "logp_old": np.log(0.5 / ratio)}
        writer.write_part(Records.build(TOKENS, columns), step)
    writer.close("finished")
    return diagnose(open_run(path))


def ratio_of(k3: float) -> float:
    """The ratio r > 1 with r - ln r - 1 = k3."""
    r = 1 + np.sqrt(2 * k3)
    for _ in range(50):
        r -= (r - np.log(r) - 1 - k3) / (1 - 1 / r)
    return float(r)


def alike(*k3: float) -> list[list[float]]:
    return [[ratio_of(value)] * 2 for value in k3]


UNEVEN = [1.0] * 999


@pytest.mark.parametrize(
    ("ratios", "name", "step"),
    [
        (alike(*[0.0098] * 12), None, 0),
        (alike(*[0.0102] * 12), "train_inference_mismatch", 1),
        ([[x, *UNEVEN] for x in [11.6] * 9], None, 0),
        ([[x, *UNEVEN] for x in [11.7] * 9], "train_inference_mismatch", 1),
        (alike(*[0.0005] * 6, *[0.0098] * 6), None, 0),
        (alike(*[0.0005] * 6, *[0.0102] * 6), "staleness", 7),
        ([[1.0, 1.0], *alike(*[0.015] * 11)], None, 0),
        (alike(*[0.002] * 6, *[0.0195] * 6), None, 0),
        (alike(*[0.002] * 6, *[0.0205] * 6), "staleness", 7),
    ],
)
def test_the_first_pass_tells_a_mismatch_from_staleness(
    tmp_path: Path, ratios: list[list[float]], name: str | None, step: int
) -> None:
    found = [f for f in sampled(tmp_path / "run", ratios).findings if f.severity == "warning"]
    assert [(f.name, f.step) for f in found] == ([] if name is None else [(name, step)])


def test_numbers_of_the_first_pass_are_those_of_the_last_steps(tmp_path: Path) -> None:
    ratios = [[1.5, 1.5]] * 35 + [[1.9, 1.9], [1.2, 1.8], [1.2, 1.6], [1.2, 1.7], [1.2, 1.5]]
    found = told(sampled(tmp_path / "run", ratios), "train_inference_mismatch")
    assert found is not None
    ess = [(1.2 + x) ** 2 / (2 * (1.44 + x * x)) for x in (1.8, 1.7, 1.6, 1.5)]
    assert found.evidence["ess"] == pytest.approx(np.median(ess), rel=1e-4)
    assert found.evidence["max_dp"] == pytest.approx(0.5 - 0.5 / 1.8, rel=1e-4)
    assert found.evidence["tokens"] == 80
    assert found.message.startswith(
        "Tokens have another probability at the first recorded pass than when they were sampled"
    )
    few = [[1.5, 1.5]] * 9 + [[1.2, 1.8], [1.2, 1.6], [1.2, 1.5]]
    short = told(sampled(tmp_path / "few", few), "train_inference_mismatch")
    assert short is not None
    assert short.evidence["max_dp"] == pytest.approx(0.5 - 0.5 / 1.8, rel=1e-4)
