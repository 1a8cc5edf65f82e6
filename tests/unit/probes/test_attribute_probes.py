"""Rows of probes, what is read from them, and the words that are made of it."""

import numpy as np
import pandas as pd
import pytest
import wapo_taxonomy as tax

from tests.support.builders import probe
from wapo_analysis.probes import (
    MEANINGS,
    agreement,
    closure,
    closure_error,
    judge,
    part_name,
    set_name,
    three_numbers,
)
from wapo_analysis.probes.rows import ADDENDS, Change, PartSize, ProbedTokens, fit_scale, probe_rows
from wapo_analysis.schema import (
    ALL_TOKENS,
    GRADIENT,
    INTERACTION,
    MOMENTUM,
    OTHER_TOKENS,
    PART_NAMES,
    UPDATE,
    WEIGHT_DECAY,
)

PARTS = (*range(4), GRADIENT, MOMENTUM, WEIGHT_DECAY, UPDATE)


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return pd.concat([probe(step).to_frame() for step in (4, 8, 12)], ignore_index=True)


def one_softmax(eta: float) -> pd.DataFrame:
    """Probe of independent softmaxes, each moved by eta along its own exact gradient."""
    rng = np.random.default_rng(3)
    logits = rng.normal(size=(40, 9)) * 2
    sampled = np.array([rng.choice(9, p=np.exp(z) / np.exp(z).sum()) for z in logits])
    advantage = rng.choice([-1.0, 1.0], 40)

    def stats(z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        p = np.exp(z - z.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        return p, np.log(p[range(40), sampled]), -(p * np.log(p)).sum(1)

    p, logp, entropy = stats(logits)
    others = p.copy()
    others[range(40), sampled] = 0
    rest = (others**2).sum(1)
    cls = np.array(tax.class_code(advantage, np.exp(logp), -np.expm1(logp), rest))
    tokens = ProbedTokens(
        cls=cls,
        coef=advantage,
        logp=logp,
        entropy=entropy,
        collision_rest=rest,
        collision_logp_rest=(others**2 * np.log(p)).sum(1),
    )
    direction = (np.eye(9)[sampled] - p) * advantage[:, None]

    def change(size: float, who: np.ndarray) -> Change:
        _, after, h = stats(logits + eta * size * direction * who[:, None])
        return Change(after - logp, h - entropy)

    still, every = change(0.0, cls), np.ones(40)
    changes = {code: change(1.0, cls == code) for code in range(4)}
    changes |= {GRADIENT: change(1.0, every), UPDATE: change(1.0, every)}
    changes |= {MOMENTUM: still, WEIGHT_DECAY: still}
    size = PartSize(grad_norm=1.0, step_norm=1.0, dots=(0.0,) * 4)
    sizes = dict.fromkeys(PARTS, size)
    return probe_rows(1, 0, tokens, changes, change(0.5, every), sizes, 0.0).to_frame()


def test_independent_softmaxes_obey_the_law_and_give_back_their_learning_rate() -> None:
    rows = one_softmax(1e-4)
    np.testing.assert_allclose(rows["scale"], 1e-4, rtol=1e-3)
    table = three_numbers(rows).set_index("tokens_of")
    assert set(table["verdict"]) == {"local law holds"}
    np.testing.assert_allclose(table["predicted"], table["measured"], rtol=5e-3)
    np.testing.assert_allclose(table["counterfactual"], table["measured"], rtol=1e-9)
    left = rows[rows["part"] == INTERACTION]["counterfactual_dentropy"]
    assert left.abs().max() < 1e-12


def carrying(momentum: float, decay: float) -> pd.DataFrame:
    """A probe of which the local law holds, with so much carried of its gradient's change."""
    rows = one_softmax(1e-4)
    gradient = rows[rows["part"] == GRADIENT].set_index("tokens_of")["counterfactual_dentropy"]
    rows = rows.set_index("tokens_of")
    for part, share in ((MOMENTUM, momentum), (WEIGHT_DECAY, decay)):
        carried = share * gradient.reindex(rows.index[rows["part"] == part])
        rows.loc[rows["part"] == part, "counterfactual_dentropy"] = carried.to_numpy()
    return rows.reset_index()


@pytest.mark.parametrize(
    ("momentum", "decay", "verdict"),
    [
        (0.0, 0.0, "local law holds"),
        (0.7, 0.0, "local law holds"),
        (0.0, 1.5, "momentum dominates"),
        (0.7, 0.7, "momentum dominates"),
        (1.5, -1.5, "local law holds"),
    ],
)
def test_weight_decay_is_carried_as_momentum_is(
    momentum: float, decay: float, verdict: str
) -> None:
    table = three_numbers(carrying(momentum, decay))
    expected = (momentum + decay) * table["gradient"]
    np.testing.assert_allclose(table["carried"], expected, rtol=1e-12, atol=1e-18)
    moved = table["gradient"].abs() > 1e-5
    assert set(table.loc[moved, "verdict"]) == {verdict}


def test_a_huge_step_of_independent_softmaxes_is_called_too_large() -> None:
    table = three_numbers(one_softmax(30.0)).set_index("tokens_of")
    assert "step too large" in set(table["verdict"])
    small = three_numbers(one_softmax(1e-10))
    assert set(small["verdict"]) == {"below resolution"}


def test_parts_of_every_set_of_tokens_add_up(frame: pd.DataFrame) -> None:
    assert closure_error(frame) < 1e-12
    keys = ["step", "tokens_of"]
    alone = frame.pivot_table(index=keys, columns="part", values="counterfactual_dprob")
    total = alone[[*ADDENDS, INTERACTION]].sum(axis=1)
    np.testing.assert_allclose(total, alone[UPDATE], atol=1e-15)
    broken = frame.assign(counterfactual_dentropy=frame["counterfactual_dentropy"] ** 2)
    assert closure_error(broken) > 0.1


def test_sets_hold_their_own_tokens(frame: pd.DataFrame) -> None:
    counts = frame[(frame["step"] == 4) & (frame["part"] == UPDATE)].set_index("tokens_of")[
        "tokens"
    ]
    assert counts[OTHER_TOKENS] == 10
    assert counts[ALL_TOKENS] == 50, "zero advantage is in, the step before is not"
    assert counts[[0, 1, 2, 3]].sum() == 40


def test_tokens_of_the_step_before_are_predicted_to_stay(frame: pd.DataFrame) -> None:
    other = frame[(frame["tokens_of"] == OTHER_TOKENS) & frame["part"].isin([*range(4), UPDATE])]
    assert (other["predicted_dentropy"] == 0).all()
    assert (other["counterfactual_dentropy"] != 0).any()
    silent = frame[frame["part"].isin([MOMENTUM, WEIGHT_DECAY, INTERACTION])]
    assert silent["predicted_dentropy"].isna().all()


def test_closure_sums_the_probes_and_names_the_largest_part(frame: pd.DataFrame) -> None:
    table = closure(frame)
    assert list(table.index) == [*range(4), MOMENTUM, WEIGHT_DECAY, INTERACTION, UPDATE]
    total = table["dentropy"].drop(UPDATE).sum()
    assert total == pytest.approx(table.loc[UPDATE, "dentropy"], abs=1e-15)
    whole = frame[(frame["part"] == UPDATE) & (frame["tokens_of"] == ALL_TOKENS)]
    assert table.loc[UPDATE, "dentropy"] == pytest.approx(whole["measured_dentropy"].sum())
    assert table["share"].drop(UPDATE).sum() == pytest.approx(1)
    assert np.isnan(table.loc[MOMENTUM, "predicted"])


def test_three_numbers_take_the_own_class(frame: pd.DataFrame) -> None:
    table = three_numbers(frame).set_index(["step", "tokens_of"])
    row = frame[(frame["step"] == 8) & (frame["part"] == 2) & (frame["tokens_of"] == 2)].iloc[0]
    assert table.loc[(8, 2), "counterfactual"] == row["counterfactual_dentropy"]
    assert table.loc[(8, 2), "predicted"] == row["predicted_dentropy"]
    joint = frame[(frame["step"] == 8) & (frame["part"] == GRADIENT)].set_index("tokens_of")
    for code in (ALL_TOKENS, OTHER_TOKENS):
        told = table.loc[(8, code), "counterfactual"]
        assert told == joint.loc[code, "counterfactual_dentropy"]


@pytest.mark.parametrize("steps", [(4,), (8,), (4, 8, 12)])
def test_a_probe_of_which_nothing_is_finite_shifts_no_other(
    frame: pd.DataFrame, steps: tuple[int, ...]
) -> None:
    hurt = frame["step"].isin(steps)
    changes = [name for name in frame if name.endswith("_dentropy")]
    broken = frame.copy()
    broken.loc[hurt, changes] = np.nan
    whole, found = three_numbers(frame), three_numbers(broken)
    left = ~whole["step"].isin(steps)
    pd.testing.assert_frame_equal(found[left], whole[left])
    assert found.loc[~left, ["predicted", "counterfactual", "measured"]].isna().all(axis=None)
    assert closure_error(broken) < 1e-6


def test_no_rows_give_empty_tables(frame: pd.DataFrame) -> None:
    assert len(three_numbers(frame.iloc[:0])) == 0
    assert closure_error(frame.iloc[:0]) == 0.0
    assert closure(frame.iloc[:0])["dentropy"].isna().all()


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        ((1e-8, 1e-8, 0, 1e-8, 5e-9), "below resolution"),
        ((1e-3, 1e-3, 0, 4e-3, 1e-3), "step too large"),
        ((1e-3, 1e-3, 2e-3, 3e-3, 1.5e-3), "momentum dominates"),
        ((1e-3, 1e-3, -2e-3, -1e-3, -5e-4), "momentum dominates"),
        ((-1e-3, 1e-3, 0, 1e-3, 5e-4), "sharing dominates"),
        ((1e-3, 3.1e-3, 0, 3.1e-3, 1.55e-3), "sharing dominates"),
        ((3.1e-3, 1e-3, 0, 1e-3, 5e-4), "sharing dominates"),
        ((np.nan, 1e-3, 0, 1e-3, 5e-4), "sharing dominates"),
        ((1e-3, 2.9e-3, 1e-3, 3.9e-3, 1.95e-3), "local law holds"),
    ],
)
def test_verdicts(numbers: tuple[float, ...], verdict: str) -> None:
    assert judge(*([value] for value in numbers)).tolist() == [verdict]
    assert verdict in MEANINGS


def test_a_straight_response_is_never_called_too_large() -> None:
    change = np.linspace(-1, 1, 21)
    assert "step too large" not in judge(change, change, 0 * change, change, change / 2)


def test_agreement_leaves_out_what_did_not_move() -> None:
    predicted = np.array([1.0, 2.0, 3.0, 0.0, np.nan, -1.0])
    told = agreement(predicted, np.array([10.0, 20.0, -1.0, 5.0, 1.0, -3.0]))
    assert told["pairs"] == 4
    assert told["sign_agreement"] == pytest.approx(0.75)
    assert told["rank_correlation"] == pytest.approx(0.4)
    nothing = agreement(np.zeros(3), np.ones(3))
    assert np.isnan([nothing["rank_correlation"], nothing["sign_agreement"]]).all()


def test_scale_is_the_slope_and_missing_without_a_push() -> None:
    x = np.array([1.0, -2.0, 3.0])
    assert fit_scale(x, 5 * x) == pytest.approx(5)
    assert np.isnan(fit_scale(np.zeros(3), x))


def test_every_code_has_a_name() -> None:
    assert [part_name(code) for code in range(9)] == [*tax.CLASSES, *PART_NAMES.values()]
    assert [set_name(code) for code in range(6)] == [*tax.CLASSES, "all tokens", "step before"]
