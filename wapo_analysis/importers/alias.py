"""What an alias is, and those of rows: of tokens, of completions."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final

UNVERIFIED: Final = "unverified"
#: Step columns of one reward function; NAME is the function's.
PER_FUNCTION: Final = ("rewards/NAME/mean", "rewards/NAME/std")


@dataclass(frozen=True)
class Alias:
    """Names that one trainer gives to one column."""

    #: "tokens", "steps" or "rollouts".
    table: str
    #: Column of ours, or one of `PER_FUNCTION`.
    column: str
    #: Who writes it; "any" for names in common use.
    trainer: str
    #: In the order they are tried, without a leading ``train/``. ``*`` stands for anything: the
    #: mean of all names that fit is taken. ``NAME`` is a reward function's name, ``DATASET`` one of
    #: held-out problems (in a log that also has ``eval/step``). ``1 - x`` is the complement.
    names: tuple[str, ...]
    #: Where the name can be read in that trainer's source, or "unverified".
    source: str

    @cached_property
    def patterns(self) -> tuple[re.Pattern[str], ...]:
        """Each name as an expression for a whole name without ``train/``."""
        found = []
        for name in self.names:
            text = re.escape(name.removeprefix("1 - ")).replace(r"\*", ".+")
            text = text.replace("DATASET", r"(?!step$|.*-(?:truncated_ratio|pass@\d+)$)[^/]+")
            found.append(re.compile(text.replace("NAME", "(?P<function>[^/]+)"), re.IGNORECASE))
        return tuple(found)


def rows(table: str, trainer: str, source: str, **columns: str) -> list[Alias]:
    """One alias a column; names that stand in for each other are parted by a bar."""
    return [
        Alias(table, column, trainer, tuple(n.strip() for n in names.split("|")), source)
        for column, names in columns.items()
    ]


def functions(trainer: str, mean: str, std: str | None, source: str) -> list[Alias]:
    """Mean and standard deviation of one reward function."""
    given = zip(PER_FUNCTION, (mean, std), strict=True)
    return [Alias("steps", column, trainer, (n,), source) for column, n in given if n]


#: Names in rows; those of a metrics log are in `names`.
ROW_ALIASES: Final[tuple[Alias, ...]] = (
    # ---- rows of tokens
    *rows(
        "tokens", "any", "common use",
        step="global_step | training_step | train_step | iteration | _step | steps",
        minibatch="mini_batch", rank="process_index | worker",
        group="group_id | group_ids | prompt_id | prompt_index | problem_id | uid",
        rollout="rollout_id | sample_id | sequence_id | seq_id | completion_id | sample | sequence"
                " | request_id",
        position="token_position | token_index | pos",
        token_id="token_ids | response_ids | output_ids | input_ids",
        advantage="advantages | adv",
        logp="logprob | logprobs | log_prob | log_probs | logps | token_logprobs | logp_train",
        logp_old=(
            "old_logp | old_logprob | old_logprobs | old_log_prob | old_log_probs"
            " | sampling_logprobs | behaviour_logprobs | behavior_logprobs | logp_inference"
        ),
        entropy="entropies | entropys | token_entropy | token_entropies",
        coef="gradient_coefficient", kept="keep_mask", clipped="is_clipped", top1="is_top1",
        prob="p | probs | probability | prob_train | token_prob",
        prob_old="old_prob | old_probs | prob_inference | behaviour_prob",
        collision="sum_p_sq | sum_sq_probs", loss_mask="mask",
    ),
    *rows(
        "tokens", "prime-rl", "src/prime_rl/trainer (token exports)",
        logp="trainer_logprobs", logp_old="inference_logprobs", clipped="is_masked",
        rollout="export_sequence_idx", minibatch="micro_step",
    ),
    *rows(
        "tokens", "TRL", "trl/trainer/grpo_trainer.py",
        token_id="completion_ids", logp="per_token_logps",
        logp_old="old_per_token_logps | sampling_per_token_logps", loss_mask="completion_mask",
    ),
    *rows(
        "tokens", "verl", "verl/workers and verl/trainer/ppo",
        logp_old="rollout_log_probs", collision="sum_pi_squared", loss_mask="response_mask",
    ),
    # ---- rows of completions
    *rows(
        "rollouts", "any", "common use",
        step="global_step | training_step | train_step | iteration | _step | steps",
        group="group_id | prompt_id | problem_id | uid",
        rollout="rollout_id | sample_id | completion_id | request_id",
        prompt="question | problem", completion="response | answer_text | generation",
        answer="ground_truth | reference | target", reward="rewards | total_reward",
        advantage="advantages", length="response_length | completion_length | num_tokens",
        finish_reason="stop_reason",
    ),
    *rows(
        "rollouts", "rlprobe", "rlprobe/schemas",
        prompt="prompt_text", completion="completion_text", reward="reward_total",
        length="completion_len",
    ),
    *rows(
        "rollouts", "verl", "verl/trainer/ppo/ray_trainer.py (_dump_generations)",
        prompt="input", completion="output", answer="gts", reward="score",
    ),
)  # fmt: skip
