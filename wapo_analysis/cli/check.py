"""``wapo check``: verify a run folder."""

from typer import Exit

from wapo_analysis.cli import FormatOption, RunArgument, show


def check(run: RunArgument, format: FormatOption = "text") -> None:
    """Verify a run folder: checksums, gaps, duplicates, what is lost.

    Every byte of the tables is read. Exit code 0 if the run is whole, 1 if something is damaged or
    missing. Example:

        wapo check runs/mine
    """
    from wapo_analysis.store.check import check as checked

    found = checked(run)
    show(found, format)
    if found.damage:
        raise Exit(1)
