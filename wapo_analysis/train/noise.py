"""Randomness: the prompts of a step, and from probabilities to one token per row.

Shapes: n rows in hand, V vocabulary.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from wapo_analysis.train.tasks import Problem, Task

_PROMPTS, _SAMPLING = 1, 2  # streams of random numbers within a step


def step_problems(task: Task, seed: int, step: int, n: int) -> list[Problem]:
    """The n problems of a step; they depend on (seed, step) alone."""
    return task.problems(np.random.default_rng([seed, step, _PROMPTS]), n)


def sampling_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Source of the noise of a step's samples."""
    stream = np.random.SeedSequence([seed, step, _SAMPLING]).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(stream[0]) >> 1)


class Noise(Protocol):
    """Randomness of a batch; a row's does not depend on which rows are sampled beside it."""

    def pick(self, probabilities: Tensor, rows: Tensor, position: int) -> Tensor:
        """One token per row, shape (n,), from its probabilities (n, V).

        ``rows`` are their numbers in the batch; positions come in order, each once.
        """


@dataclass
class Exponentials:
    """As torch.multinomial: argmax p / q with q ~ Exp(1) has distribution p.

    On a CPU the numbers are one stream, so those of all rows are drawn.
    """

    generator: torch.Generator
    total: int
    _space: Tensor | None = None

    def pick(self, probabilities: Tensor, rows: Tensor, position: int) -> Tensor:
        """See `Noise`."""
        if self._space is None:
            self._space = probabilities.new_empty((self.total, probabilities.shape[1]))
        noise = self._space.exponential_(generator=self.generator)
        chosen = noise if len(rows) == self.total else noise[rows]
        return torch.div(probabilities, chosen, out=chosen).argmax(dim=-1)


class Uniforms:
    """One number per row and position, through the inverse of the cumulative distribution.

    On a GPU: no noise of the size of the vocabulary, none for rows that are not in hand.

    Parameters
    ----------
    generator : torch.Generator
    total, positions : int
        Rows of the batch, and the most tokens of a completion.
    """

    def __init__(self, generator: torch.Generator, total: int, positions: int) -> None:
        self._numbers = torch.rand(
            (positions, total), generator=generator, dtype=torch.float64, device=generator.device
        )

    def pick(self, probabilities: Tensor, rows: Tensor, position: int) -> Tensor:
        """See `Noise`."""
        return inverse_cdf(probabilities, self._numbers[position].index_select(0, rows))


def inverse_cdf(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Tokens at given places of the cumulative distributions, shape (n,).

    Equals ``torch.searchsorted(probabilities.cumsum(1), uniform * sum, right=True)``, in float64
    and by sums of a fixed order: of blocks of tokens first, then inside the block.

    Parameters
    ----------
    probabilities : Tensor, shape (n, V)
        Not necessarily of sum 1. A token of probability 0 is never picked.
    uniform : Tensor of float64, shape (n,)
        In [0, 1).
    """
    count, vocabulary = probabilities.shape
    width = max(1, round(vocabulary**0.5))
    blocks = -(-vocabulary // width)
    panels = pad(probabilities, (0, blocks * width - vocabulary)).view(count, blocks, width)
    sums = _cumulative(panels.sum(2, dtype=torch.float64))
    wanted = uniform.unsqueeze(1) * sums[:, -1:]
    block = _first_above(sums, wanted)
    before = torch.where(block > 0, sums.gather(1, (block - 1).clamp(min=0)), 0.0)
    inside = panels.gather(1, block.unsqueeze(2).expand(-1, 1, width)).squeeze(1).double()
    token: Tensor = block * width + _first_above(_cumulative(inside), wanted - before)
    return token.squeeze(1)


def _cumulative(values: Tensor) -> Tensor:
    """Cumulative sums along rows; torch's own have no order that repeats on a GPU."""
    size = values.shape[1]
    steps = torch.ones(size, size, dtype=values.dtype, device=values.device).triu()
    sums: Tensor = torch.mm(values, steps)
    return sums


def _first_above(sums: Tensor, wanted: Tensor) -> Tensor:
    """First column above a value, (n, 1); rounding never leads past the last that adds anything."""
    past = (sums <= wanted).sum(1, keepdim=True)
    return torch.minimum(past, (sums < sums[:, -1:]).sum(1, keepdim=True))
