"""Advice in the names of the trainer that wrote the run."""

import re
from collections.abc import Mapping
from typing import Final

_TRL: Final = {
    r"widen clip_eps \(lower mask_ratio_low in the dapo family\)": "raise epsilon",
    r"widen clip_eps \(raise mask_ratio_high in the dapo family\)": "raise epsilon_high",
    r"clip_eps \(mask_ratio_high in the dapo family\)": "epsilon_high",
    r"\(objective = wapo\)": "(wapo_analysis.use_wapo(trainer))",
    r"\(exclude_bins = ([^)]*)\)": r"(TRL has no setting for it; wapo train: exclude_bins = \1)",
    r"\bepochs (x|or) minibatches\b": r"num_iterations \1 steps_per_generation",
    r"\blr\b": "learning_rate",
    r"\brollouts_per_prompt\b": "num_generations",
    r"\bmax_new_tokens\b": "max_completion_length",
    r"\(task, data\)": "(train_dataset)",
    r"\bdtype = float32\b": "fp16 = bf16 = False",
}
_VERL: Final = {
    r"widen clip_eps \(lower mask_ratio_low in the dapo family\)": "raise actor.clip_ratio_low",
    r"widen clip_eps \(raise mask_ratio_high in the dapo family\)": "raise actor.clip_ratio_high",
    r"clip_eps \(mask_ratio_high in the dapo family\)": "actor.clip_ratio_high",
    r"\(objective = wapo\)": "(zero the negative advantages)",
    r"\(exclude_bins = ([^)]*)\)": r"(verl has no setting for it; wapo train: exclude_bins = \1)",
    r"\bepochs (x|or) minibatches\b": r"actor.ppo_epochs \1 mini-batches of a step",
    r"\blr\b": "actor.optim.lr",
    r"\bmax_grad_norm\b": "actor.grad_clip",
    r"\brollouts_per_prompt\b": "rollout.n",
    r"\bmax_new_tokens\b": "data.max_response_length",
    r"\(task, data\)": "(data.train_files)",
}
_NAMES: Final[Mapping[str, Mapping[str, str]]] = {"trl": _TRL, "verl": _VERL}
"""Source of a run to patterns in the advice, which names fields of TrainConfig, in order."""


def in_names_of(source: object, advice: str) -> str:
    """Advice with the settings called as the trainer of the run calls them.

    Parameters
    ----------
    source : object
        ``source`` of the manifest; one that is not known leaves the advice as it is.
    advice : str
        Advice that names fields of `TrainConfig`.

    Examples
    --------
    >>> in_names_of("trl", "Lower lr or the updates per batch (epochs x minibatches).")
    'Lower learning_rate or the updates per batch (num_iterations x steps_per_generation).'
    """
    for pattern, name in _NAMES.get(str(source), {}).items():
        advice = re.sub(pattern, name, advice)
    return advice
