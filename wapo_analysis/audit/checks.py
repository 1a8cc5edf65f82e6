"""Which tokens carry gradient, and where the clip bites.

Shapes: N token rows.
"""

import math

import numpy as np

from wapo_analysis.audit.coefficient import Coefficient, Core
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
    here = bool((seen["coef"][own] != 0).any())
    there = float((seen["coef"][other] != 0).mean()) if other.any() else 0.0
    found.facts[name] = f"token {end} ends {(tokens == end).mean():.0%} of the rollouts"
    if not here and there > (0.9 if own.sum() >= 8 else 0.99) and own.sum() >= 3:
        found.deviates(
            "end token left out",
            f"the token that ends rollouts ({end}) never carries gradient, {there:.0%} of the "
            "others do",
            tokens=f"{int(own.sum())} last tokens",
            cause="the mask stops before the end token, so the policy never learns to stop",
            look=look(seen.source, "mask"),
        )
    elif own.any():
        found.facts[name] += " and carries gradient" if here else " and carries none"


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
    sizes = np.bincount(unit)
    up = np.bincount(unit, np.sign(seen["coef"][rows])) / sizes
    wanted = np.bincount(unit, np.sign(seen["advantage"][rows])) / sizes
    whole = (np.abs(up) == 1) & (sizes >= 3)
    wrong_up, wrong_down = whole & (up > wanted), whole & (up < wanted)
    right = whole & (up == wanted)
    if whole.sum() < 0.95 * (sizes >= 3).sum():
        return
    if min(wrong_up.sum(), wrong_down.sum()) < 3 or right.sum() < 3:
        return
    found.deviates(
        "advantages of other rollouts in the loss",
        f"{int(wrong_up.sum())} rollouts with A < 0 are pushed up and {int(wrong_down.sum())} with "
        f"A > 0 down, every token of them; {int(right.sum())} are pushed as they should be",
        tokens=f"{int(sizes[wrong_up | wrong_down].sum())} tokens",
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
    x, positive = seen.log_ratio, seen["advantage"] > 0
    usable = np.isfinite(seen["coef"]) & (np.abs(seen["advantage"]) > 0)
    zero = seen["coef"] == 0
    alive = np.bincount(seen.units[usable & ~zero], minlength=len(seen)) > 0
    usable &= alive[seen.units]  # a mask may drop whole rollouts
    inside = usable & (np.abs(x) < 0.02)
    whole = inside.sum() < 20 or (zero & inside).sum() <= 0.002 * inside.sum()
    sides = {True: usable & positive, False: usable & ~positive}
    if not whole:
        # Gates drop a sign as a whole; then the other one still tells.
        sides = {up: rows for up, rows in sides.items() if not (zero & rows & inside).any()}
    toward = np.where(positive, x, -x)
    told = []
    for up, rows in sides.items():
        with_it = rows & (toward > 4 * seen.ratio_error)
        stopped, passed = with_it & zero, with_it & ~zero
        words = "A > 0" if up else "A < 0"
        if stopped.sum() >= _LEAST:
            edge = exponential(toward[stopped].min() * (1 if up else -1))
            told.append(f"stops {words} {'above' if up else 'below'} {edge:.3g}")
        # Far out, ratios are held or vanish; a dual clip stops A < 0 far above.
        reach = 10 if up else math.log(1.9)
        early = rows & zero & (toward < -4 * seen.ratio_error) & (np.abs(x) < reach)
        if early.sum() >= _LEAST:
            free = passed.sum() >= _LEAST and not stopped.any()
            found.deviates(
                f"clip on the wrong side for {words}",
                f"tokens with {words} are stopped where the ratio has moved against their push "
                f"(ratio {exponential(x[early]).min():.3g} to {exponential(x[early]).max():.3g})"
                + (", and pass where it has moved with it" if free else ""),
                tokens=f"{int(early.sum())} tokens with {words}",
                cause="max in the place of min, or a clamp without the min",
                look=look(seen.source, "ratio"),
            )
        elif declared is not None:
            _check_bound(seen, declared, words, declared.bounds[up], passed, stopped, found)
    found.facts[name] = "; ".join(told) or "stops no token"


def _check_bound(
    seen: Evidence, declared: Known, words: str, bound: float, passed: Array, stopped: Array,
    found: Findings,
) -> None:  # fmt: skip
    """Whether tokens pass beyond the declared bound, or are stopped before it."""
    if Core("plain") not in declared.cores or not 0 < bound < math.inf:
        return
    away, slack = np.abs(seen.log_ratio), 4 * seen.ratio_error + 1e-3
    over = passed & (away > abs(math.log(bound)) + slack)
    under = stopped & (away < abs(math.log(bound)) - slack)
    if over.sum() >= _LEAST:
        found.deviates(
            "clip does not act",
            f"tokens with {words} keep their gradient beyond the clip bound {bound:g} (ratio up to "
            f"{exponential(seen.log_ratio[over][away[over].argmax()]):.3g})",
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
    if len(some) < 20:
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
