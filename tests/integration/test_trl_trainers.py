"""Every trainer of TRL: recorded right under its own name and rule, or refused in one line."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", minversion="1.0", reason="needs the extra [trl]")

from trl import GRPOTrainer, RLOOConfig, RLOOTrainer

from tests.support.trl_toy import WatchedLoss, WatchesLoss, mask_of, run, toy_trainer
from tests.support.trl_watched import expected_coef, recorded, watched_run
from wapo_analysis import UserError, attach, open_run, use_wapo

# TRL, transformers and peft warn about each other's future versions; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


class WatchedRLOO(WatchesLoss, RLOOTrainer):
    """An RLOOTrainer that keeps what its loss was given."""


def gmpo() -> tuple[Any, Any]:
    module = pytest.importorskip("trl.experimental.gmpo", reason="a later TRL has it")
    kind = type("WatchedGMPO", (WatchesLoss, module.GMPOTrainer), {})
    return kind, module.GMPOConfig


# Losses of their own, with their own rule --------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_rloo_is_clipped_by_the_ratio_of_the_whole_completion(
    tmp_path: Path, beta: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    if beta:
        from tests.support.trl_toy import toy_model

        monkeypatch.setattr(
            "trl.trainer.rloo_trainer.create_model_from_path", lambda *a, **k: toy_model()
        )
    trainer, steps = watched_run(
        tmp_path, WatchedRLOO, config=RLOOConfig, num_iterations=2, max_steps=6, epsilon=0.02,
        beta=beta, steps_per_generation=4,
    )  # fmt: skip
    coef, expected = recorded(steps, "coef"), expected_coef(trainer)
    np.testing.assert_allclose(coef, expected, atol=1e-6, rtol=0)
    inputs = [i for _, i, _ in trainer.calls]
    scored = [logps for _, _, (logps, *_) in trainer.calls]
    clipped, ratio = [], []
    for given, logps in zip(inputs, scored, strict=True):
        mask = given["completion_mask"]
        x = ((logps.detach() * mask).sum(1) - given["old_logps"]).exp()
        a = given["advantages"]
        stopped = ((x > 1.02) & (a > 0)) | ((x < 0.98) & (a < 0))
        clipped.append(stopped.unsqueeze(1).expand_as(mask)[mask_of(given)])
        ratio.append(x.unsqueeze(1).expand_as(mask)[mask_of(given)])
    stopped = torch.cat(clipped).numpy()
    assert 0 < stopped.mean() < 1
    np.testing.assert_array_equal(recorded(steps, "clipped"), stopped)
    wanted = recorded(steps, "advantage") != 0
    np.testing.assert_array_equal(stopped[wanted], (coef == 0)[wanted])
    assert recorded(steps, "kept").all()
    # The stored old log-probabilities of a completion add up to the one sum the loss has.
    shift = recorded(steps, "logp").astype(float) - recorded(steps, "logp_old")
    start = 0
    for given, x in zip(inputs, ratio, strict=True):
        mask = mask_of(given)
        own = np.split(shift[start : start + int(mask.sum())], np.cumsum(mask.sum(1))[:-1])
        start += int(mask.sum())
        per_token = np.concatenate([np.full(len(part), np.exp(part.sum())) for part in own])
        np.testing.assert_allclose(per_token, x, rtol=1e-4)
    found = open_run(tmp_path / "run")
    assert found.objective == "rloo"
    assert found.manifest["objective"]["bounds"] == [0.98, 1.02]
    assert found.manifest["trainer"] == "WatchedRLOO"
    shares = found.steps[["clip_low", "clip_high"]].sum(axis=1)
    assert shares.max() > 0
    assert (found.steps["tokens"] == found.tokens().groupby("step").size().to_numpy()).all()


def test_gmpo_is_clipped_token_by_token_in_log_space(tmp_path: Path) -> None:
    kind, config = gmpo()
    trainer, steps = watched_run(
        tmp_path, kind, config=config, num_iterations=2, max_steps=6, epsilon=0.05,
        epsilon_high=0.03,
    )  # fmt: skip
    coef = recorded(steps, "coef")
    np.testing.assert_allclose(coef, expected_coef(trainer), atol=1e-6, rtol=0)
    log_ratio = recorded(steps, "logp").astype(float) - recorded(steps, "logp_old")
    advantage, clipped = recorded(steps, "advantage"), recorded(steps, "clipped")
    stopped = ((log_ratio > 0.03) & (advantage > 0)) | ((log_ratio < -0.05) & (advantage < 0))
    assert 0 < stopped.mean() < 1
    clear = np.minimum(abs(log_ratio - 0.03), abs(log_ratio + 0.05)) > 1e-5
    np.testing.assert_array_equal(clipped[clear], stopped[clear])
    np.testing.assert_array_equal(clipped[advantage != 0], (coef == 0)[advantage != 0])
    assert recorded(steps, "kept").all()
    manifest = open_run(tmp_path / "run").manifest
    assert manifest["objective"]["name"] == "gmpo"
    np.testing.assert_allclose(manifest["objective"]["bounds"], np.exp([-0.05, 0.03]), rtol=1e-6)


@pytest.mark.parametrize("which", ["rloo", "gmpo"])
def test_watching_them_changes_no_weight(tmp_path: Path, which: str) -> None:
    kind, config = (RLOOTrainer, RLOOConfig) if which == "rloo" else gmpo()
    settings = {"config": config, "num_iterations": 2, "steps_per_generation": 4}
    expected = run(toy_trainer(tmp_path / "plain", kind, **settings))
    trainer = toy_trainer(tmp_path / "out", kind, **settings)
    with attach(trainer, tmp_path / "run", detail="full") as attachment:
        weights = run(trainer)
    assert attachment.recorder.failure is None
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


# What is refused ---------------------------------------------------------------------------------


def experimental() -> list[tuple[str, str]]:
    """Module and name of every trainer of TRL that has no loss we know."""
    names = {
        "a2po": "A2POTrainer", "async_distillation": "AsyncDistillationTrainer",
        "async_grpo": "AsyncGRPOTrainer", "cpo": "CPOTrainer", "gkd": "GKDTrainer",
        "gold": "GOLDTrainer", "iw_opd": "IWOPDTrainer", "online_dpo": "OnlineDPOTrainer",
        "orpo": "ORPOTrainer", "sdft": "SDFTTrainer", "sdpo": "SDPOTrainer", "tpo": "TPOTrainer",
        "server_distillation": "ServerDistillationTrainer",
    }  # fmt: skip
    found = [(f"trl.experimental.{module}", name) for module, name in names.items()]
    plain = ("DPOTrainer", "SFTTrainer", "KTOTrainer", "RewardTrainer", "DistillationTrainer")
    return found + [("trl", name) for name in plain]


@pytest.mark.parametrize(("module", "name"), experimental(), ids=lambda value: value)
def test_a_trainer_with_another_loss_is_refused_by_name(
    tmp_path: Path, module: str, name: str
) -> None:
    try:
        kind = getattr(__import__(module, fromlist=[name]), name)
    except (ImportError, AttributeError, RuntimeError):
        pytest.skip("not in this TRL, or needs a package that is not here")
    trainer = object.__new__(kind)  # what is refused is its class; it is never asked for more
    with pytest.raises(UserError, match=f"cannot attach to {name}: .* GRPOTrainer") as told:
        attach(trainer, tmp_path / "run")
    assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="cannot attach"):
        use_wapo(trainer)
    assert not (tmp_path / "run").exists()


class Penalised(GRPOTrainer):
    """A loss of its own: TRL's and something more."""

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        loss = super()._compute_loss(model, inputs)
        return loss + 0.0 * sum(p.sum() for p in model.parameters())


class Rewritten(GRPOTrainer):
    """A loss that is none of TRL's, in the other method."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        ids = inputs["completion_ids"]
        return model(input_ids=ids, labels=ids).loss


@pytest.mark.parametrize("kind", [Penalised, Rewritten, "rloo", "gmpo"])
def test_wapo_replaces_no_loss_but_that_of_grpo(tmp_path: Path, kind: Any) -> None:
    config = {}
    if isinstance(kind, str):
        kind, config["config"] = (RLOOTrainer, RLOOConfig) if kind == "rloo" else gmpo()
    trainer = toy_trainer(tmp_path / "out", kind, **config)
    with pytest.raises(UserError, match=r"loss of trl's GRPOTrainer; \w+ has one of its own"):
        use_wapo(trainer)
    assert "_wapo_objective" not in vars(trainer)


# Losses that are looked at from outside -----------------------------------------------------------


def test_a_loss_with_a_forward_of_its_own_is_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = toy_trainer(tmp_path / "out", Rewritten)
    with caplog.at_level(logging.WARNING), attach(trainer, tmp_path / "run") as attachment:
        run(trainer)
    assert attachment.recorder.failure is None
    told = [r.getMessage() for r in caplog.records if "tokens are not" in r.getMessage()]
    assert told == [told[0]]
    assert told[0].startswith("the loss of Rewritten keeps per-token log-probabilities to itself")
    found = open_run(tmp_path / "run")
    assert found.manifest["tokens_hidden_by"] == "the loss of Rewritten"
    assert len(found.steps) == 2


class ScoresTwice(WatchedLoss):
    """Takes the mean of its loss over two scorings of the same tokens."""

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        first = GRPOTrainer._compute_loss(self, model, inputs)
        return (first + super()._compute_loss(model, inputs)) / 2


def test_a_loss_that_scores_twice_counts_its_tokens_once(tmp_path: Path) -> None:
    trainer, steps = watched_run(tmp_path, ScoresTwice, num_iterations=2, max_steps=4)
    tokens = sum(int(mask_of(inputs).sum()) for _, inputs, _ in trainer.calls)
    assert len(recorded(steps, "coef")) == tokens
    np.testing.assert_allclose(recorded(steps, "coef"), expected_coef(trainer), atol=1e-6, rtol=0)
    run_steps = open_run(tmp_path / "run").steps
    assert run_steps["tokens"].sum() == tokens


def test_a_token_under_the_entropy_mask_is_not_kept_though_the_clip_stops_it_too(
    tmp_path: Path,
) -> None:
    trainer, steps = watched_run(
        tmp_path, top_entropy_quantile=0.5, num_iterations=2, max_steps=6, epsilon=0.01
    )
    coef, kept = recorded(steps, "coef"), recorded(steps, "kept")
    masks = []
    for _, inputs, (_, entropies, *_) in trainer.calls:
        mask = mask_of(inputs)
        masks.append(trainer.get_high_entropy_mask(entropies, mask.float(), 0.5)[mask])
    inside = torch.cat(masks).numpy().astype(bool)
    np.testing.assert_array_equal(kept, inside)
    ratio, advantage = recorded(steps, "ratio"), recorded(steps, "advantage")
    beyond = ((ratio > 1.01) & (advantage > 0)) | ((ratio < 0.99) & (advantage < 0))
    assert (beyond & ~inside).any()
    assert (beyond & inside).any()
    assert (coef[~inside] == 0).all()
    # Shares are of what is in the loss.
    found = open_run(tmp_path / "run").steps
    both = np.array([(t["clipped"] & t["kept"]).sum() / t["kept"].sum() for t in steps])
    np.testing.assert_allclose(found["clip_low"] + found["clip_high"], both)


class Tools(WatchedLoss):
    """Every completion holds three tokens that a tool wrote."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        tool_mask = torch.ones_like(batch["completion_mask"])
        tool_mask[:, 2:5] = 0
        batch["tool_mask"] = tool_mask
        return batch


def test_tokens_of_a_tool_have_no_row_and_no_part_in_length_and_tokens(tmp_path: Path) -> None:
    trainer, steps = watched_run(tmp_path, Tools)
    np.testing.assert_allclose(recorded(steps, "coef"), expected_coef(trainer), atol=1e-6, rtol=0)
    assert not set(recorded(steps, "position")) & {2, 3, 4}
    found = open_run(tmp_path / "run")
    rows = found.tokens().groupby("step").size()
    assert found.steps["tokens"].tolist() == rows.tolist()
    assert found.classes.groupby("step").tokens.sum().tolist() == rows.tolist()
    lengths = found.rollouts.groupby("step").length
    np.testing.assert_allclose(found.steps["length"], lengths.mean())
    assert lengths.sum().tolist() == rows.tolist()
    assert found.rollouts["completion"].str.len().mean() > found.rollouts["length"].mean()


class RolloutFunction(WatchedLoss):
    """A rollout function that reports the log-probabilities of its own sampler; no vLLM."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        shape = batch["completion_ids"].shape
        slope = torch.linspace(-0.3, -0.1, shape.numel()).view(shape)
        batch["sampling_per_token_logps"] = slope
        return batch


def test_what_a_sampler_reports_stands_beside_what_the_loss_uses(tmp_path: Path) -> None:
    trainer, steps = watched_run(
        tmp_path, RolloutFunction, num_iterations=2, max_steps=4, epsilon=0.01
    )
    np.testing.assert_allclose(recorded(steps, "coef"), expected_coef(trainer), atol=1e-6, rtol=0)
    given = [inputs for _, inputs, _ in trainer.calls]
    sampler = torch.cat([i["sampling_per_token_logps"][mask_of(i)] for i in given]).numpy()
    np.testing.assert_allclose(recorded(steps, "logp_old"), sampler, atol=1e-5)
    used = [
        logps.detach() if i.get("old_per_token_logps") is None else i["old_per_token_logps"]
        for _, i, (logps, *_) in trainer.calls
    ]
    used = torch.cat([u[mask_of(i)] for u, i in zip(used, given, strict=True)]).numpy()
    np.testing.assert_allclose(recorded(steps, "logp_prox"), used, atol=1e-5)
    scored = torch.cat([s[0].detach()[mask_of(i)] for _, i, s in trainer.calls]).numpy()
    np.testing.assert_allclose(recorded(steps, "ratio"), np.exp(scored - used), rtol=1e-5)
    clipped, advantage = recorded(steps, "clipped"), recorded(steps, "advantage")
    assert clipped.any()
    np.testing.assert_array_equal(
        clipped[advantage != 0], (recorded(steps, "coef") == 0)[advantage != 0]
    )
    row = open_run(tmp_path / "run").steps.iloc[0]
    first = slice(0, len(steps[0]))
    assert row["engine_logp_diff"] == pytest.approx(np.abs(used - sampler)[first].mean(), rel=1e-4)
