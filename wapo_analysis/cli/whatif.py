"""``wapo whatif``."""

from typing import Annotated

from typer import Option

from wapo_analysis.cli import FormatOption, RunArgument, show


def whatif(
    run: RunArgument,
    exclude_bins: Annotated[
        str, Option(help="Classes to take out, e.g. neg_peak or pos_valley,neg (comma-separated).")
    ],
    format: FormatOption = "text",
) -> None:
    """Estimate how entropy would have gone without some classes.

    From recorded probes alone, so it takes seconds; the run must have been trained with
    --probe-every. docs/attribution.md says what it rests on and how it compares with real re-runs.
    Example:

        wapo train --probe-every 5 --out runs/mine

        wapo whatif runs/mine --exclude-bins neg_peak
    """
    from wapo_analysis.attribute import what_if
    from wapo_analysis.store import open_run

    names = [name.strip() for name in exclude_bins.split(",") if name.strip()]
    found = what_if(open_run(run), names)
    show(found, format)
