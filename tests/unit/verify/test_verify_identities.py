"""The proof passes, and fails as soon as a formula or a law is falsified."""

import dataclasses
import time

import numpy as np
import pytest
import wapo_taxonomy as wt

from tests.support.rule_shares import run_observations
from wapo_analysis.errors import UserError
from wapo_analysis.verify import Identity, positions, run_identities


def failed(found: list[Identity]) -> set[str]:
    return {identity.name for identity in found if not identity.passed}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_every_identity_holds_quickly(seed: int) -> None:
    start = time.perf_counter()
    found = run_identities(seed)
    assert time.perf_counter() - start < 10
    assert failed(found) == set()
    assert len({identity.name for identity in found}) == len(found) == 17
    for identity in found:
        assert identity.trials >= 100
        assert 0 <= identity.worst_error <= identity.tolerance <= 1e-5
        assert identity.statement


def test_same_seed_same_result() -> None:
    assert run_identities(3, 200) == run_identities(3, 200)
    assert run_observations(3, 20) == run_observations(3, 20)


def test_lines_carry_verdict_name_and_numbers() -> None:
    good = run_identities(trials=100)[0]
    bad = dataclasses.replace(good, passed=False, worst_error=0.5)
    assert good.to_line().startswith("ok   gradient")
    assert bad.to_line().startswith("FAIL gradient")
    assert "worst 5.0e-01, allowed 1e-09" in bad.to_line()
    assert good.statement in good.to_line()
    observation = run_observations(trials=5)[0]
    assert f"{observation.value:.2%} {observation.name}" in observation.to_line()


def test_identities_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        run_identities(trials=100)[0].passed = False  # type: ignore[misc]


MUTANTS = {
    "step with 1/T": (
        "logit_step",
        lambda coef, temperature=1.0, lr=1.0: lr * coef / temperature,
        {"dprob_sampled", "dprob_other", "dentropy"},
    ),
    "1 - p as the norm": (
        "grad_norm",
        lambda coef, complement, collision_rest, temperature=1.0: (
            abs(coef) / temperature * complement
        ),
        {"grad_norm", "textbook"},
    ),
    "norm without 1/T": (
        "grad_norm",
        lambda coef, complement, collision_rest, temperature=1.0: (
            abs(coef) * (complement**2 + collision_rest) ** 0.5
        ),
        {"grad_norm"},
    ),
    "p(1-p) for the sampled token": (
        "dprob_sampled",
        lambda step, prob, complement, collision_rest: step * prob * complement,
        {"dprob_sampled"},
    ),
    "other tokens without S": (
        "dprob_other",
        lambda step, prob_other, prob_sampled, collision: -step * prob_other * prob_sampled,
        {"dprob_other"},
    ),
    "entropy without the sums over others": (
        "dentropy",
        lambda step, prob, complement, logp, entropy, collision_rest, collision_logp_rest: (
            -step * prob * complement * (logp + entropy)
        ),
        {"dentropy", "textbook", "average_entropy"},
    ),
    "everything is a peak": (
        "is_peak",
        lambda prob, complement, collision_rest: prob >= -1,
        {"peak_others"},
    ),
    "peak means p >= 1/2": (
        "is_peak",
        lambda prob, complement, collision_rest: prob >= 0.5,
        {"valley_entropy", "valley_mode"},
    ),
    "border moved down": (
        "is_peak",
        lambda prob, complement, collision_rest: prob * complement >= 0.5 * collision_rest,
        {"peak_others"},
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_formula_is_caught(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, function, expected = MUTANTS[mutant]
    monkeypatch.setattr(wt, name, function)
    assert expected <= failed(run_identities())


def test_a_textbook_form_in_float32_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def dentropy(step, prob, complement, logp, entropy, collision_rest, collision_logp_rest):
        s, q = wt.collision(prob, collision_rest), prob * prob * logp + collision_logp_rest
        return -step * (prob * (logp + entropy) - (q + s * entropy))

    monkeypatch.setattr(wt, "dentropy", dentropy)
    assert failed(run_identities()) == {"float32"}


def test_too_few_trials_are_refused() -> None:
    with pytest.raises(UserError, match="at least 100, got 99"):
        run_identities(trials=99)


def test_observations_are_the_shares_the_readme_quotes() -> None:
    shares = {o.name: o.value for o in run_observations(seed=1, trials=300)}
    assert 0.03 < shares["rule_wrong"] < 0.08
    assert 0.001 < shares["rule_wrong_entropy"] < 0.01
    assert shares["textbook_norm"] > 0.5
    assert shares["textbook_dentropy"] > 0.1


def test_disagreement_is_only_peaks_between_the_two_borders() -> None:
    """README section 4: the rule fails for S <= p < p*, where f(p*) = Q + S H, and nowhere else."""
    rng = np.random.default_rng(5)
    probs = positions.softmax(rng.choice([0.5, 1, 3], (200, 1)) * rng.standard_normal((200, 300)))
    rates, peak = positions.every_token(probs)
    h = positions.entropy(probs)[:, None]
    s, q = (probs**2).sum(1, keepdims=True), (probs**2 * np.log(probs)).sum(1, keepdims=True)
    low, high = np.broadcast_to(s, (200, 1)).copy(), np.ones((200, 1))
    for _ in range(60):
        middle = (low + high) / 2
        below = middle * (np.log(middle) + h) < q + s * h
        low, high = np.where(below, middle, low), np.where(below, high, middle)
    wrong = np.where(peak, rates > 0, rates < 0)
    between = (probs >= s) & (probs < low)
    np.testing.assert_array_equal(wrong, between)
    assert wrong.any()
    bound = np.broadcast_to(q - s * np.log(s), probs.shape)
    assert (np.abs(rates[wrong]) <= bound[wrong]).all()


def test_positions_cover_the_hard_cases() -> None:
    batches = list(positions.draw_batches(np.random.default_rng(0), 2000))
    complement = np.concatenate([batch.own["complement"] for batch in batches])
    assert (complement < 1e-6).any()
    assert (complement > 1 - 1e-6).any()
    ties = [np.isclose(b.probs, b.probs.max(1, keepdims=True)).sum(1) > 1 for b in batches]
    assert np.concatenate(ties).mean() > 0.02
    assert {t for b in batches for t in b.temperature} == {0.3, 0.7, 1.0, 1.7, 4.0}
    assert all((b.coef > 0).any() and (b.coef < 0).any() for b in batches)
