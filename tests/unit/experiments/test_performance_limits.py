"""The performance goals that must hold (wapo_analysis/bench/goals.py), at reduced sizes.

Memory and errors do not depend on the load of the machine; ratios of times are checked with
``-m bench``, the best of three tries.
"""

from importlib import import_module
from math import inf

import pytest
import torch

from experiments.bench.harness import Measures, keep_memory
from experiments.bench.options import Options

TRIES = 3


AT_MOST = {
    "stats_time_vs_reference": 0.35,
    "stats_time_vs_reference_bf16": 0.35,
    "stats_time_vs_reference_kept": 0.35,
    "stats_time_vs_reference_bf16_kept": 0.35,
    "stats_time_vs_logp_only": 2.5,
    "stats_time_vs_logp_only_bf16": 2.5,
    "stats_time_vs_read": 10,
    "stats_time_vs_read_bf16": 10,
    "compiled_time_vs_read": 6,
    "compiled_time_vs_read_bf16": 6,
    "stats_extra_memory_vs_logits": 0.1,
    "capture_overhead_full": 0.05,
    "capture_overhead_class_totals": 0.03,
    "fused_head_vs_no_capture": 1.15,
    "fused_head_working_memory_vs_logits": 0.6,
    "max_rel_error": 0.0001,
    "sign_errors": 0,
    "passive_differing_weights": 0,
    "topk_extra_vs_stats": 0.8,
    "store_bytes_per_token": 30,
    "commit_vs_official_plots": 0.05,
    "summary_time_vs_pandas": 0.3,
    "summary_time_vs_pandas_kept": 0.3,
    "summary_memory_vs_pandas": 0.5,
    "class_gradients_vs_step": 3.3,
    "class_gradients_amortised": 0.12,
    "jvp_vs_forward": 6,
}
AT_LEAST = {"store_rows_per_s_vs_npz": 4, "store_rows_per_s_vs_jsonl": 12}


def misses(measures: Measures) -> list[str]:
    """Limited numbers among the measured ones that are beyond their limit."""
    limited = [key for key in (*AT_MOST, *AT_LEAST) if key in measures]
    assert limited, "the area measured nothing that has a limit"
    return [
        f"{key}: {measures[key].value:.3g} ({measures[key].note})"
        for key in limited
        if not AT_LEAST.get(key, -inf) <= measures[key].value <= AT_MOST.get(key, inf)
    ]


def measured(area: str, options: Options) -> Measures:
    found: Measures = import_module(f"experiments.bench.{area}").measure(options)
    return found


@pytest.mark.parametrize("area", ["errors", pytest.param("memory", marks=pytest.mark.slow)])
def test_limits_that_no_load_can_spoil(area: str) -> None:
    assert not misses(measured(area, Options(quick=True, scale=0.5)))


def test_bytes_per_token() -> None:
    measures = measured("store", Options(quick=True, rounds=1))
    assert measures["store_bytes_per_token"].value <= AT_MOST["store_bytes_per_token"]


@pytest.mark.bench
@pytest.mark.parametrize(
    ("area", "quick"),
    [
        ("stats", True),
        ("head", True),
        ("step", True),
        ("store", False),
        ("read", True),
        ("attribution", False),
        ("passive", False),
    ],
)
def test_limits_on_time(area: str, quick: bool) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    keep_memory()
    try:
        tries = []
        for _ in range(TRIES):
            tries.append(misses(measured(area, Options(quick=quick, scale=0.5))))
            if not tries[-1]:
                return
    finally:
        torch.set_num_threads(threads)
    # A limit missed in every try is missed; one that held once was disturbed.
    always = set.intersection(*({miss.split(":")[0] for miss in missed} for missed in tries))
    assert not always, tries[-1]
