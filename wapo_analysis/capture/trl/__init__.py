"""Watching a Hugging Face TRL trainer: ``with attach(trainer, "runs/mine"): trainer.train()``."""

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from wapo_analysis.capture import PASSIVE, REPLACE, CaptureMode, Patches
from wapo_analysis.capture.trl.passes import check_probing
from wapo_analysis.capture.trl.replace import check_replaceable
from wapo_analysis.capture.trl.stats import richer_head
from wapo_analysis.capture.trl.trainer import TrlTrainer
from wapo_analysis.capture.trl.watcher import TrlWatcher
from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.record import Closing
from wapo_analysis.record.beside import Action, check_actions
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.record.topk import TOPK
from wapo_analysis.store import read_manifest
from wapo_analysis.store.files import MANIFEST

_MARK = "_wapo_attachment"

#: What each ``detail`` of `attach` sets.
DETAILS: dict[str, dict[str, int]] = {
    "totals": {"token_every": 0, "rescore_every": 0, "exact_every": 10},
    "sampled": {"token_every": 10, "rescore_every": 10, "exact_every": 10},
    "full": {"token_every": 1, "rescore_every": 1, "exact_every": 1},
}


class Attachment(Closing):
    """A trainer being watched; ends with its with-block or with `close`.

    ``path``: Run folder; ``recorder``: ``recorder.failure`` says why recording stopped, None while
    it works.
    """

    def __init__(self, recorder: Recorder, patches: Patches, path: Path) -> None:
        self.recorder, self.path = recorder, path
        self._patches = patches

    def __reduce__(self) -> Any:
        return type(None), ()  # a copy of the trainer is not watched

    def close(self, status: str = "finished") -> None:
        """Put every attribute of the trainer back and end the run; may be called twice.

        ``status``: how the training ended, for the manifest.
        """
        if self._patches.closed:
            return
        self._patches.close()
        self.recorder.close(status)


def attach(
    trainer: Any,
    path: str | Path,
    detail: Literal["totals", "sampled", "full"] = "sampled",
    *,
    mode: str = PASSIVE,
    token_every: int | None = None,
    token_fraction: float = 1.0,
    rescore_every: int | None = None,
    exact_every: int | None = None,
    probe_every: int = 0,
    probe_rows: int = 16,
    log_metrics: bool = True,
    name: str | None = None,
    label: str | None = None,
    manifest: Mapping[str, Any] | None = None,
    resume_after: int | None = None,
    take_over: bool = False,
    topk: int = TOPK,
    audit: bool = False,
    on_warning: Action = None,
    on_critical: Action = None,
) -> Attachment:
    """Watch a TRL trainer: every gradient pass is recorded, training stays bitwise the same.

    Parameters
    ----------
    trainer : trl.GRPOTrainer
        TRL 0.21 or newer, or a subclass, before ``train()``; RLOOTrainer and GMPOTrainer as well.
    path : str or Path
        Run folder; every process of a distributed run gives the same one on a shared disk.
    detail : {"totals", "sampled", "full"}
        Class totals are exact on every step. "totals" writes them alone; "sampled" adds token rows
        and a second scoring of every tenth step; "full" of every step (docs/trl.md has the cost).
    mode : {"passive", "replace"}
        "replace" (TRL 1.15 on): the log-probabilities of the loss come from our own head instead of
        TRL's fused one, so that exact statistics of every step cost next to nothing. Gradients are
        TRL's up to rounding, no longer bitwise. If our head fails, TRL's takes over for the rest.
    token_every : int, optional
        Write token rows of steps 1, 1 + n, ...; 0 writes none. This and the next three are set by
        ``detail`` unless given.
    token_fraction : float
        Share of the rollouts whose token rows are written, in (0, 1].
    rescore_every : int, optional
        Score the tokens again after the update on every n-th step (one more forward); 0 never.
    exact_every : int, optional
        Where the trainer makes no logits (TRL 1.15 on): send the hidden states through the head
        once more on every n-th step, which gives sum p^2 ln p and every digit of near-certain
        tokens; by default as ``token_every``, if that is given. In between sum p^2 comes from the
        fused head and sum p^2 ln p is missing. With logits every step is exact.
    probe_every : int
        Decompose the update of every n-th step by class (docs/attribution.md); 0 never. While it
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
        Continue the run in ``path`` after this optimizer step: that of the checkpoint given to
        ``trainer.train(resume_from_checkpoint=...)``. What was recorded later is replaced.
    take_over : bool
        Also if another process still seems to write it; that one stops recording if it lives.
    topk : int
        Keep this many of the most probable tokens at the positions of four rollouts of every step
        with token rows; 0 keeps none. Where the trainer makes no logits, on steps of `exact_every`.
    audit : bool
        Print what the trainer really computes after its third step (docs/audit.md).
    on_warning, on_critical : {"checkpoint", "stop"} or callable, optional
        A guard, off by default: a new warning leaves a checkpoint, a critical finding stops the
        training after one, or a function of yours gets it (docs/guard.md). One process.

    Returns
    -------
    Attachment
        A context manager; or call its ``close()``.

    Raises
    ------
    UserError
        If the trainer's loss is not known or it is watched already, a number is out of range, the
        folder cannot be used, or the mode cannot be had. Nothing raises later: a failing recorder
        logs one warning and stops.

    Notes
    -----
    ``coef`` is the gradient that really arrives at the per-token log-probabilities, times -1 and
    over the number of processes: loss type, ratio, clip, masks, vLLM weights, KL and normaliser
    are in; an entropy bonus and a router loss are not, for they do not pass through them.
    """
    watched = TrlTrainer(trainer)
    running = vars(trainer).get(_MARK)
    if running is not None:
        raise UserError(
            f"this trainer is already watched (run folder {running.path}); close that first"
        )
    if detail not in DETAILS:
        raise unknown_name("detail", detail, DETAILS)
    if exact_every is not None and exact_every < 0:
        raise UserError("exact_every must be 0 (never) or positive")
    given = {"token_every": token_every, "rescore_every": rescore_every}
    given["exact_every"] = token_every if exact_every is None else exact_every
    every = DETAILS[detail] | {key: n for key, n in given.items() if n is not None}
    check_probing(watched, probe_every, probe_rows)
    check_actions(on_warning, on_critical, watched.processes)
    _check_mode(watched, mode)
    folder = Path(path)
    _check_folder(folder, resume_after)
    if watched.processes > 1:
        # So that nobody takes rank 0's new manifest for an old run.
        trainer.accelerator.wait_for_everyone()
    entries = watched.manifest(name, label).changed(_continued(folder, resume_after))
    recorder = Recorder(
        folder,
        {**entries, "capture": CaptureMode(mode, "as set").to_dict(), **(manifest or {})},
        token_every=every["token_every"],
        token_fraction=token_fraction,
        rescore_every=every["rescore_every"],
        probe_every=probe_every,
        temperature=watched.temperature,
        rank=watched.rank,
        resume_after=resume_after,
        sequence_level=watched.clip.level != "token",
        take_over=take_over,
        topk=topk,
        audit=audit,
        on_warning=on_warning,
        on_critical=on_critical,
    )
    patches = Patches()
    attachment = Attachment(recorder, patches, folder)
    try:
        TrlWatcher(
            watched,
            recorder,
            patches,
            exact_every=every["exact_every"],
            log_metrics=log_metrics,
            probe_rows=probe_rows,
            replace=mode == REPLACE,
            resume_after=resume_after,
        )
        patches.set(trainer, _MARK, attachment)
    except BaseException:
        attachment.close("failed")
        raise
    return attachment


def _check_mode(trainer: TrlTrainer, mode: str) -> None:
    if mode not in (PASSIVE, REPLACE):
        raise UserError(f"mode must be {PASSIVE} or {REPLACE}, got {mode!r}")
    if mode == REPLACE:
        if trainer.hidden_by is not None:
            raise UserError(
                f'mode="replace" cannot be used with {trainer.hidden_by}; use mode="passive"'
            )
        check_replaceable(trainer.raw, richer_head(trainer, False) is not None)


def _check_folder(folder: Path, resume_after: int | None) -> None:
    if resume_after is None and (folder / MANIFEST).exists():
        raise UserError(
            f"{folder} already holds a run; choose another folder, delete it, or continue it: "
            "attach(..., resume_after=N) and trainer.train(resume_from_checkpoint=...) with N the "
            "step of that checkpoint"
        )


def _continued(folder: Path, resume_after: int | None) -> dict[str, Any]:
    """Manifest entries of a run that is continued: when it started, and that it was resumed."""
    if resume_after is None:
        return {}
    earlier = read_manifest(folder)
    now = datetime.now(UTC).isoformat(timespec="seconds")
    started = {"started": earlier.started} if earlier.started else {}
    return {**started, "resumed": [*(earlier.resumed or []), now]}
