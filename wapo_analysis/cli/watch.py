"""``wapo watch``: a run while it is being written."""

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from wapo_analysis.cli import ChosenRun, MapOption, holds_runs, log_settings


def watch(
    run: Annotated[Path, Argument(help="Run folder, or any trainer's log.", metavar="RUN")],
    once: Annotated[bool, Option("--once", help="Print a snapshot and stop.")] = False,
    interval: Annotated[float, Option(help="Seconds between two looks.")] = 2.0,
    wait: Annotated[bool, Option("--wait", help="Wait for a run that is not there yet.")] = False,
    webhook: Annotated[
        str | None,
        Option(help="Post each new finding to this address, once, as JSON.  [default: none]"),
    ] = None,
    cooldown: Annotated[float, Option(help="Seconds between two posts.")] = 300.0,
    notify_on: Annotated[
        Literal["info", "warning", "critical"], Option(help="Least severity that is posted.")
    ] = "warning",
    map: MapOption = None,
    chosen: ChosenRun = None,
) -> None:
    """Watch a run live: reward, entropy, classes, verdict.

    Ends when the run ends, with q or with Ctrl-C; the run itself is only read. A log is read again
    as it grows. Examples:

        wapo watch runs/mine
        wapo watch train.log
        wapo watch runs/mine --once
        wapo watch runs/mine --wait --webhook https://chat.example/hook --notify-on critical
    """
    from rich.console import Console

    from wapo_analysis.importers import SourceTail
    from wapo_analysis.watch import Notifier
    from wapo_analysis.watch import watch as watch_run

    notifier = None if webhook is None else Notifier(webhook, cooldown, notify_on)
    console = Console()
    log = log_settings([run], map, chosen)
    tail = None if holds_runs(run) else SourceTail(run, log)
    try:
        watch_run(
            run, console, interval=interval, once=once, wait=wait, notifier=notifier, tail=tail
        )
    except KeyboardInterrupt:
        console.print()  # Ctrl-C is how one stops watching, no error
