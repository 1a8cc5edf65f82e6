"""One step for the page: class totals, rollouts, and its token rows packed into few bytes.

Token numbers are rounded to ten bits of mantissa: three digits, what a page shows. The run keeps
the exact ones.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import wapo_taxonomy as tax

from wapo_analysis.derive import class_codes
from wapo_analysis.report.data import Json, plain_list
from wapo_analysis.results import distinguishing
from wapo_analysis.store import Run
from wapo_analysis.store.parquet import round_mantissa
from wapo_analysis.table import Array

KEEP_BITS = 10
_TOP = ("rollout", "position", "token_id", "prob", "prob_after")
KEYS = ["group", "rollout", "position"]
FLOATS = ("logp", "entropy", "grad_norm", "pred_dentropy", "dprob", "dentropy", "coef")
#: Most characters of a prompt or completion; a page says where it cut.
MAX_TEXT = 4000
NO_CLASS = len(tax.CLASSES)


def step_data(run: Run, step: int) -> Json:
    """Everything a page shows of one step.

    Returns ``rollouts`` as columns, ``tokens`` as packed arrays (None without token rows), ``top``,
    the most probable tokens of the rollouts that have them, and the texts of the ids that occur.
    ``step``: a recorded step.
    """
    known = run.table("rollouts", [step]).drop_duplicates(["rank", "rollout"])
    tokens = merged_passes(run.tokens([step])) if step in run.token_steps() else None
    table, packed = rollout_columns(known, tokens), None
    vocab: dict[int, str] = {}
    top: Json = {}
    if tokens is not None and len(tokens):
        packed = pack(tokens)
        ids = np.unique(tokens["token_id"].to_numpy())
        top, others = alternatives(run, step)
        ids = np.union1d(ids, others)
        vocab = {int(i): run.vocab[int(i)] for i in ids if int(i) in run.vocab}
    return {
        "step": step,
        "rollouts": table,
        "tokens": packed,
        "top": top,
        "vocab": {str(number): word for number, word in vocab.items()},
    }


def alternatives(run: Run, step: int) -> tuple[Json, Array]:
    """Most probable tokens of a few rollouts: ``[id, p, p after]`` by rollout and position.

    ``p after`` is None where the tokens were not scored again; positions whose logits were not
    finite have none. Also returned: the ids.
    """
    rows = run.topk([step])
    rows = rows.sort_values(["minibatch", "place"])
    rows = rows.drop_duplicates(["rollout", "position", "place"])
    rows = rows.sort_values(["rollout", "position"], kind="stable")
    rows = rows[np.isfinite(rows["prob"])]
    columns = (rows[name].tolist() for name in _TOP)
    found: Json = {}
    for rollout, position, token, p, after in zip(*columns, strict=True):
        of_rollout = found.setdefault(str(rollout), {})
        told = [token, _short(p), _short(after) if np.isfinite(after) else None]
        of_rollout.setdefault(str(position), []).append(told)
    return found, rows["token_id"].unique()


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def merged_passes(rows: pd.DataFrame) -> pd.DataFrame:
    """One row a token: probabilities of its first gradient pass, sums of what all passes did.

    Gradient norm, predicted dH and coef add up over the passes that saw a token; measured changes
    are taken from the last pass, which is the whole change.
    """
    codes = class_codes(rows["cls"])
    rows = rows.assign(cls=np.where(codes < 0, NO_CLASS, codes).astype(np.int8))
    rows = rows.sort_values(["rollout", "position", "minibatch"])
    if not rows.duplicated(KEYS).any():
        return rows.reset_index(drop=True)
    groups = rows.groupby(KEYS, sort=False)
    first = groups.first()
    for name in ("grad_norm", "pred_dentropy", "coef"):
        first[name] = groups[name].sum(min_count=1)
    for name in ("dprob", "dentropy"):
        first[name] = groups[name].last()
    return first.reset_index()


def rollout_columns(known: pd.DataFrame, tokens: pd.DataFrame | None) -> Json:
    """Rollouts as columns: keys, reward, texts, and their shares of the step's gradient and dH."""
    if known.empty and tokens is not None and len(tokens):
        known = tokens.groupby("rollout", as_index=False)[["group", "advantage"]].first()
    known = known.sort_values("rollout").reset_index(drop=True)
    data: Json = {
        "rollout": [int(v) for v in known["rollout"]],
        "group": [int(v) for v in known["group"].fillna(-1)],  # a source may not tell it
    }
    for name in ("reward", "advantage", "length"):
        if name in known:
            data[name] = plain_list(pd.to_numeric(known[name], errors="coerce"))
    for name in ("completion", "answer", "finish_reason"):
        if name in known:
            data[name] = [_cut(value) for value in known[name]]
    if "prompt" in known:
        prompts = [_cut(value) or "" for value in known["prompt"]]
        unique = list(dict.fromkeys(prompts))
        data["prompts"], data["heads"] = unique, distinguishing(unique)
        data["prompt"] = [unique.index(value) for value in prompts]
    if tokens is not None and len(tokens):
        sums = tokens.groupby("rollout")[["grad_norm", "pred_dentropy"]].sum(min_count=1)
        sums = sums.reindex(known["rollout"])
        data["mass"] = plain_list(sums["grad_norm"])
        data["flow"] = plain_list(sums["pred_dentropy"])
    return data


def _cut(value: Any) -> str | None:
    if not isinstance(value, str):
        return None
    return value if len(value) <= MAX_TEXT else f"{value[:MAX_TEXT]} [... {len(value)} characters]"


def pack(tokens: pd.DataFrame) -> tuple[Json, bytes]:
    """Token rows as one block of bytes and a header that says what lies where.

    Every array is split into its byte planes, lowest first, as Parquet's BYTE_STREAM_SPLIT does:
    planes of one kind compress far better than numbers. The lowest plane of the rounded float32 is
    all zero and is left out.
    """
    rollouts = tokens["rollout"].to_numpy(np.int32)
    change = np.flatnonzero(np.diff(rollouts, prepend=rollouts[0] - 1))
    columns: dict[str, tuple[str, Array]] = {
        "token_id": ("i4", tokens["token_id"].to_numpy("<i4")),
        "cls": ("i1", tokens["cls"].to_numpy("<i1")),
    }
    for name in FLOATS:
        values = tokens[name].to_numpy("<f4")
        if np.isfinite(values).any():
            columns[name] = ("f3", rounded(values))
    arrays, blocks, at = {}, [], 0
    for name, (form, values) in columns.items():
        block = _planes(values, 1 if form == "f3" else 0)
        arrays[name] = [form, at]
        blocks.append(block)
        at += len(block)
    header = {
        "count": len(tokens),
        "rollout": rollouts[change].tolist(),
        "start": change.tolist(),
        "advantage": plain_list(tokens["advantage"].to_numpy()[change]),
        "arrays": arrays,
    }
    return header, b"".join(blocks)


def rounded(values: Array) -> Array:
    """float32 with ``KEEP_BITS`` bits of mantissa, rounded to nearest; NaN stays."""
    short = round_mantissa(np.ascontiguousarray(values, "<f4"), KEEP_BITS)
    return np.where(np.isfinite(short), short, np.float32("nan")).astype("<f4")


def _planes(values: Array, skip: int) -> bytes:
    """Byte planes of an array, the first ``skip`` left out."""
    size = values.dtype.itemsize
    planes = np.ascontiguousarray(values).view(np.uint8).reshape(-1, size).T
    return planes[skip:].tobytes()


def block(data: Json) -> bytes:
    """A step as it travels: gzip of the length of a JSON header, the header, the token bytes.

    The same data give the same bytes.
    """
    header, tokens = data["tokens"] or (None, b"")
    told = json.dumps(
        data | {"tokens": header}, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    ).encode("utf-8", "replace")
    return gzip.compress(len(told).to_bytes(4, "little") + told + tokens, 9, mtime=0)


def chosen_steps(run: Run, wanted: Sequence[int], rows: int) -> list[int]:
    """Steps whose tokens fit into a budget of rows: those pointed at first, the rest evenly spread.

    ``wanted``: steps that the findings name, most important first; ``rows``: most token rows.
    """
    recorded = run.token_steps()
    if not recorded:
        return []
    size = _rows_of(run, recorded)
    order = [near for step in wanted if (near := _nearest(recorded, step)) is not None]
    order += [recorded[0], recorded[-1], *(recorded[i] for i in _spread(len(recorded)))]
    chosen: dict[int, None] = {}
    left = rows
    for step in dict.fromkeys(order):
        cost = size.get(step, 0)
        if cost > left and chosen:
            continue
        chosen[step] = None
        left -= cost
    return sorted(chosen)


def _nearest(recorded: Sequence[int], step: int) -> int | None:
    return min(recorded, key=lambda other: (abs(other - step), other), default=None)


def _spread(count: int) -> list[int]:
    """Every place once, each prefix as even as it can be (halving)."""
    order: dict[int, None] = {}
    parts = 1
    while len(order) < count:
        order |= dict.fromkeys(round(i * (count - 1) / parts) for i in range(parts + 1))
        parts *= 2
    return list(order)


def _rows_of(run: Run, steps: Sequence[int]) -> dict[int, int]:
    """Token rows a page would carry of each step, as the step log counts its completion tokens."""
    frame = run.steps
    if "tokens" not in frame or frame["tokens"].isna().all():
        return dict.fromkeys(steps, 1)
    tokens = pd.to_numeric(frame["tokens"], errors="coerce").fillna(0)
    share = pd.to_numeric(frame.get("token_fraction", 1.0), errors="coerce")
    counts = (tokens * share).fillna(tokens)
    return {int(s): int(n) for s, n in zip(frame["step"], counts, strict=True)}
