"""Flip single bits in the files of a run, read everything, and count what comes of it.

    python -m tests.bitflips RUN --flips 400

Every flip is made in a fresh copy; a file is drawn by its size. ``error``: one line and nothing
else; ``told``: read, with a warning; ``same``: the numbers that were written; ``silent``: other
numbers without a word. Exit code 1 if a flip was silent or ended in a traceback.
"""

import argparse
import logging
import random
import shutil
import tempfile
import warnings
from collections import Counter
from pathlib import Path

from wapo_analysis.errors import UserError
from wapo_analysis.store import open_run

TABLES = ("tokens", "classes", "rollouts", "probes")


class Told(logging.Handler):
    """Counts warnings."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


def contents(path: Path) -> list[str]:
    """Everything that can be read of a run, as text."""
    run = open_run(path)
    tables = [run.steps, run.summary(), *(run.table(name) for name in TABLES)]
    return [
        *(t.to_csv() for t in tables),
        repr(run.vocab),
        repr(sorted(dict(run.manifest).items())),
    ]


def outcome(run: Path, truth: list[str], told: Told) -> str:
    """What came of reading a run."""
    before = told.count
    try:
        same = contents(run) == truth
    except UserError:
        return "error"
    except Exception as error:
        return f"traceback {type(error).__name__}"
    return "same" if same else "told" if told.count > before else "silent"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--flips", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    told = Told(logging.WARNING)
    logging.getLogger("wapo_analysis").addHandler(told)
    logging.getLogger("wapo_analysis").propagate = False
    rng, counts = random.Random(options.seed), Counter[tuple[str, str]]()
    ignored = shutil.ignore_patterns("checkpoints", "tensorboard")
    with tempfile.TemporaryDirectory() as folder:
        whole, damaged = Path(folder) / "whole", Path(folder) / "damaged"
        shutil.copytree(options.run, whole, ignore=ignored)
        truth = contents(whole)
        files = sorted(path for path in whole.rglob("*") if path.is_file())
        for _ in range(options.flips):
            (file,) = rng.choices(files, [path.stat().st_size for path in files])
            shutil.copytree(whole, damaged)
            content = bytearray(file.read_bytes())
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            (damaged / file.relative_to(whole)).write_bytes(content)
            kind = "parts" if file.parent != whole else file.name
            counts[kind, outcome(damaged, truth, told)] += 1
            shutil.rmtree(damaged)
    for (kind, result), count in sorted(counts.items()):
        print(f"{kind:14} {result:10} {count}")
    bad = sum(n for (_, r), n in counts.items() if r == "silent" or r.startswith("traceback"))
    print(f"{options.flips} flips, {bad} silent or ended in a traceback")
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
