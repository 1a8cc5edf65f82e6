"""The recipe of ``wapo train`` on TRL's GRPOTrainer: alone, or under accelerate launch or torchrun.

Several processes always train with this engine. Task, prompts, reward, objective and the learning
rate of every update are those of the built-in trainer. Where the model is whole on each process and
in float32, completions are sampled by our own sampler, with the noise the built-in trainer would
give them; else TRL generates (vLLM, sharded models, bf16). A step of the run is one optimizer
update, as in TRL's logs.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from wapo_analysis.capture.trl import Attachment, attach
from wapo_analysis.capture.trl.objective import use_objective
from wapo_analysis.engines import (
    STATE,
    ProcessFailed,
    check_counterparts,
    check_gpus,
    launched,
    trl_settings,
    updates_per_batch,
)
from wapo_analysis.engines.recipe import Recipe
from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.train.checkpoint import checkpoints
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.lifecycle import (
    check_resumed,
    guard_action,
    nothing_left_if_refused,
    stop_between_steps,
)
from wapo_analysis.train.policy import Policy, no_progress_bars
from wapo_analysis.train.rollout import NonFiniteLogits
from wapo_analysis.train.tasks.judge import require

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

    Returns the trained policy. Raises UserError on a setting without counterpart, a batch that
    cannot be split, or nothing to resume; NonFiniteLogits if the policy can no longer be sampled
    from; the run is closed as ``diverged``; ProcessFailed if another process has ended or does not
    answer; KeyboardInterrupt on Ctrl-C or SIGTERM, after the batch has ended and a checkpoint has
    been written.

    Parameters
    ----------
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
    """
    if threads is not None:
        torch.set_num_threads(threads)
    require("trl", "trl", "engine trl, which several processes always use,")
    rank, processes = launched()
    check_counterparts(config)
    check_gpus(config, processes)
    start = _resumed(out, config, checkpoint) if resume else None
    settings = trl_settings(config, out, processes)
    refused = nothing_left_if_refused(out if rank == 0 else None)
    with refused as begun, no_progress_bars(), warnings.catch_warnings():
        # transformers tells TRL of names to come, which is not the user's to change.
        warnings.simplefilter("ignore", FutureWarning)
        recipe = Recipe(config)
        trainer = recipe.trainer(settings)
        use_objective(trainer, config.objective_config(recipe.longest))
        if config.eval_every:
            trainer.add_callback(_evaluating_callback(trainer, recipe))  # before a step is written
        attachment = _attach(trainer, recipe, out, start, take_over)
        with attachment, stop_between_steps(announce=rank == 0) as stop:
            steps = _Steps(recipe, progress, lambda: stop.asked, begun)
            trainer.add_callback(steps.callback(trainer))
            try:
                if config.eval_every and start is None:
                    attachment.recorder.note(eval_before=recipe.evaluated(trainer))
                trainer.train(resume_from_checkpoint=None if start is None else str(start))
            except NonFiniteLogits:
                attachment.close("diverged")
                raise
            except RuntimeError as error:
                # An exchange between processes failed; gloo raises no error of its own kind.
                if isinstance(error, dist.DistError) or "gloo" in str(error):
                    raise ProcessFailed from error
                raise
            recipe.keep(trainer, out, attachment.recorder.ring)
            if steps.interrupted:
                raise KeyboardInterrupt
            attachment.recorder.flush()
            if _on_any(trainer, attachment.recorder.failure is not None):
                attachment.close("recording_failed")
    return recipe.policy


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
                guarded = control.should_training_stop and state.global_step < state.max_steps
                asked = steps._asked() or guarded
                if state.global_step % steps._updates == 0 and _on_any(trainer, asked):
                    steps.interrupted = state.global_step < state.max_steps
                    control.should_save = control.should_training_stop = True

            def on_log(
                self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any
            ) -> None:
                if steps._progress is not None and logs and "reward" in logs:
                    row = {name: float(logs.get(name, torch.nan)) for name in ("reward", "entropy")}
                    steps._progress({"step": float(state.global_step), **row})

        return Callback()


def _evaluating_callback(trainer: Any, recipe: Recipe) -> Any:
    """Puts the numbers of due evaluations beside what the trainer logs of a step."""
    from transformers import TrainerCallback

    class Evaluations(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            batch, rest = divmod(state.global_step, updates_per_batch(recipe.config))
            if rest == 0 and recipe.config.evaluation_due(batch):
                for name, value in recipe.evaluated(trainer).items():
                    trainer._metrics["train"][name].append(value)

    return Evaluations()


def _on_any(trainer: Any, here: bool) -> bool:
    """Whether something is so on any process; all make this call at the same place."""
    flag = torch.tensor(float(here), device=trainer.accelerator.device)
    return bool(trainer.accelerator.reduce(flag, reduction="sum") > 0)


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
        on_warning=guard_action(config.on_warning),
        on_critical=guard_action(config.on_critical),
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
    """TRL's checkpoint to go on from, one that a guard kept among them."""
    check_resumed(out, config)
    guarded = [p for p in checkpoints(out) if (p / "trainer_state.json").is_file()]
    saved = [*guarded, *(p for p in (out / STATE).glob("checkpoint-*") if p.is_dir())]
    found = {_updates_of(p): p for p in saved}
    if not found:
        raise UserError(f"{out} has no checkpoint to resume from; start a new run with --out")
    step = max(found) if wanted is None else wanted
    if step not in found:
        raise unknown_name("checkpoint", step, sorted(found))
    return found[step]
