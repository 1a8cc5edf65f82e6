"""The recipe of ``wapo train`` on TRL's GRPOTrainer: alone, or under accelerate launch or torchrun.

Task, prompts, reward, objective and the learning rate of every update are those of the built-in
trainer. Where the model is whole on each process and in float32, completions are sampled by our
own sampler, with the noise the built-in trainer would give them; else TRL generates (vLLM, sharded
models, bf16). A step of the run is one optimizer update, as in TRL's logs.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from wapo_analysis.capture.trl.attachment import Attachment, attach
from wapo_analysis.capture.trl.objective import use_objective
from wapo_analysis.engines.trl_settings import (
    STATE,
    check_counterparts,
    trl_settings,
    updates_per_batch,
)
from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.train.batch import encode_problems
from wapo_analysis.train.checkpoint import save_checkpoint
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.launched import launched
from wapo_analysis.train.lifecycle import check_resumed, nothing_left_if_refused, stop_between_steps
from wapo_analysis.train.models import Policy, configured_policy
from wapo_analysis.train.noise import sampling_generator, step_problems
from wapo_analysis.train.rollout import NonFiniteLogits, sample
from wapo_analysis.train.tasks.base import Problem

_ROW = "wapo_row"
Progress = Callable[[dict[str, float]], None]


def train_with_trl(
    config: TrainConfig,
    out: Path,
    *,
    resume: bool = False,
    checkpoint: int | None = None,
    take_over: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Policy:
    """Train a policy with TRL's GRPOTrainer and record the run; each process makes this call.

    Parameters
    ----------
    config : TrainConfig
    out : Path
        Run folder, on a disk that all processes share; TRL's own checkpoints are in its ``trl``.
    resume : bool
        Continue the run from its last checkpoint.
    checkpoint : int, optional
        Continue from the checkpoint after this optimizer update instead.
    take_over : bool
        Also if another process still seems to write the run.
    threads : int, optional
        CPU threads of this process.
    progress : callable, optional
        Called with ``step``, ``reward`` and ``entropy`` after every update.

    Returns
    -------
    Policy
        The trained policy.

    Raises
    ------
    UserError
        On a setting without counterpart, a batch that cannot be split, or nothing to resume.
    NonFiniteLogits
        If the policy can no longer be sampled from; the run is closed as ``diverged``.
    KeyboardInterrupt
        On Ctrl-C or SIGTERM, after the batch has ended and a checkpoint has been written.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    rank, processes = launched()
    check_counterparts(config)
    start = _resumed(out, config, checkpoint) if resume else None
    settings = trl_settings(config, out, processes)
    with nothing_left_if_refused(out if rank == 0 else None) as begun:
        recipe = Recipe(config)
        trainer = recipe.trainer(settings)
        use_objective(trainer, config.objective_config(recipe.longest))
        attachment = _attach(trainer, recipe, out, start, take_over)
        with attachment, stop_between_steps(announce=rank == 0) as stop:
            steps = _Steps(recipe, progress, lambda: stop.asked, begun)
            trainer.add_callback(steps.callback(trainer))
            try:
                trainer.train(resume_from_checkpoint=None if start is None else str(start))
            except NonFiniteLogits:
                attachment.close("diverged")
                raise
            recipe.keep(trainer, out)
            if steps.interrupted:
                raise KeyboardInterrupt
    return recipe.policy


# ---- the recipe ------------------------------------------------------------------------------


class Recipe:
    """Task, policy and sampling of a run, as TRL's trainer needs them.

    Parameters
    ----------
    config : TrainConfig

    Attributes
    ----------
    policy : Policy
        Trained in place by the trainer.
    longest : int
        Most tokens of a completion.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.task = config, config.load_task()
        self.longest = config.max_new_tokens or self.task.max_new_tokens
        # TRL moves the model to its device and casts what it multiplies.
        self.policy = configured_policy(replace(config, device="cpu", precision="float32"))
        self._problems = lru_cache(maxsize=4)(self._drawn)

    def _drawn(self, step: int) -> tuple[list[Problem], list[str]]:
        """Problems of a batch and the texts the policy is given."""
        problems = step_problems(self.task, self.config.seed, step, self.config.prompts_per_step)
        prompts = encode_problems(self.policy, problems, self.task, self.config)
        return problems, [prompt.text for prompt in prompts]

    def problem(self, number: int) -> Problem:
        """Problem by its number in the run, from 0."""
        batch, place = divmod(number, self.config.prompts_per_step)
        return self._problems(batch + 1)[0][place]

    def dataset(self) -> Any:
        """Prompts of all batches in their order, made when they are asked for."""
        from datasets import Dataset

        size = self.config.prompts_per_step

        def shown(rows: dict[str, list[int]]) -> dict[str, list[Any]]:
            numbers = rows["problem"]
            texts = [self._problems(n // size + 1)[1][n % size] for n in numbers]
            answers = [self.problem(n).answer for n in numbers]
            return {"prompt": texts, "answer": answers, "problem": numbers}

        whole = Dataset.from_dict({"problem": list(range(self.config.steps * size))})
        return whole.with_transform(shown)

    def reward(self, completions: list[str], problem: list[int], **_: Any) -> list[float]:
        """Reward of each completion, by the task."""
        pairs = zip(problem, completions, strict=True)
        return [self.task.reward(self.problem(number), text) for number, text in pairs]

    def trainer(self, settings: Mapping[str, Any]) -> Any:
        """The GRPOTrainer of the recipe.

        Raises
        ------
        UserError
            If TRL is missing or older than what this engine has been made for.
        """
        from transformers.trainer_callback import PrinterCallback
        from trl import GRPOConfig

        args = GRPOConfig(**settings)
        made = _trainer_class()(
            self.policy.model,
            self.reward,
            args=args,
            train_dataset=self.dataset(),
            processing_class=self.policy.tokenizer,
        )
        made.remove_callback(PrinterCallback)
        made.recipe = self
        self.policy = replace(self.policy, device=made.accelerator.device)
        return made

    def tokens_of(self, text: str) -> list[int]:
        """Token ids of a prompt as it is given: template and begin token are in its text."""
        ids: list[int] = self.policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def samples_itself(self, trainer: Any) -> bool:
        """Whether our own sampler makes the completions."""
        kind = str(trainer.accelerator.distributed_type)
        engine = trainer.use_vllm or getattr(trainer, "use_transformers_continuous_batching", False)
        return not (engine or trainer.args.bf16 or kind.endswith(("FSDP", "DEEPSPEED")))

    def rows(self, trainer: Any, count: int) -> list[int]:
        """Numbers that the built-in trainer gives to the rollouts of this process.

        TRL has the rollouts of a prompt side by side, we the prompts of a repetition.
        """
        per_prompt, prompts = self.config.rollouts_per_prompt, self.config.prompts_per_step
        first = trainer.accelerator.process_index * count
        places = range(first, first + count)
        return [place % per_prompt * prompts + place // per_prompt for place in places]

    def sample(self, trainer: Any, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Completions of this process's prompts, with the noise of the built-in trainer."""
        config, updates = self.config, updates_per_batch(self.config)
        step = int(trainer.state.global_step) // updates + 1
        rows = self.rows(trainer, len(prompt_ids))
        whole = [prompt_ids[0]] * (config.prompts_per_step * config.rollouts_per_prompt)
        for row, ids in zip(rows, prompt_ids, strict=True):
            whole[row] = ids
        generator = sampling_generator(config.seed, step, self.policy.device)
        with _evaluating(self.policy.module), torch.no_grad():
            made = sample(
                self.policy, whole, self.longest, config.temperature, generator,
                rows=torch.tensor(sorted(rows)),
            )  # fmt: skip
        lengths = made.mask.sum(dim=1).tolist()
        pairs = zip(made.completion_ids.tolist(), lengths, strict=True)
        by_row = {row: ids[:n] for row, (ids, n) in zip(sorted(rows), pairs, strict=True)}
        return [by_row[row] for row in rows]

    def keep(self, trainer: Any, out: Path) -> None:
        """Write the trained policy where ``wapo eval`` looks for it, if a process has it whole."""
        kind = str(trainer.accelerator.distributed_type)
        if trainer.accelerator.process_index or kind.endswith(("FSDP", "DEEPSPEED")):
            return
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        step, keep = int(trainer.state.global_step), self.config.keep_checkpoints
        save_checkpoint(out, step, self.policy, optimizer, keep)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _trainer_class() -> Any:
    """GRPOTrainer with our prompts, sampler and learning rates; trl is loaded only here."""
    from torch.optim.lr_scheduler import LambdaLR
    from trl import GRPOTrainer

    missing = [
        name
        for name in ("_tokenize_prompts", "_generate_single_turn")
        if not hasattr(GRPOTrainer, name)
    ]
    if missing:
        raise UserError(f"engine trl needs a newer TRL (tested with 1.16): no {missing[0]} here")

    class RecipeTrainer(GRPOTrainer):  # type: ignore[misc]
        recipe: Recipe
        _buffered_inputs: Any

        def _tokenize_prompts(self, prompts: list[Any]) -> Any:
            return [self.recipe.tokens_of(text) for text in prompts], None, {}

        def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
            if not self.recipe.samples_itself(self):
                return super()._generate_single_turn(prompt_ids, *args, **kwargs)
            return self.recipe.sample(self, prompt_ids), None

        def _generate_and_score_completions(self, inputs: Any) -> Any:
            batch = super()._generate_and_score_completions(inputs)
            rows = self.recipe.rows(self, len(inputs))
            return {**batch, _ROW: torch.tensor(rows, device=self.accelerator.device)}

        def _prepare_inputs(self, generation_batch: Any) -> Any:
            before = self._buffered_inputs
            inputs = super()._prepare_inputs(generation_batch)
            if not self.model.training or self._buffered_inputs is before:
                return inputs
            self._buffered_inputs = _in_order(self._buffered_inputs)
            return self._buffered_inputs[self._step % self.args.steps_per_generation]

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            config = self.recipe.config
            updates = updates_per_batch(config)

            def factor(update: int) -> float:
                return config.learning_rate(update // updates + 1) / config.lr

            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, factor)
            return self.lr_scheduler

        def get_decay_parameter_names(self, model: Any) -> list[str]:
            return [name for name, _ in model.named_parameters()]

    return RecipeTrainer


def _in_order(parts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parts of a batch that TRL has shuffled, in the order in which the built-in trainer has it."""
    order = torch.cat([part[_ROW] for part in parts]).argsort()
    sizes = [len(part[_ROW]) for part in parts]
    ordered: list[dict[str, Any]] = [dict(part) for part in parts]
    for name, value in parts[0].items():
        if isinstance(value, torch.Tensor) and value.dim():
            whole = torch.cat([part[name] for part in parts])[order]
            for part, rows in zip(ordered, whole.split(sizes), strict=True):
                part[name] = rows
    return ordered


# ---- one run -----------------------------------------------------------------------------------


class _Steps:
    """Shows the updates as they come, and ends the training between two batches if asked to."""

    def __init__(
        self, recipe: Recipe, progress: Progress | None, asked: Callable[[], bool], begun: Any
    ) -> None:
        self._updates = updates_per_batch(recipe.config)
        self._progress, self._asked, self._begun = progress, asked, begun
        self.interrupted = False

    def callback(self, trainer: Any) -> Any:
        """The callback for a trainer; transformers is loaded only here."""
        from transformers import TrainerCallback

        steps = self

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                steps._begun.yes = True
                if state.global_step % steps._updates == 0 and steps._everyone(trainer):
                    steps.interrupted = state.global_step < state.max_steps
                    control.should_save = control.should_training_stop = True

            def on_log(
                self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
            ) -> None:
                if steps._progress is not None and logs and "reward" in logs:
                    row = {name: float(logs.get(name, torch.nan)) for name in ("reward", "entropy")}
                    steps._progress({"step": float(state.global_step), **row})

        return Callback()

    def _everyone(self, trainer: Any) -> bool:
        """Whether any process was asked to stop; all make this call after the same update."""
        asked = torch.tensor(float(self._asked()), device=trainer.accelerator.device)
        return bool(trainer.accelerator.reduce(asked, reduction="sum") > 0)


def _attach(
    trainer: Any, recipe: Recipe, out: Path, start: Path | None, take_over: bool
) -> Attachment:
    config = recipe.config
    return attach(
        trainer,
        out,
        mode=config.capture_mode or "passive",
        token_every=config.token_every,
        token_fraction=config.token_fraction,
        rescore_every=config.rescore_every,
        exact_every=1,
        probe_every=config.probe_every,
        probe_rows=config.probe_rows or trainer.args.per_device_train_batch_size,
        topk=config.topk,
        audit=config.audit,
        log_metrics=False,
        name=f"{config.shown_label} seed {config.seed}",
        label=config.shown_label,
        manifest={
            "task": config.task,
            "data": recipe.task.data_record(),
            "model": config.model,
            "recipe": config.to_dict(),
        },
        resume_after=None if start is None else _updates_of(start),
        take_over=take_over,
    )


def _updates_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def _resumed(out: Path, config: TrainConfig, wanted: int | None) -> Path:
    """TRL's checkpoint to go on from."""
    check_resumed(out, config)
    found = {_updates_of(p): p for p in (out / STATE).glob("checkpoint-*") if p.is_dir()}
    if not found:
        raise UserError(f"{out} has no checkpoint to resume from; start a new run with --out")
    step = max(found) if wanted is None else wanted
    if step not in found:
        raise unknown_name("checkpoint", step, sorted(found))
    return found[step]
