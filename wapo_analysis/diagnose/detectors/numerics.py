"""Detectors of broken numbers: not finite, spikes, growth, vanishing; of the learning rate."""

import numpy as np
import pandas as pd

from wapo_analysis.diagnose.advice import LOWER_LR, TENFOLD, Advice
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors import MIN_STEPS, detector, lasting, level_finding
from wapo_analysis.diagnose.detectors.update import CLIPPED
from wapo_analysis.diagnose.result import Finding
from wapo_analysis.errors import counted
from wapo_analysis.results import spans, step_words
from wapo_analysis.series import Series, episodes, robust_sigma, silent_since
from wapo_analysis.store import Need
from wapo_analysis.table import Array

WATCHED = ("loss", "grad_norm", "reward", "entropy")
#: Broken steps up to the end that make a run diverged.
MIN_DIVERGED = 3
SPIKE_RATIO = 3.0
SPIKE_SIGMAS = 8.0
SEVERE_SPIKE = 10.0
SPIKE_WINDOW = 11
NAN_REFERENCE = "verl issue 721 and trl issue 6702 (one bad step, invisible in the log)"
#: Gradient norm relative to the baseline that counts as vanished.
VANISHED = 0.02
#: Gradient norm relative to the baseline that counts as grown out of bounds.
GROWN = 10.0
SCHEDULE_RECORDS = 20
#: Ratio of one record's learning rate to the last, and to the highest before, of a jump.
LR_JUMP, LR_ABOVE = 3.0, 1.5
#: Seconds a step relative to the baseline that are worth a word.
SLOWER = 2.0
#: Part of the highest learning rate that is nothing, and the part of the run it must cover.
LR_NOTHING, LR_OVER = 1e-3, 0.2
#: Learning rate that no published RLVR run uses, with or without LoRA, by a factor of three.
LR_HIGH = 1e-3
#: Learning rate that moves nothing in a thousand steps.
LR_LOW = 1e-8
#: Records that a learning rate of nothing must cover.
LR_RECORDS = 30
RATES = "arXiv:2402.03300 (GRPO: 1e-6); docs/training.md"
SPIKE_REFERENCE = "verl issue 1066 (gradient and entropy spike together)"


_RESTART = Advice(
    "Restart from a checkpoint before this step.",
    steps=(
        Advice("Lower {lr} tenfold, or {max_grad_norm}.", change={"lr": TENFOLD}),
        Advice("Rule out overflow ({float32}).", needs=("float32",)),
    ),
)


@detector(
    "nonfinite",
    Need("steps", "loss") | Need("steps", "grad_norm") | Need("steps", "reward")
    | Need("steps", "entropy"),
    min_steps=0,
)  # fmt: skip
def find_nonfinite(context: Context) -> list[Finding]:
    """Steps whose loss, gradient, reward or entropy is not finite, or which lost updates."""
    holes = {name: _holes(context.values(name)) & context.null(name) for name in WATCHED}
    skipped = np.nan_to_num(context.values("skipped_updates")) > 0
    dropped = np.nan_to_num(context.values("nonfinite")) > 0
    broken = np.logical_or.reduce([*holes.values(), skipped])
    sound = np.flatnonzero(~broken)
    first = int(sound[-1]) + 1 if len(sound) else 0
    earlier, parts = broken | dropped, {**holes, "skipped_updates": skipped}
    if len(broken) - first >= MIN_DIVERGED:
        findings = [_nonfinite_finding(context, parts, slice(first, None))]
        earlier[first:] = False
    else:
        findings = _given_up(context)
    parts["nonfinite"] = dropped
    if earlier.any():
        findings.append(_nonfinite_finding(context, parts, earlier))
    return findings


def _given_up(context: Context) -> list[Finding]:
    """The trainer closed the run because the policy could not be sampled from any more."""
    if context.run.manifest.status != "diverged":
        return []
    last = int(context.step_numbers[-1])
    return [
        Finding(
            name="diverged",
            severity="critical",
            step=last,
            message=f"After step {last} the policy gave logits that are NaN or infinite, and the "
            "run ended there.",
            evidence={"last_step": last, "grad_norm": context.series("grad_norm").end},
            advice=_RESTART,
            reference=NAN_REFERENCE,
        )
    ]


def _holes(values: Array) -> Array:
    """Steps at which a column that is otherwise there has no finite value.

    A source may log a column on every n-th step only; gaps up to the usual spacing are no holes.
    """
    finite = np.flatnonzero(np.isfinite(values))
    hole = np.zeros(len(values), bool)
    if not len(finite):
        return hole
    spacing = int(np.median(np.diff(finite))) if len(finite) > 1 else 1
    for start, stop in episodes(~np.isfinite(values), spacing):
        hole[start:stop] = True
    return hole


def _nonfinite_finding(context: Context, parts: dict[str, Array], where: slice | Array) -> Finding:
    rows = np.zeros(len(context.step_numbers), bool)
    rows[where] = True
    steps = context.step_numbers[rows]
    counts = {name: int((mask & rows).sum()) for name, mask in parts.items()}
    counts = {name: count for name, count in counts.items() if count}
    diverged = isinstance(where, slice)
    what = _what_broke(list(counts))
    return Finding(
        name="diverged" if diverged else "nonfinite_step",
        severity="critical" if diverged else "warning",
        step=int(steps[0]),
        message=(
            f"From step {steps[0]} to the end ({len(steps)} steps) {what}."
            if diverged
            else f"At {step_words(steps.tolist(), 5)} {what}."
        ),
        evidence={
            "steps": spans(steps.tolist(), 5),
            "broken_steps": len(steps),
            **counts,
            "tokens_not_finite": float(np.nansum(context.values("nonfinite")[rows])),
        },
        advice=_RESTART
        if diverged
        else Advice(
            "Look at the tokens of this step.",
            steps=(Advice("If it comes again: lower {lr} or {max_grad_norm}."),),
        ),
        reference=NAN_REFERENCE,
    )


def _what_broke(names: list[str]) -> str:
    """Clause such as 'loss and grad_norm were not finite, updates were skipped'."""
    columns = " and ".join(name for name in names if name in WATCHED)
    clauses = [
        f"{columns} {'were' if ' and ' in columns else 'was'} not finite" if columns else "",
        "updates were skipped" if "skipped_updates" in names else "",
        "some tokens had a logp or entropy that was not finite" if "nonfinite" in names else "",
    ]
    return ", ".join(clause for clause in clauses if clause)


@detector("gradient_spikes", Need("steps", "grad_norm"))
def find_gradient_spikes(context: Context) -> list[Finding]:
    """Gradient norms far above their neighbours and the baseline; a smooth rise is no spike.

    A spike is three times the median of its neighbourhood, or the baseline if that is more, and
    eight robust standard deviations of the logarithm above it: a gradient that has become small and
    comes back to its old size for a step, as where all but a few groups are solved, is none.
    """
    series = context.series("grad_norm")
    steps, values = series.steps[series.values > 0], series.values[series.values > 0]
    if len(values) < SPIKE_WINDOW:
        return []
    logs = np.log(values)
    near = pd.Series(logs).rolling(SPIKE_WINDOW, center=True, min_periods=1).median().to_numpy()
    threshold = max(np.log(SPIKE_RATIO), SPIKE_SIGMAS * robust_sigma(logs - near))
    excess = logs - np.maximum(near, np.log(series.level)) if series.level > 0 else logs - near
    spikes = np.flatnonzero(excess > threshold)
    if not len(spikes):
        return []
    top = spikes[np.argmax(excess[spikes])]
    ratio = float(np.exp(excess[top]))
    severe = ratio >= SEVERE_SPIKE or len(spikes) >= MIN_DIVERGED
    source = _heaviest_class(context, int(steps[top]))
    owner = f"; {source['heaviest_class']} tokens carry most of it" if source else ""
    return [
        Finding(
            name="gradient_spikes",
            severity="warning" if severe else "info",
            step=int(steps[spikes[0]]),
            message=(
                f"{counted(len(spikes), 'gradient spike')}, the largest "
                f"{ratio:.1f} times its neighbours or the baseline at step {steps[top]}{owner}."
            ),
            evidence={
                "spikes": len(spikes),
                "largest_step": int(steps[top]),
                "largest": float(values[top]),
                "ratio": ratio,
                **source,
            },
            advice=Advice(
                "Look at the tokens and rollouts of that step.",
                steps=(Advice("Lower {max_grad_norm} or {lr}."),),
            ),
            reference=SPIKE_REFERENCE,
        )
    ]


@detector("gradient_level", Need("steps", "grad_norm"))
def find_gradient_level(context: Context) -> list[Finding]:
    """The gradient all but vanishes, or grows tenfold, against the run's own baseline."""
    series = context.series("grad_norm")
    if series.level <= 0:
        return []
    none_left = lasting(series, series.smooth <= VANISHED * series.level)
    if none_left is not None and (series.values[:none_left] == 0).any():
        none_left = silent_since(series.values <= VANISHED * series.level)  # zeros come and go
    grown = lasting(series, series.smooth >= GROWN * series.level)
    reward = context.reward
    solved = reward is not None and reward.solved
    begin = none_left if none_left is not None else grown
    source = _heaviest_class(context, series.step(begin)) if begin is not None else {}
    return level_finding(
        series,
        begin,
        name="gradient_vanishes" if none_left is not None else "gradient_grows",
        severity="info" if solved and none_left is not None else "warning",
        what="The gradient all but vanishes"
        if none_left is not None
        else "The gradient is ten times what it was, without a spike,",
        advice=Advice("Nothing is left to learn from these problems.")
        if none_left is not None and solved
        else Advice("Look for groups without signal, or coefficients clipped or masked away.")
        if none_left is not None
        else Advice("Look at the tokens that carry it.", steps=(LOWER_LR,)),
        reference=SPIKE_REFERENCE,
        share=False,
        evidence=source,
    )


def _heaviest_class(context: Context, step: int) -> dict[str, float | int | str | None]:
    """Class with the largest gradient mass at a step and its share; empty if unknown."""
    mass = context.gradient_mass
    if step not in mass.index or mass.loc[step].max() <= 0:
        return {}
    row = mass.loc[step].to_numpy()
    return {
        "heaviest_class": mass.columns[int(row.argmax())],
        "share": float(row.max() / row.sum()),
    }


@detector("lr_schedule", Need("steps", "lr"), min_steps=SCHEDULE_RECORDS)
def find_schedule(context: Context) -> list[Finding]:
    """The learning rate jumps above what it was, or is zero for the last fifth of the run."""
    series = context.series("lr")
    values, top = series.values, float(series.values.max())
    late = max(3, len(series) // 10)
    last, high = values[:-1], np.maximum.accumulate(values)[:-1]
    jumps = (last > 0) & (values[1:] >= LR_JUMP * last) & (values[1:] > LR_ABOVE * high)
    jumps[: late - 1] = False  # a warm-up begins steeply
    if jumps.any():
        place = int(jumps.argmax()) + 1
        return [_schedule(series, place, f"jumped from {values[place - 1]:.2g} to "
                          f"{values[place]:.2g} at step {series.step(place)}")]  # fmt: skip
    gone = lasting(series, values <= LR_NOTHING * top)
    if gone is not None and gone > 0 and len(series) - gone >= LR_OVER * len(series):
        return [_schedule(series, gone, f"has been next to zero since step {series.step(gone)}, "
                          "so nothing is learned since")]  # fmt: skip
    return []


def _schedule(series: Series, place: int, what: str) -> Finding:
    return Finding(
        name="lr_schedule",
        severity="warning",
        step=series.step(place),
        message=f"The learning rate {what}.",
        evidence={"lr_before": float(series.values[place - 1]), "lr": float(series.values[place])},
        advice=Advice(
            "Check the schedule: the number of steps it was given, and what a restart does to it."
        ),
        reference=RATES,
    )


@detector("lr_far_off", Need("steps", "lr"))
def find_lr(context: Context) -> list[Finding]:
    """The learning rate is so high or so low that the rest of the settings hardly matters."""
    series = context.series("lr")
    high = series.values >= LR_HIGH
    if high.any() and _moves_fast(context):
        return [_lr_finding(series, high, "high")]
    reward = context.reward
    stuck = reward is not None and not (reward.improved or reward.solved or reward.lost)
    low = series.values <= LR_LOW
    if stuck and low.all() and len(series) >= LR_RECORDS:
        return [_lr_finding(series, low, "low")]
    return []


def _lr_finding(series: Series, where: Array, side: str) -> Finding:
    top, step = float(series.values.max()), series.step(int(np.argmax(where)))
    return Finding(
        name="lr_far_off",
        severity="warning",
        step=step,
        message=f"The learning rate reaches {top:.2g}, and the policy moves too fast for the clip "
        "or its entropy to hold."
        if side == "high"
        else f"The learning rate is at most {top:.2g}, and nothing moves.",
        evidence={"lr": top, "side": side},
        advice=Advice(
            "1e-6 is usual for all weights of a large model, 1e-5 to 1e-4 for LoRA or a small one.",
            steps=(
                Advice("Lower {lr} tenfold.", change={"lr": TENFOLD})
                if side == "high"
                else Advice("Raise {lr}."),
            ),
        ),
        reference=RATES,
    )


def _moves_fast(context: Context) -> bool:
    """The policy leaves its batch or its entropy: many tokens clipped, a large k3, a big change."""
    clipped = max((context.series(f"clip_{side}").smooth.max() for side in ("low", "high")
                   if len(context.series(f"clip_{side}"))), default=0.0)  # fmt: skip
    k3, entropy = context.series("kl_old"), context.series("entropy")
    far = len(k3) and k3.smooth.max() >= 0.1
    level = entropy.level
    moved = level > 0 and (entropy.smooth.max() >= 2 * level or entropy.smooth.min() <= 0.2 * level)
    lost = context.reward is not None and context.reward.lost
    return bool(clipped >= CLIPPED or far or lost or moved)


@detector("steps_slow_down", Need("steps", "seconds"))
def find_slow_steps(context: Context) -> list[Finding]:
    """Steps take twice as long as at first, to the end; longer completions may be why."""
    series, length = context.series("seconds"), context.series("length")
    if series.few == 1:  # a first step warms up, or is cut short; it is no baseline
        series = Series(series.steps[1:], series.values[1:])
    if len(series) < MIN_STEPS or series.level <= 0:
        return []
    ratio = series.end / series.level
    why = ""
    if len(length) and length.level > 0 and length.end > 1.2 * length.level:
        why = f"; completions are {length.end / length.level:.1f} times as long"
    return level_finding(
        series,
        lasting(
            series, series.smooth >= max(SLOWER * series.level, series.level + 6 * series.gap_noise)
        ),
        name="steps_slow_down",
        severity="info",
        what=f"A step takes {ratio:.1f} times as long as at first{why} (seconds)",
        advice=Advice("Compare sampling and updates: which of the two has slowed down?"),
        reference="docs/performance.md",
        share=False,
    )
