"""From scored tokens to rows of the probes table: arrays in, records out.

N tokens were scored before the update, after each of its parts alone, after half of it and after
all of it. What is stored are means over sets of tokens, so that the parts of an update add up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import wapo_taxonomy as tax

from wapo_analysis.schema import (
    ALL_TOKENS,
    GRADIENT,
    INTERACTION,
    MOMENTUM,
    OTHER_TOKENS,
    PROBES,
    UPDATE,
    WEIGHT_DECAY,
)
from wapo_analysis.table import Array, Records

CLASS_CODES = range(len(tax.CLASSES))
#: Parts whose steps add up to the whole step; their effects leave the interaction over.
ADDENDS = (*CLASS_CODES, MOMENTUM, WEIGHT_DECAY)
TOKEN_SETS = (*CLASS_CODES, ALL_TOKENS, OTHER_TOKENS)


@dataclass(frozen=True, kw_only=True)
class ProbedTokens:
    """The N tokens of a probe as they stood before the update; every array has shape (N,)."""

    #: Class code of the taxonomy; ``OTHER_TOKENS`` for tokens that have no part in the update.
    cls: Array
    #: -dL/dlogp, what the loss put on the token; 0 for tokens that have no part in the update.
    coef: Array
    #: Log-probability of the sampled token and entropy, nats.
    logp: Array
    entropy: Array
    #: Sums over the other tokens, as in the token table.
    collision_rest: Array
    collision_logp_rest: Array
    #: Softmax temperature.
    temperature: float = 1.0

    @property
    def unit_step(self) -> Array:
        """Step of the logits per unit learning rate, ``coef / T^2``."""
        return np.asarray(tax.logit_step(self.coef, self.temperature))

    @property
    def dlogp(self) -> Array:
        """First-order change of logp per unit learning rate, nats: k ((1-p)^2 + C_o)."""
        complement = -np.expm1(self.logp)
        return np.asarray(self.unit_step * (complement**2 + self.collision_rest))

    @property
    def dprob(self) -> Array:
        """First-order change of p per unit learning rate."""
        prob, complement = np.exp(self.logp), -np.expm1(self.logp)
        return np.asarray(tax.dprob_sampled(self.unit_step, prob, complement, self.collision_rest))

    @property
    def dentropy(self) -> Array:
        """First-order change of the entropy per unit learning rate, nats."""
        return np.asarray(
            tax.dentropy(
                self.unit_step,
                np.exp(self.logp),
                -np.expm1(self.logp),
                self.logp,
                self.entropy,
                self.collision_rest,
                self.collision_logp_rest,
            )
        )


@dataclass(frozen=True)
class Change:
    """What a step did to the N tokens.

    ``dlogp``, ``dentropy`` (N,): change of the log-probability of the sampled token and of the
    entropy, nats.
    """

    dlogp: Array
    dentropy: Array


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """How large a part of the update is in the weights."""

    #: L2 norm of its gradient before clipping; NaN for a part that has no gradient of its own.
    grad_norm: float
    #: L2 norm of its step.
    step_norm: float
    #: Inner product of its gradient with that of each class, in class order; NaN as above.
    dots: tuple[float, ...]


def fit_scale(unit_dlogp: Array, dlogp: Array) -> float:
    """Learning rate of the logits that explains a step best, by least squares through the origin.

    The local law says that token i moves by ``dlogp_i = eta x_i`` with ``x_i = c_i ((1-p_i)^2 +
    C_o,i) / T^2`` (taxonomy/README.md, section 3). In a network eta is not known beforehand: it is
    the mean of the tokens' own squared gradients. One number is fitted to all tokens of the probe,
    so signs and relative sizes stay the prediction's own. Returns eta; NaN if nothing was predicted
    to move. ``unit_dlogp`` (N,): x, first-order change of logp per unit learning rate; ``dlogp``
    (N,): measured change of logp, nats.
    """
    size = float(unit_dlogp @ unit_dlogp)
    return float(unit_dlogp @ dlogp) / size if size > 0 else float("nan")


def probe_rows(
    step: int,
    minibatch: int,
    tokens: ProbedTokens,
    changes: Mapping[int, Change],
    half: Change,
    sizes: Mapping[int, PartSize],
    closure_error: float,
) -> Records:
    """Rows of the probes table for one probed update.

    Returns one row per part and non-empty set of tokens. The interaction is the measured change
    less the effects of the addends, so that the parts add up to the measured change.

    Parameters
    ----------
    step, minibatch : int
        Which update.
    tokens : ProbedTokens
        The probe's tokens before the update.
    changes : mapping of part code to Change
        What each part did alone: the classes, ``GRADIENT``, ``MOMENTUM``, ``WEIGHT_DECAY`` and the
        whole ``UPDATE``.
    half : Change
        What half of the whole update did.
    sizes : mapping of part code to PartSize
        Size of each part in the weights.
    closure_error : float
        Part of the step of the weights that the parts do not account for.
    """
    scale = fit_scale(tokens.dlogp, changes[GRADIENT].dlogp)
    rows = []
    for tokens_of in TOKEN_SETS:
        if tokens_of == ALL_TOKENS:
            chosen = tokens.cls != OTHER_TOKENS
        else:
            chosen = tokens.cls == tokens_of
        if chosen.any():
            rows += _set_rows(tokens, changes, half, scale, tokens_of, chosen)
    common = {
        "step": step, "minibatch": minibatch, "scale": scale, "closure_error": closure_error,
    }  # fmt: skip
    full = [row | _size_columns(sizes.get(int(row["part"]))) | common for row in rows]
    return Records.build(PROBES, {name: [row[name] for row in full] for name in full[0]})


def _size_columns(size: PartSize | None) -> dict[str, float]:
    size = size or PartSize(grad_norm=np.nan, step_norm=np.nan, dots=(np.nan,) * len(tax.CLASSES))
    dots = {f"dot_{name}": dot for name, dot in zip(tax.CLASSES, size.dots, strict=True)}
    return {"grad_norm": size.grad_norm, "step_norm": size.step_norm, **dots}


def _set_rows(
    tokens: ProbedTokens,
    changes: Mapping[int, Change],
    half: Change,
    scale: float,
    tokens_of: int,
    chosen: Array,
) -> list[dict[str, Any]]:
    """One row per part for the tokens under a mask."""
    prob = np.exp(tokens.logp)

    def mean(values: Array) -> float:
        return float(values[chosen].mean())

    alone = {
        part: (mean(change.dentropy), mean(prob * np.expm1(change.dlogp)))
        for part, change in changes.items()
    }
    measured = alone[UPDATE]
    left = [measured[i] - sum(alone[part][i] for part in ADDENDS) for i in (0, 1)]
    alone[INTERACTION] = (left[0], left[1])
    common = {
        "tokens_of": tokens_of,
        "tokens": int(chosen.sum()),
        "measured_dentropy": measured[0],
        "measured_dprob": measured[1],
        "half_dentropy": mean(half.dentropy),
    }
    return [
        {
            "part": part,
            "predicted_dentropy": scale * mean(tokens.dentropy * own),
            "predicted_dprob": scale * mean(tokens.dprob * own),
            "counterfactual_dentropy": effect[0],
            "counterfactual_dprob": effect[1],
            **common,
        }
        for part, effect in alone.items()
        for own in [_own(tokens, part)]
    ]


def _own(tokens: ProbedTokens, part: int) -> Array:
    """1 for tokens that the part updates itself; NaN for a part of which the taxonomy is silent."""
    if part in (UPDATE, GRADIENT):
        return np.ones(len(tokens.cls))
    if part in CLASS_CODES:
        return np.asarray(tokens.cls == part, np.float64)
    return np.full(len(tokens.cls), np.nan)
