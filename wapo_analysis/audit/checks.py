"""Which tokens carry gradient, and where the clip bites.

Shapes: N token rows.
"""

import math

import numpy as np

from wapo_analysis.audit.coefficient import Coefficient
from wapo_analysis.audit.declared import Known, look
from wapo_analysis.audit.evidence import Evidence, Findings, exponential
from wapo_analysis.table import Array

#: Tokens that a statement about the clip needs.
_LEAST = 5
#: Distance of subnormal half-precision numbers.
_GRID = 2.0**-24


def check_outside(seen: Evidence, found: Findings) -> None:
    """Gradient on positions that the loss mask leaves out."""
    name, column = "tokens outside the mask", "grad_outside"
    if column not in seen.steps or seen.steps[column].isna().all():
        found.missing[name] = "only the positions under the mask were recorded"
        return
    counts = {
        place: int(np.nansum(seen.steps[place].to_numpy(float))) if place in seen.steps else 0
        for place in (column, "grad_before", "grad_after")
    }
    total, before, after = counts.values()
    between = total - before - after
    if between:  # what a tool wrote last stands behind a rollout's last token, as padding does
        between, after = between + after, 0
    if not total:
        found.facts[name] = "carry no gradient"
        return
    found.facts[name] = f"{total} carry gradient"
    for who, count, cause in (
        ("prompt tokens", before, "the loss is not multiplied with the completion mask"),
        ("tokens after the end", after, "padding, or what follows the end token, is in the loss"),
        (
            "masked tokens",
            between,
            "the loss is not multiplied with the mask: text of tools, padding or prompts",
        ),
    ):
        if count:
            found.deviates(
                f"gradient on {who}",
                f"{count} {who}, outside the loss mask, carry gradient",
                tokens=f"{count} positions of {len(seen.steps)} steps",
                cause=cause,
                look=look(seen.source, "mask"),
            )


def check_end(seen: Evidence, found: Findings) -> None:
    """Whether the last token of rollouts, as a rule the end token, is trained on as others are."""
    name = "end token"
    usable = (seen["advantage"] != 0) & np.isfinite(seen["coef"]) & (seen["minibatch"] == 0)
    last = np.zeros(len(seen), bool)
    order = np.lexsort((seen["position"], seen.units))
    ends = np.append(np.flatnonzero(np.diff(seen.units[order])), len(order) - 1)
    last[order[ends]] = True
    tokens = np.asarray(seen["token_id"])[order[ends]]
    if not len(tokens) or (tokens < 0).all():
        found.missing[name] = "token ids were not recorded"
        return
    sizes = np.bincount(seen.units)
    short = tokens[sizes < sizes.max()]  # what reached the limit need not have ended
    ids, counts = np.unique(short, return_counts=True)
    if len(short) < 4 or counts.max() < 0.9 * len(short):
        found.missing[name] = (
            "hardly a rollout is shorter than the longest" if len(short) < 4 else
            "rollouts end with different tokens: the end token is outside the mask, or a stop text "
            "ended them"
        )  # fmt: skip
        return
    end = ids[counts.argmax()]
    own = usable & last & (np.asarray(seen["token_id"]) == end)
    other = usable & ~last
    # A token that is stopped by the clip, or a mask over classes of tokens, is no sign of this.
    here, there = (seen["coef"][own] != 0).mean() if own.any() else 1.0, 0.0
    if other.any():
        there = float((seen["coef"][other] != 0).mean())
    found.facts[name] = f"token {end} ends {(tokens == end).mean():.0%} of the rollouts"
    if here == 0 and there > (0.9 if own.sum() >= 8 else 0.99) and own.sum() >= 3:
        found.deviates(
            "end token left out",
            f"the token that ends rollouts ({end}) never carries gradient, {there:.0%} of the "
            "others do",
            tokens=f"{int(own.sum())} last tokens",
            cause="the mask stops before the end token, so the policy never learns to stop",
            look=look(seen.source, "mask"),
        )
    elif own.any():
        found.facts[name] += " and carries gradient" if here > 0 else " and carries none"


def check_first_token(seen: Evidence, found: Findings) -> None:
    """Whether the first token of rollouts is trained on as others are."""
    usable = (seen["advantage"] != 0) & np.isfinite(seen["coef"]) & (seen["minibatch"] == 0)
    first, other = usable & (seen["position"] == 0), usable & (seen["position"] > 0)
    idle = seen["coef"] == 0
    if first.sum() >= 8 and idle[first].all() and other.any() and idle[other].mean() < 0.01:
        found.deviates(
            "first token left out",
            "the first token of rollouts never carries gradient, the others do",
            tokens=f"{int(first.sum())} first tokens",
            cause="mask or log-probabilities are shifted by one",
            look=look(seen.source, "mask"),
        )


def check_whose_advantage(seen: Evidence, found: Findings) -> None:
    """Rollouts that are pushed as a whole against their advantage, some up and some down."""
    rows = np.isfinite(seen["coef"]) & (seen["coef"] != 0) & (seen["advantage"] != 0)
    if not rows.any():
        return
    unit = np.unique(seen.units[rows], return_inverse=True)[1]
    up = np.bincount(unit, seen["coef"][rows] > 0) / np.bincount(unit)
    wanted = np.bincount(unit, seen["advantage"][rows] > 0) / np.bincount(unit)
    whole = np.isin(up, (0, 1)) & (np.bincount(unit) >= 3)
    wrong_up, wrong_down = whole & (up > wanted), whole & (up < wanted)
    right = whole & (up == wanted)
    if not whole.any() or whole.sum() < 0.95 * (np.bincount(unit) >= 3).sum():
        return
    if min(wrong_up.sum(), wrong_down.sum()) < 3 or right.sum() < 3:
        return
    found.deviates(
        "advantages of other rollouts in the loss",
        f"{int(wrong_up.sum())} rollouts with A < 0 are pushed up and {int(wrong_down.sum())} with "
        f"A > 0 down, every token of them; {int(right.sum())} are pushed as they should be",
        tokens=f"{int(np.isin(unit, np.flatnonzero(wrong_up | wrong_down)).sum())} tokens",
        cause="advantages and log-probabilities are in different order (shuffle, gather)",
        look=look(seen.source, "advantage"),
    )


def check_clip(
    seen: Evidence, coefficient: Coefficient, declared: Known | None, found: Findings
) -> None:
    """Where the clip bites: which side, which bounds."""
    name = "clip"
    levels = {core.level for core in coefficient.fits if core.kind in ("plain", "inverse")}
    if not coefficient.ratio_moves:
        found.missing[name] = "ratios hardly leave 1, so no clip can act"
        return
    if "token" not in levels or coefficient.against > 0.5:
        found.missing[name] = "the loss has no ratio of each token that is known"
        return
    x, sign = seen.log_ratio, np.sign(seen["advantage"])
    usable = np.isfinite(x) & np.isfinite(seen["coef"]) & (sign != 0)
    zero = seen["coef"] == 0
    alive = np.bincount(seen.units, ~zero & usable) > 0  # a mask may drop whole rollouts
    usable &= alive[seen.units]
    error = 4 * seen.ratio_error + 1e-6
    inside = usable & (np.abs(x) < 0.02)
    whole = inside.sum() < 20 or (zero & inside).sum() <= 0.002 * inside.sum()
    sides = {s: usable & (sign == s) for s in (1, -1)}
    if not whole:
        # Gates drop a sign as a whole; then the other one still tells.
        sides = {s: rows for s, rows in sides.items() if not (zero & rows & inside).any()}
    told = []
    for s, rows in sides.items():
        with_it, against = rows & (x * s > error), rows & (x * s < -error)
        stopped, passed = with_it & zero, with_it & ~zero
        wrong = against & zero & (np.abs(x) < 10)  # far out, ratios are held or vanish
        words = "A > 0" if s > 0 else "A < 0"
        if stopped.sum() >= _LEAST:
            ratio = exponential(x[stopped])
            edge = ratio.min() if s > 0 else ratio.max()
            told.append(f"stops {words} {'above' if s > 0 else 'below'} {edge:.3g}")
        # A dual clip stops A < 0 far above.
        early = wrong & (np.abs(x) < math.log(1.9)) if s < 0 else wrong
        if early.sum() >= _LEAST and rows.any():
            free = passed.sum() >= _LEAST and stopped.sum() == 0
            found.deviates(
                f"clip on the wrong side for {words}",
                f"tokens with {words} are stopped where the ratio has moved against their push "
                f"(ratio {exponential(x[early]).min():.3g} to {exponential(x[early]).max():.3g})"
                + (", and pass where it has moved with it" if free else ""),
                tokens=f"{int(early.sum())} tokens with {words}",
                cause="max in the place of min, or a clamp without the min",
                look=look(seen.source, "ratio"),
            )
        elif declared is not None and declared.bounds != (0.0, math.inf):
            _check_bound(seen, declared, s, passed, stopped, found)
    found.facts[name] = "; ".join(told) or "stops no token"


def _check_bound(
    seen: Evidence, declared: Known, sign: int, passed: Array, stopped: Array, found: Findings
) -> None:
    """Whether tokens pass beyond the declared bound, or are stopped before it."""
    if not any(core.kind == "plain" and core.level == "token" for core in declared.cores):
        return
    bound = declared.bounds[1] if sign > 0 else declared.bounds[0]
    if not math.isfinite(bound) or bound <= 0:
        return
    x, slack = seen.log_ratio * sign, 4 * seen.ratio_error + 1e-3
    over = passed & (x > math.log(bound) * sign + slack)
    under = stopped & (x < math.log(bound) * sign - slack)
    words = "A > 0" if sign > 0 else "A < 0"
    if over.sum() >= _LEAST:
        found.deviates(
            "clip does not act",
            f"tokens with {words} keep their gradient beyond the clip bound {bound:g} (ratio up to "
            f"{exponential(seen.log_ratio[over] * sign).max() ** sign:.3g})",
            tokens=f"{int(over.sum())} tokens",
            cause="the clip is missing, has other bounds, or holds another ratio",
            look=look(seen.source, "ratio"),
        )
    elif under.sum() >= _LEAST:
        found.deviates(
            "clip acts too early",
            f"tokens with {words} lose their gradient before the clip bound {bound:g}",
            tokens=f"{int(under.sum())} tokens",
            cause="other clip bounds than declared",
            look=look(seen.source, "ratio"),
        )


def check_precision(seen: Evidence, found: Findings) -> None:
    """Gradients that underflow half precision: what is left lies on the grid of its last bits."""
    usable = np.isfinite(seen["coef"]) & (seen["advantage"] != 0)
    coef = np.abs(seen["coef"][usable])
    some = coef[coef > 0]
    if len(some) < 20 or some.max() >= 2.0**-14:
        return
    steps = some / _GRID
    if np.abs(steps - np.round(steps)).max() > 1e-3 or steps.max() > 512:
        return
    lost = float((coef == 0).mean())
    found.deviates(
        "gradients underflow",
        f"coefficients are whole multiples of {_GRID:.2g}, the smallest fp16 number, at most "
        f"{steps.max():.0f} of them; {lost:.0%} of tokens with an advantage get exactly 0",
        tokens=f"{len(coef)} tokens with an advantage",
        cause="fp16 gradients without a loss scale",
        look=look(seen.source, "precision"),
    )
