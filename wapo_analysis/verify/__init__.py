"""Check every formula and law of ``taxonomy/README.md`` numerically on this machine.

Formulas are compared with measured derivatives, so nothing is compared with itself; laws (what a
class must do) are checked on the measured derivatives. Needs numpy only, under a second.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import wapo_taxonomy as wt

from wapo_analysis.errors import UserError
from wapo_analysis.verify.positions import (
    NEAR_CERTAIN,
    Bools,
    Floats,
    Positions,
    as_float32,
    draw_batches,
    every_token,
    gradient_by_differences,
    mask,
    softmax,
    stable_entropy,
    stable_norm,
    textbook,
)

_FULL_GRADIENT_SIZE = 50  # beyond it, a difference per logit would cost V times all the rest
_MIN_TRIALS = 100


@dataclass(frozen=True)
class Identity:
    """One checked statement."""

    #: Short name, unique.
    name: str
    #: The statement, in plain text.
    statement: str
    #: Largest error, or violation of a law, over all trials; NaN if nothing was checked.
    worst_error: float
    #: Largest error allowed.
    tolerance: float
    #: Number of positions the statement was checked on.
    trials: int
    #: Whether the worst error is within the tolerance.
    passed: bool

    def to_line(self) -> str:
        """Return verdict, name, worst and allowed error, and statement on one line."""
        verdict = "ok  " if self.passed else "FAIL"
        error = f"worst {self.worst_error:.1e}, allowed {self.tolerance:.0e}"
        return f"{verdict} {self.name:<16} {error}  {self.trials:>6} trials  {self.statement}"


@dataclass(frozen=True)
class _Check:
    name: str
    statement: str
    tolerance: float
    errors: Callable[[Positions], Floats]


def run_identities(seed: int = 0, trials: int = 2000) -> list[Identity]:
    """Check every formula and law on random positions.

    Returns one per statement, in the order of the README. Raises UserError if ``trials`` is too
    small for every law to meet a case. ``seed``: seed of the positions; ``trials``: number of
    positions, spread over vocabularies of 2 to 1000 tokens.
    """
    if trials < _MIN_TRIALS:
        raise UserError(f"trials must be at least {_MIN_TRIALS}, got {trials}")
    batches = list(draw_batches(np.random.default_rng(seed), trials))
    return [_judge(check, batches) for check in _CHECKS]


def _judge(check: _Check, batches: list[Positions]) -> Identity:
    errors = np.concatenate([check.errors(batch) for batch in batches])
    worst = float(errors.max()) if errors.size else float("nan")
    passed = worst <= check.tolerance  # false for NaN
    return Identity(check.name, check.statement, worst, check.tolerance, errors.size, passed)


# Errors of the formulas, one per position that the statement speaks of.


def _gradient(batch: Positions) -> Floats:
    if batch.probs.shape[1] > _FULL_GRADIENT_SIZE:
        return np.empty(0)
    formula = -np.sign(batch.coef)[:, None] * (batch.hot - batch.probs)
    worst: Floats = np.abs(gradient_by_differences(batch) - formula).max(1)
    return worst


def _grad_norm(batch: Positions) -> Floats:
    if batch.probs.shape[1] > _FULL_GRADIENT_SIZE:
        return np.empty(0)
    complement, rest = batch.own["complement"], batch.own["collision_rest"]
    formula: Floats = wt.grad_norm(batch.coef, complement, rest, batch.temperature)
    measured = np.linalg.norm(gradient_by_differences(batch), axis=1)
    error: Floats = np.abs(measured - formula * batch.temperature / np.abs(batch.coef))
    return error


def _dprob_sampled(batch: Positions) -> Floats:
    unit = batch.coef / batch.temperature**2
    step = wt.logit_step(batch.coef, batch.temperature)
    formula: Floats = wt.dprob_sampled(step, **batch.own) / unit
    return np.abs(batch.prob_rates[batch.hot] - formula)


def _dprob_other(batch: Positions) -> Floats:
    unit = (batch.coef / batch.temperature**2)[:, None]
    step = wt.logit_step(batch.coef, batch.temperature)[:, None]
    collision = wt.collision(batch.own["prob"], batch.own["collision_rest"])[:, None]
    prob = batch.own["prob"][:, None]
    formula = wt.dprob_other(step, batch.probs, prob, collision) / unit
    worst: Floats = np.where(batch.hot, 0.0, np.abs(batch.prob_rates - formula)).max(1)
    return worst


def _dentropy(batch: Positions) -> Floats:
    unit = batch.coef / batch.temperature**2
    step = wt.logit_step(batch.coef, batch.temperature)
    formula: Floats = wt.dentropy(step, **batch.own, **batch.more) / unit
    return np.abs(batch.entropy_rate - formula)


def _predict(batch: Positions) -> Floats:
    """Compare the whole-vocabulary prediction, which goes row by row, on some rows."""
    worst = []
    for row in range(0, len(batch.probs), 10):
        got = wt.predict(batch.probs[row], batch.sampled[row])
        error = np.abs(got.dprob - batch.prob_rates[row]).max()
        worst.append(max(error, abs(got.dentropy - batch.entropy_rate[row])))
    return np.array(worst)


def _mass(batch: Positions) -> Floats:
    total: Floats = np.abs(batch.prob_rates.sum(1))
    return total


def _textbook(batch: Positions) -> Floats:
    square, change = textbook(batch.own, batch.more)
    norm_error = np.abs(square - stable_norm(batch.own) ** 2)
    return np.maximum(norm_error, np.abs(change - stable_entropy(batch.own | batch.more)))


def _float32(batch: Positions) -> Floats:
    complement = batch.own["complement"]
    rows = (complement < NEAR_CERTAIN) & (complement > 1e-15)
    every = {name: value[rows] for name, value in (batch.own | batch.more).items()}
    worst = np.zeros(rows.sum())
    for form in (stable_norm, stable_entropy):
        worst = np.maximum(worst, np.abs(form(as_float32(every)) / form(every) - 1))
    return worst


# Violations of the laws: how far the measured rate lies on the forbidden side of zero.


def _peak(batch: Positions) -> Bools:
    peak: Bools = wt.is_peak(**batch.own)
    return peak


def _forbidden(values: Floats) -> Floats:
    return np.maximum(values, 0.0)


def _sampled_sign(batch: Positions) -> Floats:
    return _forbidden(-batch.prob_rates[batch.hot])


def _peak_others(batch: Positions) -> Floats:
    others = np.where(batch.hot, -np.inf, batch.prob_rates)
    return _forbidden(others[_peak(batch)].max(1))


def _valley_others(batch: Positions) -> Floats:
    depth = wt.valley_depth(**batch.own)[:, None]
    wrong = np.where(batch.probs < depth, -batch.prob_rates, batch.prob_rates)
    return _forbidden(np.where(batch.hot, -np.inf, wrong)[~_peak(batch)].max(1))


def _valley_mode(batch: Positions) -> Floats:
    return _forbidden(batch.prob_rates[batch.mode][~_peak(batch)])


def _valley_entropy(batch: Positions) -> Floats:
    return _forbidden(-batch.entropy_rate[~_peak(batch)])


def _mode_entropy(batch: Positions) -> Floats:
    return _forbidden(batch.entropy_rate[(batch.hot & batch.mode).any(1)])


def _average_entropy(batch: Positions) -> Floats:
    rates, peak = every_token(batch.probs)
    weighted = batch.probs * rates
    peaks, valleys = (weighted * peak).sum(1), (weighted * ~peak).sum(1)
    wrong_sign = np.maximum(_forbidden(peaks), _forbidden(-valleys))
    worst: Floats = np.maximum(np.abs(peaks + valleys), wrong_sign)
    return worst


def _finite_steps(batch: Positions) -> Floats:
    """Let steps run up to 4, where rewarded steps stop shrinking for sure."""
    pull = batch.hot - batch.probs
    sign = np.sign(batch.coef)
    step = sign * 4.0 * np.arange(1, len(pull) + 1) / len(pull)
    moved = softmax(batch.logits / batch.temperature[:, None] + step[:, None] * pull)
    after = mask(moved, batch.sampled) - moved
    return _forbidden(sign * (np.linalg.norm(after, axis=1) - np.linalg.norm(pull, axis=1)))


_CHECKS = (
    _Check("gradient", "dL/dz = -c (e_y - p) / T", 1e-9, _gradient),
    _Check("grad_norm", "|dL/dz| = |c|/T sqrt((1-p)^2 + C_o)", 1e-9, _grad_norm),
    _Check("dprob_sampled", "dp_y = k p((1-p)^2 + C_o), k = lr c/T^2", 1e-9, _dprob_sampled),
    _Check("dprob_other", "dp_v = k p_v (S - p_y - p_v)", 1e-9, _dprob_other),
    _Check("dentropy", "dH = -k [p(1-p)(ln p + H) - (Q_o + C_o H)]", 1e-9, _dentropy),
    _Check("predict", "the whole-vocabulary prediction is the measured change", 1e-9, _predict),
    _Check("mass", "the changes of all probabilities sum to zero", 1e-11, _mass),
    _Check("textbook", "stable forms equal the textbook forms in float64", 1e-12, _textbook),
    _Check("float32", "stable forms hold on near-certain tokens in float32", 1e-5, _float32),
    _Check("sampled_sign", "dp_y has the sign of c", 1e-11, _sampled_sign),
    _Check("peak_others", "a peak moves all other tokens the other way", 1e-11, _peak_others),
    _Check("valley_others", "a valley moves only tokens below S - p along", 1e-11, _valley_others),
    _Check("valley_mode", "a valley moves the top token the other way", 1e-11, _valley_mode),
    _Check("valley_entropy", "the entropy rule holds for every valley", 1e-11, _valley_entropy),
    _Check("mode_entropy", "the entropy rule holds for the top token", 1e-11, _mode_entropy),
    _Check("average_entropy", "the entropy rule holds on regime averages", 1e-11, _average_entropy),
    _Check(
        "finite_steps", "reward shrinks the gradient, punishment grows it", 1e-11, _finite_steps
    ),
)
