"""Step logs made by formula: kinds of courses that training cannot make cheaply, or at will.

Nothing here was trained. A log is drawn from a kind and a seed: how many records, how far apart,
how noisy, on which scale of entropy, and which columns the source did not log. The curves are the
shapes that bug reports and papers show; the noise is that of a batch of rollouts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.suite.draws import Draw, Values, flat_share, rise, sound
from wapo_analysis.diagnose import Diagnosis
from wapo_analysis.store import RunWriter


def healthy(d: Draw) -> None:
    """Learns to the end, or solves the task."""
    rate = sound(d)
    if d.rng.random() < 0.5:
        d.columns["eval_reward"] = d.evaluations(rate - d.uniform(0, 0.05))


def never_learned(d: Draw) -> None:
    """No completion ever earns anything; the gradient is zero."""
    sound(d)
    zero = np.zeros(d.records)
    d.columns |= {"reward": zero, "grad_norm": zero, "groups_flat": zero + 1, "kl_ref": zero}
    d.columns["entropy"] = d.about(np.full(d.records, d.between(0.1, 1.5)), 0.03)


def early_death(d: Draw) -> None:
    """A reward that dies after a few records, to exactly nothing."""
    sound(d)
    alive = int(d.rng.integers(3, 9))
    reward = d.share(np.full(d.records, d.uniform(0.1, 0.6)))
    reward[:alive] = np.maximum(reward[:alive], 1 / d.batch)
    reward[alive:] = 0
    d.columns["reward"] = reward
    d.columns["groups_flat"] = np.where(np.arange(d.records) < alive, 0.2, 1.0)
    del d.columns["grad_norm"]


def scattered_zeros(d: Draw) -> None:
    """One prompt a step: no gradient wherever its group is flat; it learns all the same."""
    sound(d)
    rate = rise(d.u, 0.35, 0.6, 0.5, 5)
    hard = np.clip(rate + d.rng.normal(0, 0.35, d.records), 0, 1)
    reward = d.rng.binomial(d.group, hard) / d.group
    flat = (reward == 0) | (reward == 1)
    d.columns |= {"reward": reward, "groups_flat": flat.astype(float)}
    d.columns["grad_norm"] = np.where(flat, 0.0, d.columns["grad_norm"])
    for name in ("kl_ref", "truncated"):
        del d.columns[name]


def climb_and_fall(d: Draw) -> None:
    """The reward climbs and loses most of the climb again."""
    sound(d)
    start, top, turn = d.uniform(0.2, 0.5), d.uniform(0.75, 0.9), d.uniform(0.35, 0.65)
    end = start + d.uniform(0.2, 0.5) * (top - start)
    rate = np.interp(d.u, [0, turn, min(turn + 0.3, 0.95), 1], [start, top, end, end])
    d.columns |= {"reward": d.share(rate), "groups_flat": d.share(flat_share(rate, d.group))}


def held_out_falls(d: Draw) -> None:
    """The training reward rises, the held-out score rises with it at first and then falls."""
    rate = sound(d, d.uniform(0.7, 0.95))
    turn, start = d.uniform(0.2, 0.5), d.uniform(0.2, 0.4)
    top = start + d.uniform(0.0, 0.2)
    score = np.interp(d.u, [0, turn, 1], [start, top, top * d.uniform(0.2, 0.6)])
    d.columns |= {"reward": d.share(rate), "eval_reward": d.evaluations(score)}


def held_out_stands(d: Draw) -> None:
    """Answers grow and the training reward with them; the held-out score shows nothing of it."""
    sound(d, d.uniform(0.75, 0.95))
    start = d.uniform(0.2, 0.4)
    d.columns["eval_reward"] = d.evaluations(np.full(d.records, start))
    d.columns["length"] = d.columns["length"] * (1 + d.uniform(1, 2.5) * d.u**1.3)


def kl_blow_up(d: Draw) -> None:
    """The policy runs away from the reference; the reward has stopped."""
    sound(d)
    rate = rise(d.u, 0.2, d.uniform(0.4, 0.55), 0.2, 14)
    far = d.between(1.5, 8)
    d.columns |= {"reward": d.share(rate), "kl_ref": d.about(0.01 + far * d.u**2.5, 0.08)}
    d.columns["groups_flat"] = d.share(flat_share(rate, d.group))


def entropy_collapse(d: Draw) -> None:
    """The entropy dies; the reward stopped early, far from solved."""
    sound(d)
    rate = rise(d.u, 0.2, d.uniform(0.35, 0.6), 0.2, 16)
    start, left = d.between(0.1, 1.5), d.between(0.005, 0.04)
    d.columns |= {
        "reward": d.share(rate),
        "groups_flat": d.share(flat_share(rate, d.group)),
        "entropy": d.about(start * (left + (1 - left) * np.exp(-d.uniform(5, 9) * d.u)), 0.04),
    }


def entropy_explosion(d: Draw) -> None:
    """The entropy takes off and the reward goes with it."""
    sound(d)
    onset = d.uniform(0.3, 0.6)
    late = np.clip((d.u - onset) / 0.25, 0, 1)
    rate = 0.45 * (1 - late * d.uniform(0.7, 1))
    start = d.between(0.1, 1.0)
    d.columns["reward"] = d.share(rate)
    d.columns["entropy"] = d.about(start * (1 + d.uniform(1.8, 5) * late), 0.04)
    d.columns["groups_flat"] = d.share(flat_share(rate, d.group))


def too_hard(d: Draw) -> None:
    """Hardly any problem is ever solved; where nine groups in ten are flat, that is a stall."""
    sound(d)
    rate = np.full(d.records, d.uniform(0.01, 0.04))
    d.columns |= {"reward": d.share(rate), "groups_flat": d.share(flat_share(rate, 8))}


def too_easy(d: Draw) -> None:
    """Solved early; most groups have been all right ever since."""
    sound(d)
    rate = rise(d.u, 0.3, d.uniform(0.955, 0.99), 0.15, 20)
    d.columns |= {"reward": d.share(rate), "groups_flat": d.share(flat_share(rate, 8))}
    d.columns["entropy"] = d.about(d.between(0.1, 1.5) * (0.25 + 0.75 * np.exp(-4 * d.u)), 0.03)


def plateau(d: Draw) -> None:
    """Learns early, and has stood ever since."""
    sound(d)
    rate = rise(d.u, d.uniform(0.15, 0.25), d.uniform(0.5, 0.65), 0.12, 30)
    d.columns |= {"reward": d.share(rate), "groups_flat": d.share(flat_share(rate, d.group))}


def format_takes_over(d: Draw) -> None:
    """The form of the answer is most of the reward; the answer itself is hardly ever right."""
    sound(d)
    right = d.share(np.full(d.records, d.uniform(0.0, 0.06)))
    form = d.share(rise(d.u, 0.2, 0.97, d.uniform(0.1, 0.3), 20))
    weight = d.uniform(0.1, 1)
    d.columns |= {"reward": right + weight * form}
    d.columns |= {"rewards/accuracy_reward/mean": right, "rewards/format_reward/mean": form}
    del d.columns["groups_flat"]


def two_functions(d: Draw) -> None:
    """Accuracy and format, as they should be: both learned, the form first."""
    rate = sound(d)
    right, form = d.share(rate), d.share(rise(d.u, 0.4, 0.98, 0.1, 30))
    weight = d.uniform(0.1, 0.5)
    d.columns |= {"reward": right + weight * form}
    d.columns |= {"rewards/accuracy/mean": right, "rewards/format/mean": form}


def mismatch(d: Draw) -> None:
    """Sampler and trainer drift apart."""
    sound(d)
    measure, start, end = [
        ("engine_kl", 4e-4, 0.2), ("engine_logp_diff", 0.01, 0.25), ("engine_prob_diff", 3e-3, 0.1),
    ][d.rng.integers(3)]  # fmt: skip
    d.columns[measure] = d.about(start * (end / start) ** d.u, 0.1)


def stale(d: Draw) -> None:
    """Samples keep waiting longer for the trainer."""
    sound(d)
    d.columns["staleness"] = np.round(d.about(0.1 + d.uniform(6, 20) * d.u, 0.1), 2)


def truncation(d: Draw) -> None:
    """Ever more completions reach the limit."""
    sound(d)
    d.columns["truncated"] = d.share(0.01 + d.uniform(0.3, 0.9) * d.u**2)


def all_cut(d: Draw) -> None:
    """Every completion is cut at the limit, so none earns a reward."""
    never_learned(d)
    d.columns["truncated"] = np.ones(d.records)


def healthy_critic(d: Draw) -> None:
    """A sound run with a critic, advantages, diversity, and an entropy that finds its level."""
    rate = sound(d)
    d.columns |= {
        "value_loss": d.about(d.between(0.05, 0.5) * (0.3 + 0.7 * np.exp(-3 * d.u)), 0.1),
        "value_explained": 0.1 + 0.6 * d.u + d.rng.normal(0, 0.05, d.records),
        "advantage_std": d.about(np.ones(d.records), 0.05),
        "distinct": d.share(0.9 - d.uniform(0, 0.25) * d.u),
        "clip_any": d.share(np.full(d.records, d.uniform(0, 0.08))),
        "eval_reward/easy": d.evaluations(rate), "eval_reward/hard": d.evaluations(rate / 2),
        "lr": d.between(3e-7, 1e-5) * np.minimum(20 * d.u, 1) * np.clip(1.05 - d.u, 0, 1),
    }  # fmt: skip
    if d.rng.random() < 0.5:
        d.columns["entropy"] = d.about(0.05 + d.uniform(0.05, 0.12) * d.u, 0.04)


def critic_runs_away(d: Draw) -> None:
    """The critic's loss multiplies and its values explain nothing any more."""
    healthy_critic(d)
    late = np.clip((d.u - d.uniform(0.3, 0.6)) / 0.35, 0, 1)
    d.columns["value_loss"] = d.columns["value_loss"] * (1 + d.uniform(8, 30) * late)
    d.columns["value_explained"] = d.columns["value_explained"] * (1 - late) - 0.4 * late


def advantages_vanish(d: Draw) -> None:
    """The spread of the advantages goes, as by a normalisation gone wrong."""
    healthy_critic(d)
    late = np.clip((d.u - d.uniform(0.3, 0.6)) / 0.25, 0, 1)
    d.columns["advantage_std"] = d.about(1 - (1 - d.uniform(0.005, 0.05)) * late, 0.05)


def one_wording(d: Draw) -> None:
    """Completions of a batch become one."""
    healthy_critic(d)
    late = np.clip((d.u - d.uniform(0.2, 0.5)) / 0.3, 0, 1)
    d.columns["distinct"] = d.share(0.9 - d.uniform(0.6, 0.85) * late)


def clip_stops_all(d: Draw) -> None:
    """The clip stops more and more tokens, its sides untold."""
    healthy_critic(d)
    for name in ("clip_low", "clip_high"):
        del d.columns[name]
    d.columns["clip_any"] = d.share(0.05 + d.uniform(0.25, 0.5) * np.minimum(2 * d.u, 1))


def schedule_restarts(d: Draw) -> None:
    """The learning rate jumps in the middle of the run."""
    sound(d)
    at, factor = d.uniform(0.3, 0.8), d.uniform(4, 100)
    d.columns["lr"] = d.columns["lr"] * np.where(d.u < at, 1, factor)


def schedule_ends_early(d: Draw) -> None:
    """The learning rate is zero for much of the run."""
    sound(d)
    d.columns["lr"] = d.columns["lr"] * np.clip(1 - d.u / d.uniform(0.4, 0.7), 0, 1)


def form_alone(d: Draw) -> None:
    """Late in the run the form is perfected while the answers stand."""
    sound(d)
    right = d.share(rise(d.u, 0.2, d.uniform(0.4, 0.55), 0.15, 25))
    form = d.share(rise(d.u, d.uniform(0.1, 0.4), 0.98, d.uniform(0.6, 0.75), 20))
    d.columns |= {"reward": right + form}
    d.columns |= {"rewards/accuracy/mean": right, "rewards/format/mean": form}
    del d.columns["groups_flat"]


def one_set_falls(d: Draw) -> None:
    """Of two held-out sets one falls and one rises, so that their mean stands."""
    rate = sound(d)
    easy, hard = d.evaluations(0.3 + 0.4 * d.u), d.evaluations(0.55 - 0.4 * d.u)
    d.columns |= {"reward": d.share(rate), "eval_reward": (easy + hard) / 2}
    d.columns |= {"eval_reward/easy": easy, "eval_reward/hard": hard}


def far_though_paid(d: Draw) -> None:
    """The reward gains to the end, many nats away from the reference."""
    sound(d)
    d.columns["kl_ref"] = d.about(0.01 + d.between(3, 10) * d.u**3, 0.08)


@dataclass(frozen=True)
class Kind:
    """A kind of log and what must be said of it.

    Attributes
    ----------
    make : callable
        Fills a draw.
    named : tuple of str
        Findings of which one must be there.
    verdicts : tuple of str
        Verdicts that are right; any if empty.
    loud : bool
        One of the findings must be a warning or worse.
    silent : bool
        Nothing may be a warning or worse.
    """

    make: Callable[[Draw], None]
    named: tuple[str, ...] = ()
    verdicts: tuple[str, ...] = ()
    loud: bool = True
    silent: bool = False


KINDS: Mapping[str, Kind] = {
    "healthy": Kind(healthy, verdicts=("healthy",), silent=True),
    "two_functions": Kind(two_functions, verdicts=("healthy",), silent=True),
    "scattered_zeros": Kind(scattered_zeros, verdicts=("healthy",)),
    "never_learned": Kind(never_learned, ("stalled",), ("stalled",)),
    "all_cut": Kind(all_cut, ("truncation_drift",), ("stalled",)),
    "early_death": Kind(early_death, ("reward_collapse",), ("reward_collapse",)),
    "climb_and_fall": Kind(climb_and_fall, ("reward_collapse", "fall_after_climb")),
    "held_out_falls": Kind(held_out_falls, ("held_out_falls",)),
    "held_out_stands": Kind(held_out_stands, ("length_drift",)),
    "kl_blow_up": Kind(kl_blow_up, ("kl_drift",)),
    "entropy_collapse": Kind(entropy_collapse, ("entropy_collapse",), ("entropy_collapse",)),
    "entropy_explosion": Kind(
        entropy_explosion, ("entropy_explosion",), ("entropy_explosion", "reward_collapse")
    ),
    "too_hard": Kind(too_hard, ("zero_signal_too_hard", "stalled")),
    "too_easy": Kind(too_easy, ("zero_signal_too_easy",), ("healthy",), loud=False),
    "plateau": Kind(plateau, ("plateau",), ("healthy",), loud=False),
    "format_takes_over": Kind(format_takes_over, ("one_reward_takes_over",)),
    "mismatch": Kind(mismatch, ("train_inference_mismatch",)),
    "stale": Kind(stale, ("staleness",)),
    "truncation": Kind(truncation, ("truncation_drift",)),
    "healthy_critic": Kind(healthy_critic, verdicts=("healthy",), silent=True),
    "critic_runs_away": Kind(critic_runs_away, ("value_diverges",)),
    "advantages_vanish": Kind(advantages_vanish, ("advantages_vanish",)),
    "one_wording": Kind(one_wording, ("diversity_falls",)),
    "clip_stops_all": Kind(clip_stops_all, ("clip_saturation",)),
    "schedule_restarts": Kind(schedule_restarts, ("lr_schedule",)),
    "schedule_ends_early": Kind(schedule_ends_early, ("lr_schedule",)),
    "form_alone": Kind(form_alone, ("form_rises_alone",)),
    "one_set_falls": Kind(one_set_falls, ("held_out_falls",)),
    "far_though_paid": Kind(far_though_paid, ("kl_drift",)),
}
"""Every kind of log, with the right answer."""
SPARE = ("kl_ref", "clip_high", "clip_low", "lr", "truncated", "length", "grad_norm", "entropy")
"""Columns that a source may not log; those a kind rests on always stay."""
KEPT: Mapping[str, tuple[str, ...]] = {
    "kl_blow_up": ("kl_ref",), "entropy_collapse": ("entropy",), "entropy_explosion": ("entropy",),
    "truncation": ("truncated",), "all_cut": ("truncated",), "held_out_stands": ("length",),
    "never_learned": ("grad_norm",), "scattered_zeros": ("grad_norm",),
    "far_though_paid": ("kl_ref",), "schedule_restarts": ("lr",), "schedule_ends_early": ("lr",),
}  # fmt: skip


def make_log(kind: str, seed: int) -> tuple[Values, dict[str, Values]]:
    """Steps and columns of one log.

    Parameters
    ----------
    kind : str
        A name in ``KINDS``.
    seed : int
        Everything else is drawn from it.
    """
    rng = np.random.default_rng([seed, sum(map(ord, kind))])
    draw = Draw(
        rng=rng,
        records=int(rng.choice([60, 100, 150, 300])),
        every=int(rng.choice([1, 1, 5, 10])),
        batch=int(rng.choice([128, 256, 512])),
        group=int(rng.choice([4, 8, 16])),
    )
    KINDS[kind].make(draw)
    for name in SPARE:
        if name not in KEPT.get(kind, ()) and rng.random() < 0.25:
            draw.columns.pop(name, None)
    return draw.every * np.arange(1, draw.records + 1), draw.columns


def right(kind: str, diagnosis: Diagnosis) -> bool:
    """Whether a diagnosis says what the kind is, and nothing against it."""
    wanted = KINDS[kind]
    loud = {f.name for f in diagnosis.findings if f.severity != "info"}
    told = loud if wanted.loud else {f.name for f in diagnosis.findings}
    named = not wanted.named or bool(told & set(wanted.named))
    verdict = not wanted.verdicts or diagnosis.verdict in wanted.verdicts
    return named and verdict and not (wanted.silent and loud)


def write_log(path: Path, kind: str, seed: int) -> Path:
    """Write one log as a run folder without tokens or completions."""
    return write_steps(path, *make_log(kind, seed))


def write_steps(path: Path, steps: Values, columns: Mapping[str, Values]) -> Path:
    """Write step columns as a run folder."""
    described = {"name": path.name, "source": "import", "objective": {"name": "grpo"}}
    writer = RunWriter(path, described)
    for place, step in enumerate(steps.tolist()):
        row = {name: float(values[place]) for name, values in columns.items()}
        known = {name: value for name, value in row.items() if np.isfinite(value)}
        writer.append_step({"step": step} | known)
    writer.close("finished")
    return path
