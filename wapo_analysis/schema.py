"""Every table of a run, declared once as data: column, dtype, unit, kind, one line of meaning.

Validation, storage types, axis labels, ``wapo schema`` and docs/schema.md all come from here.
Missing values: a statistic a source cannot give is NaN (floats) or the dtype's null, never 0.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

SCHEMA_VERSION = 1

Kind = Literal["key", "measured", "later", "derived"]


@dataclass(frozen=True, slots=True)
class Column:
    """One column of one table.

    Attributes
    ----------
    name : str
        Name in memory, on disk and in data frames.
    dtype : str
        numpy dtype string, or ``"str"``.
    unit : str
        Unit shown on axes; ``"1"`` for plain numbers.
    kind : {"key", "measured", "later", "derived"}
        ``later`` is measured on schedule after the optimizer step, ``derived`` is recomputed on
        reading and never stored.
    doc : str
        What the number is.
    required : bool
        A source must give it; otherwise it may be missing (NaN) or absent.
    """

    name: str
    dtype: str
    unit: str
    kind: Kind
    doc: str
    required: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A named table: its columns in order and what one row stands for."""

    name: str
    row: str
    columns: tuple[Column, ...]

    def __iter__(self) -> Iterator[Column]:
        return iter(self.columns)

    def __getitem__(self, name: str) -> Column:
        for column in self.columns:
            if column.name == name:
                return column
        raise KeyError(f"table {self.name!r} has no column {name!r}")

    def __contains__(self, name: object) -> bool:
        return any(column.name == name for column in self.columns)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all columns, derived ones included."""
        return tuple(column.name for column in self.columns)

    @property
    def stored(self) -> tuple[Column, ...]:
        """Columns that are written to disk."""
        return tuple(column for column in self.columns if column.kind != "derived")

    @property
    def required(self) -> tuple[str, ...]:
        """Names a source must give."""
        return tuple(column.name for column in self.columns if column.required)


def _key(name: str, doc: str, dtype: str = "int32") -> Column:
    return Column(name, dtype, "1", "key", doc, required=True)


def _measured(
    name: str, unit: str, doc: str, dtype: str = "float32", required: bool = False
) -> Column:
    return Column(name, dtype, unit, "measured", doc, required)


TOKENS = Table(
    "tokens",
    "one completion token as it stood in one gradient pass",
    (
        _key("step", "rollout step of the run (one batch; N optimizer updates), from 1"),
        _key("minibatch", "gradient pass within the step, from 0; epochs count on", "int16"),
        _key("rank", "process that saw the token", "int16"),
        _key("group", "prompt of the step, from 0: rollouts of one group share it"),
        _key("rollout", "completion of the step, from 0"),
        _key("position", "place in the completion, from 0"),
        _key("token_id", "id of the sampled token"),
        _measured("advantage", "1", "advantage of the token's rollout", required=True),
        _measured("logp", "nats", "log-probability under the policy being updated", required=True),
        _measured("logp_old", "nats", "log-probability under the behaviour policy that sampled it"),
        _measured(
            "logp_prox",
            "nats",
            "log-probability under the proximal policy, the old one of the loss's ratio, where "
            "that is not the behaviour policy",
        ),
        _measured("entropy", "nats", "entropy of the policy at this position"),
        _measured("collision_rest", "1", "sum of p_v^2 over all tokens but the sampled one"),
        _measured(
            "collision_logp_rest", "nats", "sum of p_v^2 ln p_v over all tokens but the sampled one"
        ),
        _measured("coef", "1", "-dL/dlogp, what the loss put on this token; > 0 pushes it up"),
        _measured("clipped", "1", "the clip took the gradient away", "bool"),
        _measured("kept", "1", "the token takes part in the loss", "bool"),
        _measured("top1", "1", "the sampled token was the most probable one", "bool"),
        Column("logp_after", "float32", "nats", "later", "logp after the update this pass fed"),
        Column(
            "entropy_after", "float32", "nats", "later", "entropy after the update this pass fed"
        ),
        Column("prob", "float64", "probability", "derived", "p = exp(logp)"),
        Column("complement", "float64", "probability", "derived", "1 - p, without cancellation"),
        Column("collision", "float64", "1", "derived", "S = sum of p_v^2"),
        Column("sign", "int8", "1", "derived", "sign of the advantage: 1, 0, -1"),
        Column("regime", "int8", "1", "derived", "1 peak (p >= S), 0 valley, -1 unknown"),
        Column("cls", "int8", "1", "derived", "class of the taxonomy; its name in data frames"),
        Column("prob_bin", "int8", "1", "derived", "index into PROB_EDGES"),
        Column("grad_norm", "float64", "1", "derived", "|dL/dz|, exact L2 norm over the logits"),
        Column("pred_dprob", "float64", "probability", "derived", "first-order dp, unit step"),
        Column("pred_dentropy", "float64", "nats", "derived", "first-order dH, unit step"),
        Column("dprob", "float64", "probability", "derived", "measured change of p"),
        Column("dentropy", "float64", "nats", "derived", "measured change of the entropy"),
        Column(
            "ratio",
            "float64",
            "1",
            "derived",
            "importance ratio of the loss: exp(logp - logp_prox), exp(logp - logp_old) without it",
        ),
    ),
)

CLASSES = Table(
    "classes",
    "exact totals of one step over ALL tokens of one sign, regime and probability bin",
    (
        _key("step", "rollout step"),
        _key("rank", "process", "int16"),
        _key("sign", "sign of the advantage: 1, 0, -1", "int8"),
        _key("regime", "1 peak, 0 valley, -1 unknown", "int8"),
        _key("prob_bin", "index into PROB_EDGES, -1 unknown", "int8"),
        _measured("tokens", "tokens", "tokens in the loss mask", "int64", required=True),
        _measured("kept", "tokens", "tokens that took part in the loss", "int64"),
        _measured("clipped", "tokens", "kept tokens whose gradient the clip took away", "int64"),
        _measured("entropy_sum", "nats", "sum of the entropy", "float64"),
        _measured("logp_sum", "nats", "sum of logp", "float64"),
        _measured("coef_sum", "1", "sum of coef", "float64"),
        _measured("coef_abs_sum", "1", "sum of |coef|", "float64"),
        _measured("grad_mass", "1", "sum of |dL/dz|, exact", "float64"),
        _measured("grad_mass_proxy", "1", "sum of |coef| (1 - p), the official proxy", "float64"),
        _measured("pred_dprob_sum", "probability", "sum of first-order dp, unit step", "float64"),
        _measured("pred_dentropy_sum", "nats", "sum of first-order dH, unit step", "float64"),
        _measured(
            "rule_breaks", "tokens", "tokens whose exact dH has not the rule's sign", "int64"
        ),
        _measured("rescored", "tokens", "tokens re-scored after the update", "int64"),
        _measured("dprob_sum", "probability", "sum of the measured change of p", "float64"),
        _measured("dentropy_sum", "nats", "sum of the measured change of entropy", "float64"),
    ),
)

STEPS = Table(
    "steps",
    "one rollout step (one batch; N optimizer updates); beside these columns it may hold numbers "
    "of the source under their own name, always with a slash; rewards/NAME/mean and "
    "rewards/NAME/std are those of one reward function",
    (
        _key("step", "step number, from 1"),
        _measured("reward", "1", "mean reward of the batch", "float64"),
        _measured("reward_std", "1", "standard deviation of the reward", "float64"),
        _measured("pass_rate", "1", "share of rollouts with reward >= 1", "float64"),
        _measured("groups_all_wrong", "1", "share of groups flat at their lowest", "float64"),
        _measured("groups_all_right", "1", "share of groups flat with reward > 0", "float64"),
        _measured("groups_flat", "1", "share of groups whose rewards are all equal", "float64"),
        _measured(
            "reward_penalised",
            "1",
            "mean reward minus the KL penalty, where a trainer logs it beside the plain reward",
            "float64",
        ),
        _measured(
            "eval_reward",
            "1",
            "score on held-out problems as the trainer logs it, mean over its data sets; only at "
            "steps with an evaluation (runs of our own trainer: eval/reward)",
            "float64",
        ),
        _measured("loss", "1", "value of the objective, summed over the step", "float64"),
        _measured("grad_norm", "1", "gradient norm before clipping, mean of updates", "float64"),
        _measured("lr", "1", "learning rate of the last update", "float64"),
        _measured("entropy", "nats", "mean entropy of the sampled positions", "float64"),
        _measured("entropy_pos", "nats", "the same over tokens with A > 0", "float64"),
        _measured("entropy_neg", "nats", "the same over tokens with A < 0", "float64"),
        _measured("length", "tokens", "mean completion length", "float64"),
        _measured("truncated", "1", "share of completions cut at the limit", "float64"),
        _measured("repetition", "1", "share of repeated 4-grams in the completions", "float64"),
        _measured(
            "kl_old",
            "nats",
            "k3 estimate of KL(behaviour || policy), mean of r - ln r - 1 with r = p / p_old; ln r "
            "above 20 counts as 20 (4.9e8 nats for such a token)",
            "float64",
        ),
        _measured(
            "kl_ref",
            "nats",
            "KL(policy || reference model) per token, any estimator, before its coefficient",
            "float64",
        ),
        _measured(
            "engine_kl",
            "nats",
            "KL(sampling engine || trainer) per token of the same sampled tokens, any estimator",
            "float64",
        ),
        _measured(
            "engine_logp_diff",
            "nats",
            "mean |logp of the trainer - logp of the sampling engine|",
            "float64",
        ),
        _measured(
            "engine_prob_diff",
            "probability",
            "mean |p of the trainer - p of the engine|",
            "float64",
        ),
        _measured("staleness", "1", "weight updates from sampling to training, mean", "float64"),
        _measured("clip_low", "1", "share of kept tokens stopped by the lower clip", "float64"),
        _measured("clip_high", "1", "share of kept tokens stopped by the upper clip", "float64"),
        _measured("clip_any", "1", "share stopped by either, where a log has no sides", "float64"),
        _measured("advantage_std", "1", "standard deviation of the advantages", "float64"),
        _measured("distinct", "1", "share of completions unlike the others, as logged", "float64"),
        _measured("value_loss", "1", "loss of the critic, where there is one", "float64"),
        _measured("value_explained", "1", "variance of returns its values explain", "float64"),
        _measured("tokens", "tokens", "completion tokens of the step", "int64"),
        _measured("prompts_cut", "1", "share of prompts whose beginning was cut to fit", "float64"),
        _measured("kept_tokens", "tokens", "tokens that took part in the loss", "int64"),
        _measured(
            "grad_outside",
            "tokens",
            "positions outside the loss mask that got a gradient all the same, of one process",
            "int64",
        ),
        _measured("grad_before", "tokens", "those before a rollout: its prompt", "int64"),
        _measured("grad_after", "tokens", "those after its end: padding", "int64"),
        _measured(
            "nonfinite",
            "tokens",
            "tokens whose logp, logp_old or entropy was given but not finite; left out of means",
            "int64",
        ),
        _measured("skipped_updates", "1", "updates skipped: gradient not finite", "int64"),
        _measured("updates", "1", "optimizer updates of the step", "int64"),
        _measured("seconds", "s", "wall time of the step", "float64"),
        _measured("seconds_rollout", "s", "time spent sampling", "float64"),
        _measured("seconds_probe", "s", "time spent on probing an update", "float64"),
        _measured(
            "seconds_capture",
            "s",
            "time of the training thread spent recording since the step line before",
            "float64",
        ),
        _measured(
            "seconds_writer", "s", "CPU time of the writer thread since that line", "float64"
        ),
        _measured(
            "token_fraction",
            "1",
            "share of the rollouts whose token rows were written; below the setting where the disk "
            "could not keep up, 0 off schedule",
            "float64",
        ),
    ),
)

ROLLOUTS = Table(
    "rollouts",
    "one completion of one step",
    (
        _key("step", "rollout step"),
        _key("rank", "process", "int16"),
        _key("group", "prompt of the step, from 0"),
        _key("rollout", "completion of the step, from 0"),
        _measured("prompt", "text", "prompt", "str"),
        _measured("completion", "text", "completion", "str"),
        _measured("answer", "text", "reference answer", "str"),
        _measured("reward", "1", "verifiable reward", required=True),
        _measured("advantage", "1", "group advantage"),
        _measured("length", "tokens", "completion length, end token included", "int32"),
        _measured("finish_reason", "text", "'stop' or 'length'", "str"),
    ),
)

TOPK = Table(
    "topk",
    "one of the K most probable tokens at one position of a few rollouts, in the first gradient "
    "pass that has them",
    (
        _key("step", "rollout step"),
        _key("minibatch", "gradient pass within the step, from 0", "int16"),
        _key("rank", "process that saw the token", "int16"),
        _key("rollout", "completion of the step, from 0"),
        _key("position", "place in the completion, from 0"),
        _key("place", "0 for the most probable token, 1 for the next ...", "int8"),
        _key("token_id", "id of the token; the sampled one may be among them"),
        _measured("logp", "nats", "its log-probability under the policy being updated"),
        Column("logp_after", "float32", "nats", "later", "the same after the update of this pass"),
    ),
)

# What a probed update is made of, and whose tokens were scored. Codes 0..3 are the classes of the
# taxonomy in both; the parts of an update, interaction included, add up to UPDATE.
UPDATE, GRADIENT, MOMENTUM, WEIGHT_DECAY, INTERACTION = 4, 5, 6, 7, 8
PART_NAMES: Mapping[int, str] = {
    UPDATE: "update",
    GRADIENT: "gradient",
    MOMENTUM: "momentum",
    WEIGHT_DECAY: "weight decay",
    INTERACTION: "interaction",
}
ALL_TOKENS, OTHER_TOKENS = 4, 5

PROBES = Table(
    "probes",
    "what one part of one optimizer update does to one set of tokens when it is applied alone",
    (
        _key("step", "rollout step"),
        _key("minibatch", "update within the step, from 0; epochs count on", "int16"),
        _key(
            "part",
            "part of the update: class code 0..3, 4 whole update, 5 all classes at once, "
            "6 momentum, 7 weight decay, 8 interaction (what the sum of the parts leaves)",
            "int8",
        ),
        _key(
            "tokens_of",
            "tokens scored: of the update's own rollouts, class code 0..3 or 4 all; "
            "5 of the step before, without a part in the update",
            "int8",
        ),
        _measured("tokens", "tokens", "tokens in the set", "int64"),
        _measured(
            "predicted_dentropy",
            "nats",
            "mean first-order dH of the set's own updates, times scale",
            "float64",
        ),
        _measured("counterfactual_dentropy", "nats", "mean dH, part applied alone", "float64"),
        _measured("measured_dentropy", "nats", "mean dH, whole update", "float64"),
        _measured("half_dentropy", "nats", "mean dH, half of the whole update", "float64"),
        _measured("predicted_dprob", "probability", "mean first-order dp, times scale", "float64"),
        _measured("counterfactual_dprob", "probability", "mean dp, part applied alone", "float64"),
        _measured("measured_dprob", "probability", "mean dp, whole update", "float64"),
        _measured("scale", "1", "learning rate of the logits that fits the probe", "float64"),
        _measured("grad_norm", "1", "norm of the part's gradient before clipping", "float64"),
        _measured("step_norm", "1", "norm of the part's step of the weights", "float64"),
        *(
            _measured(f"dot_{name}", "1", f"inner product with the gradient of {name}", "float64")
            for name in ("pos_peak", "pos_valley", "neg_peak", "neg_valley")
        ),
        _measured(
            "closure_error", "1", "part of the step of the weights no part accounts for", "float64"
        ),
    ),
)

TABLES: Mapping[str, Table] = {t.name: t for t in (TOKENS, STEPS, CLASSES, ROLLOUTS, PROBES, TOPK)}

# The paper's bins [0,.01) [.01,.1) [.1,.25) [.25,.5) [.5,1] are unions of these; the cuts above
# .5 resolve the near-certain tokens that make up most of an RLVR batch. p = 1 is in the last bin.
PROB_EDGES = (0.0, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 0.999, 1.0)
PAPER_EDGES = (0.0, 0.01, 0.1, 0.25, 0.5, 1.0)


def axis_label(table: str, column: str, text: str | None = None) -> str:
    """Label of an axis that shows a column: words and unit.

    Examples
    --------
    >>> axis_label("steps", "entropy")
    'entropy (nats)'
    """
    declared = TABLES[table][column]
    words = text or column.replace("_", " ")
    return words if declared.unit in ("1", "text") else f"{words} ({declared.unit})"
