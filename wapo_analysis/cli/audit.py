"""``wapo audit``: what a trainer really computes."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from wapo_analysis.cli import ChosenRun, FormatOption, MapOption, log_settings, open_one, show


def audit(
    run: Annotated[
        Path, Argument(help="Run folder, or somebody's table of tokens.", metavar="RUN")
    ],
    steps: Annotated[int, Option(help="Steps with token rows to look at.", min=1)] = 10,
    format: FormatOption = "text",
    map: MapOption = None,
    chosen: ChosenRun = None,
) -> None:
    """Tell from the recorded tokens what a trainer really computes.

    Which tokens carry gradient, how it depends on advantage, ratio and length, how advantages were
    made, whether the sampler agrees and whether weights change. Exit code 1 if anything deviates
    from what the run declares. Examples:

        wapo audit runs/mine
        wapo audit runs/mine --steps 3 --format json
    """
    from wapo_analysis.audit import audit as audit_run

    found = audit_run(open_one(run, log_settings([run], map, chosen)), steps)
    show(found, format)
    if found.deviations:
        raise Exit(1)
