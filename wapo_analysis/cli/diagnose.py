"""``wapo diagnose``."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from typer import Exit, Option, echo

from wapo_analysis.cli import (
    ChosenRun,
    FormatOption,
    MapOption,
    RunsArgument,
    log_settings,
    next_commands,
    of_log,
    open_runs,
    say,
    show,
)
from wapo_analysis.errors import UserError

if TYPE_CHECKING:
    from wapo_analysis.diagnose import Diagnosis
    from wapo_analysis.importers.run import ImportSettings
    from wapo_analysis.store import Run


def diagnose(
    runs: RunsArgument,
    format: FormatOption = "text",
    fail_on: Annotated[
        Literal["warning", "critical"] | None,
        Option(help="Exit with code 1 if a finding is at least this severe.  [default: never]"),
    ] = None,
    step: Annotated[
        int | None,
        Option(
            help="Explain one step: the tokens, rollouts and prompts behind it.  [default: the run]"
        ),
    ] = None,
    top: Annotated[int, Option(help="Rows of each table, with --step.", min=1)] = 10,
    map: MapOption = None,
    chosen: ChosenRun = None,
) -> None:
    """Say what happened to a run, since when, and what drives it.

    Entropy is judged both ways against the run's own baseline. Examples:

        wapo diagnose train.log
        wapo diagnose metrics.csv --map reward=score --map entropy=H
        wapo diagnose runs/mine --step 41 --top 5
        wapo diagnose runs/mine --format json --fail-on critical
    """
    from wapo_analysis.diagnose import diagnose as diagnose_run
    from wapo_analysis.store.lock import DEAD

    log = log_settings(runs, map, chosen)
    opened = list({path: run for given in runs for path, run in _at(given, log)}.items())
    if step is not None:
        from wapo_analysis.attribute import attribute_step

        if fail_on is not None:
            raise UserError("--fail-on judges the whole run; it cannot be combined with --step")
        if len(opened) > 1:
            raise UserError("--step explains one step of one run; name one")
        show(attribute_step(opened[0][1], step, top), format)
        return
    found = [diagnose_run(run) for _, run in opened]
    if format == "json" and len(found) > 1:
        texts = [one.to_dict() for one in found]
        echo(json.dumps(texts, indent=1, allow_nan=False))
    for place, ((path, run), one) in enumerate(zip(opened, found, strict=True)):
        if format == "json" and len(found) > 1:
            break
        if place:
            say("")
        show(one, format)
        if format == "text" and run.status == DEAD:
            say("\nThis run is probably dead: its process ended without ending the run.")
        if format == "text" and (line := _audit_line(path, run)):
            say(line)
        if format == "text" and (one.culprits or one.drivers):
            say(f"\n{_next(path, run, one, of_log(log))}")
    if fail_on is not None and any(one.reaches(fail_on) for one in found):
        raise Exit(1)


def _audit_line(path: Path, run: "Run") -> str:
    """What an audit of the first steps says, in one line; empty if nothing deviates."""
    from wapo_analysis.audit import first_audit

    found = first_audit(run)
    if found is None or not found.deviations:
        return ""
    return f"\naudit: {found.line} (wapo audit {shlex.quote(str(path))})"


def _next(path: Path, run: "Run", found: "Diagnosis", log: tuple[str, ...]) -> str:
    """Commands that go on from a diagnosis: its tokens, what leaving the class out would do."""
    commands: list[tuple[str | Path, ...]] = [("wapo", "report", path, *log)]
    if not run.probes.empty and len(found.drivers) > 1:  # of one alone nothing would be left
        commands.insert(0, ("wapo", "whatif", path, "--exclude-bins", found.drivers[0].cls))
    if found.culprits:
        step = str(found.culprits.steps[0])
        commands.insert(0, ("wapo", "diagnose", path, *log, "--step", step))
    return next_commands(*commands)


def _at(path: Path, log: "ImportSettings | None") -> "list[tuple[Path, Run]]":
    """Runs at or below a path, or the one of a log, each with the path to name it by."""
    opened = open_runs([path], log)
    return [(path, opened[0])] if len(opened) == 1 else [(run.path, run) for run in opened]
