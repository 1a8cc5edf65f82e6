"""Checks of one golden case, advantage row or hazard: recompute, then compare everything stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.gold import metrics
from tests.gold.batch_metrics import batch_metrics, overlap_metrics
from tests.gold.compare import Check, check
from tests.gold.folders import Case
from tests.gold.hazards import replay_hazard
from tests.gold.replay import Replay, replay_case
from wapo_analysis.objectives.config import ObjectiveConfig, group_advantages
from wapo_analysis.objectives.table import OBJECTIVES
from wapo_analysis.objectives.weights import batch_weights

PRECISIONS = {"float64": (torch.float64, "f64"), "float32": (torch.float32, "f32")}

_STORED_IN_FLOAT64_ONLY = "grad_logits"


@dataclass(frozen=True, slots=True)
class ItemResult:
    """Checks of one case, advantage row or hazard."""

    name: str
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """All checks passed, and there was at least one."""
        return bool(self.checks) and all(c.passed for c in self.checks)

    @property
    def failures(self) -> tuple[str, ...]:
        """One line per failed check."""
        return tuple(str(c) for c in self.checks if not c.passed)


def _array_checks(case: Case, replay: Replay, precision: str) -> Iterator[Check]:
    """Compare every array; per-token arrays inside the valid part of each row only."""
    length = case.arrays["input_ids"].shape[1] - 1
    valid = np.arange(length) < case.arrays["seq_len"][:, None] - 1
    for name, found in replay.arrays.items():
        if name == _STORED_IN_FLOAT64_ONLY and precision == "float32":
            continue
        stored = case.arrays.get(f"{name}__{PRECISIONS[precision][1]}", case.arrays.get(name))
        if stored is not None and found.shape == stored.shape:
            if name == "grad_logits":
                found, stored = found[:, :-1][valid], stored[:, :-1][valid]
            elif found.shape == valid.shape:
                found, stored = found[valid], stored[valid]
        yield check(name, precision, found, stored)


def _value_checks(case: Case, replay: Replay, precision: str) -> Iterator[Check]:
    recorded = {**case.meta.get("orchestrator", {}), **case.meta.get(precision, {})}
    for name, found in replay.values.items():
        yield check(name, precision, found, recorded.get(name))


def _batch_checks(
    recorded: Mapping[str, Any],
    rewards: NDArray[np.float64],
    advantages: NDArray[np.float64],
    group: NDArray[np.int64],
    tokens: list[list[int]],
    masks: list[list[int]],
) -> Iterator[Check]:
    """Compare batch metrics and group counts; rewards of single metrics are not recomputable."""
    found = {
        **batch_metrics(rewards, advantages, group, masks),
        **overlap_metrics(tokens, advantages, group),
    }
    stored = {
        key: value
        for key, value in recorded.get("metrics", {}).items()
        if not key.startswith("reward/") or key == "reward/std"
    }
    yield check("batch_metrics", "float64", found, stored)
    signed = [np.unique(group[advantages > 0]).size, np.unique(group[advantages < 0]).size]
    keys = ("num_groups_with_pos_adv", "num_groups_with_neg_adv")
    yield check("signed_groups", "float64", signed, [recorded.get(key, -1) for key in keys])


def _case_batch_checks(case: Case, replay: Replay) -> Iterator[Check]:
    a, recorded = case.arrays, case.meta.get("orchestrator", {})
    ends = list(zip(a["prompt_len"].tolist(), a["seq_len"].tolist(), strict=True))
    tokens = [row[:end] for row, (_, end) in zip(a["input_ids"].tolist(), ends, strict=True)]
    masks = [row[p:end] for row, (p, end) in zip(a["loss_mask"].tolist(), ends, strict=True)]
    group = a["group_ids"].astype(np.int64)
    advantages = replay.arrays["advantages"]
    yield from _batch_checks(recorded, a["rewards"], advantages, group, tokens, masks)
    per_rank = np.bincount(a["process_index"], weights=a["loss_mask"].sum(1)).tolist()
    yield check("items", "float64", per_rank, recorded.get("items_per_process"))


def check_case(case: Case) -> ItemResult:
    """Replay one case in both precisions and compare everything it stores.

    Parameters
    ----------
    case : Case
        Golden case (`folders.read_case`).

    Returns
    -------
    ItemResult
        One check per quantity and precision.
    """
    checks: list[Check] = []
    for precision, (dtype, _) in PRECISIONS.items():
        replay = replay_case(case, dtype)
        checks += _array_checks(case, replay, precision)
        checks += _value_checks(case, replay, precision)
        if precision == "float64":
            checks += _case_batch_checks(case, replay)
    return ItemResult(case.name, tuple(checks))


def _items(row: Mapping[str, Any]) -> list[list[float]]:
    """Loss-mask tokens per micro-batch, nested per rank."""
    counts = [sum(mask) for mask in row["completion_mask"]]
    size, micro = len(counts) // row["num_processes"], row["micro_batch_size"]
    blocks = [counts[start : start + size] for start in range(0, len(counts), size)]
    return [[sum(b[i : i + micro]) for i in range(0, len(b), micro)] for b in blocks]


def _row_config(row: Mapping[str, Any]) -> ObjectiveConfig:
    """Objective of an advantage row; what no advantage depends on has any allowed value."""
    return ObjectiveConfig(
        name=row["loss_type"],
        loss_mean_level=row["loss_mean_level"],
        mask_negative_advantages=row["mask_negative_advantages_effective"],
        mask_positive_advantages=row["mask_positive_advantages"],
        max_seq_len=row["max_seq_len"],
        official=True,
    )


def check_advantage_row(index: int, row: Mapping[str, Any]) -> ItemResult:
    """Compare advantages, weights, normaliser and batch metrics of one row of advantages.json.

    Parameters
    ----------
    index : int
        Position in the file, for the name.
    row : mapping
        The row.
    """
    config, out, masks = _row_config(row), row["out"], row["completion_mask"]
    group = np.asarray(out["group_ids"], dtype=np.int64)
    rewards = np.asarray(row["rewards"], dtype=np.float64)
    kind = OBJECTIVES[config.name].advantage
    advantages = group_advantages(kind, rewards, group, official=True)
    counts = [sum(mask) for mask in masks]
    weights = batch_weights(config, advantages, counts, group, row["rollouts_per_example"])
    tokens = [p + c for p, c in zip(row["prompt_ids"], row["completion_ids"], strict=True)]
    compared: dict[str, tuple[Any, Any]] = {
        "advantages": (advantages, out.get("advantages")),
        "seq_loss_weights": (weights.sequence_weight.numpy(), out.get("seq_loss_weights")),
        "loss_normalizer": (weights.normalizer, out.get("loss_normalizer")),
        "items": (np.ravel(_items(row)), np.ravel(out["items_per_microbatch"])),
    }
    checks = [check(name, "float64", *pair) for name, pair in compared.items()]
    checks += _batch_checks(out, rewards, advantages, group, tokens, masks)
    return ItemResult(
        f"advantages.json row {index} ({config.name}, {row.get('reward_kind', 'rewards')})",
        tuple(checks),
    )


def _numbers(stored: Any) -> Any:
    """Turn "nan", "inf" and "-inf" inside nested lists into floats."""
    return None if stored is None else np.asarray(stored, dtype=np.float64)


def _column(stored: Any, key: str) -> dict[str, float]:
    """One field of a mapping of records, as floats."""
    return {name: float(record[key]) for name, record in (stored or {}).items()}


def _named(names: Iterable[str], values: Any) -> dict[str, float]:
    return dict(zip(names, np.ravel(values).tolist(), strict=True))


def _hazard_diagnostics(
    view: metrics.Microbatch, out: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Recomputed and stored diagnostics by quantity."""
    sums, numbers = metrics.summaries(view)
    edges = list(metrics.PROB_BINS.values())
    mass, tokens = metrics.binned([view], [metrics.grad_magnitude(view)], edges)
    names = [f"{name}/{sign}" for name in metrics.PROB_BINS for sign in ("pos", "neg")]
    bins = [f"{name}_{kind}" for name in metrics.TOKEN_BINS for kind in ("eligible", "kept")]
    strength = metrics.token_strength(view)[view.mask].numpy()
    counts = _named([f"token_count/{n}" for n in names], tokens)
    keys = metrics.SUMMARY_KEYS
    return {
        "clip_counts": (_named(metrics.COUNT_KEYS, metrics.clip_counts(view)), out.get("clipped")),
        "bin_counts": (_named(bins, metrics.bin_counts(view)), out.get("bin_counts")),
        "token_counts": (counts, out.get("token_counts")),
        "grad_mass": (
            _named([f"grad_mass/{n}" for n in names], mass),
            _column(out.get("grad_mass"), "sum"),
        ),
        "token_strength": (strength, _numbers(out.get("token_strength_of_loss_mask_tokens"))),
        "summaries": (_named(keys, sums), _column(out.get("summaries"), "sum")),
        "summary_counts": (_named(keys, numbers), _column(out.get("summaries"), "count")),
    }


def check_hazard(row: Mapping[str, Any]) -> ItemResult:
    """Repeat one row of hazards.json in parity mode and compare loss, gradient and counters.

    Parameters
    ----------
    row : mapping
        The row; non-finite numbers are the strings nan, inf and -inf.
    """
    output, coef, view = replay_hazard(row)
    out = row["out"]
    compared = {
        "loss": (output.loss.item(), _numbers(out.get("loss"))),
        "dloss_dlogp": (coef.numpy(), _numbers(out.get("dloss_dlogp"))),
        **_hazard_diagnostics(view, out),
    }
    checks = tuple(check(name, row["dtype"], *pair) for name, pair in compared.items())
    return ItemResult(f"hazards.json {row['name']}", checks)
