"""Healthy courses of many shapes, made by formula: a diagnosis has nothing to warn of."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from experiments.suite.draws import Draw, Values, flat_share, rise, sound
from experiments.suite.logs import write_steps

Shape = Callable[[Draw], None]


def _learns(d: Draw, rate: Values, falls: float = 0.6) -> None:
    """Columns of a run with this rate of success, its entropy falling by a factor exp(-falls)."""
    sound(d)
    d.columns |= {"reward": d.share(rate), "groups_flat": d.share(flat_share(rate, d.group))}
    d.columns["entropy"] = d.about(d.between(0.1, 1.5) * np.exp(-falls * d.u), 0.03)


def ordinary(d: Draw) -> None:
    """Learns to the end."""
    sound(d)


def sparse(d: Draw) -> None:
    """A reward of 0.02 that grows to 0.08."""
    rate = rise(d.u, 0.02, 0.08, 0.5, 6)
    _learns(d, rate)
    d.columns["groups_flat"] = d.share(0.75 - 0.3 * d.u)


def nearly_solved(d: Draw) -> None:
    """Starts near 0.9 and ends at 0.98."""
    _learns(d, rise(d.u, 0.9, 0.98, 0.4, 8), 0.4)
    d.columns["groups_flat"] = d.share(0.4 + 0.2 * d.u)


def steep_then_slow(d: Draw) -> None:
    """Most of the gain in the first tenth, a slow one after it."""
    _learns(d, 0.2 + 0.35 * (1 - np.exp(-20 * d.u)) + 0.15 * d.u, 0.5)


def late_start(d: Draw) -> None:
    """Nothing for two fifths of the run, then it learns."""
    _learns(d, rise(d.u, 0.1, 0.7, 0.65, 14), 0.5)


def entropy_falls_far(d: Draw) -> None:
    """The entropy falls to a tenth, early and then ever slower, while the reward rises."""
    _learns(d, rise(d.u, 0.3, 0.85, 0.35, 6), 0.0)
    d.columns["entropy"] = d.about(d.between(0.2, 1.5) * (0.1 + 0.9 * np.exp(-4 * d.u)), 0.04)


def entropy_rises_a_little(d: Draw) -> None:
    """The entropy rises by a quarter, as with a higher clip."""
    _learns(d, rise(d.u, 0.2, 0.6, 0.5, 6), -0.22)


def entropy_waves(d: Draw) -> None:
    """The entropy swings by a fifth with the data."""
    _learns(d, rise(d.u, 0.25, 0.6, 0.5, 5), 0.3)
    d.columns["entropy"] = d.columns["entropy"] * (1 + 0.2 * np.sin(9 * np.pi * d.u))


def noisy(d: Draw) -> None:
    """Sixteen rollouts a step."""
    d.batch = 16
    sound(d)
    d.columns["entropy"] = d.about(d.columns["entropy"], 0.2)
    d.columns["length"] = d.about(d.columns["length"], 0.2)
    d.columns["grad_norm"] = d.about(d.columns["grad_norm"], 0.6)


def heavy_gradients(d: Draw) -> None:
    """Gradient norms with heavy tails, as small batches have."""
    sound(d)
    d.columns["grad_norm"] = 0.2 * (1 + 0.5 * np.abs(d.rng.standard_t(3, d.records)))


def warm_up(d: Draw) -> None:
    """A learning rate that warms up for a tenth and decays by a cosine to zero."""
    sound(d)
    decay = 0.5 * (1 + np.cos(np.pi * np.clip((d.u - 0.1) / 0.9, 0, 1)))
    d.columns["lr"] = 1e-6 * np.minimum(d.u / 0.1, 1) * decay


def linear_decay(d: Draw) -> None:
    """A learning rate that falls to zero at the end; gains fade with it."""
    _learns(d, 0.25 + 0.35 * (1 - (1 - d.u) ** 2), 0.5)
    d.columns["lr"] = 1e-6 * (1 - d.u)


def evaluated(d: Draw) -> None:
    """Evaluations every so many steps, a little below the training reward."""
    rate = sound(d)
    d.columns["eval_reward"] = d.evaluations(0.9 * rate)


def evaluated_on_few(d: Draw) -> None:
    """Evaluations on thirty problems, as AIME has."""
    rate = sound(d)
    d.columns["eval_reward"] = d.evaluations(0.4 * rate, 30)


def harder_data(d: Draw) -> None:
    """A curriculum: at half of the run the problems become harder and the reward steps down.

    It learns on from there; the entropy steps up a little with the problems.
    """
    rate = np.where(d.u < 0.5, rise(d.u, 0.3, 0.65, 0.25, 14), rise(d.u, 0.42, 0.62, 0.75, 14))
    _learns(d, rate, 0.4)
    d.columns["entropy"] = d.columns["entropy"] * np.where(d.u < 0.5, 1, 1.15)


def easier_data(d: Draw) -> None:
    """A curriculum the other way: the reward steps up."""
    _learns(d, np.where(d.u < 0.5, 0.3 + 0.1 * d.u, 0.6 + 0.1 * d.u), 0.4)


def thinks_longer(d: Draw) -> None:
    """Answers grow threefold and the reward with them, held out too (R1)."""
    rate = rise(d.u, 0.2, 0.7, 0.5, 6)
    _learns(d, rate, 0.3)
    d.columns["length"] = d.about(800 * (1 + 2 * d.u), 0.04)
    d.columns["eval_reward"] = d.evaluations(0.85 * rate)


def context_extended(d: Draw) -> None:
    """A limit of the length that is raised twice: fewer are cut at once, then answers grow."""
    rate = rise(d.u, 0.25, 0.6, 0.5, 5)
    _learns(d, rate, 0.3)
    part = (3 * d.u) % 1
    stage = np.minimum((3 * d.u).astype(int), 2)
    d.columns["truncated"] = d.share(0.03 + 0.08 * part)
    d.columns["length"] = d.about(2000 * (1 + 0.35 * stage + 0.2 * part), 0.04)
    d.columns["eval_reward"] = d.evaluations(0.9 * rate)


def comes_to_the_point(d: Draw) -> None:
    """Answers shorten by two fifths while the reward rises."""
    rate = rise(d.u, 0.3, 0.75, 0.4, 6)
    _learns(d, rate, 0.5)
    d.columns["length"] = d.about(1200 * (1 - 0.4 * d.u), 0.04)
    d.columns["eval_reward"] = d.evaluations(0.9 * rate)


def signed(d: Draw) -> None:
    """A reward in [-1, 1]."""
    rate = sound(d)
    d.columns["reward"] = 2 * d.share(rate) - 1


def percent(d: Draw) -> None:
    """A reward in percent."""
    rate = sound(d)
    d.columns["reward"] = 100 * d.share(rate)


def penalties(d: Draw) -> None:
    """A sum of several functions with penalties, from -2 up to 3."""
    rate = sound(d)
    d.columns["reward"] = 4.5 * d.share(rate) - 1.5 + d.rng.normal(0, 0.1, d.records)


def reward_model(d: Draw) -> None:
    """An unbounded score of a reward model that rises from -3 to 2."""
    sound(d)
    d.columns["reward"] = -3 + 5 * d.u**0.7 + d.rng.normal(0, 0.3, d.records)
    del d.columns["groups_flat"]


def bits(d: Draw) -> None:
    """An entropy of whole completions, hundreds of nats."""
    sound(d)
    d.columns["entropy"] = 300 * d.columns["entropy"]


def tiny_entropy(d: Draw) -> None:
    """An entropy of 0.03 nats that wobbles, as an instruct model has on short answers."""
    sound(d)
    d.columns["entropy"] = d.about(0.03 * np.exp(-0.4 * d.u), 0.12)


def epochs(d: Draw) -> None:
    """Three passes over the data: the reward steps up a little at each new one."""
    pass_ = np.minimum((3 * d.u).astype(int), 2)
    _learns(d, 0.3 + 0.1 * pass_ + 0.08 * d.u, 0.4)


def oscillates(d: Draw) -> None:
    """Batches sorted by difficulty: the reward swings by 0.1 around its rise."""
    _learns(d, rise(d.u, 0.3, 0.65, 0.5, 5) + 0.1 * np.sin(20 * np.pi * d.u), 0.4)


def off_policy(d: Draw) -> None:
    """Four updates a batch, a step of delay; a little is clipped and it stays so."""
    sound(d)
    d.columns |= {
        "clip_high": d.share(np.full(d.records, 0.03)),
        "clip_low": d.share(np.full(d.records, 0.02)),
        "staleness": d.about(np.full(d.records, 1.0), 0.05),
        "engine_kl": d.about(np.full(d.records, 8e-4), 0.2),
    }


def kl_levels(d: Draw) -> None:
    """The KL to the reference rises to 0.2 and finds its level."""
    sound(d)
    d.columns["kl_ref"] = d.about(0.001 + 0.2 * (1 - np.exp(-3 * d.u)), 0.1)


def filtered(d: Draw) -> None:
    """Flat groups are left out before the loss: their share is zero all along."""
    sound(d)
    d.columns["groups_flat"] = np.zeros(d.records)


def slow(d: Draw) -> None:
    """A gain of 0.06 over the whole run, hardly more than the noise."""
    start = d.uniform(0.3, 0.6)
    _learns(d, start + 0.06 * d.u, 0.2)


def one_bad_batch(d: Draw) -> None:
    """One batch of problems nobody solves, and one spike of the gradient."""
    sound(d)
    at = d.records // 2
    d.columns["reward"][at] *= 0.3
    d.columns["grad_norm"][at] *= 6


def few_records(d: Draw) -> None:
    """Eight records."""
    d.records = 8
    sound(d)


def many_records(d: Draw) -> None:
    """Five thousand records."""
    d.records, d.every = 5000, 1
    sound(d)


def counted_by_epoch(d: Draw) -> None:
    """A plateau at 0.75, reached at half of the run, entropy with it."""
    _learns(d, rise(d.u, 0.25, 0.75, 0.25, 12), 0.0)
    d.columns["entropy"] = d.about(d.between(0.2, 1.2) * (0.55 + 0.45 * np.exp(-6 * d.u)), 0.03)


SHAPES: Mapping[str, Shape] = {
    shape.__name__: shape
    for shape in (
        ordinary, sparse, nearly_solved, steep_then_slow, late_start, entropy_falls_far,
        entropy_rises_a_little, entropy_waves, noisy, heavy_gradients, warm_up, linear_decay,
        evaluated, evaluated_on_few, harder_data, easier_data, thinks_longer, context_extended,
        comes_to_the_point, signed, percent, penalties, reward_model, bits, tiny_entropy, epochs,
        oscillates, off_policy, kl_levels, filtered, slow, one_bad_batch, few_records,
        many_records, counted_by_epoch,
    )
}  # fmt: skip
"""Every shape by its name."""
ALLOWED: Mapping[str, frozenset[str]] = {
    "nearly_solved": frozenset({"zero_signal_too_easy"}),
    "sparse": frozenset({"zero_signal_too_hard"}),
}
"""Warnings that are right on a healthy run: most groups are all right, or all wrong."""


def write_shape(path: Path, name: str, seed: int) -> Path:
    """Write one healthy course as a run folder; everything but its shape is drawn from the seed."""
    rng = np.random.default_rng([seed, sum(map(ord, name))])
    draw = Draw(
        rng=rng,
        records=int(rng.choice([20, 40, 60, 150, 300])),
        every=int(rng.choice([1, 1, 10])),
        batch=int(rng.choice([64, 128, 512])),
        group=int(rng.choice([4, 8, 16])),
    )
    SHAPES[name](draw)
    return write_steps(path, draw.every * np.arange(1, draw.records + 1), draw.columns)
