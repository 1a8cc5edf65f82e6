"""What is read off a TRL trainer, and nothing else of it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wapo_analysis.capture.trl.trainer import (
    OLD_LOGPS,
    TrlTrainer,
    hidden_tensors,
    kind_of,
    logps_and_entropies,
    most_dropout,
)
from wapo_analysis.errors import UserError


def plain_trainer(**raw: Any) -> TrlTrainer:
    watched = object.__new__(TrlTrainer)
    watched.raw, watched.kind, watched._logged = SimpleNamespace(**raw), "GRPOTrainer", {}
    return watched


NOW, OLD = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-1.5, -1.0]])


SAMPLED = torch.tensor([[-1.25, torch.nan]])


@pytest.mark.parametrize(
    ("inputs", "ours", "behaviour", "proximal"),
    [
        ({}, False, [-1.0, -2.0], None),
        ({"old_per_token_logps": OLD}, False, [-1.5, -1.0], None),
        ({"sampling_per_token_logps": SAMPLED}, False, [-1.25, -2.0], [-1.0, -2.0]),
        ({"old_per_token_logps": OLD, "sampling_per_token_logps": SAMPLED}, False,
         [-1.25, -1.0], [-1.5, -1.0]),
        ({"old_per_token_logps": OLD, "sampling_per_token_logps": SAMPLED}, True,
         [-1.25, -1.0], None),
        ({"old_logps": OLD.sum(1), OLD_LOGPS: OLD}, False, [-1.5, -1.0], None),
        ({"old_logps": OLD.sum(1)}, False, None, None),
    ],
)  # fmt: skip
def test_whose_log_probabilities_a_ratio_is_to(
    inputs: dict[str, Any], ours: bool, behaviour: Any, proximal: Any
) -> None:
    watched = plain_trainer(**({"_wapo_objective": 1} if ours else {}))
    found = watched.old_logps(inputs, NOW.clone().requires_grad_())
    assert [None if v is None else v[0].tolist() for v in found] == [behaviour, proximal]
    assert not any(v is not None and v.requires_grad for v in found)


def test_of_a_sum_alone_each_token_has_its_part_of_the_log_ratio() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    logps = torch.tensor([[-1.0, -2.0, 9.0], [-1.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    inputs = {"old_logps": torch.tensor([-5.0, -1.5, 0.0])}
    found = plain_trainer().log_ratio(inputs, logps, None, mask)
    assert found.tolist() == [[1.0] * 3, [0.5] * 3, [0.0] * 3]
    assert plain_trainer().log_ratio({}, NOW, OLD, mask[:1, :2]).tolist() == [[0.5, -1.0]]


@pytest.mark.parametrize(
    ("uses", "corrects", "weighs"), [(1, 1, True), (1, 0, False), (0, 1, False), (0, 0, False)]
)
def test_importance_weights_count_where_the_loss_multiplies_by_them(
    uses: bool, corrects: bool, weighs: bool
) -> None:
    watched = plain_trainer(use_vllm=uses, vllm_importance_sampling_correction=corrects)
    ratio = torch.ones(1)
    assert (watched.weight({"importance_sampling_ratio": ratio}) is ratio) is weighs
    assert watched.weight({}) is None


def test_what_the_trainer_logged_since_last_time_is_averaged() -> None:
    lists: dict[str, list[float]] = {"kl": [1.0, 3.0], "reward": [5.0], "rewards/a/mean": [0.5]}
    watched = plain_trainer(_metrics={"train": lists}, model=SimpleNamespace(training=True))
    assert watched.logged() == {"kl_ref": 2.0, "rewards/a/mean": 0.5}
    assert watched.logged() == {}
    lists["kl"] += [float("nan"), 7.0]
    lists["sampling/x"] = [float("inf")]
    assert watched.logged() == {"kl_ref": 7.0}
    lists["kl"] = [9.0]
    watched.raw.model.training = False
    watched.forget_logged()
    assert watched.logged() == {}, "an evaluation's line empties no list of training"
    watched.raw.model.training = True
    watched.forget_logged()
    assert watched.logged()["kl_ref"] == 9.0


@pytest.mark.parametrize(
    ("step", "accumulation", "per_generation", "iterations", "between"),
    [
        (3, 2, 2, 1, True), (3, 2, 4, 1, False), (4, 2, 4, 1, True), (4, 1, 1, 3, False),
        (6, 1, 1, 3, True), (4, 1, 2, 3, False), (6, 1, 2, 3, True),
    ],
)  # fmt: skip
def test_a_checkpoint_may_come_between_two_generated_batches(
    step: int, accumulation: int, per_generation: int, iterations: int, between: bool
) -> None:
    args = SimpleNamespace(
        gradient_accumulation_steps=accumulation, steps_per_generation=per_generation,
        num_iterations=iterations,
    )  # fmt: skip
    watched = plain_trainer(args=args, state=SimpleNamespace(global_step=step))
    watched.done = 40
    assert watched.between_batches is between
    assert watched.step == 40 + step + 1


@pytest.mark.parametrize(
    ("kind", "raw", "has"),
    [
        ("GRPOTrainer", {"beta": 0.1}, True), ("GRPOTrainer", {"beta": 0.0}, False),
        ("GRPOTrainer", {"beta": None}, False), ("GRPOTrainer", {}, False),
        ("RLOOTrainer", {"beta": 0.1}, False), ("GMPOTrainer", {"beta": 0.1}, True),
        ("GRPOTrainer", {"beta": 0.1, "_wapo_objective": 1}, False),
    ],
)  # fmt: skip
def test_where_a_kl_term_puts_a_gradient_on_clipped_tokens(
    kind: str, raw: dict[str, Any], has: bool
) -> None:
    watched = plain_trainer(**raw)
    watched.kind = kind
    assert watched.has_kl is has


def test_what_keeps_tokens_to_itself_is_named() -> None:
    scorer = {"_get_per_token_logps_and_entropies": lambda: None}
    assert hidden_tensors(SimpleNamespace(**scorer)) is None
    liger = SimpleNamespace(**scorer, use_liger_kernel=True, liger_grpo_loss=1)
    assert "Liger's fused GRPO loss" in str(hidden_tensors(liger))
    assert hidden_tensors(SimpleNamespace(**scorer, use_liger_loss=True)) is None
    assert hidden_tensors(SimpleNamespace(**scorer, liger_grpo_loss=1)) is None
    assert "a trainer without _get_per" in str(hidden_tensors(SimpleNamespace()))
    unsloth = type("UnslothGRPOTrainer", (), {})()
    assert hidden_tensors(unsloth) == "Unsloth's compiled trainer"


def test_the_largest_dropout_is_that_of_modules_or_settings() -> None:
    model = torch.nn.Sequential(torch.nn.Dropout(0.1), torch.nn.Dropout(0.25))
    assert most_dropout(model) == 0.25
    model.config = SimpleNamespace(attention_dropout=0.5, dropout_name="x", hidden=3)
    assert most_dropout(model) == 0.5
    assert most_dropout(torch.nn.Linear(1, 1)) == 0.0


def test_every_way_a_scoring_returns_is_understood() -> None:
    for scored in ((NOW, OLD), [NOW, OLD], {"logps": NOW, "entropies": OLD}):
        assert logps_and_entropies(scored)[0] is NOW
        assert logps_and_entropies(scored)[1] is OLD
    for scored in (NOW, (NOW,), {"logps": NOW}):
        assert logps_and_entropies(scored)[0] is NOW
        assert logps_and_entropies(scored)[1] is None


def test_numbers_of_all_processes_are_added_in_one_call() -> None:
    calls: list[list[float]] = []

    def reduce(vector: Tensor, reduction: str) -> Tensor:
        calls.append(vector.tolist())
        assert (vector.dtype, reduction) == (torch.float64, "sum")
        return vector * 2

    watched = object.__new__(TrlTrainer)
    watched.raw = SimpleNamespace(accelerator=SimpleNamespace(device="cpu", reduce=reduce))
    assert watched.sum_over_processes({"b": 1.5, "a": 3.0}) == {"b": 3.0, "a": 6.0}
    assert calls == [[1.5, 3.0]]


@pytest.mark.parametrize("only_model", [False, True])
def test_a_checkpoint_holds_what_a_resume_of_the_trainer_needs(
    only_model: bool, tmp_path: Path
) -> None:
    done: list[Any] = []
    watched = object.__new__(TrlTrainer)
    watched.raw = SimpleNamespace(
        save_model=lambda place, _internal_call: done.append(("model", place, _internal_call)),
        args=SimpleNamespace(save_only_model=only_model),
        _save_optimizer_and_scheduler=lambda place: done.append("optimizer"),
        _save_rng_state=lambda place: done.append("random"),
        state=SimpleNamespace(save_to_json=lambda file: done.append(Path(file).name)),
    )
    watched.save(tmp_path)
    first, *rest = done
    assert first == ("model", str(tmp_path), True)
    assert rest == [*([] if only_model else ["optimizer", "random"]), "trainer_state.json"]


class Named:
    """Methods that a trainer is known by."""

    def _compute_loss(self) -> None: ...
    def _generate_and_score_completions(self) -> None: ...
    def training_step(self) -> None: ...
    def add_callback(self) -> None: ...


def class_of(name: str, module: str, *bases: type) -> Any:
    return type(name, bases or (Named,), {"__module__": module})


def test_which_trainer_it_is_or_derives_from() -> None:
    base = class_of("_BaseTrainer", "trl.trainer.base")
    grpo = class_of("GRPOTrainer", "trl.trainer.grpo", base)
    rloo = class_of("RLOOTrainer", "trl.trainer.rloo", base)
    assert kind_of(grpo()) == kind_of(class_of("Mine", "mine", grpo)()) == "GRPOTrainer"
    assert kind_of(rloo()) == "RLOOTrainer"
    assert kind_of(class_of("Own", "own")()) == "GRPOTrainer", "of its own, with all methods"
    dpo = class_of("DPOTrainer", "trl.trainer.dpo", base)
    for thing, why in (
        (dpo(), "the loss of DPOTrainer is not known"), (object(), "it has no _compute_loss"),
        (SimpleNamespace(_compute_loss=print), "it has no _generate_and_score_completions"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"cannot attach to {type(thing).__name__}: {why}"):
            kind_of(thing)


class Own(Named):
    """A trainer of somebody's own that has all methods and says as little as it can."""

    _get_per_token_logps_and_entropies = print

    def __init__(self, **given: Any) -> None:
        self.model = torch.nn.Linear(2, 3)
        self.accelerator = SimpleNamespace(
            process_index=2, num_processes=4, unwrap_model=lambda model: model, device="cpu"
        )
        self.args = SimpleNamespace(seed=7)
        self.processing_class = "letters"
        vars(self).update(given)


def test_a_trainer_that_says_little_is_taken_as_plain() -> None:
    found = TrlTrainer(Own())
    assert (found.kind, found.objective, found.temperature) == ("GRPOTrainer", "grpo", 1.0)
    assert (found.rank, found.processes, found.done, found.hidden_by) == (2, 4, 0, None)
    told = TrlTrainer(Own(temperature=0.5, loss_type="dapo"))
    assert (told.objective, told.temperature) == ("dapo", 0.5)
    rloo = class_of("RLOOTrainer", "trl.trainer.rloo", Own)
    assert TrlTrainer(rloo(loss_type="grpo")).objective == "rloo"


def with_head(**config: Any) -> torch.nn.Module:
    model = torch.nn.Linear(2, 3)
    model.bias.requires_grad_(False)
    model.config = SimpleNamespace(**config)
    model.get_output_embeddings = lambda: torch.nn.Linear(2, 11)
    return model


@pytest.mark.parametrize(
    ("args", "planned"),
    [({}, None), ({"max_steps": -1}, None), ({"max_steps": 0}, None), ({"max_steps": 1}, 1),
     ({"max_steps": 500}, 500)],
)  # fmt: skip
def test_a_manifest_says_what_is_trained_and_how_long(
    args: dict[str, int], planned: int | None
) -> None:
    raw = Own(model=with_head(_name_or_path="org/small", resid_dropout=0.25))
    raw.args = SimpleNamespace(seed=7, beta=0.1, **args)
    found = TrlTrainer(raw).manifest(None, None)
    assert (found.name, found.planned_steps, found.model) == ("grpo seed 7", planned, "org/small")
    assert (found.parameters, found.trainable_parameters, found.vocabulary) == (9, 6, 11)
    assert (found.seed, found.processes, found.tokenizer) == (7, 4, "str")
    assert found.config["beta"] == 0.1
    assert found.config["dropout"] == 0.25
    assert found["objective"] == {"name": "grpo", "bounds": [0.8, 1.2], "delta": None}


def test_a_manifest_names_the_run_the_class_and_whose_ratio_is_clipped() -> None:
    raw = Own(model=with_head(_name_or_path=""), importance_sampling_level="sequence")
    found = TrlTrainer(raw).manifest("mine", "one")
    assert (found.name, found.label, found.model) == ("mine", "one", "Linear")
    assert found["objective"]["ratio"] == "mean of the rollout's log-ratios"


def test_a_trainer_below_trl_s_base_alone_is_one_of_its_own() -> None:
    base = class_of("_BaseTrainer", "trl.trainer.base")
    assert kind_of(class_of("Mine", "mine", base)()) == "GRPOTrainer"
