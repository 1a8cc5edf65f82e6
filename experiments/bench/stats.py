"""Time of the statistics from given logits against the official three passes; one read as floor.

Large temporaries are mapped anew at every call, as a trainer's process does by default, so the
official passes pay for touching three tensors of the logits' size. In one process the layout of its
heap decides by chance whether that happens, so each regime is measured in a process of its own,
which runs this module.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch

from experiments.bench.data import Rows, rlvr_rows
from experiments.bench.errors import gate, gate_close
from experiments.bench.harness import (
    Measure,
    Measures,
    Timings,
    Work,
    in_fresh_process,
    interleave,
    keep_memory,
    map_memory,
    worst,
)
from experiments.bench.options import Options
from experiments.bench.reference import exact_stats, three_pass, trl_selective
from wapo_analysis.stats import TokenStats, token_stats
from wapo_analysis.stats.rows import block_maxima

_CASES = ((512, 49_152), (256, 151_936))
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TOP_K = 20
_LOOSE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # nats; a reference keeps its own rounding
_MODULE = "experiments.bench.stats"
# What statistics with exact maxima begin with, and nothing else; compiled when first called.
_SWEEPS = (
    torch.compile(block_maxima),
    torch.compile(lambda rows: torch.exp2(rows.float()).sum(1)),
)


def measure(options: Options) -> Measures:
    """Ratios at both vocabularies, the worse one of each dtype; keys of bfloat16 end in _bf16.

    A full bench adds, with keys that end in _kept, what a process gives that keeps freed memory.
    """
    dtypes = ["float32"] if options.quick else list(_DTYPES)
    found = _in_process("mapped", dtypes, options)
    if not options.quick:
        kept = _in_process("kept", dtypes, options)
        found |= {f"{key}_kept": kept[key] for key in kept if "vs_reference" in key}
    found["stats_speedup_vs_reference"] = found["stats_time_vs_reference"].inverse()
    return found


def _in_process(memory: str, dtypes: Sequence[str], options: Options) -> Measures:
    """All ratios, measured in a process of its own whose allocator is told what to do."""
    options.say(f"stats: {', '.join(dtypes)}, temporaries {memory}")
    rounds = options.rounds_or(3, 7)
    compiled = "no" if options.quick else "compiled"
    arguments = [memory, compiled, str(rounds), str(options.scale), *dtypes]
    return {key: Measure(**found) for key, found in in_fresh_process(_MODULE, arguments).items()}


def ratios(dtypes: Sequence[str], options: Options) -> Measures:
    """Ratios of all cases in this process, as it is."""
    found: Measures = {}
    for name in dtypes:
        cases = []
        for rows, vocabulary in _CASES:
            given = rlvr_rows(options.size(rows), vocabulary, dtype=_DTYPES[name])
            times = _timed(given, options)
            cases.append(_ratios(times, f"{options.size(rows)} x {vocabulary} {name}"))
        suffix = "" if name == "float32" else "_bf16"
        found |= {f"{key}{suffix}": worst(case[key] for case in cases) for key in cases[0]}
        for case, (_, vocabulary) in zip(cases, _CASES, strict=True):
            found[f"stats_time_vs_reference_{vocabulary}{suffix}"] = case["stats_time_vs_reference"]
    return found


def _timed(given: Rows, options: Options) -> Timings:
    """Times of all variants on the same rows, each one checked before."""
    logits, targets, temperature = given.logits, given.targets, given.temperature
    exact = exact_stats(logits, targets, temperature)

    def ours(topk: int = 0, backend: str = "auto") -> TokenStats:
        return token_stats(logits, targets, temperature, topk=topk, backend=backend)

    blocks, space = logits.split(4), torch.empty_like(logits[:4])
    wide = torch.empty_like(space, dtype=torch.float32)
    variants: dict[str, Work] = {
        "official": lambda: three_pass(logits, targets, temperature),
        "ours": ours,
        "logp only": lambda: trl_selective(logits, targets),
        "read": lambda: [block.sum() for block in blocks],
        "top-k": lambda: ours(topk=_TOP_K),
        "exponential": lambda: [torch.exp2(block, out=space[: len(block)]) for block in blocks],
        "widened": lambda: [wide[: len(block)].copy_(block) for _ in range(2) for block in blocks],
    }
    if not options.quick:
        variants["compiled"] = lambda: ours(backend="compile")
        variants["sweeps"] = lambda: [sweep(part) for sweep in _SWEEPS for part in logits.split(64)]
    with torch.no_grad():
        for name in ("ours", "top-k", "compiled"):
            if name in variants:
                gate(name, variants[name](), exact)
        official = variants["official"]()
        gate_close("official logp", official[0], exact.logp, _LOOSE[logits.dtype])
        gate_close("official entropy", official[1], exact.entropy, _LOOSE[logits.dtype])
        return interleave(variants, options.rounds_or(3, 7))


def _ratios(times: Timings, note: str) -> Measures:
    found = {
        "stats_time_vs_reference": times.ratio("ours", "official", note),
        "stats_time_vs_logp_only": times.ratio("ours", "logp only", note),
        "stats_time_vs_read": times.ratio("ours", "read", note),
        "exponential_time_vs_read": times.ratio("exponential", "read", note),
        "widening_time_vs_logp_only": times.ratio("widened", "logp only", note),
        "topk_extra_vs_stats": times.ratio("top-k", "ours", note).shifted(-1.0),
    }
    if "compiled" in times.seconds:
        found["compiled_time_vs_reference"] = times.ratio("compiled", "official", note)
        found["compiled_time_vs_read"] = times.ratio("compiled", "read", note)
        found["sweeps_time_vs_read"] = times.ratio("sweeps", "read", note)
    return found


def main(arguments: Sequence[str]) -> None:
    """Write all ratios as JSON: ``mapped|kept compiled|no ROUNDS SCALE DTYPE...``."""
    memory, compiled, rounds, scale, *dtypes = arguments
    torch.set_num_threads(1)
    (map_memory if memory == "mapped" else keep_memory)()
    options = Options(quick=compiled == "no", rounds=int(rounds), scale=float(scale))
    found = ratios(dtypes, options)
    sys.stdout.write(json.dumps({key: asdict(measure) for key, measure in found.items()}))


if __name__ == "__main__":
    main(sys.argv[1:])
