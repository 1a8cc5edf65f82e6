"""A toy TRL run that is watched, the tokens it recorded, and the coefficients autograd gives."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.trl_toy import WatchedLoss, collect_tokens, mask_of, run, toy_trainer
from wapo_analysis import attach


def watched_run(tmp_path: Path, kind: Any = WatchedLoss, **settings: Any) -> tuple[Any, list[Any]]:
    knobs = {k: settings.pop(k) for k in ("exact_every", "rescore_every") if k in settings}
    trainer = toy_trainer(tmp_path / "out", kind, **settings)
    with attach(trainer, tmp_path / "run", token_every=1, **knobs) as attachment:
        steps = collect_tokens(attachment.recorder)
        run(trainer)
    assert attachment.recorder.failure is None
    return trainer, steps


def recorded(steps: list[Any], name: str) -> np.ndarray:
    return np.concatenate([tokens[name] for tokens in steps])


def expected_coef(trainer: Any) -> np.ndarray:
    return torch.cat([grad[mask_of(i)] for grad, i in trainer.expected()]).numpy()
