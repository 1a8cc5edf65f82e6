"""``wapo verify``: the taxonomy's formulas, checked numerically on the user's own machine."""

from typing import Annotated

from typer import Exit, Option, echo


def verify(
    seed: Annotated[int, Option(help="Seed of the random trials.", min=0)] = 0,
    trials: Annotated[
        int, Option(help="Random distributions per identity.", min=100, max=1_000_000)
    ] = 2000,
) -> None:
    """Check the taxonomy's formulas numerically.

    Against differences of a plain softmax; exits with code 1 if one fails.
    """
    from wapo_analysis.verify import run_identities

    results = run_identities(seed=seed, trials=trials)
    for identity in results:
        echo(identity.to_line())
    passed = sum(identity.passed for identity in results)
    echo(f"{passed} of {len(results)} identities hold")
    if passed < len(results):
        raise Exit(1)
