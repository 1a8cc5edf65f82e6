"""What is compared with: the published way of computing each quantity, written anew.

Shapes: N rows (tokens), V vocabulary. Entropy in nats. Nothing here is used by the library itself.
"""

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import wapo_taxonomy as tax
from torch import Tensor

from wapo_analysis.stats import TokenStats
from wapo_analysis.table import Array

_ENTROPY_ROWS = 128


def trl_selective(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of the targets as trainers compute it, differentiable; shape of targets.

    float32: selected logit minus logsumexp, row by row, so that no second (N, V) is made. Half
    precision: log_softmax of each row in its own precision.
    """
    index = targets.unsqueeze(-1)
    if logits.dtype in (torch.float32, torch.float64):
        normaliser = torch.stack([row.logsumexp(dim=-1) for row in logits])
        return logits.gather(-1, index).squeeze(-1) - normaliser
    rows = zip(logits, index, strict=True)
    return torch.stack([row.log_softmax(dim=-1).gather(-1, at).squeeze(-1) for row, at in rows])


def chunked_entropy(logits: Tensor) -> Tensor:
    """Entropy in nats over the last axis, 128 rows at a time; shape of the leading axes."""
    flat = logits.reshape(-1, logits.shape[-1])
    parts = []
    for rows in flat.split(_ENTROPY_ROWS):
        logp = rows.log_softmax(dim=-1)
        parts.append(-(logp.exp() * logp).sum(dim=-1))
    return torch.cat(parts).reshape(logits.shape[:-1])


def three_pass(
    logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """logp, entropy and sum of p^2 in the three passes of the official WAPO trainer.

    ``logits / T`` is a copy; the selective log-softmax, the entropy and the softmax each read it
    again, and softmax and its square are two more temporaries of that size.
    """
    scaled = logits / temperature
    logp = trl_selective(scaled, targets)
    with torch.no_grad():
        entropy = chunked_entropy(scaled)
        collision = scaled.softmax(dim=-1).pow(2).sum(dim=-1)
    return logp, entropy, collision


def four_pass(
    logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`three_pass` and the sum of p^2 ln p that the change of the entropy needs, textbook form."""
    scaled = logits / temperature
    logp = trl_selective(scaled, targets)
    with torch.no_grad():
        entropy = chunked_entropy(scaled)
        prob = scaled.softmax(dim=-1)
        collision = prob.pow(2).sum(dim=-1)
        collision_logp = (prob.pow(2) * scaled.log_softmax(dim=-1)).sum(dim=-1)
    return logp, entropy, collision, collision_logp


def exact_stats(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> TokenStats:
    """Statistics in float64, a few rows at a time: what every variant is held against.

    Sums leave out the target and the mode, log-probabilities of the mode come from log1p, so no
    digit is lost to cancellation at any distance from certainty.
    """
    parts = [
        _exact_rows(rows.double() / temperature, chosen)
        for rows, chosen in zip(logits.split(16), targets.split(16), strict=True)
    ]
    return TokenStats(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _exact_rows(scaled: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    at = targets.unsqueeze(1)
    top, mode = scaled.max(dim=1, keepdim=True)
    is_mode = scaled.gather(1, at) == top
    mode = torch.where(is_mode, at, mode)
    log_z = torch.log1p((scaled - top).exp().scatter(1, mode, 0.0).sum(1, keepdim=True))
    logp = scaled - top - log_z  # the mode's is -log_z, with all its digits
    prob = logp.exp()
    terms = torch.where(prob > 0, prob * logp, 0.0)
    rest, rest_terms = prob.scatter(1, at, 0.0), terms.scatter(1, at, 0.0)
    columns = (
        logp.gather(1, at).squeeze(1),
        -terms.sum(1),
        rest.square().sum(1),
        (rest * rest_terms).sum(1),
        is_mode.squeeze(1),
    )
    return columns


def npz_bytes(columns: Mapping[str, Array]) -> bytes:
    """Columns as one compressed npz, the format of the official per-step files."""
    sink = BytesIO()
    np.savez_compressed(sink, allow_pickle=False, **columns)
    return sink.getvalue()


def jsonl_bytes(columns: Mapping[str, Array], sequence: str = "rollout") -> bytes:
    """Columns as JSON lines, one object per sequence with a list per column."""
    ends = np.flatnonzero(np.diff(columns[sequence])) + 1
    cuts = [0, *ends.tolist(), len(columns[sequence])]
    lines = []
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        lines.append(json.dumps({k: v[start:stop].tolist() for k, v in columns.items()}))
    return "\n".join(lines).encode()


_SUMMARY_COLUMNS = (
    "step",
    "advantage",
    "logp",
    "entropy",
    "collision_rest",
    "collision_logp_rest",
    "coef",
)


def pandas_summary(files: list[Path], temperature: float) -> pd.DataFrame:
    """Tokens, mean entropy, predicted entropy change and gradient mass by step and class.

    One ``read_parquet`` of the needed columns, the taxonomy on whole columns, one groupby.
    """
    frames = [pd.read_parquet(file, columns=list(_SUMMARY_COLUMNS)) for file in files]
    frame = pd.concat(frames, ignore_index=True)
    c = {name: frame[name].to_numpy(dtype=np.float64) for name in _SUMMARY_COLUMNS[1:]}
    prob, complement = np.exp(c["logp"]), -np.expm1(c["logp"])
    rest, step = c["collision_rest"], tax.logit_step(c["coef"], temperature)
    frame["cls"] = np.asarray(tax.class_code(c["advantage"], prob, complement, rest), np.int8)
    frame["entropy"] = c["entropy"]  # pandas would average float32 in float32
    frame["grad_mass"] = tax.grad_norm(c["coef"], complement, rest, temperature)
    frame["pred_dentropy"] = tax.dentropy(
        step, prob, complement, c["logp"], c["entropy"], rest, c["collision_logp_rest"]
    )
    return frame.groupby(["step", "cls"], as_index=False).agg(
        tokens=("entropy", "size"),
        entropy=("entropy", "mean"),
        pred_dentropy_sum=("pred_dentropy", "sum"),
        grad_mass=("grad_mass", "sum"),
    )


SQL_SUMMARY = """
select step, cls, count(*) as tokens, avg(h) as entropy, sum(pred) as pred, sum(mass) as mass
from (
  select step, h, case when a = 0 then 4 when p * (1 - p) >= r then if(a > 0, 0, 2)
      else if(a > 0, 1, 3) end as cls,
    -c * (p * (1 - p) * (l + h) - (lr + r * h)) as pred, abs(c) * sqrt((1 - p) ** 2 + r) as mass
  from (
    select step, advantage as a, logp::double as l, entropy::double as h, exp(logp::double) as p,
      collision_rest::double as r, collision_logp_rest::double as lr, coef::double as c
    from read_parquet($files)))
group by step, cls order by step, cls
"""


def sql_summary(files: list[Path]) -> pd.DataFrame:
    """The class summary as one would ask DuckDB for it: 1 - p as it stands, no file verified."""
    import duckdb

    with duckdb.connect() as connection:
        found = connection.execute(SQL_SUMMARY, {"files": [str(file) for file in files]})
        frame: pd.DataFrame = found.df()
    return frame


def official_plots(columns: Mapping[str, Array]) -> list[bytes]:
    """Eight figures of a step as PNG at 100 dpi, the official per-step output: points and bars.

    At most 10000 tokens are drawn, as there.
    """
    from wapo_analysis.plots.style import new_figure

    some = slice(0, 10_000)
    logp, logp_old = columns["logp"][some], columns["logp_old"][some]
    pages = []
    for number in range(8):
        figure = new_figure(height=6.0)
        ax: Any = figure.subplots()
        if number == 0:
            ax.scatter(np.exp(logp_old), np.exp(logp), c=columns["advantage"][some], s=4)
        elif number == 1:
            ax.hist(np.exp(logp), bins=50)
        else:
            ax.bar(range(5 if number < 5 else 50), np.arange(5 if number < 5 else 50) + 1.0)
        sink = BytesIO()
        figure.savefig(sink, format="png", dpi=100)
        pages.append(sink.getvalue())
    return pages
