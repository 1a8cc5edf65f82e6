"""The numbers of the page, in its order: what each is and what exactly is compared."""

from dataclasses import dataclass
from typing import Literal

Unit = Literal["x", "%", "bytes", "rel", "count", "MB", "s", "ms", "ns"]


@dataclass(frozen=True)
class Number:
    """One row of the page.

    Attributes
    ----------
    key : str
        Measure it shows.
    name : str
        Quantity in words.
    how : str
        What exactly is compared.
    unit : str
        x ratio, % share, bytes, rel relative error, count, MB; s, ms, ns of this machine.
    """

    key: str
    name: str
    how: str
    unit: Unit = "x"

    @property
    def gpu(self) -> bool:
        """Whether it needs a GPU; measured by `experiments.bench.gpu`."""
        return self.key.startswith("gpu_")


_PASSES = (
    "all statistics against logp, entropy and sum p^2 of the official passes; worse of "
    "V=49152 and 151936"
)
_KEPT = "the official passes at their best: no page faults for their temporaries"
_LOGP = "against TRL's selective log-softmax, which gives logp and nothing else"
_READ = "against a sum over the logits, the floor of anything that reads them"

# fmt: off
NUMBERS: tuple[Number, ...] = (
    Number("stats_time_vs_reference",
           "statistics from float32 logits, time / official three passes", _PASSES),
    Number("stats_time_vs_reference_bf16",
           "statistics from bfloat16 logits, time / official three passes", _PASSES),
    Number("stats_time_vs_reference_kept",
           "statistics, float32, memory kept, time / official three passes", _KEPT),
    Number("stats_time_vs_reference_bf16_kept",
           "statistics, bfloat16, memory kept, time / official three passes", _KEPT),
    Number("stats_time_vs_logp_only",
           "statistics, float32, time / log-probability alone", _LOGP),
    Number("stats_time_vs_logp_only_bf16",
           "statistics, bfloat16, time / log-probability alone", _LOGP),
    Number("widening_time_vs_logp_only_bf16",
           "bfloat16 made float32 twice, time / log-probability alone",
           "part of the row above: once for the maxima, once for the sums"),
    Number("stats_time_vs_read", "statistics, float32, time / one read of the logits", _READ),
    Number("stats_time_vs_read_bf16", "statistics, bfloat16, time / one read of the logits", _READ),
    Number("compiled_time_vs_read", "compiled statistics, float32, time / one read",
           'backend="compile" against the same floor'),
    Number("compiled_time_vs_read_bf16", "compiled statistics, bfloat16, time / one read",
           'backend="compile" against the same floor'),
    Number("sweeps_time_vs_read", "two compiled sweeps alone, float32, time / one read",
           "block maxima, then one sum of exponentials: what exact maxima leave at least"),
    Number("sweeps_time_vs_read_bf16", "two compiled sweeps alone, bfloat16, time / one read",
           "the same"),
    Number("exponential_time_vs_read", "one exponential a logit, float32, time / one read",
           "exp2 of each logit into a buffer in cache, and nothing else"),
    Number("exponential_time_vs_read_bf16", "one exponential a logit, bfloat16, time / one read",
           "the same"),
    Number("stats_extra_memory_vs_logits", "statistics, extra peak memory / logits",
           "fresh process, above the inputs; the official passes need 3.0"),
    Number("capture_overhead_full", "passive watching, full rows, share of a micro-step",
           "statistics beside the trainer's logp, recorder and writer thread, in CPU time of a "
           "step of a 135M model", "%"),
    Number("capture_overhead_class_totals",
           "passive watching, class totals only, share of a micro-step",
           "the same with token_every=0", "%"),
    Number("fused_head_vs_no_capture", "fused head with statistics / head without capture",
           "float32, logits kept; forward and backward, against materialised logits and selective "
           "log-softmax"),
    Number("fused_head_again_vs_no_capture", "fused head, logits made again / head without capture",
           "float32, where logits would take more than a 32nd of the memory"),
    Number("fused_head_vs_no_capture_bf16", "fused head, bfloat16 / head without capture",
           "logits kept, rounded to bfloat16; forward and backward"),
    Number("fused_head_working_memory_vs_logits", "fused head, working memory / logits",
           "logits made again; fresh process, forward and backward at 512 x 151936, returned "
           "gradients left out"),
    Number("fused_head_kept_working_memory_vs_logits", "fused head, working memory, logits kept",
           "the same, over the size of the logits"),
    Number("max_rel_error", "greatest relative error of logp, H, g, B",
           "against float64 on the same logits, every token", "rel"),
    Number("sign_errors", "wrong signs of B, the entropy change", "no token left out", "count"),
    Number("passive_differing_weights", "weights changed by passive watching",
           "bitwise, training with and without a recorder", "count"),
    Number("gpu_stats_vs_copy_floor", "GPU: statistics / one read at copy bandwidth",
           "16384 x 151936 bf16, bytes over the copy rate of the same run"),
    Number("gpu_speedup_vs_reference", "GPU: official passes / ours",
           "official passes on torch operations"),
    Number("gpu_speedup_vs_reference_trl", "GPU: official passes with TRL's kernels / ours",
           "TRL's Triton kernels in place of its two calls"),
    Number("gpu_extra_memory_mb", "GPU: extra memory of the statistics",
           "above inputs, 16384 x 151936", "MB"),
    Number("gpu_share_1b", "GPU: share of a micro-step, 1.5B", "Qwen2-1.5B shape, bf16", "%"),
    Number("gpu_share_05b", "GPU: share of a micro-step, 0.5B", "Qwen2-0.5B shape, bf16", "%"),
    Number("gpu_fused_head_stats_vs_plain", "GPU: fused head with / without statistics",
           "forward and backward"),
    Number("topk_extra_vs_stats", "exact top-20, extra time / statistics", "what topk=20 adds"),
    Number("store_rows_per_s_vs_npz", "token rows written per second / compressed npz",
           "one step of 32768 tokens; ours goes to disk and is fsynced"),
    Number("store_rows_per_s_vs_jsonl", "token rows written per second / JSON lines",
           "one object per sequence"),
    Number("store_bytes_per_token", "bytes on disk per token",
           "all columns but the scores after the update", "bytes"),
    Number("commit_vs_official_plots", "commit of a step / official per-step figures",
           "wall time with fsync, against eight figures"),
    Number("summary_time_vs_pandas", "class summary, time / pandas",
           "by step and class, pyarrow alone"),
    Number("summary_time_vs_pandas_kept", "class summary, memory kept, time / pandas",
           "pandas at its best: no page faults for its whole columns"),
    Number("summary_memory_vs_pandas", "class summary, peak memory / pandas",
           "fresh processes, same files"),
    Number("class_gradients_vs_step", "gradients of four classes / plain step",
           "forward and four backward passes against one of each"),
    Number("class_gradients_amortised", "class gradients every 20 updates, share of training",
           "on top of the trainer's own backward pass", "%"),
    Number("jvp_vs_forward", "JVP of all logits / forward without gradient",
           "torch.func.jvp, eager attention"),
    Number("head_products_vs_no_capture", "four matrix products alone / head without capture",
           "float32; what recomputing the logits costs by itself, without a statistic"),
    Number("head_products_vs_no_capture_bf16",
           "four matrix products alone, bfloat16 / head without capture", "the same"),
    Number("totals_ns_per_row", "derived columns and class totals, ns a row",
           "in blocks of rows, as the writer thread makes them", "ns"),
    Number("totals_blocks_vs_whole", "class totals in blocks / of all rows at once",
           "the same rows derived and summed up without blocks"),
    Number("summary_duckdb_vs_sql", "class summary by DuckDB / plain SQL",
           "SQL with 1 - p as it stands and no checksum verified, the same files"),
    Number("summary_verify_vs_sql", "checksums of these files alone / plain SQL",
           "part of the row above: reading every byte once more"),
    Number("diagnose_cpu_seconds", "wapo diagnose, CPU seconds", "the whole command", "s"),
    Number("diagnose_vs_import_pandas", "wapo diagnose / import pandas",
           "CPU time of the whole command over that of one of its imports"),
    Number("train_start_cpu_seconds", "start of wapo train, CPU seconds",
           "imports and loading, until the first step", "s"),
    Number("train_start_vs_bare", "start of wapo train / transformers alone",
           "a script that imports torch and loads the same model and tokenizer"),
    Number("figures_cpu_seconds", "wapo figures, all, CPU seconds", "the whole command", "s"),
    Number("report_cpu_seconds", "wapo report, CPU seconds", "the whole command", "s"),
    Number("large_step_cpu_seconds", "wapo diagnose --step, CPU seconds",
           "a step of 4 million token rows", "s"),
    Number("large_step_peak_mb", "wapo diagnose --step, peak memory, MB",
           "resident memory of the process, libraries included", "MB"),
    Number("finish_step_ms", "training thread blocked by a step, ms",
           "steps faster than the disk; median, least and longest of 20 steps", "ms"),
)
# fmt: on
