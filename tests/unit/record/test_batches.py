"""Hand-made loops: the clip flags where the gradient does not tell, buffers that are used again,
what is no tensor, a step that is not finished."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from wapo_analysis import Recorder, open_run

CLIP = (0.8, 1.2)


class Loop:
    """Eight rollouts of up to six tokens whose policy has moved; the last two have no signal."""

    def __init__(self, recorder: Recorder, kl: float = 0.0, whole: bool = False) -> None:
        torch.manual_seed(4)
        self.recorder, self.kl, self.whole = recorder, kl, whole
        self.logits = torch.randn(8, 6, 11, requires_grad=True)
        self.tokens = torch.randint(11, (8, 6))
        self.mask = (torch.arange(6) < torch.tensor([6, 5, 1, 6, 3, 6, 6, 2])[:, None]).float()
        self.adv = torch.tensor([1.0, -1, 0.5, -0.5, 2, -2, 0, 0])
        self.logp = self.logits.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]
        self.old = self.logp.detach() + 0.3 * torch.randn(8, 6) + 0.6 * torch.randn(8, 1)

    def ratio(self, logp: Tensor) -> Tensor:
        away = logp - self.old
        if self.whole:
            away = ((away * self.mask).sum(1) / self.mask.sum(1))[:, None].expand_as(logp)
        return away.exp()

    def loss(self) -> Tensor:
        ratio, adv = self.ratio(self.logp), self.adv[:, None]
        gain = torch.minimum(ratio * adv, ratio.clamp(*CLIP) * adv)
        away = self.old - self.logp
        return -((gain - self.kl * (away.exp() - away - 1)) * self.mask).sum() / 20

    def stopped(self) -> list[bool]:
        """Of the tokens of the mask, those that the clip stops."""
        ratio, adv = self.ratio(self.logp.detach()), self.adv[:, None]
        stopped = ((ratio > CLIP[1]) & (adv > 0)) | ((ratio < CLIP[0]) & (adv < 0))
        found: list[bool] = stopped[self.mask.bool()].tolist()
        return found

    def watch(self, **given: Any) -> None:
        names = ("logp", "tokens", "mask", "adv", "groups")
        plain = [given.pop(n, getattr(self, n, torch.arange(8) // 2)) for n in names]
        self.recorder.watch(*plain, **{"logits": self.logits, "logp_old": self.old, **given})


@pytest.mark.parametrize("kl", [0.0, 0.05])
@pytest.mark.parametrize("whole", [False, True], ids=["token", "rollout"])
@pytest.mark.parametrize("clip", [CLIP, None], ids=["bounds", "no bounds"])
def test_clip_flags_are_the_clip_s_or_not_known(
    kl: float, whole: bool, clip: Any, tmp_path: Path
) -> None:
    with Recorder(tmp_path / "r", sequence_level=whole) as recorder:
        loop = Loop(recorder, kl, whole)
        loop.watch(clip=clip)
        loop.loss().backward()
        recorder.finish_step(1, reward=[1.0, 0] * 4)
    run, stopped = open_run(tmp_path / "r"), loop.stopped()
    assert 4 < sum(stopped) < len(stopped) - 4
    row, tokens = run.steps.iloc[0], run.tokens()
    assert tokens.kept.all()
    if kl and clip is None:  # every token has a gradient, and nothing says what the bounds are
        assert "clip_high" not in row or np.isnan(row.clip_high)
        assert not tokens.clipped.any()
        return
    assert tokens.clipped.tolist() == stopped
    positive = tokens.advantage > 0
    assert row.clip_high == pytest.approx((tokens.clipped & positive).mean())
    assert row.clip_low == pytest.approx((tokens.clipped & ~positive).mean())


def test_a_loss_of_several_backward_passes_has_the_sum_of_their_gradients(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Recorder(tmp_path / "r") as recorder, caplog.at_level(logging.WARNING):
        for step in (1, 2):
            loop = Loop(recorder)
            loop.logp.retain_grad()
            loop.watch()
            loop.loss().backward(retain_graph=True)  # type: ignore[no-untyped-call]
            (0.1 * loop.logp[:, 0].sum()).backward()
            recorder.finish_step(step)
    expected = -loop.logp.grad[loop.mask.bool()]  # type: ignore[index]
    for step in (1, 2):
        np.testing.assert_allclose(
            open_run(tmp_path / "r").tokens([step]).coef, expected, rtol=4e-5
        )
    assert [m.split(":")[0] for m in caplog.messages] == [
        "several gradients came back to the logp given to watch"
    ]


def test_buffers_may_be_written_again_before_the_step_ends(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r") as recorder:
        loop = Loop(recorder)
        given = {"groups": torch.arange(8) // 2, "rollouts": torch.arange(8), "adv": loop.adv}
        given = {name: values.clone() for name, values in given.items()}
        for first in (0, 8):
            given["rollouts"].copy_(torch.arange(8) + first)
            given["adv"].copy_(loop.adv + first)
            loop.watch(**given)
        loop.loss().backward()
        for values in given.values():
            values.fill_(77)
        recorder.finish_step(1, reward=torch.zeros(16, 1))
    rollouts = open_run(tmp_path / "r").rollouts
    assert rollouts.rollout.tolist() == list(range(16))
    assert rollouts.group.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] * 2
    assert rollouts.advantage.tolist() == [*loop.adv.tolist(), *(loop.adv + 8).tolist()]


@pytest.mark.parametrize("back", [True, False], ids=["with a gradient", "looked at"])
@pytest.mark.parametrize("error", [None, RuntimeError])
def test_a_step_that_was_never_finished_is_told_where_the_loop_ended_well(
    back: bool, error: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def train(recorder: Recorder) -> None:
        recorder.finish_step(6)
        loop = Loop(recorder)
        loop.watch()
        if back:
            loop.loss().backward()
        if error is not None:
            raise error

    with caplog.at_level(logging.WARNING):
        try:
            with Recorder(tmp_path / "r") as recorder:
                train(recorder)
        except RuntimeError:
            pass
    assert [m.split(":")[0] for m in caplog.messages] == (
        ["what was watched after step 6 is not recorded"] * (back and error is None)
    )


def test_lists_and_arrays_are_taken(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r") as recorder:
        loop = Loop(recorder)
        given = {"tokens": loop.tokens.tolist(), "mask": loop.mask.numpy(), "adv": loop.adv.numpy()}
        loop.watch(**given, logp_old=loop.old.tolist(), rollouts=range(8), kept=loop.mask.tolist())
        loop.loss().backward()
        recorder.finish_step(1)
    assert recorder.failure is None
    assert len(open_run(tmp_path / "r").tokens()) == 35


WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "mask": ({"mask": None}, {}, "mask must be a tensor of numbers, got NoneType"),
    "groups": ({"groups": ["a"] * 8}, {}, "groups must be a tensor of numbers, got list"),
    "logits": ({"logits": [[1.0]]}, {}, "logits must be a tensor of numbers, got list"),
    "ragged": ({"adv": [[1.0], [1, 2]]}, {}, "advantages must be a tensor of numbers, got list"),
    "clip": ({"clip": (None, 1.2)}, {}, "clip must be two bounds of the ratio, such as (0.8, 1.2)"),
    "scale": ({"loss_scale": None}, {}, "loss_scale must be positive, got None"),
    "reward": ({}, {"reward": ["good"] * 8}, "reward must be one number for each rollout: could"),
    "rewards": (
        {},
        {"reward": torch.ones(8, 2)},
        "reward must be one number for each rollout, got",
    ),
    "loss": ({}, {"loss": torch.ones(3)}, "step column 'loss' must be a number, got shape (3,)"),
    "step": ({}, {"step": "last"}, "a step must be 0 to 2147483647, got 'last'"),
    "texts": ({}, {"texts": lambda ids: ["a"]}, "texts gave 1 texts for 10 token ids"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_no_number_is_one_clear_line(case: str, tmp_path: Path) -> None:
    watched, finished, said = WRONG[case]
    with Recorder(tmp_path / "r") as recorder:
        loop = Loop(recorder)
        loop.watch(**watched)
        loop.loss().backward()
        recorder.finish_step(**{"step": 1, **finished})
    assert str(recorder.failure).startswith(f"UserError: {said}")
