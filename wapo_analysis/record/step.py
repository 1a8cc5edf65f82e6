"""A step: what is collected while it trains, and what of it goes to the run folder."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import compress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wapo_analysis.derive import (
    class_totals,
    derive,
    merged_totals,
    reward_columns,
    rollout_sums,
    sequence_ratio,
    step_columns,
    token_sums,
)
from wapo_analysis.errors import UserError, first_line
from wapo_analysis.record.batches import BatchPass
from wapo_analysis.record.tokens import DeviceTotals, HostPass, TokenPass, given_in_all, on_host
from wapo_analysis.record.topk import TopTokens, chosen_rows
from wapo_analysis.schema import ROLLOUTS, TOKENS, TOPK
from wapo_analysis.table import Array, Records

#: Step columns of `outside_counts`.
OUTSIDE = ("grad_outside", "grad_before", "grad_after")
#: Rows that are derived and summed up at a time: their columns stay in the cache.
_BLOCK = 1 << 14

log = logging.getLogger(__name__)


@dataclass
class OpenStep:
    """What a recorder has been given since the last finished step."""

    #: Gradient passes whose rows have not been built.
    passes: list[TokenPass] = field(default_factory=list)
    #: The passes that came as padded tensors.
    batches: list[BatchPass] = field(default_factory=list)
    probes: list[Records] = field(default_factory=list)
    #: Derived token records that have been built already.
    settled: list[Records] = field(default_factory=list)
    #: Of each rollout that was watched, whether a gradient reached it; empty if one reached all.
    trained: list[bool] = field(default_factory=list)
    _given: list[frozenset[str]] = field(default_factory=list)
    _outside: list[Tensor] = field(default_factory=list)

    @property
    def rollouts(self) -> int:
        """Rollouts of the padded batches so far, each as often as it was passed."""
        return sum(len(batch.lengths) for batch in self.batches)

    def returned(self) -> bool:
        """Whether a gradient reached a pass; those that it did not reach are forgotten then.

        They were looked at, but not trained on: a loss called for logging, a batch that failed.
        """
        back = [b for b in self.batches if b.tokens.coef is not None]
        if back or not self.batches:
            if len(back) < len(self.batches):
                counts = [(b.tokens.coef is not None, len(b.lengths)) for b in self.batches]
                self.trained = [reached for reached, count in counts for _ in range(count)]
            for batch in self.batches:
                if batch.tokens.coef is None and batch.tokens.top is not None:
                    batch.tokens.top.ids = None
            gone = {id(batch.tokens) for batch in self.batches} - {id(b.tokens) for b in back}
            self.batches, self.passes = back, [p for p in self.passes if id(p) not in gone]
        return bool(back) or not self.batches

    def gaps(self) -> Iterator[str]:
        """What the gradients that came back, or did not, leave to be told."""
        given = "the logp given to watch"
        if any(b.tokens.coef is None and b.needs_grad for b in self.batches):
            yield (
                f"no gradient reached {given}: give the very tensor the loss "
                "is computed from; coef is recorded as missing"
            )
        if not all(b.needs_grad for b in self.batches):
            yield f"{given} has no graph (detach, no_grad?): coef is recorded as missing"
        if any(b.came > 1 for b in self.batches):
            yield (
                f"several gradients came back to {given}: coef is their sum, as of several "
                "backward passes; a torch.autograd.grad that only measures is in it, too"
            )

    def tell(self, told: set[str]) -> None:
        """Tell each gap once; ``told`` are those that have been."""
        for gap in set(self.gaps()) - told:
            log.warning(gap)
            told.add(gap)

    def tell_unfinished(self, last: int) -> None:
        """Say that what was trained on after the last finished step is lost."""
        if any(tokens.coef is not None for tokens in self.passes):
            log.warning(
                "what was watched after step %d is not recorded: its step was never finished "
                "(finish_step, or the optimizer's step for a watched loss)", last,
            )  # fmt: skip

    def forget_unknown_clips(self) -> None:
        """Take back the clip flags of passes where gradients do not tell and no bounds are known.

        One copy brings from the device which passes those are.
        """
        asked = [(b.tokens, b.mixed) for b in self.batches if not b.clip and b.mixed is not None]
        flags = torch.stack([mixed for _, mixed in asked]).tolist() if asked else []
        for (tokens, _), mixed in zip(asked, flags, strict=True):
            tokens.clipped = None if mixed else tokens.clipped

    def settle(self, step: int, rank: int, temperature: float) -> Records | None:
        """Build the rows of the passes so far; None without passes."""
        built = token_records(self._taken(), step, rank, temperature)
        self.settled += built
        return built[0] if built else None

    def job(
        self,
        row: dict[str, Any],
        rollouts: Mapping[str, Any],
        tops: Sequence[TopTokens] = (),
        **settings: Any,
    ) -> "StepJob":
        """Everything of the step for the writer; what the caller may write again is copied."""
        summed = self._summed_there(settings)
        passes = self._taken()
        given = frozenset.intersection(*self._given) if self._given else frozenset()
        others = [Records.concat(self.probes)] if self.probes else []
        count = len(rollouts["reward"]) if rollouts else 0
        if count:
            keys = {"step": np.full(count, row["step"]), "rank": np.full(count, settings["rank"])}
            own = {n: v.copy() if isinstance(v, np.ndarray) else v for n, v in rollouts.items()}
            others.insert(0, Records.build(ROLLOUTS, {**keys, **own}))
        read = [on_host(top) for top in tops if top.ids is not None]
        return StepJob(
            row, passes, self.settled, given, others, read, self._outside, summed, **settings
        )

    def _summed_there(self, settings: Mapping[str, Any]) -> list[DeviceTotals]:
        """Sum up on their device the passes of a step of which no token row will be written."""
        on_device = all(tokens.logp.device.type == "cuda" for tokens in self.passes)
        if settings.get("share", 1.0) > 0 or self.settled or not on_device:
            return []
        taken, self.passes = self.passes, []
        self._outside += [count for tokens in taken for count in tokens.outside]
        given = None if settings.get("sums") is None else given_in_all(taken)
        how = settings.get("temperature", 1.0), given, settings.get("sequence_level", False)
        return [DeviceTotals(tokens, *how) for tokens in taken]

    def _taken(self) -> list[HostPass]:
        taken, self.passes = self.passes, []
        self._outside += [count for tokens in taken for count in tokens.outside]
        self._given += [given_in_all(taken)] if taken else []
        return [on_host(tokens) for tokens in taken]


@dataclass
class StepJob:
    """Everything of one step of one process, on its way to the run folder."""

    #: Columns of the step line, ``step`` among them.
    row: dict[str, Any]
    #: Gradient passes whose rows have not been built.
    passes: list[HostPass]
    #: Derived token records that have been built already.
    tokens: list[Records]
    #: Statistics that every pass has.
    given: frozenset[str]
    #: Rollouts and probes.
    others: list[Records]
    #: The most probable tokens of a few rollouts.
    tops: list[HostPass] = field(default_factory=list)
    #: Of each pass, positions that got a gradient outside the loss mask, see `outside_counts`.
    outside: list[Tensor] = field(default_factory=list)
    #: Passes that were summed up where they are: no row of them is written.
    summed: list[DeviceTotals] = field(default_factory=list)
    rank: int = 0
    #: Softmax temperature of the statistics.
    temperature: float = 1.0
    #: Share of the rollouts whose token rows are written.
    share: float = 1.0
    #: What the tokens' sums are added to for the step columns; a column in ``row`` stays as it is.
    #: None if the row has all that tokens can tell.
    sums: Mapping[str, float] | None = None
    #: The clip looks at the ratio of the whole rollout.
    sequence_level: bool = False
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
        """Sum up tokens and classes, pick the rows to be written, let go of all others."""
        given = [
            *[Records(TOKENS, {c.name: r[c.name] for c in TOKENS.stored}) for r in self.tokens],
            *[Records.build(TOKENS, p.columns(self.step, self.rank)) for p in self.passes],
        ]
        if self.outside:
            counts = [count.tolist() for count in self.outside]
            places = OUTSIDE if all(len(count) == len(OUTSIDE) for count in counts) else OUTSIDE[:1]
            self.row |= {name: sum(c[k] for c in counts) for k, name in enumerate(places)}
            self.outside = []
        self.passes, self.tokens = [], []
        if self.summed:
            found = [totals.arrived(self.step, self.rank) for totals in self.summed]
            self.summed, self.row["token_fraction"] = [], self.share
            self._keep([totals for totals, _ in found], [sums for _, sums in found])
        if not given:
            return
        tokens = Records.concat(given) if len(given) > 1 else given[0]
        del given
        self._sum_up(tokens)
        self.row["token_fraction"] = self.share
        if self.share > 0:
            if self.share < 1:
                tokens = tokens.select(chosen_rows(tokens["rollout"], self.step, self.share))
            self._chosen = [tokens]

    def _sum_up(self, tokens: Records) -> None:
        """Step columns and class totals, a block of rows at a time: derived columns stay small."""
        columns = dict(tokens.columns)
        if self.sums is not None and self.sequence_level:
            columns["ratio"] = sequence_ratio(columns)
        totals, sums = [], []
        for start in range(0, max(1, len(tokens)), _BLOCK):
            end = start + _BLOCK
            block = Records(TOKENS, {name: values[start:end] for name, values in columns.items()})
            derived = derive(block, self.temperature)
            totals.append(class_totals(derived))
            if self.sums is not None:
                ratio = {"ratio": block["ratio"]} if "ratio" in columns else {}
                sums.append(pass_sums(derived.with_columns(ratio), self.given))
        self._keep(totals, sums)

    def _keep(self, totals: Sequence[Records], sums: Iterable[Mapping[str, float]]) -> None:
        """Class totals and sums of parts of the tokens, as those of the step."""
        self._totals = [totals[0] if len(totals) == 1 else merged_totals(totals)]
        if self.sums is not None:
            added = Counter[str]()
            for part in sums:
                added.update(part)
            self.row = step_columns({**added, **self.sums}) | self.row

    def records(self) -> list[Records]:
        """Tables to be written, once condensed: class totals, token rows, rollouts, probes."""
        return [*self._totals, *self._chosen, *self._top_records(), *self.others]

    def _top_records(self) -> list[Records]:
        """The most probable tokens of rollouts whose own rows are written."""
        built = [Records.build(TOPK, top.columns(self.step, self.rank)) for top in self.tops]
        if not built:
            return []
        rows = Records.concat(built)
        kept = rows.select(chosen_rows(rows["rollout"], self.step, self.share))
        return [kept] if len(kept) else []


def token_records(
    passes: Iterable[HostPass], step: int, rank: int, temperature: float
) -> list[Records]:
    """Derived token records of some passes as one table; none without passes."""
    built = [Records.build(TOKENS, p.columns(step, rank)) for p in passes]
    return [derive(Records.concat(built), temperature)] if built else []


def pass_sums(
    tokens: Records, given: frozenset[str], sequence_level: bool = False
) -> dict[str, float]:
    """Sums for the step columns, see `wapo_analysis.derive.token_sums`.

    Parameters
    ----------
    tokens : Records
        Derived token records of the passes.
    given : frozenset of str
        Statistics that every pass has, see `given_in_all`.
    sequence_level : bool
        The clip looks at the ratio of the whole rollout.
    """
    columns = dict(tokens.columns)
    if sequence_level:
        columns["ratio"] = sequence_ratio(columns)
    return {name: float(value) for name, value in token_sums(columns, given).items()}


def rollout_table(batches: Sequence[BatchPass]) -> dict[str, Any]:
    """Rollout, group, advantage and length of every rollout of a step, each once, by number.

    One copy brings all of it from the device.
    """
    if not batches:
        return {}
    names = ("rollouts", "groups", "advantages", "lengths")
    stacked = torch.cat(
        [torch.stack([getattr(b, name).detach().double() for name in names]) for b in batches], 1
    )
    rollout, group, advantage, length = stacked.cpu().numpy()
    numbers, first = np.unique(rollout, return_index=True)
    return {
        "rollout": numbers.astype(np.int64),
        "group": group[first].astype(np.int64),
        "advantage": advantage[first],
        "length": length[first],
    }


@dataclass(frozen=True)
class StepRollouts:
    """What the watched batches of a step and its rewards say."""

    #: Columns of the ``steps`` table.
    row: dict[str, float]
    #: Columns of the ``rollouts`` table; empty without a reward for each rollout.
    columns: dict[str, Any]
    #: Sums over rollouts, see `wapo_analysis.derive.rollout_sums`.
    sums: dict[str, float]


def step_rollouts(
    batches: Sequence[BatchPass],
    reward: Tensor | Sequence[float] | float | None,
    prompts: Sequence[str] | None = None,
    completions: Sequence[str] | None = None,
    trained: Sequence[bool] = (),
) -> StepRollouts:
    """Rollouts of a step from its batches and what the caller knows; see `Recorder.finish_step`.

    What is given for all rollouts of `OpenStep.trained` is kept of those with rows; the step's
    reward is that of all. Raises UserError if rewards or texts are not as many as the rollouts that
    were watched.
    """
    table = rollout_table(batches)
    sums = rollout_sums({"length": table["length"]} if table else {})
    row: dict[str, float] = step_columns(sums)
    if reward is None:
        return StepRollouts(row, {}, sums)
    rewards = _numbers(reward)
    if rewards.ndim == 0:
        return StepRollouts({**row, "reward": float(rewards)}, {}, sums)
    given = {"reward": rewards, "prompt": prompts, "completion": completions}
    own = bool(table) and np.array_equal(table["rollout"], np.flatnonzero(trained))
    for name, values in given.items():
        if values is not None and table:
            of_all = own and len(values) == len(trained)
            table[name] = list(compress(values, trained) if of_all else values)
    _check_counts(table)
    groups = table.get("group") if len(table.get("reward", rewards)) == len(rewards) else None
    return StepRollouts({**row, **reward_columns(rewards, groups)}, table, sums)


def _numbers(values: Tensor | Sequence[float] | float) -> Array:
    """Rewards, shape (R,) or (), also of a column (R, 1).

    Raises UserError if they are no numbers, or several of a rollout.
    """
    given = values.detach().double().cpu().numpy() if isinstance(values, Tensor) else values
    try:
        found = np.asarray(given, np.float64)
    except (TypeError, ValueError) as error:
        said = first_line(error)
        raise UserError(f"reward must be one number for each rollout: {said}") from error
    if found.ndim > 1 and found.size != len(found):
        raise UserError(f"reward must be one number for each rollout, got shape {found.shape}")
    return found.flatten() if found.ndim > 1 else found


def number(name: str, value: Any) -> Any:
    """Value of a step column, of a tensor too. Raises UserError if that holds several."""
    if isinstance(value, Tensor) and value.numel() != 1:
        raise UserError(f"step column {name!r} must be a number, got shape {tuple(value.shape)}")
    return value.item() if isinstance(value, Tensor) else value


def _check_counts(rollouts: Mapping[str, Any]) -> None:
    """Per-rollout values must be as many as the rollouts that were watched."""
    for name, values in rollouts.items():
        if len(values) != len(rollouts["rollout"]):
            raise UserError(
                f"{name} has {len(values)} values, but {len(rollouts['rollout'])} rollouts were "
                "watched; where a step passes a rollout more than once, give rollouts to "
                "watch"
            )
