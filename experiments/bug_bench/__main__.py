"""Which bugs of a trainer does an audit name? Three trainers, one bug at a time.

Every bug is trained for three steps and audited after each of them.

    python -m experiments.bug_bench                        # prints the tables, three minutes
    python -m experiments.bug_bench --docs docs/audit.md   # writes them into the page
    python -m experiments.bug_bench --only "sample std"
"""

import argparse
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from experiments.bug_bench import flat, loop, recipes
from wapo_analysis import open_run
from wapo_analysis.audit import Audit, audit

STEPS = 3
MARKS = "<!-- bench: written by experiments/bug_bench -->", "<!-- bench ends -->"
TOKEN_MEAN = "micro-batch token means averaged"


def train_loop(out: Path, bug: str) -> None:
    loop.train(out, bug, mean="token" if bug == TOKEN_MEAN else "rollout")


def train_trl(out: Path, bug: str) -> None:
    from experiments.bug_bench import with_trl

    with_trl.train(out, bug)


def benches() -> dict[str, tuple[Callable[[Path, str], Any], Mapping[str, str]]]:
    """Of each bench its title: how to train with a bug, and the deviation that names each bug."""
    from experiments.bug_bench import with_trl

    return {
        "A hand-written loop on padded tensors": (train_loop, loop.BUGS),
        "TRL's GRPOTrainer": (train_trl, with_trl.BUGS),
        "A loop on flat tensors, with bugs as public issues report them": (
            flat.train,
            recipes.BUGS,
        ),
    }


def seen_after(path: Path, expected: str) -> tuple[int | None, Audit]:
    """Step after which an audit names the deviation, None if it never does, and that audit."""
    for step in range(1, STEPS + 1):
        found = audit(open_run(path), step)
        if any(d.name == expected for d in found.deviations):
            return step, found
    return None, found


def row(train: Callable[[Path, str], Any], bug: str, expected: str) -> tuple[bool, str]:
    """Whether a bug is named, and its line of the table."""
    with tempfile.TemporaryDirectory() as folder:
        train(Path(folder) / "run", bug)
        step, found = seen_after(Path(folder) / "run", expected)
    said = [d.says for d in found.deviations if d.name == expected] or ["-"]
    seen = "no" if step is None else "yes"
    after = "-" if step is None else f"{step} step{'s' * (step > 1)}"
    where = f" ({recipes.REPORTED[bug]})" if bug in recipes.REPORTED else ""
    says = said[0].replace("|", "\\|")
    return step is not None, f"| {bug}{where} | {seen} | {after} | {says} |"


def table(title: str, train: Callable[[Path, str], Any], bugs: Mapping[str, str]) -> str:
    """A bench as Markdown: bug, seen or not, after how many steps, what was said."""
    rows = [row(train, bug, expected) for bug, expected in bugs.items()]
    named = sum(seen for seen, _ in rows)
    head = ["| bug | seen | after | what was said |", "| --- | --- | ---: | --- |"]
    lines = [f"**{title}**: {named} of {len(rows)}.", "", *head, *(line for _, line in rows)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", help="One bug.")
    parser.add_argument("--docs", type=Path, help="Page whose tables are written anew.")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tables = []
    for title, (train, bugs) in benches().items():
        chosen = {b: e for b, e in bugs.items() if options.only in (None, b)}
        if chosen:
            tables.append(table(title, train, chosen))
            print(tables[-1] + "\n", flush=True)
    if options.docs is not None:
        head, rest = options.docs.read_text().split(MARKS[0])
        shown = "\n\n".join(tables)
        options.docs.write_text(
            f"{head}{MARKS[0]}\n\n{shown}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"
        )


if __name__ == "__main__":
    main()
