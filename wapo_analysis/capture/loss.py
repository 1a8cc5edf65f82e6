"""Watching a policy loss: one adapter for every trainer whose loss is given log-probabilities.

A watched loss is the loss: same arguments, same result, same gradient. On the way it shows its
tensors to a recorder, and the gradient that reaches the log-probabilities is the exact -coef,
terms that the trainer adds outside the loss included. The optimizer's step ends a step of the run.
"""

import inspect
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from wapo_analysis.capture import Patches, own_rank
from wapo_analysis.capture.lm_head import HeadReader
from wapo_analysis.capture.seams import Call, Names, shaped, signature_of
from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.record import Closing, Guarded, close_at_exit, guarded, on_schedule
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.record.topk import TOPK
from wapo_analysis.store import Manifest

log = logging.getLogger(__name__)

#: Calls of a loss after which an optimizer must have stepped, for what they showed is in memory.
MOST_CALLS = 1 << 16

_NOWHERE = "nowhere"


class LossWatch(Guarded):
    """What one process knows of the step it trains on.

    Parameters
    ----------
    open_recorder : callable
        Called at the first loss; None if another process records this one's tokens.
    head : HeadReader, optional
        Gives the statistics that a loss is not given.
    first_step : int
        Number of the next step.
    texts : callable, optional
        Token ids to their texts.
    """

    def __init__(
        self,
        open_recorder: Callable[[], Recorder | None],
        head: HeadReader | None = None,
        first_step: int = 1,
        texts: Callable[..., Any] | None = None,
    ) -> None:
        self.recorder: Recorder | None = None
        self._open, self._head = open_recorder, head
        self._opened, self._closed, self._said = False, False, set[str]()
        self._waited = set[int]()  # optimizers that stepped before the loss had come back
        self._step, self._calls, self._texts = first_step, 0, texts
        self._scale, self._shown = torch.nan, list[tuple[ref[Any], torch.Tensor]]()
        self._columns: dict[str, Any] = {}

    def failed(self, error: BaseException) -> None:
        """Watch no more, with one warning."""
        self._stop_reading()
        log.warning("watching the loss stopped (%s); training goes on", self.failure)

    @guarded
    def see(self, found: Mapping[str, Any]) -> None:
        """Look at the quantities of one call of the loss, see `Names.find`."""
        logp = found["logp"]
        several = isinstance(logp, Sequence)
        if not any(part.requires_grad for part in (logp if several else [logp])):
            return
        if not self._opened:
            self._opened, self.recorder = True, self._open()
        if self.recorder is None or self.recorder.failure is not None or self._closed:
            self._stop_reading()
            return
        for index in range(len(logp) if several else 1):
            one = {n: v[index] if isinstance(v, Sequence) else v for n, v in found.items()}
            self._watch(self.recorder, one)
        self._calls += 1
        self._look_ahead(self.recorder)
        if self._calls > MOST_CALLS:
            raise UserError(
                f"no torch optimizer has stepped in {MOST_CALLS} calls of the loss: call "
                "end_step() of the watched loss after each update"
            )

    def _look_ahead(self, recorder: Recorder) -> None:
        """Have the most probable tokens read off the next logits, if they are to be kept."""
        if self._head is not None:
            self._head.topk = recorder.tops.size_at(self._step)

    def _watch(self, recorder: Recorder, found: dict[str, Any]) -> None:
        found = shaped(found)
        if found["loss_scale"] == self._scale / 2 and recorder.returned():
            recorder.forget()  # a GradScaler halves its scale where it skips the update
        self._scale = found["loss_scale"]
        logp, mask, tokens = found["logp"], found["mask"], found.get("tokens")
        if any(seen() is logp and torch.equal(other, mask) for seen, other in self._shown):
            return  # the same tensor once more: its gradient is that of both
        self._shown.append((ref(logp), mask))
        logits = found.pop("logits", None)
        if self._head is None or "collision" in found:
            pass
        elif logits is not None and tokens is not None:
            found["stats"] = self._head.read(logits, tokens, logp, mask)
        elif (read := self._head.take(logp, mask)) is not None:
            found["stats"] = read[0]
            if tokens is None:
                found["tokens"] = torch.full_like(mask, -1, dtype=torch.int64)
                found["tokens"][mask.bool()] = read[1]
        known = "the loss's arguments" if "collision" in found else _NOWHERE
        self._say(recorder, "logits" if found.get("stats") is not None else known)
        recorder.watch(**{"tokens": None, "groups": None, **found}, minibatch=self._calls)

    def _say(self, recorder: Recorder, source: str) -> None:
        """Say once where the statistics come from, and that a pass has none."""
        if source in self._said:
            return
        self._said.add(source)
        if source == _NOWHERE:
            reason = "no head is read" if self._head is None else self._head.reason
            source = f"{source}: {reason}"
            log.warning(
                "sum p^2 is not known (%s): the class of these tokens is unknown; coef, ratio and "
                "clip are recorded",
                reason,
            )
        recorder.note(statistics_from=source)

    def tell(self, columns: Mapping[str, Any]) -> None:
        """Keep what is known of the step beside its tokens until the step is written."""
        self._columns |= columns

    @guarded
    def end_step(self, **columns: Any) -> None:
        """Write the step, if a loss was watched in it."""
        if self.recorder is None or self.recorder.returned() is None:
            return
        self._waited, self._shown = set(), []
        told, self._columns, self._calls = self._columns, {}, 0
        self.recorder.finish_step(self._step, **{"texts": self._texts, **columns, **told})
        self._step += 1
        self._look_ahead(self.recorder)

    @guarded
    def stepped(self, optimizer: Optimizer) -> None:
        """Write the step after an optimizer's, unless the loss has yet to come back.

        Another optimizer may step between a loss and its backward pass; if the same one steps
        again, no gradient will come.
        """
        if self.recorder is not None and self.recorder.returned() is False:
            if id(optimizer) not in self._waited:
                self._waited.add(id(optimizer))
                return
        self.end_step(updates=1, lr=float(optimizer.param_groups[0]["lr"]))

    def _stop_reading(self) -> None:
        if self._head is not None:
            self._head.close()

    def close(self, status: str) -> None:
        """End the run."""
        self._closed = True
        self._stop_reading()
        if self.recorder is not None:
            self.recorder.close(status if self.failure is None else "recording_failed")


class WatchedLoss(Closing):
    """A policy loss that shows its tensors to a recorder; see `watched_loss`.

    It stands wherever the loss stood: called, bound as a method, sent to another process (which
    then opens its own part of the run), asked for attributes of the loss.
    """

    _watches: dict[str, "tuple[LossWatch, Patches]"] = {}  # of this process, by run folder

    def __init__(self, loss: Callable[..., Any], names: Any, settings: dict[str, Any]) -> None:
        self.__wrapped__ = loss
        self._names, self._given, self._settings = Names.of(names), names, settings
        self._signature = signature_of(loss)
        self._key = settings["run"]
        if self._key not in self._watches:
            self._watches[self._key] = _start(settings, names)
        self._watch, self._patches = self._watches[self._key]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the loss returns."""
        loss = self.__wrapped__
        call = self._watch.guard(self._arguments, args, kwargs) if torch.is_grad_enabled() else None
        if call is not None and self._names.scorer is None:
            self._watch.guard(self._see, call)
        if call is None or self._names.scorer is None:
            return loss(*args, **kwargs)
        patches = Patches()
        self._watch.guard(self._wait_for, call, patches)
        try:
            return loss(*args, **kwargs)
        finally:
            patches.close()
            self._watch.guard(self._check_scored, call)

    def _arguments(self, args: Any, kwargs: Any) -> dict[str, Any]:
        arguments = self._signature.bind(*args, **kwargs).arguments
        for name, parameter in self._signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name, {})
        return arguments

    def _see(self, call: Call) -> None:
        self._watch.see(self._names.find(call))

    def _wait_for(self, call: dict[str, Any], patches: Patches) -> None:
        """Look at the first result of the scorer that has a graph, while the loss runs."""
        scorer = str(self._names.scorer)
        own = scorer.startswith("self.")
        owner = call["self"] if own else sys.modules[self.__wrapped__.__module__]

        def around(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            scored = original(*args, **kwargs)
            if torch.is_grad_enabled() and "scored" not in call:
                call["scored"] = scored
                self._watch.guard(self._see, call)
            return scored

        patches.wrap(owner, scorer.removeprefix("self."), around)

    def _check_scored(self, call: Call) -> None:
        if "scored" not in call:
            raise UserError(
                f"the loss did not call {self._names.scorer}, so its tokens are not seen"
            )

    def end_step(self, **columns: Any) -> None:
        """Write the step; only for optimizers that are no ``torch.optim.Optimizer``."""
        self._watch.end_step(**columns)

    def tell(self, **columns: Any) -> None:
        """Say what is known of the step beside its tokens, any time before its optimizer steps.

        Parameters
        ----------
        **columns
            ``reward``: one number for each rollout in the order of the loss, or their mean;
            further columns of the ``steps`` table (``loss``, ``grad_norm``, ...).
        """
        self._watch.guard(self._watch.tell, columns)

    @property
    def failure(self) -> str | None:
        """Why watching or recording stopped; None while it goes on."""
        recorder = self._watch.recorder
        return self._watch.failure or (recorder.failure if recorder is not None else None)

    def close(self, status: str = "finished") -> None:
        """End the run; the loss goes on unwatched. May be called twice."""
        self._watches.pop(self._key, None)
        self._patches.close()
        self._watch.close(status)

    def __get__(self, instance: Any, owner: Any = None) -> Any:
        return self if instance is None else MethodType(self, instance)

    def __getattr__(self, name: str) -> Any:
        if name == "__wrapped__":
            raise AttributeError(name)
        return getattr(self.__wrapped__, name)

    def __reduce__(self) -> Any:
        return WatchedLoss, (self.__wrapped__, self._given, self._settings)


def _start(settings: dict[str, Any], names: Any) -> tuple[LossWatch, Patches]:
    given = dict(settings)
    path, optimizer, head = given.pop("run"), given.pop("optimizer"), given.pop("head")
    rank, entries, texts = given.pop("rank"), given.pop("manifest"), given.pop("texts")
    like = names.get("like") if isinstance(names, Mapping) else names
    source = like if isinstance(like, str) else "loop"
    reader = None
    if head is not False:
        model = False if Names.of(names).logits is not None else head
        reader = HeadReader(given.get("temperature", 1.0), model)
        first = on_schedule((given.get("resume_after") or 0) + 1, given["token_every"])
        reader.topk = given.get("topk", TOPK) if first else 0

    def open_recorder() -> Recorder | None:
        number = own_rank() if rank is None else rank()
        if number is None:
            return None
        name = Path(path).name
        described = Manifest.begun(source, (source, "torch"), name=name, label=name)
        return Recorder(path, described.changed(entries or {}), rank=number, **given)

    watch = LossWatch(open_recorder, reader, (given.get("resume_after") or 0) + 1, texts)

    def stepped(stepping: Optimizer, args: Any, kwargs: Any) -> None:
        watch.stepped(stepping)

    patches = Patches()
    register = (
        register_optimizer_step_post_hook
        if optimizer is None
        else optimizer.register_step_post_hook
    )
    patches.on_close(register(stepped).remove)
    patches.on_close(close_at_exit(watch.close))
    return watch, patches


def watched_loss(
    loss: Callable[..., Any],
    *,
    run: str | Path,
    names: "str | Mapping[str, Any] | Names",
    optimizer: Optimizer | None = None,
    head: bool | nn.Module = True,
    rank: Callable[[], int | None] | None = None,
    texts: Callable[..., Any] | None = None,
    manifest: Mapping[str, Any] | None = None,
    token_every: int = 10,
    **settings: Any,
) -> WatchedLoss:
    """Watch every training step through its policy loss.

    Parameters
    ----------
    loss : callable
        Any function of per-token log-probabilities; result and gradients stay bitwise the same.
    run : str or Path
        Run folder, on a disk that all processes share; opened at the first loss.
    names : str, mapping or Names
        Which argument holds what: a trainer (a row of `SEAMS`), quantities by name
        (``{"logp": "logp", "advantages": "adv", "mask": "mask"}``), or a changed row
        (``{"like": "slime", "logp_old": "batch.rollout_log_probs", "sampler": None}``).
    optimizer : torch.optim.Optimizer, optional
        Whose steps end a step of the run; by default any, once a loss was watched.
    head : bool or torch.nn.Module
        Read entropy and sum of p^2 off the logits of the model that makes them: found by itself,
        or given. False reads nothing; the class of a token is then unknown, unless ``collision``
        is among the names.
    rank : callable, optional
        Number of this process among those whose tokens differ, None if another one records them;
        by default that of ``torch.distributed``, under Megatron the data-parallel one.
    texts : callable, optional
        Token ids to their texts, e.g. ``tokenizer.batch_decode``.
    manifest : mapping, optional
        Entries of the manifest: ``label``, ``objective``, ``seed``, ...
    token_every : int
        Write token rows of every n-th step; class totals are kept of every step.
    **settings
        ``temperature``, ``token_fraction``, ``resume_after``, ``sequence_level``, ... of
        `wapo_analysis.Recorder`.

    Returns
    -------
    WatchedLoss
        To be used in place of the loss.

    Raises
    ------
    UserError
        On names that do not exist. Later failures never raise: one warning, training goes on.

    Examples
    --------
    >>> import tempfile, torch
    >>> def policy_loss(logp, adv, mask):
    ...     return -(logp * adv * mask).sum()
    >>> weights = torch.zeros(2, 3, requires_grad=True)
    >>> optimizer = torch.optim.SGD([weights], lr=0.1)
    >>> names = {"logp": "logp", "advantages": "adv", "mask": "mask"}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with watched_loss(policy_loss, run=folder, names=names, head=False) as watched:
    ...         watched(weights - 1, torch.tensor([[1.0], [-1.0]]), torch.ones(2, 3)).backward()
    ...         optimizer.step()
    """
    own = ("path", "manifest", "rank", "token_every")
    known = [name for name in inspect.signature(Recorder).parameters if name not in own]
    if unknown := settings.keys() - known:
        raise unknown_name("setting", min(unknown), known)
    given: dict[str, Any] = {"optimizer": optimizer, "head": head, "rank": rank, "texts": texts}
    given |= {"run": str(Path(run).absolute()), "manifest": manifest, "token_every": token_every}
    return WatchedLoss(loss, names, {**given, **settings})
