"""Attach to a live trl GRPOTrainer: ``with attach(trainer, "runs/mine"): trainer.train()``."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wapo_analysis.capture.hooks import Patches
from wapo_analysis.capture.mode import PASSIVE, REPLACE, CaptureMode
from wapo_analysis.capture.trl.probe import check_probing
from wapo_analysis.capture.trl.replace import check_replaceable
from wapo_analysis.capture.trl.source import check_trainer, clip_rule, hidden_tensors, new_manifest
from wapo_analysis.capture.trl.stats import causal_model, richer_head
from wapo_analysis.capture.trl.watcher import TrlWatcher
from wapo_analysis.errors import UserError
from wapo_analysis.record.guard import Closing
from wapo_analysis.record.recorder import Recorder

_MARK = "_wapo_attachment"


class Attachment(Closing):
    """A trainer being watched; ends with its with-block or with `close`.

    Attributes
    ----------
    path : Path
        Run folder.
    recorder : Recorder
        ``recorder.failure`` says why recording stopped, None while it works.
    """

    def __init__(self, recorder: Recorder, patches: Patches, path: Path) -> None:
        self.recorder, self.path = recorder, path
        self._patches = patches

    def close(self, status: str = "finished") -> None:
        """Put every attribute of the trainer back and end the run; may be called twice.

        Parameters
        ----------
        status : {"finished", "interrupted", "failed"}
            How the training ended, for the manifest.
        """
        if self._patches.closed:
            return
        self._patches.close()
        self.recorder.close(status)


def attach(
    trainer: Any,
    path: str | Path,
    *,
    mode: str = PASSIVE,
    token_every: int = 10,
    token_fraction: float = 1.0,
    rescore_every: int = 10,
    exact_every: int | None = None,
    probe_every: int = 0,
    probe_rows: int = 16,
    log_metrics: bool = True,
    name: str | None = None,
    label: str | None = None,
    manifest: Mapping[str, Any] | None = None,
    resume_after: int | None = None,
) -> Attachment:
    """Watch a trl GRPOTrainer: every gradient pass is recorded, training stays bitwise the same.

    Parameters
    ----------
    trainer : trl.GRPOTrainer
        TRL 0.21 or newer, or a subclass, before ``train()``.
    path : str or Path
        Run folder; every process of a distributed run gives the same one on a shared disk.
    mode : {"passive", "replace"}
        "replace" (TRL 1.15 on): the log-probabilities of the loss come from our own head instead of
        TRL's fused one, so that exact statistics of every step cost next to nothing. Gradients are
        TRL's up to rounding, no longer bitwise. If our head fails, TRL's takes over for the rest.
    token_every : int
        Write token rows of steps 1, 1 + n, ...; 0 writes class totals alone, of every step.
    token_fraction : float
        Share of the rollouts whose token rows are written, in (0, 1].
    rescore_every : int
        Score the tokens again after the update on every n-th step (one more forward); 0 never.
    exact_every : int, optional
        Where the trainer makes no logits (TRL 1.15 on): send the hidden states through the head
        once more on every n-th step, which gives sum p^2 ln p and every digit of near-certain
        tokens; None takes ``token_every``. In between sum p^2 comes from the fused head and
        sum p^2 ln p is missing. With logits every step is exact.
    probe_every : int
        Take the update of every n-th step apart by class (docs/attribution.md); 0 never. While it
        lasts: some fifteen times the trained weights in memory; one forward and four backward
        passes over the update, ten forwards over twice ``probe_rows``. One process, float32.
    probe_rows : int
        Rollouts that a probe scores after each part of the step, whole micro-batches.
    log_metrics : bool
        Add ``wapo/...`` entries to the trainer's own log.
    name, label : str, optional
        Name of the run; name of the setting in legends.
    manifest : mapping, optional
        Further entries of the manifest.
    resume_after : int, optional
        Continue the run in ``path`` after this optimizer step.

    Returns
    -------
    Attachment
        A context manager; or call its ``close()``.

    Raises
    ------
    UserError
        If it is no GRPOTrainer, is being watched already, a number is out of range, the folder
        cannot be used, or the mode cannot be had. Nothing raises later: a failing recorder logs one
        warning and stops.

    Notes
    -----
    ``coef`` is the gradient that really arrives at the per-token log-probabilities, times -1 and
    over the number of processes: loss type, ratio, clip, masks, vLLM weights, KL and normaliser
    are in; an entropy bonus and a router loss are not, for they do not pass through them.
    """
    check_trainer(trainer)
    running = vars(trainer).get(_MARK)
    if running is not None:
        raise UserError(
            f"this trainer is already watched (run folder {running.path}); close that first"
        )
    if exact_every is not None and exact_every < 0:
        raise UserError("exact_every must be 0 (never) or positive")
    check_probing(trainer, probe_every, probe_rows)
    _check_mode(trainer, mode)
    accelerator, folder = trainer.accelerator, Path(path)
    rank, several = accelerator.process_index, accelerator.num_processes > 1
    if several and resume_after is None and (folder / "manifest.json").exists():
        raise UserError(f"{folder} already holds a run; choose another folder, or delete it")
    if several:
        accelerator.wait_for_everyone()  # so that nobody takes rank 0's new manifest for an old run
    recorder = Recorder(
        folder,
        {
            **new_manifest(trainer, name, label),
            "capture": CaptureMode(mode, "as set").to_dict(),
            **(manifest or {}),
        },
        token_every=token_every,
        token_fraction=token_fraction,
        rescore_every=rescore_every,
        probe_every=probe_every,
        temperature=float(getattr(trainer, "temperature", 1.0)),
        rank=rank,
        resume_after=resume_after,
        sequence_level=clip_rule(trainer).per_sequence,
    )
    patches = Patches()
    attachment = Attachment(recorder, patches, folder)
    try:
        TrlWatcher(
            trainer,
            recorder,
            patches,
            exact_every=token_every if exact_every is None else exact_every,
            log_metrics=log_metrics,
            probe_rows=probe_rows,
            replace=mode == REPLACE,
        )
        patches.set(trainer, _MARK, attachment)
    except BaseException:
        attachment.close("failed")
        raise
    return attachment


def _check_mode(trainer: Any, mode: str) -> None:
    if mode not in (PASSIVE, REPLACE):
        raise UserError(f"mode must be {PASSIVE} or {REPLACE}, got {mode!r}")
    if mode == REPLACE:
        hidden = hidden_tensors(trainer)
        if hidden is not None:
            raise UserError(f'mode="replace" cannot be used with {hidden}; use mode="passive"')
        check_replaceable(trainer, richer_head(trainer, causal_model(trainer), False) is not None)
