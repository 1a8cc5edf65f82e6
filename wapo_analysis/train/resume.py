"""Which settings a run that is continued may change: those that do not decide its weights."""

from dataclasses import fields
from pathlib import Path
from typing import Final

from wapo_analysis.errors import UserError
from wapo_analysis.store import read_manifest
from wapo_analysis.train.config import TrainConfig

CHANGEABLE: Final = frozenset(
    {
        # how far and where; a falling lr_schedule then falls towards the new last step
        "steps", "device", "microbatch_size", "sample_batch_size", "gradient_checkpointing",
        # what is kept and shown
        "checkpoint_every", "keep_checkpoints", "log_to", "label", "eval_every", "eval_prompts",
        "eval_samples", "eval_data", "token_every", "token_fraction", "rescore_every",
        "probe_every", "probe_rows", "store_bits", "capture_mode",
        # the only way out for a run that has met a prompt that is too long
        "max_prompt_tokens",
    }
)  # fmt: skip


def check_resumed(run: Path, config: TrainConfig) -> None:
    """Check that a run is continued with the settings that made it what it is.

    Raises
    ------
    UserError
        If one of them has changed, naming it and both values.
    """
    before = TrainConfig.from_dict(read_manifest(run).get("config", {}))
    for field in fields(TrainConfig):
        old, new = getattr(before, field.name), getattr(config, field.name)
        if old != new and field.name not in CHANGEABLE:
            raise UserError(
                f"{field.name} of a run that is continued cannot change from {old!r} to {new!r}; "
                "start a new run with another --out"
            )
