"""What else is in the loss, and what its weights sum to: KL, entropy, constants, denominators.

Shapes: N token rows.
"""

import math
from dataclasses import dataclass

import numpy as np

from wapo_analysis.audit.coefficient import MEANS, Coefficient
from wapo_analysis.audit.declared import Known, look
from wapo_analysis.audit.evidence import Evidence, Findings, by_unit, first_of
from wapo_analysis.audit.sampling import declared_number
from wapo_analysis.table import Array

#: Tokens or rollouts that a statement needs.
_LEAST = 5


def check_extra_terms(
    seen: Evidence, coefficient: Coefficient, declared: Known | None, found: Findings
) -> None:
    """Gradient that no advantage explains: KL, entropy, or advantages that are not detached.

    Seen where it stands alone: on tokens of advantage 0, and on rollouts whose ratios are all 1,
    where the push on a token is ``w (A + c)``.
    """
    name = "other terms"
    idle = (seen["advantage"] == 0) & np.isfinite(seen["coef"])
    push = _push(seen)
    if idle.sum() < 20 and push is None:
        found.missing[name] = (
            "hardly a token has advantage 0, and hardly a rollout ratio 1 on every token"
        )
        return
    beta = _beta(seen)
    if push is not None and push.constant is not None:
        _say_constant(seen, push.rollouts, *push.constant, found)
        return
    if beta:
        _check_kl_sign(seen, coefficient, beta, found)
        return
    values = seen["coef"][idle]
    touched = values != 0
    if idle.sum() >= 20 and touched.mean() >= 0.01:
        share = np.abs(values).sum() / np.nansum(np.abs(seen["coef"]))
        found.facts[name] = f"tokens of advantage 0 hold {share:.0%} of |coef|"
        if beta == 0 or not (declared is None or _may_have_kl(seen)):
            found.deviates(
                "gradient without advantage",
                f"tokens of advantage 0 carry {share:.0%} of |coef|, and no KL term is declared",
                tokens=f"{int(touched.sum())} of {int(idle.sum())} tokens of advantage 0",
                cause="a KL or entropy term in the loss, or advantages (rewards) that are not "
                "detached from the policy",
                look=look(seen.source, "kl"),
            )
        return
    if idle.sum() >= 20:
        found.facts[name] = "none: tokens of advantage 0 carry no gradient"
    if push is not None and push.apart is not None and beta == 0 and _plain(seen, declared):
        uneven, spread = push.apart
        found.deviates(
            "gradient without advantage",
            f"{uneven} of {push.rollouts} rollouts push their tokens by different amounts "
            "though every ratio is 1, and no KL term is declared",
            tokens=f"all tokens of these rollouts, {spread:.0%} apart",
            cause="a KL or entropy term in the loss, or weights of single tokens",
            look=look(seen.source, "kl"),
        )


@dataclass(frozen=True)
class _Push:
    """Push on tokens of rollouts whose ratios are all 1."""

    #: Rollouts looked at.
    rollouts: int
    #: How many push their tokens by different amounts, and the mean relative distance of these.
    apart: tuple[int, float] | None = None
    #: c of ``w (A + c)``, in units of the advantage where it has an effect, and whether it has
    #: none.
    constant: tuple[float, bool] | None = None


def _push(seen: Evidence) -> _Push | None:
    """Read what is pushed where all ratios of a rollout are 1; None if there is hardly any."""
    units, every, levels = seen.units, seen["coef"], seen["advantage"]
    usable = np.isfinite(every) & np.isfinite(levels)
    dropped = (every == 0) & (levels != 0)  # masks and gates
    rows = np.isin(units, units[usable & (every != 0)]) & ~dropped
    rows &= ~np.isin(units, units[~usable | ~seen.at_one])
    if not rows.any():
        return None
    coef, unit = every[rows], np.unique(units[rows], return_inverse=True)[1]
    first = first_of(unit)
    level, count = levels[rows][first], len(first)
    if count < _LEAST or (levels[rows] != level[unit]).any():
        return None
    mean, size = by_unit(coef, unit, count), by_unit(np.abs(coef), unit, count)
    away = np.abs(coef - mean[unit])
    uneven = np.bincount(unit, away > 4 * seen.coef_error * size[unit]) > 0
    if uneven.mean() > 0.01:
        if uneven.sum() < _LEAST:
            return _Push(count)
        far = uneven[unit]
        return _Push(count, (int(uneven.sum()), float((away[far] / size[unit][far]).mean())))
    lengths = np.bincount(units)[units[rows][first]]
    passes = seen.passes[rows][first]
    return _Push(
        count,
        constant=_line(level, mean * lengths, passes, seen.coef_error)
        or _line(level, mean, passes, seen.coef_error),
    )


def _line(advantage: Array, push: Array, passes: Array, error: float) -> tuple[float, bool] | None:
    """Constant c of ``push = a (A + c)`` in every gradient pass, and whether a is 0.

    None where the push is no such line, or goes through 0 as it should.
    """
    found = []
    for number in np.unique(passes):
        x, y = advantage[passes == number], push[passes == number]
        if len(np.unique(np.round(x, 4))) < 3:
            continue
        away = x - x.mean()
        slope = float((away * y).sum() / (away**2).sum())
        start = float(y.mean() - slope * x.mean())
        bound = 8 * error * (np.abs(slope * x) + abs(start)).max()
        if (np.abs(y - slope * x - start) > bound).any() or abs(start) <= 20 * bound:
            return None
        blind = abs(slope) * float(np.abs(x).max()) < 20 * bound
        found.append((np.sign(start) if blind else start / slope, blind))
    if not found or len({blind for _, blind in found}) > 1:
        return None
    constants = [constant for constant, _ in found]
    same = max(constants) - min(constants) <= 0.01 * abs(constants[0])
    return (float(constants[0]), found[0][1]) if same else None


def _say_constant(
    seen: Evidence, rollouts: int, constant: float, blind: bool, found: Findings
) -> None:
    up = constant > 0
    way = "up" if up else "down"
    says = f"every token is pushed {way} by the same amount, whatever its advantage"
    if not blind:
        says = (
            f"beside its advantage, every token is pushed {way} by the same amount, that of an "
            f"advantage of {constant:.2g}"
        )
    found.facts["other terms"] = says
    found.deviates(
        "constant push on every token" if up else "constant push against every token",
        says,
        tokens=f"all tokens of {rollouts} rollouts, at ratio 1",
        cause=(
            "an entropy bonus -log p with the wrong sign, a likelihood term, or advantages "
            "that hold log p and are not detached"
            if up else "an entropy bonus on -log p of the sampled tokens, or KL taken as logp "
            "- ref with its gradient"
        ),
        look=look(seen.source, "kl"),
    )  # fmt: skip


def _plain(seen: Evidence, declared: Known | None) -> bool:
    """Whether the declared loss gives all tokens of a rollout at ratio 1 one weight."""
    prox, old = seen["logp_prox"], seen["logp_old"]
    corrected = bool((np.isfinite(prox) & (prox != old)).any())
    return declared is not None and bool(declared.cores) and not corrected


def _may_have_kl(seen: Evidence) -> bool:
    return "kl_ref" in seen.steps and bool(seen.steps["kl_ref"].notna().any())


def _beta(seen: Evidence) -> float | None:
    if seen.source == "built-in":
        return 0.0
    return declared_number(seen, "beta", "kl_coef", "kl_loss_coef")


def _check_kl_sign(seen: Evidence, coefficient: Coefficient, beta: float, found: Findings) -> None:
    """Whether a KL term pulls towards its reference.

    Its push in units of beta w, with d = ref - logp, is exp(d) - 1 of k3 and d of k2 and of TRL's
    corrected k3. Over tokens of the policy the mean of the first is 0 and that of the second -KL,
    so neither is above 0; the first is never below -1.
    """
    weight = coefficient.weight(seen)
    if weight is None or beta <= 0:
        return
    alone = seen.first_passes() & np.isfinite(seen["coef"]) & seen.at_one
    alone &= np.abs(seen["advantage"]) * (2e-3 + 8 * seen.coef_error) < 0.01 * beta
    if alone.sum() < 100:
        return
    push = (seen["coef"][alone] / weight[alone] - seen["advantage"][alone]) / beta
    mean, low = float(push.mean()), int((push < -1.02).sum())
    sure = mean > 0.05 and mean > 6 * float(push.std()) / math.sqrt(len(push))
    says = f"the KL term pushes the tokens of the policy up by {mean:.2g} beta on average"
    if _is_k3(seen) and low >= _LEAST and not (push > 1.02).any():
        sure = True
        says = (
            f"the KL term pushes tokens down by up to {-push.min():.2g} beta; k3 never pushes by "
            "more than beta"
        )
    if not sure:
        found.facts["other terms"] = f"a KL term of {beta:g}, as declared"
        return
    found.deviates(
        "KL with the wrong sign",
        f"{says}, so its sign is turned",
        tokens=f"{len(push)} tokens of first passes",
        cause="the penalty is subtracted from the loss instead of added",
        look=look(seen.source, "kl"),
    )


def _is_k3(seen: Evidence) -> bool:
    """Whether the run says that its KL term is k3 and nothing else."""
    config, objective = seen.manifest.get("config") or {}, seen.manifest.get("objective") or {}
    return objective.get("kl") == "k3" or config.get("use_bias_correction_kl") is False


def check_scale(
    seen: Evidence, coefficient: Coefficient, declared: Known | None, found: Findings
) -> None:
    """Whether the weights of an update sum to 1, as those of a mean do."""
    _check_summed(seen, coefficient, found)
    for form, total in coefficient.scale.items():
        kind = form.split(" ")[0]
        if kind not in ("seq", "even", "pass"):
            continue
        mean = "token mean" if kind == "even" else MEANS[kind]
        # Right are 1 (accumulated) and the number of passes (an update each), not 1 / passes.
        if total.passes.max() >= 2 and _all_near(total.totals * total.passes, 1):
            found.deviates(
                "loss divided twice by accumulation",
                f"as a {mean}, the weights of a step sum to {total.totals[0]:.3g} = 1 / "
                f"{total.passes[0]:g}, the number of its gradient passes",
                tokens="all tokens with an advantage",
                cause="trainer and accelerator both divide by the accumulation steps (transformers "
                "5.0 to 5.2 did), so the learning rate is that much smaller",
                look=look(seen.source, "mean"),
            )
            return
        if kind == "even" and declared is not None and "batch" in declared.means:
            _check_denominator(seen, total.totals, declared, found)
            return


def _check_summed(seen: Evidence, coefficient: Coefficient, found: Findings) -> None:
    """Micro-batches of one update whose means are added."""
    total = coefficient.summed
    if total is None or total.ranks > 1 or not np.isfinite(total.updates).all():
        return
    if (total.passes > total.updates).all() and _all_near(total.totals, total.passes):
        found.deviates(
            "micro-batches are summed",
            f"the weights of a step sum to {total.totals[0]:.3g}, the number of its gradient "
            f"passes, but updates are {total.updates[0]:g}",
            tokens="all tokens with an advantage",
            cause="losses of micro-batches are added without a division by their number, so the "
            "gradient grows with the accumulation steps",
            look=look(seen.source, "mean"),
        )


def _all_near(values: Array, target: Array | float) -> bool:
    return bool((np.abs(values / target - 1) < 1e-3).all())


def _check_denominator(seen: Evidence, totals: Array, declared: Known, found: Findings) -> None:
    """A token mean whose weights sum to less than 1, by another share in every step."""
    if len(totals) < 2 or totals.max() > 1 - 1e-3 or _all_near(totals, totals[0]):
        return
    shown = ", ".join(f"{total:.3g}" for total in totals[:4])
    found.deviates(
        "another mean",
        f"every token of a step has the same weight, but the weights sum to {shown}, not to 1 as "
        f"in {declared.name}: the denominator counts more than the tokens under the mask",
        tokens="all tokens with an advantage",
        cause="rollouts or tokens that are masked out are counted in the denominator",
        look=look(seen.source, "mean"),
    )
