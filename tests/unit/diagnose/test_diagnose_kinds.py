"""Every kind of log in experiments/suite/logs.py is named, and sound ones are left alone."""

from pathlib import Path

import numpy as np
import pytest

from experiments.suite.logs import KINDS, make_log, right, write_log
from experiments.suite.shapes import ALLOWED, SHAPES, write_shape
from tests.support.step_logs import finding, judge, names, noisy, ramp
from wapo_analysis.diagnose import Diagnosis, diagnose
from wapo_analysis.store import RunWriter, open_run


def read(tmp_path: Path, kind: str, seed: int) -> Diagnosis:
    return diagnose(open_run(write_log(tmp_path / f"{kind}-{seed}", kind, seed)))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_kind_is_named(tmp_path: Path, kind: str) -> None:
    for seed in range(3):
        d = read(tmp_path, kind, seed)
        assert right(kind, d), (seed, d.verdict, [(f.severity, f.name) for f in d.findings])


@pytest.mark.slow
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_kind_is_named_whatever_its_level_noise_length_and_columns(
    tmp_path: Path, kind: str
) -> None:
    wrong = [seed for seed in range(1000, 1100) if not right(kind, read(tmp_path, kind, seed))]
    assert len(wrong) <= 2, wrong


@pytest.mark.parametrize("seed", [500, 506, 508, 512, 517, 519])
def test_one_prompt_a_step_whose_gradient_comes_and_goes_is_no_warning(
    tmp_path: Path, seed: int
) -> None:
    d = read(tmp_path, "scattered_zeros", seed)
    assert not [f.name for f in d.findings if f.severity != "info"]


def warned(path: Path, shape: str, seed: int) -> set[str]:
    d = diagnose(open_run(write_shape(path / f"{shape}-{seed}", shape, seed)))
    said = {f.name for f in d.findings if f.severity != "info"}
    return said - ALLOWED.get(shape, frozenset())


@pytest.mark.parametrize("shape", sorted(SHAPES))
def test_a_healthy_shape_is_left_alone(tmp_path: Path, shape: str) -> None:
    assert not warned(tmp_path, shape, 1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", sorted(set(SHAPES) - {"many_records"}))
def test_healthy_shapes_are_left_alone_but_for_one_in_fifty(tmp_path: Path, shape: str) -> None:
    loud = {seed: said for seed in range(100, 150) if (said := warned(tmp_path, shape, seed))}
    assert len(loud) <= 1, loud


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("alive", range(3, 9))
def test_a_reward_that_dies_after_a_few_records_is_lost(
    tmp_path: Path, alive: int, seed: int
) -> None:
    rng = np.random.default_rng([alive, seed])
    reward = np.r_[rng.uniform(0.3, 0.5, alive), np.zeros(30)]
    d = judge(tmp_path, reward=reward)
    assert d.verdict == "reward_collapse"
    assert d.onset_step == alive + 1
    assert names(d) == {"reward_collapse"}


@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_scattered_zero_gradients_are_no_stall(tmp_path: Path, share: float) -> None:
    rng = np.random.default_rng(1)
    flat = rng.random(300) < share
    reward = np.where(flat, rng.integers(0, 2, 300), rng.uniform(0.2, 0.8, 300))
    d = judge(tmp_path, reward=reward, grad_norm=np.where(flat, 0, 2.5), groups_flat=flat)
    assert d.verdict == "healthy"


def test_a_long_silence_after_scattered_zeros_is_a_stall(tmp_path: Path) -> None:
    flat = np.random.default_rng(1).random(300) < 0.5
    flat[200:] = True
    reward = np.where(flat, 0.0, 0.5)
    d = judge(tmp_path, reward=reward, grad_norm=np.where(flat, 0, 2.5))
    assert d.verdict in ("stalled", "reward_collapse")
    assert 195 <= (d.onset_step or 0) <= 203


def test_one_cause_is_said_once(tmp_path: Path) -> None:
    zero = np.zeros(60)
    d = judge(tmp_path, reward=zero, grad_norm=zero, groups_flat=zero + 1, truncated=zero + 1)
    assert d.verdict == "stalled"
    assert names(d) == {"stalled", "truncation_drift"}
    assert "every completion is cut at the limit, so none earns a reward" in d.sentence


def test_functions_that_vary_but_never_within_a_group_are_named(tmp_path: Path) -> None:
    n = 60
    alive = np.arange(n) < 10
    reward = np.where(alive, 1.9 + 0.2 * np.sin(np.arange(n)), 3.0)
    d = judge(
        tmp_path,
        **{
            "reward": reward,
            "grad_norm": np.where(alive, 0.3, 0),
            "groups_flat": np.where(alive, 0.2, 1),
            "rewards/rewrite/mean": np.full(n, -3.0),
            "rewards/rewrite/std": np.full(n, 5.0),
            "rewards/json/mean": np.full(n, 2.0),
        },
    )
    assert d.verdict == "stalled"
    assert "although rewrite varies between prompts" in d.sentence


@pytest.mark.parametrize(
    ("side", "reward", "name"),
    [
        ("groups_all_wrong", 0.1, "zero_signal_too_hard"),
        ("groups_all_right", 0.7, "zero_signal_too_easy"),
    ],
)
@pytest.mark.parametrize(("share", "told"), [(0.45, False), (0.6, True)])
def test_half_of_the_groups_flat_warns(
    tmp_path: Path, side: str, reward: float, name: str, share: float, told: bool
) -> None:
    columns = {"reward": np.full(60, reward), side: np.full(60, share)}
    d = judge(tmp_path, **columns)
    assert names(d) == ({name} if told else set())
    assert not told or finding(d, name).severity == "warning"


@pytest.mark.parametrize(
    ("flat", "reward", "name"),
    [(0.7, 0.1, "zero_signal_too_hard"), (0.7, 0.9, "zero_signal_too_easy"), (0.7, 2.0, "")],
)
def test_flat_groups_are_hard_or_easy_by_the_reward(
    tmp_path: Path, flat: float, reward: float, name: str
) -> None:
    d = judge(tmp_path, reward=np.full(60, reward), groups_flat=np.full(60, flat))
    assert names(d) == {name or "zero_signal"}


def test_steps_are_steps_and_records_are_records(tmp_path: Path) -> None:
    d = diagnose(open_run(write_log(tmp_path / "run", "plateau", sparse("plateau"))))
    steps, columns = make_log("plateau", sparse("plateau"))
    assert f"{len(steps)} records from step {steps[0]} to {steps[-1]}" in d.sentence
    assert finding(d, "plateau").step % steps[0] == 0


def sparse(kind: str) -> int:
    """A seed whose log has a record every ten steps."""
    return next(seed for seed in range(99) if make_log(kind, seed)[0][0] == 10)


def test_a_low_entropy_that_rises_with_the_reward_is_no_warning(tmp_path: Path) -> None:
    u = np.linspace(0, 1, 100)
    entropy = noisy(0.05 + 0.1 * u, 0.002)
    sound = judge(tmp_path, entropy=entropy, reward=noisy(0.2 + 0.4 * u, 0.02))
    assert sound.verdict == "healthy"
    assert finding(sound, "entropy_rise").severity == "info"
    unpaid = judge(tmp_path / "b", entropy=entropy, reward=noisy(np.full(100, 0.3), 0.02))
    assert finding(unpaid, "entropy_explosion").severity == "critical"


def test_of_several_held_out_sets_the_one_that_falls_is_named(tmp_path: Path) -> None:
    u = np.linspace(0, 1, 60)
    easy, hard = noisy(0.3 + 0.4 * u, 0.01), noisy(0.6 - 0.4 * u, 0.01, seed=1)
    sets = {"eval_reward": (easy + hard) / 2, "eval_reward/gsm": easy, "eval_reward/aime": hard}
    d = judge(tmp_path, reward=noisy(0.2 + 0.4 * u, 0.02), **sets)
    found = finding(d, "held_out_falls")
    assert found.message.startswith("The held-out score of aime fell from 0.6")
    assert found.evidence["set"] == "aime"


def test_flat_groups_are_called_right_or_wrong_only_where_the_log_says_so(tmp_path: Path) -> None:
    flat, reward = ramp(0.1, 0.75, 120, 40, 40), noisy(np.full(120, 0.78), 0.01)
    d = judge(tmp_path, groups_flat=flat, reward=reward)
    assert "by the mean reward" in finding(d, "zero_signal_too_easy").message
    sides = {"groups_all_right": flat, "groups_all_wrong": flat * 0}
    d = judge(tmp_path / "b", reward=reward, **sides)
    assert "right in every completion" in finding(d, "zero_signal_too_easy").message


def test_what_was_not_checked_is_one_line_and_each_check_is_in_the_json(tmp_path: Path) -> None:
    d = judge(tmp_path, reward=[0.5] * 20)
    last = d.to_text().strip().splitlines()[-1]
    assert last.strip().startswith(f"{len(d.skipped)} checks need what is not here: class totals")
    assert len(last) < 250
    assert len(d.to_dict()["skipped"]) == len(d.skipped) > 20


def test_kl_at_the_beginning_of_completions(tmp_path: Path) -> None:
    parts = {f"kl_positional/{n}": noisy(np.full(80, 0.05), 0.005, n) for n in range(8)}
    assert "kl_by_position" not in names(judge(tmp_path, **parts))
    parts["kl_positional/0"] = noisy(ramp(0.05, 0.6, 80, 30, 30), 0.005)
    d = judge(tmp_path / "b", **parts)
    assert "leaves the reference model at the beginning" in finding(d, "kl_by_position").message


@pytest.mark.parametrize(("tail", "lost"), [([0.05], False), ([0.35, 0.1], True)])
def test_two_records_show_a_deep_loss_and_one_bad_batch_does_not(
    tmp_path: Path, tail: list[float], lost: bool
) -> None:
    d = judge(tmp_path, reward=np.r_[noisy(np.full(30, 0.5), 0.02), tail])
    assert (d.verdict == "reward_collapse") is lost


# Two runs of the suite as they were recorded, up to the step at which the old rules were wrong.
SOLVED_REWARD = [
    0.477, 0.508, 0.594, 0.688, 0.578, 0.742, 0.734, 0.688, 0.773, 0.758, 0.789, 0.859, 0.758,
    0.852, 0.82, 0.844, 0.828, 0.867, 0.797, 0.906, 0.773, 0.844, 0.852, 0.891, 0.789, 0.867,
    0.852, 0.883, 0.875, 0.852, 0.844, 0.906, 0.898, 0.844, 0.828, 0.875, 0.797, 0.914, 0.898,
    0.82, 0.875, 0.797, 0.766, 0.828, 0.805, 0.695,
]  # fmt: skip
SOLVED_ENTROPY = [
    0.332, 0.292, 0.241, 0.213, 0.203, 0.172, 0.154, 0.16, 0.14, 0.14, 0.113, 0.11, 0.113, 0.103,
    0.103, 0.087, 0.093, 0.085, 0.092, 0.079, 0.088, 0.086, 0.083, 0.074, 0.091, 0.076, 0.073,
    0.065, 0.067, 0.068, 0.066, 0.061, 0.064, 0.073, 0.067, 0.062, 0.075, 0.06, 0.059, 0.06, 0.061,
    0.073, 0.068, 0.069, 0.056, 0.058,
]  # fmt: skip
EXPLODING_REWARD = [
    0.359, 0.477, 0.453, 0.57, 0.586, 0.648, 0.711, 0.727, 0.703, 0.703, 0.758, 0.555, 0.398, 0.523,
]  # fmt: skip
EXPLODING_ENTROPY = [
    0.365, 0.32, 0.31, 0.25, 0.215, 0.191, 0.162, 0.141, 0.121, 0.115, 0.1, 0.131, 0.128, 0.103,
]  # fmt: skip


# Ends with two batches of hard prompts; the next one earned 0.92.
TWO_HARD_BATCHES = [
    0.45, 0.51, 0.54, 0.64, 0.73, 0.59, 0.67, 0.7, 0.79, 0.77, 0.74, 0.75, 0.84, 0.77, 0.8, 0.86,
    0.73, 0.81, 0.79, 0.8, 0.83, 0.8, 0.87, 0.82, 0.88, 0.82, 0.85, 0.85, 0.85, 0.79, 0.78, 0.94,
    0.89, 0.88, 0.84, 0.85, 0.79, 0.84, 0.79, 0.77, 0.78, 0.89, 0.66, 0.59,
]  # fmt: skip


def test_two_batches_of_hard_prompts_are_no_loss(tmp_path: Path) -> None:
    assert judge(tmp_path, reward=TWO_HARD_BATCHES).verdict == "healthy"


def test_a_fall_that_might_be_noise_is_a_loss_where_the_steps_are_too_large(tmp_path: Path) -> None:
    clipped = np.r_[np.full(30, 0.01), np.full(14, 0.3)]
    d = judge(tmp_path, reward=TWO_HARD_BATCHES, clip_low=clipped)
    assert (d.verdict, d.onset_step) == ("reward_collapse", 43)
    assert judge(tmp_path / "up", reward=TWO_HARD_BATCHES[:42], clip_low=clipped).verdict == (
        "healthy"
    )


def test_a_noisy_fall_is_told_in_means(tmp_path: Path) -> None:
    rates = np.r_[np.full(60, 0.3), np.full(50, 0.75), np.full(90, 0.4)]
    reward = np.random.default_rng(1).binomial(8, rates) / 8  # one group of eight a step
    d = judge(tmp_path, reward=reward)
    found = finding(d, "reward_collapse")
    assert found.evidence["reward_peak"] == pytest.approx(0.75, abs=0.05)
    assert f"fell from {found.evidence['reward_peak']:.2f} at its best to 0." in found.message
    low = float(found.message.split(" to ")[1].split()[0])
    assert low == pytest.approx(0.4, abs=0.06)


def test_a_solved_task_stays_solved_while_noise_takes_it_a_little_lower(tmp_path: Path) -> None:
    d = judge(tmp_path, reward=SOLVED_REWARD, entropy=SOLVED_ENTROPY)
    assert not [f.name for f in d.findings if f.severity != "info"]


def test_an_entropy_that_rises_as_the_reward_is_lost_is_no_collapse(tmp_path: Path) -> None:
    d = judge(tmp_path, reward=EXPLODING_REWARD, entropy=EXPLODING_ENTROPY)
    assert d.verdict == "reward_collapse"
    assert "entropy_collapse" not in names(d)


def test_an_entropy_that_is_no_longer_logged_when_the_reward_falls_is_judged(
    tmp_path: Path,
) -> None:
    reward = np.r_[ramp(0.2, 0.8, 120, 0, 60), ramp(0.8, 0.0, 40, 0, 30)]
    entropy = np.r_[0.02 + 0.9 * np.exp(-np.arange(100) / 20), np.full(60, np.nan)]
    d = judge(tmp_path, reward=noisy(reward, 0.01), entropy=noisy(entropy, 0.004))
    assert {"reward_collapse", "entropy_collapse"} <= names(d)


def test_a_drop_no_deeper_than_those_before_that_came_back_is_none(tmp_path: Path) -> None:
    steps = np.arange(285)
    swings = 0.3 + 0.35 * steps / 300 + 0.1 * np.sin(20 * np.pi * steps / 300)
    d = judge(tmp_path, reward=noisy(swings, 0.02))
    assert not [f.name for f in d.findings if f.severity != "info"]
    deeper = np.where(steps < 265, swings, 0.2)
    assert "reward_collapse" in names(judge(tmp_path / "deeper", reward=noisy(deeper, 0.02)))


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        ([*range(1, 30), *range(40, 60)], "49 steps"),  # a gap, yet one record a step
        (range(5, 500, 5), "99 records from step 5 to 495"),
        (range(0, 490, 10), "49 records from step 0 to 480"),
        ([1, *range(10, 500, 10)], "50 records from step 1 to 490"),
    ],
)
def test_records_are_told_from_steps_by_their_spacing(
    tmp_path: Path, steps: range | list[int], told: str
) -> None:
    writer = RunWriter(tmp_path / "run", {"name": "run"})
    rewards = noisy(ramp(0.2, 0.7, len(steps), 5, 20), 0.02)
    for step, reward in zip(steps, rewards, strict=True):
        writer.append_step({"step": step, "reward": float(reward)})
    writer.close("finished")
    assert told in diagnose(open_run(tmp_path / "run")).sentence
