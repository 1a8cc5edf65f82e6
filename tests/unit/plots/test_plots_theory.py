"""Figures of the taxonomy: the numbers in them are those of the formulas."""

import numpy as np
import pytest
import wapo_taxonomy as tax

from wapo_analysis.plots import render
from wapo_analysis.plots.style import CLASS_COLORS, CLASS_INK
from wapo_analysis.plots.theory import (
    VOCABULARY,
    _rest,
    plot_theory_classes,
    plot_theory_map,
    plot_theory_vocabulary,
    prepare_theory_classes,
    prepare_theory_map,
    prepare_theory_vocabulary,
)


def policy(prob: float, collision: float) -> np.ndarray:
    """The policy that the map stands for: sampled token, rival, uniform tail."""
    tail, complement = VOCABULARY - 2, 1 - prob
    inside = (tail + 1) * (collision - prob**2) - complement**2
    rival = (complement + np.sqrt(tail * inside)) / (tail + 1)
    return np.array([prob, rival, *[(complement - rival) / tail] * tail])


@pytest.mark.parametrize(("prob", "collision"), [(0.05, 0.3), (0.3, 0.2), (0.6, 0.5), (0.02, 0.03)])
def test_map_stands_for_a_policy_with_that_p_and_s(prob: float, collision: float) -> None:
    probs = policy(prob, collision)
    assert probs.sum() == pytest.approx(1)
    assert (probs >= 0).all()
    assert (probs**2).sum() == pytest.approx(collision)
    rest, rest_logp, entropy = _rest(np.array(prob), np.array(collision))
    assert rest == pytest.approx((probs[1:] ** 2).sum())
    assert rest_logp == pytest.approx((probs[1:] ** 2 * np.log(probs[1:])).sum())
    assert entropy == pytest.approx(-(probs * np.log(probs)).sum())


def test_map_is_the_measured_change_of_such_policies() -> None:
    frame = prepare_theory_map().dropna()
    inner = frame[(frame["prob"] < 0.9)].sample(40, random_state=0)
    for _, row in inner.iterrows():
        probs = policy(row["prob"], row["collision"])
        step = 1e-6
        logits = np.log(np.maximum(probs, 1e-300))
        sides = []
        for sign in (1, -1):
            moved = logits + sign * step * (np.eye(len(probs))[0] - probs)
            after = np.exp(moved - moved.max())
            after /= after.sum()
            sides.append(-(after * np.log(np.maximum(after, 1e-300))).sum())
        change = (sides[0] - sides[1]) / (2 * step)
        assert row["dentropy"] == pytest.approx(change, rel=1e-4, abs=1e-6)


def test_map_knows_where_no_policy_is() -> None:
    frame = prepare_theory_map()
    possible = frame["dentropy"].notna()
    prob, collision = frame["prob"], frame["collision"]
    most = prob**2 + (1 - prob) ** 2
    least = prob**2 + (1 - prob) ** 2 / (VOCABULARY - 1)
    inside = (collision < most - 1e-9) & (collision > least + 1e-9)
    assert (possible[inside]).all()
    assert not possible[(collision > most + 1e-9) | (collision < least - 1e-9)].any()


def test_rule_holds_on_the_map_but_for_a_strip_on_the_peak_side() -> None:
    frame = prepare_theory_map().dropna()
    valley = frame["prob"] < frame["collision"]
    assert (frame.loc[valley, "dentropy"] > 0).all()
    wrong = (~valley) & (frame["dentropy"] > 1e-12)
    assert 0 < wrong.mean() < 0.1
    size = frame["dentropy"].abs()
    assert size[wrong].sum() / size.sum() < 0.02


def test_map_panels() -> None:
    axes = plot_theory_map(prepare_theory_map())
    assert [ax.get_title("left") or ax.get_title() for ax in axes] == [
        "A > 0: the token is pushed up", "A < 0: the token is pushed down",
    ]  # fmt: skip
    words = [" ".join(text.get_text() for text in ax.texts) for ax in axes]
    for name, word in zip(tax.CLASSES, (words[0], words[0], words[1], words[1]), strict=True):
        way = "falls" if tax.EFFECTS[name].entropy < 0 else "rises"
        assert f"{name}:\nentropy {way}" in word
    colors = {text.get_color() for ax in axes for text in ax.texts}
    assert {CLASS_INK[name] for name in tax.CLASSES} <= colors


def test_vocabulary_bars_are_the_prediction() -> None:
    frame = prepare_theory_vocabulary()
    axes = plot_theory_vocabulary(frame)
    assert axes.shape == (2, 4)
    for column, name in zip(axes.T, tax.CLASSES, strict=True):
        part = frame[frame["cls"] == name]
        assert part["dprob"].sum() == pytest.approx(0, abs=1e-15)
        assert np.sign(part["dentropy"].iloc[0]) == tax.EFFECTS[name].entropy
        assert np.sign(part.loc[part["sampled"], "dprob"].item()) == tax.EFFECTS[name].sampled
        heights = [bar.get_height() for bar in column[1].patches]
        np.testing.assert_allclose(heights, part["dprob"])
        prob = part.loc[part["sampled"], "prob"].item()
        assert name.endswith("peak") == (prob >= (part["prob"] ** 2).sum())


def test_many_updates_lead_where_the_class_says() -> None:
    frame = prepare_theory_classes()
    for name, rows in frame.groupby("cls"):
        first, last = rows.iloc[0], rows.iloc[-1]
        effect = tax.EFFECTS[str(name)]
        assert np.sign(last["entropy"] - first["entropy"]) == effect.entropy
        assert np.sign(last["prob"] - first["prob"]) == effect.sampled
        if effect.sampled > 0:
            assert last["force"] < first["force"] / 5, "a reward limits itself"
        else:
            assert last["force"] > first["force"], "a punishment does not"
    axes = plot_theory_classes(frame)
    assert axes.shape == (3,)
    solid = [item for item in axes[0].lines if item.get_label() in tax.CLASSES]
    assert [item.get_color() for item in solid] == [CLASS_COLORS[name] for name in tax.CLASSES]


def test_theory_needs_no_run() -> None:
    for name in ("theory_map", "theory_vocabulary", "theory_classes"):
        assert render(name).axes
