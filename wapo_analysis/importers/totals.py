"""What tokens and rollouts say about the steps of an imported run."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from wapo_analysis.derive import reward_columns, rollout_sums, step_columns, token_sums
from wapo_analysis.importers.rows import numbers
from wapo_analysis.schema import TOKENS
from wapo_analysis.table import Array


@dataclass
class StepTotals:
    """Sums over the tokens of every step and numbers of its rollouts, for the ``steps`` table."""

    _tokens: dict[int, dict[str, float]] = field(default_factory=dict)
    _rollouts: list[dict[str, Array]] = field(default_factory=list)

    def add_tokens(self, step: int, rows: pd.DataFrame) -> None:
        """Add token rows of one step, columns of the ``tokens`` table."""
        names = [c.name for c in TOKENS.stored if c.dtype != "str" and c.name in rows]
        given = {name: numbers(rows[name], len(rows)) for name in names}
        known = [name for name, values in given.items() if np.isfinite(values).any()]
        sums = self._tokens.setdefault(step, {})
        for name, value in token_sums(given, known).items():
            sums[name] = sums.get(name, 0.0) + float(value)

    def add_rollouts(self, frame: pd.DataFrame) -> None:
        """Add rollouts, columns of the ``rollouts`` table."""
        group = pd.to_numeric(frame.get("group", pd.Series(-1, frame.index)), errors="coerce")
        ends = frame.get("finish_reason", pd.Series(None, frame.index))
        cut = np.where(ends.notna(), ends == "length", np.nan)
        self._rollouts.append(
            {
                "step": frame["step"].to_numpy(np.int64),
                "group": group.fillna(-1).to_numpy(np.int64),
                "reward": numbers(frame["reward"], len(frame)),
                "length": numbers(frame.get("length"), len(frame)),
                "truncated": cut.astype(np.float64),
            }
        )

    def columns(self) -> dict[int, dict[str, float]]:
        """Columns of the ``steps`` table per step."""
        found = dict(self._rollout_columns())
        for step, sums in self._tokens.items():
            found[step] = found.get(step, {}) | step_columns(sums)
        return found

    def _rollout_columns(self) -> Iterable[tuple[int, dict[str, float]]]:
        if not self._rollouts:
            return
        names = self._rollouts[0]
        whole = {name: np.concatenate([part[name] for part in self._rollouts]) for name in names}
        order = np.argsort(whole["step"], kind="stable")
        steps, starts = np.unique(whole["step"][order], return_index=True)
        for step, rows in zip(steps.tolist(), np.split(order, starts[1:]), strict=True):
            columns = reward_columns(whole["reward"][rows], whole["group"][rows])
            lengths = {name: whole[name][rows] for name in ("length", "truncated")}
            # Only the tokens count tokens: a source may hold some of its completions.
            columns |= step_columns(rollout_sums(lengths))
            columns.pop("tokens", None)
            yield step, columns
