"""Watching verl 0.9.1 through its own registry of policy losses.

verl calls a policy loss once per micro-batch with (B, T) tensors, ``log_prob`` on the autograd
graph. A watched loss is the registered one with a look at these tensors: same arguments, same
result, and the gradient that reaches ``log_prob`` is the exact -coef, KL term included.

Shapes: B rollouts of a micro-batch, T response positions, n rollouts of a step on this process.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from importlib import import_module
from pathlib import Path
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from wapo_analysis.capture import Patches
from wapo_analysis.capture.lm_head import HeadReader
from wapo_analysis.capture.loss import LossWatch
from wapo_analysis.capture.seams import SEAMS
from wapo_analysis.errors import UserError
from wapo_analysis.record import guarded
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.store import Manifest

#: Watched losses are registered as ``wapo_vanilla``, ``wapo_gspo``, ...
PREFIX = "wapo_"
_ROW = "wapo_row"

PolicyLoss = Callable[..., tuple[Tensor, dict[str, Any]]]


def watched(loss: PolicyLoss, watcher: "VerlWatcher") -> PolicyLoss:
    """Return a policy loss that shows its tensors to a watcher; its result is untouched.

    ``loss``: registered policy loss: ``old_log_prob``, ``log_prob``, ``advantages``,
    ``response_mask`` of shape (B, T), ``rollout_is_weights`` (B, T) or None, ``config`` and others.
    """
    signature = inspect.signature(loss)

    @wraps(loss)
    def policy_loss(*args: Any, **kwargs: Any) -> tuple[Tensor, dict[str, Any]]:
        watcher.see_loss(signature, args, kwargs)
        return loss(*args, **kwargs)

    return policy_loss


class VerlWatcher(LossWatch):
    """What one actor process knows of the step it is in.

    ``open_recorder``: called at the first step with rank and temperature. ``recorder``: None before
    the first step, and on processes whose tokens another process records; ``failure``: why watching
    stopped.
    """

    def __init__(self, open_recorder: Callable[[int, float], Recorder]) -> None:
        super().__init__(lambda: None)
        self._open_verl = open_recorder
        self._active = False
        self._groups: Tensor | None = None
        self._rewards: Tensor | None = None
        self._micro: dict[str, Any] = {}

    @guarded
    def begin_step(self, engine: Any, data: Any) -> None:
        """Take identity and rewards of the n rollouts of a step before its updates.

        ``engine``: says which processes share their data; ``data``: a column that numbers the rows
        is added; it survives shuffling and splitting.
        """
        if not engine.is_mp_src_rank_with_outputs():
            return
        rank, count = int(engine.get_data_parallel_rank()), int(data.batch_size[0])
        if self.recorder is None:
            temperature = float(_plain(data, "temperature", 1.0))
            self._opened = True
            self.recorder = self._open_verl(rank, temperature)
            self._head = HeadReader(temperature)
        step = _plain(data, "global_steps", None)
        self._step = step if isinstance(step, int) else self._step
        self._look_ahead(self.recorder)
        self._first, self._active = rank * count, True
        data[_ROW] = torch.arange(count)
        uid, scores = _plain(data, "uid", None), data.get("token_level_scores", None)
        # Names of prompts become numbers that agree between processes and runs.
        numbers = None if uid is None else [crc32(str(u).encode()) & 0x7FFFFFFF for u in uid]
        self._groups = None if numbers is None else torch.tensor(numbers)
        self._rewards = None if scores is None else _dense(scores).sum(1).cpu()

    @contextmanager
    def micro_batch(self, model_output: Mapping[str, Any], data: Any) -> Iterator[None]:
        """Know tokens, identity and statistics of a micro-batch while its loss is computed."""
        self._micro = {}
        if self._active:
            self._gather(model_output, data)
        try:
            yield
        finally:
            self._micro = {}

    @guarded
    def _gather(self, model_output: Mapping[str, Any], data: Any) -> None:
        padding = import_module("verl.workers.utils.padding")
        micro: dict[str, Any] = {"tokens": _dense(data["responses"])}
        if _ROW in data:
            rows = data[_ROW].cpu()
            micro["rollouts"] = rows + self._first
            micro["groups"] = None if self._groups is None else self._groups[rows]
        for name, given in (("entropy", "entropy"), ("collision", "sum_pi_squared")):
            values = model_output.get(given)
            if values is not None:
                micro[name] = padding.no_padding_2_padding(values.detach(), data)
        self._micro = micro

    @guarded
    def see_loss(self, signature: inspect.Signature, args: Any, kwargs: Any) -> None:
        """Look at the tensors of one call of a policy loss."""
        if not self._active:
            return
        found = SEAMS["verl"].find(signature.bind(*args, **kwargs).arguments)
        # What importance weights of zero leave out is not kept; what is idle beyond that was
        # stopped by the loss itself.
        found.setdefault("weights", torch.ones_like(found["mask"]))
        micro = {name: value for name, value in self._micro.items() if value is not None}
        if "tokens" in micro:
            micro["tokens"] = _fit(micro["tokens"], found["logp"].shape)
        self.see(found | micro)

    def end_verl_step(self) -> None:
        """Write the step, unless no policy loss was called in it (a critic's update)."""
        active, self._active = self._active, False
        if active:
            self.end_step(reward=self._rewards)


def _plain(data: Any, key: str, default: Any) -> Any:
    """Entry of a TensorDict that is no tensor, unwrapped."""
    if key not in data:
        return default
    return import_module("verl.utils.tensordict_utils").get(data, key, default)


def _dense(values: Tensor) -> Tensor:
    return values.to_padded_tensor(0) if values.is_nested else values


def _fit(tokens: Tensor, shape: torch.Size) -> Tensor:
    """Token ids padded or cut to the width of the log-probabilities."""
    return torch.nn.functional.pad(tokens, (0, shape[1] - tokens.shape[1]))


class VerlWatch:
    """Watched losses in verl's registry; ``close()`` takes them out again.

    ``names``: names to give as ``actor.policy_loss.loss_mode``.
    """

    def __init__(self, watcher: VerlWatcher, names: list[str], patches: Patches) -> None:
        self.watcher, self.names, self._patches = watcher, names, patches

    def close(self, status: str = "finished") -> None:
        """Restore verl and end the run; may be called twice."""
        if self._patches.closed:
            return
        self._patches.close()
        self.watcher.close(status)


def watch_verl(path: str, manifest: Mapping[str, Any] | None = None, **settings: Any) -> VerlWatch:
    """Register a watched form of every policy loss of verl, for this process.

    Choose the loss with ``actor.policy_loss.loss_mode=wapo_vanilla`` (or another name).
    Raises UserError if verl is absent, has no such registry, or is watched already.

    Parameters
    ----------
    path : str
        Run folder, on a disk that all actor processes share.
    manifest : mapping, optional
        Entries of the manifest.
    **settings
        ``token_every``, ``token_fraction`` of :class:`~wapo_analysis.record.recorder.Recorder`.

    Notes
    -----
    Entropy and sum p^2 are read off the model's logits, padded or not; the engine's own
    ``sum_pi_squared`` goes first. With fused kernels there are no logits: the class is then
    unknown; coef, ratio, clip and (with ``actor.calculate_entropy=True``) entropy are recorded.
    """
    try:
        core = import_module("verl.trainer.ppo.core_algos")
        worker = import_module("verl.workers.engine_workers").TrainingWorker
        registry, register = core.POLICY_LOSS_REGISTRY, core.register_policy_loss
    except (ImportError, AttributeError) as error:
        raise UserError(f"verl 0.9.1 is needed to watch it: {error}") from error
    if any(name.startswith(PREFIX) for name in registry):
        raise UserError("verl is already watched in this process; close that watch first")

    def open_recorder(rank: int, temperature: float) -> Recorder:
        name = Path(path).name
        described = Manifest.begun("verl", ("verl", "torch"), name=name, label=name)
        described = described.changed(manifest or {})
        return Recorder(path, described, rank=rank, temperature=temperature, **settings)

    path = str(Path(path).absolute())
    watcher, patches = VerlWatcher(open_recorder), Patches()
    names = []
    for name, loss in list(registry.items()):
        register(PREFIX + name)(watched(loss, watcher))
        patches.on_close(partial(registry.pop, PREFIX + name, None))
        names.append(PREFIX + name)
    patches.set(worker, "train_mini_batch", _around_step(worker.train_mini_batch, watcher))
    patches.set(worker, "set_loss_fn", _around_loss(worker.set_loss_fn, watcher))
    return VerlWatch(watcher, names, patches)


def _around_step(original: Callable[..., Any], watcher: VerlWatcher) -> Callable[..., Any]:
    @wraps(original)
    def train_mini_batch(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        watcher.begin_step(self.engine, data)
        output = original(self, data, *args, **kwargs)
        watcher.end_verl_step()
        return output

    return train_mini_batch


def _around_loss(original: Callable[..., Any], watcher: VerlWatcher) -> Callable[..., Any]:
    @wraps(original)
    def set_loss_fn(self: Any, loss_fn: Callable[..., Any]) -> Any:
        def loss(model_output: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
            with watcher.micro_batch(model_output, data):
                return loss_fn(*args, model_output=model_output, data=data, **kwargs)

        return original(self, loss)

    return set_loss_fn
