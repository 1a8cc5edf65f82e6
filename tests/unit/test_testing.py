"""assert_objective: right losses pass, wrong ones fail with the difference named."""

from typing import Any

import pytest
import torch
from torch import Tensor

from wapo_analysis.errors import UserError
from wapo_analysis.testing import assert_objective

B, T = 8, 10


@pytest.fixture
def given() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    old = -2 * torch.rand(B, T, generator=g)
    reward = torch.rand(B, generator=g)
    table = reward.view(2, 4)
    made = (table - table.mean(1, keepdim=True)) / (table.std(1, keepdim=True) + 1e-6)
    lengths = torch.tensor([3, 10, 7, 5, 9, 4, 8, 6])
    return {
        "logp": old + 0.8 * torch.rand(B, T, generator=g) - 0.4, "logp_old": old,
        "advantages": made.reshape(-1), "mask": (torch.arange(T) < lengths[:, None]).float(),
        "groups": torch.arange(B) // 4, "rewards": reward,
    }  # fmt: skip


def surrogate(logp: Tensor, old: Tensor, A: Tensor) -> Tensor:
    ratio = (logp - old).exp()
    return -torch.minimum(ratio * A[:, None], ratio.clamp(0.8, 1.2) * A[:, None])


def rollout_mean(logp: Tensor, old: Tensor, A: Tensor, mask: Tensor) -> Tensor:
    return ((surrogate(logp, old, A) * mask).sum(1) / mask.sum(1)).mean()


def token_mean(logp: Tensor, old: Tensor, A: Tensor, mask: Tensor) -> Tensor:
    return (surrogate(logp, old, A) * mask).sum() / mask.sum()


def inverted(logp: Tensor, old: Tensor, A: Tensor, mask: Tensor) -> Tensor:
    return rollout_mean(old, logp, A, mask)


def on_padding(logp: Tensor, old: Tensor, A: Tensor, mask: Tensor) -> Tensor:
    return surrogate(logp, old, A).mean()


def unclipped(logp: Tensor, old: Tensor, A: Tensor, mask: Tensor) -> Tensor:
    loss = -(logp - old).exp() * A[:, None]
    return ((loss * mask).sum(1) / mask.sum(1)).mean()


def test_right_losses_pass(given: dict[str, Any]) -> None:
    assert assert_objective(rollout_mean, "grpo", **given).fits[0] == "grpo"
    assert assert_objective(token_mean, "dapo", **given).fits[0] == "dapo"


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (token_mean, "behaves as dapo"),
        (inverted, "ratio does"),
        (on_padding, "tokens after the end, outside the loss mask, carry gradient"),
        (unclipped, "beyond the clip bound 1.2"),
    ],
)
def test_wrong_losses_fail_with_the_difference(loss: Any, said: str, given: dict[str, Any]) -> None:
    with pytest.raises(AssertionError, match=said):
        assert_objective(loss, {"name": "grpo", "bounds": [0.8, 1.2]}, **given)


def test_advantages_are_checked_where_rewards_are_given(given: dict[str, Any]) -> None:
    declared = {"name": "grpo", "advantage": "group mean, population std"}
    with pytest.raises(AssertionError, match="sample std of the group"):
        assert_objective(rollout_mean, declared, **given)


def test_bad_input_is_named(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="unknown objective 'gropo'"):
        assert_objective(rollout_mean, "gropo", **given)
    with pytest.raises(UserError, match="mask must have the shape of logp"):
        assert_objective(rollout_mean, "grpo", **{**given, "mask": given["mask"][:, :3]})
