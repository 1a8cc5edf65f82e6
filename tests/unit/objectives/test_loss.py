import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wapo_analysis.errors import UserError
from wapo_analysis.objectives.config import ObjectiveConfig
from wapo_analysis.objectives.loss import keep_tokens, policy_loss
from wapo_analysis.objectives.weights import (
    batch_weights,
    kept_token_weights,
    minibatch_weights,
)

LEVELS = ("seq", "group", "global")


def config_of(name: str = "grpo", **settings: object) -> ObjectiveConfig:
    return ObjectiveConfig(name=name, **{"max_seq_len": 20, **settings})  # type: ignore[arg-type]


# --- batch_weights -------------------------------------------------------------------------------

ADVANTAGE = np.array([1.0, -0.5, 0.0, 2.0, 0.0, 0.0, -1.0, 0.5, -2.0])
TOKENS = np.array([3, 5, 2, 0, 4, 6, 1, 7, 2])
GROUP = np.array([0, 1, 2, 0, 1, 2, 0, 1, 2])


def naive_weights(config: ObjectiveConfig, rollouts: int) -> tuple[list[float], float]:
    """The table of docs/objectives.md, one rollout at a time."""
    n, g = TOKENS.tolist(), GROUP.tolist()
    counted = [
        not (config.drops_negative and a <= 0) and not (config.mask_positive_advantages and a >= 0)
        for a in ADVANTAGE
    ]
    everyone = range(len(n))
    total = {k: sum(n[j] for j in everyone if g[j] == k and counted[j]) for k in set(g)}
    if config.weight_rule == "seq":
        return [1 / max(n[i], 1) for i in everyone], float(sum(counted))
    if config.weight_rule == "group":
        return [1 / max(total[g[i]], 1) for i in everyone], sum(t > 0 for t in total.values())
    if config.weight_rule == "fixed_length":
        assert config.max_seq_len is not None
        live = {g[i] for i in everyone if counted[i]}
        return [1 / (rollouts * config.max_seq_len)] * len(n), len(live)
    if config.weight_rule == "longest":
        return [1.0] * len(n), float(len(n) * max(n))
    return [1.0] * len(n), float(sum(n[i] for i in everyone if counted[i]))


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("gate", ["", "mask_negative_advantages", "mask_positive_advantages"])
@pytest.mark.parametrize("level", [None, *LEVELS])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "wapo"])
def test_batch_weights_equal_the_table(
    name: str, level: str | None, gate: str, official: bool
) -> None:
    if name == "wapo" and gate == "mask_positive_advantages":
        official = True  # refused otherwise: nothing would be left
    gates = {gate: True} if gate else {}
    config = config_of(name, loss_mean_level=level, official=official, **gates)
    found = batch_weights(config, ADVANTAGE, TOKENS, GROUP, 3, num_minibatches=2, world_size=1)
    weight, units = naive_weights(config, 3)
    np.testing.assert_allclose(found.sequence_weight.numpy(), weight, rtol=1e-15)
    assert found.normalizer == max(units, 1)
    np.testing.assert_allclose(found.multiplier, 2 / max(units, 1), rtol=1e-6)
    assert found.sequence_weight.dtype == torch.float64


def test_more_ranks_than_groups_shrink_the_update_in_official_mode_only() -> None:
    one_group = {"advantages": [1.0, -1.0], "token_counts": [4, 4], "group": [0, 0]}
    for official, expected in ((False, 4.0), (True, 1.0)):
        config = config_of("wapo", official=official)
        found = batch_weights(config, rollouts_per_prompt=2, world_size=4, **one_group)
        assert found.multiplier == expected


def test_weights_of_a_batch_nothing_contributes_to() -> None:
    config = config_of("wapo")
    found = batch_weights(config, [0.0, -1.0], [3, 3], [0, 1], 1)
    assert (found.normalizer, found.multiplier) == (1, 1)


@pytest.mark.parametrize(
    "change", [{"group": [0]}, {"token_counts": [-1, 2]}, {"num_minibatches": 0}]
)
def test_weights_refuse_bad_input(change: dict[str, object]) -> None:
    good: dict[str, object] = {
        "advantages": [0.0, 1.0],
        "token_counts": [1, 2],
        "group": [0, 0],
        "rollouts_per_prompt": 2,
    }
    with pytest.raises(UserError, match=r"equal length|must be >= 0"):
        batch_weights(config_of(), **{**good, **change})  # type: ignore[arg-type]


# --- the whole loss ------------------------------------------------------------------------------


@pytest.fixture
def tokens() -> dict[str, torch.Tensor]:
    """Eight rollouts of three groups, one dropped tail each, float64."""
    generator = torch.Generator().manual_seed(11)
    old = -2 * torch.rand(8, 7, generator=generator, dtype=torch.float64) - 0.1
    logp = old + 0.3 * torch.randn(8, 7, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([7, 3, 5, 1, 6, 2, 4, 7])
    return {
        "logp": logp,
        "old": old,
        "mask": torch.arange(7) < lengths[:, None],
        "peak": torch.rand(8, 7, generator=generator) < 0.5,
        "advantage": torch.tensor([1, -1, 0.5, -0.5, 2, 0.25, -2, 1], dtype=torch.float64),
        "group": torch.tensor([0, 1, 2, 0, 1, 2, 0, 1]),
    }


def scaled_loss(
    config: ObjectiveConfig,
    t: dict[str, torch.Tensor],
    logp: torch.Tensor,
    rows: torch.Tensor,
    micro: int,
    num_minibatches: int = 1,
    world_size: int = 1,
) -> torch.Tensor:
    """Loss of one mini-batch, its micro-batches added up as a training loop does."""
    batch = batch_weights(
        config,
        t["advantage"].numpy(),
        t["mask"].sum(-1).numpy(),
        t["group"].numpy(),
        3,
        num_minibatches,
        world_size,
    )
    keep = keep_tokens(config, t["advantage"][rows], t["mask"][rows], t["peak"][rows])
    weights = minibatch_weights(config, batch, rows, keep, t["group"][rows])
    total = torch.zeros((), dtype=torch.float64)
    for part in torch.arange(len(rows)).split(micro):
        r = rows[part]
        total = total + (
            policy_loss(
                config,
                logp[r],
                t["old"][r],
                t["advantage"][r],
                t["mask"][r],
                keep[part],
                weights.sequence_weight[part],
            ).loss
            * weights.multiplier
        )
    return total


SETTINGS: list[dict[str, object]] = [
    {"loss_mean_level": level, "normalize_by_kept_tokens": kept, "include_bins": bins}
    for level, kept, bins in itertools.product(LEVELS, (False, True), ((), ("valley",)))
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["grpo", "gspo", "wapo"])
def test_micro_batches_do_not_change_the_update(
    name: str, settings: dict[str, object], tokens: dict[str, torch.Tensor]
) -> None:
    config, rows = config_of(name, **settings), torch.arange(8)
    results = []
    for micro in (8, 3, 1):
        logp = tokens["logp"].clone().requires_grad_()
        loss = scaled_loss(config, tokens, logp, rows, micro)
        (gradient,) = torch.autograd.grad(loss, logp)
        results.append((loss.detach(), gradient))
    for loss, gradient in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-12, atol=1e-15)


def token_value(config: ObjectiveConfig, t: dict[str, torch.Tensor], i: int, j: int) -> float:
    x = float((t["logp"][i, j] - t["old"][i, j]).exp())
    a, bounds = float(t["advantage"][i]), config.bounds
    return -min(x * a, min(max(x, bounds.low), bounds.high) * a)


@pytest.mark.parametrize("level", LEVELS)
def test_kept_token_loss_is_a_mean_of_means_over_kept_tokens(
    level: str, tokens: dict[str, torch.Tensor]
) -> None:
    config = config_of(
        "dapo", loss_mean_level=level, normalize_by_kept_tokens=True, include_bins=("neg_valley",)
    )
    rows = torch.arange(8)
    keep = keep_tokens(config, tokens["advantage"], tokens["mask"], tokens["peak"])
    assert (~keep.any(-1)).sum() >= 4, "the sample must hold rollouts without a kept token"
    units: dict[int, list[float]] = {}
    for i, j in keep.nonzero().tolist():
        unit = {"seq": i, "group": int(tokens["group"][i]), "global": 0}[level]
        units.setdefault(unit, []).append(token_value(config, tokens, i, j))
    expected = np.mean([np.mean(values) for values in units.values()])
    found = scaled_loss(config, tokens, tokens["logp"], rows, 8)
    np.testing.assert_allclose(float(found), expected, rtol=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_official_kept_weights_count_a_phantom_token(level: str) -> None:
    config = config_of("dapo", loss_mean_level=level, normalize_by_kept_tokens=True, official=True)
    keep = torch.tensor([[True, True, True], [False, False, False]])
    batch = batch_weights(config, [1.0, 1.0], [3, 3], [0, 0], 2, num_minibatches=5)
    found = kept_token_weights(config, keep, torch.tensor([0, 0]), batch)
    expected = {"seq": [1 / 3, 1.0], "group": [0.25, 0.25], "global": [1 / 3, 1 / 3]}[level]
    np.testing.assert_allclose(found.sequence_weight.numpy(), expected, rtol=1e-7)
    assert found.sequence_weight.dtype == torch.float32
    assert found.multiplier == (5.0 if level == "global" else batch.multiplier)
    safe = config_of("dapo", loss_mean_level=level, normalize_by_kept_tokens=True)
    real = kept_token_weights(safe, keep, torch.tensor([0, 0]), batch)
    assert (real.sequence_weight * real.multiplier).tolist() == [1 / 3, 0]


def test_kept_weights_of_a_mini_batch_without_a_kept_token() -> None:
    keep, group = torch.zeros(2, 3, dtype=torch.bool), torch.tensor([0, 0])
    for level in LEVELS:
        config = config_of("dapo", loss_mean_level=level, normalize_by_kept_tokens=True)
        batch = batch_weights(config, [1.0, -1.0], [3, 3], [0, 0], 2)
        found = kept_token_weights(config, keep, group, batch)
        assert found.sequence_weight.tolist() == [0, 0]
        assert found.multiplier == 1


@pytest.mark.parametrize("level", LEVELS)
def test_mini_batches_average_to_the_batch_and_ranks_too(
    level: str, tokens: dict[str, torch.Tensor]
) -> None:
    config = config_of("wapo", loss_mean_level=level)
    logp = tokens["logp"]
    whole = scaled_loss(config, tokens, logp, torch.arange(8), 8)
    halves = [scaled_loss(config, tokens, logp, r, 4, 2) for r in torch.arange(8).split(4)]
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-12, atol=0)
    # Eight ranks of one rollout each: more ranks than contributing groups.
    ranks = [
        scaled_loss(config, tokens, logp, r, 1, world_size=8) for r in torch.arange(8).split(1)
    ]
    torch.testing.assert_close(sum(ranks) / 8, whole, rtol=1e-12, atol=0)


@given(
    name=st.sampled_from(["grpo", "gspo", "raft", "raft++", "wapo"]),
    poison=st.sampled_from([float("nan"), float("inf"), -float("inf"), 300.0, -300.0]),
    where=st.sampled_from(["logp", "old", "both"]),
    seed=st.integers(0, 50),
)
def test_nothing_outside_the_mask_reaches_loss_or_gradient(
    name: str, poison: float, where: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    logp = -torch.rand(4, 5, generator=generator, dtype=torch.float64)
    old = logp + 0.1 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 5, generator=generator) < 0.6
    advantage = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    config, weight = config_of(name), torch.ones(4, dtype=torch.float64)
    keep = keep_tokens(config, advantage, mask, torch.ones_like(mask))

    def outcome(logp: torch.Tensor, old: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logp = logp.clone().requires_grad_()
        out = policy_loss(config, logp, old, advantage, mask, keep, weight)
        return out.loss.detach(), torch.autograd.grad(out.loss, logp)[0]

    clean_loss, clean_gradient = outcome(logp, old)
    spoiled = [
        torch.where(mask, x, poison) if where in (label, "both") else x
        for label, x in (("logp", logp), ("old", old))
    ]
    loss, gradient = outcome(*spoiled)
    assert torch.equal(loss, clean_loss)
    assert torch.equal(gradient, clean_gradient)
    assert (gradient[~mask] == 0).all()


def test_non_finite_kept_tokens_are_dropped_and_counted() -> None:
    nan, inf = float("nan"), float("inf")
    logp = torch.tensor([[-1.0, -1.0, nan, -inf], [-1.0, -1.0, -1.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-1.0, -inf, -1.0, -1.0], [-1.0, -1.0, -1.0, nan]])
    mask, advantage = torch.ones(2, 4, dtype=torch.bool), torch.tensor([1.0, -1.0])
    for name, dropped in (("grpo", 4), ("gspo", 4), ("raft", 2)):
        config = config_of(name)
        keep = keep_tokens(config, advantage, mask, mask)
        out = policy_loss(config, logp, old, advantage, mask, keep, torch.ones(2))
        (gradient,) = torch.autograd.grad(out.loss, logp)
        assert out.loss.isfinite()
        assert gradient.isfinite().all()
        assert int(out.nonfinite) == dropped
        assert int(out.kept.sum()) == int(keep.sum()) - dropped
        assert (gradient[~out.kept] == 0).all()
        assert out.ratio[0, 1:].isnan().all()


def test_a_huge_ratio_stays_finite_and_passes_no_gradient() -> None:
    logp = torch.tensor([[-0.1, -0.2]], requires_grad=True)
    old = torch.tensor([[-200.0, -0.2]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    out = policy_loss(config_of("grpo"), logp, old, torch.tensor([-1.0]), mask, mask, torch.ones(1))
    (gradient,) = torch.autograd.grad(out.loss, logp)
    assert out.loss.isfinite()
    assert gradient.tolist() == [[0.0, 1.0]]
    assert out.clipped.tolist() == [[True, False]]
    assert out.ratio[0, 0].item() == pytest.approx(np.exp(20))


def test_a_log_ratio_at_its_bound_still_passes_its_gradient() -> None:
    logp = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    old, mask = torch.tensor([[-21.0, -21.5]]), torch.ones(1, 2, dtype=torch.bool)
    out = policy_loss(config_of("grpo"), logp, old, torch.tensor([-1.0]), mask, mask, torch.ones(1))
    (gradient,) = torch.autograd.grad(out.loss, logp)
    assert gradient[0].tolist() == [pytest.approx(np.exp(20)), 0.0]
    assert out.clipped.tolist() == [[False, True]]


def test_gspo_excluded_tokens_give_the_ratio_its_value_but_get_no_gradient(
    tokens: dict[str, torch.Tensor],
) -> None:
    results = {}
    for official in (False, True):
        config = config_of("gspo", clip_eps=0.9, include_bins=("valley",), official=official)
        keep = keep_tokens(config, tokens["advantage"], tokens["mask"], tokens["peak"])
        logp = tokens["logp"].clone().requires_grad_()
        weight = torch.ones(8, dtype=torch.float64)
        out = policy_loss(
            config, logp, tokens["old"], tokens["advantage"], tokens["mask"], keep, weight
        )
        results[official] = (out, torch.autograd.grad(out.loss, logp)[0], keep)
    safe, official_run = results[False], results[True]
    torch.testing.assert_close(safe[0].loss, official_run[0].loss, rtol=1e-12, atol=0)
    excluded = tokens["mask"] & ~safe[2]
    assert (safe[1][excluded] == 0).all()
    assert (official_run[1][excluded] != 0).any()
    torch.testing.assert_close(safe[1][safe[2]], official_run[1][safe[2]], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_precision(stored: torch.dtype, expected: torch.dtype) -> None:
    logp = torch.full((1, 2), -1.0, dtype=stored, requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    one = torch.ones(1, dtype=torch.float64)
    out = policy_loss(config_of(), logp, logp.detach(), one, mask, mask, one)
    assert out.loss.dtype == out.token_loss.dtype == out.ratio.dtype == expected
    assert not out.token_loss.requires_grad
    assert not out.ratio.requires_grad


def test_only_kept_tokens_count_as_not_finite() -> None:
    logp = torch.tensor([[-1.0, float("nan"), -1.0]], requires_grad=True)
    old, mask, advantage = (
        torch.full((1, 3), -1.0),
        torch.ones(1, 3, dtype=torch.bool),
        torch.ones(1),
    )
    peak = torch.tensor([[True, False, True]])
    config = config_of("grpo", exclude_bins=("pos_valley",))
    keep = keep_tokens(config, advantage, mask, peak)
    assert keep.tolist() == [[True, False, True]], "the token that is not finite has no part"
    out = policy_loss(config, logp, old, advantage, mask, keep, torch.ones(1))
    assert int(out.nonfinite) == 0
    assert out.kept.tolist() == keep.tolist()
    everything = policy_loss(config_of("grpo"), logp, old, advantage, mask, mask, torch.ones(1))
    assert int(everything.nonfinite) == 1


@pytest.mark.parametrize("minibatches", [1, 3])
def test_official_global_kept_weights_leave_out_the_batch_normaliser(minibatches: int) -> None:
    config = config_of(
        "dr_grpo", official=True, normalize_by_kept_tokens=True, loss_mean_level="global"
    )
    keep, group = torch.tensor([[True, True, False], [True, False, False]]), torch.tensor([0, 0])
    batch = batch_weights(
        config, np.array([1.0, -1.0]), np.array([3, 2]), np.array([0, 0]), 2, minibatches
    )
    assert batch.normalizer == 5, "of the whole batch, before any token is dropped"
    found = kept_token_weights(config, keep, group, batch)
    assert found.normalizer == 1.0
    assert found.multiplier == minibatches
    torch.testing.assert_close(found.sequence_weight, torch.full((2,), 1 / 3))


def test_one_process_and_one_update_a_batch_unless_told_otherwise() -> None:
    config = ObjectiveConfig(name="grpo")
    batch = ([1.0, -1.0, 0.5, -0.5], [3, 4, 5, 6], [0, 0, 1, 1], 2)
    assert batch_weights(config, *batch).multiplier == 1 / 4
    assert batch_weights(config, *batch, num_minibatches=3).multiplier == 3 / 4
    assert batch_weights(config, *batch, world_size=2).multiplier == 2 / 4
