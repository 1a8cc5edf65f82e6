"""What is told of a course in full: severity, steps, words and numbers, and what is not told."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests.support.step_logs import Columns, judge, ramp
from wapo_analysis.diagnose import Diagnosis, Finding

N = 60
FLAT = np.full(N, 0.3)
WAVE = np.random.default_rng(5).normal(0, 1, N)
LONG = np.random.default_rng(7).normal(0, 1, 100)
CALM = 0.002 * np.random.default_rng(3).normal(0, 1, 200)
GAINS = ramp(0.2, 0.7, N, 5, 55)
OTHER = np.random.default_rng(8).normal(0, 1, N)
FORMAT, CONTENT = ramp(0.2, 0.9, N, 20, 15) + 0.05 * WAVE, 0.25 + 0.05 * OTHER


def parts(*lengths_and_levels: tuple[int, float]) -> np.ndarray:
    """Levels one after the other, with a little noise."""
    levels = np.concatenate([np.full(length, float(level)) for length, level in lengths_and_levels])
    return levels + CALM[: len(levels)]


def functions(reward: np.ndarray, **means: np.ndarray) -> Columns:
    return {"reward": reward, **{f"rewards/{name}/mean": values for name, values in means.items()}}


def summed(**means: np.ndarray) -> Columns:
    """Functions whose weights are 1."""
    return functions(np.sum(list(means.values()), axis=0), **means)


def then(count: int, before: float, after: float) -> np.ndarray:
    return np.r_[np.full(count, before), np.full(N - count, after)]


def told(diagnosis: Diagnosis, name: str) -> Finding | None:
    return next((f for f in diagnosis.findings if f.name == name), None)


# A log, the finding looked at, its severity and steps (first, warned, until), words, and numbers.
TOLD = {
    "a drop": (
        {"reward": parts((40, 0.6), (20, 0.42))},
        "reward_drop", "warning", (41, 41, None),
        "Reward fell from 0.60 at its best to 0.42 from step 41.",
        {"reward_start": 0.5991, "reward_peak": 0.6013, "reward_end": 0.42, "best_step": 39,
         "lost_share": 0.3015},
    ),
    "a drop below nothing": (
        {"reward": parts((40, -0.6), (20, -0.8))},
        "reward_drop", "warning", (41, 41, None),
        "Reward fell from -0.60 at its best to -0.80 from step 41.",
        {"reward_start": -0.6009, "reward_peak": -0.5987, "reward_end": -0.8, "best_step": 39,
         "lost_share": None},
    ),
    "a loss": (
        {"reward": parts((40, 0.6), (20, 0.2)), "entropy": then(40, 0.4, 0.5)},
        "reward_collapse", "critical", (41, 41, 41),
        "Reward fell from 0.60 at its best to 0.20 from step 41.",
        {"reward_start": 0.5991, "reward_peak": 0.6013, "reward_end": 0.2, "best_step": 39,
         "lost_share": 0.6674, "entropy_start": 0.4, "entropy_end": 0.5},
    ),
    "a loss that came back": (
        {"reward": parts((30, 0.6), (10, 0.2), (20, 0.6))},
        "reward_drop", "info", (31, 31, 31),
        "Reward fell from 0.60 at its best to 0.20 from step 31, then came back.",
        {"reward_start": 0.5991, "reward_peak": 0.6015, "reward_end": 0.6, "best_step": 30,
         "lost_share": 0.0025},
    ),
    "a climb of which a third is lost": (
        {"reward": np.r_[ramp(0.2, 0.8, 40, 5, 20), ramp(0.8, 0.6, 60, 5, 20)] + CALM[:100]},
        "fall_after_climb", "warning", (39, None, None),
        "Reward climbed from 0.25 to 0.80 around step 33 and has fallen to 0.60 since: 37% "
        "of the climb is lost.",
        {"reward_start": 0.2523, "reward_peak": 0.8003, "reward_end": 0.5998, "best_step": 33,
         "lost_share": 0.3658},
    ),
    "a plateau": (
        {"reward": ramp(0.2, 0.6, 100, 5, 20)},
        "plateau", "info", (24, None, None),
        "Reward rose from 0.20 and has stood at 0.60 since step 24, for 77 of 100 records.",
        {"reward_start": 0.2, "reward_end": 0.6},
    ),
    "one of two pays": (
        functions(np.ones(N), alpha=np.full(N, 0.9), beta=np.full(N, 0.1)),
        "one_reward_takes_over", "info", (1, None, None),
        "alpha supplies 90% of the reward from step 1 on; beta is rarely earned (beta 0.1).",
        {"function": "alpha", "share": 0.9, "rest": "beta"},
    ),
    "two forms pay": (
        functions(np.full(N, 1.05), format=np.full(N, 0.5), xml=np.full(N, 0.4),
         correct=np.full(N, 0.1), sql=np.full(N, 0.05)),
        "one_reward_takes_over", "warning", (1, None, None),
        "format and xml supply 86% of the reward from step 1 on; correct and sql are rarely"
        " earned (correct 0.1, sql 0.05).",
        {"function": "format and xml", "share": 0.8571, "rest": "correct and sql"},
    ),
    "one of two forms pays": (
        functions(np.ones(N), format=np.full(N, 0.9), xml=np.full(N, 0.1)),
        "one_reward_takes_over", "info", (1, None, None),
        "format supplies 90% of the reward from step 1 on; xml is rarely earned (xml 0.1).",
        {"function": "format", "share": 0.9, "rest": "xml"},
    ),
    "what costs is no part of it": (
        functions(np.zeros(N), format=np.full(N, 0.5), correct=np.full(N, -0.5)),
        "one_reward_takes_over", "warning", (1, None, None),
        "format supplies 100% of the reward from step 1 on; correct is rarely earned "
        "(correct -0.5).",
        {"function": "format", "share": 1.0, "rest": "correct"},
    ),
    "one is logged less often": (
        functions(np.ones(N), format=np.full(N, 0.9), correct=np.where(np.arange(N) % 2, 0.1,
         np.nan)),
        "one_reward_takes_over", "warning", (2, None, None),
        "format supplies 90% of the reward from step 2 on; correct is rarely earned "
        "(correct 0.1).",
        {"function": "format", "share": 0.9, "rest": "correct"},
    ),
    "two forms rise": (
        functions(FLAT + 0.2, format=then(40, 0.2, 0.8), xml=then(40, 0.2, 0.5),
         correct=np.full(N, 0.5), sql=np.full(N, 0.6)),
        "form_rises_alone", "warning", (31, None, None),
        "From step 31 on format rose by 0.6 to 0.8, while correct and sql stand (correct "
        "0.5, sql 0.6): what is gained is form.",
        {"function": "format", "gain": 0.6, "rest": "correct and sql"},
    ),
    "form rises early": (
        functions(FLAT + 0.2, format=then(20, 0.2, 0.8), correct=np.full(N, 0.5)),
        "form_rises_alone", "warning", (16, None, None),
        "From step 16 on format rose by 0.43 to 0.8, while correct stands (correct 0.5): "
        "what is gained is form.",
        {"function": "format", "gain": 0.4286, "rest": "correct"},
    ),
    "silent": (
        functions(FLAT, a=FLAT, b=FLAT + 0.1 * WAVE),
        "reward_function_silent", "info", (1, None, None),
        "The reward function a has been 0.3 at every step: it teaches nothing.",
        {"function": "a", "value": 0.3},
    ),
    "form pays by its weight": (
        functions(FORMAT + 2 * CONTENT, format=FORMAT, correct=CONTENT),
        "one_reward_takes_over", "warning", (38, None, None),
        "format supplies 62% of the reward from step 38 on; correct is rarely earned "
        "(correct 0.29).",
        {"function": "format", "share": 0.6195, "rest": "correct"},
    ),
    "a weight below nothing is none": (
        functions(FORMAT - CONTENT, format=FORMAT, correct=CONTENT),
        "one_reward_takes_over", "warning", (25, None, None),
        "format supplies 77% of the reward from step 25 on; correct is rarely earned "
        "(correct 0.29).",
        {"function": "format", "share": 0.765, "rest": "correct"},
    ),
    "form pays from a step": (
        summed(format=then(20, 0.2, 0.5), correct=0.25 + CALM[:N]),
        "one_reward_takes_over", "warning", (21, None, None),
        "format supplies 67% of the reward from step 21 on; correct is rarely earned "
        "(correct 0.25).",
        {"function": "format", "share": 0.6667, "rest": "correct"},
    ),
    "an explosion": (
        {"reward": FLAT, "entropy": parts((20, 0.4), (40, 2))},
        "entropy_explosion", "critical", (21, 21, 21),
        "Entropy rose from 0.399 to 2 nats (5 times its baseline) from step 21 and stays "
        "there; reward did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.3991, "entropy_end": 2.0, "entropy_extreme": 2.0015, "ratio":
         5.0114, "predicted_net_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3,
         "reward_end": 0.3},
    ),
    "a rise while the reward gains": (
        {"reward": GAINS, "entropy": parts((20, 0.4), (40, 2))},
        "entropy_rise", "warning", (21, 21, 21),
        "Entropy rose from 0.399 to 2 nats (5 times its baseline) from step 21; reward rose"
        " from 0.20 to 0.67.",
        {"entropy_start": 0.3991, "entropy_end": 2.0, "entropy_extreme": 2.0015, "ratio":
         5.0114, "predicted_net_dentropy": None, "reward_start": 0.2, "reward_peak": 0.6864,
         "reward_end": 0.6682},
    ),
    "a rise to what is sound": (
        {"reward": GAINS, "entropy": then(20, 0.1, 0.3)},
        "entropy_rise", "info", (21, 21, 21),
        "Entropy rose from 0.1 to 0.3 nats (3 times its baseline) from step 21; reward rose"
        " from 0.20 to 0.67.",
        {"entropy_start": 0.1, "entropy_end": 0.3, "entropy_extreme": 0.3, "ratio": 3.0,
         "predicted_net_dentropy": None, "reward_start": 0.2, "reward_peak": 0.6864,
         "reward_end": 0.6682},
    ),
    "a rise that came back": (
        {"reward": GAINS, "entropy": parts((20, 0.1), (20, 0.29), (20, 0.1))},
        "entropy_excursion", "warning", (21, 21, 21),
        "Entropy rose from 0.0991 to 0.291 nats (2.9 times its baseline) from step 21 and "
        "came back; reward rose from 0.20 to 0.67.",
        {"entropy_start": 0.0991, "entropy_end": 0.1, "entropy_extreme": 0.2913, "ratio":
         1.0093, "predicted_net_dentropy": None, "reward_start": 0.2, "reward_peak": 0.6864,
         "reward_end": 0.6682},
    ),
    "a fall that came back": (
        {"reward": FLAT, "entropy": parts((20, 0.4), (20, 0.05), (20, 0.4))},
        "entropy_excursion", "warning", (21, 21, 21),
        "Entropy fell from 0.399 to 0.0481 nats (0.12 times its baseline) from step 21 and "
        "came back; reward did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.3991, "entropy_end": 0.4, "entropy_extreme": 0.0481, "ratio":
         1.0023, "predicted_net_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3,
         "reward_end": 0.3},
    ),
    "a rise by half": (
        {"reward": FLAT, "entropy": then(20, 0.5, 0.75)},
        "entropy_rise", "warning", (21, 21, None),
        "Entropy rose from 0.5 to 0.75 nats (1.5 times its baseline) from step 21; reward "
        "did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.5, "entropy_end": 0.75, "entropy_extreme": 0.75, "ratio": 1.5,
         "predicted_net_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3, "reward_end":
         0.3},
    ),
    "a fall to half": (
        {"reward": FLAT, "entropy": then(20, 0.5, 0.25)},
        "entropy_fall", "warning", (21, 21, None),
        "Entropy fell from 0.5 to 0.25 nats (0.5 times its baseline) from step 21; reward "
        "did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.5, "entropy_end": 0.25, "entropy_extreme": 0.25, "ratio": 0.5,
         "predicted_net_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3, "reward_end":
         0.3},
    ),
    "a fall to a fifth": (
        {"reward": FLAT, "entropy": then(20, 0.5, 0.1)},
        "entropy_collapse", "critical", (21, 21, 21),
        "Entropy fell from 0.5 to 0.1 nats (0.2 times its baseline) from step 21 and stays "
        "there; reward did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.5, "entropy_end": 0.1, "entropy_extreme": 0.1, "ratio": 0.2,
         "predicted_net_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3, "reward_end":
         0.3},
    ),
    "a fall that is paid": (
        {"reward": GAINS, "entropy": parts((20, 0.4), (40, 0.15))},
        "entropy_decline", "info", (21, 21, None),
        "Entropy fell from 0.399 to 0.15 nats (0.38 times its baseline) from step 21 as the"
        " policy became certain; reward rose from 0.20 to 0.67.",
        {"entropy_start": 0.3991, "entropy_end": 0.15, "entropy_extreme": 0.1481, "ratio":
         0.3759, "predicted_net_dentropy": None, "reward_start": 0.2, "reward_peak": 0.6864,
         "reward_end": 0.6682},
    ),
    "a fall without a reward": (
        {"entropy": parts((20, 0.4), (40, 0.05))},
        "entropy_fall", "warning", (21, 21, None),
        "Entropy fell from 0.399 to 0.05 nats (0.13 times its baseline) from step 21; no "
        "reward was recorded.",
        {"entropy_start": 0.3991, "entropy_end": 0.05, "entropy_extreme": 0.0481, "ratio":
         0.1253, "predicted_net_dentropy": None},
    ),
    "a hundredfold rise": (
        {"entropy": then(20, 0.02, 2.0)},
        "entropy_explosion", "critical", (21, 21, 21),
        "Entropy rose from 0.02 to 2 nats (100 times its baseline) from step 21 and stays "
        "there; no reward was recorded.",
        {"entropy_start": 0.02, "entropy_end": 2.0, "entropy_extreme": 2.0, "ratio": 100.0,
         "predicted_net_dentropy": None},
    ),
    "a rise from nothing": (
        {"entropy": then(20, 0.0, 0.1)},
        "entropy_explosion", "critical", (21, 21, 21),
        "Entropy rose from 0 to 0.1 nats from step 21 and stays there; no reward was "
        "recorded.",
        {"entropy_start": 0.0, "entropy_end": 0.1, "entropy_extreme": 0.1, "ratio": None,
         "predicted_net_dentropy": None},
    ),
    "a slow rise": (
        {"reward": FLAT, "entropy": ramp(0.4, 1, N, 10, 49)},
        "entropy_explosion", "critical", (20, 28, 44),
        "Entropy rose from 0.4 to 0.969 nats (2.4 times its baseline) from step 20 and "
        "stays there; reward did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.4, "entropy_end": 0.9694, "entropy_extreme": 0.9939, "ratio":
         2.4235, "predicted_net_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3,
         "reward_end": 0.3},
    ),
    "a slow fall": (
        {"reward": FLAT, "entropy": ramp(0.4, 0.04, N, 10, 49)},
        "entropy_collapse", "critical", (25, 39, 55),
        "Entropy fell from 0.4 to 0.0584 nats (0.15 times its baseline) from step 25 and "
        "stays there; reward did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.4, "entropy_end": 0.0584, "entropy_extreme": 0.0437, "ratio":
         0.1459, "predicted_net_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3,
         "reward_end": 0.3},
    ),
    "a slow rise in noise": (
        {"reward": FLAT, "entropy": ramp(0.4, 1.6, N, 10, 49) + 0.06 * WAVE},
        "entropy_explosion", "critical", (19, 20, 27),
        "Entropy rose from 0.385 to 1.6 nats (4.2 times its baseline) from step 19 and "
        "stays there; reward did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.3851, "entropy_end": 1.5993, "entropy_extreme": 1.68, "ratio":
         4.1529, "predicted_net_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3,
         "reward_end": 0.3},
    ),
    "a drop from nothing": (
        {"reward": parts((30, -1), (10, 0), (20, -1)) - CALM[:N]},
        "reward_collapse", "critical", (41, 41, 41),
        "Reward fell from 0.00 at its best to -1.00 from step 41.",
        {"reward_start": -1.0, "reward_peak": 0.0, "reward_end": -1.0, "best_step": 40,
         "lost_share": None},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_all_that_is_told_of_it(tmp_path: Path, case: str) -> None:
    columns, name, severity, steps, message, numbers = TOLD[case]
    found = told(judge(tmp_path, **columns), name)
    assert found is not None
    assert (found.severity, found.message) == (severity, message)
    assert (found.step, found.warned, found.until) == steps
    assert found.evidence == pytest.approx(numbers, abs=6e-5, nan_ok=True)


def levels(*lengths_and_levels: tuple[int, float]) -> np.ndarray:
    """Levels one after the other, exactly."""
    return np.concatenate([np.full(length, float(level)) for length, level in lengths_and_levels])


LOST = levels((60, 0.6), (40, 0.1))
SLOWLY_LOST = np.r_[np.full(40, 0.6), ramp(0.6, 0.1, 60, 0, 20)]
# A finding, its severity, a log with one number in it, a value just inside and one just beyond.
BOUNDS: dict[str, tuple[str, str, Callable[[float], Columns], float, float]] = {
    "form rises by four sigma": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, format=then(40, 0.2, 0.2 + x) + 0.1 * WAVE,
                            correct=FLAT + 0.2), 0.108, 0.109),
    "form rises by a fifth of the most it gave": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, format=then(40, 2, 2 + x), correct=FLAT + 0.2),
        0.498, 0.5),
    "form that stood by the middle rises late enough": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, format=then(int(x), 0.2, 0.8), correct=FLAT + 0.2), 17, 18),
    "content stands within two sigma": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, format=then(40, 0.2, 0.8),
                            correct=then(40, 0.5, 0.5 + x) + 0.05 * WAVE), 0.0028, 0.0024),
    "content stands by a share of the most it gave": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, format=then(40, 0.2, 0.8),
                            correct=np.r_[3, then(40, 2, 2 + x)[1:]]), 0.17, 0.168),
    "or of the share alone": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, format=then(40, 0.2, 0.8),
                            correct=np.r_[3, then(40, 2, 2 + x)[1:]] + CALM[:N]), 0.092, 0.0905),
    "content is unsolved by the most it gave": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, format=then(40, 0.2, 0.8),
                            correct=np.r_[3, np.full(N - 1, x)]), 2.41, 2.39),
    "weights are told where they explain three quarters": ("one_reward_takes_over", "warning",
        lambda x: functions(0.9 + 0.15 * WAVE + 0.5 * CONTENT + x * LONG[:N],
                            format=0.3 + 0.05 * WAVE, correct=CONTENT), 0.1025, 0.101),
    "and four records a function": ("one_reward_takes_over", "warning",
        lambda x: functions((0.9 + 0.06 * WAVE + 0.14 + 0.01 * OTHER)[: int(x)],
                            format=(0.3 + 0.02 * WAVE)[: int(x)],
                            correct=(0.28 + 0.02 * OTHER)[: int(x)]), 7, 8),
    "three fifths are most": ("one_reward_takes_over", "warning",
        lambda x: functions(np.ones(N), format=np.full(N, x), correct=np.full(N, 0.25)),
        0.374, 0.375),
    "content that gained a quarter of it is learned": ("one_reward_takes_over", "warning",
        lambda x: summed(format=0.75 + CALM[:N], correct=then(30, 0.25 - x, 0.25)), 0.251, 0.248),
    "also if two have": ("one_reward_takes_over", "warning",
        lambda x: summed(format=1 + CALM[:N], correct=then(30, 0.2 - x, 0.2),
                         sql=then(20, 0.25 - x, 0.25)), 0.183, 0.179),
    "what pays now has paid for three records": ("one_reward_takes_over", "warning",
        lambda x: summed(format=then(int(x), 0.5, -0.5), correct=0.25 + CALM[:N]), 59, 60),
    "form rises by four sigma of what wanders": ("form_rises_alone", "warning",
        lambda x: functions(FLAT + 0.2, correct=FLAT + 0.2,
                            format=then(40, 0.2, 0.2 + x) + 0.25 * np.sin(np.arange(N) / 3)
                            + 0.02 * WAVE), 0.433, 0.4365),
    "a function that moves at all is not silent": ("reward_function_silent", "info",
        lambda x: functions(FLAT, a=np.r_[FLAT[1:], 0.3 + x], b=FLAT + 0.1 * WAVE), 1e-6, 0),
    "an entropy rises by three sigma": ("entropy_rise", "warning",
        lambda x: {"reward": FLAT, "entropy": np.abs(ramp(1, x, N, 25, 5) + 0.2 * WAVE)},
        1.355, 1.365),
    "by six sigma it explodes": ("entropy_explosion", "critical",
        lambda x: {"reward": FLAT, "entropy": np.abs(ramp(1, x, N, 25, 5) + 0.3 * WAVE)},
        3.37, 3.39),
    "an entropy falls by a factor of three sigma": ("entropy_fall", "warning",
        lambda x: {"reward": FLAT,
                   "entropy": np.abs(ramp(1, x, N, 25, 5) + 0.3 * WAVE * ramp(1, 0.1, N, 25, 5))},
        0.302, 0.3),
    "by a factor of six sigma it collapses": ("entropy_collapse", "critical",
        lambda x: {"reward": FLAT,
                   "entropy": np.abs(ramp(1, x, N, 25, 5) + 0.3 * WAVE * ramp(1, 0.02, N, 25, 5))},
        0.134, 0.131),
    "a loss of the reward is eight records old": ("entropy_collapse", "critical",
        lambda x: {"reward": levels((100 - int(x), 0.6), (int(x), 0.1)),
                   "entropy": levels((40, 0.4), (60, 0.18))}, 7, 8),
    "the entropy has been low since": ("entropy_collapse", "critical",
        lambda x: {"reward": LOST,
                   "entropy": levels((40, 0.4), (53 - int(x), 0.18), (3, 0.3), (4 + int(x), 0.18))},
        1, 2),
    "it has been half at most": ("entropy_collapse", "critical",
        lambda x: {"reward": LOST, "entropy": levels((40, 0.5), (30, 0.25), (30, x))},
        0.2501, 0.25),
    "it does not rise since the reward falls": ("entropy_collapse", "critical",
        lambda x: {"reward": LOST, "entropy": levels((40, 0.4), (30, 0.15), (30, x))},
        0.1501, 0.15),
    "it fell a tenth of the run after the reward at most": ("entropy_collapse", "critical",
        lambda x: {"reward": levels((50, 0.6), (50, 0.1)),
                   "entropy": levels((50 + int(x), 0.4), (50 - int(x), 0.15))}, 10, 9),
    "to half of its baseline": ("entropy_collapse", "critical",
        lambda x: {"reward": LOST, "entropy": levels((40, 0.5), (35, x), (25, 0.12))},
        0.251, 0.25),
    "by a tenth of the run after the reward was lost": ("entropy_collapse", "critical",
        lambda x: {"reward": SLOWLY_LOST, "entropy": levels((int(x), 0.4), (100 - int(x), 0.15))},
        70, 69),
    "it rises since the reward began to fall": ("entropy_collapse", "critical",
        lambda x: {"reward": SLOWLY_LOST,
                   "entropy": levels((30, 0.4), (int(x), 0.14), (70 - int(x), 0.16))}, 30, 29),
    "an entropy that is no longer logged was low by then": ("entropy_collapse", "critical",
        lambda x: {"reward": LOST,
                   "entropy": np.r_[levels((int(x) - 10, 0.4), (10, 0.18)),
                                    np.full(100 - int(x), np.nan)]}, 78, 77),
    "a gain pays for two records more": ("entropy_collapse", "critical",
        lambda x: {"reward": np.r_[ramp(0.2, 0.4, 60 - int(x), 0, 59 - int(x)),
                                   np.full(int(x), 0.4)] + 0.003 * WAVE,
                   "entropy": parts((20, 0.4), (40, 0.06))}, 14, 15),
    "a rise of little entropy": ("entropy_explosion", "critical",
        lambda x: {"reward": FLAT, "entropy": ramp(0.02, x, N, 20, 15)}, 0.0699, 0.0701),
}  # fmt: skip


@pytest.mark.parametrize("case", BOUNDS)
def test_it_begins_at_its_bound(tmp_path: Path, case: str) -> None:
    name, severity, columns, inside, beyond = BOUNDS[case]
    within = told(judge(tmp_path / "inside", **columns(inside)), name)
    found = told(judge(tmp_path / "beyond", **columns(beyond)), name)
    assert within is None or within.severity != severity
    assert found is not None
    assert found.severity == severity


LATE_LOSS = np.r_[np.full(88, 0.6), 0.1, 0.1]
STOOD_LOWER = np.r_[parts((70, 0.6), (20, 0.44)), 0.1, 0.1]


@pytest.mark.parametrize(
    ("reward", "more", "names"),
    [
        (LATE_LOSS, {}, []),
        (LATE_LOSS, {"clip_low": np.full(90, 0.3)}, ["reward_collapse", "clip_saturation_low"]),
        (LATE_LOSS, {"length": np.repeat([100, 300], [40, 50])}, ["length_drift"]),
        (LATE_LOSS, {"grad_norm": np.r_[np.ones(30), 3.2, np.ones(59)]}, ["gradient_spikes"]),
        (STOOD_LOWER, {}, ["reward_drop"]),
        (STOOD_LOWER, {"clip_low": np.full(92, 0.3)}, ["reward_collapse", "clip_saturation_low"]),
    ],
)
def test_two_records_are_a_loss_where_a_warning_says_that_the_steps_are_too_large(
    tmp_path: Path, reward: np.ndarray, more: Columns, names: list[str]
) -> None:
    found = judge(tmp_path, reward=reward, **more).findings
    assert [f.name for f in found] == names
    assert all(f.step == len(reward) - 1 for f in found if f.name == "reward_collapse")


NOTHING_TOLD = {
    "one function alone": ("one_reward_takes_over", functions(FLAT, format=FLAT)),
    "functions that pay nothing": (
        "one_reward_takes_over", functions(np.zeros(N), format=np.zeros(N), correct=np.zeros(N))),
    "functions that pay nothing any more": (
        "one_reward_takes_over",
        functions(np.zeros(N), format=then(30, 0.2, 0), correct=then(30, 0.2, 0))),
    "content that pays more than form": (
        "one_reward_takes_over",
        functions(np.ones(N), format=np.full(N, 0.2), correct=np.full(N, 0.8))),
    "one content that is rare, and one that is not": (
        "one_reward_takes_over",
        functions(FLAT, format=np.ones(N), correct=np.full(N, 0.4), sql=np.full(N, 0.1))),
    "form alone": (
        "form_rises_alone", functions(FLAT, format=then(40, 0.2, 0.8), xml=then(40, 0.2, 0.8))),
    "form that has taken over": (
        "form_rises_alone",
        summed(format=then(40, 0.2, 0.8), correct=0.25 + CALM[:N])),
    "content of which a part rises": (
        "form_rises_alone",
        functions(FLAT, format=then(40, 0.2, 0.8), correct=then(40, 0.2, 0.8), sql=FLAT)),
    "a plateau that is solved": ("plateau", {"reward": ramp(0.2, 0.9, 100, 5, 20)}),
    "a reward that never rose": ("plateau", {"reward": np.full(100, 0.4)}),
    "a first record below all others": ("plateau", {"reward": np.r_[0.2, np.full(99, 0.6)]}),
    "a reward that fell a little": (
        "plateau",
        {"reward": np.r_[ramp(0.2, 0.7, 140, 5, 15), np.full(60, 0.66)] + CALM}),
    "a reward that still gains": (
        "plateau",
        {"reward": ramp(0.2, 0.5, 300, 5, 50) + ramp(0, 0.047, 300, 200, 99)
         + 0.05 * np.random.default_rng(12).normal(0, 1, 300)}),
}  # fmt: skip


@pytest.mark.parametrize("case", NOTHING_TOLD)
def test_nothing_is_told_of_it(tmp_path: Path, case: str) -> None:
    name, columns = NOTHING_TOLD[case]
    assert told(judge(tmp_path, **columns), name) is None


def test_of_two_forms_the_one_that_rose_most_is_named(tmp_path: Path) -> None:
    noisy, clear = then(40, 0.2, 0.5) + 0.04 * WAVE, then(40, 0.2, 0.8)
    columns = functions(FLAT + 0.2, format=noisy, xml=clear, correct=FLAT + 0.2)
    found = told(judge(tmp_path, **columns), "form_rises_alone")
    assert found is not None
    assert found.evidence["function"] == "xml"


@pytest.mark.parametrize("reward", [parts((60, 0.6), (30, 0.1)), None])
def test_a_loss_that_is_clear_needs_no_other_warning(
    tmp_path: Path, reward: np.ndarray | None
) -> None:
    columns = {} if reward is None else {"reward": reward}
    found = judge(tmp_path, **columns, clip_low=np.full(90, 0.3)).findings
    lost = [] if reward is None else [("reward_collapse", 61)]
    assert [(f.name, f.step) for f in found] == [*lost, ("clip_saturation_low", 1)]


def test_an_entropy_that_is_logged_after_the_loss_alone_did_not_fall_before(tmp_path: Path) -> None:
    entropy = np.r_[np.full(75, np.nan), levels((10, 0.4), (15, 0.15))]
    names = [f.name for f in judge(tmp_path, reward=LOST, entropy=entropy).findings]
    assert "entropy_fall" in names
    assert "entropy_collapse" not in names


def test_a_fall_that_is_paid_is_judged_from_eight_records_on(tmp_path: Path) -> None:
    reward, entropy = np.linspace(0.2, 0.8, 9), levels((3, 0.4), (6, 0.06))
    for count in (8, 9):
        d = judge(tmp_path / str(count), reward=reward[:count], entropy=entropy[:count])
        (found,) = [f for f in d.findings if f.name.startswith("entropy")]
        assert (found.name, found.severity) == ("entropy_decline", "info")
        assert str(found.advice).startswith("Normal while the reward rises")


def test_a_function_that_varies_within_a_step_is_not_silent(tmp_path: Path) -> None:
    columns = functions(FLAT, a=FLAT, b=FLAT + 0.1 * WAVE)
    d = judge(tmp_path, **columns, **{"rewards/a/std": np.full(N, 0.1)})
    assert told(d, "reward_function_silent") is None
    d = judge(tmp_path / "still", **columns, **{"rewards/a/std": np.zeros(N)})
    assert told(d, "reward_function_silent") is not None


def test_a_little_more_of_little_entropy_is_no_rise(tmp_path: Path) -> None:
    assert not judge(tmp_path / "up", reward=FLAT, entropy=ramp(0.02, 0.069, N, 20, 15)).findings
    none = judge(tmp_path / "none", reward=FLAT, entropy=np.zeros(N))
    assert not none.findings, "what was nothing all along"
