"""Replace mode in TRL: while a loss is computed, our head stands in for TRL's fused one.

TRL (1.15 on) makes log-probabilities and entropies with one autograd Function, looked up by name in
``trl.trainer.utils`` at every forward. During the forward passes of a loss, and when its tokens are
scored again, that name is ours; it is put back before the forward returns, so no other model or
trainer ever sees it.

Shapes: B texts of a forward, L positions, M = B (L - 1) predicted ones, N of them scored, V
vocabulary, D hidden width.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from wapo_analysis.capture import Patches
from wapo_analysis.errors import UserError
from wapo_analysis.stats import TokenStats, fused_head_stats

log = logging.getLogger(__name__)

_SEAM = "_ChunkedLogProbFunction"
_IGNORED = -100  # label of a position that is not scored


def check_replaceable(trainer: Any, has_fused_head: bool) -> None:
    """Refuse replace mode where TRL's head cannot be stood in for.

    ``has_fused_head``: the trainer's model has TRL's own fused head.

    Raises
    ------
    UserError
        One line that says why.
    """
    if not has_fused_head or _seam() is None:
        raise UserError(
            'mode="replace" stands in for the fused head of TRL 1.15 or newer, which this trainer '
            'does not have; use mode="passive"'
        )
    bonus = getattr(trainer, "_entropy_bonus_enabled", False)
    quantile = getattr(trainer, "top_entropy_quantile", 1.0) < 1.0
    if bonus or quantile:
        name = "entropy_coef or use_adaptive_entropy" if bonus else "top_entropy_quantile"
        raise UserError(
            f'mode="replace" leaves the entropy out of the gradient, but {name} makes it part of '
            'the loss; use mode="passive"'
        )


def _seam() -> ModuleType | None:
    """Return the module that TRL looks its head up in, None if it does so no more."""
    try:
        from trl.trainer import utils
    except ImportError:
        return None
    found: ModuleType = utils
    return found if hasattr(found, _SEAM) else None


class TrlHead:
    """TRL's own head, left alone: what a trainer in passive mode has."""

    #: Our head is in use.
    working = False

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Within: a scoring of the tokens of the loss."""
        yield

    def install(self, model: Any, patches: Patches) -> None:
        """Get between the trainer and its model."""

    def take(self) -> TokenStats | None:
        """Statistics of the forward pass just made, each (B, L - 1) and 0 where not scored."""
        return None


class OwnHead(TrlHead):
    """Our head in place of TRL's, until it fails once.

    ``on_failure``: called once with the exception; training goes on with TRL's head.
    """

    def __init__(self, on_failure: Callable[[Exception], None]) -> None:
        self.working = True
        self._on_failure = on_failure
        self._scoring = False
        self._scored: Tensor
        self._stats: TokenStats | None = None

    def install(self, model: Any, patches: Patches) -> None:
        """Wrap the forward of the causal model."""
        patches.wrap(model, "forward", self._forward)

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Within: forward passes use our head."""
        self._scoring = True
        try:
            yield
        finally:
            self._scoring, self._stats = False, None

    def take(self) -> TokenStats | None:
        """Statistics of the forward pass just made."""
        stats, self._stats = self._stats, None
        return stats

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        labels, utils = kwargs.get("labels"), _seam()
        # Labels that come shifted already belong to sequence parallelism, which TRL keeps.
        known = kwargs.get("fused_lm_head") and kwargs.get("shift_labels") is None
        if not (self.working and self._scoring and known) or labels is None or utils is None:
            return original(*args, **kwargs)
        self._scored = labels[:, 1:] != _IGNORED
        theirs = getattr(utils, _SEAM)
        setattr(utils, _SEAM, _StandIn(self, theirs))
        try:
            return original(*args, **kwargs)
        finally:
            setattr(utils, _SEAM, theirs)

    def fail(self, error: Exception) -> None:
        """Use TRL's head from here on, with one warning."""
        if not self.working:
            return
        self.working, self._stats = False, None
        with suppress(Exception):  # a log handler of the training may raise
            log.warning(
                "our head failed (%s: %s); TRL's own is used for the rest of the training",
                type(error).__name__,
                error,
            )
        self._on_failure(error)

    def compute(
        self, theirs: "_Theirs", hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies of the positions TRL asks for, (M,) or (N,).

        On a GPU TRL gives the N scored positions, elsewhere all M; here only the N are computed.
        """
        scored = self._scored.reshape(-1).to(hidden.device)
        mask = scored if len(hidden) == len(scored) else None
        head = partial(theirs.ours, mask=mask)
        columns = _Guarded.apply(  # type: ignore[no-untyped-call]
            self, theirs, head, mask, hidden, weight, bias
        )
        stats = TokenStats(*columns)
        self._stats = stats.map(
            lambda column: _spread(column.detach(), scored).view(self._scored.shape)
        )
        if mask is None:
            return stats.logp, stats.entropy
        return _spread(stats.logp, scored), _spread(stats.entropy, scored)


class _StandIn:
    """What TRL finds under the name of its Function."""

    def __init__(self, head: OwnHead, function: Any) -> None:
        self._head, self._function = head, function

    def apply(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any
    ) -> tuple[Tensor | None, ...]:
        """Log-probability, entropy and three outputs nobody asked for, as TRL's Function."""
        theirs = _Theirs(self._function, settings)
        try:
            logp, entropy = self._head.compute(theirs, hidden, weight, bias)
            return logp, entropy, None, None, None
        except Exception as error:
            self._head.fail(error)
            return theirs(hidden, weight, bias)


class _Theirs:
    """TRL's Function with the settings of one call."""

    def __init__(self, function: Any, settings: Sequence[Any]) -> None:
        self._function, self._settings = function, settings

    def __call__(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        """What TRL would have computed."""
        found: tuple[Tensor | None, ...] = self._function.apply(
            hidden, weight, bias, *self._settings
        )
        return found

    def ours(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, mask: Tensor | None
    ) -> TokenStats:
        """The same from our head."""
        targets, temperature, _, softcap, scale, outputs = self._settings
        if not set(outputs) <= {"log_probs", "entropy"}:
            raise ValueError(f"TRL asks its head for {', '.join(outputs)}")
        return fused_head_stats(
            hidden, weight, targets, bias, temperature, mask, scale=scale, softcap=softcap
        )


class _Guarded(torch.autograd.Function):
    """Our head, with TRL's gradient if ours fails in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        own: OwnHead,
        theirs: _Theirs,
        head: Callable[..., TokenStats],
        mask: Tensor | None,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        leaves = [t if t is None else t.detach().requires_grad_(t.requires_grad) for t in inputs]
        with torch.enable_grad():
            stats = head(*leaves)
        device = stats.logp.device.type
        ctx.own, ctx.theirs, ctx.mask, ctx.leaves, ctx.logp = own, theirs, mask, leaves, stats.logp
        ctx.autocast = (
            device,
            torch.get_autocast_dtype(device),
            torch.is_autocast_enabled(device),
        )
        columns = tuple(column.detach() for column in stats if column is not None)
        ctx.mark_non_differentiable(*columns[1:])
        return columns

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        wanted = [leaf for leaf in ctx.leaves if leaf is not None and leaf.requires_grad]
        try:
            found = torch.autograd.grad(ctx.logp, wanted, grad, retain_graph=True)
        except Exception as error:
            ctx.own.fail(error)
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                every = ctx.theirs(*ctx.leaves)[0]
                logp = every if ctx.mask is None else every[ctx.mask]
            found = torch.autograd.grad(logp, wanted, grad)
        rest = iter(found)
        takes = (leaf is not None and leaf.requires_grad for leaf in ctx.leaves)
        return None, None, None, None, *(next(rest) if take else None for take in takes)


def _spread(values: Tensor, scored: Tensor) -> Tensor:
    """Values of the N scored positions among all M, 0 elsewhere."""
    return values.new_zeros(scored.shape).masked_scatter(scored, values)
