"""``wapo verify``: proofs a user can run on their own machine."""

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(verify)


def verify(
    gold: Annotated[
        Path | None,
        typer.Option(
            help="Check the objectives against a folder of golden cases.  [default: not checked]"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random trials.")] = 0,
    trials: Annotated[int, typer.Option(help="Random distributions per identity.", min=1)] = 2000,
) -> None:
    """Check the taxonomy's formulas numerically.

    Exits with code 1 if anything fails.
    """
    ok = _gold(gold) if gold is not None else _identities(seed, trials)
    if not ok:
        raise typer.Exit(1)


def _identities(seed: int, trials: int) -> bool:
    from wapo_analysis.verify.identities import run_identities

    results = run_identities(seed=seed, trials=trials)
    for identity in results:
        typer.echo(identity.to_line())
    passed = sum(identity.passed for identity in results)
    typer.echo(f"{passed} of {len(results)} identities hold")
    return passed == len(results)


def _gold(folder: Path) -> bool:
    from wapo_analysis.verify.gold import check_folder

    report = check_folder(folder)
    typer.echo(report.to_text())
    return report.passed
