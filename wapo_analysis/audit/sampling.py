"""Whether tokens come from the policy that trains, and whether that policy moves.

Shapes: N token rows.
"""

import math

import numpy as np

from wapo_analysis.audit.declared import look
from wapo_analysis.audit.evidence import NO_SAMPLES, OWN_SOURCES, Evidence, Findings, by_unit
from wapo_analysis.table import Array

#: Chance below which an event is not put down to chance.
CERTAIN = 1e-7
#: The same for the better and the worse half of the rollouts each.
_HALF = 1e-3
#: Difference of mean probability that is worth a word.
_LEAST_SHIFT = 0.015
#: Mean |ln ratio| in nats beyond which a first pass is off; engines and bf16 give less.
_OFF = 0.05
_NOISE = 2e-3


def check_first_pass(seen: Evidence, found: Findings) -> None:
    """Whether the ratio is 1 before the first update, and if not, what it looks like."""
    name = "first pass"
    if not np.isfinite(seen.log_ratio).any():
        found.missing[name] = "no old log-probabilities were recorded"
        return
    rows = seen.first_passes() & np.isfinite(seen.log_ratio)
    if rows.sum() < 20:
        found.missing[name] = "no first pass over fresh rollouts is among the audited steps"
        return
    first = seen.where(rows)
    x, size = first.log_ratio, np.abs(first.log_ratio)
    off = float(size.mean())
    if (size <= 4 * first.ratio_error + 1e-4).mean() > 1 - 2e-3:
        found.facts[name] = "ratio 1 on every token before the first update"
        return
    shown = f"{int((size > 4 * first.ratio_error + 1e-4).sum())} of {len(size)} tokens of it"
    found.facts[name] = f"ratio not 1: mean |ln ratio| {off:.2g} nats"
    if off < _NOISE or any(d.name == "tokens after the end" for d in found.deviations):
        return
    dropout = declared_number(seen, "dropout")
    if dropout:
        found.facts[name] += f", as dropout {dropout:g} may make it"
        return
    quiet = _quiet_start(first)
    if quiet is not None:
        found.deviates(
            "stale sampler",
            f"the first pass has ratio 1 at step {quiet}, but not later (mean |ln ratio| "
            f"{off:.2g} nats): old log-probabilities are not those of the weights that train",
            tokens=shown,
            cause="the sampler gets new weights too late, old log-probabilities are kept from the "
            "step before, or dropout in an adapter that began at 0",
            look=look(seen.source, "old"),
        )
        return
    slope, share = _slope(first)
    # An update can sharpen the whole policy, too; but nothing is older than the first step.
    enough = 0.8 if seen["step"].min() == 1 else 0.97
    if share > enough and abs(slope) > 0.03 and len(size) >= 100:
        sharper = "lower" if slope < 0 else "higher"
        found.deviates(
            "old log-probabilities at another temperature",
            f"the first pass has ratios other than 1 (mean |ln ratio| {off:.2g} nats), and they "
            f"follow logp + entropy (slope {slope:.2g}): old log-probabilities are those of a "
            f"{sharper} temperature",
            tokens=shown,
            cause="one of sampling and training divides the logits by the temperature, the other "
            "does not",
            look=look(seen.source, "temperature"),
        )
        return
    if (x <= 4 * first.ratio_error).mean() > 0.999 and off > _OFF / 10:
        found.deviates(
            "old log-probabilities of a cut distribution",
            f"the first pass has ratios below 1 only (mean ln ratio {x.mean():.2g} nats): old "
            "log-probabilities are those of a distribution renormalised over fewer tokens",
            tokens=shown,
            cause="top-p or top-k in sampling, with log-probabilities taken after the cut",
            look=look(seen.source, "temperature"),
        )
        return
    if off > _OFF:
        found.deviates(
            "first pass is off",
            f"the first pass has ratios other than 1: mean |ln ratio| {off:.2g} nats, both ways",
            tokens=shown,
            cause="dropout in one of the two scorings, old log-probabilities of other tokens, "
            "weights that are not those of the sampler, or another engine",
            look=look(seen.source, "old"),
        )


def declared_number(seen: Evidence, *names: str) -> float | None:
    """The first of some settings that the run states, in its objective or its configuration."""
    config, objective = seen.manifest.get("config") or {}, seen.manifest.get("objective") or {}
    for name in names:
        value = objective.get(name, config.get(name))
        if isinstance(value, int | float):
            return float(value)
    return None


def _slope(first: Evidence) -> tuple[float, float]:
    """Slope of ln ratio over logp + entropy, and the share of its square that this explains."""
    x, away = first.log_ratio, first["logp"] + first["entropy"]
    known = np.isfinite(x) & np.isfinite(away)
    x, away = x[known], away[known]
    if len(x) < 50 or not away.any() or not x.any():
        return 0.0, 0.0
    slope = float((x * away).sum() / (away**2).sum())
    left = float(((x - slope * away) ** 2).sum() / (x**2).sum())
    return slope, 1 - left


def _quiet_start(first: Evidence) -> int | None:
    """First audited step, if its first pass has ratio 1 and that of every later one has not."""
    steps, index = np.unique(first["step"], return_inverse=True)
    off = by_unit(np.abs(first.log_ratio), index, len(steps))
    if len(steps) < 2 or off[0] > 1e-4:
        return None
    return int(steps[0]) if (off[1:] > max(20 * off[0], _NOISE)).all() else None


def check_sampling(seen: Evidence, found: Findings) -> None:
    """Whether tokens are as probable as tokens sampled from the policy must be.

    A token sampled from p has probability sum p^2 = S on average, with variance
    sum p^3 - S^2 <= S^1.5 - S^2, for max p <= sqrt(S). Freedman's inequality (1975) bounds the
    chance that the sum over tokens strays by a: exp(-a^2 / (2 (V + a / 3))) for variances V in all.
    """
    name = "sampling"
    collision = seen.derived["collision"]
    if not np.isfinite(collision).any():
        found.missing[name] = "sum p^2 was not recorded"
        return
    rows = seen.first_passes() & np.isfinite(collision) & np.isfinite(seen["logp"])
    x = seen.log_ratio
    rows &= ~np.isfinite(x) | (np.abs(x) < 1e-3)
    if rows.sum() < 100:
        found.missing[name] = "fewer than 100 tokens were scored by the policy that sampled them"
        return
    prob = np.exp(seen["logp"][rows])
    expected = np.clip(collision[rows], 0, 1)
    shift, chance = _chance(prob, expected)
    told = f"mean p {prob.mean():.3f}, of samples {expected.mean():.3f}"
    if chance > CERTAIN or abs(shift) < _LEAST_SHIFT:
        found.facts[name] = f"tokens are as probable as samples of the policy ({told})"
        return
    found.facts[name] = f"tokens are not as probable as samples of the policy ({told})"
    known = _declared_cut(seen) if shift > 0 else _declared_noise(seen)
    if known:
        found.facts[name] += f", as {known} makes them"
        return
    if seen.source not in OWN_SOURCES and not _whatever_the_reward(seen, rows, shift):
        found.facts[name] += "; rollouts that were picked by their reward may be so"
        return
    if shift > 0:
        says, cause = (
            "more",
            (
                "a sampling temperature below that of the scoring, top-p, top-k, greedy sampling, "
                "or rollouts that were picked"
            ),
        )
    elif prob.mean() < 0.5 * expected.mean():
        says, cause = (
            "far less",
            (
                "log-probabilities of other tokens (shifted by one), tokens that were not sampled "
                "(prompt, padding, after the end), or another model that sampled"
            ),
        )
    else:
        says, cause = (
            "less",
            (
                "a sampling temperature above that of the scoring, noise in the scoring (dropout), "
                "or weights that are not those of the sampler"
            ),
        )
    found.deviates(
        NO_SAMPLES,
        f"tokens are {says} probable than samples of the policy would be: {told}",
        tokens=f"{int(rows.sum())} tokens of first passes; chance of it {max(chance, 1e-300):.0e}",
        cause=cause,
        look=look(seen.source, "temperature"),
    )


def _chance(prob: Array, expected: Array) -> tuple[float, float]:
    """Mean of p - S, and a bound on the chance of such a mean."""
    away = float((prob - expected).sum())
    variance = float((expected**1.5 - expected**2).sum())
    spread = 2 * (variance + abs(away) / 3)
    return (away / len(prob), 2 * math.exp(-(away**2) / spread)) if spread else (0.0, 2.0)


def _whatever_the_reward(seen: Evidence, rows: Array, shift: float) -> bool:
    """Whether better and worse rollouts of the groups alike are as improbable as samples.

    Rollouts picked by their reward are no samples, but samples given the reward; over all
    rewards they would balance. A sampler of its own shifts all of them one way.
    """
    prob = np.exp(seen["logp"][rows])
    expected = np.clip(seen.derived["collision"][rows], 0, 1)
    advantage = seen["advantage"][rows]
    halves = [_chance(prob[side], expected[side]) for side in (advantage > 0, advantage < 0)]
    return all(np.sign(part) == np.sign(shift) and chance < _HALF for part, chance in halves)


def _declared_noise(seen: Evidence) -> str | None:
    dropout = declared_number(seen, "dropout")
    return f"dropout {dropout:g}" if dropout else None


def _declared_cut(seen: Evidence) -> str | None:
    """Setting that makes samples more probable than the scored policy's, if one is declared."""
    config = seen.manifest.get("config") or {}
    for name, off in (("top_p", 1), ("top_k", 0), ("min_p", 0)):
        value = config.get(name)
        if isinstance(value, int | float) and value not in (off, -1, None):
            return f"{name} {value:g}"
    return None


def check_weights_move(seen: Evidence, found: Findings) -> None:
    """Whether updates change the policy at all, and old log-probabilities stay when it does."""
    name = "weights"
    with np.errstate(invalid="ignore"):
        pushed = bool((np.abs(seen["coef"]) > 0).any())
    moved = _second_visits(seen)
    if moved is not None:
        logp, earlier, x, earlier_x, error = moved
        still = np.abs(logp - earlier) <= error
        if (~still).mean() > 0.05:
            found.facts[name] = "log-probabilities change between passes over the same rollouts"
            kept = np.isfinite(x) & (np.abs(x) <= error) & (np.abs(earlier_x) <= error)
            if kept[~still].mean() > 0.999:
                found.deviates(
                    "ratio never leaves 1",
                    "log-probabilities change between passes over the same rollouts, but the ratio "
                    "is 1 in every pass",
                    tokens=f"{int((~still).sum())} tokens that moved",
                    cause="old log-probabilities are taken anew in every pass: the clip never acts",
                    look=look(seen.source, "old"),
                )
            return
        if still.all() and len(still) >= 50 and pushed:
            _still(seen, found, len(still), "between passes over the same rollouts")
            return
    after = seen["logp_after"]
    known = np.isfinite(after)
    if known.sum() >= 50:
        if (np.abs(after - seen["logp"]) > seen.ratio_error).any():
            found.facts[name] = "log-probabilities change with the update"
        elif pushed:
            _still(seen, found, int(known.sum()), "with the update")
        return
    same, places = _recurring(seen)
    if same >= 20 and places >= 5 and pushed:
        _still(seen, found, same, "from step to step")
        return
    found.missing[name] = "no token was scored twice (rescore_every, or several passes, show it)"


def _second_visits(seen: Evidence) -> tuple[Array, Array, Array, Array, Array] | None:
    """Rows of the first and the last pass of the rollouts that have several."""
    order = np.lexsort((seen["minibatch"], seen["position"], seen.members))
    member, place = seen.members[order], seen["position"][order]
    same = (member[1:] == member[:-1]) & (place[1:] == place[:-1])
    if same.sum() < 20:
        return None
    later, earlier = order[1:][same], order[:-1][same]
    logp, x = seen["logp"], seen.log_ratio
    error = 2 * (seen.ratio_error[later] + seen.ratio_error[earlier])
    known = np.isfinite(logp[later]) & np.isfinite(logp[earlier])
    if not known.any():
        return None
    parts = (logp[later], logp[earlier], x[later], x[earlier], error)
    a, b, c, d, e = (part[known] for part in parts)
    return a, b, c, d, e


def _recurring(seen: Evidence) -> tuple[int, int]:
    """First tokens with exactly the logp and entropy that one of another step has.

    Where weights move, a prompt that comes again gives other numbers.
    """
    first = (seen["position"] == 0) & np.isfinite(seen["logp"]) & np.isfinite(seen["entropy"])
    first &= seen["entropy"] > 1e-3
    if len(np.unique(seen["step"][first])) < 3:
        return 0, 0
    keys = np.stack([seen["token_id"][first], seen["logp"][first], seen["entropy"][first]])
    steps = seen["step"][first]
    alike, index = np.unique(keys, axis=1, return_inverse=True)
    index, count = index.reshape(-1), alike.shape[1]
    low, high = np.full(count, steps.max()), np.full(count, steps.min())
    np.minimum.at(low, index, steps)
    np.maximum.at(high, index, steps)
    again = high - low >= 2
    return int(again[index].sum()), int(again.sum())


def _still(seen: Evidence, found: Findings, tokens: int, when: str) -> None:
    found.facts["weights"] = f"log-probabilities do not change {when}"
    rate = seen.steps["lr"].to_numpy(float) if "lr" in seen.steps else np.array([np.nan])
    zero = bool(len(rate)) and bool((rate == 0).all())
    config = seen.manifest.get("config") or {}
    warm = float(config.get("warmup_steps") or 0) > 0 or float(config.get("warmup_ratio") or 0) > 0
    if zero and warm:
        found.facts["weights"] += ", for warm-up starts at learning rate 0"
        return
    found.deviates(
        "weights do not change",
        f"log-probabilities of the same tokens do not change {when}"
        + (": the learning rate is 0" if zero else ""),
        tokens=f"{tokens} tokens, equal to {seen.rounding:.0e} of their size",
        cause="learning rate 0 or far too small (bfloat16 weights swallow small updates), frozen "
        "weights, an optimizer of other parameters, or zero_grad between backward and step",
        look=look(seen.source, "update"),
    )


def check_tail(seen: Evidence, found: Findings) -> None:
    """Tokens after the end: runs of one token at the end that the policy did not sample."""
    rows = np.lexsort((seen["position"], seen.units))
    unit, token = seen.units[rows], np.asarray(seen["token_id"])[rows]
    if not len(rows) or (token < 0).all():
        found.missing["tokens after the end"] = "token ids were not recorded"
        return
    last = np.append(np.flatnonzero(np.diff(unit)), len(unit) - 1)
    change = np.append(True, (np.diff(unit) != 0) | (np.diff(token) != 0))
    run_start = np.maximum.accumulate(np.where(change, np.arange(len(unit)), 0))[last]
    pads, counts = np.unique(token[last], return_counts=True)
    pad = pads[counts.argmax()]
    long = (token[last] == pad) & (last - run_start >= 1)
    sizes = np.bincount(unit)
    tail = np.zeros(len(unit), bool)
    for start, end in zip(run_start[long], last[long], strict=True):
        tail[start + 1 : end + 1] = True
    chosen = rows[tail & seen.first_passes()[rows]]
    if len(chosen) < 20 or len(set(sizes)) > 1 or len(set((last - run_start)[long])) < 2:
        return
    surprise = -seen["logp"][chosen]
    # Sampling them all has the chance exp(logp); no more than that is said.
    if float(np.nansum(surprise)) < 100 or float(np.nanmean(surprise)) < 2:
        return
    found.deviates(
        "tokens after the end",
        f"every rollout is {sizes[0]} tokens long, and {int(long.sum())} end in a run of token "
        f"{pad} that the policy would hardly sample (mean p {np.exp(-surprise).mean():.2g})",
        tokens=f"{len(chosen)} tokens at the ends of rollouts",
        cause="the mask does not stop at the end token: padding is trained on",
        look=look(seen.source, "mask"),
    )
