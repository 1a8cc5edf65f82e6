"""Attached to a real trl GRPOTrainer: coefficients and statistics are exact, or missing."""

import copy
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs the extra [trl]")

from tests.support.trl_toy import (
    LOSSES,
    WatchedLoss,
    collect_tokens,
    full_softmax,
    mask_of,
    run,
    toy_model,
    toy_trainer,
)
from tests.support.trl_watched import expected_coef, recorded, watched_run
from wapo_analysis import attach, open_run

# TRL, transformers and peft warn about each other's future versions; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

# The gradient coefficient ---------------------------------------------------------------------


@pytest.mark.parametrize("loss", LOSSES)
def test_coef_is_the_autograd_gradient(tmp_path: Path, loss: str) -> None:
    level = "sequence" if loss == "luspo" else "token"
    high = 2.0 if loss == "cispo" else 0.03  # there it is the largest weight itself
    trainer, steps = watched_run(
        tmp_path, loss_type=loss, num_iterations=2, max_steps=4, epsilon=0.02, epsilon_high=high,
        importance_sampling_level=level,
    )  # fmt: skip
    coef, expected = recorded(steps, "coef"), expected_coef(trainer)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(coef, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"top_entropy_quantile": 0.2},
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "num_iterations": 2},
        {"beta": 0.1, "num_iterations": 2},
        {"delta": 1.5, "num_iterations": 2},
        {"mask_truncated_completions": True},
        {"entropy_coef": 0.01},
    ],
    ids=lambda s: "+".join(s),
)
def test_coef_holds_under_every_setting_that_enters_the_loss(
    tmp_path: Path, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    if settings.get("beta"):  # TRL loads the reference by name; here it is the toy itself
        monkeypatch.setattr(
            "trl.trainer.grpo_trainer.create_model_from_path", lambda *a, **k: toy_model()
        )
    trainer, steps = watched_run(tmp_path, max_steps=4, epsilon=0.02, **settings)
    np.testing.assert_allclose(recorded(steps, "coef"), expected_coef(trainer), atol=1e-6, rtol=0)


class FakeVllm(WatchedLoss):
    """Puts in the batch what vLLM would: sampler log-probabilities and importance weights."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        with torch.no_grad():
            old = self._get_per_token_logps_and_entropies(
                self.model, ids, mask, batch["completion_ids"].shape[1]
            )[0]
        noise = torch.linspace(-0.5, 0.5, old.numel()).view_as(old)
        batch["old_per_token_logps"] = old
        batch["sampling_per_token_logps"] = old - noise
        weight = noise.exp() * batch["completion_mask"]
        batch["importance_sampling_ratio"] = weight.masked_fill(weight > 1.4, 0.0)
        return batch

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        self.use_vllm = True
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self.use_vllm = False


def test_vllm_weights_are_in_coef_and_its_logps_are_the_behaviour_policy(tmp_path: Path) -> None:
    trainer, steps = watched_run(tmp_path, FakeVllm)
    np.testing.assert_allclose(recorded(steps, "coef"), expected_coef(trainer), atol=1e-6, rtol=0)
    inputs = [i for _, i, _ in trainer.calls]
    sampler = torch.cat([i["sampling_per_token_logps"][mask_of(i)] for i in inputs])
    np.testing.assert_allclose(recorded(steps, "logp_old"), sampler, atol=1e-5)
    dropped = torch.cat([(i["importance_sampling_ratio"] == 0)[mask_of(i)] for i in inputs]).numpy()
    wanted = recorded(steps, "advantage") != 0
    assert dropped.any()
    np.testing.assert_array_equal(~recorded(steps, "kept")[wanted], dropped[wanted])


def test_clip_and_kept_say_what_the_gradient_shows(tmp_path: Path) -> None:
    _, steps = watched_run(tmp_path, num_iterations=2, max_steps=6, epsilon=0.01)
    coef, clipped = recorded(steps, "coef"), recorded(steps, "clipped")
    wanted = recorded(steps, "advantage") != 0
    assert clipped.any()
    np.testing.assert_array_equal(clipped[wanted], (coef == 0)[wanted])
    assert recorded(steps, "kept").all()


def test_high_entropy_mask_shows_as_not_kept(tmp_path: Path) -> None:
    _, steps = watched_run(tmp_path, top_entropy_quantile=0.2)
    entropy, kept = recorded(steps, "entropy"), recorded(steps, "kept")
    wanted = recorded(steps, "advantage") != 0
    assert 0 < kept[wanted].mean() < 0.5
    assert entropy[kept & wanted].mean() > entropy[~kept & wanted].mean()


class PerTokenAdvantage(WatchedLoss):
    """A subclass with one advantage per token, which TRL's loss allows."""

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        batch = super()._generate_and_score_completions(inputs)
        width = batch["completion_ids"].shape[1]
        slope = torch.linspace(0.5, 1.5, width)
        batch["advantages"] = batch["advantages"].unsqueeze(1) * slope
        return batch


def test_advantages_may_differ_within_a_rollout(tmp_path: Path) -> None:
    trainer, steps = watched_run(tmp_path, PerTokenAdvantage)
    given = torch.cat([i["advantages"][mask_of(i)] for _, i, _ in trainer.calls])
    np.testing.assert_array_equal(recorded(steps, "advantage"), given)
    np.testing.assert_allclose(recorded(steps, "coef"), expected_coef(trainer), atol=1e-6, rtol=0)


# The statistics -------------------------------------------------------------------------------


class FromLogits(WatchedLoss):
    """Scores as TRL before 1.15 did: logits, some rows at a time, divided in place; as a dict."""

    def _get_per_token_logps_and_entropies(
        self, model: Any, input_ids: Any, attention_mask: Any, logits_to_keep: int, **_: Any
    ) -> Any:
        if self._leaf is not None:
            return {"logps": self._leaf[0], "entropies": self._leaf[1]}
        parts = []
        for ids, mask in zip(input_ids.split(3), attention_mask.split(3), strict=True):
            logits = model(input_ids=ids, attention_mask=mask).logits[:, -logits_to_keep - 1 : -1]
            with torch.no_grad():
                logits.div_(self.temperature)
            logps = torch.log_softmax(logits, -1)
            own = logps.gather(-1, ids[:, -logits_to_keep:].unsqueeze(-1)).squeeze(-1)
            parts.append((own, -(logps.exp() * logps).sum(-1).detach()))
        self._scored = tuple(torch.cat(part) for part in zip(*parts, strict=True))
        return dict(zip(("logps", "entropies"), self._scored, strict=True))

    def _compute_loss(self, model: Any, inputs: Any) -> Any:
        scorer = self._get_per_token_logps_and_entropies

        def as_tuple(*args: Any, **kwargs: Any) -> Any:
            scored = scorer(*args, **kwargs)
            return scored["logps"], scored["entropies"], None

        self._get_per_token_logps_and_entropies = as_tuple
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._get_per_token_logps_and_entropies = scorer


SOURCES = {
    "hidden states and head": (WatchedLoss, {}),
    "fused head": (WatchedLoss, {"exact_every": 0}),
    "logits": (FromLogits, {}),
}


@pytest.mark.parametrize("source", SOURCES)
def test_statistics_are_those_of_a_full_softmax(tmp_path: Path, source: str) -> None:
    kind, knobs = SOURCES[source]
    model = toy_model()
    before = copy.deepcopy(model)
    trainer, steps = watched_run(tmp_path, kind, model=model, max_steps=1, **knobs)
    whole = [full_softmax(before, inputs) for _, inputs, _ in trainer.calls]
    assert open_run(tmp_path / "run").manifest["statistics_from"] == source
    for name in ("logp", "entropy", "collision_rest", "collision_logp_rest"):
        values = recorded(steps, name)
        expected = torch.cat([stats[name] for stats in whole]).numpy()
        if source == "fused head" and name == "collision_logp_rest":
            assert np.isnan(values).all()
        else:
            np.testing.assert_allclose(values, expected, atol=1e-5, rtol=0)


def test_near_certain_tokens_keep_their_digits_where_the_head_is_read(tmp_path: Path) -> None:
    model = toy_model(sharpness=120.0)
    before = copy.deepcopy(model).double()
    trainer, steps = watched_run(tmp_path, model=model, max_steps=1)
    rest = torch.cat([full_softmax(before, i)["collision_rest"] for _, i, _ in trainer.calls])
    logp = torch.cat([full_softmax(before, i)["logp"] for _, i, _ in trainer.calls])
    near = (-torch.expm1(logp) < 1e-3).numpy()
    assert near.sum() >= 3
    np.testing.assert_allclose(
        recorded(steps, "collision_rest")[near], rest.numpy()[near], rtol=5e-3
    )
    np.testing.assert_allclose(
        recorded(steps, "complement")[near], -np.expm1(logp.numpy()[near]), rtol=5e-3
    )


def test_fused_sum_of_squares_stays_within_what_p_allows(tmp_path: Path) -> None:
    _, steps = watched_run(tmp_path, model=toy_model(sharpness=120.0), exact_every=0)
    rest, complement = recorded(steps, "collision_rest"), recorded(steps, "complement")
    assert (rest <= complement**2 * (1 + 1e-6)).all()
    assert (rest >= 0).all()
    assert set(np.unique(recorded(steps, "regime"))) <= {0, 1}


def test_statistics_that_do_not_match_the_trainer_are_missing_not_wrong(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = toy_model()
    trainer = toy_trainer(tmp_path / "out", model=model)
    # A head transform nobody declares: the recomputed log-probabilities must be noticed as wrong.
    with attach(trainer, tmp_path / "run", token_every=1) as attachment:
        steps = collect_tokens(attachment.recorder)
        model.config.logit_scale = 3.0
        with caplog.at_level(logging.WARNING):
            run(trainer)
    assert sum("differ from the trainer's" in r.message for r in caplog.records) == 1
    assert np.isnan(recorded(steps, "collision_logp_rest")).all()
    known = np.isfinite(recorded(steps, "collision_rest"))
    first = (recorded(steps, "step") == 1) & (recorded(steps, "minibatch") == 0)
    np.testing.assert_array_equal(known, ~first)  # from the second pass on the fused head is asked
    assert attachment.recorder.failure is None


def test_recorded_coef_and_statistics_give_the_real_gradient_of_the_head(tmp_path: Path) -> None:
    """sum of coef (e_y - p) h / T over the recorded tokens is minus the head's gradient."""
    model = toy_model()
    before, grads = copy.deepcopy(model), []
    trainer = toy_trainer(tmp_path / "out", WatchedLoss, model=model, max_steps=1)
    trainer.optimizer_step_hook = model.lm_head.weight.register_hook(lambda g: grads.append(g))
    with attach(trainer, tmp_path / "run", token_every=1) as attachment:
        steps = collect_tokens(attachment.recorder)
        run(trainer)
    coef, start, total = torch.tensor(recorded(steps, "coef")), 0, 0.0
    for _, inputs, _ in trainer.calls:
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        width, mask = inputs["completion_ids"].shape[1], mask_of(inputs)
        with torch.no_grad():
            hidden = before.model(input_ids=ids, attention_mask=attention).last_hidden_state
            hidden = hidden[:, -width - 1 : -1][mask]
            p = torch.softmax(before.lm_head(hidden) / trainer.temperature, -1)
        y = torch.nn.functional.one_hot(inputs["completion_ids"][mask], p.shape[1])
        part = coef[start : start + len(p)]
        total = total - ((y - p) * part.unsqueeze(1) / trainer.temperature).T @ hidden
        start += len(p)
    assert start == len(coef)
    torch.testing.assert_close(sum(grads), total, atol=1e-6, rtol=1e-4)


def test_rescoring_sees_the_weights_after_the_update(tmp_path: Path) -> None:
    trainer, steps = watched_run(tmp_path, rescore_every=1)
    last = [i for step, i, _ in trainer.calls if step == trainer.state.global_step]
    after = torch.cat([full_softmax(trainer.model, i)["logp"] for i in last])
    np.testing.assert_allclose(steps[-1]["logp_after"], after, atol=1e-5)
    assert np.abs(steps[-1]["logp_after"] - steps[-1]["logp"]).max() > 1e-3
