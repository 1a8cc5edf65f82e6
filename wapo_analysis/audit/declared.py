"""What a run says its objective is, in the words of the audit, and the name it behaves as."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from wapo_analysis.audit.core import Core, Level
from wapo_analysis.store import Run

_TOKEN, _NONE, _MEAN, _SUM = (
    "token ratio", "no ratio", "rollout ratio (mean)", "rollout ratio (sum)",
)  # fmt: skip
_SAPO, _CAPPED = "sigmoid gate (SAPO)", "capped token ratio"

# TRL's loss types (trl/trainer/grpo_trainer.py, 1.16): form, level, how passes of a step compare,
# and what the weights of an update add up to where that is 1.
_TRL: Mapping[str, tuple[tuple[str, ...], tuple[str, ...], str, float | None]] = {
    "grpo": ((_TOKEN,), ("rollout",), "", 1),
    "bnpo": ((_TOKEN,), ("tokens",), "per pass", 1),
    "dr_grpo": ((_TOKEN,), ("tokens",), "", None),
    "dapo": ((_TOKEN,), ("tokens",), "same", 1),
    "cispo": ((_CAPPED, _NONE), ("tokens",), "same", None),
    "sapo": ((_SAPO,), ("rollout",), "", 1),
    "luspo": ((_MEAN,), ("tokens",), "", None),
    "vespo": ((_NONE,), (), "", None),
    "rloo": ((_SUM,), (), "", None),
}
_STANDARD = ("group mean, population std", "group mean, sample std")
_MADE = {"standardized": _STANDARD[:1], "centered": ("group mean",), "raw": ("the reward itself",)}


@dataclass(frozen=True)
class Declared:
    """What is expected of a run; empty where it says nothing.

    Attributes
    ----------
    name : str
    cores, levels, advantages : tuple of str
        Allowed forms, levels and ways of making advantages.
    across : str
        How the constant of a mean over tokens compares between the passes of a step.
    total : float or None
        What the weights of an update add up to.
    positive_only, two_sided : bool
        Trains on positive advantages alone; the clip acts on both sides for both signs.
    kl : bool or None
        A KL term is in the loss; None if nothing is said.
    period : int
        Steps from one batch of fresh rollouts to the next.
    """

    name: str = ""
    cores: tuple[str, ...] = ()
    levels: tuple[str, ...] = ()
    advantages: tuple[str, ...] = ()
    across: str = ""
    total: float | None = None
    positive_only: bool = False
    two_sided: bool = False
    kl: bool | None = None
    period: int = 1

    def fresh(self, steps: Iterable[int]) -> list[int]:
        """Steps whose first pass meets rollouts of the very weights that are trained."""
        return [step for step in steps if (step - 1) % self.period == 0]


def declared(run: Run) -> Declared:
    """What the manifest of a run says of its objective."""
    objective = run.manifest.objective
    name = str(objective.get("name", ""))
    source = run.manifest.source
    if source == "built-in":
        return _own(run)
    if source == "trl" and name != "wapo":
        return _trl(name, objective, run.manifest.config)
    return Declared(
        name=name,
        cores=_given(objective, "ratio"),
        levels=_given(objective, "mean"),
        advantages=_given(objective, "advantage"),
        across=str(objective.get("across", "")),
        total=objective.get("total"),
        positive_only=name == "wapo" or bool(objective.get("positive_only")),
        kl=objective.get("kl"),
    )


def _given(objective: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = objective.get(key)
    return (value,) if isinstance(value, str) else tuple(value or ())


def _own(run: Run) -> Declared:
    from wapo_analysis.objectives.config import OBJECTIVES
    from wapo_analysis.objectives.token_losses import likelihood, rollout_surrogate

    objective = run.manifest.objective
    name = str(objective.get("name", ""))
    row = OBJECTIVES.get(name)
    if row is None:
        return Declared(name)
    ratio = row.token_loss is not likelihood and objective.get("use_importance_sampling", True)
    by_rollout = row.token_loss is rollout_surrogate
    chosen = objective.get("loss_mean_level")
    rule = chosen or row.unset_rule or (row.group_rule if row.level == "group" else row.level)
    levels = {"seq": "rollout", "group": "group", "fixed_length": "tokens", "global": "tokens",
              "longest": "tokens"}  # fmt: skip
    if chosen == "group":
        rule = row.group_rule
    plain = not objective.get("normalize_by_kept_tokens") and not objective.get("official")
    return Declared(
        name=name,
        cores=(_MEAN if by_rollout else _TOKEN if ratio else _NONE,),
        levels=(levels[rule],) if plain and rule in levels else (),
        advantages=_MADE[row.advantage],
        positive_only=row.positive_only or bool(objective.get("mask_negative_advantages")),
        kl=False,
    )


def _trl(name: str, objective: Mapping[str, Any], config: Mapping[str, Any]) -> Declared:
    cores, levels, across, total = _TRL.get(name, ((), (), "", None))
    if config.get("importance_sampling_level") == "sequence" and cores == (_TOKEN,):
        cores = (_MEAN,)
    plain = not config.get("use_vllm")  # else importance weights multiply every coefficient
    scale = str(config.get("scale_rewards", ""))
    made = {"group": ("group mean, sample std",), "True": ("group mean, sample std",),
            "none": ("group mean",), "False": ("group mean",),
            "batch": ("group mean, sample std of the batch",)}  # fmt: skip
    accumulate = int(config.get("gradient_accumulation_steps") or 1)
    generation = int(config.get("steps_per_generation") or accumulate)
    period = max(generation * int(config.get("num_iterations") or 1) // accumulate, 1)
    return Declared(
        name=name,
        cores=cores if plain else (),
        levels=levels if plain else (),
        advantages=made.get(scale, ()) if name in _TRL and name != "rloo" else (),
        across=across,
        total=total if plain else None,
        two_sided=objective.get("delta") not in (None, float("inf")),
        kl=float(config.get("beta") or 0.0) != 0.0,
        period=period,
    )


def known_as(found: Core, averaged: Level, said: Declared) -> str:
    """Name of what a form and a mean add up to: the declared one where it fits, else in words."""
    level = averaged.names
    fits = (not said.cores or set(said.cores) & set(found.names)) and (
        not said.levels or not level or set(said.levels) & set(level)
    )
    words = {"rollout": "mean per rollout", "group": "mean per group", "tokens": "mean over tokens"}
    mean = " or ".join(words[name] for name in level)
    form = " or ".join(found.names) if len(found.names) < 3 else "ratio not told"
    told = ", ".join(part for part in (form, mean) if part)
    if said.name and said.cores and fits:
        return f"{said.name} ({told})"
    return told
