"""``wapo compact``: many small files of a run into few."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from wapo_analysis.cli import say


def compact(
    runs: Annotated[
        list[Path],
        Argument(help="Run folders, or a folder that holds runs.", metavar="RUN"),
    ],
    take_over: Annotated[
        bool,
        Option("--take-over", "--force", help="Also a run that another process seems to write."),
    ] = False,
) -> None:
    """Merge the part files of finished or crashed runs.

    A run merges its own parts every 32 steps and at its end; this does the rest. Example:

        wapo compact runs/mine
    """
    from wapo_analysis.store import find_runs
    from wapo_analysis.store.merge import compact as compact_run

    for folder in dict.fromkeys(folder for path in runs for folder in find_runs(path)):
        done = compact_run(folder, take_over)
        say(
            f"{folder}: {done.files_before} files, {done.bytes_before:,} bytes -> "
            f"{done.files_after} files, {done.bytes_after:,} bytes"
        )
