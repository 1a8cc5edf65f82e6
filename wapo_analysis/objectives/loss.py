"""Which tokens are trained on, and the weighted policy loss. B rollouts, T completion positions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from wapo_taxonomy import CLASSES

from wapo_analysis.objectives.config import ObjectiveConfig

#: Class code of a token with zero advantage: it belongs to no class.
_NONE_CODE = len(CLASSES)


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Loss of a (micro-)batch and what happened to each token; all but ``loss`` is detached."""

    #: ``sum(token_loss * kept * weight)``; multiply by ``BatchWeights.multiplier``.
    loss: Tensor
    #: (B, T): loss before keep and weight.
    token_loss: Tensor
    #: (B, T): importance ratio (GSPO: of the sequence); NaN where it does not exist.
    ratio: Tensor
    #: (B, T): gradient is zero because the clip branch is active.
    clipped: Tensor
    #: (B, T): tokens in the sum: ``keep`` without the non-finite ones.
    kept: Tensor
    #: Kept tokens dropped because a log-probability the loss needs was not finite.
    nonfinite: Tensor


def _in_classes(codes_BT: Tensor, names: Collection[str]) -> Tensor:
    chosen = torch.tensor([*(name in names for name in CLASSES), False], device=codes_BT.device)
    return chosen[codes_BT]


def _class_codes(config: ObjectiveConfig, sign_B1: Tensor, peak: Tensor) -> Tensor:
    """Index into CLASSES per token; a zero advantage is `_NONE_CODE`."""
    strict = config.rules.zero_has_no_class
    is_positive = sign_B1 > 0 if strict else sign_B1 >= 0
    positive = torch.where(peak, CLASSES.index("pos_peak"), CLASSES.index("pos_valley"))
    negative = torch.where(peak, CLASSES.index("neg_peak"), CLASSES.index("neg_valley"))
    codes_BT = torch.where(is_positive, positive, negative)
    return torch.where(sign_B1 == 0, _NONE_CODE, codes_BT) if strict else codes_BT


def keep_tokens(config: ObjectiveConfig, advantage: Tensor, mask: Tensor, peak: Tensor) -> Tensor:
    """Tokens that enter the loss: completion tokens past the advantage gate and the bins.

    Returns bools, shape (B, T). Tokens with zero advantage are in no class: include_bins drops
    them, exclude_bins leaves them. Under the published rules they count as positive.

    Parameters
    ----------
    config : ObjectiveConfig
        Gates (``drops_negative``, ``mask_positive_advantages``) and bins.
    advantage : Tensor, shape (B,)
        Advantage of each rollout.
    mask : Tensor of bool (or 0/1), shape (B, T)
        Completion tokens.
    peak : Tensor of bool, shape (B, T)
        Regime of the sampled token, ``wapo_taxonomy.is_peak``; p = 1 is a peak.

    Notes
    -----
    Source: the published WAPO code; classes of arXiv 2606.16154.
    """
    mask = mask.bool()
    # An empty rollout counts as zero advantage: it is dropped by either gate.
    sign_B1 = torch.where(mask.any(1), advantage, torch.zeros_like(advantage)).unsqueeze(1)
    keep = mask.clone()
    if config.drops_negative:
        keep &= sign_B1 > 0
    if config.mask_positive_advantages:
        keep &= sign_B1 < 0
    codes_BT = _class_codes(config, sign_B1, peak)
    if config.included_classes is not None:
        return keep & _in_classes(codes_BT, config.included_classes)
    if config.excluded_classes:
        return keep & ~_in_classes(codes_BT, config.excluded_classes)
    return keep


def _multiplied(
    config: ObjectiveConfig,
    logp: Tensor,
    logp_old: Tensor,
    advantage: Tensor,
    mask: Tensor,
    keep: Tensor,
    weight: Tensor,
) -> LossOutput:
    """Masks multiply: a non-finite token loss makes the sum NaN even where it is dropped."""
    term = config.token_loss(logp, logp_old, advantage, mask, config.bounds)
    loss = (term.loss * keep.to(logp.dtype) * weight.unsqueeze(1)).sum()
    none_dropped = torch.zeros((), dtype=torch.int64, device=logp.device)
    return LossOutput(loss, term.loss.detach(), term.ratio, term.clipped, keep, none_dropped)


def _selected(
    config: ObjectiveConfig,
    logp: Tensor,
    logp_old: Tensor,
    advantage: Tensor,
    mask: Tensor,
    keep: Tensor,
    weight: Tensor,
) -> LossOutput:
    """Masks select, on the value and on the gradient, before anything is exponentiated."""
    usable, has_old = mask & logp.isfinite(), logp_old.isfinite()
    if config.uses_ratio:
        usable &= has_old
    kept = keep & usable
    zero = torch.zeros((), dtype=logp.dtype, device=logp.device)
    # Dropped tokens may give a sequence ratio its value but never receive gradient.
    clean_logp = torch.where(kept, logp, torch.where(usable, logp.detach(), zero))
    clean_old = torch.where(has_old, logp_old, zero)
    term = config.token_loss(clean_logp, clean_old, advantage, usable, config.bounds)
    loss = torch.where(kept, term.loss * weight.unsqueeze(1), zero).sum()
    return LossOutput(
        loss,
        torch.where(usable, term.loss.detach(), torch.nan),
        torch.where(usable & has_old, term.ratio, torch.nan),
        term.clipped & usable,
        kept,
        (keep & ~usable).sum(),
    )


def policy_loss(
    config: ObjectiveConfig,
    logp: Tensor,
    logp_old: Tensor,
    advantage: Tensor,
    mask: Tensor,
    keep: Tensor,
    weight: Tensor,
) -> LossOutput:
    """Weighted sum of the kept token losses, ``sum(token_loss * keep * weight)``.

    Returns unscaled loss and per-token detail.

    Parameters
    ----------
    logp : Tensor, shape (B, T)
        Log-probability (nats) of each sampled token under the trained policy; carries gradient.
        Half precision is computed in float32, float64 stays float64.
    logp_old : Tensor, shape (B, T)
        The same under the behaviour policy; carries none.
    advantage : Tensor, shape (B,)
        Advantage of each rollout.
    mask : Tensor of bool (or 0/1), shape (B, T)
        Completion tokens.
    keep : Tensor of bool, shape (B, T)
        Tokens in the loss (`keep_tokens`).
    weight : Tensor, shape (B,)
        Weight of each rollout (`BatchWeights.sequence_weight`).

    Notes
    -----
    Tokens outside ``keep`` add nothing to value or gradient, whatever they hold; kept tokens with
    a non-finite log-probability are left out and counted. The published rules multiply by masks
    instead, NaN included. Formulas: `token_losses`.
    """
    dtype = torch.promote_types(logp.dtype, torch.float32)
    compute = _selected if config.rules.masks_select else _multiplied
    if config.objective.unit_advantage:
        advantage = torch.ones_like(advantage)
    return compute(
        config,
        logp.to(dtype),
        logp_old.detach().to(dtype),
        advantage.to(logp.device, dtype),
        mask.bool(),
        keep,
        weight.to(logp.device, dtype),
    )
