"""One definition of the step columns: loop, TRL, own trainer and import give the same numbers."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

from wapo_analysis import Recorder, open_run
from wapo_analysis.capture.trl.rollouts import log_sums
from wapo_analysis.derive import (
    derive,
    reward_columns,
    rollout_sums,
    sequence_ratio,
    step_columns,
    token_sums,
)
from wapo_analysis.importers import import_run
from wapo_analysis.record.recorder import TokenPass
from wapo_analysis.schema import STEPS, TOKENS
from wapo_analysis.table import Records
from wapo_analysis.train.loggers import StepTally

ENTROPY = (0.3, 0.6, 0.9, 0.6)
Four = dict[str, Tensor]


def four(
    *,
    log_ratio: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0),
    advantage: tuple[float, ...] = (1.0, 1.0, -1.0, -1.0),
    clipped: tuple[bool, ...] = (False, False, False, False),
    entropy: tuple[float, ...] = ENTROPY,
) -> Four:
    """Four tokens, each the only one of its rollout."""
    logp = torch.tensor([-0.5, -0.7, -0.9, -31.0], dtype=torch.float64)
    return {
        "advantage": torch.tensor(advantage, dtype=torch.float64),
        "logp": logp,
        "logp_old": logp - torch.tensor(log_ratio, dtype=torch.float64),
        "entropy": torch.tensor(entropy, dtype=torch.float64),
        "clipped": torch.tensor(clipped),
        "kept": torch.ones(4, dtype=torch.bool),
    }


def as_pass(given: Four) -> TokenPass:
    place = torch.arange(4)
    zero = torch.zeros_like(place)
    return TokenPass(group=zero, rollout=place, position=zero, token_id=place, **given)


def from_loop(given: Four, folder: Path) -> dict[str, float]:
    logp = given["logp"][:, None].clone().requires_grad_()
    with Recorder(folder / "loop") as recorder:
        recorder.watch(
            logp,
            torch.arange(4)[:, None],
            torch.ones(4, 1),
            given["advantage"],
            None,
            logp_old=given["logp_old"][:, None],
            entropy=given["entropy"][:, None],
            clip=(0.8, 1.2),
        )
        torch.where(given["clipped"], 0.0, logp[:, 0] * given["advantage"]).sum().backward()
        recorder.finish_step(1)
    assert recorder.failure is None
    return step_row(folder / "loop")


def from_trl(given: Four, folder: Path) -> dict[str, float]:
    columns = {name: values.numpy() for name, values in given.items()}
    keys = ("step", "minibatch", "rank", "group", "rollout", "position", "token_id")
    zeros = {name: np.zeros(4) for name in keys}
    rows = derive(Records.build(TOKENS, {**zeros, **columns}), 1.0)
    return step_columns(log_sums(rows, frozenset(given)))


def from_own_trainer(given: Four, folder: Path) -> dict[str, float]:
    tally = StepTally()
    ratio = (given["logp"] - given["logp_old"]).exp()
    tally.add_tokens(as_pass(given), ratio, torch.zeros(()))
    return tally.columns({})


def from_import(given: Four, folder: Path) -> dict[str, float]:
    frame = pd.DataFrame({name: values.double().numpy() for name, values in given.items()})
    frame = frame.assign(step=1, rollout=range(4), position=0, token_id=range(4))
    frame.to_csv(folder / "tokens.csv", index=False)
    import_run(folder / "tokens.csv", folder / "imported")
    return step_row(folder / "imported")


def step_row(folder: Path) -> dict[str, float]:
    (row,) = open_run(folder).steps.to_dict("records")
    return {str(name): value for name, value in row.items()}


Source = Callable[[Four, Path], dict[str, float]]
every_source = pytest.mark.parametrize(
    "source", [from_loop, from_trl, from_own_trainer, from_import]
)


@every_source
def test_the_side_of_a_clip_is_that_of_the_ratio_not_of_the_advantage(
    source: Source, tmp_path: Path
) -> None:
    """One token of A > 0 and one of A < 0 are stopped above (the latter by a delta clip)."""
    given = four(log_ratio=(0.4, 0.1, 2.0, 0.0), clipped=(True, False, True, False))
    row = source(given, tmp_path)
    assert (row["clip_low"], row["clip_high"]) == (0.0, 0.5)
    below = four(log_ratio=(0.1, 0.1, -0.7, 0.0), clipped=(False, False, True, False))
    (tmp_path / "below").mkdir()
    row = source(below, tmp_path / "below")
    assert (row["clip_low"], row["clip_high"]) == (0.25, 0.0)
    assert row["kept_tokens"] == 4


def test_a_stopped_token_whose_ratio_is_one_is_on_neither_side() -> None:
    one = {name: np.array([value]) for name, value in (("advantage", 1.0), ("logp", -1.0))}
    stopped = {"logp_old": one["logp"], "kept": np.ones(1), "clipped": np.ones(1)}
    row = step_columns(token_sums(one | stopped))
    assert (row["clip_low"], row["clip_high"]) == (0, 0)


@every_source
def test_a_number_that_is_not_finite_is_left_out_and_counted(
    source: Source, tmp_path: Path
) -> None:
    row = source(four(entropy=(0.3, 0.6, 0.9, np.nan)), tmp_path)
    assert row["entropy"] == pytest.approx(0.6, rel=1e-6)
    assert row["entropy_pos"] == pytest.approx(0.45, rel=1e-6)
    assert row["entropy_neg"] == pytest.approx(0.9, rel=1e-6)
    assert row["nonfinite"] == 1
    (tmp_path / "whole").mkdir()
    assert source(four(), tmp_path / "whole")["nonfinite"] == 0


@every_source
def test_an_impossible_old_probability_has_one_documented_value(
    source: Source, tmp_path: Path
) -> None:
    row = source(four(log_ratio=(800.0, 0.0, 0.0, -30.0)), tmp_path)
    expected = (np.expm1(20.0) - 20.0 + np.expm1(-30.0) + 30.0) / 4
    assert row["kl_old"] == pytest.approx(expected, rel=1e-6)
    assert "above 20 counts as 20" in STEPS["kl_old"].doc


def test_sums_add_up_over_any_split_of_the_tokens() -> None:
    rng = np.random.default_rng(0)
    logp = -rng.exponential(size=400)
    columns = {
        "advantage": rng.choice([-1.0, 0.0, 1.0], 400),
        "logp": logp,
        "logp_old": logp + 0.3 * rng.normal(size=400),
        "entropy": np.where(rng.random(400) < 0.1, np.nan, rng.random(400)),
        "kept": rng.random(400) < 0.8,
        "clipped": rng.random(400) < 0.2,
    }
    whole = step_columns(token_sums(columns))
    added: dict[str, float] = {}
    for part in np.split(np.arange(400), [7, 90, 91, 300]):
        own = token_sums({name: values[part] for name, values in columns.items()})
        added = {name: added.get(name, 0.0) + float(value) for name, value in own.items()}
    assert step_columns(added) == pytest.approx(whole, rel=1e-12)
    tensors = {name: torch.from_numpy(np.asarray(values)) for name, values in columns.items()}
    ours = {name: float(value) for name, value in token_sums(tensors).items()}
    assert step_columns(ours) == pytest.approx(whole, rel=1e-12)
    kept = columns["kept"]
    stopped = columns["clipped"] & kept & (columns["logp"] > columns["logp_old"])
    assert whole["clip_high"] == pytest.approx(stopped.sum() / kept.sum())
    assert whole["kept_tokens"] == kept.sum()


def test_what_a_source_cannot_give_is_left_out_not_zero() -> None:
    rows = {"advantage": np.array([1.0, -1.0]), "logp": np.array([-1.0, -2.0])}
    assert step_columns(token_sums(rows)) == {"nonfinite": 0, "tokens": 2}
    empty = {name: values[:0] for name, values in rows.items()}
    assert step_columns(token_sums(empty)) == {}


def test_a_clipped_token_of_unknown_ratio_has_no_side() -> None:
    rows = {
        "advantage": np.ones(2),
        "logp": -np.ones(2),
        "kept": np.ones(2),
        "clipped": np.eye(2)[0],
    }
    columns = step_columns(token_sums(rows))
    assert "clip_low" not in columns
    assert "clip_high" not in columns
    assert columns["kept_tokens"] == 2


def test_a_sequence_ratio_is_the_geometric_mean_over_rollout_and_pass() -> None:
    rows = {
        "minibatch": np.array([0, 0, 1, 1, 0]),
        "rollout": np.array([3, 3, 3, 3, 5]),
        "logp": np.log([0.2, 0.9, 0.5, 0.5, 0.4]),
        "logp_old": np.log([0.1, 0.3, 0.5, 0.125, 0.8]),
    }
    expected = [6**0.5, 6**0.5, 2.0, 2.0, 0.5]
    np.testing.assert_allclose(sequence_ratio(rows), expected, rtol=1e-6)


def test_rollouts_give_lengths_and_tokens_once_however_often_they_are_trained_on() -> None:
    own = rollout_sums(
        {"length": np.array([3.0, np.nan, 5.0]), "truncated": np.array([1.0, 0.0, 0.0])}
    )
    twice = token_sums({"advantage": np.ones(16), "logp": -np.ones(16)})
    columns = step_columns({**twice, **own})
    assert columns["length"] == 4.0
    assert columns["tokens"] == 8
    assert columns["truncated"] == pytest.approx(1 / 3)


def test_rewards_of_groups() -> None:
    reward = np.array([0.0, 0.0, 1.0, 1.0, 0.0, 1.0, np.nan, 0.5])
    group = np.array([0, 0, 1, 1, 2, 2, 2, -1])
    columns = reward_columns(reward, group)
    finite = reward[np.isfinite(reward)]
    assert columns["reward"] == finite.mean()
    assert columns["reward_std"] == finite.std()
    assert columns["pass_rate"] == pytest.approx(3 / 7)
    assert columns["groups_all_wrong"] == pytest.approx(1 / 3)
    assert columns["groups_all_right"] == pytest.approx(1 / 3)
    alone = reward_columns(reward, np.arange(8))
    assert "groups_all_wrong" not in alone, "a group of one rollout is flat by itself"
    assert reward_columns(np.full(3, np.nan), None) == {}


def test_what_two_engines_differ_by_and_what_has_no_ratio() -> None:
    """Probabilities of the sampling engine and the trainer; a clip flag without a ratio is none."""
    sampled, scored = np.array([-1.0, -2.0, np.nan, -0.5]), np.array([-1.1, -1.8, -3.0, np.nan])
    columns = {
        "advantage": np.array([1.0, -1.0, 1.0, 1.0]),
        "logp": np.array([-1.0, -2.1, -3.0, -0.4]),
        "logp_old": sampled,
        "logp_prox": scored,
        "kept": np.ones(4),
        "clipped": np.array([1.0, 1.0, 0.0, 0.0]),
    }
    row = step_columns(token_sums(columns))
    both = slice(0, 2)
    apart = np.abs(np.exp(scored[both]) - np.exp(sampled[both])).mean()
    assert row["engine_prob_diff"] == pytest.approx(apart)
    assert row["engine_logp_diff"] == pytest.approx(np.mean([0.1, 0.2]))
    # The ratio is to what was scored, else to what sampled: 1.11, 0.74, 1.0, 1.11.
    assert (row["clip_high"], row["clip_low"]) == pytest.approx((0.25, 0.25))
    nowhere = columns | {"logp_old": np.full(4, np.nan), "logp_prox": np.full(4, np.nan)}
    assert "clip_high" not in step_columns(token_sums(nowhere))


@pytest.mark.parametrize("log_ratio", [-3.0, -0.5, -1e-3, 0.0, 0.25, 2.0, 19.0])
def test_the_estimate_of_kl_is_r_minus_ln_r_minus_one(log_ratio: float) -> None:
    """Of both pairs: the policy to the behaviour's, and the trainer's scores to the engine's."""
    columns = {
        "advantage": np.ones(1),
        "logp": np.array([-20.0 + log_ratio]),
        "logp_old": np.array([-20.0]),
        "logp_prox": np.array([-20.0 + 2 * log_ratio]),
    }
    row = step_columns(token_sums(columns))
    for name, x in (("kl_old", log_ratio), ("engine_kl", 2 * log_ratio)):
        if x <= 20:
            assert row[name] == pytest.approx(np.exp(x) - x - 1, rel=1e-9, abs=1e-12)
    assert row["engine_logp_diff"] == pytest.approx(abs(2 * log_ratio))
    assert row["nonfinite"] == 0


def test_every_term_counts_the_tokens_it_is_known_of() -> None:
    columns = {
        "advantage": np.array([1.0, -1.0, 0.0, 2.0, -2.0]),
        "logp": np.array([-1.0, -np.inf, -1.0, -1.0, -1.0]),
        "logp_old": np.array([-1.0, -1.0, np.nan, -1.5, -0.5]),
        "entropy": np.array([0.1, 0.2, 0.4, 0.8, np.inf]),
        "kept": np.array([1.0, 1.0, 1.0, 1.0, 0.0]),
        "clipped": np.array([0.0, 1.0, 1.0, 1.0, 1.0]),
    }
    sums = {name: float(value) for name, value in token_sums(columns).items()}
    counts = {
        "entropy": 4, "entropy_pos": 2, "entropy_neg": 1, "kl_old": 3, "clip_low": 3, "rows": 5,
        "clip_high": 3, "kept_tokens": 5, "nonfinite": 5, "engine_kl": 0, "engine_logp_diff": 0,
    }  # fmt: skip
    assert {name: sums[f"{name} n"] for name in counts} == counts
    totals = {
        "entropy": 1.5, "entropy_pos": 0.9, "entropy_neg": 0.2, "clip_low": 1, "clip_high": 1,
        "kept_tokens": 4, "nonfinite": 3,
    }  # fmt: skip
    assert {name: sums[name] for name in totals} == pytest.approx(totals)
    named = token_sums(columns, given={"entropy"})
    assert (float(named["kl_old n"]), float(named["kept_tokens n"])) == (0, 0)
    assert float(named["nonfinite"]) == 1


def test_rewards_without_groups_or_with_flat_ones() -> None:
    assert reward_columns(np.array([2.0, 0.5]), None) == {
        "reward": 1.25, "reward_std": 0.75, "pass_rate": 0.5
    }  # fmt: skip
    flat = reward_columns(np.array([0.0, 0.0, -1.0, -1.0, 0.5, 0.5, 1.0, 1.0]), np.arange(8) // 2)
    assert flat["groups_all_wrong"] == flat["groups_all_right"] == 0.5
    assert flat["pass_rate"] == 0.25
    pair = reward_columns(np.array([1.0, 0.0, 0.0]), np.array([3, -1, 3]))
    assert pair["groups_all_wrong"] == pair["groups_all_right"] == 0.0
