r"""Speed, memory, cost and errors of capture: what docs/performance.md shows.

Ratios of programs run side by side, a variant only after its numbers passed a comparison with
float64 on the same inputs. `run` measures the areas, `numbers` names what the page shows,
`reference` holds the programs that are compared with, written anew; `gpu` is the part for one GPU.
From the top folder, about eight minutes on two cores (in a bare checkout set PYTHONPATH=taxonomy
first):

    python -m experiments.bench --model smollm2 --out docs/performance.json
    python -m experiments.bench --quick
    python -m experiments.bench --only waiting,read --rounds 3 --out some.json
    python -m experiments.bench --results docs/performance.json some.json \
        --second docs/performance_second.json --doc docs/performance.md

Progress goes to stderr. Exit code 1: a program gave wrong numbers and was not timed.
"""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Any

from experiments.bench.harness import Measure
from experiments.bench.options import Options
from experiments.bench.page import HEADER, table, to_markdown
from experiments.bench.run import load, merged, run_bench, save
from wapo_analysis.errors import UserError


def main(arguments: list[str]) -> int:
    """Measure or read results, write what was asked for, print the numbers; the exit code."""
    options = _parser().parse_args(arguments)
    gpu = None if options.gpu_results is None else load(options.gpu_results)
    second = None if options.second is None else load(options.second)
    if options.results is not None:
        found = merged([load(file) for file in options.results])
    else:
        given = {name: getattr(options, name) for name in ("rounds", "model", "logits")}
        settings = Options(quick=options.quick, rows=options.rows, say=_progress, **given)
        areas = [area.strip() for area in options.only.split(",") if area.strip()]
        found = run_bench(settings, areas, options.threads, _command(arguments))
    if options.out is not None:
        save(found, options.out)
    if options.doc is not None:
        options.doc.write_text(to_markdown(found, gpu, second), encoding="utf-8")
    _print(found)
    return 1 if found["failures"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer sizes and rounds, under a minute")
    add("--out", type=Path, help="also write the results to this JSON file")
    add("--doc", type=Path, help="also write them as a Markdown page")
    add("--only", default="", help="areas, comma-separated, e.g. stats,memory")
    add("--threads", type=int, default=1, help="CPU threads of torch")
    add("--rounds", type=int, help="rounds of every ratio; by default each area's own")
    add("--rows", type=int, default=20_000_000, help="token rows of the class summary")
    add("--model", help="also measure errors on a rollout of this .gguf file, folder or name")
    add("--logits", type=Path, help="also measure errors on recorded logits (.npz)")
    add("--gpu-results", type=Path, help="results of experiments.bench.gpu, for the page")
    add("--second", type=Path, help="results of some areas on another processor, for the page")
    add("--results", type=Path, nargs="+", help="measure nothing; show the results in these files")
    return parser


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _command(arguments: list[str]) -> str:
    """What was typed, without the places of files, which mean nothing elsewhere."""
    words = [Path(word).name if "/" in word else word for word in arguments]
    return shlex.join(["python", "-m", "experiments.bench", *words])


def _print(results: dict[str, Any]) -> None:
    """What was measured, and what was not."""
    measures = {name: Measure(**found) for name, found in results["measures"].items()}
    rows = [row[:2] for row in table(measures) if row[1] != "not measured"]
    for name, value in (HEADER[:2], *rows):
        print(f"{name:68} {value}")
    facts = results["machine"]
    print(
        f"{facts['cpu']}, {facts['threads']} thread(s), load {facts['load']}, torch "
        f"{facts['torch']}; {results['seconds']:.0f} s"
    )
    for area, why in results["failures"].items():
        print(f"{area} gave no numbers: {why}")


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.exit(f"bench: {error}")
