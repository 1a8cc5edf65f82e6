"""Statistics of one block of rows, and the gradient of its log-probabilities: the formulas."""

import torch
from torch import Tensor

# exp(2 x) stays a normal number, so padded (-inf) and far columns cost no denormal arithmetic and
# give no 0 * inf; what is clamped is below the rounding of every sum.
_LOWEST = {torch.float32: -43.0, torch.float64: -350.0}
# Elements of a block: two of them in float32 stay in a CPU core's cache.
CHUNK_ELEMENTS = 1 << 19


def check(rows: Tensor, targets: Tensor, temperature: float) -> None:
    """Raise ValueError on shapes that do not fit or a temperature that is not positive."""
    if rows.dim() != 2 or targets.shape != rows.shape[:1]:
        raise ValueError(
            f"need (N, V) rows and (N,) targets, got {tuple(rows.shape)} and {tuple(targets.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")


def wide(block: Tensor) -> Tensor:
    """Return the block in float32; float64 stays."""
    return block if block.dtype == torch.float64 else block.float()


def block_stats(scaled: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    """Statistics of one block of logits already divided by T, and the log of the normaliser.

    With x = logit - max and e = exp(x), sums run over all tokens but the target y and the mode m:
    log Z = log1p(sum e [+ e_y if y != m]); the mode adds e = 1, x = 0 wherever it is not y.
    """
    index = targets.unsqueeze(1)
    top, mode = scaled.max(dim=1, keepdim=True)
    x_target = scaled.gather(1, index) - top
    is_mode = x_target == 0
    mode = torch.where(is_mode, index, mode)
    x = (scaled - top).clamp_(min=_LOWEST[scaled.dtype])
    e = x.exp()
    e_target = torch.where(is_mode, 0.0, x_target.exp())
    e.scatter_(1, index, 0.0).scatter_(1, mode, 0.0)
    x.mul_(e)  # e x; x itself is not needed again but through e
    sum_e, sum_ex = e.sum(1, keepdim=True), x.sum(1, keepdim=True)
    sum_e2x = (x * e).sum(1, keepdim=True)
    sum_e2 = e.square_().sum(1, keepdim=True)
    others = torch.where(is_mode, 0.0, 1.0)
    log_z = torch.log1p(sum_e + e_target)
    z = log_z.exp()
    logp = x_target - log_z
    rest = (sum_e2 + others) / z**2
    rest_logp = sum_e2x / z**2 - rest * log_z
    entropy_rest = ((sum_e + others) * log_z - sum_ex) / z
    prob = logp.exp()
    entropy = entropy_rest - torch.where(prob > 0, prob * logp, 0.0)
    # A NaN row fails every comparison above; its target column may still look finite.
    bad = torch.where(torch.isfinite(top + sum_e), 0.0, torch.nan)
    columns = (logp + bad, entropy + bad, rest + bad, rest_logp + bad, is_mode, log_z + top)
    return tuple(column.squeeze(1) for column in columns)


def stacked(blocks: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Columns of all blocks, end to end."""
    return tuple(torch.cat(column) for column in zip(*blocks, strict=True))


def logit_gradient(scaled: Tensor, targets: Tensor, log_z: Tensor, logp: Tensor) -> Tensor:
    """Rows of d logp / d scaled logits = e_y - p, exact in the sampled column."""
    grad = (scaled - log_z.unsqueeze(1)).exp_().neg_()
    return grad.scatter_(1, targets.unsqueeze(1), -torch.expm1(logp).unsqueeze(1))
