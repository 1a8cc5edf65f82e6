"""Check attach() against several TRL versions, each in its own virtual environment.

    python tests/compat/run_matrix.py [--venvs DIR] [VERSION ...]

makes the environments that are missing (about 1.2 GB each), runs check_trl.py in them one after the
other and writes docs/trl_compat.md. Exit code 1 if a check fails.
"""

import argparse
import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
TORCH = "torch==2.13.0"
# Older TRL was written for older transformers; the rest takes what pip finds.
VERSIONS = {
    "0.21.0": ["transformers==4.57.*"],
    "0.29.1": ["transformers<5.3"],
    "1.5.1": [],
    "1.13.0": [],
    "1.14.2": [],
    "1.16.0": [],
}
# requests: TRL 0.29 to 1.13 import it without naming it.
NEEDED = ["peft", "pyarrow", "pandas", "scipy", "requests"]
BOUND_COEF, BOUND_STATS = 1e-6, 1e-5


def environment(folder: Path, version: str) -> Path:
    """Return the python of the environment of one TRL version, made if absent."""
    python = folder / f"v{version}" / "bin" / "python"
    if not python.exists():
        venv.create(python.parents[1], with_pip=True)
        wanted = [TORCH, f"trl=={version}", *VERSIONS.get(version, []), *NEEDED]
        subprocess.run([python, "-m", "pip", "install", "-q", *wanted], check=True)
    return python


def check(python: Path) -> dict[str, Any]:
    """Results of check_trl.py; a crash becomes an entry of its own."""
    done = subprocess.run(
        [python, "tests/compat/check_trl.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            results: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
            return results
    return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}


def failures(results: dict[str, Any]) -> list[str]:
    """Names of the checks that did not hold."""
    if "error" in results:
        return [f"does not run: {results['error']}"]
    numbers = {f"coef {loss}": (x, BOUND_COEF) for loss, x in results["coef"].items()}
    numbers["wapo"] = (results["wapo"], BOUND_COEF)
    statistics = results["statistics"]
    if isinstance(statistics, str):
        numbers["statistics"] = (statistics, 0.0)
    else:
        numbers |= {k: (x, BOUND_STATS) for k, x in statistics.items() if k != "source"}
    failed = [
        f"{name}: {x}" for name, (x, bound) in numbers.items() if isinstance(x, str) or x > bound
    ]
    words = ("bitwise", "bitwise_lora", "identity")
    return failed + [f"{name}: {results[name]}" for name in words if results[name] is not True]


def table(matrix: dict[str, dict[str, Any]]) -> str:
    """Build the page docs/trl_compat.md."""
    head = (
        "| TRL | transformers | source of S and Q | losses | coef | logp, H, S, Q | bitwise | "
        "bitwise, LoRA | identity | WAPO |\n|---|---|---|---|---|---|---|---|---|---|\n"
    )
    rows = []
    for version, results in matrix.items():
        if "error" in results or isinstance(results["statistics"], str):
            rows.append(f"| {version} | {'; '.join(failures(results))} |" + " |" * 8)
            continue
        worst = {k: x for k, x in results["statistics"].items() if k != "source"}
        coef = {k: x for k, x in results["coef"].items() if isinstance(x, float)}
        cells = (
            version, results["transformers"], results["statistics"]["source"],
            str(len(results["coef"])), f"{max(coef.values()):.1e}", f"{max(worst.values()):.1e}",
            _word(results["bitwise"]), _word(results["bitwise_lora"]),
            _word(results["identity"]), f"{results['wapo']:.1e}",
        )  # fmt: skip
        rows.append("| " + " | ".join(cells) + " |")
    torch = {results.get("torch", "?") for results in matrix.values()}
    return (
        "# TRL versions\n\nWritten by `python tests/compat/run_matrix.py`; each row is a real run "
        f"of the toy model on CPU with torch {', '.join(sorted(torch))}.\n\n{head}"
        + "\n".join(rows)
        + "\n\n**losses** counts the loss types that version has, each run two epochs over its "
        "batch with a tight clip. **coef** is the largest difference from autograd through TRL's "
        f"own loss (bound {BOUND_COEF:g}); **logp, H, S, Q** the largest from a full float64 "
        f"softmax (bound {BOUND_STATS:g}). **bitwise**: weights after 5 steps, attached with "
        "re-scoring and plain, are the same bits. **identity**: every token's text and advantage "
        "are those of its rollout after shuffle, split and reuse. **WAPO**: largest difference of "
        "coef from `ratio A / (Z G L)`.\n"
    )


def _word(value: Any) -> str:
    return "yes" if value is True else f"**{value}**"


def main() -> int:
    """Run the matrix."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("versions", nargs="*", default=list(VERSIONS))
    parser.add_argument("--venvs", type=Path, default=ROOT / ".venvs")
    chosen = parser.parse_args()
    matrix, failed = {}, False
    for version in chosen.versions:
        matrix[version] = check(environment(chosen.venvs, version))
        wrong = failures(matrix[version])
        failed |= bool(wrong)
        print(f"TRL {version}: {'; '.join(wrong) if wrong else 'all checks hold'}", flush=True)
    if set(matrix) == set(VERSIONS):
        (ROOT / "docs" / "trl_compat.md").write_text(table(matrix))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
