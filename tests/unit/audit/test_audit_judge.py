"""The verdict of an audit on made-up batches: which losses fit, and what differs."""

from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.audit_rows import evidence, token_rows
from wapo_analysis.audit import Audit, _gated, _odd, _ratio_cause, judge
from wapo_analysis.audit.coefficient import Core
from wapo_analysis.audit.rollouts import RULES

NAN = np.nan
LENGTHS = np.array([3, 5, 4, 7, 6, 8, 5, 9])
REWARD = np.array([1.0, 0.0, 0.25, 0.0, 0.5, 2.0, 0.0, 0.75])
GROUP = np.repeat([0, 1], 4)
MOVED = np.random.default_rng(3).normal(0, 0.1, LENGTHS.sum())
POPULATION, SAMPLE = "group mean, population std", "group mean, sample std"
SEQ, TOKENS = 1 / (LENGTHS * 8), np.full(8, 1 / LENGTHS.sum())


def standardised(reward: np.ndarray, ddof: int = 0) -> np.ndarray:
    by = reward.reshape(-1, 4)
    made = by - by.mean(axis=1, keepdims=True)
    return np.asarray(made / by.std(axis=1, ddof=ddof, keepdims=True)).ravel()


ADVANTAGE = standardised(REWARD)


def judged(
    weight: Any = SEQ, x: Any = MOVED, levels: Any = ADVANTAGE, power: float = 1.0,
    gate: bool = False, sign: float = 1.0, rows: dict[str, Any] | None = None,
    source: str = "loop", reward: Any = REWARD, table: bool = True, **objective: Any,
) -> Audit:  # fmt: skip
    """Eight rollouts in two passes with coef = A ratio^power weight."""
    x = np.broadcast_to(x, LENGTHS.sum())
    made = token_rows(LENGTHS, advantage=levels, log_ratio=x, minibatch=np.arange(8) % 2)
    made["coef"] = sign * made["advantage"] * np.exp(power * x) * np.repeat(weight, LENGTHS)
    if gate:
        made["coef"] = np.where(made["advantage"] < 0, 0.0, made["coef"])
    rollouts = pd.DataFrame({"step": 1, "rollout": np.arange(8), "group": GROUP, "reward": reward,
                             "advantage": levels})  # fmt: skip
    seen = evidence(made | (rows or {}), rollouts if table else None, source=source,
                    objective=objective)  # fmt: skip
    return judge(seen, "r")


def told(found: Audit) -> list[str]:
    return [deviation.name for deviation in found.deviations]


# ---- what fits ----------------------------------------------------------------------------------


def test_a_declared_loss_that_fits_comes_first() -> None:
    found = judged(name="grpo")
    assert found.fits[0] == "grpo"
    assert found.declared == "grpo"
    assert not found.deviations
    assert found.summary.startswith(
        "behaves as grpo (mean over each rollout's tokens), as declared"
    )
    assert found.facts["ratio"] == "token ratio or cispo of the token ratio"
    assert found.facts["mean"] == "mean over each rollout's tokens"
    assert found.facts["advantages"] == RULES[POPULATION]
    assert (found.steps, found.tokens) == ((1,), 47)


def test_without_a_declaration_all_that_fit_are_named() -> None:
    found = judged(source="trl", levels=standardised(REWARD, 1))
    assert found.declared == "nothing"
    assert found.fits == ("grpo",)
    assert found.summary == ("behaves as grpo (mean over each rollout's tokens), declared nothing")
    both = judged(x=0.0, source="trl", levels=standardised(REWARD, 1))
    assert both.summary.endswith(", declared nothing; sapo, gmpo cannot be told apart from it here")


CENTRED = REWARD - np.repeat([REWARD[:4].mean(), REWARD[4:].mean()], 4)


def test_advantages_of_another_loss_name_that_loss() -> None:
    found = judged(levels=CENTRED, source="built-in", name="grpo")
    assert found.fits == ("dr_dapo_seq",)
    assert told(found) == ["another advantage"]
    loop = judged(levels=CENTRED, name="grpo")
    assert loop.fits[0] == "grpo"
    assert judged(source="built-in", name="grpo").fits == ("grpo",)


def test_advantages_of_no_loss_leave_the_one_that_is_declared() -> None:
    found = judged(levels=REWARD - REWARD.mean(), source="built-in", name="grpo")
    assert found.fits == ("grpo",)
    assert told(found) == ["another advantage"]


def test_a_loss_of_no_known_kind_is_told_so() -> None:
    found = judged(power=-1.0, name="grpo")
    assert told(found) == ["another ratio", "ratio inverted"][::-1]
    assert found.fits == ()
    assert found.summary == (
        "behaves as no known objective (inverted token ratio; mean over each rollout's tokens), "
        "declared grpo"
    )
    ratio = {d.name: d for d in found.deviations}["another ratio"]
    assert ratio.says == "the loss uses inverted token ratio, declared grpo uses token ratio"
    assert ratio.tokens == "47 tokens with gradient"
    assert ratio.cause == "another loss than intended"


@pytest.mark.parametrize(
    ("power", "x", "cause"),
    [
        (0.0, MOVED, "the ratio is detached, or the loss takes log p in its place"),
        (1.0, np.repeat(MOVED[:8] * 3, LENGTHS), None),
    ],
)
def test_the_cause_of_another_ratio_is_by_the_ratio(
    power: float, x: np.ndarray, cause: str | None
) -> None:
    found = judged(power=power, x=x, name="grpo")
    assert told(found) == (["another ratio"] if cause else [])
    if cause:
        assert found.deviations[0].cause == cause


def test_a_ratio_of_rollouts_is_told() -> None:
    owner = np.repeat(np.arange(8), LENGTHS)
    mean = (np.bincount(owner, MOVED) / LENGTHS)[owner]
    coef = np.repeat(ADVANTAGE * SEQ, LENGTHS) * np.exp(mean)
    found = judged(rows={"coef": coef}, name="grpo")
    assert told(found) == ["another ratio"]
    assert found.deviations[0].cause == "the ratio is averaged over the rollout"
    assert "gspo" in found.fits


@pytest.mark.parametrize(
    ("weight", "name", "means"),
    [
        (TOKENS, "grpo", "token mean over the batch, declared grpo "
         "(mean over each rollout's tokens)"),
        (SEQ, "dapo", "mean over each rollout's tokens, declared dapo "),
        (np.full(8, 0.11), "grpo", "the same weight for every token, declared grpo "),
        (SEQ, "grpo", None),
        (TOKENS, "dapo", None),
    ],
)  # fmt: skip
def test_another_mean_than_declared_is_told(weight: Any, name: str, means: str | None) -> None:
    found = judged(weight, name=name)
    assert told(found) == (["another mean"] if means else [])
    if means:
        assert found.deviations[0].says.startswith(means)
        assert found.deviations[0].tokens == "47 tokens with gradient"


def test_weights_that_are_too_small_as_a_whole_name_no_mean() -> None:
    found = judged(SEQ / 2, name="dapo")
    assert told(found) == ["loss divided twice by accumulation"]


@pytest.mark.parametrize(
    ("sign", "share", "name"),
    [(-1.0, 47, True), (1.0, 47, False)],
)
def test_a_lost_sign_is_told(sign: float, share: int, name: bool) -> None:
    found = judged(sign=sign, name="grpo")
    assert (told(found) == ["pushed against the advantage"]) is name
    if name:
        assert found.deviations[0].tokens == "47 tokens"
        assert found.deviations[0].says == (
            "every token is pushed against its advantage: good ones down, bad ones up"
        )


@pytest.mark.parametrize(("right", "told_of"), [(0, True), (1, True), (2, False)])
def test_one_token_of_five_hundred_may_be_pushed_the_right_way(right: int, told_of: bool) -> None:
    lengths = np.r_[np.full(7, 60), 80]
    rows = token_rows(lengths, advantage=ADVANTAGE, minibatch=np.arange(8) % 2)
    rows["coef"] = -rows["coef"]
    rows["coef"][:right] *= -1
    found = judge(evidence(rows, objective={"name": "grpo"}), "r")
    assert ("pushed against the advantage" in told(found)) is told_of


def test_a_ratio_that_moves_names_every_ratio_that_fits() -> None:
    assert judged(name="grpo").facts["ratio"] == "token ratio or cispo of the token ratio"
    beyond = np.where(np.arange(47) == 3, 2.0, MOVED)
    assert judged(x=beyond, name="grpo").facts["ratio"] == "token ratio"
    inverted = judged(x=0.0, power=-1.0, name="grpo")
    assert "ratio inverted" not in told(inverted)


def test_where_only_a_ratio_differs_the_mean_is_compared_all_the_same() -> None:
    found = judged(TOKENS, power=-1.0, name="grpo")
    assert sorted(told(found)) == ["another mean", "another ratio", "ratio inverted"]


@pytest.mark.parametrize(
    ("fits", "cause"),
    [
        ([Core("none"), Core("unit")], "the ratio is detached"),
        ([Core("none"), Core("plain", "mean")], "another loss"),
        ([Core("plain", "sum"), Core("plain", "mean")], "the ratio is averaged"),
        ([Core("plain"), Core("plain", "mean")], "another loss"),
    ],
)
def test_the_cause_of_a_ratio_holds_for_all_that_fit(fits: list[Core], cause: str) -> None:
    assert _ratio_cause({core: {"seq"} for core in fits}).startswith(cause)


@pytest.mark.parametrize(
    ("rules", "odd"),
    [({"batch mean"}, True), ({"batch mean", "batch mean, sample std"}, True),
     ({"batch mean", "group mean"}, False), ({"group mean"}, False)],
)  # fmt: skip
def test_rules_over_the_batch_alone_are_odd(rules: set[str], odd: bool) -> None:
    assert _odd(rules) is odd


# ---- advantages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "objective", "names"),
    [
        ("built-in", {"name": "grpo"}, ["another advantage"]),
        ("trl", {"name": "grpo"}, []),
        ("loop", {"name": "grpo"}, []),  # its name says no more than that
        ("loop", {"name": "grpo", "advantage": POPULATION}, ["another advantage"]),
        ("loop", {"name": "grpo", "advantage": SAMPLE}, []),
    ],
)
def test_another_advantage_is_told_where_one_is_declared(
    source: str, objective: dict[str, Any], names: list[str]
) -> None:
    found = judged(levels=standardised(REWARD, 1), source=source, **objective)
    assert told(found) == names
    if names:
        assert found.deviations[0].says == (
            f"advantages are {RULES[SAMPLE]}, declared {RULES[POPULATION]}"
        )
        assert found.deviations[0].tokens == "8 rollouts"


def test_advantages_of_the_batch_are_never_what_a_name_means() -> None:
    batch = (REWARD - REWARD.mean()) / REWARD.std()
    assert told(judged(levels=batch, name="grpo")) == ["another advantage"]
    assert told(judged(levels=CENTRED, name="grpo")) == []


@pytest.mark.parametrize(
    ("made", "name", "said"),
    [
        (-ADVANTAGE, "advantages with the wrong sign", "the advantages have the wrong sign"),
        (standardised(np.roll(REWARD, 1)), "advantages of other rollouts",
         "the rewards of every rollout's predecessor were used"),
    ],
)  # fmt: skip
def test_turned_advantages_are_told(made: np.ndarray, name: str, said: str) -> None:
    found = judged(levels=made, name="grpo")
    assert told(found) == [name]
    assert found.facts["advantages"] == f"{RULES[POPULATION]}, but {said}"
    assert found.deviations[0].tokens == (
        f"all tokens of 8 rollouts; with that, the advantages are exactly {RULES[POPULATION]}"
    )
    exactly = judged(levels=made, source="built-in", name="grpo")
    assert "another advantage" not in told(exactly)


def test_without_rewards_the_advantage_is_not_known() -> None:
    found = judged(table=False, name="grpo")
    assert found.missing["advantages"] == "no reward of each rollout was recorded"
    assert "advantages" not in found.facts


# ---- rollouts with A < 0 ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gate", "name", "says"),
    [
        (True, "grpo", "tokens with A < 0 carry no gradient, declared grpo trains on them"),
        (False, "wapo", "tokens with A < 0 carry a gradient, declared wapo leaves out them"),
        (True, "wapo", None),
        (False, "grpo", None),
    ],
)
def test_a_gate_on_the_advantage_is_told(gate: bool, name: str, says: str | None) -> None:
    found = judged(TOKENS if name == "wapo" else SEQ, gate=gate, source="built-in", name=name)
    assert [d.says for d in found.deviations if d.name == "rollouts with A < 0"] == (
        [says] if says else []
    )
    for deviation in found.deviations:
        if deviation.name == "rollouts with A < 0":
            count = int(LENGTHS[ADVANTAGE < 0].sum())
            assert deviation.tokens == f"{count} tokens with A < 0"
    loop = judged(TOKENS if name == "wapo" else SEQ, gate=gate, name=name)
    assert "rollouts with A < 0" not in told(loop)


@pytest.mark.parametrize(
    ("negative", "kept", "x", "gated"),
    [
        (8, 0, 0.0, True),
        (7, 0, 0.0, None),
        (100, 5, 0.0, None),  # a twentieth may pass
        (100, 6, 0.0, False),
        (100, 100, 0.0, False),
        (8, 0, 0.1, True),
        (8, 0, 0.101, None),  # stopped by the clip, maybe
        (8, 0, -0.101, None),
        (8, 0, NAN, True),
    ],
)
def test_a_gate_is_seen_on_eight_tokens_near_ratio_1(
    negative: int, kept: int, x: float, gated: bool | None
) -> None:
    rows = token_rows([negative, 20], advantage=[-1.3, 0.7], logp=0.0,
                      logp_old=np.r_[np.full(negative, -x), np.zeros(20)])  # fmt: skip
    rows["coef"][kept:negative] = 0
    assert _gated(evidence(rows)) is gated
    lost = rows | {"coef": np.where(rows["advantage"] < 0, NAN, rows["coef"])}
    assert _gated(evidence(lost)) is None
    idle = rows | {"advantage": np.where(rows["advantage"] < 0, 0.0, rows["advantage"])}
    assert _gated(evidence(idle)) is None


# ---- words and forms ----------------------------------------------------------------------------


def test_a_line_names_deviations_and_a_page_their_places() -> None:
    found = judged(TOKENS, name="grpo")
    assert found.line == f"{found.summary}; deviations: another mean"
    assert "No deviation found." not in found.to_text()
    assert "usual cause: the token losses are averaged" in found.to_text()
    calm = judged(name="grpo")
    assert calm.line == calm.summary
    assert "No deviation found." in calm.to_text()


def test_hardly_a_token_with_gradient_tells_no_objective() -> None:
    advantage = np.where(np.arange(8) < 2, ADVANTAGE, 0.0)
    few = judged(levels=advantage, name="grpo", rows={"coef": np.zeros(47)})
    assert few.summary == (
        "the objective cannot be told, because only 0 tokens with an advantage carry gradient"
    )


def test_ratios_of_1_say_which_ratio_cannot_be_told() -> None:
    found = judged(x=0.0, name="grpo")
    assert found.facts["ratio"] == (
        "ratios hardly leave 1, so which ratio the loss uses cannot be told"
    )
    assert found.fits[0] == "grpo"
    assert not found.deviations
