"""Where findings begin, in noise and beside other columns: one number moved, just enough or not."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.step_logs import Bound, Columns, judge, ramp, said_on_both_sides

N = 60
FLAT = np.full(N, 0.3)
GAINS = ramp(0.2, 0.7, N, 5, 55)
CLIMB = ramp(0.2, 0.8, 40, 5, 20)
WAVE = np.random.default_rng(5).normal(0, 1, N)
LONG = np.random.default_rng(7).normal(0, 1, 100)
SAW = np.where(np.arange(N) % 2, 1.0, -1.0)


def moved(start: float, end: float) -> np.ndarray:
    return ramp(start, end, N, 20, 15)


def spikes(size: float, *places: int, noise: float = 0.03) -> np.ndarray:
    """Gradient norms around 1, and some that are so much larger."""
    norms = np.exp(noise * WAVE)
    norms[list(places)] = size
    return norms


def parts(first: np.ndarray, others: float, count: int = 3) -> dict[str, np.ndarray]:
    """KL to the reference by position: one part, and the others."""
    rest = {f"kl_positional/{n}": np.full(N, others) for n in range(1, count)}
    return {"kl_positional/0": first, **rest}


def functions(form: np.ndarray, content: np.ndarray, reward: np.ndarray) -> Columns:
    return {"reward": reward, "rewards/format/mean": form, "rewards/correct/mean": content}


def then(count: int, before: float, after: float) -> np.ndarray:
    return np.r_[np.full(count, before), np.full(N - count, after)]


def fallen(x: float) -> np.ndarray:
    return np.r_[CLIMB, ramp(0.8, x, 60, 5, 20)] + 0.02 * LONG


def flat(reward: np.ndarray, share: float | np.ndarray, **more: np.ndarray) -> Columns:
    return {"reward": reward, "groups_flat": np.zeros(N) + share, **more}


BOUNDS: dict[str, Bound] = {
    "slower than its noise": ("steps_slow_down", "info",
        lambda x: {"reward": FLAT, "seconds": moved(10, x) + 3 * WAVE}, 23.3, 23.7),
    "slower, but for a first step": ("steps_slow_down", "info",
        lambda x: {"reward": FLAT, "seconds": np.r_[90, moved(10, x)[1:]]}, 19.9, 20.1),
    "spike": ("gradient_spikes", "info",
        lambda x: {"reward": FLAT, "grad_norm": spikes(x, 30)}, 2.95, 3.0),
    "severe spike": ("gradient_spikes", "warning",
        lambda x: {"reward": FLAT, "grad_norm": spikes(x, 30)}, 9.9, 9.97),
    "three spikes": ("gradient_spikes", "warning",
        lambda x: {"reward": FLAT, "grad_norm": spikes(x, 20, 30, 40)}, 2.97, 3.0),
    "spike in noise": ("gradient_spikes", "warning",
        lambda x: {"reward": FLAT, "grad_norm": spikes(x, 30, noise=0.4)}, 23.3, 23.8),
    "spike among eleven": ("gradient_spikes", "info",
        lambda x: {"reward": FLAT[: int(x)], "grad_norm": spikes(5, 4)[: int(x)]}, 10, 11),
    "longer in noise": ("length_drift", "warning",
        lambda x: {"reward": FLAT, "length": moved(100, x) + 20 * WAVE}, 188, 191),
    "shorter in noise": ("length_drift", "warning",
        lambda x: {"reward": FLAT, "length": moved(1000, x) + 100 * WAVE}, 96, 90),
    "most are cut all along": ("truncation_drift", "warning",
        lambda x: {"reward": FLAT, "truncated": x + 0.1 * SAW}, 0.495, 0.505),
    "cut in noise": ("truncation_drift", "warning",
        lambda x: {"reward": FLAT, "truncated": moved(0.15, x) + 0.06 * WAVE}, 0.349, 0.355),
    "k3 of a batch": ("off_policy_drift", "warning",
        lambda x: {"reward": FLAT, "kl_old": moved(1e-5, x)}, 0.0099, 0.0101),
    "k3 of a batch, grown": ("off_policy_drift", "warning",
        lambda x: {"reward": FLAT, "kl_old": moved(0.01, x)}, 0.099, 0.101),
    "lag": ("staleness", "warning",
        lambda x: {"reward": FLAT, "staleness": moved(1, x)}, 3.9, 4.0),
    "lag, grown": ("staleness", "warning",
        lambda x: {"reward": FLAT, "staleness": moved(5, x)}, 9.9, 10),
    "KL of engines": ("train_inference_mismatch", "warning",
        lambda x: {"reward": FLAT, "engine_kl": np.full(N, x)}, 0.0099, 0.01),
    "logp of engines": ("train_inference_mismatch", "warning",
        lambda x: {"reward": FLAT, "engine_logp_diff": np.full(N, x)}, 0.0495, 0.05),
    "probabilities of engines": ("train_inference_mismatch", "warning",
        lambda x: {"reward": FLAT, "engine_prob_diff": np.full(N, x)}, 0.0297, 0.03),
    "a part is far": ("kl_by_position", "warning",
        lambda x: parts(moved(0.01, x), 0.01), 0.198, 0.201),
    "a part has gone far": ("kl_by_position", "warning",
        lambda x: parts(moved(0.1, x), 0.01), 0.495, 0.505),
    "a part is further than others": ("kl_by_position", "warning",
        lambda x: parts(moved(0.01, x), 0.1), 0.396, 0.401),
    "a part is half of all": ("kl_by_position", "warning",
        lambda x: parts(moved(0.01, x), 0.1, count=9), 0.79, 0.81),
    "half of the groups": ("zero_signal", "warning", lambda x: flat(FLAT + 1, x), 0.495, 0.5),
    "half of the groups, jumping": ("zero_signal", "warning",
        lambda x: flat(FLAT + 1 + 0.1 * WAVE, x + 0.2 * SAW), 0.55, 0.553),
    "two thirds of the groups": ("zero_signal", "warning",
        lambda x: flat(GAINS, moved(0.2, x)), 0.655, 0.665),
    "groups have become flat": ("zero_signal", "warning",
        lambda x: flat(GAINS, moved(x, 0.7)), 0.305, 0.295),
    "hard by the reward": ("zero_signal_too_hard", "warning",
        lambda x: flat(np.full(N, x), 0.7), 0.255, 0.25),
    "easy by the reward": ("zero_signal_too_easy", "warning",
        lambda x: flat(np.full(N, x), 0.7), 0.745, 0.75),
    "hard by its groups": ("zero_signal_too_hard", "warning",
        lambda x: flat(FLAT + 0.2, 0.6, groups_all_wrong=np.full(N, x),
                       groups_all_right=np.full(N, 0.2)), 0.395, 0.405),
    "easy by its groups": ("zero_signal_too_easy", "warning",
        lambda x: flat(FLAT + 0.2, 0.6, groups_all_right=np.full(N, x),
                       groups_all_wrong=np.full(N, 0.2)), 0.395, 0.405),
    "critic in noise": ("value_diverges", "warning",
        lambda x: {"reward": FLAT, "value_loss": np.clip(moved(1, x) + 0.4 * WAVE, 0, None)},
        1.965, 1.99),
    "entropy up": ("entropy_rise", "warning",
        lambda x: {"reward": FLAT, "entropy": moved(0.4, x)}, 0.595, 0.605),
    "entropy up in noise": ("entropy_rise", "warning",
        lambda x: {"reward": FLAT, "entropy": moved(0.4, x) + 0.1 * WAVE}, 0.577, 0.583),
    "entropy twice": ("entropy_explosion", "critical",
        lambda x: {"reward": FLAT, "entropy": moved(0.4, x)}, 0.795, 0.8),
    "entropy twice in noise": ("entropy_explosion", "critical",
        lambda x: {"reward": FLAT, "entropy": moved(0.4, x) + 0.1 * WAVE}, 0.842, 0.855),
    "little entropy": ("entropy_explosion", "critical",
        lambda x: {"reward": FLAT, "entropy": moved(0.02, x)}, 0.069, 0.071),
    "entropy up, paid": ("entropy_rise", "warning",
        lambda x: {"reward": GAINS, "entropy": moved(0.4, x)}, 0.595, 0.605),
    "entropy up to what is sound": ("entropy_rise", "warning",
        lambda x: {"reward": GAINS, "entropy": moved(0.1, x)}, 0.299, 0.301),
    "entropy down": ("entropy_fall", "warning",
        lambda x: {"reward": FLAT, "entropy": moved(0.4, x)}, 0.201, 0.199),
    "entropy down, paid": ("entropy_decline", "info",
        lambda x: {"reward": GAINS, "entropy": moved(0.4, x)}, 0.201, 0.199),
    "entropy down, hardly paid": ("entropy_fall", "warning",
        lambda x: {"reward": ramp(0.3, x, N, 5, 50) + 0.02 * WAVE, "entropy": moved(0.4, 0.15)},
        0.305, 0.3),
    "a fifth of the entropy": ("entropy_collapse", "critical",
        lambda x: {"reward": FLAT, "entropy": moved(0.4, x)}, 0.081, 0.0795),
    "a twentieth of it, without a reward": ("entropy_collapse", "critical",
        lambda x: {"entropy": moved(0.4, x)}, 0.0202, 0.0198),
    "half of it, before the reward is lost": ("entropy_collapse", "critical",
        lambda x: {"reward": np.r_[ramp(0.3, 0.6, 40, 5, 20), ramp(0.6, 0.1, 60, 10, 10)]
                   + 0.01 * LONG, "entropy": ramp(0.4, x, 100, 10, 25)}, 0.202, 0.198),
    "too deep for what was gained": ("entropy_collapse", "critical",
        lambda x: {"reward": ramp(0.2, 0.7, N, 5, 20) + 0.005 * WAVE,
                   "entropy": ramp(0.4, x, N, 5, 20)}, 0.0202, 0.0198),
    "fell on after the gain": ("entropy_collapse", "critical",
        lambda x: {"reward": ramp(0.2, 0.7, N, 5, 15) + 0.005 * WAVE,
                   "entropy": np.r_[ramp(0.4, 0.07, 30, 5, 15), ramp(0.07, x, 30, 5, 10)]},
        0.0462, 0.0458),
    "much gained": ("entropy_decline", "info",
        lambda x: {"reward": ramp(0.2, x, N, 5, 20) + 0.005 * WAVE,
                   "entropy": ramp(0.4, 0.05, N, 5, 20)}, 0.46, 0.466),
    "a quarter of the climb": ("fall_after_climb", "warning",
        lambda x: {"reward": fallen(x)}, 0.664, 0.659),
    "half of the climb": ("reward_collapse", "critical",
        lambda x: {"reward": fallen(x)}, 0.53, 0.525),
    "half of a reward without a climb": ("reward_collapse", "critical",
        lambda x: {"reward": ramp(0.6, x, 100, 45, 20) + 0.01 * LONG}, 0.321, 0.315),
    "half of a reward in noise": ("reward_collapse", "critical",
        lambda x: {"reward": ramp(0.6, x, 100, 45, 20) + 0.15 * LONG}, 0.361, 0.353),
    "stood for half of the run": ("plateau", "info",
        lambda x: {"reward": ramp(0.2, 0.6, 100, 5, int(x))}, 52, 50),
    "stood in a run of forty": ("plateau", "info",
        lambda x: {"reward": ramp(0.2, 0.6, int(x), 3, 8)}, 39, 40),
    "stood, but for noise": ("plateau", "info",
        lambda x: {"reward": ramp(0.2, 0.6, 100, 5, 20) + x * LONG}, 0.134, 0.133),
    "not solved by the reward": ("stalled", "critical",
        lambda x: flat(np.full(N, x), 0.95), 0.8, 0.799),
    "not solved held out": ("stalled", "critical",
        lambda x: flat(FLAT + 2, 0.95, eval_reward=np.full(N, x)), 0.8, 0.799),
    "not solved by the pass rate": ("stalled", "critical",
        lambda x: flat(FLAT + 2, 0.95, pass_rate=np.full(N, x)), 0.8, 0.799),
    "not solved by the content": ("stalled", "critical",
        lambda x: {**functions(np.full(N, 0.1), np.full(N, x), FLAT + 2),
                   "groups_flat": np.full(N, 0.95)}, 0.8, 0.799),
    "form is most": ("one_reward_takes_over", "warning",
        lambda x: functions(np.full(N, x), np.full(N, 0.2), np.full(N, x + 0.2)), 0.297, 0.303),
    "content is rare": ("one_reward_takes_over", "warning",
        lambda x: functions(np.full(N, 0.9), np.full(N, x), np.full(N, x + 0.9)), 0.302, 0.3),
    "content was learned": ("one_reward_takes_over", "warning",
        lambda x: functions(np.full(N, 0.5), moved(x, 0.3), 0.5 + moved(x, 0.3)), 0.098, 0.102),
    "form rises": ("form_rises_alone", "warning",
        lambda x: functions(then(40, 0.2, 0.2 + x), FLAT + 0.2, FLAT + 0.2), 0.198, 0.202),
    "content stands": ("form_rises_alone", "warning",
        lambda x: functions(then(40, 0.2, 0.8), then(40, 0.5, 0.5 + x), FLAT + 0.2), 0.031, 0.029),
    "content is unsolved": ("form_rises_alone", "warning",
        lambda x: functions(then(40, 0.2, 0.8), np.full(N, x), FLAT + 0.2), 0.803, 0.798),
    "silent for twenty records": ("reward_function_silent", "info",
        lambda x: functions(FLAT[: int(x)], (FLAT + 0.1 * WAVE)[: int(x)], FLAT[: int(x)]), 19, 20),
    "rate above what it was": ("lr_schedule", "warning",
        lambda x: {"reward": np.full(100, 0.3), "lr": 1e-5 * np.repeat([1, 0.1, x], [40, 30, 30])},
        1.49, 1.51),
    "rate after the warm-up": ("lr_schedule", "warning",
        lambda x: {"reward": np.full(100, 0.3),
                   "lr": 1e-5 * np.repeat([0.1, 1], [int(x), 100 - int(x)])}, 9, 10),
    "arrives as soon": ("entropy_arrival", "info",
        lambda x: {"reward": FLAT, "entropy": 0.4 * np.exp(x * np.clip(np.arange(N) - 40, 0, 99))},
        0.0087, 0.0088),
}  # fmt: skip


@pytest.mark.parametrize("case", BOUNDS)
def test_a_finding_begins_at_its_bound(tmp_path: Path, case: str) -> None:
    assert said_on_both_sides(tmp_path, BOUNDS[case]) == [False, True]


@pytest.mark.parametrize("side", ["clip_low", "clip_high"])
def test_a_log_that_tells_one_side_of_the_clip_is_not_judged_by_both(
    tmp_path: Path, side: str
) -> None:
    both = {"reward": FLAT, "clip_any": np.full(N, 0.3)}
    assert {f.name for f in judge(tmp_path / "both", **both).findings} == {"clip_saturation"}
    assert not judge(tmp_path / "side", **both, **{side: np.full(N, 0.02)}).findings


SAID = {
    "truncated": ("truncation_drift", {"reward": FLAT, "truncated": moved(0.05, 0.41)},
        "Many completions are cut at the limit from step 28 on (5% at first, 41% at the end)."),
    "shorter": ("length_drift", {"reward": FLAT, "length": moved(300, 80)},
        "Completions are shorter from step 28 on (300 at first, 80 at the end)."),
    "slower": ("steps_slow_down",
        {"reward": FLAT, "seconds": moved(10, 25), "length": moved(100, 130)},
        "A step takes 2.5 times as long as at first; completions are 1.3 times as long (seconds) "
        "from step 31 on (10 at first, 25 at the end)."),
    "slower alone": ("steps_slow_down",
        {"reward": FLAT, "seconds": moved(10, 25), "length": moved(100, 119)},
        "A step takes 2.5 times as long as at first (seconds) from step 31 on (10 at first, 25 at "
        "the end)."),
    "critic": ("value_diverges",
        {"reward": FLAT, "value_loss": np.repeat([1, 0.4, 2], 20),
         "value_explained": np.repeat([0.1, 0.5, -0.25], 20)},
        "The critic fails from step 41 on: its loss rose from 0.4 at its lowest to 2; its values "
        "explained 50% of the variance of the returns at best, and none at the end (-0.25)."),
    "held out": ("held_out_falls", {"reward": GAINS, "eval_reward": np.repeat([0.5, 0.7, 0.3], 20)},
        "The held-out score fell from 0.70 at step 39 to 0.30 at step 60 while the training reward "
        "rose by 0.17."),
    "plateau": ("plateau", {"reward": ramp(0.2, 0.6, 100, 5, 20)},
        "Reward rose from 0.20 and has stood at 0.60 since step 24, for 77 of 100 records."),
    "spikes": ("gradient_spikes", {"reward": FLAT, "grad_norm": spikes(20, 20, 40)},
        "2 gradient spikes, the largest 20.1 times its neighbours or the baseline at step 41."),
    "stalled": ("stalled", flat(np.zeros(N), 1.0, grad_norm=np.zeros(N)),
        "Nothing is learned from step 1 on: there is no difference in reward within the groups; "
        "the gradient is zero; no completion earns a reward."),
    "flat": ("zero_signal_too_hard", flat(np.full(N, 0.1), 0.7),
        "70% of the groups have the same reward for every completion, most of them none by the "
        "mean reward, so they teach nothing; half or more do from step 1 on."),
    "climb": ("fall_after_climb", {"reward": fallen(0.6)},
        "Reward climbed from 0.25 to 0.80 around step 40 and has fallen to 0.60 since: 37% of the "
        "climb is lost."),
    "arrival": ("entropy_arrival",
        {"reward": FLAT, "entropy": 0.4 * np.exp(0.015 * np.clip(np.arange(N) - 40, 0, None))},
        "At its present rate (+1.5% a step) the entropy arrives at 0.8 nats, the ceiling of its "
        "band, at step 87."),
    "form": ("form_rises_alone", functions(then(40, 0.2, 0.8), np.full(N, 0.5), FLAT + 0.2),
        "From step 31 on format rose by 0.6 to 0.8, while correct stands (correct 0.5): what is "
        "gained is form."),
    "takeover": ("one_reward_takes_over",
        functions(np.full(N, 0.8), np.full(N, 0.2), np.full(N, 1.0)),
        "format supplies most of the reward from step 1 on, 80% at the end; "
        "correct is rarely earned (correct "
        "0.2)."),
    "collapse": ("reward_collapse", {"reward": fallen(0.1)},
        "Reward fell from 0.80 at its best to 0.10 from step 49."),
    "explosion": ("entropy_explosion", {"reward": FLAT, "entropy": moved(0.4, 2.0)},
        "Entropy rose from 0.4 to 2 nats (5 times its baseline) from step 22 and stays there; "
        "reward did not clearly change (0.30 to 0.30)."),
}  # fmt: skip


@pytest.mark.parametrize("case", SAID)
def test_what_is_said_of_it(tmp_path: Path, case: str) -> None:
    name, columns, said = SAID[case]
    found = {f.name: f.message for f in judge(tmp_path, **columns).findings}
    assert found[name] == said


@pytest.mark.parametrize(("after", "verdict"), [(0.49, "healthy"), (0.47, "reward_collapse")])
def test_a_reward_that_stands_a_little_lower_is_not_dead(
    tmp_path: Path, after: float, verdict: str
) -> None:
    assert judge(tmp_path, reward=then(30, 0.6, after)).verdict == verdict


def test_weights_of_functions_that_never_vary_are_not_told(tmp_path: Path) -> None:
    columns = functions(FLAT + 0.1, FLAT - 0.1, np.full(N, 5.0))
    (found,) = [f for f in judge(tmp_path, **columns).findings if "takes_over" in f.name]
    assert found.evidence["share"] == pytest.approx(2 / 3)
