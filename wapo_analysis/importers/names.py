"""Names that other tools give to our columns, and the user's own mapping on top of them.

A name is listed only where the quantity is the same one. What merely resembles it (verl's
``actor/ppo_kl`` is the mean log-ratio, not the k3 estimate) keeps its own name in the step log and
can be mapped by hand.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.schema import ROLLOUTS, STEPS, TOKENS, Table

Names = tuple[str, ...]
Plan = tuple[dict[str, str], list[str]]
"""Column of ours to their key, and their keys that are left."""

# Not columns, yet what other tools store: turned into logp, logp_old and collision_rest; rows
# outside the loss mask are left out.
PSEUDO_TOKENS = ("prob", "prob_old", "collision", "loss_mask")

_STEP_KEY: Names = ("global_step", "training_step", "train_step", "iteration", "_step", "steps")

_TOKENS: Mapping[str, Names] = {
    "step": _STEP_KEY,
    "minibatch": ("mini_batch", "micro_step"),
    "rank": ("process_index", "worker"),
    "group": ("group_id", "group_ids", "prompt_id", "prompt_index", "problem_id", "uid"),
    "rollout": (
        "rollout_id", "sample_id", "sequence_id", "seq_id", "completion_id", "sample", "sequence",
        "export_sequence_idx", "request_id",
    ),
    "position": ("token_position", "token_index", "pos"),
    "token_id": ("token_ids", "completion_ids", "response_ids", "output_ids", "input_ids"),
    "advantage": ("advantages", "adv"),
    "logp": (
        "trainer_logprobs", "logprob", "logprobs", "log_prob", "log_probs", "logps",
        "per_token_logps", "token_logprobs", "logp_train",
    ),
    "logp_old": (
        "old_logp", "old_logprob", "old_logprobs", "old_log_prob", "old_log_probs",
        "old_per_token_logps", "inference_logprobs", "sampling_logprobs", "rollout_log_probs",
        "sampling_per_token_logps", "behaviour_logprobs", "behavior_logprobs", "logp_inference",
    ),
    "entropy": ("entropies", "entropys", "token_entropy", "token_entropies"),
    "coef": ("gradient_coefficient",),
    "kept": ("keep_mask",),
    "clipped": ("is_clipped", "is_masked"),
    "top1": ("is_top1",),
    "prob": ("p", "probs", "probability", "prob_train", "token_prob"),
    "prob_old": ("old_prob", "old_probs", "prob_inference", "behaviour_prob"),
    "collision": ("sum_p_sq", "sum_pi_squared", "sum_sq_probs"),
    "loss_mask": ("response_mask", "completion_mask", "mask"),
}  # fmt: skip

_STEPS: Mapping[str, Names] = {
    "step": _STEP_KEY,
    "reward": (
        "reward/mean", "rewards/mean", "mean_reward", "reward_mean", "reward/all/mean",
        "critic/rewards/mean", "critic/score/mean",
    ),
    "reward_std": ("reward/std", "reward/all/std", "std_reward"),
    "groups_all_wrong": ("solve_none/all",),
    "groups_all_right": ("solve_all/all",),
    "loss": ("loss/mean", "actor/pg_loss", "policy_loss"),
    "grad_norm": ("optim/grad_norm", "actor/grad_norm", "gradient_norm"),
    "lr": ("learning_rate", "optim/lr", "actor/lr"),
    "entropy": (
        "entropy/mean", "entropy/all/mean", "actor/entropy", "actor/entropy_loss",
        "policy/entropy", "mean_entropy", "policy_entropy",
    ),
    "length": (
        "tokens/completion", "completions/mean_length", "completion_length",
        "response_length/mean", "decode_len/all/mean", "mean_length",
    ),
    "truncated": (
        "completions/clipped_ratio", "response_length/clip_ratio", "is_truncated/all/mean",
    ),
    "kl_old": ("mismatch_kl", "mismatch_kl/mean", "mismatch_kl/all/mean"),
    "clip_low": ("clip_ratio/low_mean",),
    "clip_high": ("clip_ratio/high_mean",),
    "seconds": ("step_time", "time/step", "timing_s/step", "perf/time_per_step"),
    "seconds_rollout": ("timing_s/gen", "time/generate_completions"),
}  # fmt: skip

_ROLLOUTS: Mapping[str, Names] = {
    "step": _STEP_KEY,
    "group": ("group_id", "prompt_id", "problem_id", "uid"),
    "rollout": ("rollout_id", "sample_id", "completion_id", "request_id"),
    "prompt": ("input", "question", "problem"),
    "completion": ("output", "response", "answer_text", "generation"),
    "answer": ("gts", "ground_truth", "reference", "target"),
    "reward": ("score", "rewards", "total_reward"),
    "advantage": ("advantages",),
    "length": ("response_length", "completion_length", "num_tokens"),
    "finish_reason": ("stop_reason",),
}

_ALIASES: Mapping[str, Mapping[str, Names]] = {
    "tokens": _TOKENS,
    "steps": _STEPS,
    "rollouts": _ROLLOUTS,
}
_TABLES: Mapping[str, Table] = {"tokens": TOKENS, "steps": STEPS, "rollouts": ROLLOUTS}
_MAX_PLANS = 256


def allowed_columns() -> tuple[str, ...]:
    """Names of ours that a mapping may give."""
    names = [c.name for table in _TABLES.values() for c in table.stored]
    return tuple(dict.fromkeys([*names, *PSEUDO_TOKENS]))


def parse_mapping(items: Iterable[str]) -> dict[str, str]:
    """``ours=theirs`` texts as a dictionary.

    Raises
    ------
    UserError
        If a text is no such pair, or gives a column of ours that does not exist or twice.
    """
    mapping: dict[str, str] = {}
    for item in items:
        ours, sign, theirs = (part.strip() for part in item.partition("="))
        if not sign or not ours or not theirs:
            raise UserError(f"--map wants ours=theirs, such as logp=my_logprob; got {item!r}")
        if ours in mapping:
            raise UserError(f"--map gives {ours!r} twice")
        mapping[ours] = theirs
    check_mapping(mapping)
    return mapping


def check_mapping(mapping: Mapping[str, str]) -> None:
    """Refuse columns that do not exist.

    Raises
    ------
    UserError
        On a name of ours that no table has.
    """
    for ours in mapping:
        if ours not in allowed_columns():
            raise unknown_name("column", ours, allowed_columns())


@dataclass
class NameTable:
    """Finds our columns among their keys: the user's mapping first, then known names.

    Parameters
    ----------
    mapping : mapping of str to str
        Ours to theirs, as the user gave it.

    Attributes
    ----------
    seen : set of str
        Their names of the mapping that occurred in the source.
    """

    mapping: Mapping[str, str]
    seen: set[str] = field(default_factory=set)
    _plans: dict[tuple[str, Names], Plan] = field(default_factory=dict)

    def plan(self, table: str, keys: Sequence[str]) -> Plan:
        """Which key feeds which column of a table ("tokens", "steps" or "rollouts")."""
        known = (table, tuple(keys))
        if known not in self._plans:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[known] = self._make(table, keys)
        return self._plans[known]

    def _make(self, table: str, keys: Sequence[str]) -> Plan:
        # Loggers put "train/" before every name, or do not; case differs as well.
        by_name: dict[str, str] = {}
        for key in keys:
            by_name.setdefault(key.lower().removeprefix("train/"), key)
        taken: dict[str, str] = {}
        for ours in self._columns(table):
            wanted = self.mapping.get(ours)
            if wanted is not None:
                if wanted in keys:
                    taken[ours] = wanted
                    self.seen.add(wanted)
                continue
            known = (by_name.get(name) for name in (ours, *_ALIASES[table].get(ours, ())))
            free = (key for key in known if key and key not in self.mapping.values())
            found = next(free, None)
            if found is not None:
                taken[ours] = found
        used = set(taken.values())
        return taken, [key for key in keys if key not in used]

    def _columns(self, table: str) -> list[str]:
        stored = [column.name for column in _TABLES[table].stored]
        return [*stored, *(PSEUDO_TOKENS if table == "tokens" else ())]

    def never_seen(self) -> list[str]:
        """``ours=theirs`` pairs of the mapping whose key did not occur."""
        return [f"{o}={t}" for o, t in self.mapping.items() if t not in self.seen]
