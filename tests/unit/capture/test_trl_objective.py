"""Our objectives in TRL, the parts that need no trainer: whose loss it is, advantages, updates."""

from collections import defaultdict
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from wapo_analysis.capture import Patches
from wapo_analysis.capture.trl.objective import (
    UNITS_KEY,
    WEIGHT_KEY,
    _check_settings,
    _longest,
    _ObjectiveLoss,
    _passes_on,
)
from wapo_analysis.capture.trl.trainer import SCORER
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


class Reassigns(Above):
    def compute_loss(self, inputs: Any) -> Any:
        loss = super().compute_loss(inputs)
        loss = loss * 2
        return loss  # noqa: RET504


class Adds(Above):
    def compute_loss(self, inputs: Any) -> Any:
        loss = 1.0
        loss += super().compute_loss(inputs)
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
        (Sometimes, False), (Nothing, False), (Bare, False), (Above, False), (Reassigns, False),
        (Adds, False),
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


def test_the_rounding_is_that_of_the_largest_reward() -> None:
    eps = float(np.finfo(np.float32).eps)
    for first, zero in ((1000.0, True), (1.0, False)):
        loss = loss_of(WAPO, num_generations=2)
        loss._rewards = torch.tensor([first, 0.0, 1.0, 1.0 + 32 * eps])
        assert bool((loss._advantages(4)[2:] == 0).all()) is zero
    loss = loss_of(WAPO, num_generations=2)
    loss._rewards = torch.tensor([1e-3, 1e-3 + 1e-6])
    assert (loss._advantages(2) != 0).all(), "small rewards have small rounding"


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


def test_the_longest_text_is_prompt_and_completion() -> None:
    for prompt, longest in ((5, 13), (None, 8)):
        given = SimpleNamespace(max_prompt_length=prompt, max_completion_length=8)
        assert _longest(given) == longest
    assert _longest(SimpleNamespace(max_completion_length=8)) == 8


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ({}, None), ({"beta": 0.0}, None), ({"beta": 0.04}, "beta"),
        ({"importance_sampling_level": "sequence"}, "importance_sampling_level"),
        ({"importance_sampling_level": "token"}, None),
        ({"top_entropy_quantile": 1.0}, None), ({"top_entropy_quantile": 0.99}, "top_entropy_q"),
        ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold"),
        ({"multi_objective_aggregation": "sum_then_normalize"}, None),
        ({"multi_objective_aggregation": "normalize_then_sum"}, "multi_objective_aggregation"),
    ],
)  # fmt: skip
def test_a_setting_that_would_be_dropped_is_refused(
    given: dict[str, Any], refused: str | None
) -> None:
    trainer = SimpleNamespace(args=SimpleNamespace(**given), **{SCORER: print})
    if refused is None:
        _check_settings(trainer, "WAPO")
    else:
        with pytest.raises(UserError, match=f"WAPO has no {refused}"):
            _check_settings(trainer, "WAPO")


def test_clipped_tokens_are_logged_by_the_sign_of_their_advantage() -> None:
    metrics: dict[str, Any] = {"train": defaultdict(list), "eval": defaultdict(list)}
    loss = loss_of(
        WAPO, _metrics=metrics, accelerator=SimpleNamespace(num_processes=1, gather=lambda v: v)
    )
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    clipped = torch.tensor([[1, 1, 0, 1], [1, 1, 0, 1]]).bool()
    kept = torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]).bool()
    out: Any = SimpleNamespace(clipped=clipped, kept=kept)
    loss._log(mask, torch.arange(8.0).view(2, 4), out, torch.tensor([0.5, -0.5]))
    found = {name: values[0] for name, values in metrics["train"].items()}
    assert found == pytest.approx({
        "clip_ratio/low_mean": 2 / 5, "clip_ratio/high_mean": 1 / 5, "entropy": 12 / 5,
    })  # fmt: skip
    loss._trainer.model.training = False
    loss._log(mask & False, None, out, torch.tensor([0.5, -0.5]))
    assert metrics["eval"] == {"clip_ratio/low_mean": [0.0], "clip_ratio/high_mean": [0.0]}
    assert len(metrics["train"]["entropy"]) == 1


@pytest.mark.parametrize(("units", "divisor", "times"), [(2.0, 3, 6.0), (0.5, 1, 0.5)])
def test_a_loss_is_the_objective_s_times_multiplier_and_what_will_divide_it(
    units: float, divisor: int, times: float
) -> None:
    """pi / pi_old of each token times A, over the constant length that is in the weights."""
    leaf = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    old = leaf.detach() - torch.tensor([[0.1, -0.2], [0.3, 0.4]])
    loss = loss_of(
        WAPO, accelerator=SimpleNamespace(
            num_processes=1, gather=lambda v: v, gradient_accumulation_steps=divisor,
            distributed_type="NO",
        ),
        loss_is_scaled_for_ga=True, _metrics={"train": defaultdict(list)},
        **{SCORER: lambda model, ids, *given, **how: (leaf, None)},
    )  # fmt: skip
    two = torch.ones(2, 2, dtype=torch.long)
    inputs = {
        "prompt_ids": two, "prompt_mask": two, "completion_ids": two,
        "completion_mask": torch.tensor([[1, 1], [1, 0]]), "old_per_token_logps": old,
        "advantages": torch.tensor([0.5, 0.25]), WEIGHT_KEY: torch.tensor([0.1, 0.2]),
        UNITS_KEY: torch.full((2,), units),
    }  # fmt: skip
    found = loss.compute(print, None, inputs)
    ratio = (leaf - old).detach().exp()
    expected = -(ratio[0].sum() * 0.5 * 0.1 + ratio[1, 0] * 0.25 * 0.2) * times
    torch.testing.assert_close(found.detach(), expected)
    found.backward()
    coef = ratio * torch.tensor([[0.05], [0.05]]) * torch.tensor([[1, 1], [1, 0]]) * times
    torch.testing.assert_close(leaf.grad, -coef)


class Peaked(nn.Module):
    """A backbone that returns what it is given, below a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.base_model = nn.Identity()
        self.head = nn.Linear(3, 6, bias=False)
        self.config = SimpleNamespace(get_text_config=SimpleNamespace)

    def get_output_embeddings(self) -> nn.Module:
        return self.head


def peaks_of(gap: float, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Peaks found, and those of whole softmaxes; one log-probability is ``gap`` off."""
    torch.manual_seed(0)
    model, states = Peaked(), 2 * torch.randn(2, 5, 3)
    accelerator = SimpleNamespace(unwrap_model=lambda m: m, autocast=nullcontext, num_processes=1)
    loss = loss_of(
        ObjectiveConfig(name="grpo", include_bins=("peak",)), model=model, temperature=0.8,
        accelerator=accelerator,
    )  # fmt: skip
    logps = (model.head(states[:, 1:4]) / 0.8).log_softmax(-1).detach()
    ids = torch.stack([logps[0].argmax(-1), logps[1].argmin(-1)])
    own = logps.gather(-1, ids[..., None])[..., 0]
    expected = own.exp() >= logps.exp().square().sum(-1)
    assert 0 < int(expected.sum()) < 6
    own[1, 2] -= gap
    loss._hidden = []
    loss._keep_hidden(None, None, SimpleNamespace(last_hidden_state=None))
    loss._keep_hidden(None, None, SimpleNamespace(last_hidden_state=states))
    found = loss._peaks({"completion_ids": ids}, own, mask)
    loss._keep_hidden(None, None, SimpleNamespace(last_hidden_state=states))
    with pytest.raises(UserError, match="need a model that returns hidden states"):
        loss._peaks({"completion_ids": ids}, own, mask)
    return found, expected & mask


def test_peaks_are_told_by_the_states_before_each_token() -> None:
    for mask in (torch.ones(2, 3), torch.tensor([[1, 0, 1], [0, 1, 1]]), torch.zeros(2, 3)):
        found, expected = peaks_of(0.0, mask.bool())
        assert torch.equal(found, expected)
    peaks_of(0.29, torch.ones(2, 3).bool())
    with pytest.raises(UserError, match=r"head differ from the trainer's by 0.31 nats"):
        peaks_of(0.31, torch.ones(2, 3).bool())
