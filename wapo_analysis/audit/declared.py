"""Which losses are known, what a run says of its own, and where each trainer computes them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from typing import Any

from wapo_analysis.audit.coefficient import MEANS, Core
from wapo_analysis.audit.evidence import OWN_SOURCES
from wapo_analysis.objectives.table import OBJECTIVES, Objective, rollout_surrogate

STANDARD = frozenset({"group mean, population std", "group mean, sample std"})
CENTRED = frozenset({"group mean"})


@dataclass(frozen=True, kw_only=True)
class Known:
    """A loss as an audit can see it."""

    name: str
    #: How it uses the ratio and over what it averages; several where it is as good as the other,
    #: none where it is left open.
    cores: frozenset[Core] = frozenset()
    means: frozenset[str] = frozenset()
    #: How it forms advantages; None leaves it open.
    advantages: frozenset[str] | None = None
    #: Rollouts with A < 0 are left out; None leaves it open.
    positive_only: bool | None = False
    #: Clip range of the ratio; (0, inf) where nothing is clipped or the range is not known.
    bounds: tuple[float, float] = (0.0, inf)

    @property
    def mean(self) -> str:
        """Its mean in words."""
        return " or ".join(MEANS[name] for name in MEANS if name in self.means)


_RULES = {"seq": "seq", "group": "group", "global": "batch", "fixed_length": "constant",
          "longest": "constant"}  # fmt: skip
_ADVANTAGES = {
    "standardized": STANDARD,
    "centered": CENTRED,
    "raw": frozenset({"the reward itself"}),
}


def _row(name: str, row: Objective, rule: str, ratio: bool) -> Known:
    core = Core("plain", "mean") if row.token_loss is rollout_surrogate else Core("plain")
    if row.unit_advantage:
        core = Core("unit")
    elif not ratio:
        core = Core("none")
    means = {_RULES[rule]}
    if rule == "longest":
        means.add("padded")
    return Known(
        name=name,
        cores=frozenset({core}),
        means=frozenset(means),
        advantages=_ADVANTAGES[row.advantage],
        positive_only=row.positive_only,
    )


def _own() -> dict[str, Known]:
    rows = {}
    for name, row in OBJECTIVES.items():
        rule = row.unset_rule or (row.group_rule if row.level == "group" else row.level)
        rows[name] = _row(name, row, rule, row.clip != "none")
    return rows


def _loss(name: str, core: Core, *means: str) -> Known:
    return Known(name=name, cores=frozenset({core}), means=frozenset(means))


TOKEN, MEAN, SUM = Core("plain"), Core("plain", "mean"), Core("plain", "sum")
#: The objectives of `wapo_analysis.objectives`.
OWN = _own()
#: The losses of trl.
TRL = {
    known.name: known
    for known in (
        _loss("grpo", TOKEN, "seq"),
        _loss("dapo", TOKEN, "batch"),
        _loss("bnpo", TOKEN, "pass"),
        _loss("dr_grpo", TOKEN, "constant"),
        _loss("cispo", Core("cispo"), "batch"),
        _loss("sapo", Core("sapo"), "seq"),
        _loss("luspo", MEAN, "sum"),
        _loss("vespo", Core("vespo", "sum"), "batch"),
        _loss("rloo", SUM, "sum"),
        replace(_loss("gmpo", Core("gmpo", "mean"), "seq"),
                cores=frozenset({Core("gmpo", "mean"), MEAN})),
    )
}  # fmt: skip


def _both() -> dict[str, Known]:
    """Names as the field uses them: a name that two sources use differently means either."""
    rows = {**TRL, **OWN}
    for name in TRL.keys() & OWN.keys():
        means = TRL[name].means | OWN[name].means | ({"padded"} if name == "dr_grpo" else set())
        rows[name] = replace(OWN[name], means=means)
    rows["reinforce"] = _loss("reinforce", Core("none"), "seq", "batch", "pass", "sum", "constant")
    return rows


ANY = _both()


def library(source: str) -> dict[str, Known]:
    """Losses by the names that a source uses."""
    return OWN if source == "built-in" else TRL if source == "trl" else ANY


def settings_of(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers of the losses: as the run declares them, else the usual ones."""
    config, objective = manifest.get("config") or {}, manifest.get("objective") or {}

    def number(name: str, usual: float) -> float:
        value = config.get(name)
        return float(value) if isinstance(value, int | float) else usual

    low, high = objective.get("bounds") or (None, None)
    high_epsilon = number("epsilon_high", 0.0)
    return {
        "bounds": (float(low or 0.0), inf if high is None else float(high)),
        "cap": high_epsilon if high_epsilon > 0 else 5.0,
        "sapo": (number("sapo_temperature_pos", 1.0), number("sapo_temperature_neg", 1.05)),
        "vespo": (
            number("vespo_k_pos", 2.0), number("vespo_lambda_pos", 3.0),
            number("vespo_k_neg", 3.0), number("vespo_lambda_neg", 2.0),
        ),
    }  # fmt: skip


def declared_of(manifest: Mapping[str, Any]) -> Known | None:
    """The loss that a run says it uses, with its settings; None if it names none that is known."""
    source = str(manifest.get("source") or "unknown")
    objective, config = manifest.get("objective") or {}, manifest.get("config") or {}
    known = library(source).get(str(objective.get("name", "")).lower())
    if known is None and source == "trl":
        known = OWN.get(str(objective.get("name", "")))  # use_wapo
    named = objective.get("name") not in (None, "", "unknown")
    if known is None and source not in OWN_SOURCES and named:
        known = Known(name=str(objective["name"]), positive_only=None)
    if known is None:
        return None
    low, high = settings_of(manifest)["bounds"]
    known = replace(known, bounds=(low, high))
    if source == "built-in":
        return _own_settings(known, objective)
    if source == "trl" and "loss_mean_level" in objective:  # use_objective: one of our own
        return _own_settings(replace(OWN[known.name], bounds=(low, high)), objective)
    if source == "trl" and known.name in TRL:
        return _trl_settings(known, config)
    return known if source in OWN_SOURCES else _stated(known, objective)


_CORES = {"token ratio": TOKEN, "no ratio": Core("none"), "rollout ratio (mean)": MEAN,
          "rollout ratio (sum)": SUM}  # fmt: skip
_MEANS = {"rollout": "seq", "tokens": "batch"}


def _stated(known: Known, objective: Mapping[str, Any]) -> Known:
    """What a loop says of itself beside a name: ratio, mean, advantage."""
    ratio, mean, advantage = (_words(objective.get(n)) for n in ("ratio", "mean", "advantage"))
    if ratio and all(name in _CORES for name in ratio):
        known = replace(known, cores=frozenset(_CORES[name] for name in ratio))
    named = frozenset(_MEANS.get(name, name) for name in mean)
    if named and named <= MEANS.keys():
        known = replace(known, means=named)
    return replace(known, advantages=frozenset(advantage)) if advantage else known


def _words(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [str(v) for v in value or ()]


def _own_settings(known: Known, objective: Mapping[str, Any]) -> Known:
    row, level = OBJECTIVES[known.name], objective.get("loss_mean_level")
    if level in _RULES:
        rule = row.group_rule if level == "group" else str(level)
        known = replace(known, means=frozenset({_RULES[rule]}))
    if objective.get("use_importance_sampling") is False and row.without_ratio is not None:
        known = replace(known, cores=frozenset({Core("none")}))
    if objective.get("normalize_by_kept_tokens"):  # a mini-batch is the unit of account
        kept = {"seq": {"seq"}, "group": {"group"}}.get(level or row.level, {"batch", "pass"})
        known = replace(known, means=frozenset(kept))
    gated: bool | None = known.positive_only or bool(objective.get("mask_negative_advantages"))
    if objective.get("include_bins") or objective.get("exclude_bins"):
        gated = None
    exactly = (
        frozenset({"group mean, population std"})
        if known.advantages == STANDARD
        else known.advantages
    )
    return replace(known, positive_only=gated, advantages=exactly)


def _trl_settings(known: Known, config: Mapping[str, Any]) -> Known:
    if config.get("importance_sampling_level") == "sequence":
        known = replace(
            known, cores=frozenset(
                Core(core.kind, "mean") if core.level == "token" else core for core in known.cores
            )
        )  # fmt: skip
    elif known.name == "luspo":
        known = replace(known, cores=frozenset({TOKEN}))
    if config.get("use_vllm"):  # importance weights may multiply every coefficient
        known = replace(known, cores=frozenset(), means=frozenset())
    scaled = str(config.get("scale_rewards", "group")).lower()
    rules = {"group": "group mean, sample std", "true": "group mean, sample std",
             "none": "group mean",
             "false": "group mean", "batch": "group mean, sample std of the batch"}  # fmt: skip
    if known.name in ("rloo", "gmpo") or scaled not in rules:
        return known
    return replace(known, advantages=frozenset({rules[scaled]}))


def exact(source: str) -> bool:
    """Whether a source's declaration says exactly which loss is meant."""
    return source in OWN_SOURCES


#: Where to look, by subject and source.
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


def look(source: str, subject: str) -> str:
    """Place to look at in a trainer."""
    places = PLACES[subject]
    return places.get(source, places[""])
