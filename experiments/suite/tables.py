"""Tables of the collapse suite and its page."""

import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median

from scipy.stats import beta

from experiments.suite import forks
from experiments.suite.judging import OURS, Alarms, Judged, score
from experiments.suite.logs import KINDS, right, write_log
from experiments.suite.runs import BAD, STEPS, TEST_SEEDS, suite
from experiments.suite.shapes import ALLOWED, SHAPES, write_shape
from wapo_analysis import open_run
from wapo_analysis.diagnose import diagnose

KIND_SEEDS = 20
"""Logs of each kind, and of each healthy shape, made by formula."""


def markdown(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def tools_table(judged: Sequence[Judged], others: dict[str, dict[str, Alarms]]) -> str:
    """One row per tool and severity."""
    ours = {j.run.name: j.alarms for j in judged}
    rows = [
        [tool, severity, *score(judged, alarms, severity).cells(), *_misnamed(judged, alarms)]
        for tool, alarms in ({OURS: ours} | others).items()
        for severity in ("warning", "critical")
    ]
    return markdown(
        ["tool", "alarm from", "recall", "false alarms", "median lead (steps)",
         "before the loss", "explosions called entropy collapse"],
        rows,
    )  # fmt: skip


def _misnamed(judged: Sequence[Judged], alarms: dict[str, Alarms]) -> list[str]:
    """Explosions for which a tool reported an entropy collapse."""
    exploded = [j for j in judged if j.outcome.label == "explosion"]
    wrong = [
        j
        for j in exploded
        if any(
            name.split(":")[1].lower() in ("entropy_collapse", "entropycollapse")
            for name in alarms[j.run.name].names
        )
    ]
    return [f"{len(wrong)}/{len(exploded)}"]


def labels_table(judged: Sequence[Judged]) -> str:
    """One row per label: how many, caught, named, lead."""
    rows = []
    for label in (*BAD, "healthy", "unclear"):
        mine = [j for j in judged if j.outcome.label == label]
        if not mine:
            continue
        alarmed = [j for j in mine if j.alarms.warning is not None]
        leads = [
            j.outcome.lost_at - j.alarms.warning
            for j in alarmed
            if j.outcome.lost_at is not None and j.alarms.warning is not None
        ]
        verdicts = Counter(j.verdict for j in mine)
        rows.append([
            label, len(mine), len(alarmed), sum(j.named for j in mine),
            f"{median(leads):+.1f}" if leads else "n/a",
            ", ".join(f"{name} {count}" for name, count in verdicts.most_common()),
        ])  # fmt: skip
    return markdown(["outcome", "runs", "alarm", "named", "median lead", "verdicts"], rows)


def drivers_line(judged: Sequence[Judged]) -> str:
    """How often the driver of a failed single-class run is that class."""
    single = [j for j in judged if j.run.recipe.one_class and j.bad]
    right = [j for j in single if j.driver == j.run.recipe.one_class]
    return f"{len(right)} of {len(single)} failed single-class runs name their class as the driver."


def bound_line(judged: Sequence[Judged]) -> str:
    """How many false alarms so few healthy runs can rule out (Clopper-Pearson, one-sided 95%)."""
    found = score(judged, {j.run.name: j.alarms for j in judged}, "warning")
    upper = 1.0
    if found.false < found.healthy:
        upper = float(beta.ppf(0.95, found.false + 1, found.healthy - found.false))
    return (
        f"False alarms in {found.false} of {found.healthy} healthy runs leave room for a true rate "
        f"of up to {upper:.0%} (95%, one-sided)."
    )


def misses(judged: Sequence[Judged]) -> str:
    """Every run that was missed, misnamed or falsely alarmed."""
    rows = [
        [
            j.run.name,
            j.outcome.label,
            j.verdict,
            ", ".join(f"{name} at {step}" for name, step in j.alarms.names.items()) or "nothing",
        ]
        for j in judged
        if not j.named
        or (j.bad and j.alarms.warning is None)
        or (j.outcome.label == "healthy" and j.alarms.warning is not None)
    ]
    if not rows:
        return "None."
    return markdown(["run", "outcome", "verdict", "what was said"], rows)


def kinds_table(seeds: Sequence[int]) -> str:
    """Kinds of logs made by formula: in how many the right thing is said, and in how many loudly.

    Parameters
    ----------
    seeds : sequence of int
        A log of each kind is made from every one.
    """
    rows = []
    with tempfile.TemporaryDirectory(prefix="wapo-logs-") as folder:
        for kind, wanted in KINDS.items():
            found = [
                diagnose(open_run(write_log(Path(folder) / f"{kind}-{seed}", kind, seed)))
                for seed in seeds
            ]
            good = sum(right(kind, d) for d in found)
            loud = sum(any(f.severity != "info" for f in d.findings) for d in found)
            said = ", ".join(wanted.named) or "no warning" * wanted.silent or "no stall"
            rows.append([kind, said, f"{good}/{len(found)}", f"{loud}/{len(found)}"])
    return markdown(["kind", "what must be said", "said", "with a warning or worse"], rows)


def shapes_table(seeds: Sequence[int]) -> str:
    """Healthy shapes made by formula: of how many logs a warning was given, and which."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="wapo-shapes-") as folder:
        for shape in SHAPES:
            names: Counter[str] = Counter()
            loud = 0
            for seed in seeds:
                path = write_shape(Path(folder) / f"{shape}-{seed}", shape, seed)
                said = {f.name for f in diagnose(open_run(path)).findings if f.severity != "info"}
                loud += bool(said - ALLOWED.get(shape, frozenset()))
                names.update(said)
            told = ", ".join(f"{name} {count}" for name, count in names.most_common())
            rows.append([shape, f"{loud}/{len(seeds)}", told or "nothing"])
    return markdown(["shape", "falsely warned", "warnings"], rows)


def _once(file: Path, table: Callable[[Sequence[int]], str]) -> str:
    """A table of logs made by formula; like the runs they are judged once, and kept in a file."""
    if not file.exists():
        file.write_text(table(range(TEST_SEEDS, TEST_SEEDS + KIND_SEEDS)))
    return file.read_text()


def page(judged: Sequence[Judged], others: dict[str, dict[str, Alarms]], out: Path) -> str:
    """The documentation page."""
    test = [j for j in judged if j.run.test]
    tuning = [j for j in judged if not j.run.test]
    text = (Path(__file__).parent / "page.md").read_text()
    planned = [run for run in suite(out) if run.test]
    parts = {
        "runs": len(judged),
        "steps": STEPS,
        "tuning": len(tuning),
        "test": len(test),
        "planned": len(planned),
        "test_seeds": TEST_SEEDS,
        "tools": tools_table(test, others),
        "labels": labels_table(test),
        "drivers": drivers_line(test),
        "misses": misses(test),
        "bound": bound_line(test),
        "tuning_tools": tools_table(tuning, others) if tuning else "No run of it was judged anew.",
        "kinds": _once(out / "kinds.md", kinds_table),
        "shapes": _once(out / "shapes.md", shapes_table),
        "kind_seeds": KIND_SEEDS,
        "forks": forks.summary(rows) if (rows := forks.read(out)) else "Not run.",
    }
    for name, value in parts.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text
