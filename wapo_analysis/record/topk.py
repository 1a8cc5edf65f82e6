"""The K most probable tokens at the positions of a few rollouts, before and after an update.

Shapes: N tokens of a gradient pass, n of them looked at, V vocabulary, K tokens kept of each row.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from wapo_analysis.errors import UserError
from wapo_analysis.record import Guarded, on_schedule
from wapo_analysis.stats import TokenStats
from wapo_analysis.table import Array

if TYPE_CHECKING:
    from wapo_analysis.record.tokens import TokenPass

#: Tokens kept of a row by default.
TOPK = 8
#: Rollouts of a step that are looked at.
TOPK_ROLLOUTS = 4
_MOST = 127
#: Rows read at once: 128 x V in float32.
_ROWS = 128

Place = tuple[Tensor, ...]
#: Logits (m, V) at m places of a pass.
ReadRows = Callable[[Place], Tensor]


@dataclass
class TopTokens:
    """The K most probable tokens of n rows of one pass; every tensor of them has shape (n, K)."""

    #: (n,): where the rows stand in the pass's own tensors, (B, T) or (M,).
    place: Place
    #: (n,).
    rollout: Tensor
    position: Tensor
    #: K.
    size: int
    temperature: float
    minibatch: int
    #: (n, K): token ids, log-probabilities in nats, and those after the update; None until read.
    ids: Tensor | None = field(default=None, init=False)
    before: Tensor | None = field(default=None, init=False)
    after: Tensor | None = field(default=None, init=False)

    @torch.no_grad()
    def read(self, rows: ReadRows) -> None:
        """Look at the distributions: the first time before, every later time after the update."""
        found = [self._read(rows, span) for span in torch.arange(len(self.rollout)).split(_ROWS)]
        ids, logp = (torch.cat(part) for part in zip(*found, strict=True))
        if self.ids is None:
            self.ids, self.before = ids, logp
        else:
            self.after = logp

    def _read(self, rows: ReadRows, span: Tensor) -> tuple[Tensor, Tensor]:
        start, stop = int(span[0]), int(span[-1]) + 1
        logits = rows(tuple(index[start:stop] for index in self.place)).detach()
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        logp = wide.log_softmax(1)
        if self.ids is not None:
            ids = self.ids[start:stop]
            return ids, logp.gather(1, ids)
        values, ids = logp.topk(min(self.size, logp.shape[1]), dim=1)
        return ids, values

    @property
    def logp(self) -> Tensor:
        """Log-probabilities, flat; for whoever asks where they are."""
        assert self.before is not None
        return self.before.flatten()

    def given(self) -> dict[str, Tensor]:
        """Columns of the ``topk`` table, n K rows."""
        if self.ids is None or self.before is None:
            return {}
        count = self.ids.shape[1]
        places = torch.arange(count, device=self.ids.device).repeat(len(self.ids))
        columns = {
            "rollout": self.rollout.repeat_interleave(count),
            "position": self.position.repeat_interleave(count),
            "place": places,
            "token_id": self.ids.flatten(),
            "logp": self.before.float().flatten(),
        }
        if self.after is not None:
            columns["logp_after"] = self.after.float().flatten()
        return columns


class TopReader:
    """Chooses whose most probable tokens are read, and keeps them until the step ends.

    Of each step whose token rows are written four rollouts are looked at, in the first pass that
    has them: those whose rows are written even if the share of written rollouts is small. Raises
    UserError if ``size`` is not in 0..127.

    Parameters
    ----------
    size : int
        K; 0 reads none.
    every : int
        Steps 1, 1 + every, ... have token rows.
    share : float
        Share of the rollouts whose rows are written.
    """

    def __init__(self, size: int, every: int, share: float, temperature: float) -> None:
        if not 0 <= size <= _MOST:
            raise UserError(f"topk must be 0 (none) to {_MOST}, got {size}")
        self._size, self._every, self._share = size, every, share
        self._temperature = temperature
        self._looked: set[int] = set()
        self._tops: list[TopTokens] = []

    def wants(self, step: int) -> bool:
        """Whether rollouts of this step are still to be looked at; asks no device."""
        wanted = self._size > 0 and len(self._looked) < TOPK_ROLLOUTS
        return wanted and on_schedule(step, self._every)

    def size_at(self, step: int) -> int:
        """K while rollouts of this step are still to be looked at, else 0."""
        return self._size if self.wants(step) else 0

    def choose(
        self, step: int, place: Place, rollout: Tensor, position: Tensor, minibatch: int
    ) -> TopTokens | None:
        """Rows of a pass that are to be read, now and after the update; None if there are none.

        ``place`` (N,): where the tokens stand in the pass's tensors, as `Tensor.nonzero` gives it;
        ``rollout``, ``position`` (N,).
        """
        if not self.wants(step):
            return None
        numbers = rollout.unique().cpu().numpy()
        numbers = numbers[~np.isin(numbers, list(self._looked))]
        drawn = hashed(numbers, step)
        order = np.argsort(drawn)[: TOPK_ROLLOUTS - len(self._looked)]
        chosen = numbers[order[drawn[order] < self._share]]
        self._looked |= set(chosen.tolist())
        wanted = torch.from_numpy(chosen).to(rollout.device)
        index = torch.isin(rollout, wanted).nonzero().squeeze(1)
        if not len(index):
            return None
        at = tuple(part[index] for part in place)
        top = TopTokens(
            at, rollout[index], position[index], self._size, self._temperature, minibatch
        )
        self._tops.append(top)
        return top

    def look(
        self,
        step: int,
        tokens: "TokenPass",
        place: Place,
        logits: Tensor | None,
        stats: TokenStats | None,
    ) -> None:
        """Choose rows of a pass and read them off its logits, or the statistics of its N tokens."""
        if logits is None and (stats is None or stats.top_ids is None):
            return
        tokens.top = top = self.choose(
            step, place, tokens.rollout, tokens.position, tokens.minibatch
        )
        if top is not None and logits is not None:
            top.read(logits.__getitem__)
        elif top is not None and stats is not None:
            index = torch.isin(tokens.rollout, top.rollout).nonzero().squeeze(1)
            most = stats.map(lambda values: values[index])
            top.ids, top.before = most.top_ids, most.top_logp

    def taken(self) -> list[TopTokens]:
        """Hand over what the step has, and begin another."""
        taken, self._tops, self._looked = self._tops, [], set()
        return taken


def reading(watch: Guarded, top: TopTokens | None) -> Callable[[ReadRows], None] | None:
    """What a scoring calls with its logits, under a guard; None if nothing is to be read."""
    return None if top is None else lambda rows: watch.guard(top.read, rows)


def hashed(rollout: Array, step: int) -> Array:
    """A number in [0, 1) for each rollout of a step: a multiplicative hash, the same everywhere."""
    mixed = (rollout.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64(step * 0xBF58476D1CE4E5B9 % 2**64)
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0x94D049BB133111EB)
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) / 2**53)


def chosen_rows(rollout: Array, step: int, fraction: float) -> Array:
    """Rows of the chosen rollouts; those of a smaller fraction are among those of a larger one."""
    return np.asarray(hashed(rollout, step) < fraction)
