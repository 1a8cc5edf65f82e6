"""Columns of the fake runs: statistics of softmaxes, the loss's coefficients, a step's line."""

import numpy as np
import wapo_taxonomy as tax

from wapo_analysis.table import Array, Records


def advantages(rewards: Array, standardize: bool) -> Array:
    centred = rewards - rewards.mean(axis=1, keepdims=True)
    return centred / (rewards.std(axis=1, keepdims=True) + 1e-8) if standardize else centred


def softmax(logits: Array) -> Array:
    weight = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weight / weight.sum(axis=1, keepdims=True)


def softmax_stats(logits: Array, chosen: Array, temperature: float) -> dict[str, Array]:
    """Statistics of shape (tokens,) of softmax(logits / T) with the chosen token left out."""
    scaled = logits / temperature
    shifted = scaled - scaled.max(axis=1, keepdims=True)
    # The mode weighs exactly 1, so log1p of the others keeps ln p of a near-certain token.
    others = np.exp(shifted) * (np.arange(logits.shape[1]) != shifted.argmax(axis=1)[:, None])
    logp = shifted - np.log1p(others.sum(axis=1, keepdims=True))
    prob, rows = np.exp(logp), np.arange(len(chosen))
    others = np.where(np.arange(logits.shape[1]) == chosen[:, None], 0.0, prob)
    return {
        "logp": logp[rows, chosen],
        "entropy": -(prob * logp).sum(axis=1),
        "collision_rest": (others**2).sum(axis=1),
        "collision_logp_rest": (others**2 * logp).sum(axis=1),
        "top1": prob.argmax(axis=1) == chosen,
    }


def sample(rng: np.random.Generator, logits: Array, temperature: float) -> Array:
    return (logits / temperature + rng.gumbel(size=logits.shape)).argmax(axis=1)


def coefficients(
    advantage: Array, ratio: Array, objective: str, classes: Array, bins: tuple[str, ...]
) -> dict[str, Array]:
    """-dL/dlogp of a token-mean loss with the clip flag and the kept flag, each (tokens,)."""
    kept = advantage > 0 if objective == "wapo" else np.ones(len(ratio), bool)
    if bins:
        kept = kept & np.isin(classes, [tax.CLASS_CODES[name] for name in bins])
    low, high = (0.0, 10.0) if objective == "wapo" else (0.8, 1.2)
    clipped = kept & (((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low)))
    coef = np.where(kept & ~clipped, ratio * advantage, 0.0) / len(ratio)
    return {"coef": coef, "clipped": clipped, "kept": kept}


def step_row(step: int, tokens: Records, rewards: Array, broken: bool) -> dict[str, float]:
    c = tokens.columns
    entropy, sign = c["entropy"].astype(np.float64), c["sign"]
    flat = np.ptp(rewards, axis=1) == 0
    total = float(np.sqrt(np.nansum(c["grad_norm"] ** 2)))
    high = c["clipped"] & (c["advantage"] > 0)
    return {
        "step": step,
        "reward": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "pass_rate": float((rewards >= 1).mean()),
        "groups_all_wrong": float((flat & (rewards[:, 0] == 0)).mean()),
        "groups_all_right": float((flat & (rewards[:, 0] > 0)).mean()),
        "loss": float("nan") if broken else float(-c["coef"].sum()),
        "grad_norm": float("nan") if broken else total,
        "lr": 5e-5,
        "entropy": float(entropy.mean()),
        "entropy_pos": float(entropy[sign > 0].mean()) if (sign > 0).any() else float("nan"),
        "entropy_neg": float(entropy[sign < 0].mean()) if (sign < 0).any() else float("nan"),
        "length": float(len(tokens) / rewards.size),
        "truncated": float(rewards.size // 7 / rewards.size),
        "repetition": 0.02,
        "kl_old": float(np.mean(0.5 * (c["logp"] - c["logp_old"]).astype(np.float64) ** 2)),
        "clip_low": float((c["clipped"] & ~high).mean()),
        "clip_high": float(high.mean()),
        "tokens": len(tokens),
        "kept_tokens": int(c["kept"].sum()),
        "nonfinite": 0,
        "skipped_updates": int(broken),
        "updates": 2,
        "seconds": 0.2,
        "seconds_rollout": 0.1,
        "seconds_capture": 0.01,
    }
