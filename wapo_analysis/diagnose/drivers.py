"""Who drives the entropy: classes by predicted dH and probes, the tokens and rollouts behind."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import wapo_taxonomy as tax

from wapo_analysis.diagnose.advice import CLASS_ADVICE, LOWER_LR, Advice
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.result import Culprits, Driver
from wapo_analysis.schema import ALL_TOKENS
from wapo_analysis.store import Run

MIN_WINDOW = 5


def entropy_drivers(
    context: Context, first: int | None, last: int | None, direction: int
) -> tuple[Driver, ...]:
    """Rank the classes by their predicted dH over a window of steps.

    Parameters
    ----------
    context : Context
        The run.
    first, last : int or None
        First and last step of the window, widened to at least ``MIN_WINDOW`` steps on its early
        side; None leaves that side open.
    direction : int
        1 if the entropy rose, -1 if it fell, 0 to take the sign of the total.

    Returns
    -------
    tuple of Driver
        Largest share in the direction first. Empty if the run has no class totals with statistics.
        ``predicted_dentropy`` is the exact first-order sum over all tokens (taxonomy/README.md).
    """
    flows = _window(context.flows, first, last)
    if flows.empty:
        return ()
    total = flows.sum()
    way = direction or (1 if total.sum() >= 0 else -1)
    toward = way * total
    gross = float(toward.clip(lower=0).sum())
    alone = _counterfactual(context, flows.index.to_numpy())
    drivers = [
        Driver(name, float(total[name]), alone.get(name), float(toward[name]) / gross)
        for name in toward.sort_values(ascending=False, kind="stable").index
        if gross > 0 and total[name] != 0
    ]
    return tuple(drivers)


def _window(flows: pd.DataFrame, first: int | None, last: int | None) -> pd.DataFrame:
    """Rows of the window; the rows before it too if it holds fewer than ``MIN_WINDOW``."""
    until = flows if last is None else flows[flows.index <= last]
    inside = until if first is None else until[until.index >= first]
    return inside if len(inside) >= MIN_WINDOW else until.tail(MIN_WINDOW)


def _counterfactual(context: Context, steps: np.ndarray) -> dict[str, float]:
    """Measured entropy change of each class applied alone, summed over the probed steps."""
    probes = context.run.probes
    if probes.empty:
        return {}
    probes = probes[probes["tokens_of"] == ALL_TOKENS]
    known = probes[probes["step"].isin(steps) & probes["part"].isin(range(len(tax.CLASSES)))]
    sums = known.dropna(subset=["counterfactual_dentropy"]).groupby("part")
    totals = sums["counterfactual_dentropy"].sum()
    return dict(zip(totals.index.map(tax.CLASS_NAMES), totals.to_list(), strict=True))


def driver_words(drivers: tuple[Driver, ...], direction: int) -> str:
    """One clause on the class that predicts most of the change; empty without drivers."""
    if not drivers:
        return ""
    way = "rise" if direction > 0 else "fall"
    said = f"{drivers[0].cls} tokens account for {drivers[0].share:.0%} of the predicted {way}"
    if direction * sum(driver.predicted_dentropy for driver in drivers) < 0:
        said += f", though all classes together predict a {'fall' if direction > 0 else 'rise'}"
    return said


def driver_advice(drivers: tuple[Driver, ...]) -> Advice:
    """What to change for the class that predicts most of the change."""
    if not drivers:
        return Advice(
            "Which tokens drive it is not in this record; docs/watch_your_trainer.md shows how to "
            "record it.",
            steps=(LOWER_LR,),
        )
    return CLASS_ADVICE[drivers[0].cls]


READ_STEPS = 3
"""Most steps whose token rows are read."""
NEAR = 10
"""Steps beyond the window at which token rows still speak for it."""
SHOWN = 3


def find_culprits(
    run: Run, finding: str, cls: str, first: int, last: int, direction: int
) -> Culprits | None:
    """Split the predicted dH of a class over its tokens and rollouts.

    A token counts with its exact first-order dH (taxonomy/README.md) where that points in the
    direction, summed over the gradient passes that saw it.

    Parameters
    ----------
    run : Run
        The run.
    finding : str
        Name of the finding the class is behind.
    cls : str
        Class name of the taxonomy.
    first, last : int
        Window of steps; of those in it that have token rows the earliest are read, else the nearest
        one at most ``NEAR`` steps away.
    direction : int
        1 for what raises the entropy, -1 for what lowers it.

    Returns
    -------
    Culprits or None
        None without token rows near the window, or with none that point there. Tokens and
        rollouts whose number the source could not give (-1) are not named.
    """
    steps = _steps(run.token_steps(), first, last)
    if not steps:
        return None
    rows = run.tokens(steps)
    toward = direction * rows["pred_dentropy"].astype(np.float64)
    mine = (rows["cls"] == cls) & (toward > 0)
    if not mine.any():
        return None
    toward, rows = toward[mine], rows[mine]
    total = float(toward.sum())
    vocab = run.vocab
    by_token = _largest(toward[rows["token_id"] >= 0].groupby(rows["token_id"]).sum())
    named = toward[rows["rollout"] >= 0].groupby([rows["step"], rows["rollout"]]).sum()
    by_rollout = _largest(named).reset_index()
    return Culprits(
        finding=finding,
        cls=cls,
        steps=tuple(steps),
        tokens=tuple(
            (vocab.get(int(token), f"#{token}"), value / total)
            for token, value in zip(by_token.index, by_token.to_list(), strict=True)
        ),
        rollouts=tuple(
            (int(step), int(number), float(value) / total)
            for step, number, value in by_rollout.itertuples(index=False)
        ),
    )


def _steps(recorded: Sequence[int], first: int, last: int) -> list[int]:
    inside = [step for step in recorded if first <= step <= last]
    if inside or not recorded:
        return inside[:READ_STEPS]
    away = {step: max(first - step, step - last) for step in recorded}
    nearest = min(recorded, key=away.__getitem__)
    return [nearest] if away[nearest] <= NEAR else []


def _largest(values: pd.Series) -> pd.Series:
    return values.sort_values(ascending=False, kind="stable").head(SHOWN)
