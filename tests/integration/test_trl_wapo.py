"""The nine objectives inside TRL equal our own on the same tensors; WAPO the paper's formula."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs the extra [trl]")

from tests.support.trl_toy import (
    WatchedLoss,
    collect_tokens,
    full_softmax,
    mask_of,
    run,
    toy_trainer,
)
from wapo_analysis import UserError, attach, open_run, use_objective, use_wapo
from wapo_analysis.objectives.config import ObjectiveConfig
from wapo_analysis.objectives.loss import keep_tokens, policy_loss
from wapo_analysis.objectives.table import OBJECTIVES
from wapo_analysis.objectives.weights import batch_weights, minibatch_weights

# TRL, transformers and peft warn about each other's future versions; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

GROUP, LENGTH = 4, 8


class Keeps(WatchedLoss):
    """Keeps the generated batches, every pass's tensors and the losses that were returned."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        self.passes: list[tuple[int, dict[str, Any], torch.Tensor]] = []
        super().__init__(*args, **kwargs)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        scored = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if torch.is_grad_enabled():
            self.leaf = scored[0]
        return scored

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Any:
        self.rewards = super()._calculate_rewards(*args, **kwargs)
        return self.rewards

    def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
        batch = super()._generate_and_score_completions(*args, **kwargs)
        return {**batch, "reward": self.rewards.sum(dim=1)}

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self.loss_of_pass = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), float(self.loss_of_pass)]
        return self.loss_of_pass


def wapo_run(
    tmp_path: Path, config: ObjectiveConfig | None = None, **settings: Any
) -> tuple[Any, list[Any]]:
    """Train with an objective, WAPO if none is given; returns the trainer and what passes saw.

    Of every pass: inputs, log-probabilities, loss, and which tokens were peaks.
    """
    trainer = toy_trainer(tmp_path / "out", Keeps, **settings)
    patches = use_wapo(trainer) if config is None else use_objective(trainer, config)
    inner, passes = trainer._compute_loss, []

    def watch(model: Any, inputs: Any) -> Any:
        peak = torch.zeros_like(mask_of(inputs))
        if config is not None and (config.include_bins or config.exclude_bins):
            whole = full_softmax(trainer.model, inputs)
            p = whole["logp"].exp()
            peak[mask_of(inputs)] = p >= p**2 + whole["collision_rest"]
        loss = inner(model, inputs)
        passes.append((dict(inputs), trainer.leaf.detach().clone(), loss.detach().clone(), peak))
        return loss

    trainer._compute_loss = watch
    with attach(trainer, tmp_path / "run", token_every=1) as attachment:
        trainer.tokens = collect_tokens(attachment.recorder)
        run(trainer)
    assert attachment.recorder.failure is None
    patches.close()
    return trainer, passes


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"num_iterations": 2, "max_steps": 4},
        {"steps_per_generation": 4, "max_steps": 4},
        {"gradient_accumulation_steps": 4, "steps_per_generation": 2},
    ],
    ids=["on-policy", "two-epochs", "two-minibatches", "two-batches-per-step"],
)
def test_loss_and_gradient_equal_our_own_objective(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    config = ObjectiveConfig(name="wapo", clip_eps=9.0, max_seq_len=LENGTH)
    check_equal(config, *wapo_run(tmp_path, **settings))


@pytest.mark.parametrize(
    "config",
    [
        *({"name": name, "max_seq_len": LENGTH} for name in OBJECTIVES),
        {"name": "grpo", "include_bins": ("neg_peak",)},
        {"name": "dapo", "exclude_bins": ("pos_valley",)},
        {"name": "gspo", "loss_mean_level": "global", "include_bins": ("peak",)},
        {"name": "dr_grpo", "mask_positive_advantages": True},
    ],
    ids=lambda c: "-".join(str(v) for v in c.values()),
)
def test_every_objective_in_trl_equals_our_own(tmp_path: Path, config: dict[str, Any]) -> None:
    own = ObjectiveConfig(**config)
    settings = {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.05}
    check_equal(own, *wapo_run(tmp_path, own, **settings))
    told = open_run(tmp_path / "run").manifest["objective"]
    assert told["name"] == own.name
    assert tuple(told["include_bins"]) == own.include_bins


def check_equal(config: ObjectiveConfig, trainer: Any, passes: list[Any]) -> None:
    """Losses, gradients and advantages of all passes against the built-in trainer's functions."""
    per_generation = trainer.args.steps_per_generation
    reused = per_generation * trainer.num_iterations
    coefs = []
    for first in range(0, len(passes), reused):
        batch = [inputs for inputs, *_ in passes[first : first + per_generation]]
        rollout = torch.cat([inputs["wapo_rollout"] for inputs in batch])
        advantage = torch.cat([inputs["advantages"] for inputs in batch])
        counts = torch.cat([mask_of(inputs).sum(1) for inputs in batch])
        minibatches = per_generation / trainer.args.gradient_accumulation_steps
        weights = batch_weights(
            config, advantage.numpy(), counts.numpy(), (rollout // GROUP).numpy(), GROUP
        )
        group = (rollout // GROUP).numpy()
        ours = config.advantages(torch.cat([b["reward"] for b in batch]).numpy(), group)
        np.testing.assert_allclose(advantage, ours, rtol=1e-4, atol=1e-6)
        for index, (inputs, logps, loss, peak) in enumerate(passes[first : first + reused]):
            rows = torch.arange(4) + 4 * (index % per_generation)
            leaf = logps.clone().requires_grad_()
            old = inputs.get("old_per_token_logps", logps)
            mask = mask_of(inputs)
            keep = keep_tokens(config, inputs["advantages"], mask, peak)
            scaled = minibatch_weights(config, weights, rows, keep, inputs["wapo_rollout"] // GROUP)
            out = policy_loss(
                config, leaf, old, inputs["advantages"], mask, keep, scaled.sequence_weight
            )
            ours = out.loss * weights.multiplier * minibatches
            assert float(loss) == pytest.approx(float(ours), abs=1e-6)
            if out.loss.requires_grad:
                (grad,) = torch.autograd.grad(ours, leaf)
                coefs.append(-grad[mask])
    recorded = np.concatenate([tokens["coef"] for tokens in trainer.tokens])
    np.testing.assert_allclose(recorded, torch.cat(coefs), atol=1e-6, rtol=0)
    assert np.abs(recorded).max() > 1e-4


def test_coef_is_the_papers_formula(tmp_path: Path) -> None:
    """ratio * A / (Z * G * L) for A > 0 and ratio <= 10, else 0."""
    trainer, _ = wapo_run(tmp_path, num_iterations=2, max_steps=4, learning_rate=0.1)
    for tokens in trainer.tokens:
        positive = tokens["advantage"] > 0
        rollouts = open_run(tmp_path / "run").rollouts
        lines = rollouts[rollouts["step"] == tokens["step"][0]]
        units = lines[lines["advantage"] > 0]["group"].nunique()
        held = tokens["ratio"] <= 10
        expected = np.where(positive & held, tokens["ratio"] * tokens["advantage"], 0.0)
        expected = expected / (max(units, 1) * GROUP * LENGTH)
        np.testing.assert_allclose(tokens["coef"], expected, rtol=1e-4, atol=1e-7)
        assert not tokens["kept"][tokens["advantage"] < 0].any()
        np.testing.assert_array_equal(tokens["clipped"], positive & ~held)


def test_advantages_are_centred_and_not_scaled(tmp_path: Path) -> None:
    wapo_run(tmp_path)
    rollouts = open_run(tmp_path / "run").rollouts
    grouped = rollouts.groupby(["step", "group"])["reward"]
    np.testing.assert_allclose(
        rollouts["advantage"], rollouts["reward"] - grouped.transform("mean"), atol=1e-6
    )


def test_a_flat_group_of_fractional_rewards_is_not_trained_on(tmp_path: Path) -> None:
    """float32 leaves r - mean(r) of three equal rewards above 0; it must not be trained on."""
    flat = torch.full((3,), 0.9 / 37)
    assert (flat - flat.mean()).max() > 0
    trainer = toy_trainer(
        tmp_path / "out", num_generations=3, per_device_train_batch_size=3,
        reward=lambda completions, **_: [0.9 / 37] * len(completions),
    )  # fmt: skip
    use_wapo(trainer)
    before = {name: t.clone() for name, t in trainer.model.state_dict().items()}
    after = run(trainer)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_the_manifest_names_the_objective(tmp_path: Path) -> None:
    wapo_run(tmp_path)
    found = open_run(tmp_path / "run")
    assert found.objective == "wapo"
    assert found.manifest["objective"]["bounds"] == [0.0, 10.0]


def test_close_gives_the_plain_trainer_back(tmp_path: Path) -> None:
    expected = run(toy_trainer(tmp_path / "plain"))
    trainer = toy_trainer(tmp_path / "out")
    scale = trainer.scale_rewards
    use_wapo(trainer).close()
    assert trainer.scale_rewards == scale
    assert "_compute_loss" not in vars(trainer)
    weights = run(trainer)
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_evaluation_runs_under_wapo(tmp_path: Path) -> None:
    from tests.support.trl_toy import toy_dataset

    trainer = toy_trainer(
        tmp_path / "out", eval_dataset=toy_dataset().select(range(4)), eval_strategy="steps",
        eval_steps=1, per_device_eval_batch_size=4,
    )  # fmt: skip
    use_wapo(trainer)
    run(trainer)
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"loss_type": "grpo", "importance_sampling_level": "sequence"}, "importance_sampling"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask"),
        ({"entropy_coef": 0.1}, "entropy_coef"),
    ],
)
def test_settings_wapo_would_drop_are_refused(
    tmp_path: Path, settings: dict[str, Any], named: str
) -> None:
    trainer = toy_trainer(tmp_path / "out", **settings)
    with pytest.raises(UserError, match=named):
        use_wapo(trainer)
    assert "_wapo_objective" not in vars(trainer)


def test_twice_and_wrong_object_are_one_clear_line(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "out")
    use_wapo(trainer)
    with pytest.raises(UserError, match="already"):
        use_wapo(trainer)
    with pytest.raises(UserError, match="GRPOTrainer"):
        use_wapo(object())
    hidden = toy_trainer(tmp_path / "other")
    hidden.use_liger_kernel, hidden.liger_grpo_loss = True, object()
    with pytest.raises(UserError, match="Liger"):
        use_wapo(hidden)
