r"""How well ``wapo diagnose`` and its neighbours see a collapse coming.

Trains a suite of short runs that stay healthy or fail in known ways, labels each by its outcome,
replays it step by step to every tool, and scores who warned, when, and of what. Seeds split it into
a tuning part and a test part. About an hour on two idle CPU cores, twenty minutes with ``--part
test``; a second call trains and judges only what is missing (``judged.jsonl``, ``kinds.md`` and
``shapes.md`` in the folder hold what was judged: delete them after a change of a rule). With
``--drawn`` the runs that are there are judged and none is trained.

    python experiments/suite/collapse_suite.py --out runs/collapse_suite
    rivals/bin/python experiments/suite/rivals.py runs/collapse_suite
    python experiments/suite/forks.py runs/collapse_suite
    python experiments/suite/collapse_suite.py --out runs/collapse_suite \
        --doc docs/collapse_suite.md

Prints the tables, and with ``--doc`` writes the page.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from experiments.suite.judging import judge, rivals
from experiments.suite.runs import SuiteRun, finished, suite, train_suite
from experiments.suite.tables import drivers_line, labels_table, misses, page, tools_table
from wapo_analysis import open_run


def write_scalars(runs: Sequence[SuiteRun], out: Path) -> None:
    """Step tables of all runs as one JSON file, for the other tools."""
    rows = {run.name: open_run(run.out).steps.to_dict("records") for run in runs}
    (out / "scalars.json").write_text(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/collapse_suite"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--part", choices=("tuning", "test", "both"), default="both")
    parser.add_argument("--drawn", action="store_true", help="train nothing, judge what is there")
    parser.add_argument("--doc", type=Path, help="write the documentation page here")
    options = parser.parse_args()
    if options.doc is not None and options.part == "tuning":
        parser.error("--doc writes a page on the test part")
    runs = suite(options.out)
    chosen = [run for run in runs if options.part in ("both", "test" if run.test else "tuning")]
    if options.drawn:
        chosen = [run for run in chosen if finished(run.out)]
    else:
        train_suite(chosen, options.workers)
    write_scalars(chosen, options.out)
    judged = judge(chosen, options.out, options.workers)
    others = rivals(options.out)
    for part, mine in (
        ("tuning part", [j for j in judged if not j.run.test]),
        ("test part", [j for j in judged if j.run.test]),
    ):
        if mine:
            print(f"\n{part}\n\n{tools_table(mine, others)}\n\n{labels_table(mine)}\n")
            print(f"{drivers_line(mine)}\n\n{misses(mine)}")
    if options.doc is not None:
        options.doc.write_text(page(judged, others, options.out))


if __name__ == "__main__":
    main()
