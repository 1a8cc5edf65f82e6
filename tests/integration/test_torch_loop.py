"""A hand-written loop: watching is passive, coef is autograd's, statistics are the softmax's."""

import importlib.util
import logging
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from wapo_analysis import Recorder, open_run
from wapo_analysis.cli import run as wapo
from wapo_analysis.errors import UserError

LOOP = Path(__file__).parents[2] / "experiments" / "watched_torch_loop.py"
WATCHING = re.compile(r"Recorder|\brun\.")


def load(source: str, path: Path) -> ModuleType:
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_five_lines_watch_the_loop_and_change_no_bit(tmp_path: Path) -> None:
    head, body = LOOP.read_text().split('"""\n', 1)
    lines = body.splitlines()
    added = [line for line in lines if WATCHING.search(line)]
    assert 1 <= len(added) <= 5
    plain = "\n".join(line for line in lines if line not in added)
    assert "wapo_analysis" not in plain
    arguments = ["--out", str(tmp_path / "run"), "--steps", "12"]
    watched = load(LOOP.read_text(), tmp_path / "watched.py").main(arguments)
    alone = load(f'{head}"""\n{plain}', tmp_path / "alone.py").main(arguments)
    for name, value in watched.state_dict().items():
        assert torch.equal(value, alone.state_dict()[name]), name
    found = open_run(tmp_path / "run")
    assert found.steps.step.tolist() == list(range(1, 13))
    assert found.manifest["status"] == "finished"
    assert found.steps[["reward", "entropy", "kl_old", "groups_all_wrong"]].notna().all(axis=None)
    tokens = found.tokens()
    assert len(tokens) == 12 * 2 * 256 * 2
    assert not set(tokens.cls) & {"unknown"}, "logits give every token its class"
    assert len(found.rollouts) == 12 * 256
    assert wapo(["diagnose", str(tmp_path / "run")]) == 0


class Setting:
    """A batch of B = 6 rollouts of up to T = 5 tokens over V = 11, with a gap in the mask."""

    def __init__(self, temperature: float = 1.0) -> None:
        torch.manual_seed(1)
        self.logits = (2 * torch.randn(6, 5, 11, dtype=torch.float64)).requires_grad_()
        self.tokens = torch.randint(11, (6, 5))
        self.mask = torch.ones(6, 5)
        self.mask[0, 3:] = 0
        self.mask[2, 0] = 0
        self.advantages = torch.tensor([1.0, -1.0, 0.5, -0.5, 0.0, 0.0], dtype=torch.float64)
        self.groups = torch.tensor([0, 0, 1, 1, 2, 2])
        full = (self.logits / temperature).log_softmax(-1)
        self.logp = full.gather(-1, self.tokens[..., None])[..., 0]
        self.logp_old = self.logp.detach() + 0.4 * torch.randn(6, 5, dtype=torch.float64)

    def loss(self, logp: Tensor) -> Tensor:
        ratio, weight = (logp - self.logp_old).exp(), self.advantages[:, None]
        gain = torch.minimum(ratio * weight, ratio.clamp(0.8, 1.2) * weight)
        return -(gain * self.mask).sum() / self.mask.sum()

    def watch(self, recorder: Recorder, **given: Any) -> None:
        recorder.watch(self.logp, self.tokens, self.mask, self.advantages, self.groups, **given)


def record(path: Path, setting: Setting, temperature: float = 1.0, **given: Any) -> Any:
    with Recorder(path, temperature=temperature) as recorder:
        setting.watch(recorder, logits=setting.logits, logp_old=setting.logp_old, **given)
        setting.loss(setting.logp).backward()
        recorder.finish_step(1, reward=[1.0, 0.0, 1.0, 0.0, 1.0, 1.0])
        assert recorder.failure is None
    return open_run(path)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_coef_and_statistics_equal_autograd_and_a_full_softmax(
    tmp_path: Path, temperature: float
) -> None:
    setting = Setting(temperature)
    tokens = record(tmp_path / "r", setting, temperature).tokens()
    leaf = setting.logp.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(setting.loss(leaf), leaf)
    chosen = setting.mask.bool()
    p = (setting.logits.detach() / temperature).softmax(-1)[chosen]
    y = torch.nn.functional.one_hot(setting.tokens[chosen], 11)
    expected = {
        "coef": -gradient[chosen],
        "logp": setting.logp.detach()[chosen],
        "logp_old": setting.logp_old[chosen],
        "entropy": -(p * p.log()).sum(-1),
        "collision_rest": (p**2 * (1 - y)).sum(-1),
        "collision_logp_rest": (p**2 * p.log() * (1 - y)).sum(-1),
    }
    for name, value in expected.items():  # stored with 15 mantissa bits
        np.testing.assert_allclose(tokens[name], value, rtol=4e-5, atol=1e-7, err_msg=name)
    assert tokens.rollout.tolist() == chosen.nonzero()[:, 0].tolist()
    assert tokens[tokens.rollout == 2].position.tolist() == [0, 1, 2, 3], "the gap is no token"


def test_the_clip_flag_is_the_clip_with_bounds_and_without(tmp_path: Path) -> None:
    setting = Setting()
    chosen = setting.mask.bool()
    ratio = (setting.logp - setting.logp_old).detach().exp()[chosen]
    advantage = setting.advantages[:, None].expand(6, 5)[chosen]
    clip = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
    assert 3 < int(clip.sum()) < len(clip)
    for name, given in (("bounds", {"clip": (0.8, 1.2)}), ("none", {})):
        tokens = record(tmp_path / name, Setting(), **given).tokens()
        assert tokens.clipped.tolist() == clip.tolist()
        assert tokens.kept.all()
    row = open_run(tmp_path / "none").steps.iloc[0]
    assert row.clip_high == pytest.approx(float((clip & (advantage > 0)).float().mean()))


def test_tokens_left_out_of_the_loss_are_not_kept(tmp_path: Path) -> None:
    setting = Setting()
    setting.logp_old = setting.logp.detach()
    positive = (setting.advantages > 0)[:, None]
    setting.mask = setting.mask.clone()
    setting.loss = lambda logp: -(logp * positive * setting.mask).sum()  # type: ignore[method-assign]
    tokens = record(tmp_path / "r", setting).tokens()
    assert not tokens.clipped.any()
    assert tokens.kept.tolist() == (tokens.advantage >= 0).tolist()


def test_step_columns_are_plain_means_over_the_tokens(tmp_path: Path) -> None:
    run = record(tmp_path / "r", Setting())
    row, tokens = run.steps.iloc[0], run.tokens()
    assert row.reward == pytest.approx(4 / 6)
    assert (row.groups_all_wrong, row.groups_all_right) == (0.0, pytest.approx(1 / 3))
    assert row.entropy == pytest.approx(tokens.entropy.mean(), rel=1e-4)
    assert row.entropy_pos == pytest.approx(tokens[tokens.advantage > 0].entropy.mean(), rel=1e-4)
    log_ratio = tokens.logp - tokens.logp_old
    assert row.kl_old == pytest.approx(np.mean(np.expm1(log_ratio) - log_ratio), rel=1e-3)
    assert row.tokens == len(tokens) == 27
    assert run.rollouts.length.tolist() == [3, 5, 4, 5, 5, 5]
    assert run.rollouts.advantage.tolist() == [1.0, -1.0, 0.5, -0.5, 0.0, 0.0]


def test_micro_batches_and_a_loss_scale_give_the_same_tokens(tmp_path: Path) -> None:
    whole = record(tmp_path / "whole", Setting()).tokens()
    setting = Setting()
    with Recorder(tmp_path / "split") as recorder:
        for part in (slice(0, 4), slice(4, 6)):
            recorder.watch(
                logp := setting.logp[part],
                setting.tokens[part],
                setting.mask[part],
                setting.advantages[part],
                setting.groups[part],
                logits=setting.logits[part],
                logp_old=setting.logp_old[part],
                minibatch=0,
                loss_scale=1024.0,
            )
            piece = Setting()
            piece.logp_old, piece.advantages = setting.logp_old[part], setting.advantages[part]
            piece.mask = setting.mask[part]
            share = piece.mask.sum() / setting.mask.sum()
            (1024 * piece.loss(logp) * share).backward(retain_graph=True)
        recorder.finish_step(1, reward=torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 1.0]))
    split = open_run(tmp_path / "split").tokens()
    columns = ["group", "rollout", "position", "token_id", "coef", "logp", "entropy", "minibatch"]
    np.testing.assert_allclose(split[columns], whole[columns], rtol=4e-5, atol=1e-9)


def test_without_logits_classes_are_unknown_and_never_zero(tmp_path: Path) -> None:
    setting = Setting()
    with Recorder(tmp_path / "r") as recorder:
        setting.watch(recorder)
        setting.loss(setting.logp).backward()
        recorder.finish_step(1, reward=0.5, grad_norm=torch.tensor(2.0))
    run = open_run(tmp_path / "r")
    tokens = run.tokens()
    assert tokens[["entropy", "collision_rest", "logp_old"]].isna().all(axis=None)
    assert set(tokens[tokens.advantage != 0].cls) == {"unknown"}
    assert tokens.coef.notna().all()
    row = run.steps.iloc[0]
    assert (row.reward, row.grad_norm) == (0.5, 2.0)
    assert np.isnan(row.entropy)
    assert run.rollouts.empty


def test_known_entropy_and_collision_replace_logits(tmp_path: Path) -> None:
    setting = Setting()
    p = setting.logits.detach().softmax(-1)
    with Recorder(tmp_path / "r") as recorder:
        setting.watch(recorder, entropy=-(p * p.log()).sum(-1), collision=(p**2).sum(-1))
        setting.loss(setting.logp).backward()
        recorder.finish_step(1)
    given = open_run(tmp_path / "r").tokens()
    exact = record(tmp_path / "exact", Setting()).tokens()
    assert given.cls.tolist() == exact.cls.tolist()
    np.testing.assert_allclose(given.entropy, exact.entropy, rtol=4e-5)
    assert given.collision_logp_rest.isna().all()


# ---- packed batches -----------------------------------------------------------------------------

LENGTHS = (3, 5, 5, 5, 5, 5)
BOUNDS = torch.tensor([0, 3, 8, 13, 18, 23, 28], dtype=torch.int32)


class Packed(Setting):
    """The same batch as one row of M = 28 positions, without padding, in any order of rollouts."""

    def __init__(self, order: Tensor | None = None) -> None:
        super().__init__()
        real = torch.arange(5) < torch.tensor(LENGTHS)[:, None]
        order = torch.arange(int(real.sum())) if order is None else order
        rows = torch.arange(6)[:, None].expand(6, 5)[real][order]
        self.row = rows
        for name in ("logits", "tokens", "mask", "logp_old", "logp"):
            setattr(self, name, getattr(self, name)[real][order])
        self.advantages, self.groups = self.advantages[rows], self.groups[rows]

    def loss(self, logp: Tensor) -> Tensor:
        ratio = (logp - self.logp_old).exp()
        gain = torch.minimum(ratio * self.advantages, ratio.clamp(0.8, 1.2) * self.advantages)
        return -(gain * self.mask).sum() / self.mask.sum()


def per_rollout(setting: Packed) -> dict[str, Any]:
    plain = Setting()
    setting.groups, setting.row = plain.groups, torch.arange(6)
    return {"cu_seqlens": BOUNDS}


PACKINGS: dict[str, tuple[Any, Any]] = {
    "cu_seqlens": (lambda: Packed(), lambda s: {"cu_seqlens": BOUNDS}),
    "cu_seqlens, groups per rollout": (lambda: Packed(), per_rollout),
    "rollout per token": (lambda: Packed(), lambda s: {"rollouts": s.row}),
    "mixed": (
        lambda: Packed(torch.randperm(28, generator=torch.Generator().manual_seed(2))),
        lambda s: {"rollouts": s.row},
    ),
}


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_packed_batch_is_recorded_as_the_padded_one(packing: str, tmp_path: Path) -> None:
    padded = record(tmp_path / "padded", Setting())
    make, given = PACKINGS[packing]
    setting = make()
    packed = record(tmp_path / "packed", setting, **given(setting))
    (gradient,) = torch.autograd.grad(
        setting.loss(leaf := setting.logp.detach().requires_grad_()), leaf
    )
    rows = packed.tokens()
    np.testing.assert_allclose(rows.coef, -gradient[setting.mask.bool()], rtol=4e-5, atol=1e-7)
    columns = [c for c in rows if c != "cls"]
    if packing == "mixed":  # within a rollout, positions are counted in the order given
        columns.remove("position")
        key = ["rollout", "token_id", "logp"]
        rows, wanted = (f.sort_values(key, ignore_index=True) for f in (rows, padded.tokens()))
    else:
        wanted = padded.tokens()
    pd.testing.assert_frame_equal(rows[columns], wanted[columns], rtol=4e-5)
    assert rows.cls.tolist() == wanted.cls.tolist()
    pd.testing.assert_frame_equal(packed.rollouts, padded.rollouts)
    pd.testing.assert_frame_equal(packed.classes, padded.classes, rtol=4e-5)


PACKED_MISTAKES: dict[str, tuple[Any, str]] = {
    "nothing": (lambda s: {}, "packed logp, shape (28,), needs cu_seqlens or rollouts"),
    "rollouts per rollout": (
        lambda s: {"rollouts": torch.arange(6)},
        "packed logp, shape (28,), needs cu_seqlens or rollouts",
    ),
    "lengths": (
        lambda s: {"cu_seqlens": torch.tensor(LENGTHS)},
        "cu_seqlens must rise from 0 to the 28 positions of logp, one more entry than rollouts, "
        "got [3, 5, 5, 5, ...]",
    ),
    "falling": (lambda s: {"cu_seqlens": torch.tensor([0, 9, 8, 28])}, "cu_seqlens must rise"),
    "two groups": (
        lambda s: {"cu_seqlens": torch.tensor([0, 8, 13, 28])},
        "groups must be the same at all positions of a rollout",
    ),
    "padded logits": (
        lambda s: {"cu_seqlens": BOUNDS, "logits": Setting().logits},
        "logits must be (28,) x V, got (6, 5, 11)",
    ),
    "old of another length": (
        lambda s: {"cu_seqlens": BOUNDS, "logp_old": s.logp_old[:-1]},
        "logp_old must have the shape of logp, (28,), got (27,)",
    ),
}


@pytest.mark.parametrize("mistake", PACKED_MISTAKES)
def test_a_packed_batch_of_another_shape_is_told_in_one_line(
    mistake: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given, message = PACKED_MISTAKES[mistake]
    setting = Packed()
    with Recorder(tmp_path / "r") as recorder, caplog.at_level(logging.WARNING):
        setting.watch(recorder, **given(setting))
        setting.loss(setting.logp).backward()
    assert [message in line for line in caplog.messages] == [True]


def shifted(setting: Setting) -> dict[str, Any]:
    return {"logits": setting.logits.detach().roll(1, dims=1)}


MISTAKES: dict[str, tuple[Any, str]] = {
    "shifted logits": (shifted, "logits and logp disagree by"),
    "scaled logits": (lambda s: {"logits": s.logits.detach() / 0.3}, "before the division"),
    "flat logits": (lambda s: {"logits": s.logits[0]}, "logits must be (6, 5) x V"),
    "short old": (
        lambda s: {"logp_old": s.logp_old[:, :4]},
        "logp_old must have the shape of logp, (6, 5), got (6, 4)",
    ),
    "rollouts per token": (lambda s: {"rollouts": s.tokens}, "rollouts must have shape (6,)"),
    "no scale": (lambda s: {"loss_scale": 0.0}, "loss_scale must be positive"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_tensor_stops_recording_with_one_line_and_not_the_training(
    mistake: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given, message = MISTAKES[mistake]
    setting = Setting()
    with Recorder(tmp_path / "r") as recorder, caplog.at_level(logging.WARNING):
        setting.watch(recorder, **given(setting))
        setting.watch(recorder, **given(setting))
        setting.loss(setting.logp).backward()
        recorder.finish_step(1, reward=0.0)
    assert setting.logits.grad is not None
    assert len(caplog.records) == 1
    assert message in caplog.text
    assert open_run(tmp_path / "r").manifest["status"] == "recording_failed"


def test_wrong_reward_count_and_unknown_columns_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name, given, message in (
        ("reward", {"reward": [1.0]}, "reward has 1 values, but 6 rollouts"),
        ("column", {"rewrd": 1.0}, "unknown step column 'rewrd'"),
    ):
        with Recorder(tmp_path / name) as recorder:
            Setting().watch(recorder)
            recorder.finish_step(1, **given)
        assert message in caplog.text


def test_a_logp_the_loss_does_not_use_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Recorder(tmp_path / "r") as recorder:
        for step in (1, 2):
            setting = Setting()
            setting.watch(recorder)
            setting.loss(setting.logp * 1.0 if step > 2 else setting.logits[..., 0]).backward()
            recorder.finish_step(step)
    assert caplog.text.count("no gradient reached the logp") == 1
    assert open_run(tmp_path / "r").tokens().coef.isna().all()


def test_the_end_of_the_block_is_the_status(tmp_path: Path) -> None:
    for error, status in ((KeyboardInterrupt, "interrupted"), (ZeroDivisionError, "failed")):
        path = tmp_path / status
        with pytest.raises(error), Recorder(path):
            raise error
        assert open_run(path).manifest["status"] == status


def test_a_folder_that_holds_a_run_or_is_read_only_is_refused(tmp_path: Path) -> None:
    Recorder(tmp_path / "r").close()
    with pytest.raises(UserError, match="already holds a run"):
        Recorder(tmp_path / "r")
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(UserError, match="cannot write run folder"):
        Recorder(blocked / "run")
