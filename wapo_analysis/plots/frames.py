"""Runs to tidy frames: the part of every ``prepare_x`` that is the same.

Frames carry ``label`` (legend text), ``seed`` and ``run`` (place in the given list, so that two
runs with one label and one seed stay apart). Infinite values become NaN: neither can be drawn.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd
from wapo_taxonomy import CLASS_CODES, CLASS_NAMES, UNKNOWN

from wapo_analysis.store import Run

RUN_KEYS = ("label", "seed", "run")
MAX_TOKEN_STEPS = 12
MAX_TOKEN_ROWS = 200_000


def run_label(run: Run) -> str:
    """Legend text of a run: the manifest's label, else the objective's name in capitals."""
    return str(run.manifest.get("label") or run.objective.upper())


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Labels of the runs, each once, in the order given."""
    return list(dict.fromkeys(run_label(run) for run in runs))


def labels_of(frame: pd.DataFrame) -> list[str]:
    """Labels in a prepared frame, each once, in the order of its rows."""
    return [str(label) for label in dict.fromkeys(frame["label"])]


def finite(values: pd.Series) -> pd.Series:
    """The same numbers as float64 with everything that is no finite number set to NaN."""
    numbers = pd.to_numeric(values, errors="coerce").astype("float64")
    return numbers.where(np.isfinite(numbers))


def step_frame(runs: Sequence[Run], columns: Iterable[str]) -> pd.DataFrame:
    """Columns of the step table of every run, one row per run and step.

    Parameters
    ----------
    runs : sequence of Run
        Opened runs.
    columns : iterable of str
        Columns of the ``steps`` table; absent ones are NaN.

    Returns
    -------
    DataFrame
        ``label, seed, run, step`` and the columns as float64.
    """
    names = list(columns)
    parts = []
    for place, run in enumerate(runs):
        values = {name: finite(run.steps.get(name, pd.Series(dtype=float))) for name in names}
        parts.append(_with_keys(pd.DataFrame({"step": run.steps["step"], **values}), run, place))
    return _stack(parts, ("step", *names))


def class_frame(
    runs: Sequence[Run], columns: Iterable[str], by: Sequence[str] = ("step", "cls")
) -> pd.DataFrame:
    """Exact totals of the class table of every run, summed within the given keys.

    Parameters
    ----------
    runs : sequence of Run
        Opened runs.
    columns : iterable of str
        Columns of the ``classes`` table to sum; a sum of nothing but NaN is NaN.
    by : sequence of str
        Keys to keep, among ``step, cls, sign, regime, prob_bin``.

    Returns
    -------
    DataFrame
        ``label, seed, run``, the keys, and the sums as float64.
    """
    names, keys = list(columns), list(by)
    parts = []
    for place, run in enumerate(runs):
        cells = run.classes
        values = pd.DataFrame({name: finite(cells[name]) for name in names})
        grouped = values.groupby([cells[key] for key in keys]).sum(min_count=1).reset_index()
        parts.append(_with_keys(grouped, run, place))
    return _stack(parts, (*keys, *names))


def with_empty_classes(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Add a row with 0 for every class a step has no token of: there, nothing is the true value.

    Parameters
    ----------
    frame : DataFrame
        Of :func:`class_frame`, with ``step`` and ``cls``.
    column : str
        Sum to fill. Where it is NaN for tokens of unknown class, the added rows are NaN as well,
        since those tokens may belong to any class.

    Returns
    -------
    DataFrame
        Every class code for every run and step.
    """
    if frame.empty:
        return frame
    steps = frame[[*RUN_KEYS, "step"]].drop_duplicates()
    every = steps.merge(pd.DataFrame({"cls": sorted(CLASS_NAMES)}), how="cross")
    full = every.merge(frame, how="left", on=[*RUN_KEYS, "step", "cls"], indicator=True)
    added = full["_merge"] == "left_only"
    hidden = full[column].isna() & ~added & (full["cls"] == CLASS_CODES[UNKNOWN])
    blind = hidden.groupby([full["run"], full["step"]]).transform("any")
    return full.assign(**{column: full[column].mask(added & ~blind, 0.0)}).drop(columns="_merge")


def rescored_steps(run: Run) -> list[int]:
    """Steps that have token rows scored a second time after the update."""
    cells, recorded = run.classes, run.token_steps()
    scored = set(cells.loc[cells["rescored"] > 0, "step"].astype(int))
    return [step for step in recorded if step in scored]


def spread(steps: Sequence[int], limit: int = MAX_TOKEN_STEPS) -> list[int]:
    """At most ``limit`` of the steps, evenly spaced, first and last included."""
    if len(steps) <= limit:
        return list(steps)
    places = np.unique(np.linspace(0, len(steps) - 1, limit).round().astype(int))
    return [steps[place] for place in places]


def token_frame(
    runs: Sequence[Run],
    columns: Iterable[str],
    rescored: bool = False,
    max_steps: int = MAX_TOKEN_STEPS,
) -> pd.DataFrame:
    """Token rows of a few evenly spaced steps of every run, so that long runs fit in memory.

    Parameters
    ----------
    runs : sequence of Run
        Opened runs.
    columns : iterable of str
        Columns of the ``tokens`` table, derived ones included.
    rescored : bool
        Take only steps whose tokens were scored again after the update.
    max_steps : int
        Most steps to read of one run; of these at most ``MAX_TOKEN_ROWS`` evenly spaced rows.

    Returns
    -------
    DataFrame
        ``label, seed, run, step`` and the columns.
    """
    names = [name for name in columns if name != "step"]
    parts = []
    for place, run in enumerate(runs):
        steps = rescored_steps(run) if rescored else run.token_steps()
        rows = run.tokens(spread(steps, max_steps))[["step", *names]]
        stride = -(-len(rows) // MAX_TOKEN_ROWS) or 1
        parts.append(_with_keys(rows.iloc[::stride], run, place))
    return _stack(parts, ("step", *names))


def mean_over_runs(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Mean over the runs of a label of every number in the frame, NaN left out.

    Parameters
    ----------
    frame : DataFrame
        Tidy frame with ``RUN_KEYS``.
    keys : sequence of str
        Keys to keep beside ``label``.

    Returns
    -------
    DataFrame
        ``label``, the keys and the means, labels in their first order.
    """
    rest = frame.drop(columns=["seed", "run"])
    return rest.groupby(["label", *keys], sort=False, as_index=False).mean()


def keep_labels(frame: pd.DataFrame, runs: Sequence[Run]) -> pd.DataFrame:
    """Add a row of NaN for every label without rows, so that its panel can say what is missing."""
    known = set(frame["label"])
    absent = [
        {"label": run_label(run), "seed": run.manifest.get("seed"), "run": place}
        for place, run in enumerate(runs)
        if run_label(run) not in known
    ]
    if not absent:
        return frame
    order = {label: place for place, label in enumerate(run_labels(runs))}
    empty = pd.DataFrame(absent).reindex(columns=frame.columns)
    full = pd.concat([frame, empty], ignore_index=True) if len(frame) else empty
    return full.sort_values("label", key=lambda s: s.map(order), kind="stable", ignore_index=True)


def _with_keys(frame: pd.DataFrame, run: Run, place: int) -> pd.DataFrame:
    keyed = frame.reset_index(drop=True)
    keyed.insert(0, "run", place)
    keyed.insert(0, "seed", run.manifest.get("seed"))
    keyed.insert(0, "label", run_label(run))
    return keyed


def _stack(parts: list[pd.DataFrame], columns: Sequence[str]) -> pd.DataFrame:
    """One frame of all parts; empty parts are left out, so they cannot spoil a dtype."""
    full = [part for part in parts if len(part)]
    if not full:
        return pd.DataFrame(columns=[*RUN_KEYS, *columns])
    return pd.concat(full, ignore_index=True)
