"""The performance goals as data: what is measured, what must hold, what is aimed at."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from wapo_analysis.bench.harness import Measure

Verdict = Literal["stretch", "target", "pass", "falls short", "not run"]
Unit = Literal["x", "%", "bytes", "rel", "count", "MB"]


@dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes
    ----------
    id : str
        Number, with a letter where one has two parts.
    key : str
        Measure it is judged by.
    must, target, stretch : float
        Bounds: floor that must hold, aim, and best that is thought possible.
    name : str
        Quantity in words.
    how : str
        What exactly is compared.
    unit : str
        x ratio, % share, bytes, rel relative error, count, MB.
    more_is_better : bool
        The bounds are lower bounds.
    gpu : bool
        Needs a GPU; measured by experiments/gpu_bench.py.
    """

    id: str
    key: str
    must: float
    target: float
    stretch: float
    name: str
    how: str
    unit: Unit = "x"
    more_is_better: bool = False
    gpu: bool = False

    def verdict(self, value: float | None) -> Verdict:
        """Highest bound that a value reaches."""
        if value is None:
            return "not run"
        if self._reaches(value, self.stretch):
            return "stretch"
        if self._reaches(value, self.target):
            return "target"
        return "pass" if self._reaches(value, self.must) else "falls short"

    def _reaches(self, value: float, bound: float) -> bool:
        return value >= bound if self.more_is_better else value <= bound


# fmt: off
GOALS: tuple[Goal, ...] = (
    Goal("1", "stats_time_vs_reference", 0.35, 0.25, 0.15,
         "statistics from float32 logits, time / official three passes",
         "all statistics against logp, entropy and sum p^2 of the official passes; worse of "
         "V=49152 and 151936"),
    Goal("1-bf16", "stats_time_vs_reference_bf16", 0.35, 0.25, 0.15,
         "statistics from bfloat16 logits, time / official three passes",
         "all statistics against logp, entropy and sum p^2 of the official passes; worse of "
         "V=49152 and 151936"),
    Goal("1-kept", "stats_time_vs_reference_kept", 0.35, 0.25, 0.15,
         "the same, float32, in a process that keeps freed memory",
         "the official passes at their best: no page faults for their temporaries"),
    Goal("1-kept-bf16", "stats_time_vs_reference_bf16_kept", 0.35, 0.25, 0.15,
         "the same, bfloat16, in a process that keeps freed memory",
         "the official passes at their best: no page faults for their temporaries"),
    Goal("2", "stats_time_vs_logp_only", 2.5, 2, 1,
         "the same, float32, / log-probability alone",
         "against TRL's selective log-softmax, which gives logp and nothing else"),
    Goal("2-bf16", "stats_time_vs_logp_only_bf16", 2.5, 2, 1,
         "the same, bfloat16, / log-probability alone",
         "against TRL's selective log-softmax, which gives logp and nothing else"),
    Goal("3a", "stats_time_vs_read", 10, 8, 5,
         "the same, float32, / one read of the logits",
         "against a sum over the logits, the floor of anything that reads them"),
    Goal("3a-bf16", "stats_time_vs_read_bf16", 10, 8, 5,
         "the same, bfloat16, / one read of the logits",
         "against a sum over the logits, the floor of anything that reads them"),
    Goal("3b", "compiled_time_vs_read", 6, 5, 3,
         "compiled statistics, float32, / one read",
         'backend="compile" against the same floor'),
    Goal("3b-bf16", "compiled_time_vs_read_bf16", 6, 5, 3,
         "compiled statistics, bfloat16, / one read",
         'backend="compile" against the same floor'),
    Goal("4", "stats_extra_memory_vs_logits", 0.1, 0.05, 0.027,
         "extra peak memory / logits",
         "fresh process, above the inputs; the official passes need 3.0"),
    Goal("5a", "capture_overhead_full", 0.05, 0.03, 0.02,
         "passive watching, full rows, share of a micro-step",
         "statistics beside the trainer's logp, recorder and writer thread, in CPU time of a "
         "step of a 135M model", unit="%"),
    Goal("5b", "capture_overhead_class_totals", 0.03, 0.025, 0.02,
         "passive watching, class totals only",
         "the same with token_every=0", unit="%"),
    Goal("6", "fused_head_vs_no_capture", 1.15, 1.05, 0.9,
         "fused head with statistics / head without capture",
         "forward and backward, against materialised logits and selective log-softmax"),
    Goal("7", "fused_head_working_memory_vs_logits", 0.6, 0.3, 0.25,
         "fused head, working memory / logits",
         "fresh process, forward and backward at 512 x 151936, returned gradients left out"),
    Goal("8a", "max_rel_error", 0.0001, 1e-05, 2e-06,
         "greatest relative error of logp, H, g, B",
         "against float64 on the same logits, every token", unit="rel"),
    Goal("8b", "sign_errors", 0, 0, 0,
         "wrong signs of B, the entropy change",
         "no token left out", unit="count"),
    Goal("9", "passive_differing_weights", 0, 0, 0,
         "weights changed by passive watching",
         "bitwise, training with and without a recorder", unit="count"),
    Goal("10", "gpu_stats_vs_copy_floor", 2, 1.6, 1.25,
         "GPU: statistics / one read at copy bandwidth",
         "16384 x 151936 bf16, bytes over the copy rate of the same run", gpu=True),
    Goal("11a", "gpu_speedup_vs_reference", 8, 10, 14,
         "GPU: official passes / ours",
         "official passes on torch operations", more_is_better=True, gpu=True),
    Goal("11b", "gpu_speedup_vs_reference_trl", 4, 5, 7,
         "GPU: official passes with TRL's kernels / ours",
         "TRL's Triton kernels in place of its two calls", more_is_better=True, gpu=True),
    Goal("12", "gpu_extra_memory_mb", 64, 8, 1,
         "GPU: extra memory of the statistics",
         "above inputs, 16384 x 151936", unit="MB", gpu=True),
    Goal("13a", "gpu_share_1b", 0.01, 0.005, 0.003,
         "GPU: share of a micro-step, 1.5B",
         "Qwen2-1.5B shape, bf16", unit="%", gpu=True),
    Goal("13b", "gpu_share_05b", 0.025, 0.015, 0.01,
         "GPU: share of a micro-step, 0.5B",
         "Qwen2-0.5B shape, bf16", unit="%", gpu=True),
    Goal("14", "gpu_fused_head_stats_vs_plain", 1.1, 1.05, 1.02,
         "GPU: fused head with / without statistics",
         "forward and backward", gpu=True),
    Goal("15", "topk_extra_vs_stats", 0.8, 0.5, 0.4,
         "exact top-20, extra time / statistics",
         "what topk=20 adds"),
    Goal("16a", "store_rows_per_s_vs_npz", 4, 7, 15,
         "token rows written per second / compressed npz",
         "one step of 32768 tokens; ours goes to disk and is fsynced", more_is_better=True),
    Goal("16b", "store_rows_per_s_vs_jsonl", 12, 20, 40,
         "token rows written per second / JSON lines",
         "one object per sequence", more_is_better=True),
    Goal("17", "store_bytes_per_token", 30, 22, 18,
         "bytes on disk per token",
         "all columns but the scores after the update", unit="bytes"),
    Goal("18", "commit_vs_official_plots", 0.05, 0.02, 0.01,
         "commit of a step / official per-step figures",
         "wall time with fsync, against eight figures"),
    Goal("19a", "summary_time_vs_pandas", 0.3, 0.25, 0.15,
         "class summary, time / pandas",
         "by step and class, pyarrow alone"),
    Goal("19a-kept", "summary_time_vs_pandas_kept", 0.3, 0.25, 0.15,
         "the same in a process that keeps freed memory",
         "pandas at its best: no page faults for its whole columns"),
    Goal("19b", "summary_memory_vs_pandas", 0.5, 0.3, 0.05,
         "class summary, peak memory / pandas",
         "fresh processes, same files"),
    Goal("20a", "class_gradients_vs_step", 3.3, 3, 2.4,
         "gradients of four classes / plain step",
         "forward and four backward passes against one of each"),
    Goal("20b", "class_gradients_amortised", 0.12, 0.1, 0.07,
         "the same every 20 updates, share of training",
         "on top of the trainer's own backward pass", unit="%"),
    Goal("21", "jvp_vs_forward", 6, 5, 3.5,
         "JVP of all logits / forward without gradient",
         "torch.func.jvp, eager attention"),
)
# fmt: on


def judge(measures: Mapping[str, Measure]) -> list[dict[str, Any]]:
    """Every goal with what was measured and the verdict, as plain values for JSON."""
    rows = []
    for goal in GOALS:
        found = measures.get(goal.key)
        rows.append(
            {
                **asdict(goal),
                "measured": found.value if found else None,
                "low": found.low if found else None,
                "high": found.high if found else None,
                "case": found.note if found else "",
                "verdict": goal.verdict(found.value if found else None),
            }
        )
    return rows


def counts(rows: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """How many goals have each verdict."""
    names: tuple[Verdict, ...] = ("stretch", "target", "pass", "falls short", "not run")
    return {name: sum(row["verdict"] == name for row in rows) for name in names}
