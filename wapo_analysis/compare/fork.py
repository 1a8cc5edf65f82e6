"""A fork beside the run it was forked from: the same prompts and noise, one thing changed.

Rewards are paired by prompt: those of one step and prompt in both runs, so that what the prompts
decide cancels. An interval is over the pairs, of these two runs; what another seed would give is
not in it.
"""

from dataclasses import dataclass
from functools import cached_property
from math import isfinite
from typing import Any

import numpy as np
import pandas as pd

from wapo_analysis.compare.table import EDGE, Interval
from wapo_analysis.diagnose import VERDICT_WORDS, diagnose
from wapo_analysis.errors import UserError
from wapo_analysis.results import Block, Grid, Items, Result, Say, Section, plain, short, step_words
from wapo_analysis.settings import shown_value
from wapo_analysis.store import Run

#: Prompts with the largest differences that are shown, each way.
SHOWN = 3


@dataclass(frozen=True)
class ForkComparison(Result):
    """What a change made of a run."""

    original: Run
    fork: Run

    @property
    def step(self) -> int:
        """Last step both have in common; the change is in force from the next one."""
        return int(self.fork.manifest["forked"]["step"])

    @property
    def change(self) -> dict[str, tuple[Any, Any]]:
        """Setting to its value in the original and in the fork."""
        change = self.fork.manifest["forked"].get("change") or {}
        return {name: (old, new) for name, (old, new) in change.items()}

    @cached_property
    def steps(self) -> pd.DataFrame:
        """Reward and entropy (nats) of the steps after the fork that both runs have.

        Index step; columns ``reward_original``, ``reward_fork``, ``entropy_original``,
        ``entropy_fork``.
        """
        tables = []
        for name, run in (("original", self.original), ("fork", self.fork)):
            table = run.steps[run.steps["step"] > self.step].set_index("step")
            tables.append(table[["reward", "entropy"]].astype(float).add_suffix(f"_{name}"))
        return pd.concat(tables, axis=1, join="inner").sort_index()

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """Mean reward of every prompt of every shared step.

        Columns step, group, prompt, original, fork, difference (fork minus original). Empty if a
        run has no rollouts with prompts.
        """
        first, second = (self._by_prompt(run) for run in (self.original, self.fork))
        keys = ["step", "group", "prompt"]
        both = first.merge(second, on=keys, suffixes=("_original", "_fork"))
        both.columns = pd.Index([*keys, "original", "fork"])
        return both.assign(difference=both["fork"] - both["original"])

    def _by_prompt(self, run: Run) -> pd.DataFrame:
        rows = run.rollouts
        rows = rows[rows["step"].isin(self.steps.index) & rows["prompt"].notna()]
        return rows.groupby(["step", "group", "prompt"])["reward"].mean().reset_index()

    @property
    def last(self) -> pd.Index:
        """The last tenth of the shared steps, at least one."""
        return self.steps.index[-max(1, round(len(self.steps) * EDGE)) :]

    @cached_property
    def reward(self) -> Interval:
        """Fork minus original over all prompts of the shared steps, with its 95% interval."""
        return Interval.of(self.prompts["difference"].to_numpy(np.float64))

    @cached_property
    def reward_at_end(self) -> Interval:
        """The same over the last tenth of the steps."""
        late = self.prompts["step"].isin(self.last)
        return Interval.of(self.prompts.loc[late, "difference"].to_numpy(np.float64))

    @cached_property
    def at_end(self) -> dict[str, float]:
        """Means over the last tenth of the steps, by the columns of ``steps``."""
        return {str(k): float(v) for k, v in self.steps.loc[self.last].mean().items()}

    @cached_property
    def verdicts(self) -> tuple[str, str]:
        """Diagnosis of the original and of the fork, in words."""
        found = (diagnose(run).verdict for run in (self.original, self.fork))
        first, second = (VERDICT_WORDS[verdict] for verdict in found)
        return first, second

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        differences = self.prompts["difference"]
        found: dict[str, Any] = plain(
            {
                "original": str(self.original.path),
                "fork": str(self.fork.path),
                "forked": self.fork.manifest["forked"],
                "steps": [int(step) for step in self.steps.index],
                "pairs": len(self.prompts),
                "reward_difference": self.reward.to_dict(),
                "reward_difference_at_end": self.reward_at_end.to_dict(),
                "at_end": self.at_end,
                "prompts": {
                    "better": int((differences > 0).sum()),
                    "equal": int((differences == 0).sum()),
                    "worse": int((differences < 0).sum()),
                },
                "verdict": {"original": self.verdicts[0], "fork": self.verdicts[1]},
                "series": {name: list(column) for name, column in self.steps.items()},
            }
        )
        return found

    def page(self) -> Section:
        """What was changed, what came of it, and at which prompts."""
        parts: list[Block] = [Say(self._what())]
        parts += [Say(note) for note in self.fork.manifest["forked"].get("notes") or ()]
        if self.steps.empty:
            parts.append(Say("The two runs share no step after the fork, so nothing is compared."))
            return Section(f"{self.fork.name}", parts)
        parts += [Say(self._verdict()), Grid(self._rows(), left=1)]
        if not self.prompts.empty:
            parts.append(Section("Prompts with the largest differences", [Items(self._largest())]))
        return Section(f"{self.fork.name}", parts)

    def _what(self) -> str:
        told = [
            f"{name} {_shown(name, old)} -> {_shown(name, new)}"
            for name, (old, new) in self.change.items()
        ]
        first = self.step + 1
        return (
            f"Fork of {self.original.path}: the same prompts and sampling noise, from step {first} "
            f"on with {', '.join(told) or 'nothing changed'}."
        )

    def _verdict(self) -> str:
        span = step_words(self.steps.index)
        if self.reward.n == 0:
            return f"Over {span} the rewards cannot be paired: a run has no prompts."
        paired = f"paired by {self.reward.n} prompts"
        if not self.prompts["difference"].any():
            return f"Over {span}, {paired}, every reward is the same."
        if not isfinite(self.reward.half):
            return f"Over {span}, {paired}, reward differs by {self.reward.mean:+.3g}."
        low, high = (self.reward.mean + sign * self.reward.half for sign in (-1, 1))
        clear = "" if self.reward.clear else ": no clear difference"
        return (
            f"Over {span}, {paired}, reward changes by {self.reward.mean:+.3g} (95% interval "
            f"{low:+.3g} to {high:+.3g}, over prompts of these two runs){clear}."
        )

    def _rows(self) -> list[list[str]]:
        end, late = self.at_end, self.last
        when = step_words(late)
        difference = self.reward_at_end
        shown = f"{difference.mean:+.3g}"
        if isfinite(difference.half):
            shown += f" ± {difference.half:.2g}"
        entropy = end["entropy_fork"] - end["entropy_original"]
        first, second = self.verdicts
        return [
            ["quantity", "original", "fork", "difference"],
            [f"reward, {when}", short(end["reward_original"]), short(end["reward_fork"]),
             shown if difference.n else "n/a"],
            [f"entropy, {when} (nats)", short(end["entropy_original"]),
             short(end["entropy_fork"]), f"{entropy:+.3g}"],
            ["diagnosis", first, second, "" if first == second else "changed"],
        ]  # fmt: skip

    def _largest(self) -> list[str]:
        ranked = self.prompts.sort_values("difference", kind="stable")
        worst = ranked[ranked["difference"] < 0].head(SHOWN)
        best = ranked[ranked["difference"] > 0].tail(SHOWN)[::-1]
        counts = self.to_dict()["prompts"]
        lines = [f"{counts['better']} better, {counts['worse']} worse, {counts['equal']} equal"]
        for row in (*best.itertuples(), *worst.itertuples()):
            lines.append(f"step {row.step}, {row.prompt!r}: {row.original:.2f} -> {row.fork:.2f}")
        return lines


def compare_fork(fork: Run, original: Run | None = None) -> ForkComparison:
    """Compare a fork to the run it was forked from.

    Raises UserError if it is no fork, or its original is not there any more. ``fork``: a run that
    `wapo fork` wrote; ``original``: None opens the folder that the fork's manifest names.
    """
    forked = fork.manifest.get("forked")
    if not forked:
        raise UserError(f"{fork.path} is no fork; wapo fork RUN --at STEP makes one")
    if original is None:
        from pathlib import Path

        from wapo_analysis.store import open_run

        original = open_run(Path(forked["run"]))
    return ForkComparison(original, fork)


def _shown(name: str, value: Any) -> str:
    """A setting's value; to include no class by name is to train on all of them.

    Examples
    --------
    >>> _shown("include_bins", []), _shown("exclude_bins", []), _shown("lr", 1e-4)
    ('all', 'none', '1e-4')
    """
    return "all" if name == "include_bins" and not value else shown_value(value)
