"""What an audit says: objective in force, deviations with their evidence, what cannot be told."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from wapo_analysis.results import Block, Items, Result, Say, Section, plain

NO_SAMPLES = "tokens are no samples of the policy"
"""Deviation beside which odds of tokens mean nothing."""


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """Something the trainer does that it should not, or not by what was declared.

    Attributes
    ----------
    name : str
        Short name of the kind, for programs.
    says : str
        What was seen, with its size.
    tokens : str
        The tokens that show it.
    cause : str
        The usual cause.
    look : str
        The place to look at in this trainer.
    """

    name: str
    says: str
    tokens: str
    cause: str
    look: str


@dataclass
class Findings:
    """What the checks of an audit add to, one after the other.

    Attributes
    ----------
    deviations : list of Deviation
    facts : dict of str to str
        Of every check that could be made, what it found.
    missing : dict of str to str
        Of every check that could not, why.
    """

    deviations: list[Deviation] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)

    def deviates(self, name: str, says: str, *, tokens: str, cause: str, look: str) -> None:
        """Add a deviation, once for each kind."""
        if all(found.name != name for found in self.deviations):
            self.deviations.append(
                Deviation(name=name, says=says, tokens=tokens, cause=cause, look=look)
            )


@dataclass(frozen=True, kw_only=True)
class Audit(Result):
    """What a trainer computes, detected from its recorded tokens.

    Attributes
    ----------
    run : str
        Name of the run.
    declared : str
        Objective that the run names.
    fits : tuple of str
        Known objectives that fit everything that was seen; several if the data cannot tell them
        apart, none if nothing known fits or it cannot be told.
    summary : str
        The first line.
    steps : tuple of int
        Steps that were looked at.
    tokens : int
        Their token rows.
    deviations, facts, missing
        See `Findings`.
    """

    run: str
    declared: str
    fits: tuple[str, ...]
    summary: str
    steps: tuple[int, ...]
    tokens: int
    deviations: tuple[Deviation, ...]
    facts: dict[str, str]
    missing: dict[str, str]

    @property
    def line(self) -> str:
        """The audit in one line, for a diagnosis."""
        names = ", ".join(found.name for found in self.deviations)
        return f"{self.summary}; deviations: {names}" if names else self.summary

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return plain(asdict(self))  # type: ignore[no-any-return]

    def page(self) -> Section:
        """First line, deviations, what was checked, what could not be."""
        parts: list[Block] = [Say(self.summary)]
        parts += [self._deviation(found) for found in self.deviations]
        if not self.deviations and self.tokens:
            parts.append(Say("No deviation found."))
        facts = [f"{name}: {text}" for name, text in self.facts.items()]
        missing = [f"{name}: not available here, because {why}" for name, why in _sorted(self)]
        parts += [Section("Checked", [Items(facts)])] if facts else []
        parts += [Section("Not checked", [Items(missing)])] if missing else []
        return Section(f"Audit of {self.run}, {_steps(self.steps)}, {self.tokens} tokens", parts)

    @staticmethod
    def _deviation(found: Deviation) -> Section:
        lines = [f"tokens: {found.tokens}", f"usual cause: {found.cause}", f"look at: {found.look}"]
        return Section(f"Deviation: {found.says}", [Items(lines)])


def _sorted(audit: Audit) -> Sequence[tuple[str, str]]:
    return list(audit.missing.items())


def _steps(steps: Sequence[int]) -> str:
    if not steps:
        return "no steps"
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"


PLACES = {
    "temperature": {
        "trl": "GRPOConfig.temperature, top_p, top_k; _get_per_token_logps_and_entropies",
        "verl": "rollout.temperature, top_p, top_k; dp_actor._forward_micro_batch",
        "": "where logits become log-probabilities: divide by the sampling temperature, and shift "
        "by one",
    },
    "old": {
        "trl": "old_per_token_logps in _generate_and_score_completions; steps_per_generation",
        "verl": "compute_log_prob and the weight sync of the rollout workers",
        "": "where old log-probabilities are computed, and where the sampler gets its weights",
    },
    "update": {
        "trl": "learning_rate, lr_scheduler_type, requires_grad of the model, the optimizer",
        "": "zero_grad, backward, step, in this order; the parameters that the optimizer was given",
    },
    "mask": {
        "trl": "completion_mask in _generate_and_score_completions",
        "verl": "response_mask and loss_agg_mode in core_algos.agg_loss",
        "": "the mask that the loss multiplies its tokens with",
    },
    "rollouts": {
        "trl": "RepeatSampler and num_generations",
        "": "the sampling call: one prompt per rollout, one random state for all",
    },
    "mean": {
        "trl": "the end of GRPOTrainer._compute_loss, loss_type",
        "verl": "core_algos.agg_loss, loss_agg_mode",
        "": "the line that averages the token losses, and the division by accumulation steps",
    },
    "ratio": {
        "trl": "GRPOTrainer._compute_loss: coef_1, coef_2, per_token_loss",
        "verl": "core_algos.compute_policy_loss",
        "": "the lines that make ratio and clipped ratio",
    },
    "advantage": {
        "trl": "advantages in _generate_and_score_completions, scale_rewards",
        "verl": "core_algos.compute_grpo_outcome_advantage",
        "": "the lines that make advantages from rewards",
    },
    "kl": {
        "trl": "beta and per_token_kl in GRPOTrainer._compute_loss",
        "verl": "use_kl_loss, kl_loss_coef, kl_penalty; entropy_coeff",
        "": "the terms that are added to the policy loss, and what is detached",
    },
    "precision": {"": "fp16 without a loss scale; bf16 or GradScaler"},
}
"""Where to look, by subject and source."""


def look(source: str, subject: str) -> str:
    """Place to look at in a trainer."""
    places = PLACES[subject]
    return places.get(source, places[""])
