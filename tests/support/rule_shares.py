"""How often the entropy rule has the wrong sign, and how often textbook formulas fail in float32.

The shares that taxonomy/README.md quotes: ``python -m tests.support.rule_shares``.
"""

from dataclasses import dataclass

import numpy as np

from wapo_analysis.verify.positions import (
    as_float32,
    every_token,
    softmax,
    stable_entropy,
    stable_norm,
    statistics,
    textbook,
)

_VOCABULARY = 1000


@dataclass(frozen=True)
class Observation:
    """One measured share.

    Attributes
    ----------
    name : str
        Short name, unique.
    statement : str
        What the share is of.
    value : float
        The share, in [0, 1].
    trials : int
        Number of tokens it was measured on.
    """

    name: str
    statement: str
    value: float
    trials: int

    def to_line(self) -> str:
        """Return share, name and statement on one line."""
        return f"{self.value:7.2%} {self.name:<19} {self.trials:>7} tokens  {self.statement}"


def run_observations(seed: int = 0, trials: int = 500) -> list[Observation]:
    """Measure where the entropy rule and the textbook float32 forms are wrong.

    Parameters
    ----------
    seed : int
        Seed of the distributions.
    trials : int
        Number of distributions, of 1000 tokens each.

    Returns
    -------
    list of Observation
        The rule's disagreements, then the textbook forms' failures.
    """
    rng = np.random.default_rng(seed)
    return [*_rule(rng, trials), *_textbook_in_float32(rng, trials)]


def _rule(rng: np.random.Generator, trials: int) -> list[Observation]:
    """Measure every token of softmax(normal logits), weighted by its chance to be drawn."""
    scale = rng.choice([1.0, 2.0, 4.0], (trials, 1))
    probs = softmax(scale * rng.standard_normal((trials, _VOCABULARY)))
    rates, peak = every_token(probs)
    wrong = np.where(peak, rates > 0, rates < 0)
    moved = probs * np.abs(rates)
    tokens = float((probs * wrong).sum() / trials)
    entropy = float((moved * wrong).sum() / moved.sum())
    what = "sampled tokens whose dH has not the sign of the entropy rule"
    return [
        Observation("rule_wrong", what, tokens, probs.size),
        Observation("rule_wrong_entropy", "share of all |dH| they carry", entropy, probs.size),
    ]


def _textbook_in_float32(rng: np.random.Generator, trials: int) -> list[Observation]:
    """Measure sampled modes whose 1 - p is spread evenly over 1e-12 to 1e-2 in the logarithm."""
    scaled = 3 * rng.standard_normal((trials, _VOCABULARY))
    gap = rng.uniform(-12, -2, trials) * np.log(10)
    scaled[:, 0] = np.log(np.exp(scaled[:, 1:]).sum(1)) - gap
    own, more = statistics(scaled, np.zeros(trials, np.int64))
    square, change = textbook(as_float32(own), as_float32(more))
    ratio = np.sqrt(np.maximum(square, 0.0)) / stable_norm(own)
    flipped = np.sign(change) != np.sign(stable_entropy(own | more))
    norm_what = "near-certain tokens whose textbook float32 gradient norm is off by over 1%"
    sign_what = "near-certain tokens whose textbook float32 dH has the wrong sign"
    return [
        Observation("textbook_norm", norm_what, float((np.abs(ratio - 1) > 0.01).mean()), trials),
        Observation("textbook_dentropy", sign_what, float(flipped.mean()), trials),
    ]


if __name__ == "__main__":
    for observation in run_observations():
        print(observation.to_line())
