"""For people who write trainers: a test that a loss function is the objective it should be.

    from wapo_analysis.testing import assert_objective

    def test_my_loss():
        assert_objective(my_loss, "grpo", logp=..., logp_old=..., advantages=..., mask=...)

It is a pytest plug-in as well: the fixture ``assert_objective`` is this function.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from wapo_analysis.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from wapo_analysis.audit import Audit


def assert_objective(
    loss: "Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]",
    objective: str | Mapping[str, Any],
    *,
    logp: "Tensor",
    logp_old: "Tensor",
    advantages: "Tensor",
    mask: "Tensor",
    groups: "Tensor | None" = None,
    rewards: "Tensor | Sequence[float] | None" = None,
) -> "Audit":
    """Assert that the gradient of a loss is that of an objective, and name the difference.

    Returns all that was found. Raises AssertionError with every difference, its size and usual
    cause; UserError if the shapes do not fit or the objective is not known.

    Parameters
    ----------
    loss : callable
        ``loss(logp, logp_old, advantages, mask)``, a scalar; wrap one that takes them otherwise.
    objective : str or mapping
        Name, such as ``"grpo"`` or ``"dapo"``, or what a loop declares in its manifest: ``name``,
        ``bounds`` of the ratio, ``ratio``, ``mean``, ``advantage`` (docs/audit.md).
    logp, logp_old : Tensor, shape (B, T)
        Log-probabilities in nats. Let them differ, by up to 0.5 say: where every ratio is 1, losses
        are the same.
    advantages : Tensor, shape (B,) or (B, T)
    mask : Tensor, shape (B, T)
        Non-zero on loss tokens; let the lengths of rollouts differ.
    groups : Tensor of int, shape (B,), optional
        Prompt of each rollout; by default all have one.
    rewards : Tensor or sequence of B numbers, optional
        With them it is checked how the advantages were made.

    Examples
    --------
    >>> import torch
    >>> logp_old = -torch.rand(4, 6)
    >>> logp, A = logp_old + 0.4 * torch.rand(4, 6) - 0.2, torch.tensor([1.0, -1.0, 0.5, -0.5])
    >>> mask = (torch.arange(6) < torch.tensor([[3], [6], [4], [5]])).float()
    >>> def token_mean(logp, logp_old, advantages, mask):
    ...     ratio, A = (logp - logp_old).exp(), advantages[:, None]
    ...     return -(torch.minimum(ratio * A, ratio.clamp(0.8, 1.2) * A) * mask).sum() / mask.sum()
    >>> given = {"logp": logp, "logp_old": logp_old, "advantages": A, "mask": mask}
    >>> assert_objective(token_mean, "dapo", **given).fits[0]
    'dapo'
    >>> assert_objective(token_mean, "grpo", **given)
    Traceback (most recent call last):
    AssertionError: behaves as dapo (token mean over the batch ...
    """
    from wapo_analysis.audit import judge
    from wapo_analysis.audit.declared import ANY

    declared = {"name": objective} if isinstance(objective, str) else dict(objective)
    if declared.get("name") not in ANY:
        from wapo_analysis.errors import unknown_name

        raise unknown_name("objective", declared.get("name"), ANY)
    seen = _evidence(loss, declared, logp, logp_old, advantages, mask, groups, rewards)
    found = judge(seen, "the loss")
    told = [f"{d.says} ({d.tokens}); usual cause: {d.cause}" for d in found.deviations]
    if not told and found.fits[:1] == (declared["name"],):
        return found
    raise AssertionError("\n".join([found.summary, *told]))


def _evidence(
    loss: "Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]", declared: dict[str, Any],
    logp: "Tensor", logp_old: "Tensor", advantages: "Tensor", mask: "Tensor",
    groups: "Tensor | None", rewards: "Tensor | Sequence[float] | None",
) -> Any:  # fmt: skip
    """Rows of the tokens with the gradient of the loss, as an audit reads them."""
    import pandas as pd
    import torch

    from wapo_analysis.audit.evidence import Evidence
    from wapo_analysis.record.batches import outside_counts

    count = len(logp)
    for name, tensor in (("logp_old", logp_old), ("mask", mask)):
        if tensor.shape != logp.shape:
            raise UserError(f"{name} must have the shape of logp, {tuple(logp.shape)}")
    if advantages.shape not in (logp.shape, logp.shape[:1]):
        raise UserError(f"advantages must have shape ({count},) or {tuple(logp.shape)}")
    leaf = logp.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(leaf, logp_old, advantages, mask), leaf)
    inside = mask.bool()
    row, position = inside.nonzero(as_tuple=True)
    group = torch.zeros(count, dtype=torch.int64) if groups is None else groups
    per_token = advantages if advantages.dim() == 2 else advantages[:, None].expand_as(logp)
    ones = torch.ones_like(row)
    columns = {
        "step": ones, "minibatch": ones, "rank": 0 * ones, "group": group[row], "rollout": row,
        "position": position, "token_id": -ones, "advantage": per_token[inside],
        "logp": logp[inside], "logp_old": logp_old[inside], "coef": -gradient[inside],
        "kept": (gradient != 0)[inside] | (per_token == 0)[inside],
    }  # fmt: skip
    counts = outside_counts(gradient, inside).tolist()
    places = dict(zip(("grad_outside", "grad_before", "grad_after"), counts, strict=True))
    steps = pd.DataFrame([{"step": 1, "updates": 1, **places}])
    rollouts = pd.DataFrame()
    if rewards is not None:
        whole = advantages if advantages.dim() == 1 else per_token[:, 0]
        rollouts = pd.DataFrame({
            "step": 1, "rank": 0, "group": group.cpu(), "rollout": range(count),
            "reward": torch.as_tensor(rewards).double().cpu(), "advantage": whole.double().cpu(),
        })  # fmt: skip
    host = {name: values.detach().cpu() for name, values in columns.items()}
    return Evidence.of(
        {n: (v.double() if v.is_floating_point() else v).numpy() for n, v in host.items()},
        rollouts, steps, {"source": "loop", "objective": declared}, rounding=2.0**-22,
    )  # fmt: skip


if "pytest" in sys.modules:
    import pytest

    @pytest.fixture(name="assert_objective")
    def _assert_objective() -> Callable[..., Any]:
        """`wapo_analysis.testing.assert_objective`."""
        return assert_objective
