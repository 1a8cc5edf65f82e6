"""The trainer end to end: watching changes nothing, seeds repeat, resume and coef are exact."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wapo_analysis.objectives.table import OBJECTIVES
from wapo_analysis.record.recorder import Recorder, TokenPass
from wapo_analysis.store import open_run
from wapo_analysis.train import lifecycle
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import Trainer, train
from wapo_analysis.train.models import load_policy, pick_device
from wapo_analysis.train.policy import Policy


def weights(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.module.state_dict().items()}


def assert_same_weights(a: Policy, b: Policy) -> None:
    other = weights(b)
    for name, value in weights(a).items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("objective", ["grpo", "wapo", "gspo"])
def test_watched_and_plain_runs_end_bitwise_equal(
    objective: str, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, objective=objective, epochs=2)
    plain, watched = train(config), train(config, tmp_path / "run")
    assert_same_weights(plain, watched)
    moved = [
        not torch.equal(start, weights(plain)[name])
        for name, start in weights(load_policy("base", plain.device)).items()
    ]
    assert any(moved), "the run must have trained something"


def test_same_seed_twice_gives_the_same_run(tiny_config: TrainConfig, tmp_path: Path) -> None:
    assert_same_weights(
        train(tiny_config, tmp_path / "a"), train(replace(tiny_config), tmp_path / "b")
    )
    a, b = open_run(tmp_path / "a"), open_run(tmp_path / "b")
    timing = [c for c in a.steps if c.startswith("seconds")]
    assert a.steps.drop(columns=timing).equals(b.steps.drop(columns=timing))
    assert a.tokens().equals(b.tokens())
    assert a.rollouts.equals(b.rollouts)


def test_another_seed_gives_another_run(tiny_config: TrainConfig, tmp_path: Path) -> None:
    train(replace(tiny_config, steps=1), tmp_path / "a")
    train(replace(tiny_config, steps=1, seed=1), tmp_path / "b")
    a, b = open_run(tmp_path / "a"), open_run(tmp_path / "b")
    assert a.rollouts.prompt.tolist() != b.rollouts.prompt.tolist()


def test_resume_equals_the_uninterrupted_run(tiny_config: TrainConfig, tmp_path: Path) -> None:
    whole = train(replace(tiny_config, steps=4), tmp_path / "whole")
    train(replace(tiny_config, steps=2), tmp_path / "cut")
    continued = train(replace(tiny_config, steps=4), tmp_path / "cut", resume=True)
    assert_same_weights(whole, continued)
    a, b = open_run(tmp_path / "whole"), open_run(tmp_path / "cut")
    assert a.tokens().equals(b.tokens())
    assert b.steps.step.tolist() == [1, 2, 3, 4]
    assert len(b.manifest["resumed"]) == 1


def test_microbatches_do_not_change_the_update(tiny_config: TrainConfig) -> None:
    for kept in (False, True):
        config = replace(tiny_config, steps=1, normalize_by_kept_tokens=kept, objective="dapo")
        one, split = train(config), train(replace(config, microbatch_size=3))
        for name, value in weights(one).items():
            torch.testing.assert_close(value, weights(split)[name], rtol=1e-4, atol=2e-6)


class Spy(Recorder):
    """Keeps every pass and the gradient that reached its logp."""

    def __init__(self, *given: Any, **options: Any) -> None:
        super().__init__(*(given or (None,)), **options)
        self.seen: list[tuple[TokenPass, torch.Tensor]] = []

    def watch_pass(self, tokens: TokenPass, logp: torch.Tensor, read: Any = None) -> None:  # type: ignore[override]
        logp.retain_grad()
        self.seen.append((tokens, logp))
        super().watch_pass(tokens, logp, read)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_recorded_coef_is_the_gradient_autograd_gave(
    objective: str, tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spies: list[Spy] = []

    def spying(*given: Any, **options: Any) -> Spy:
        spies.append(Spy(*given, **options))
        return spies[-1]

    monkeypatch.setattr(lifecycle, "Recorder", spying)
    train(replace(tiny_config, objective=objective, steps=1, epochs=2), tmp_path / "run")
    rows = open_run(tmp_path / "run").tokens()
    expected = torch.cat([-logp.grad for _, logp in spies[0].seen if logp.grad is not None])
    assert float(expected.abs().max()) > 0
    np.testing.assert_allclose(rows.coef, expected, rtol=2**-14, atol=1e-12)


def test_a_run_holds_every_table(tiny_run: Path) -> None:
    run = open_run(tiny_run)
    assert run.manifest["status"] == "finished"
    assert run.steps.step.tolist() == [1, 2, 3]
    rows = run.tokens()
    assert np.isfinite(
        rows[["entropy", "collision", "logp_after", "dentropy", "pred_dentropy"]]
    ).all(axis=None)
    assert run.classes.tokens.sum() == len(rows) == run.steps.tokens.sum()
    np.testing.assert_allclose(run.classes.grad_mass.sum(), rows.grad_norm.sum(), rtol=1e-4)
    assert len(run.rollouts) == 3 * 16
    assert set(rows.token_id) <= set(run.vocab)
    assert run.rollouts.completion.str.len().gt(0).any()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.3])
def test_sampled_logp_equals_recomputed_logp(temperature: float, tiny_config: TrainConfig) -> None:
    spy = Spy()
    config = replace(tiny_config, temperature=temperature)
    Trainer(load_policy("base", pick_device("cpu")), config).step(1, spy)
    tokens, logp = spy.seen[0]
    torch.testing.assert_close(logp.detach(), tokens.logp_old, rtol=0, atol=1e-5)


def test_token_sampling_keeps_totals_exact(tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny_config, token_fraction=0.5, token_every=2)
    train(config, tmp_path / "run")
    run, rows = open_run(tmp_path / "run"), open_run(tmp_path / "run").tokens()
    assert sorted(rows.step.unique()) == [1, 3]
    assert 0 < len(rows) < run.steps.tokens[run.steps.step != 2].sum()
    assert run.classes.tokens.sum() == run.steps.tokens.sum()


def test_a_failing_recorder_lets_training_go_on(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    from wapo_analysis.store import RunWriter

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(RunWriter, "write_part", full)
    watched = train(tiny_config, tmp_path / "run")
    assert_same_weights(watched, train(tiny_config))
    warnings = [r for r in caplog.records if "recording to" in r.message]
    assert len(warnings) == 1
    assert "No space left" in warnings[0].message


def test_a_gradient_that_is_not_finite_is_skipped_and_recorded(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wapo_analysis.train import loop

    honest = loop.policy_loss

    def poisoned(*args, **kwargs):
        out = honest(*args, **kwargs)
        return replace(out, loss=out.loss * torch.nan)

    monkeypatch.setattr(loop, "policy_loss", poisoned)
    policy = train(tiny_config, tmp_path / "run")
    assert_same_weights(policy, load_policy("base", policy.device))
    steps = open_run(tmp_path / "run").steps
    assert (steps.skipped_updates == steps.updates).all()
    assert steps.loss.isna().all()
