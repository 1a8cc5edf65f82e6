"""Peak memory of one variant above its inputs, each variant in a fresh process.

Run as a module it measures the variant its arguments name and writes JSON.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from experiments.bench.harness import Measure, Measures, Work, in_fresh_process, peak_bytes
from experiments.bench.options import Options
from experiments.bench.reference import pandas_summary, three_pass, trl_selective
from wapo_analysis.stats import fused_head_stats, token_stats

_ROWS, _VOCABULARY, _WIDTH = 256, 151_936, 896
_HEAD_ROWS = 512  # the size the page names
_MODULE = "experiments.bench.memory"


def measure(options: Options) -> Measures:
    """Extra memory of the statistics and, in a full bench, of the fused head."""
    rows = options.size(_ROWS)
    shape = [str(rows), str(_VOCABULARY)]
    options.say(f"memory: statistics of {rows} x {_VOCABULARY}, two fresh processes")
    ours, official = (_extra("stats", name, shape) for name in ("ours", "official"))
    note = f"{rows} x {_VOCABULARY} float32"
    logits = rows * _VOCABULARY * 4
    found = {
        "stats_extra_memory_vs_logits": Measure(ours / logits, note=note),
        "stats_extra_memory_vs_reference": Measure(ours / official, note=note),
        "reference_extra_memory_vs_logits": Measure(official / logits, note=note),
        "stats_extra_memory_mb": Measure(ours / 2**20, note=note),
    }
    return found if options.quick else found | _head(options)


def _head(options: Options) -> Measures:
    """Working memory of the fused head, forward and backward, without the gradients it returns."""
    rows = options.size(_HEAD_ROWS)
    options.say(f"memory: head of {_VOCABULARY} x {_WIDTH}, three fresh processes")
    shape = [str(rows), str(_VOCABULARY)]
    returned = (_VOCABULARY + rows) * _WIDTH * 4
    logits = rows * _VOCABULARY * 4
    note = f"{rows} x {_VOCABULARY}, width {_WIDTH}, float32"
    found = {}
    variants = {"fused_head": "again", "fused_head_kept": "ours", "materialised_head": "official"}
    for key, name in variants.items():
        working = max(0, _extra("head", name, shape) - returned)
        found[f"{key}_working_memory_vs_logits"] = Measure(working / logits, note=note)
    return found


def summary_peaks(folder: Path, options: Options) -> Measures:
    """Peak memory of the class summary, ours and pandas', over the same token files."""
    options.say("memory: class summary, two fresh processes")
    ours, pandas = (_extra("summary", name, [str(folder)]) for name in ("ours", "official"))
    note = f"{pandas / 2**20:.0f} MiB with pandas"
    return {"summary_memory_vs_pandas": Measure(ours / pandas, note=note)}


def _extra(kind: str, variant: str, arguments: Sequence[str]) -> int:
    return int(in_fresh_process(_MODULE, [kind, variant, *arguments])["bytes"])


def _stats_work(variant: str, rows: int, vocabulary: int) -> Work:
    logits, targets = _given(rows, vocabulary)
    run = three_pass if variant == "official" else token_stats

    def work() -> None:
        with torch.no_grad():
            run(logits, targets, 1.0)

    return work


def _head_work(variant: str, rows: int, vocabulary: int) -> Work:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, _WIDTH, generator=draw, requires_grad=True)
    weight = torch.randn(vocabulary, _WIDTH, generator=draw, requires_grad=True)
    targets = torch.randint(vocabulary, (rows,), generator=draw)

    def work() -> tuple[Tensor, ...]:
        if variant == "official":
            logp = trl_selective(hidden @ weight.T, targets)
        else:
            rows_at_once = 256 if variant == "again" else None
            logp = fused_head_stats(hidden, weight, targets, chunk_rows=rows_at_once).logp
        return torch.autograd.grad(logp.sum(), (hidden, weight))

    return work


def _given(rows: int, vocabulary: int) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, vocabulary, generator=draw)
    return logits, torch.randint(vocabulary, (rows,), generator=draw)


def _summary_work(variant: str, folder: Path) -> Work:
    from wapo_analysis.store.summary import class_summary

    files = sorted(folder.glob("*.parquet"))
    if variant == "official":
        return lambda: pandas_summary(files, 1.0)
    return lambda: class_summary(files, 1.0, engine="pyarrow")


def main(arguments: Sequence[str]) -> None:
    """Measure ``stats|head VARIANT ROWS VOCABULARY`` or ``summary VARIANT FOLDER``.

    Code and thread pools are loaded by a small case first, so that they are not counted.
    """
    kind, variant, *rest = arguments
    torch.set_num_threads(1)
    if kind == "summary":
        work = _summary_work(variant, Path(rest[0]))
    else:
        make = {"stats": _stats_work, "head": _head_work}[kind]
        make(variant, 8, 1024)()
        work = make(variant, int(rest[0]), int(rest[1]))
    sys.stdout.write(json.dumps({"bytes": peak_bytes(work)}))


if __name__ == "__main__":
    main(sys.argv[1:])
