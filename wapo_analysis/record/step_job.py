"""One step on its way to the run folder: class totals, token rows, rollouts, probes, step line."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from wapo_analysis.derive import class_totals, derive
from wapo_analysis.record.tokens import Array, HostPass
from wapo_analysis.schema import TOKENS
from wapo_analysis.table import Records

Columns = Mapping[str, float]
_LEAST_SHARE = 1 / 64


@dataclass
class StepJob:
    """Everything of one step of one process.

    Attributes
    ----------
    row : dict
        Columns of the step line, ``step`` among them.
    rank : int
    temperature : float
        Softmax temperature of the statistics.
    passes : list of HostPass
        Gradient passes whose rows have not been built.
    tokens : list of Records
        Derived token records that have been built already.
    share : float
        Share of the rollouts whose token rows are written.
    others : list of Records
        Rollouts and probes.
    row_of : callable, optional
        Further columns of the step line from the derived token records, computed where the job is.
    """

    row: dict[str, Any]
    rank: int
    temperature: float
    passes: list[HostPass] = field(default_factory=list)
    tokens: list[Records] = field(default_factory=list)
    share: float = 1.0
    others: list[Records] = field(default_factory=list)
    row_of: Callable[[Records], Columns] | None = None
    _totals: list[Records] = field(default_factory=list)
    _chosen: list[Records] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Number of the step."""
        return int(self.row["step"])

    @property
    def rows(self) -> int:
        """Token rows it keeps in memory."""
        waiting = sum(len(tokens) for tokens in self.passes)
        return waiting + sum(len(rows) for rows in (*self.tokens, *self._chosen))

    def condense(self) -> None:
        """Sum up the classes, pick the rows to be written, let go of all others."""
        built = token_records(self.passes, self.step, self.rank, self.temperature)
        derived = [*self.tokens, *built]
        self.passes, self.tokens = [], []
        if not derived:
            return
        tokens = Records.concat(derived) if len(derived) > 1 else derived[0]
        if self.row_of is not None:
            self.row |= self.row_of(tokens)
            self.row_of = None
        self._totals = [class_totals(tokens)]
        self.row["token_fraction"] = self.share
        if self.share > 0:
            stored = {column.name: tokens[column.name] for column in TOKENS.stored}
            chosen = Records(TOKENS, stored)
            if self.share < 1:
                chosen = chosen.select(chosen_rows(tokens["rollout"], self.step, self.share))
            self._chosen = [chosen]

    def thin(self, room: int) -> None:
        """Keep the rows of fewer rollouts, by halves, until they fit; only once condensed."""
        while self._chosen and self.rows > room:
            self.share = self.share / 2 if self.share > _LEAST_SHARE else 0.0
            rows = self._chosen.pop()
            if self.share > 0:
                kept = chosen_rows(rows["rollout"], self.step, self.share)
                self._chosen = [rows.select(kept)]
            self.row["token_fraction"] = self.share

    def records(self) -> list[Records]:
        """Tables to be written, once condensed: class totals, token rows, rollouts, probes."""
        return [*self._totals, *self._chosen, *self.others]


def token_records(
    passes: Iterable[HostPass], step: int, rank: int, temperature: float
) -> list[Records]:
    """Derived token records of some passes as one table; none without passes."""
    built = [Records.build(TOKENS, p.columns(step, rank)) for p in passes]
    return [derive(Records.concat(built), temperature)] if built else []


def chosen_rows(rollout: Array, step: int, fraction: float) -> Array:
    """Rows of the chosen rollouts: a multiplicative hash of (step, rollout) below the fraction.

    The rollouts of a smaller fraction are among those of a larger one.
    """
    mixed = (rollout.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.uint64(step * 0xBF58476D1CE4E5B9 % 2**64)
    mixed ^= mixed >> np.uint64(31)
    mixed *= np.uint64(0x94D049BB133111EB)
    return np.asarray((mixed >> np.uint64(11)).astype(np.float64) / 2**53 < fraction)
