"""The GPU rows of the page on one GPU, in one command of under ten minutes, without a network.

Errors of the Triton kernel and of the plain blocks against float64, the copy rate of this GPU, the
statistics against the official three passes (with and without TRL's Triton kernels), the fused
head, and the share of a whole micro-step of models shaped like Qwen2-0.5B and -1.5B with random
weights. Times are CUDA events; variants take turns. Uses trl where it is installed.

    python -m experiments.bench.gpu --out gpu_results.json
    python -m experiments.bench.gpu --device cpu --tiny      # the same code on a CPU, small

From the top folder; in a bare checkout set PYTHONPATH=taxonomy first.

`python -m experiments.bench --gpu-results gpu_results.json` puts the numbers on the page.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.bench.data import rlvr_rows
from experiments.bench.errors import gate
from experiments.bench.harness import (
    Clock,
    Measure,
    Measures,
    Work,
    cpu_clock,
    cuda_clock,
    interleave,
    machine,
    peak_bytes,
    release_memory,
)
from experiments.bench.head import Head
from experiments.bench.micro_step import MicroStep, Shape, Watcher
from experiments.bench.reference import exact_stats, three_pass, trl_selective
from wapo_analysis.stats import token_stats

QWEN_05B = Shape(151_936, 896, 4864, 24, 14, 2, "Qwen2-0.5B")
QWEN_15B = Shape(151_936, 1536, 8960, 28, 12, 2, "Qwen2-1.5B")
TINY = Shape(512, 64, 128, 2, 4, 2, "tiny")


@dataclass(frozen=True)
class Sizes:
    """How large each part is."""

    sequences: int = 16
    tokens: int = 1024
    vocabulary: int = 151_936
    checked_rows: int = 1024
    head_rows: int = 8192
    head_width: int = 1536
    rounds: int = 10
    steps: int = 8
    batch: int = 8
    length: int = 1024
    models: tuple[tuple[str, Shape], ...] = (
        ("gpu_share_05b", QWEN_05B),
        ("gpu_share_1b", QWEN_15B),
    )


SMALL = Sizes(4, 16, 512, 64, 64, 32, 2, 2, 2, 16, (("gpu_share_05b", TINY),))


@dataclass(frozen=True)
class Bench:
    """Device and sizes of one run."""

    device: str
    sizes: Sizes

    @property
    def clock(self) -> Clock:
        """CUDA events on a GPU, CPU time elsewhere."""
        return cuda_clock if self.on_gpu else cpu_clock

    @property
    def on_gpu(self) -> bool:
        """Whether this is a GPU."""
        return self.device == "cuda"

    @property
    def backends(self) -> tuple[str, ...]:
        """Backends that run here, the default one first."""
        return ("triton", "eager") if self.on_gpu and find_spec("triton") else ("eager",)


def errors(bench: Bench) -> Measures:
    """Errors of every backend in bf16 and f32, with padded columns and T != 1; all must pass."""
    found: Measures = {}
    for dtype in (torch.float32, torch.bfloat16):
        for temperature, padded in ((1.0, 0), (0.7, 64)):
            rows = rlvr_rows(
                bench.sizes.checked_rows, bench.sizes.vocabulary, dtype=dtype, device=bench.device
            )
            logits = _padded(rows.logits, padded)
            exact = exact_stats(logits, rows.targets, temperature)
            for backend in bench.backends:
                stats = token_stats(logits, rows.targets, temperature, backend=backend)
                worst = gate(f"{backend} {dtype} T={temperature}", stats, exact)
                key = f"gpu_error_{backend}"
                if key not in found or worst.worst > found[key].value:
                    note = f"{str(dtype).removeprefix('torch.')}, T={temperature}: {worst}"
                    found[key] = Measure(worst.worst, note=note)
    return found


def _padded(logits: Tensor, columns: int) -> Tensor:
    """Logits with -inf columns at the end, as of a padded vocabulary."""
    fill = torch.full_like(logits[:, :columns], -torch.inf)
    return torch.cat([logits, fill], dim=1)


def statistics(bench: Bench) -> Measures:
    """Copy rate, time and memory of the statistics and of the official passes."""
    sizes = bench.sizes
    rows = sizes.sequences * sizes.tokens
    given = rlvr_rows(rows, sizes.vocabulary, dtype=torch.bfloat16, device=bench.device)
    # As a trainer holds them: the official passes work sequence by sequence.
    logits = given.logits.view(sizes.sequences, sizes.tokens, sizes.vocabulary)
    targets = given.targets.view(sizes.sequences, sizes.tokens)
    variants: dict[str, Work] = {
        "copy": lambda: logits.clone(),
        "official": lambda: three_pass(logits, targets),
        "logp only": lambda: trl_selective(logits, targets),
        **{name: _statistics(logits, targets, name) for name in bench.backends},
    }
    trl_note = "trl is not installed"
    if find_spec("trl") is not None:
        variants["official, trl"], trl_note = _trl_three_pass(logits, targets)
    with torch.no_grad():
        times = interleave(variants, sizes.rounds, bench.clock)
    size, ours = logits.numel() * 2, bench.backends[0]
    read = [seconds / 2 for seconds in times.seconds["copy"]]  # a copy reads and writes
    floor = [own / r for own, r in zip(times.seconds[ours], read, strict=True)]
    note = f"{rows} x {sizes.vocabulary} bf16, backend {ours}"
    found = {
        "gpu_copy_tb_per_s": Measure(2 * size / times.best("copy") / 1e12, note="read and write"),
        "gpu_stats_ms": Measure(times.best(ours) * 1e3, note=note),
        "gpu_official_ms": Measure(times.best("official") * 1e3, note=note),
        "gpu_stats_vs_copy_floor": Measure(sorted(floor)[len(floor) // 2], note=note),
        "gpu_speedup_vs_reference": times.ratio("official", ours, note),
        "gpu_stats_vs_logp_only": times.ratio(ours, "logp only", note),
    }
    for other in bench.backends[1:]:
        found[f"gpu_{other}_vs_{ours}"] = times.ratio(other, ours, note)
    if "official, trl" in variants:
        found["gpu_speedup_vs_reference_trl"] = times.ratio("official, trl", ours, trl_note)
    for key, name in (("gpu_extra_memory_mb", ours), ("gpu_official_memory_mb", "official")):
        extra = _peak(bench, variants[name])
        found[key] = Measure(extra / 2**20, note=note)
    return found


def _statistics(logits: Tensor, targets: Tensor, backend: str) -> Work:
    return lambda: token_stats(logits, targets, backend=backend)


def _trl_three_pass(logits: Tensor, targets: Tensor) -> tuple[Work, str]:
    """Official passes with TRL's own two calls, and which of its paths that is."""
    import trl
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    kernels = logits.is_cuda and find_spec("trl.kernels.logprob_entropy") is not None
    path = "Triton kernels" if kernels else "torch operations"

    def work() -> None:
        scaled = logits / 1.0
        selective_log_softmax(scaled, targets)
        entropy_from_logits(scaled)
        scaled.softmax(dim=-1).pow(2).sum(dim=-1)

    return work, f"trl {trl.__version__}, {path}"


def _peak(bench: Bench, work: Work) -> int:
    """Bytes above those in use before."""
    if not bench.on_gpu:
        return peak_bytes(work)
    release_memory()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.no_grad():
        work()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def head(bench: Bench) -> Measures:
    """Fused head with statistics against materialised logits and, if there, TRL's fused head."""
    sizes = bench.sizes
    made = Head.random(
        sizes.head_rows, sizes.vocabulary, sizes.head_width, torch.bfloat16, bench.device
    )
    variants: dict[str, Work] = {"plain": made.plain, "fused": made.fused}
    if find_spec("trl") is not None and find_spec("trl.kernels.chunked_logprob") is not None:
        variants["trl"] = _trl_head(made)
    times = interleave(variants, sizes.rounds, bench.clock)
    note = f"{sizes.head_rows} x {sizes.vocabulary}, width {sizes.head_width}, bf16"
    found = {"gpu_fused_head_vs_no_capture": times.ratio("fused", "plain", note)}
    if "trl" in variants:
        found["gpu_fused_head_stats_vs_plain"] = times.ratio("fused", "trl", f"TRL's head; {note}")
    return found


def _trl_head(made: Head) -> Work:
    """TRL's fused head without any statistic."""
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    def work() -> tuple[Tensor, ...]:
        logp, *_ = ChunkedLogProbFunction.apply(
            made.hidden, made.weight, None, made.targets, 1.0, 32_768, None, 1.0, ()
        )
        return made.gradients(logp)

    return work


def share(bench: Bench) -> Measures:
    """Share of a whole micro-step: the real recorder with full rows beside the trainer's logp.

    One recorder per model stays open over all steps, its writer thread beside the training as in a
    real run.
    """
    found: Measures = {}
    sizes = bench.sizes
    for key, shape in sizes.models:
        step = MicroStep(shape, sizes.batch, sizes.length, bench.device, torch.bfloat16)
        with tempfile.TemporaryDirectory() as folder:
            watcher = Watcher.into(Path(folder) / "run")
            watcher.closes = False
            arms = {"plain": step.plain, "beside": _beside(step, watcher)}
            times = interleave(arms, sizes.steps, bench.clock)
            watcher.recorder.close("finished")
        note = f"{shape.name} shape, {step.tokens} tokens, bf16, {times.best('plain') * 1e3:.0f} ms"
        found[key] = times.ratio("beside", "plain", note).shifted(-1.0)
        del step, arms
        release_memory()
    return found


def _beside(step: MicroStep, watcher: Watcher) -> Work:
    return lambda: step.beside(watcher)


def facts(device: str) -> dict[str, Any]:
    """Machine, GPU, driver and versions."""
    found = machine()
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
        found["cuda"] = torch.version.cuda
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, check=True)
            found["driver"] = done.stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            found["driver"] = "unknown"
    return found


PARTS: dict[str, Callable[[Bench], Measures]] = {
    "errors": errors,
    "statistics": statistics,
    "head": head,
    "share": share,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="sizes of a test")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated")
    parser.add_argument("--out", type=Path, default=Path("gpu_results.json"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --tiny runs the same code on a CPU")
    bench = Bench(options.device, SMALL if options.tiny else Sizes())
    results: dict[str, Any] = {
        "command": f"python -m experiments.bench.gpu{' --tiny' if options.tiny else ''}",
        "machine": facts(options.device),
        "measures": {},
        "failures": {},
    }
    for name in options.only.split(","):
        print(f"{name} ...", flush=True)
        try:
            found = PARTS[name](bench)
        except Exception as error:  # a gate, no memory, another version of trl: the rest goes on
            results["failures"][name] = f"{type(error).__name__}: {error}"
            print(f"  failed: {results['failures'][name]}", flush=True)
            continue
        finally:
            release_memory()
        for key, measure in found.items():
            print(f"  {key:34} {measure.value:10.4g}  {measure.note}", flush=True)
        results["measures"] |= {key: asdict(measure) for key, measure in found.items()}
        # Written after every part, so that a time limit does not cost what was measured.
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    sys.exit(1 if results["failures"] else 0)


if __name__ == "__main__":
    main()
