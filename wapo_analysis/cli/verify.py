"""``wapo verify``: the taxonomy's formulas, checked numerically on the user's own machine."""

from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    app.command()(verify)


def verify(
    seed: Annotated[int, typer.Option(help="Seed of the random trials.")] = 0,
    trials: Annotated[int, typer.Option(help="Random distributions per identity.", min=1)] = 2000,
) -> None:
    """Check the taxonomy's formulas numerically.

    Against differences of a plain softmax; exits with code 1 if one fails.
    """
    from wapo_analysis.verify import run_identities

    results = run_identities(seed=seed, trials=trials)
    for identity in results:
        typer.echo(identity.to_line())
    passed = sum(identity.passed for identity in results)
    typer.echo(f"{passed} of {len(results)} identities hold")
    if passed < len(results):
        raise typer.Exit(1)
