"""What rows of completions and tokens tell: pay for length, answers alike, noise, stale samples."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pytest

from tests.support.courses import FLAT, GAINS, WAVE, N, then, told
from tests.support.step_logs import Columns, reopened, write_steps
from wapo_analysis.diagnose import Diagnosis, diagnose
from wapo_analysis.schema import ROLLOUTS, TOKENS
from wapo_analysis.store import open_run
from wapo_analysis.table import Records

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
    for way, pay in (("shorter", -0.3), ("longer", 0.3)):  # of lengths that were not counted
        none = pays(tmp_path / way, then(30, 0, 90), np.full(N, pay))
        assert told(none, "reward_pays_for_length") is None


@pytest.mark.parametrize(
    ("reward", "length", "grown", "severity"),
    [
        ((1, -1, 0, 0), (1, 0, -1, 0), 160, "warning"),  # 1/2 decides
        ((-3, -1, 0, 1, 3), (-3, 3, 1, 0, -1), 160, "info"),  # 3/20 pays
    ],
)
def test_a_correlation_just_at_its_bound_counts(
    tmp_path: Path, reward: tuple[int, ...], length: tuple[int, ...], grown: int, severity: str
) -> None:
    group = {"reward": 10 + np.array(reward), "length": 100 + np.array(length)}
    steps = {"reward": FLAT, "length": then(30, 100, grown)}
    found = told(rolled(tmp_path, steps, dict.fromkeys(range(1, N + 1), group)),
                 "reward_pays_for_length")  # fmt: skip
    assert found is not None
    assert found.severity == severity


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
