"""Inputs of the measurements: logits as RLVR produces them, token rows, recorded or sampled rows.

Seeds are fixed. Shapes: N rows (tokens), V vocabulary.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wapo_analysis.errors import UserError
from wapo_analysis.record.tokens import TokenPass
from wapo_analysis.schema import TOKENS
from wapo_analysis.table import Array, Records

NEAR_CERTAIN = 0.47
"""Share of tokens with p > 0.99 in the synthetic rows."""
_VERY_CERTAIN = 0.13  # share with p > 0.9999 that goes with NEAR_CERTAIN
_TEXT_VOCABULARY = 49_152
_OFF_MODE = 0.02  # rows whose target is not their near-certain mode: stale or teacher-forced


@dataclass(frozen=True)
class Rows:
    """Logits of N tokens.

    Attributes
    ----------
    logits : Tensor, shape (N, V)
    targets : Tensor of int64, shape (N,)
    temperature : float
    source : str
        Where they come from, in words.
    """

    logits: Tensor
    targets: Tensor
    temperature: float
    source: str

    def to(self, dtype: torch.dtype) -> "Rows":
        """Rows with the logits rounded to another precision."""
        return Rows(self.logits.to(dtype), self.targets, self.temperature, self.source)


def rlvr_rows(
    rows: int,
    vocabulary: int,
    *,
    certain: float = NEAR_CERTAIN,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    device: str = "cpu",
) -> Rows:
    """Synthetic rows with a given share of near-certain tokens.

    Noise of a width that differs from row to row, and one raised column whose probability follows
    the share: ``certain`` above 0.99, a quarter of those above 0.9999 and down to 1 - p = 1e-9, the
    others uniform. Two in a hundred targets are not the raised column.
    """
    if not 0 <= certain <= 1:
        raise UserError(f"the share of near-certain tokens must be in [0, 1], got {certain}")
    draw = torch.Generator(device).manual_seed(seed)
    width = 1 + 3 * torch.rand(rows, 1, generator=draw, device=device)
    logits = torch.empty(rows, vocabulary, device=device, dtype=dtype)
    for block, scale in zip(logits.split(64), width.split(64), strict=True):
        noise = torch.randn(block.shape, generator=draw, device=device)
        block.copy_(noise * scale)
    raised = torch.randint(vocabulary, (rows, 1), generator=draw, device=device)
    complement = _complements(rows, certain, draw, device)
    rest = torch.cat([b.float().logsumexp(1, keepdim=True) for b in logits.split(64)])
    odds = torch.log1p(-complement) - complement.log()
    logits.scatter_(1, raised, (rest + odds.unsqueeze(1).float()).to(dtype))
    off = torch.rand(rows, generator=draw, device=device) < _OFF_MODE
    other = torch.randint(vocabulary, (rows,), generator=draw, device=device)
    targets = torch.where(off, other, raised.squeeze(1))
    return Rows(logits, targets, 1.0, f"synthetic, {certain:.0%} with p > 0.99")


def _complements(rows: int, certain: float, draw: torch.Generator, device: str) -> Tensor:
    """1 - p of the raised column of each row, shape (rows,), float64."""
    share, within = torch.rand(2, rows, generator=draw, device=device, dtype=torch.float64)
    very = certain * _VERY_CERTAIN / NEAR_CERTAIN
    spread = torch.where(share < very, 10 ** (-4 - 5 * within), 10 ** (-2 - 2 * within))
    return torch.where(share < certain, spread, 0.01 + 0.98 * within)


def load_rows(file: Path) -> Rows:
    """Read recorded logits: an .npz with ``logits`` (N, V), ``targets`` (N,), ``temperature``.

    Raises
    ------
    UserError
        If the file is missing, is no npz, lacks an array or has other shapes.
    """
    try:
        with np.load(file, allow_pickle=False) as found:
            logits, targets = found["logits"], found["targets"]
            temperature = float(found["temperature"]) if "temperature" in found else 1.0
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"cannot read logits from {file}: {error}; need an .npz with arrays logits (N, V) and "
            "targets (N,)"
        ) from error
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise UserError(
            f"{file}: logits {logits.shape} and targets {targets.shape} do not fit; need (N, V) "
            "and (N,)"
        )
    rows = torch.from_numpy(targets.astype(np.int64))
    return Rows(torch.from_numpy(logits).float(), rows, temperature, file.name)


_QUESTIONS = (
    "What is 17 + 25? Explain step by step.",
    "Tom has 3 boxes with 12 pencils each and gives away 9 pencils. How many are left?",
    "Write the first ten square numbers.",
    "A train travels 60 km in 45 minutes. What is its speed in km/h?",
    "Name three countries in Europe and their capitals.",
    "What is the sum of the angles of a triangle?",
    "Solve for x: 2x + 6 = 20.",
    "How many seconds are in two hours?",
)


def model_rows(name: str, length: int = 64, temperature: float = 1.0) -> Rows:
    """Rows of a real rollout: a model samples answers to eight questions, its logits are taken.

    Parameters
    ----------
    name : str
        Model as in `wapo_analysis.train.models.load_policy`: a .gguf file, a folder, a hub name,
        "smollm2".
    length : int
        Longest completion.
    temperature : float
        Of sampling and statistics.

    Raises
    ------
    UserError
        If the model cannot be loaded.
    """
    from wapo_analysis.train.models import load_policy
    from wapo_analysis.train.rollout import completion_logits, sample

    policy = load_policy(name, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    prompts = [policy.encode(text) for text in _QUESTIONS]
    rollouts = sample(policy, prompts, length, temperature, draw)
    with torch.no_grad():
        logits = completion_logits(policy, rollouts)[rollouts.mask].float()
    shown = Path(name).name
    return Rows(logits, rollouts.completion_ids[rollouts.mask], temperature, f"rollout of {shown}")


def token_columns(rows: int, step: int = 1, seed: int = 0, length: int = 256) -> dict[str, Array]:
    """Columns of the token table as a step of GRPO fills them; scores after the update are absent.

    Every statistic follows from one draw of the token's probability, so the columns hang together
    and their mantissas are as random as measured ones. Completions have 1 to 2 ``length`` tokens,
    token ids the frequencies of text (Zipf, vocabulary 49152).
    """
    draw = np.random.default_rng([seed, step])
    ends = draw.integers(1, 2 * length, rows).cumsum()
    rollout = np.searchsorted(ends, np.arange(rows), side="right")
    starts = np.concatenate([[0], ends])[rollout]
    complement = np.where(
        draw.random(rows) < NEAR_CERTAIN,
        10 ** -draw.uniform(2, 9, rows),
        draw.uniform(0.01, 0.99, rows),
    )
    logp = np.log1p(-complement)
    other = complement * draw.uniform(0.05, 1.0, rows)  # what one other token holds of 1 - p
    entropy = -(1 - complement) * logp - complement * np.log(other / 3)
    advantage = draw.standard_normal(rollout[-1] + 1)[rollout]
    logp_old = np.minimum(logp * (1 + 0.02 * draw.standard_normal(rows)), 0.0)
    ratio = np.exp(logp - logp_old)
    clipped = np.abs(ratio - 1) > 0.02
    return {
        "step": np.full(rows, step),
        "minibatch": np.arange(rows) * 4 // rows,
        "rank": np.zeros(rows),
        "group": rollout // 8,
        "rollout": rollout,
        "position": np.arange(rows) - starts,
        "token_id": _text_ids(draw, rows),
        "advantage": advantage,
        "logp": logp,
        "logp_old": logp_old,
        "entropy": entropy,
        "collision_rest": other**2,
        "collision_logp_rest": other**2 * np.log(other),
        "coef": np.where(clipped, 0.0, ratio * advantage / rows),
        "clipped": clipped,
        "kept": np.ones(rows, bool),
        "top1": complement < 0.5,
    }


_OF_A_PASS = ("group", "rollout", "position", "token_id", "advantage", "logp", "logp_old",
              "entropy", "collision_rest", "collision_logp_rest", "coef", "clipped", "kept",
              "top1")  # fmt: skip


def token_pass(rows: int) -> TokenPass:
    """`token_columns` as a gradient pass hands them to a recorder: tensors, floats of 32 bits."""
    columns = token_columns(rows)
    given = {name: torch.from_numpy(columns[name]) for name in _OF_A_PASS}
    floats = {name: v.float() for name, v in given.items() if v.is_floating_point()}
    return TokenPass(**{**given, **floats})


def _text_ids(draw: np.random.Generator, rows: int) -> Array:
    """Token ids with Zipf's frequencies, the ranks shuffled over the ids."""
    weights = 1 / (np.arange(_TEXT_VOCABULARY) + 2.7)
    ranks = np.searchsorted(weights.cumsum() / weights.sum(), draw.random(rows))
    shuffled: Array = np.random.default_rng(0).permutation(_TEXT_VOCABULARY)[ranks]
    return shuffled


def token_records(rows: int, step: int = 1, seed: int = 0) -> Records:
    """`token_columns` as records of the token table."""
    return Records.build(TOKENS, token_columns(rows, step, seed))
