"""What is told of a course in full: severity, steps, words and numbers."""

from pathlib import Path

import numpy as np
import pytest

from tests.support.courses import (
    CALM,
    CONTENT,
    FLAT,
    FORMAT,
    GAINS,
    WAVE,
    N,
    functions,
    parts,
    summed,
    then,
    told,
)
from tests.support.step_logs import judge, ramp

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
        "alpha supplies most of the reward from step 1 on, 90% at the end; "
        "beta is rarely earned (beta 0.1).",
        {"function": "alpha", "share": 0.9, "rest": "beta"},
    ),
    "two forms pay": (
        functions(np.full(N, 1.05), format=np.full(N, 0.5), xml=np.full(N, 0.4),
         correct=np.full(N, 0.1), sql=np.full(N, 0.05)),
        "one_reward_takes_over", "warning", (1, None, None),
        "format and xml supply most of the reward from step 1 on, 86% at the end; "
        "correct and sql are rarely"
        " earned (correct 0.1, sql 0.05).",
        {"function": "format and xml", "share": 0.8571, "rest": "correct and sql"},
    ),
    "one of two forms pays": (
        functions(np.ones(N), format=np.full(N, 0.9), xml=np.full(N, 0.1)),
        "one_reward_takes_over", "info", (1, None, None),
        "format supplies most of the reward from step 1 on, 90% at the end; "
        "xml is rarely earned (xml 0.1).",
        {"function": "format", "share": 0.9, "rest": "xml"},
    ),
    "what costs is no part of it": (
        functions(np.zeros(N), format=np.full(N, 0.5), correct=np.full(N, -0.5)),
        "one_reward_takes_over", "warning", (1, None, None),
        "format supplies most of the reward from step 1 on, 100% at the end; "
        "correct is rarely earned "
        "(correct -0.5).",
        {"function": "format", "share": 1.0, "rest": "correct"},
    ),
    "one is logged less often": (
        functions(np.ones(N), format=np.full(N, 0.9), correct=np.where(np.arange(N) % 2, 0.1,
         np.nan)),
        "one_reward_takes_over", "warning", (2, None, None),
        "format supplies most of the reward from step 2 on, 90% at the end; "
        "correct is rarely earned "
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
        "format supplies most of the reward from step 38 on, 62% at the end; "
        "correct is rarely earned "
        "(correct 0.29).",
        {"function": "format", "share": 0.6195, "rest": "correct"},
    ),
    "a weight below nothing is none": (
        functions(FORMAT - CONTENT, format=FORMAT, correct=CONTENT),
        "one_reward_takes_over", "warning", (25, None, None),
        "format supplies most of the reward from step 25 on, 77% at the end; "
        "correct is rarely earned "
        "(correct 0.29).",
        {"function": "format", "share": 0.765, "rest": "correct"},
    ),
    "form pays from a step": (
        summed(format=then(20, 0.2, 0.5), correct=0.25 + CALM[:N]),
        "one_reward_takes_over", "warning", (21, None, None),
        "format supplies most of the reward from step 21 on, 67% at the end; "
        "correct is rarely earned "
        "(correct 0.25).",
        {"function": "format", "share": 0.6667, "rest": "correct"},
    ),
    "an explosion": (
        {"reward": FLAT, "entropy": parts((20, 0.4), (40, 2))},
        "entropy_explosion", "critical", (21, 21, 21),
        "Entropy rose from 0.399 to 2 nats (5 times its baseline) from step 21 and stays "
        "there; reward did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.3991, "entropy_end": 2.0, "entropy_extreme": 2.0015, "ratio":
         5.0114, "predicted_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3,
         "reward_end": 0.3},
    ),
    "a rise while the reward gains": (
        {"reward": GAINS, "entropy": parts((20, 0.4), (40, 2))},
        "entropy_rise", "warning", (21, 21, 21),
        "Entropy rose from 0.399 to 2 nats (5 times its baseline) from step 21; reward rose"
        " from 0.20 to 0.67.",
        {"entropy_start": 0.3991, "entropy_end": 2.0, "entropy_extreme": 2.0015, "ratio":
         5.0114, "predicted_dentropy": None, "reward_start": 0.2, "reward_peak": 0.6864,
         "reward_end": 0.6682},
    ),
    "a rise to what is sound": (
        {"reward": GAINS, "entropy": then(20, 0.1, 0.3)},
        "entropy_rise", "info", (21, 21, 21),
        "Entropy rose from 0.1 to 0.3 nats (3 times its baseline) from step 21; reward rose"
        " from 0.20 to 0.67.",
        {"entropy_start": 0.1, "entropy_end": 0.3, "entropy_extreme": 0.3, "ratio": 3.0,
         "predicted_dentropy": None, "reward_start": 0.2, "reward_peak": 0.6864,
         "reward_end": 0.6682},
    ),
    "a rise that came back": (
        {"reward": GAINS, "entropy": parts((20, 0.1), (20, 0.29), (20, 0.1))},
        "entropy_excursion", "warning", (21, 21, 21),
        "Entropy rose from 0.0991 to 0.291 nats (2.9 times its baseline) from step 21 and "
        "came back; reward rose from 0.20 to 0.67.",
        {"entropy_start": 0.0991, "entropy_end": 0.1, "entropy_extreme": 0.2913, "ratio":
         1.0093, "predicted_dentropy": None, "reward_start": 0.2, "reward_peak": 0.6864,
         "reward_end": 0.6682},
    ),
    "a fall that came back": (
        {"reward": FLAT, "entropy": parts((20, 0.4), (20, 0.05), (20, 0.4))},
        "entropy_excursion", "warning", (21, 21, 21),
        "Entropy fell from 0.399 to 0.0481 nats (0.12 times its baseline) from step 21 and "
        "came back; reward did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.3991, "entropy_end": 0.4, "entropy_extreme": 0.0481, "ratio":
         1.0023, "predicted_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3,
         "reward_end": 0.3},
    ),
    "a rise by half": (
        {"reward": FLAT, "entropy": then(20, 0.5, 0.75)},
        "entropy_rise", "warning", (21, 21, None),
        "Entropy rose from 0.5 to 0.75 nats (1.5 times its baseline) from step 21; reward "
        "did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.5, "entropy_end": 0.75, "entropy_extreme": 0.75, "ratio": 1.5,
         "predicted_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3, "reward_end":
         0.3},
    ),
    "a fall to half": (
        {"reward": FLAT, "entropy": then(20, 0.5, 0.25)},
        "entropy_fall", "warning", (21, 21, None),
        "Entropy fell from 0.5 to 0.25 nats (0.5 times its baseline) from step 21; reward "
        "did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.5, "entropy_end": 0.25, "entropy_extreme": 0.25, "ratio": 0.5,
         "predicted_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3, "reward_end":
         0.3},
    ),
    "a fall to a fifth": (
        {"reward": FLAT, "entropy": then(20, 0.5, 0.1)},
        "entropy_collapse", "critical", (21, 21, 21),
        "Entropy fell from 0.5 to 0.1 nats (0.2 times its baseline) from step 21 and stays "
        "there; reward did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.5, "entropy_end": 0.1, "entropy_extreme": 0.1, "ratio": 0.2,
         "predicted_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3, "reward_end":
         0.3},
    ),
    "a fall that is paid": (
        {"reward": GAINS, "entropy": parts((20, 0.4), (40, 0.15))},
        "entropy_decline", "info", (21, 21, None),
        "Entropy fell from 0.399 to 0.15 nats (0.38 times its baseline) from step 21 as the"
        " policy became certain; reward rose from 0.20 to 0.67.",
        {"entropy_start": 0.3991, "entropy_end": 0.15, "entropy_extreme": 0.1481, "ratio":
         0.3759, "predicted_dentropy": None, "reward_start": 0.2, "reward_peak": 0.6864,
         "reward_end": 0.6682},
    ),
    "a fall without a reward": (
        {"entropy": parts((20, 0.4), (40, 0.05))},
        "entropy_fall", "warning", (21, 21, None),
        "Entropy fell from 0.399 to 0.05 nats (0.13 times its baseline) from step 21; no "
        "reward was recorded.",
        {"entropy_start": 0.3991, "entropy_end": 0.05, "entropy_extreme": 0.0481, "ratio":
         0.1253, "predicted_dentropy": None},
    ),
    "a hundredfold rise": (
        {"entropy": then(20, 0.02, 2.0)},
        "entropy_explosion", "critical", (21, 21, 21),
        "Entropy rose from 0.02 to 2 nats (100 times its baseline) from step 21 and stays "
        "there; no reward was recorded.",
        {"entropy_start": 0.02, "entropy_end": 2.0, "entropy_extreme": 2.0, "ratio": 100.0,
         "predicted_dentropy": None},
    ),
    "a rise from nothing": (
        {"entropy": then(20, 0.0, 0.1)},
        "entropy_explosion", "critical", (21, 21, 21),
        "Entropy rose from 0 to 0.1 nats from step 21 and stays there; no reward was "
        "recorded.",
        {"entropy_start": 0.0, "entropy_end": 0.1, "entropy_extreme": 0.1, "ratio": None,
         "predicted_dentropy": None},
    ),
    "a slow rise": (
        {"reward": FLAT, "entropy": ramp(0.4, 1, N, 10, 49)},
        "entropy_explosion", "critical", (20, 28, 44),
        "Entropy rose from 0.4 to 0.969 nats (2.4 times its baseline) from step 20 and "
        "stays there; reward did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.4, "entropy_end": 0.9694, "entropy_extreme": 0.9939, "ratio":
         2.4235, "predicted_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3,
         "reward_end": 0.3},
    ),
    "a slow fall": (
        {"reward": FLAT, "entropy": ramp(0.4, 0.04, N, 10, 49)},
        "entropy_collapse", "critical", (25, 39, 55),
        "Entropy fell from 0.4 to 0.0584 nats (0.15 times its baseline) from step 25 and "
        "stays there; reward did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.4, "entropy_end": 0.0584, "entropy_extreme": 0.0437, "ratio":
         0.1459, "predicted_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3,
         "reward_end": 0.3},
    ),
    "a slow rise in noise": (
        {"reward": FLAT, "entropy": ramp(0.4, 1.6, N, 10, 49) + 0.06 * WAVE},
        "entropy_explosion", "critical", (19, 20, 27),
        "Entropy rose from 0.385 to 1.6 nats (4.2 times its baseline) from step 19 and "
        "stays there; reward did not clearly change (0.30 to 0.30).",
        {"entropy_start": 0.3851, "entropy_end": 1.5993, "entropy_extreme": 1.68, "ratio":
         4.1529, "predicted_dentropy": None, "reward_start": 0.3, "reward_peak": 0.3,
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
