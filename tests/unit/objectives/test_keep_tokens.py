"""Which tokens a loss keeps: signs, classes, the gate of the objective."""

import itertools

import pytest
import torch

from wapo_analysis.errors import UserError
from wapo_analysis.objectives.config import ObjectiveConfig
from wapo_analysis.objectives.loss import keep_tokens


def naive_keep(config: ObjectiveConfig, a: float, inside: bool, peak: bool) -> bool:
    regime = "peak" if peak else "valley"
    sign = "pos" if a > 0 else "neg" if a < 0 else "none"
    names = {sign, regime, f"{sign}_{regime}"} if sign != "none" else set()
    kept = inside
    if config.drops_negative:
        kept = kept and a > 0
    if config.mask_positive_advantages:
        kept = kept and a < 0
    if config.include_bins:
        kept = kept and bool(names & set(config.include_bins))
    return kept and not names & set(config.exclude_bins)


BINS: list[tuple[str, ...]] = [(), ("pos_peak",), ("valley",), ("neg", "pos_valley"), ("peak",)]
REFUSED = [
    (("pos_peak",), "include_bins", "mask_positive_advantages"),
    (("neg", "pos_valley"), "exclude_bins", "mask_positive_advantages"),
]


@pytest.mark.parametrize("bins", BINS)
@pytest.mark.parametrize("field", ["include_bins", "exclude_bins"])
@pytest.mark.parametrize("gate", ["", "mask_negative_advantages", "mask_positive_advantages"])
def test_keep_tokens_equals_one_token_at_a_time(
    bins: tuple[str, ...], field: str, gate: str
) -> None:
    settings: dict[str, object] = {field: bins, **({gate: True} if gate else {})}
    if (bins, field, gate) in REFUSED:
        with pytest.raises(UserError, match="no token to train on"):
            ObjectiveConfig(name="grpo", **settings)
        return
    config = ObjectiveConfig(name="grpo", **settings)
    cells = list(itertools.product((1.5, 0.0, -2.0), (True, False), (True, False)))
    # Every row keeps one more token, so that no rollout is empty.
    advantage = torch.tensor([a for a, _, _ in cells])
    mask = torch.tensor([[inside, True] for _, inside, _ in cells])
    peak = torch.tensor([[is_peak, is_peak] for _, _, is_peak in cells])
    found = keep_tokens(config, advantage, mask, peak)
    expected = [[naive_keep(config, a, i, p), naive_keep(config, a, True, p)] for a, i, p in cells]
    assert found.tolist() == expected


def test_zero_advantage_is_in_no_class_but_positive_in_official_mode() -> None:
    advantage, mask = torch.zeros(1), torch.ones(1, 2, dtype=torch.bool)
    peak = torch.tensor([[True, False]])
    for bins, official, expected in (
        (("pos", "neg"), False, [False, False]),
        (("pos_peak",), True, [True, False]),
    ):
        config = ObjectiveConfig(name="grpo", include_bins=bins, official=official)
        assert keep_tokens(config, advantage, mask, peak)[0].tolist() == expected
    left_out = ObjectiveConfig(name="grpo", exclude_bins=("pos",))
    assert keep_tokens(left_out, advantage, mask, peak).all()


def test_an_empty_rollout_keeps_nothing() -> None:
    config = ObjectiveConfig(name="wapo", max_seq_len=20)
    mask = torch.tensor([[False, False], [True, True]])
    found = keep_tokens(config, torch.tensor([1.0, 1.0]), mask, torch.ones_like(mask))
    assert found.tolist() == mask.tolist()
