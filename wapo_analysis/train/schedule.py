"""The learning rate of a step: linear warm-up, then constant or falling."""

import math

from wapo_analysis.train.config import TrainConfig


def learning_rate(config: TrainConfig, step: int) -> float:
    """Learning rate of a step, from 1.

    Warm-up: lr step / warmup_steps. After it, with N steps to go and n of them done, linear is
    lr (1 - n / N) and cosine lr (1 + cos(pi n / N)) / 2, so the last step still moves.
    """
    warmup = config.warmup_steps
    if step <= warmup:
        return config.lr * (step / warmup)
    done = min((step - 1 - warmup) / max(config.steps - warmup, 1), 1.0)
    if config.lr_schedule == "linear":
        return config.lr * (1.0 - done)
    if config.lr_schedule == "cosine":
        return config.lr * (1.0 + math.cos(math.pi * done)) / 2.0
    return config.lr
