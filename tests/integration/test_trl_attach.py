"""Attaching to a real trl GRPOTrainer: what is recorded is exact, and nothing else changes."""

import contextlib
import copy
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("trl", reason="needs the extra [trl]")

from datasets import Dataset
from peft import LoraConfig
from trl import GRPOTrainer

import wapo_analysis
from tests.trl_toy import (
    LOSSES,
    WatchedLoss,
    collect_tokens,
    full_softmax,
    mask_of,
    run,
    toy_dataset,
    toy_model,
    toy_trainer,
)
from wapo_analysis import UserError, attach, open_run

# TRL, transformers and peft warn about each other's future versions; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")

LORA = {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1}


def watched_run(tmp_path: Path, kind: Any = WatchedLoss, **settings: Any) -> tuple[Any, list[Any]]:
    knobs = {k: settings.pop(k) for k in ("exact_every", "rescore_every") if k in settings}
    trainer = toy_trainer(tmp_path / "out", kind, **settings)
    with attach(trainer, tmp_path / "run", token_every=1, **knobs) as attachment:
        steps = collect_tokens(attachment.recorder)
        run(trainer)
    assert attachment.recorder.failure is None
    return trainer, steps


def recorded(steps: list[Any], name: str) -> np.ndarray:
    return np.concatenate([tokens[name] for tokens in steps])


def expected_coef(trainer: Any) -> np.ndarray:
    return torch.cat([grad[mask_of(i)] for grad, i in trainer.expected()]).numpy()


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


# Watching changes nothing -----------------------------------------------------------------------


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_an_attached_run_is_bitwise_the_plain_run(tmp_path: Path, lora: bool) -> None:
    def build(name: str) -> Any:
        config = LoraConfig(**LORA) if lora else None
        torch.manual_seed(1)
        return toy_trainer(
            tmp_path / name, lora=config, max_steps=5, num_iterations=2, steps_per_generation=4,
            eval_dataset=toy_dataset().select(range(4)), eval_strategy="steps", eval_steps=2,
            per_device_eval_batch_size=4,
        )  # fmt: skip

    plain = build("plain")
    expected = run(plain)
    watched = build("watched")
    with attach(watched, tmp_path / "run", token_every=1, rescore_every=1) as attachment:
        weights = run(watched)
    assert attachment.recorder.failure is None
    assert weights.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(weights[name], tensor), name
    assert _shown(watched) == _shown(plain)
    run_folder = open_run(tmp_path / "run")
    assert run_folder.steps["step"].tolist() == [1, 2, 3, 4, 5]
    assert np.isfinite(run_folder.tokens()[["coef", "collision_logp_rest", "dprob"]]).all(axis=None)


def _shown(trainer: Any) -> list[dict[str, Any]]:
    """Log entries without ours and without clock times."""
    times = ("runtime", "per_second", "step_time")
    return [
        {k: v for k, v in row.items() if not k.startswith("wapo/") and not k.endswith(times)}
        for row in trainer.state.log_history
    ]


def our_hooks(trainer: Any) -> list[Any]:
    """Forward hooks of ours; transformers leaves some of its own."""
    hooks = [h for m in trainer.model.modules() for h in m._forward_hooks.values()]
    return [h for h in hooks if h.__module__.startswith("wapo_analysis")]


def _state(trainer: Any) -> dict[str, Any]:
    """Every attribute an attachment may touch, by identity."""
    objects = {"model": trainer.model, "accelerator": trainer.accelerator}
    names = (
        "_compute_loss", "_generate_and_score_completions", "_calculate_rewards",
        "training_step", "_get_per_token_logps_and_entropies", "scale_rewards",
        "_wapo_attachment", "_wapo_objective",
    )  # fmt: skip
    found = {name: vars(trainer).get(name) for name in names}
    for key, owner in objects.items():
        for name in ("forward", "clip_grad_norm_"):
            found[f"{key}.{name}"] = vars(owner).get(name)
    found["hooks"] = our_hooks(trainer)
    found["callbacks"] = [id(c) for c in trainer.callback_handler.callbacks]
    return found


@pytest.mark.parametrize(
    ("error", "status"),
    [(None, "finished"), (RuntimeError, "failed"), (KeyboardInterrupt, "interrupted")],
)
def test_undo_is_complete_however_training_ends(
    tmp_path: Path, error: type[BaseException] | None, status: str
) -> None:
    calls = []

    def reward(completions: list[str], **_: Any) -> list[float]:
        calls.append(1)
        if error is not None and len(calls) == 2:
            raise error("from the reward function")
        return [float(len(c)) for c in completions]

    trainer = toy_trainer(tmp_path / "out", reward=reward)
    before = _state(trainer)
    with contextlib.ExitStack() as stack:
        if error is not None:
            stack.enter_context(pytest.raises(error))
        stack.enter_context(attach(trainer, tmp_path / "run"))
        assert our_hooks(trainer)
        run(trainer)
    assert _state(trainer) == before
    found = open_run(tmp_path / "run")
    assert found.manifest["status"] == status
    assert len(found.steps) == (2 if error is None else 1)


def test_close_leaves_a_later_wrapper_of_somebody_else_working(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "out")
    attachment = attach(trainer, tmp_path / "run")
    inner, seen = trainer._compute_loss, []
    trainer._compute_loss = lambda *a, **k: (seen.append(1), inner(*a, **k))[1]
    theirs = trainer._compute_loss
    attachment.close()
    attachment.close()
    assert trainer._compute_loss is theirs
    run(trainer)
    assert len(seen) == 4
    assert len(open_run(tmp_path / "run").steps) == 0


def test_mixed_precision_run_is_watched_and_undone(tmp_path: Path) -> None:
    trainer, steps = watched_run(tmp_path, bf16=True)
    assert np.isfinite(recorded(steps, "coef")).all()
    np.testing.assert_allclose(recorded(steps, "coef"), expected_coef(trainer), atol=1e-6, rtol=0)
    assert "_compute_loss" not in vars(trainer)
    assert not our_hooks(trainer)


# Who is who -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accumulate", "per_generation", "iterations"),
    [(2, 2, 1), (2, 4, 2), (4, 2, 1)],
    ids=["aligned", "split-and-reused", "two-batches-per-step"],
)
def test_rollouts_keep_their_identity(
    tmp_path: Path, accumulate: int, per_generation: int, iterations: int
) -> None:
    trainer, _ = watched_run(
        tmp_path, gradient_accumulation_steps=accumulate, steps_per_generation=per_generation,
        num_iterations=iterations, max_steps=4, per_device_train_batch_size=4,
    )  # fmt: skip
    found = open_run(tmp_path / "run")
    tokens, rollouts = found.tokens(), found.rollouts.set_index(["step", "rollout"])
    assert rollouts.index.is_unique
    assert len(rollouts) == 4 * accumulate * 4
    for key, rows in tokens.groupby(["step", "rollout"]):
        line = rollouts.loc[key]
        assert (rows["group"] == line["group"]).all()
        np.testing.assert_allclose(rows["advantage"], line["advantage"], rtol=1e-4)
        text = "".join(found.vocab[i] for i in rows.sort_values("position")["token_id"])
        assert text.replace("<eos>", "").replace("<pad>", "") == line["completion"]
        assert len(rows) == line["length"]
    assert (rollouts.groupby(["step", "group"])["prompt"].nunique() == 1).all()
    digits = rollouts["completion"].str.count(r"\d") / 8
    np.testing.assert_allclose(rollouts["reward"], digits, atol=1e-6)
    answers = rollouts["prompt"].map(lambda p: str(int(p[0]) + int(p[2])))
    assert (rollouts["answer"] == answers).all()


def test_step_rows_agree_with_the_trainers_own_log(tmp_path: Path) -> None:
    trainer, _ = watched_run(tmp_path, max_steps=3)
    steps = open_run(tmp_path / "run").steps.set_index("step")
    log = {row["step"]: row for row in trainer.state.log_history if "reward" in row}
    ours = {"reward": "reward", "loss": "loss", "grad_norm": "grad_norm", "entropy": "entropy"}
    ours |= {"length": "completions/mean_length", "truncated": "completions/clipped_ratio"}
    for name, theirs in ours.items():
        for step, row in log.items():
            assert steps.loc[step, name] == pytest.approx(row[theirs], rel=0.02, abs=1e-6), name
    assert steps["lr"].tolist() == pytest.approx([row["learning_rate"] for row in log.values()])
    assert (steps["seconds_capture"] > 0).all()


def test_scalars_flow_back_into_the_trainers_log(tmp_path: Path) -> None:
    trainer, steps = watched_run(tmp_path, max_steps=3)
    rows = [row for row in trainer.state.log_history if "reward" in row]
    for tokens, row in zip(steps, rows, strict=True):
        for name, sign in (("entropy_pos", 1), ("entropy_neg", -1)):
            chosen = np.sign(tokens["advantage"]) == sign
            assert chosen.any() == (f"wapo/{name}" in row)
            if not chosen.any():
                continue
            assert row[f"wapo/{name}"] == pytest.approx(tokens["entropy"][chosen].mean(), rel=1e-5)
        for code, name in enumerate(("pos_peak", "pos_valley", "neg_peak", "neg_valley")):
            of_class = tokens["cls"] == code
            assert row[f"wapo/share/{name}"] == pytest.approx(of_class.mean())
            flow = tokens["pred_dentropy"][of_class].sum()
            assert row[f"wapo/entropy_flow/{name}"] == pytest.approx(flow, rel=1e-5, abs=1e-9)
            total, mass = tokens["grad_norm"].sum(), tokens["grad_norm"][of_class].sum()
            assert row["wapo/grad_mass"] == pytest.approx(total, rel=1e-5)
            assert row.get(f"wapo/grad_share/{name}", 0.0) * total == pytest.approx(mass, rel=1e-5)


def test_flow_is_left_out_of_the_log_where_it_is_not_known(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "out")
    with attach(trainer, tmp_path / "run", token_every=0):
        run(trainer)
    row = next(row for row in trainer.state.log_history if "reward" in row)
    assert "wapo/share/pos_peak" in row
    assert not any("entropy_flow" in name for name in row)
    found = open_run(tmp_path / "run")
    assert found.token_steps() == []
    assert found.classes["pred_dentropy_sum"].isna().all()
    assert found.classes["grad_mass"].notna().all()


# What a user can do wrong, and what can go wrong on its own -------------------------------------


@pytest.mark.parametrize("thing", [object(), "trainer", toy_model])
def test_the_wrong_object_is_named_with_what_is_allowed(tmp_path: Path, thing: Any) -> None:
    with pytest.raises(UserError, match="GRPOTrainer .* and its subclasses"):
        attach(thing, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_attaching_twice_is_an_error_and_leaves_the_first_one_on(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "out")
    with attach(trainer, tmp_path / "run"):
        with pytest.raises(UserError, match="already watched"):
            attach(trainer, tmp_path / "second")
        run(trainer)
    assert len(open_run(tmp_path / "run").steps) == 2
    attach(trainer, tmp_path / "second").close()


@pytest.mark.parametrize("case", ["file in the way", "holds a run", "fraction", "exact_every"])
def test_bad_arguments_leave_the_trainer_untouched(tmp_path: Path, case: str) -> None:
    trainer = toy_trainer(tmp_path / "out")
    before, path, knobs = _state(trainer), tmp_path / "run", {}
    if case == "file in the way":
        path = tmp_path / "file"
        path.write_text("")
        path = path / "run"
    elif case == "holds a run":
        attach(trainer, path).close()
    elif case == "fraction":
        knobs = {"token_fraction": 0.0}
    else:
        knobs = {"exact_every": -1}
    with pytest.raises(UserError):
        attach(trainer, path, **knobs)
    assert _state(trainer) == before


def test_a_failing_recorder_warns_once_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = run(toy_trainer(tmp_path / "plain", max_steps=4))
    trainer = toy_trainer(tmp_path / "out", max_steps=4)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with attach(trainer, tmp_path / "run") as attachment:
        attachment.recorder._writer.write_part = full
        with caplog.at_level(logging.WARNING, logger="wapo_analysis"):
            weights = run(trainer)
    assert sum("training goes on" in r.message for r in caplog.records) == 1
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["status"] == "recording_failed"


Unsloth = type("UnslothGRPOTrainer", (GRPOTrainer,), {})


@pytest.mark.parametrize("case", ["liger", "unsloth", "own loss"])
def test_hidden_tensors_leave_the_scalars(
    tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = toy_trainer(tmp_path / "out", Unsloth if case == "unsloth" else GRPOTrainer)
    if case == "liger":
        trainer.use_liger_kernel, trainer.liger_grpo_loss = True, object()
    if case == "own loss":  # a loss that never asks the trainer for log-probabilities
        trainer._compute_loss = lambda model, inputs: (
            model(input_ids=inputs["completion_ids"], labels=inputs["completion_ids"]).loss
        )
    with caplog.at_level(logging.WARNING), attach(trainer, tmp_path / "run") as attachment:
        run(trainer)
    assert attachment.recorder.failure is None
    assert sum("tokens are not" in r.message for r in caplog.records) == 1
    found = open_run(tmp_path / "run")
    assert found.steps[["reward", "loss", "grad_norm", "lr", "length"]].notna().all(axis=None)
    assert found.steps["entropy"].isna().all()
    assert len(found.rollouts) == 16
    assert len(found.classes) == 0
    assert found.manifest["tokens_hidden_by"]


def test_attaching_in_the_middle_of_a_batch_records_tokens_without_groups(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "out", steps_per_generation=8, max_steps=2)
    attachment = attach(trainer, tmp_path / "run", token_every=1)
    original = trainer._generate_and_score_completions

    def without_numbers(inputs: Any) -> Any:
        batch = original(inputs)
        del batch["wapo_rollout"]
        return batch

    trainer._generate_and_score_completions = without_numbers
    run(trainer)
    attachment.close()
    assert attachment.recorder.failure is None
    assert (open_run(tmp_path / "run").tokens()["group"] == -1).all()


def test_conversational_prompts_are_recorded_as_the_model_saw_them(tmp_path: Path) -> None:
    trainer = toy_trainer(
        tmp_path / "out", reward=lambda completions, **_: [1.0] * len(completions)
    )
    trainer.processing_class.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    rows = [[{"role": "user", "content": f"{a}+1="}] for a in range(8)]
    trainer.train_dataset = Dataset.from_dict({"prompt": rows})
    with attach(trainer, tmp_path / "run") as attachment:
        run(trainer)
    assert attachment.recorder.failure is None
    prompts = open_run(tmp_path / "run").rollouts["prompt"].str.replace(" ", "")
    assert prompts.str.fullmatch(r"\d\+1=").all()


def test_attach_is_reached_from_the_package() -> None:
    assert wapo_analysis.attach is attach
