"""Padded or packed tensors of a gradient pass to token rows.

Shapes: B rollouts of the pass, T positions, M positions of a packed row, V vocabulary, N tokens
under the mask. Nothing here draws random numbers, keeps a graph or changes a tensor it was given.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wapo_analysis.errors import UserError
from wapo_analysis.record.tokens import TokenPass, beside_logp
from wapo_analysis.stats import TokenStats, token_stats

_INT32 = 2**31
#: Mean distance in nats beyond which log-probabilities do not belong to the logits.
MATCH = 0.1


@dataclass(kw_only=True)
class BatchPass:
    """What one call of ``Recorder.watch`` was given, and what its backward pass is read with."""

    #: The N tokens under the mask.
    tokens: TokenPass
    #: (N,): where they stand in the (B, T) or (M,) tensors.
    place: tuple[Tensor, ...]
    #: (B,): number, prompt and token count of each rollout.
    rollouts: Tensor
    groups: Tensor
    lengths: Tensor
    #: (B,): advantage of each rollout; the mean over its tokens if it was given per token.
    advantages: Tensor
    #: (N,): log of the ratio the clip looks at, nats: to ``logp_prox``, else to ``logp_old``; where
    #: it is that of the whole rollout, its mean.
    log_ratio: Tensor | None
    #: Bounds of the ratio, if they are known.
    clip: tuple[float, float] | None
    #: Whether the gradient is to tell which tokens took part in the loss.
    choose_kept: bool
    #: A backward pass is expected.
    needs_grad: bool
    #: Gradients that came back.
    came: int = 0
    #: Whether some gradient is not the surrogate's: a KL or entropy term is in the loss.
    mixed: Tensor | None = None

    def read_gradient(self, gradient: Tensor, loss_scale: float) -> None:
        """Fill coef and the clip and kept flags from dL/dlogp, of the shape of logp.

        A token of non-zero advantage whose gradient is exactly zero was either stopped by the
        clip or left out of the loss. It was stopped if its ratio lies outside the clip bounds;
        where those are unknown, if its ratio has already moved the way its advantage pushes, the
        one side on which a clip acts. A term beside the surrogate leaves no gradient at zero. It
        shows where a gradient is not the advantage's; then the bounds alone tell.
        """
        gradient, tokens = gradient.detach(), self.tokens
        coef = -gradient[self.place] / loss_scale
        mask = torch.zeros_like(gradient, dtype=torch.bool)
        mask[self.place] = True
        outside = outside_counts(gradient, mask)
        if tokens.coef is not None:  # several backward passes add up, as in the weights
            coef, outside = coef + tokens.coef, torch.maximum(outside, *tokens.outside)
        self.came, tokens.outside = self.came + 1, (outside,)
        idle = (coef == 0) & (tokens.advantage != 0)
        pushed = coef * tokens.advantage
        self.mixed = ((pushed < 0) | ((coef != 0) & (tokens.advantage == 0))).any()
        if not self.choose_kept:
            assert tokens.kept is not None
            stopped = idle & tokens.kept
        elif self.log_ratio is None:
            stopped = torch.zeros_like(idle)
        elif self.clip is None:
            stopped = idle & (self.log_ratio * tokens.advantage > 0)
        else:
            low, high = (math.log(bound) if bound > 0 else -math.inf for bound in self.clip)
            below, above = self.log_ratio < low, self.log_ratio > high
            ruled = (below & (tokens.advantage < 0)) | (above & (tokens.advantage > 0))
            stopped = (idle & (below | above)) | (ruled & self.mixed)
        tokens.coef, tokens.clipped = coef, stopped
        if self.choose_kept:
            tokens.kept = ~idle | stopped


def outside_counts(gradient: Tensor, mask: Tensor) -> Tensor:
    """Positions outside the mask with a gradient: all, before a rollout's tokens, after them.

    Returns Tensor of int64, shape (3,), or (1,) of packed tensors, whose places are not told apart.
    ``gradient``, ``mask`` (B, T) or, packed, (M,).
    """
    hit = (gradient != 0) & gradient.isfinite() & ~mask
    if mask.dim() == 1:
        return hit.sum().reshape(1)
    seen = mask.cumsum(dim=1)
    some = seen[:, -1:] > 0
    before, after = hit & (seen == 0) & some, hit & (seen == seen[:, -1:]) & some
    return torch.stack([hit.sum(), before.sum(), after.sum()])


@dataclass(frozen=True)
class Layout:
    """How the positions of a pass belong to its rollouts."""

    #: Shape of the mask: which of the B rollouts a position belongs to, from 0.
    rollout: Tensor
    #: B.
    count: int
    #: (B,): number of each rollout within the step, where the layout itself gives it.
    numbers: Tensor | None = None

    @classmethod
    def of(cls, logp: Tensor, cu_seqlens: Tensor | None, rollouts: Tensor | None) -> "Layout":
        """Layout of padded (B, T) tensors, or of packed (M,) ones by bounds or by numbers.

        Raises UserError if packed tensors come without either, or bounds are not those of M
        positions.
        """
        size = len(logp)
        if logp.dim() == 2:
            if cu_seqlens is not None:
                raise UserError("cu_seqlens belongs to packed tensors, but logp is (rollouts, T)")
            return cls(torch.arange(size, device=logp.device)[:, None].expand_as(logp), size)
        if logp.dim() != 1:
            raise UserError(
                "logp must have shape (rollouts, positions), or (positions,) if packed, got "
                f"{tuple(logp.shape)}"
            )
        if cu_seqlens is not None:
            bounds = cu_seqlens.detach().to(logp.device).long()
            if bounds.dim() != 1 or not _are_bounds(bounds, size):
                raise UserError(
                    f"cu_seqlens must rise from 0 to the {size} positions of logp, one more "
                    f"entry than rollouts, got {_few(bounds)}"
                )
            count = len(bounds) - 1
            which = torch.arange(count, device=logp.device)
            return cls(which.repeat_interleave(bounds.diff(), output_size=size), count)
        if rollouts is None or rollouts.shape != logp.shape:
            raise UserError(
                f"packed logp, shape ({size},), needs cu_seqlens or rollouts of the same shape"
            )
        numbers, which = rollouts.detach().to(logp.device).unique(return_inverse=True)
        return cls(which, len(numbers), numbers)

    def per_rollout(self, name: str, values: Tensor) -> Tensor:
        """Values per rollout, shape (B,), of such values or, if packed, of one per position.

        Raises UserError if they have neither shape, or differ within a rollout.
        """
        values = values.detach().to(self.rollout.device)
        if values.shape == (self.count,):
            return values.clone()  # it is read when the step ends
        packed = self.rollout.dim() == 1
        if not packed or values.shape != self.rollout.shape:
            other = f", or {tuple(self.rollout.shape)}, one per position" if packed else ""
            raise UserError(
                f"{name} must have shape ({self.count},), one per rollout{other}, got "
                f"{tuple(values.shape)}"
            )
        found = values.new_zeros(self.count)
        found[self.rollout] = values
        if not torch.equal(found[self.rollout], values):
            raise UserError(f"{name} must be the same at all positions of a rollout")
        return found

    def within(self, row: Tensor) -> Tensor:
        """Position of each token among those of its rollout, from 0; shape (N,).

        ``row`` (N,): rollout of each token, from 0.
        """
        order = row.argsort(stable=True)
        counts = row.bincount(minlength=self.count)
        first = (counts.cumsum(0) - counts).repeat_interleave(counts, output_size=len(row))
        position = torch.empty_like(row)
        position[order] = torch.arange(len(row), device=row.device) - first
        return position


def _are_bounds(bounds: Tensor, size: int) -> bool:
    if len(bounds) < 2:
        return False
    return bool(bounds[0] == 0) and bool(bounds[-1] == size) and bool((bounds.diff() >= 0).all())


def _few(values: Tensor) -> str:
    shown = ", ".join(str(v) for v in values.flatten()[:4].tolist())
    return f"[{shown}{', ...' if values.numel() > 4 else ''}]"


def batch_pass(
    logp: Tensor,
    tokens: Tensor | None,
    mask: Tensor,
    advantages: Tensor,
    groups: Tensor | None,
    *,
    rollouts: Tensor | None,
    first_rollout: int,
    temperature: float,
    minibatch: int,
    cu_seqlens: Tensor | None = None,
    logits: Tensor | None = None,
    entropy: Tensor | None = None,
    collision: Tensor | None = None,
    logp_old: Tensor | None = None,
    logp_prox: Tensor | None = None,
    stats: TokenStats | None = None,
    kept: Tensor | None = None,
    clip: tuple[float, float] | None = None,
    sequence_level: bool = False,
) -> BatchPass:
    """Gather the N masked tokens of one gradient pass; see ``Recorder.watch``.

    Rollouts without numbers get those from ``first_rollout`` on. Raises UserError on shapes that do
    not fit, or logits that do not give these log-probabilities.
    """
    if not isinstance(logp, Tensor):
        raise UserError(f"logp must be a tensor on the autograd graph, got {type(logp).__name__}")
    clip = None if clip is None else _two_bounds(clip)
    (
        mask, advantages, tokens, groups, rollouts, cu_seqlens, logits, kept, logp_old, logp_prox,
        entropy, collision,
    ) = _tensors(
        logp.device, mask=mask, advantages=advantages, tokens=tokens, groups=groups,
        rollouts=rollouts, cu_seqlens=cu_seqlens, logits=logits, kept=kept, logp_old=logp_old,
        logp_prox=logp_prox, entropy=entropy, collision=collision,
    )  # fmt: skip
    layout = Layout.of(logp, cu_seqlens, rollouts)
    per_token = {"mask": mask, "tokens": tokens, "logp_old": logp_old, "kept": kept}
    per_token |= {"logp_prox": logp_prox, "entropy": entropy, "collision": collision}
    _check_shapes(logp, per_token, logits)
    numbers, groups = _names(layout, rollouts, groups, first_rollout)
    mask = mask.detach().bool()
    place = mask.nonzero(as_tuple=True)
    row = layout.rollout[place]
    lengths = row.bincount(minlength=layout.count)
    advantages = advantages.detach()
    if advantages.shape == logp.shape:
        advantage = advantages[place]
        sums = torch.zeros(layout.count, dtype=advantage.dtype, device=advantage.device)
        advantages = sums.index_add(0, row, advantage) / lengths.clamp(min=1)
    elif advantages.shape in (lengths.shape, (layout.count, 1)):
        advantages = advantages.flatten().clone()
        advantage = advantages[row]
    else:
        raise UserError(
            f"advantages must have shape {tuple(lengths.shape)} or {tuple(logp.shape)}, "
            f"got {tuple(advantages.shape)}"
        )
    now, old, ids = logp.detach()[place], _flat(logp_old, place), _flat(tokens, place)
    prox = _flat(logp_prox, place)
    stats = _stats(now, tokens, logits, mask, temperature) if stats is None else stats
    given_s = _flat(collision, place)
    log_ratio = None if old is None else now - (old if prox is None else prox)
    if log_ratio is not None and sequence_level:
        total = torch.zeros_like(lengths, dtype=log_ratio.dtype).index_add(0, row, log_ratio)
        log_ratio = (total / lengths.clamp(min=1))[row]
    if stats is not None and now.dtype in (torch.bfloat16, torch.float16):
        # The recorded logp is more exact than the loss's; the ratio must stay the loss's own.
        old, prox = (None if v is None else stats.logp - (now - v).float() for v in (old, prox))
    rest = None if given_s is None else (given_s - now.exp().square()).clamp(min=0)
    known = beside_logp(stats or {"entropy": _flat(entropy, place), "collision_rest": rest})
    return BatchPass(
        tokens=TokenPass(
            group=groups[row],
            rollout=numbers[row],
            position=layout.within(row),
            token_id=torch.full_like(row, -1) if ids is None else ids,
            advantage=advantage,
            logp=now if stats is None else stats.logp,
            logp_old=old,
            logp_prox=prox,
            kept=None if kept is None else kept.detach()[place].bool(),
            minibatch=minibatch,
            **known,
        ),
        place=place,
        rollouts=numbers,
        groups=groups,
        lengths=lengths,
        advantages=advantages,
        log_ratio=log_ratio,
        clip=clip,
        choose_kept=kept is None,
        needs_grad=logp.requires_grad,
    )


def _two_bounds(clip: Any) -> tuple[float, float]:
    try:
        low, high = map(float, clip)
    except (TypeError, ValueError) as error:
        said = f"clip must be two bounds of the ratio, such as (0.8, 1.2), got {clip!r}"
        raise UserError(said) from error
    return low, high


def _tensors(device: torch.device, **given: Any) -> Iterator[Any]:
    """What was given, as tensors; lists and arrays are allowed. Raises UserError on all else."""
    for name, values in given.items():
        if isinstance(values, Tensor) or (values is None and name not in ("mask", "advantages")):
            yield values
            continue
        try:
            if name == "logits":  # so large that nobody wants them converted
                raise TypeError
            yield torch.as_tensor(values, device=device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{name} must be a tensor of numbers, got {type(values).__name__}"
            ) from error


def _names(
    layout: Layout, rollouts: Tensor | None, groups: Tensor | None, first: int
) -> tuple[Tensor, Tensor]:
    """Number and group of each rollout, shape (B,); -1 is an unknown group."""
    device = layout.rollout.device
    if layout.numbers is not None:
        numbers = layout.numbers
    elif rollouts is None:
        numbers = torch.arange(layout.count, device=device) + first
    else:
        numbers = layout.per_rollout("rollouts", rollouts)
    if groups is None:
        groups = torch.full((layout.count,), -1, device=device)
    else:
        groups = layout.per_rollout("groups", groups)
    for name, values in (("rollouts", numbers), ("groups", groups)):
        # On a GPU asking would wait for it.
        near = values.device.type == "cpu" and len(values)
        if near and float(values.double().abs().max()) >= _INT32:
            raise UserError(f"{name} must be numbers below 2^31, got {_few(values)}")
    return numbers, groups


def _check_shapes(
    logp: Tensor, per_token: Mapping[str, Tensor | None], logits: Tensor | None
) -> None:
    for name, tensor in per_token.items():
        if tensor is not None and tensor.shape != logp.shape:
            raise UserError(
                f"{name} must have the shape of logp, {tuple(logp.shape)}, "
                f"got {tuple(tensor.shape)}"
            )
    if logits is not None and logits.shape[:-1] != logp.shape:
        raise UserError(f"logits must be {tuple(logp.shape)} x V, got {tuple(logits.shape)}")


def _flat(values: Tensor | None, place: tuple[Tensor, ...]) -> Tensor | None:
    return None if values is None else values.detach()[place]


def _stats(
    logp: Tensor,
    tokens: Tensor | None,
    logits: Tensor | None,
    mask: Tensor,
    temperature: float,
) -> TokenStats | None:
    """Statistics of the N tokens under the mask; None without logits.

    Raises UserError if the logits do not give these log-probabilities: shifted by one, or at
    another temperature. Rounding in half precision passes.
    """
    if logits is None:
        return None
    if tokens is None:
        raise UserError("logits were given without the sampled tokens")
    stats = token_stats(logits.detach(), tokens.detach(), temperature, mask)
    if not len(logp):
        return stats
    away = float((stats.logp - logp).abs().nanmean())
    if away > MATCH:
        raise UserError(
            f"logits and logp disagree by {away:.2g} nats on average: give the logits that "
            "predict each token (shifted by one), before the division by temperature, and the "
            "temperature to Recorder"
        )
    return stats
