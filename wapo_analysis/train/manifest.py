"""What the manifest of a built-in run says: settings, model, versions."""

import platform
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from wapo_analysis.store import Run
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.models import Policy
from wapo_analysis.train.tasks import get_task


def new_manifest(config: TrainConfig, policy: Policy) -> dict[str, Any]:
    """Manifest of a new run: what was trained, on what, with which versions."""
    task = get_task(config.task)
    objective = config.objective_config(config.max_new_tokens or task.max_new_tokens)
    packages = ("wapo-analysis", "torch", "transformers", "numpy", "pandas", "pyarrow")
    return {
        "name": f"{config.shown_label} seed {config.seed}",
        "label": config.shown_label,
        "source": "built-in",
        "objective": {**asdict(objective), "bounds": [objective.bounds.low, objective.bounds.high]},
        "task": config.task,
        "model": config.model,
        "tokenizer": type(policy.tokenizer).__name__,
        "vocabulary": int(policy.model.config.vocab_size),
        "parameters": sum(p.numel() for p in policy.module.parameters()),
        "seed": config.seed,
        "device": str(policy.device),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in packages}},
        "config": config.to_dict(),
    }


def resumed_manifest(run: Run, config: TrainConfig) -> dict[str, Any]:
    """Manifest of a continued run; a changed step count is the only change it may carry."""
    resumed = [*run.manifest.get("resumed", []), datetime.now(UTC).isoformat(timespec="seconds")]
    return {**run.manifest, "config": config.to_dict(), "resumed": resumed}
