"""One decision per known defect of the published code: parity on request, the safe way by default.

docs/objectives.md lists the same decisions.
"""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from tests.gold.checks import check_hazard
from tests.gold.folders import SMALL, rows_of
from tests.gold.hazards import replay_hazard
from tests.gold.metrics import Microbatch
from tests.gold.replay import objective_config
from wapo_analysis.errors import UserError
from wapo_analysis.objectives.loss import LossOutput
from wapo_analysis.objectives.weights import batch_weights, kept_token_weights

HAZARDS: dict[str, Mapping[str, Any]] = {r["name"]: r for r in rows_of(SMALL / "hazards.json")}


class Safe:
    """Result of a hazard's inputs under the safe defaults."""

    def __init__(self, name: str) -> None:
        self.row = HAZARDS[name]
        out: LossOutput
        view: Microbatch
        out, coef, view = replay_hazard(self.row, official=False)
        self.loss, self.coef, self.out, self.view = out.loss.item(), coef.tolist(), out, view

    def close_to(self, loss: float, coef: list[list[float]]) -> bool:
        same = torch.allclose(torch.tensor(self.coef), torch.tensor(coef), rtol=1e-6, atol=0)
        return same and self.loss == pytest.approx(loss, rel=1e-6)

    def equals_official(self) -> bool:
        stored = self.row["out"]
        return self.close_to(stored["loss"], stored["dloss_dlogp"])


def dropped_overflow() -> None:
    """The dropped rollout vanishes; the kept one trains as if alone."""
    found = Safe("overflow_ratio_in_dropped_sequence")
    assert found.close_to(-0.25, [[-0.125, -0.125], [0, 0]])
    assert int(found.out.nonfinite) == 0


def no_ratio_at_all() -> None:
    assert Safe("overflow_ratio_no_is").equals_official()


def minus_inf_kept() -> None:
    """A kept token without a usable ratio is left out and counted."""
    found = Safe("minus_inf_inference_logprob")
    assert found.close_to(-0.125, [[0, -0.125], [0, 0]])
    assert int(found.out.nonfinite) == 1
    assert found.out.kept.tolist() == [[False, True], [False, False]]


def minus_inf_masked() -> None:
    """A token outside the mask cannot reach the gradient."""
    found = Safe("minus_inf_on_masked_token")
    assert found.close_to(0.125, [[0, -0.125], [0.125, 0.125]])
    assert int(found.out.nonfinite) == 0


def prob_one() -> None:
    """p = 1 is a peak; our probability bins hold it too (derive.probability_bin)."""
    from wapo_analysis.derive import probability_bin
    from wapo_analysis.schema import PROB_EDGES

    found = Safe("prob_one_not_in_any_bin")
    assert found.equals_official()
    assert not found.view.valley[:, 0].any()
    one = torch.tensor([1.0]).numpy()
    assert probability_bin(one).tolist() == [len(PROB_EDGES) - 2]


def zero_advantage() -> None:
    """Same loss; with bins the zero-advantage rollout is in none of them."""
    found = Safe("zero_advantage_sequences")
    assert found.equals_official()
    binned = {**found.row, "settings": {**found.row["settings"], "include_bins": ["pos", "neg"]}}
    assert replay_hazard(binned, official=True)[2].keep.tolist() == [[True, True], [True, True]]
    assert replay_hazard(binned, official=False)[2].keep.tolist() == [[False] * 2, [True] * 2]


def empty_mask() -> None:
    """Same loss; the ratio of an empty rollout is missing, not 1."""
    found = Safe("empty_mask_sequence")
    assert found.equals_official()
    assert found.out.ratio[0].isnan().all()


def nothing_positive() -> None:
    assert Safe("weighted_prob_without_positive").equals_official()


def on_the_bound() -> None:
    found = Safe("ratio_exactly_on_clip_bound")
    assert found.equals_official()
    assert not found.out.clipped.any()


def all_excluded() -> None:
    """A rollout without kept tokens has weight 0 instead of 1."""
    found = Safe("kept_seq_level_all_excluded")
    assert found.close_to(0.0, [[0.0, 0.0], [0.0, 0.0]])
    assert found.view.weight.tolist() == [0, 0]


def gspo_excluded() -> None:
    """The excluded token gives the sequence ratio its value and gets no gradient."""
    found = Safe("gspo_gradient_reaches_excluded_tokens")
    assert found.close_to(0.125, [[0, 0], [0, 0.0625]])


def unknown_bin() -> None:
    with pytest.raises(UserError, match=r"unknown bin in include_bins 'peaks'; allowed: pos_peak"):
        Safe("unknown_bin_name_masks_everything")


def no_ratio_clip_counters() -> None:
    """Loss as published; nothing is reported as clipped."""
    found = Safe("no_is_metrics_still_use_ratio")
    assert found.equals_official()
    assert not found.out.clipped.any()


def raft_ignores_size() -> None:
    """RAFT is maximum likelihood on rewarded rollouts; `raft++` weights by reward."""
    assert Safe("raft_ignores_reward_size").equals_official()


def scaled_loss(name: str, group: list[int]) -> float:
    """Safe loss of the hazard's two rollouts times the multiplier of their mini-batch."""
    found = Safe(name)
    config = objective_config(found.row["settings"], official=False)
    batch = batch_weights(config, found.row["inputs"]["advantages"], [2, 2], group, 2)
    weights = kept_token_weights(config, found.view.keep, torch.tensor(group), batch)
    return found.loss * weights.multiplier


def kept_one_group() -> None:
    """One group: its mean over four kept tokens, whatever the split into micro-batches."""
    assert Safe("kept_group_split_over_microbatch").equals_official()
    assert scaled_loss("kept_group_split_over_microbatch", [0, 0]) == pytest.approx(-0.5)


def kept_two_groups() -> None:
    """The same rollouts as two groups: the mean of two means, not their sum (-1)."""
    assert Safe("kept_group_split_over_microbatch_other").equals_official()
    assert scaled_loss("kept_group_split_over_microbatch_other", [0, 1]) == pytest.approx(-0.5)


DECISIONS: dict[str, Callable[[], None]] = {
    "overflow_ratio_in_dropped_sequence": dropped_overflow,
    "overflow_ratio_no_is": no_ratio_at_all,
    "minus_inf_inference_logprob": minus_inf_kept,
    "minus_inf_on_masked_token": minus_inf_masked,
    "prob_one_not_in_any_bin": prob_one,
    "zero_advantage_sequences": zero_advantage,
    "empty_mask_sequence": empty_mask,
    "weighted_prob_without_positive": nothing_positive,
    "ratio_exactly_on_clip_bound": on_the_bound,
    "kept_seq_level_all_excluded": all_excluded,
    "gspo_gradient_reaches_excluded_tokens": gspo_excluded,
    "unknown_bin_name_masks_everything": unknown_bin,
    "no_is_metrics_still_use_ratio": no_ratio_clip_counters,
    "raft_ignores_reward_size": raft_ignores_size,
    "kept_group_split_over_microbatch": kept_one_group,
    "kept_group_split_over_microbatch_other": kept_two_groups,
}


@pytest.mark.parametrize("name", HAZARDS)
def test_parity_mode_reproduces_the_hazard(name: str) -> None:
    result = check_hazard(HAZARDS[name])
    assert result.passed, result.failures


@pytest.mark.parametrize("name", HAZARDS)
def test_safe_decision(name: str) -> None:
    DECISIONS[name]()


def test_every_hazard_has_a_decision() -> None:
    assert set(DECISIONS) == set(HAZARDS)
