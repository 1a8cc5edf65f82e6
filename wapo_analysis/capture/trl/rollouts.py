"""Rollouts and numbers of a step: who is who through shuffle and split, rewards, log entries.

Every generated batch gets a tensor of rollout numbers. TRL shuffles and splits all tensors of the
batch in unison, so each gradient pass still knows its rollouts.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from wapo_taxonomy import CLASSES

from wapo_analysis.capture.trl.trainer import OLD_LOGPS, TrlTrainer, loss_mask
from wapo_analysis.derive import reward_columns, rollout_sums, token_sums
from wapo_analysis.record.step import pass_sums
from wapo_analysis.record.tokens import repetition
from wapo_analysis.table import Array, Records

ID_KEY = "wapo_rollout"
_ANSWERS = ("answer", "solution", "ground_truth", "label", "target")
SHOWN = (*CLASSES, "none", "unknown")
_CODES = (*range(len(CLASSES)), len(CLASSES), -1)
_NONE = dict.fromkeys(("advantage", "cls", "pred_dentropy", "grad_norm"), np.zeros(0))


@dataclass
class Generation:
    """One generated batch as this process sees it; B rollouts of this process."""

    #: Place of this process's first rollout within the batch of all processes.
    first: int
    #: Columns of the rollouts table without ``group`` and ``rollout``, B entries each.
    columns: dict[str, Any]
    #: (rollouts of all processes,).
    rewards: Array
    #: (B,).
    repetition: Array
    #: Rows among the B that gradient passes of the current step have seen.
    used: set[int] = field(default_factory=set)


class RolloutReader:
    """Numbers the rollouts of every generated batch and keeps what describes them.

    Rollouts are numbered from 0 within an optimizer step, over all processes; a step that
    accumulates over several generated batches counts on. The numbers in the batch itself count
    over the whole run.
    """

    def __init__(self, trainer: TrlTrainer) -> None:
        self._trainer = trainer.raw
        self._rewards: Tensor | None = None
        self._scored: list[Tensor] = []
        self._batches: dict[int, Generation] = {}
        self._order: list[int] = []
        self._made = 0

    def start_step(self) -> None:
        """Forget what the next step cannot need: all batches but the last."""
        self._batches = {k: b for k, b in self._batches.items() if k == self._made - 1}
        self._order = []
        for batch in self._batches.values():
            batch.used = set()

    def take_rewards(self, rewards_per_func: Tensor) -> None:
        """Keep the (rollouts of all processes, reward functions) matrix of the coming batch."""
        self._rewards = rewards_per_func.detach()

    def take_scores(self, logps_BT: Tensor) -> None:
        """Keep log-probabilities that were scored while the coming batch was made."""
        self._scored.append(logps_BT.detach())

    def take_batch(self, examples: Sequence[dict[str, Any]], batch: dict[str, Any]) -> None:
        """Number the rollouts of a generated batch, in place, and describe them."""
        ids_BT = batch["completion_ids"]
        accelerator, count = self._trainer.accelerator, len(ids_BT)
        first, self._total = accelerator.process_index * count, accelerator.num_processes * count
        start = self._made * self._total + first
        batch[ID_KEY] = torch.arange(start, start + count, device=ids_BT.device)
        self._keep_old(batch)
        ends, stopped = self._ends(batch)
        ids = [row[:n] for row, n in zip(ids_BT.tolist(), ends.tolist(), strict=True)]
        own = loss_mask(batch).sum(dim=1)
        rewards = self._total_rewards()
        columns = {
            "prompt": self._prompts(examples, batch),
            "completion": self._decode(ids, skip_special_tokens=True),
            "answer": [_answer(example) for example in examples],
            "reward": rewards[first : first + count].tolist(),
            "advantage": _per_rollout(batch).tolist(),
            # Tokens the policy wrote, as TRL counts them; those of a tool are none of its own.
            "length": torch.where(own > 0, own, ends).tolist(),
            "finish_reason": ["stop" if s else "length" for s in stopped.tolist()],
        }
        repeated = np.array([repetition(row) for row in ids])
        self._batches[self._made] = Generation(first, columns, rewards, repeated)
        self._made += 1

    def numbers(self, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """Rollout and group of each row of a gradient pass, and a note that it was used.

        Returns
        -------
        rollout, group : Tensor of int64, shape (B,)
            For a batch that was generated before attaching: plain row numbers, group -1.
        """
        numbers = inputs.get(ID_KEY)
        if numbers is None:
            ids_BT = inputs["completion_ids"]
            rollout = torch.arange(len(ids_BT), device=ids_BT.device)
            return rollout, torch.full_like(rollout, -1)
        made = int(numbers[0]) // self._total
        if made not in self._order:
            self._order.append(made)
        place = numbers - made * self._total
        batch = self._batches[made]
        batch.used.update((place - batch.first).tolist())
        rollout = place + self._order.index(made) * self._total
        return rollout, rollout // self._trainer.num_generations

    def _used(self) -> list[tuple[int, Generation, list[int]]]:
        """Batches of the step: place in it, batch, rows; the last whole batch if none was seen."""
        if self._order:
            order = [self._batches[made] for made in self._order]
            return [(k, batch, sorted(batch.used)) for k, batch in enumerate(order)]
        return [(0, b, list(range(len(b.repetition)))) for b in list(self._batches.values())[-1:]]

    def columns(self) -> dict[str, list[Any]]:
        """Columns of the rollouts table for the rollouts this step used."""
        table: dict[str, list[Any]] = {}
        for place, batch, rows in self._used():
            rollout = [place * self._total + batch.first + row for row in rows]
            group = [number // self._trainer.num_generations for number in rollout]
            picked = {name: [values[r] for r in rows] for name, values in batch.columns.items()}
            for name, values in {"group": group, "rollout": rollout, **picked}.items():
                table.setdefault(name, []).extend(values)
        return table

    def sums(self) -> dict[str, float]:
        """Sums over the rollouts this step used, on this process."""
        table, used = self.columns(), self._used()
        return rollout_sums(
            {
                "length": np.array(table.get("length", []), np.float64),
                "truncated": np.array([end == "length" for end in table.get("finish_reason", [])]),
                "repetition": np.array([b.repetition[row] for _, b, rows in used for row in rows]),
            }
        )

    def statistics(self) -> dict[str, float]:
        """Step columns decided by the rewards of the step's whole batches, all processes."""
        used = self._used()
        if not used:
            return {}
        rewards = np.concatenate([batch.rewards for _, batch, _ in used])
        return reward_columns(rewards, np.arange(len(rewards)) // self._trainer.num_generations)

    def _total_rewards(self) -> Array:
        """Weighted sum of the reward functions, as the trainer adds them; NaN if not known."""
        rewards, self._rewards = self._rewards, None
        if rewards is None or len(rewards) != self._total:
            return np.full(self._total, np.nan)
        weights = getattr(self._trainer, "reward_weights", None)
        if weights is not None:
            rewards = rewards * weights.to(rewards.device).unsqueeze(0)
        total = rewards.nansum(dim=1).double()
        total[rewards.isnan().all(dim=1)] = torch.nan
        return np.asarray(total.cpu().numpy())

    def _keep_old(self, batch: dict[str, Any]) -> None:
        """Let old log-probabilities of each token travel with a batch that has but their sum."""
        scored, self._scored = self._scored, []
        if "old_logps" not in batch:
            return
        mask = batch["completion_mask"]
        for logps_BT in scored:
            if torch.equal((logps_BT * mask).sum(1), batch["old_logps"]):
                batch[OLD_LOGPS] = logps_BT

    def _ends(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Where each completion ends, and whether it ended by itself.

        A masked-out completion (``mask_truncated_completions``) still has its tokens.
        """
        ids_BT = batch["completion_ids"]
        ends = torch.zeros_like(ids_BT, dtype=torch.bool)
        for token in self._end_tokens():
            ends |= ids_BT == token
        masked = batch["completion_mask"].sum(dim=1)
        last = (masked - 1).clamp(min=0)
        stopped = ends.gather(1, last.unsqueeze(1)).squeeze(1) & (masked > 0)
        return torch.where(masked > 0, masked, ids_BT.shape[1]), stopped

    def _end_tokens(self) -> list[int]:
        config = getattr(self._trainer, "generation_config", None)
        found = [getattr(config, "eos_token_id", None), self._tokenizer().eos_token_id]
        flat = [token for item in found for token in (item if isinstance(item, list) else [item])]
        return sorted({token for token in flat if token is not None})

    def _tokenizer(self) -> Any:
        processing = self._trainer.processing_class
        return getattr(processing, "tokenizer", processing)

    def _decode(self, rows: list[list[int]], **options: bool) -> list[str]:
        return list(self._tokenizer().batch_decode(rows, **options))

    def _prompts(self, examples: Sequence[dict[str, Any]], batch: dict[str, Any]) -> list[str]:
        given = [example.get("prompt") for example in examples]
        if len(given) == len(batch["prompt_ids"]) and all(isinstance(p, str) for p in given):
            return [str(p) for p in given]
        ids, mask = batch["prompt_ids"], batch["prompt_mask"].bool()
        return self._decode([row[keep].tolist() for row, keep in zip(ids, mask, strict=True)])

    def texts(self, ids: list[int]) -> list[str]:
        """Text of single tokens, for the vocabulary of the run."""
        return self._decode([[token] for token in ids])


def _per_rollout(batch: dict[str, Any]) -> Tensor:
    """Advantage of each rollout, shape (B,); the mean over its tokens if they differ."""
    advantages: Tensor = batch["advantages"].detach().float()
    if advantages.dim() == 1:
        return advantages
    mask = batch["completion_mask"].to(advantages.dtype)
    mean: Tensor = (advantages * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)
    return mean


def _answer(example: dict[str, Any]) -> str | None:
    found = [example[name] for name in _ANSWERS if example.get(name) is not None]
    return str(found[0]) if found else None


def log_sums(
    tokens: Records | None, given: frozenset[str] = frozenset(), sequence_level: bool = False
) -> dict[str, float]:
    """Sums over the tokens of a step: those of the step columns, and of every class.

    The names are always the same. Missing statistics are left out of their sum and their count.

    Parameters
    ----------
    tokens : Records or None
        Token records with derived columns; None is no tokens, and every sum 0.
    given : frozenset of str
        Statistics that every pass has.
    sequence_level : bool
        The clip looks at the ratio of the whole rollout.
    """
    columns = _NONE if tokens is None else tokens.columns
    sums = token_sums(_NONE) if tokens is None else pass_sums(tokens, given, sequence_level)
    sums = {name: float(value) for name, value in sums.items()}
    for name, code in zip(SHOWN, _CODES, strict=True):
        chosen = columns["cls"] == code
        flow = columns["pred_dentropy"][chosen]
        sums[f"tokens/{name}"] = float(chosen.sum())
        sums[f"grad_mass/{name}"] = float(np.nansum(columns["grad_norm"][chosen]))
        sums[f"flow/{name}"] = float(np.nansum(flow))
        sums[f"flow_tokens/{name}"] = float(np.isfinite(flow).sum())
    return sums


def no_sums() -> dict[str, float]:
    """`log_sums` and `RolloutReader.sums` of nothing: names that all processes add up."""
    none = dict.fromkeys(("length", "truncated", "repetition"), np.zeros(0))
    return {**log_sums(None), **rollout_sums(none)}


def log_entries(sums: Mapping[str, float], columns: Mapping[str, float]) -> dict[str, float]:
    """Numbers for the trainer's own log, under ``wapo/``; missing ones are left out.

    Returns ``entropy_pos``, ``entropy_neg`` (nats); per class ``share`` (of all tokens),
    ``grad_share`` (of the summed |dL/dz|) and ``entropy_flow`` (summed first-order dH of one unit
    of learning rate, nats), the last only where every token of the step has it; ``grad_mass`` in
    all. ``sums``: of `log_sums`; ``columns``: step columns of the same step.
    """
    entries = {name: columns[name] for name in ("entropy_pos", "entropy_neg") if name in columns}
    total = sum(sums[f"grad_mass/{name}"] for name in SHOWN)
    measured = sums["rows"] - sums["tokens/unknown"]
    if measured:
        entries["grad_mass"] = total
    flow_known = all(sums[f"flow_tokens/{n}"] == sums[f"tokens/{n}"] for n in CLASSES)
    for name in CLASSES:
        if measured:
            entries[f"share/{name}"] = sums[f"tokens/{name}"] / sums["rows"]
            entries[f"grad_share/{name}"] = _ratio(sums[f"grad_mass/{name}"], total)
        if measured and flow_known:
            entries[f"entropy_flow/{name}"] = sums[f"flow/{name}"]
    return {f"wapo/{name}": value for name, value in entries.items() if math.isfinite(value)}


def _ratio(total: float, count: float) -> float:
    return total / count if count else math.nan
