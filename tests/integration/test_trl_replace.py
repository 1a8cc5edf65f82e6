"""Replace mode on a real trl GRPOTrainer: our head makes the loss, TRL's gradient comes out."""

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", minversion="1.15", reason="needs the extra [trl] with a fused head")

from peft import LoraConfig
from trl.trainer import utils

from tests.support.trl_toy import (
    WatchedLoss,
    collect_tokens,
    full_softmax,
    mask_of,
    run,
    toy_model,
    toy_trainer,
)
from tests.support.trl_watched import recorded
from wapo_analysis import UserError, attach, open_run, use_wapo
from wapo_analysis.capture.trl import replace as trl_replace
from wapo_analysis.stats import head

# TRL, transformers and peft warn about each other's future versions; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

THEIRS = utils._ChunkedLogProbFunction


@pytest.fixture(autouse=True)
def trl_keeps_its_own_head() -> Any:
    yield
    assert utils._ChunkedLogProbFunction is THEIRS


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Tokens of every call of our head by the trainer's loss."""
    seen: list[int] = []
    real = trl_replace.fused_head_stats

    def counted(*args: Any, **kwargs: Any) -> Any:
        stats = real(*args, **kwargs)
        seen.append(len(stats.logp))
        return stats

    monkeypatch.setattr(trl_replace, "fused_head_stats", counted)
    return seen


def failing(monkeypatch: pytest.MonkeyPatch, where: Any, name: str, from_call: int) -> None:
    """Let a function raise from its n-th call on."""
    real, count = getattr(where, name), [0]

    def broken(*args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] >= from_call:
            raise RuntimeError("no more")
        return real(*args, **kwargs)

    monkeypatch.setattr(where, name, broken)


def replaced(tmp_path: Path, **settings: Any) -> tuple[Any, list[Any], dict[str, torch.Tensor]]:
    """A watched run in replace mode: the trainer, its token records, its weights."""
    knobs = {"rescore_every": 0}
    knobs |= {k: settings.pop(k) for k in ("exact_every", "rescore_every") if k in settings}
    trainer = toy_trainer(tmp_path / "out", WatchedLoss, **settings)
    with attach(trainer, tmp_path / "run", mode="replace", token_every=1, **knobs) as attachment:
        steps = collect_tokens(attachment.recorder)
        weights = run(trainer)
    assert attachment.recorder.failure is None
    return trainer, steps, weights


def moved(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Step of all weights of a toy from its first ones."""
    start = toy_model().state_dict()
    return torch.cat([(weights[n] - start[n]).flatten() for n in sorted(start)])


SGD = {"optim": "sgd", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_steps": 1}


@pytest.mark.parametrize(
    "settings",
    [{}, {"loss_type": "dapo", "num_iterations": 2}, {"temperature": 1.3}],
    ids=["default", "dapo", "temperature"],
)
def test_the_gradient_is_trls_own_within_rounding(
    tmp_path: Path, calls: list[int], settings: dict[str, Any]
) -> None:
    theirs = moved(run(toy_trainer(tmp_path / "plain", **SGD, **settings)))
    trainer, _, weights = replaced(tmp_path, **SGD, **settings)
    assert len(calls) == len(trainer.calls) == 2
    ours = moved(weights)
    assert float(theirs.abs().max()) > 1e-3
    assert float((ours - theirs).norm() / theirs.norm()) < 3e-6


def test_only_the_tokens_of_the_loss_go_through_our_head(tmp_path: Path, calls: list[int]) -> None:
    trainer, steps, _ = replaced(tmp_path)
    assert calls == [int(mask_of(inputs).sum()) for _, inputs, _ in trainer.calls]
    assert sum(calls) == len(recorded(steps, "logp"))


def test_statistics_of_every_step_are_exact_without_another_pass(tmp_path: Path) -> None:
    model = toy_model(sharpness=60.0)
    before = copy.deepcopy(model).double()
    trainer, steps, _ = replaced(tmp_path, model=model, max_steps=3, exact_every=0)
    first = [inputs for step, inputs, _ in trainer.calls if step == 1]
    whole = [full_softmax(before, inputs) for inputs in first]
    near = torch.cat([-torch.expm1(stats["logp"]) for stats in whole]).numpy() < 1e-2
    assert near.sum() >= 3
    for name in ("logp", "entropy", "collision_rest", "collision_logp_rest"):
        expected = torch.cat([stats[name] for stats in whole]).numpy()
        np.testing.assert_allclose(steps[0][name], expected, rtol=2e-3, atol=1e-9)
    assert np.isfinite(recorded(steps, "collision_logp_rest")).all()
    manifest = open_run(tmp_path / "run").manifest
    assert manifest["capture"] == {"mode": "replace", "rule": "as set"}
    assert manifest["statistics_from"] == "our head in place of the trainer's"


def test_the_second_scoring_uses_the_same_head(tmp_path: Path, calls: list[int]) -> None:
    trainer, steps, _ = replaced(tmp_path, rescore_every=1, learning_rate=0.0)
    assert len(calls) == 2 * len(trainer.calls)
    for name in (
        "logp",
        "entropy",
    ):  # without a step nothing may have moved, not by rounding either
        np.testing.assert_array_equal(recorded(steps, f"{name}_after"), recorded(steps, name))


@pytest.mark.parametrize("loss", ["grpo", "dapo", "luspo"])
def test_coef_is_the_autograd_gradient(tmp_path: Path, loss: str) -> None:
    level = "sequence" if loss == "luspo" else "token"
    trainer, steps, _ = replaced(
        tmp_path, loss_type=loss, num_iterations=2, max_steps=4, epsilon=0.02,
        importance_sampling_level=level,
    )  # fmt: skip
    expected = torch.cat([grad[mask_of(inputs)] for grad, inputs in trainer.expected()])
    assert float(expected.abs().max()) > 1e-3
    np.testing.assert_allclose(recorded(steps, "coef"), expected, atol=1e-6, rtol=0)


def test_the_reference_policy_keeps_trls_head(
    tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "trl.trainer.grpo_trainer.create_model_from_path", lambda *a, **k: toy_model()
    )
    trainer, steps, _ = replaced(tmp_path, beta=0.1, num_iterations=2, max_steps=4)
    assert len(calls) == len(trainer.calls)
    expected = torch.cat([grad[mask_of(inputs)] for grad, inputs in trainer.expected()])
    np.testing.assert_allclose(recorded(steps, "coef"), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "lora", [pytest.param(False, id="full", marks=pytest.mark.slow), pytest.param(True, id="lora")]
)
def test_weights_do_not_depend_on_whether_anything_is_recorded(tmp_path: Path, lora: bool) -> None:
    """Twenty steps: recording, and with a recorder that has failed before the first."""
    weights = []
    for name in ("recording", "failed"):
        config = LoraConfig(r=4, target_modules=["q_proj"], lora_dropout=0.1) if lora else None
        torch.manual_seed(1)
        trainer = toy_trainer(tmp_path / f"{name}-out", lora=config, max_steps=20, num_iterations=2)
        with attach(
            trainer, tmp_path / name, mode="replace", token_every=1, rescore_every=2
        ) as watching:
            if name == "failed":
                watching.recorder.fail(OSError(28, "No space left on device"))
            weights.append(run(trainer))
        assert (watching.recorder.failure is None) == (name == "recording")
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name
    assert open_run(tmp_path / "recording").steps["step"].tolist() == list(range(1, 21))


@pytest.mark.slow
def test_twenty_steps_stay_near_the_plain_run(tmp_path: Path) -> None:
    plain = moved(run(toy_trainer(tmp_path / "plain", max_steps=20, learning_rate=1e-4)))
    ours = moved(replaced(tmp_path, max_steps=20, learning_rate=1e-4)[2])
    assert float((ours - plain).norm() / plain.norm()) < 1e-2


def test_half_precision_and_a_head_in_float32(tmp_path: Path, calls: list[int]) -> None:
    for name, settings in {"bf16": {"bf16": True}, "cast": {"cast_lm_head_to_fp32": True}}.items():
        folder = tmp_path / name
        plain = moved(run(toy_trainer(folder / "plain", **SGD, **settings)))
        before = len(calls)
        ours = moved(replaced(folder, **SGD, **settings)[2])
        assert len(calls) > before
        near = 0.1 if name == "bf16" else 3e-6  # TRL rounds the gradient of each block to bf16
        assert float((ours - plain).norm() / plain.norm()) < near, name


def test_wapo_takes_its_log_probabilities_from_our_head_too(
    tmp_path: Path, calls: list[int]
) -> None:
    moves = []
    for name in ("passive", "replace"):
        trainer = toy_trainer(tmp_path / f"{name}-out", **SGD)
        use_wapo(trainer)
        with attach(trainer, tmp_path / name, mode=name) as attachment:
            moves.append(moved(run(trainer)))
        assert attachment.recorder.failure is None
        assert bool(calls) == (name == "replace")
    assert float(moves[0].abs().max()) > 1e-4
    assert float((moves[1] - moves[0]).norm() / moves[0].norm()) < 3e-6


# If our head fails --------------------------------------------------------------------------------


def test_a_failure_at_once_leaves_a_plain_trl_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    plain = run(toy_trainer(tmp_path / "plain", max_steps=4))
    failing(monkeypatch, trl_replace, "fused_head_stats", 1)
    with caplog.at_level(logging.WARNING):
        _, steps, weights = replaced(tmp_path, max_steps=4)
    assert all(torch.equal(weights[name], plain[name]) for name in plain)
    assert sum("our head failed" in r.message for r in caplog.records) == 1
    capture = open_run(tmp_path / "run").manifest["capture"]
    assert capture["mode"] == "passive"
    assert "step 1 (RuntimeError: no more)" in capture["rule"]
    assert len(steps) == 4
    assert np.isfinite(recorded(steps, "coef")).all()
    assert np.isfinite(recorded(steps, "collision_logp_rest")[-8:]).all()  # read passively again


@pytest.mark.parametrize(
    ("where", "name"),
    [(trl_replace, "fused_head_stats"), (head, "_gradients")],
    ids=["forward", "backward"],
)
def test_a_failure_in_mid_run_hands_over_to_trls_head(
    tmp_path: Path,
    where: Any,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    settings = {**SGD, "learning_rate": 1e-2, "max_steps": 4}
    plain = moved(run(toy_trainer(tmp_path / "plain", **settings)))
    failing(monkeypatch, where, name, 4)
    with caplog.at_level(logging.WARNING):
        _, steps, weights = replaced(tmp_path, **settings)
    assert sum("our head failed" in r.message for r in caplog.records) == 1
    assert float((moved(weights) - plain).norm() / plain.norm()) < 1e-4
    assert np.isfinite(recorded(steps, "coef")).all()
    assert open_run(tmp_path / "run").manifest["capture"]["mode"] == "passive"


def test_an_error_of_the_model_itself_is_nobodys_failure(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = toy_trainer(tmp_path / "out")

    def broken(*_: Any) -> None:
        if torch.is_grad_enabled():  # not while completions are sampled
            raise ValueError("from the model")

    attachment = attach(trainer, tmp_path / "run", mode="replace")
    trainer.model.model.norm.register_forward_hook(broken)
    with pytest.raises(ValueError, match="from the model"):
        run(trainer)
    attachment.close("failed")
    assert not any("our head failed" in r.message for r in caplog.records)


# What cannot be replaced --------------------------------------------------------------------------


def wrap_head(trainer: Any) -> None:
    inner = trainer.model.forward
    trainer.model.forward = lambda *args, **kwargs: inner(*args, **kwargs)


def use_liger(trainer: Any) -> None:
    trainer.use_liger_kernel, trainer.liger_grpo_loss = True, object()


REFUSED: dict[str, tuple[dict[str, Any], Callable[[Any], object], str]] = {
    "entropy bonus": ({"entropy_coef": 0.01}, lambda t: None, "entropy_coef"),
    "80/20 mask": ({"top_entropy_quantile": 0.2}, lambda t: None, "top_entropy_quantile"),
    "somebody's head": ({}, wrap_head, "fused head of TRL 1.15"),
    "liger": ({}, use_liger, "Liger"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_replaced_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    settings, change, message = REFUSED[case]
    trainer = toy_trainer(tmp_path / "out", **settings)
    change(trainer)
    before = dict(vars(trainer)), vars(trainer.model).get("forward")
    with pytest.raises(UserError, match=message) as caught:
        attach(trainer, tmp_path / "run", mode="replace")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
    assert (dict(vars(trainer)), vars(trainer.model).get("forward")) == before


def test_an_unknown_mode_names_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="passive or replace, got 'auto'"):
        attach(toy_trainer(tmp_path / "out"), tmp_path / "run", mode="auto")


def test_everything_is_put_back(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "out")
    before = vars(trainer.model)["forward"]
    attachment = attach(trainer, tmp_path / "run", mode="replace")
    assert vars(trainer.model)["forward"] is not before
    attachment.close()
    assert vars(trainer.model)["forward"] is before
