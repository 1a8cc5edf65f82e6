"""Our objectives in TRL, the parts that need no trainer: whose loss it is, advantages, updates."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from wapo_analysis.capture import Patches
from wapo_analysis.capture.trl.objective import (
    UNITS_KEY,
    WEIGHT_KEY,
    _ObjectiveLoss,
    _passes_on,
)
from wapo_analysis.capture.trl.passes import SeenPass, TrlProber
from wapo_analysis.capture.trl.watcher import TrlWatcher
from wapo_analysis.errors import UserError
from wapo_analysis.objectives.config import ObjectiveConfig


class Above:
    def compute_loss(self, inputs: Any) -> Any:
        return inputs


class Returns(Above):
    def compute_loss(self, inputs: Any) -> Any:
        return super().compute_loss(inputs)


class Looks(Above):
    def compute_loss(self, inputs: Any) -> Any:
        loss = super().compute_loss(inputs)
        if inputs:
            print(loss)
            return loss
        return super().compute_loss(inputs)


class Doubles(Above):
    def compute_loss(self, inputs: Any) -> Any:
        return super().compute_loss(inputs) * 2


class Changes(Above):
    def compute_loss(self, inputs: Any) -> Any:
        loss = super().compute_loss(inputs)
        loss += 1
        return loss


class Annotated(Above):
    def compute_loss(self, inputs: Any) -> Any:
        loss = super().compute_loss(inputs)
        loss: Any = loss * 2  # type: ignore[no-redef]
        return loss


class Sometimes(Above):
    def compute_loss(self, inputs: Any) -> Any:
        if inputs:
            return super().compute_loss(inputs)
        return 0.0


class Nothing(Above):
    def compute_loss(self, inputs: Any) -> Any:
        super().compute_loss(inputs)


class Bare(Above):
    def compute_loss(self, inputs: Any) -> Any:
        super().compute_loss(inputs)
        return


@pytest.mark.parametrize(
    ("kind", "passes"),
    [
        (Returns, True), (Looks, True), (Doubles, False), (Changes, False), (Annotated, False),
        (Sometimes, False), (Nothing, False), (Bare, False), (Above, False),
    ],
)  # fmt: skip
def test_a_look_at_the_loss_above_is_no_loss_of_its_own(kind: Any, passes: bool) -> None:
    assert _passes_on(kind.compute_loss) is passes


def test_a_method_without_source_is_one_of_its_own() -> None:
    assert not _passes_on(print)
    made: dict[str, Any] = {}
    exec("def compute_loss(self): return super().compute_loss()", made)
    assert not _passes_on(made["compute_loss"])


def loss_of(config: ObjectiveConfig, **trainer: Any) -> _ObjectiveLoss:
    args = SimpleNamespace(steps_per_generation=4, gradient_accumulation_steps=2)
    given = {"model": SimpleNamespace(training=True), "num_generations": 3, "args": args, **trainer}
    given.setdefault("accelerator", SimpleNamespace(num_processes=1))
    return _ObjectiveLoss(SimpleNamespace(**given), config, Patches())


WAPO = ObjectiveConfig(name="wapo", max_seq_len=8)
RAFT = ObjectiveConfig(name="raft++")


def test_advantages_are_of_the_graded_rollouts_of_each_group() -> None:
    loss = loss_of(WAPO)
    loss._rewards = torch.tensor([1.0, 0.0, torch.nan, 0.1, 0.1, 0.1])
    assert loss._advantages(6).tolist() == [0.5, -0.5, 0.0, 0.0, 0.0, 0.0]
    assert loss._rewards is None, "taken once"
    raft = loss_of(RAFT)
    raft._rewards = torch.tensor([1.0, 0.0, torch.nan, 0.1, 0.1, 0.1])
    found = raft._advantages(6).tolist()
    assert found == pytest.approx([1.0, 0.0, 0.0, 0.1, 0.1, 0.1])


@pytest.mark.parametrize(("units", "zero"), [(14, True), (20, False)])
def test_what_rounding_in_float32_leaves_of_a_reward_is_no_advantage(
    units: int, zero: bool
) -> None:
    loss = loss_of(WAPO, num_generations=2)
    loss._rewards = torch.tensor([1.0, 1.0 + units * float(np.finfo(np.float32).eps)])
    assert (loss._advantages(2) == 0).all() == zero


@pytest.mark.parametrize(
    ("passes", "accumulation", "training", "updates"),
    [(4, 2, True, 2.0), (2, 4, True, 0.5), (4, 2, False, 1.0), (3, 3, True, 1.0)],
)
def test_a_generated_batch_is_split_over_optimizer_steps(
    passes: int, accumulation: int, training: bool, updates: float
) -> None:
    args = SimpleNamespace(steps_per_generation=passes, gradient_accumulation_steps=accumulation)
    loss = loss_of(WAPO, args=args, model=SimpleNamespace(training=training))
    assert loss._updates() == updates


@pytest.mark.parametrize(
    ("training", "given", "size"),
    [(True, {}, 3), (False, {}, 3), (False, {"num_generations_eval": 2}, 2),
     (True, {"num_generations_eval": 2}, 3)],
)  # fmt: skip
def test_groups_of_an_evaluation_may_have_their_own_size(
    training: bool, given: dict[str, int], size: int
) -> None:
    loss = loss_of(WAPO, model=SimpleNamespace(training=training), **given)
    assert loss._group_size() == size


def test_weights_are_those_of_the_whole_batch_of_all_processes() -> None:
    loss = loss_of(WAPO, accelerator=SimpleNamespace(num_processes=2))
    advantages = torch.tensor([0.5, -0.5, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    found = loss._weights(advantages, torch.tensor([2, 3, 4, 5, 6, 7]))
    assert found.sequence_weight.tolist() == pytest.approx([1 / 24] * 6)
    assert (found.normalizer, found.multiplier) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("given", "divisor"),
    [
        ({"loss_is_scaled_for_ga": True}, 4.0), ({"loss_is_scaled_for_ga": False}, 12.0),
        ({}, 12.0), ({"compute_loss_func": None}, 12.0), ({"compute_loss_func": print}, 4.0),
    ],
)  # fmt: skip
def test_of_trainers_that_do_not_say_a_loss_function_tells_whether_they_divide(
    given: dict[str, Any], divisor: float
) -> None:
    accelerator = SimpleNamespace(distributed_type="NO", gradient_accumulation_steps=4)
    loss = loss_of(WAPO, accelerator=accelerator, current_gradient_accumulation_steps=3, **given)
    assert loss._divisor() == divisor


def test_rewards_of_functions_are_weighted_and_kept_until_the_batch_is_made() -> None:
    loss = loss_of(WAPO, reward_weights=torch.tensor([2.0, 0.5]))
    matrix = torch.tensor([[1.0, 2.0], [torch.nan, 4.0], [torch.nan, torch.nan]])
    assert loss.keep_rewards(lambda given: given, matrix) is matrix
    assert loss._rewards is not None
    assert loss._rewards.tolist()[:2] == [3.0, 2.0]
    assert loss._rewards.isnan().tolist() == [False, False, True]


@pytest.mark.parametrize("process", [0, 1])
def test_each_process_gets_its_own_rollouts_of_the_whole_batch(process: int) -> None:
    """Two processes of three rollouts; the lengths of both are gathered."""

    def gather(counts: torch.Tensor) -> torch.Tensor:
        assert counts.tolist() == [2, 2, 2]
        return torch.tensor([1, 1, 1, 2, 2, 2]) if process else torch.tensor([2, 2, 2, 1, 1, 1])

    accelerator = SimpleNamespace(num_processes=2, process_index=process, gather=gather)
    loss = loss_of(WAPO, accelerator=accelerator)
    loss._rewards = torch.tensor([1.0, 0.0, 0.5, 0.0, 0.0, 3.0])
    batch = {"advantages": torch.full((3,), 9.0), "completion_mask": torch.ones(3, 2)}
    found = loss.generate(lambda inputs: batch, None)
    assert found is batch
    expected = [[0.5, -0.5, 0.0], [-1.0, -1.0, 2.0]][process]
    assert batch["advantages"].tolist() == expected
    assert batch["advantages"].dtype == torch.float32
    assert batch[WEIGHT_KEY].tolist() == pytest.approx([1 / 24] * 3)
    assert batch[UNITS_KEY].tolist() == [2.0] * 3, "2 processes / 2 groups, times 2 updates"


def test_without_bins_no_hidden_state_is_asked_for() -> None:
    mask = torch.ones(2, 3).bool()
    assert not loss_of(WAPO)._peaks({}, torch.zeros(2, 3), mask).any()


def test_a_trainer_that_returns_no_log_probabilities_is_told() -> None:
    def score(*given: Any, **how: Any) -> dict[str, Any]:
        return {"entropies": torch.zeros(1)}

    loss = loss_of(WAPO, _get_per_token_logps_and_entropies=score)
    ids = torch.ones(1, 2)
    inputs = dict.fromkeys(("prompt_ids", "completion_ids", "prompt_mask"), ids)
    with pytest.raises(UserError, match="the trainer returned no log-probabilities"):
        loss._score(None, {**inputs, "completion_mask": ids})


class Raw:
    """What a watcher that sees no tokens puts its calls around."""

    def __init__(self) -> None:
        self.accelerator = Accelerator()
        self.callbacks: list[Any] = []

    def _generate_and_score_completions(self, inputs: Any) -> None: ...
    def training_step(self) -> None: ...

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def remove_callback(self, callback: Any) -> None:
        self.callbacks.remove(callback)


class Accelerator:
    def clip_grad_norm_(self) -> None: ...


@pytest.mark.parametrize(("processes", "several"), [(1, False), (2, True), (8, True)])
def test_processes_that_train_together_are_several(processes: int, several: bool) -> None:
    notes: list[dict[str, Any]] = []
    trainer: Any = SimpleNamespace(raw=Raw(), processes=processes, hidden_by="Unsloth")
    recorder: Any = SimpleNamespace(guard=None, note=lambda **given: notes.append(given))
    patches = Patches()
    watcher = TrlWatcher(
        trainer, recorder, patches, exact_every=1, log_metrics=True, probe_rows=1, replace=False,
        resume_after=7,
    )  # fmt: skip
    assert watcher._several is several
    assert (watcher._last, watcher._resume_after) == (7, 7)
    assert notes == [{"tokens_hidden_by": "Unsloth"}]
    assert len(trainer.raw.callbacks) == 1
    patches.close()
    assert trainer.raw.callbacks == []


def test_a_step_says_how_long_its_probe_took(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = object.__new__(TrlWatcher)
    now, told = [100.0], list[Any]()

    def after_update(*given: Any) -> None:
        now[0] += 2.5
        told.extend(given)

    monkeypatch.setattr("wapo_analysis.capture.trl.watcher.perf_counter", lambda: now[0])
    watcher._trainer = SimpleNamespace(step=7)  # type: ignore[assignment]
    watcher._prober = SimpleNamespace(after_update=after_update)  # type: ignore[assignment]
    watcher._passes, watcher._row = [], {"grad_norm": 0.25}
    watcher.after_update()
    assert told == [7, [], 0.25]
    assert watcher._row == {"grad_norm": 0.25, "seconds_probe": 2.5}


@pytest.mark.parametrize("scored", [(None, torch.ones(1, 2)), (torch.ones(1, 2), None)])
def test_a_scoring_without_entropies_cannot_be_probed(scored: Any) -> None:
    trainer: Any = SimpleNamespace(precision=nullcontext)
    prober = TrlProber(trainer, SimpleNamespace(probe_every=1), 1)  # type: ignore[arg-type]
    seen = SeenPass(lambda: scored, None, torch.ones(1, 2).bool())
    with pytest.raises(ValueError, match="the trainer's scoring gives no entropies"):
        prober._score(seen, grad=False)
