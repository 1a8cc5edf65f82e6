"""What a log made by formula is drawn from: noise of a batch of rollouts, and a sound course."""

from dataclasses import dataclass, field

import numpy as np

Values = np.ndarray


@dataclass
class Draw:
    """What one log is made from.

    Attributes
    ----------
    rng : Generator
        Randomness of this log.
    records, every : int
        Records, and steps from one to the next.
    batch, group : int
        Rollouts of a step, which the noise of a share comes from, and rollouts of a prompt.
    """

    rng: np.random.Generator
    records: int
    every: int
    batch: int
    group: int
    columns: dict[str, Values] = field(default_factory=dict)

    @property
    def u(self) -> Values:
        """Progress from 0 to 1, shape (records,)."""
        return np.linspace(0, 1, self.records)

    def share(self, rate: Values) -> Values:
        """A share of the rollouts of a step: binomial noise around a rate."""
        rate = np.clip(rate * np.ones(self.records), 0, 1)
        return self.rng.binomial(self.batch, rate) / self.batch

    def about(self, values: Values, relative: float) -> Values:
        """Values with multiplicative noise."""
        noise = self.rng.normal(0, relative, self.records)
        return np.asarray(values * np.ones(self.records) * np.exp(noise))

    def between(self, low: float, high: float) -> float:
        """One number of the log, uniform in its logarithm."""
        return float(np.exp(self.rng.uniform(np.log(low), np.log(high))))

    def uniform(self, low: float, high: float) -> float:
        """One number of the log, uniform."""
        return float(self.rng.uniform(low, high))

    def evaluations(self, values: Values, size: int = 500) -> Values:
        """A score on held-out problems at every n-th record, NaN between."""
        often = max(1, self.records // int(self.rng.integers(8, 20)))
        seen = np.arange(self.records) % often == 0
        score = self.rng.binomial(size, np.clip(values, 0, 1)) / size
        return np.where(seen, score, np.nan)


def rise(u: Values, start: float, end: float, middle: float, pace: float) -> Values:
    """Logistic curve from start to end."""
    return start + (end - start) / (1 + np.exp(-pace * (u - middle)))


def flat_share(rate: Values, group: int) -> Values:
    """Share of groups all right or all wrong, if every rollout is right at a rate."""
    return np.asarray(rate**group + (1 - rate) ** group)


def sound(d: Draw, end: float | None = None) -> Values:
    """Columns of a run that learns and goes on learning; returns its rate of success."""
    top = d.uniform(0.5, 0.75) if end is None else end
    rate = rise(d.u, d.uniform(0.15, 0.3), top, d.uniform(0.4, 0.6), d.uniform(4, 7))
    start = d.between(0.1, 1.5)
    d.columns |= {
        "reward": d.share(rate),
        "groups_flat": d.share(flat_share(rate, d.group)),
        "entropy": d.about(start * np.exp(-d.uniform(0.2, 0.9) * d.u), 0.03),
        "grad_norm": d.about(np.full(d.records, d.between(0.05, 2)), 0.2),
        "length": d.about(d.between(100, 3000) * (1 + d.uniform(0, 0.35) * d.u), 0.04),
        "truncated": d.share(np.full(d.records, d.uniform(0, 0.03))),
        "kl_ref": d.about(0.002 + d.uniform(0.01, 0.3) * d.u**1.3, 0.05),
        "clip_high": d.share(np.full(d.records, d.uniform(0, 0.03))),
        "clip_low": d.share(np.full(d.records, d.uniform(0, 0.03))),
        "lr": np.full(d.records, d.between(3e-7, 1e-5)),
    }
    return rate
