"""What TRL's GRPOTrainer needs of a recipe: prompts, reward, samples and learning rates."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from wapo_analysis.capture.trl.passes import evaluating
from wapo_analysis.engines import updates_per_batch
from wapo_analysis.errors import UserError
from wapo_analysis.record.beside import Ring
from wapo_analysis.train.batch import encode_problems, sampling_generator, step_problems
from wapo_analysis.train.checkpoint import save_checkpoint
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.evaluate import evaluate
from wapo_analysis.train.models import configured_policy
from wapo_analysis.train.rollout import NonFiniteLogits, sample
from wapo_analysis.train.tasks.base import Problem, tools_of

_ROW = "wapo_row"


class Recipe:
    """Task, policy and sampling of a run, as TRL's trainer needs them.

    ``policy``: trained in place by the trainer; ``longest``: most tokens of a completion.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.task = config, config.load_task()
        self.longest = config.max_new_tokens or self.task.max_new_tokens
        # TRL moves the model to its device and casts what it multiplies.
        self.policy = configured_policy(replace(config, device="cpu", precision="float32"))
        self.tools = tools_of(self.task)
        if self.tools and (not self.policy.format.chat or config.max_prompt_tokens is not None):
            raise UserError(
                f"task {self.task.name} needs a model with a chat template that knows tools, chat "
                "not off, and no max_prompt_tokens"
            )
        self._problems = lru_cache(maxsize=4)(self._drawn)

    def _drawn(self, step: int) -> tuple[list[Problem], list[Any]]:
        """Problems of a batch and what the policy is given: texts, or with tools conversations."""
        problems = step_problems(self.task, self.config.seed, step, self.config.prompts_per_step)
        if self.tools:
            return problems, [self.policy.format.turns(problem.prompt) for problem in problems]
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

    def reward(self, completions: list[Any], problem: list[int], **_: Any) -> list[float]:
        """Reward of each completion, by the task."""
        pairs = zip(problem, map(_last_words, completions), strict=True)
        with _together():
            return [self.task.reward(self.problem(number), text) for number, text in pairs]

    def trainer(self, settings: Mapping[str, Any]) -> Any:
        """The GRPOTrainer of the recipe.

        Raises UserError if TRL is older than what this engine has been made for or cannot use the
        task's tools, or the model cannot be evaluated.
        """
        from transformers.trainer_callback import PrinterCallback
        from trl import GRPOConfig

        args = GRPOConfig(**settings)
        make = partial(_trainer_class(), self.policy.model, self.reward, args=args)
        made = self._with_tools(
            partial(make, train_dataset=self.dataset(), processing_class=self.policy.tokenizer)
        )
        if self.config.eval_every and (self.tools or _is_sharded(made)):
            raise UserError(
                "eval_every needs a model that is whole on each process and a task without tools"
            )
        made.remove_callback(PrinterCallback)
        made.recipe = self
        self.policy = replace(self.policy, device=made.accelerator.device)
        return made

    def _with_tools(self, make: Callable[..., Any]) -> Any:
        if not self.tools:
            return make()
        try:
            return make(tools=self.tools)
        except (ImportError, TypeError, ValueError) as error:
            raise UserError(
                f"task {self.task.name}: TRL cannot use tools with this model: {error}"
            ) from error

    def tokens_of(self, text: str) -> list[int]:
        """Token ids of a prompt as it is given: template and begin token are in its text."""
        ids: list[int] = self.policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def samples_itself(self, trainer: Any) -> bool:
        """Whether our own sampler makes the completions."""
        if self.tools or trainer.use_vllm or trainer.args.bf16:
            return False
        batching = getattr(trainer, "use_transformers_continuous_batching", False)
        return not batching and not _is_sharded(trainer)

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
        with _together(), evaluating(self.policy.module), torch.no_grad():
            made = sample(
                self.policy, whole, self.longest, config.temperature, generator,
                rows=torch.tensor(sorted(rows)),
            )  # fmt: skip
        lengths = made.mask.sum(dim=1).tolist()
        pairs = zip(made.completion_ids.tolist(), lengths, strict=True)
        by_row = {row: ids[:n] for row, (ids, n) in zip(sorted(rows), pairs, strict=True)}
        return [by_row[row] for row in rows]

    def evaluated(self, trainer: Any) -> dict[str, float]:
        """Numbers of an evaluation on held-out prompts; empty but on the first process."""
        with _together(), evaluating(self.policy.module), torch.no_grad():
            if trainer.accelerator.process_index:
                return {}
            return evaluate(self.policy, self.task, self.config).columns()

    def keep(self, trainer: Any, out: Path, ring: Ring | None) -> None:
        """Write the trained policy where ``wapo eval`` looks for it, if a process has it whole."""
        if trainer.accelerator.process_index or _is_sharded(trainer):
            return
        optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        step, keep = int(trainer.state.global_step), self.config.keep_checkpoints
        save_checkpoint(out, step, self.policy, optimizer, keep, ring)


@contextmanager
def _together() -> Iterator[None]:
    """A block that all processes enter, and leave well or not at all.

    Raises
    ------
    UserError, NonFiniteLogits
        What was raised here, or else by the first process that raised.
    """
    raised: UserError | NonFiniteLogits | None = None
    try:
        yield
    except (UserError, NonFiniteLogits) as error:
        raised = error
    told = None if raised is None else (isinstance(raised, NonFiniteLogits), str(raised))
    said = [told]
    if dist.is_initialized():
        said *= dist.get_world_size()
        dist.all_gather_object(said, told)
    if raised is not None:
        raise raised
    for broken, text in filter(None, said):
        raise NonFiniteLogits(text) if broken else UserError(text)


def _is_sharded(trainer: Any) -> bool:
    return str(trainer.accelerator.distributed_type).endswith(("FSDP", "DEEPSPEED"))


def _last_words(completion: Any) -> str:
    """What the policy said last: the text, or of a conversation the last turn if it is its own."""
    if isinstance(completion, str):
        return completion
    last = completion[-1] if completion else {}
    return str(last.get("content") or "") if last.get("role") == "assistant" else ""


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
            if self.recipe.tools:
                return super()._tokenize_prompts(prompts)
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
