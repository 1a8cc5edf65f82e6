"""Runs to tidy frames: the part of every ``prepare_x`` that is the same.

Frames carry ``label`` (legend text), ``seed`` and ``run`` (place in the given list, so that two
runs with one label and one seed stay apart). Infinite values become NaN: neither can be drawn.
"""

from collections.abc import Iterable, Sequence
from weakref import ref

import numpy as np
import pandas as pd
from wapo_taxonomy import CLASS_CODES, CLASS_NAMES, UNKNOWN

from wapo_analysis.derive import class_codes
from wapo_analysis.plots.style import drawable
from wapo_analysis.series import evenly
from wapo_analysis.settings import setting_labels
from wapo_analysis.store import Run

RUN_KEYS = ("label", "seed", "run")
MAX_TOKEN_STEPS = 12
MAX_TOKEN_ROWS = 200_000
#: What figures read of the token table.
TOKEN_COLUMNS = (
    "step", "rollout", "position", "token_id", "advantage", "sign", "cls", "kept", "clipped",
    "prob", "logp", "logp_old", "entropy", "coef", "grad_norm", "pred_dprob", "dprob",
    "pred_dentropy", "dentropy",
)  # fmt: skip
_KEPT_READINGS = 6


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Legend text of every run; those with one text are seeds of one setting."""
    return [drawable(label) for label in setting_labels(runs)]


def labels_of(frame: pd.DataFrame) -> list[str]:
    """Labels in a prepared frame, each once, in the order of its rows."""
    return [str(label) for label in dict.fromkeys(frame["label"])]


def finite(values: pd.Series) -> pd.Series:
    """The same numbers as float64 with everything that is not finite set to NaN."""
    numbers = pd.to_numeric(values, errors="coerce").astype("float64")
    return numbers.where(np.isfinite(numbers))


def step_frame(runs: Sequence[Run], columns: Iterable[str]) -> pd.DataFrame:
    """Columns of the step table of every run, one row per run and step.

    Returns ``label, seed, run, step`` and the columns as float64. ``columns``: columns of the
    ``steps`` table; absent ones are NaN.
    """
    names = list(columns)
    parts = []
    for place, run in enumerate(runs):
        values = {name: finite(run.steps.get(name, pd.Series(dtype=float))) for name in names}
        parts.append(_with_place(pd.DataFrame({"step": run.steps["step"], **values}), place))
    return keyed(parts, runs, ("step", *names))


def class_frame(
    runs: Sequence[Run], columns: Iterable[str], by: Sequence[str] = ("step", "cls")
) -> pd.DataFrame:
    """Exact totals of the class table of every run, summed within the given keys.

    Returns ``label, seed, run``, the keys (``cls`` as a code), and the sums as float64.
    ``columns``: columns of the ``classes`` table to sum; a sum of nothing but NaN is NaN; ``by``:
    keys to keep, among ``step, cls, sign, regime, prob_bin``.
    """
    names, keys = list(columns), list(by)
    parts = []
    for place, run in enumerate(runs):
        cells = run.classes.assign(cls=class_codes(run.classes["cls"]))
        values = pd.DataFrame({name: finite(cells[name]) for name in names})
        grouped = values.groupby([cells[key] for key in keys]).sum(min_count=1).reset_index()
        parts.append(_with_place(grouped, place))
    return keyed(parts, runs, (*keys, *names))


def with_empty_classes(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Add a row with 0 for every class a step has no token of: there, nothing is the true value.

    Returns every class code for every run and step. ``frame``: of :func:`class_frame`, with
    ``step`` and ``cls``. ``column``: sum to fill. Where it is NaN for tokens of unknown class, the
    added rows are NaN as well, since those tokens may belong to any class.
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


def class_table(frame: pd.DataFrame, column: str) -> pd.DataFrame:
    """Rows of one label as a table: steps down, class names across, mean over runs inside."""
    known = frame.dropna(subset=["step", "cls"])
    rows = known.assign(name=known["cls"].astype(int).map(CLASS_NAMES))
    return rows.pivot_table(index="step", columns="name", values=column, aggfunc="mean", sort=True)


def token_frame(
    runs: Sequence[Run],
    columns: Iterable[str],
    rescored: bool = False,
    max_steps: int = MAX_TOKEN_STEPS,
) -> pd.DataFrame:
    """Token rows of a few evenly spaced steps of every run, so that long runs fit in memory.

    Returns ``label, seed, run, step`` and the columns; ``cls`` as a code.

    Parameters
    ----------
    columns : iterable of str
        Some of ``TOKEN_COLUMNS``.
    rescored : bool
        Take only steps whose tokens were scored again after the update.
    max_steps : int
        Most steps to read of one run; of these at most ``MAX_TOKEN_ROWS`` evenly spaced rows.
    """
    names = [name for name in columns if name != "step"]
    parts = []
    for place, run in enumerate(runs):
        steps = run.rescored_steps() if rescored else run.token_steps()
        rows = _token_rows(run, tuple(evenly(steps, max_steps)))
        parts.append(_with_place(rows[["step", *names]], place))
    return keyed(parts, runs, ("step", *names))


_readings: list[tuple["ref[Run]", tuple[int, ...], pd.DataFrame]] = []


def _token_rows(run: Run, steps: tuple[int, ...]) -> pd.DataFrame:
    """Evenly spaced token rows of some steps; kept for a while, since most figures share one."""
    for known, read, rows in _readings:
        if known() is run and read == steps:
            return rows
    rows = run.tokens(steps)[list(TOKEN_COLUMNS)] if steps else pd.DataFrame(columns=TOKEN_COLUMNS)
    rows = rows.assign(cls=class_codes(rows["cls"]))
    stride = -(-len(rows) // MAX_TOKEN_ROWS) or 1
    rows = rows.iloc[::stride].reset_index(drop=True)
    _readings.append((ref(run), steps, rows))
    del _readings[:-_KEPT_READINGS]
    return rows


def mean_over_runs(
    frame: pd.DataFrame, keys: Sequence[str], shares: Sequence[str] = ()
) -> pd.DataFrame:
    """Mean over the runs of a label of every number in the frame, NaN left out.

    Returns ``label``, the keys and the means, labels in their first order. ``frame``: tidy frame
    with ``RUN_KEYS``; ``keys``: keys to keep beside ``label``; ``shares``: columns of which a run
    that has no row of some keys has nothing there, so that their means add up as its shares do.
    """
    rows = frame.drop(columns=["seed", "run"]).groupby(["label", *keys], sort=False)
    means = rows.mean()
    for name in shares:
        runs = frame.dropna(subset=name).groupby("label")["run"].nunique()
        means[name] = rows[name].sum(min_count=1).div(runs, level="label")
    return means.reset_index()


def keep_labels(frame: pd.DataFrame, runs: Sequence[Run]) -> pd.DataFrame:
    """Add a row of NaN for every label without rows, so that its panel can say what is missing."""
    known, labels = set(frame["label"]), run_labels(runs)
    absent = [
        {"label": label, "seed": run.seed, "run": place}
        for place, (label, run) in enumerate(zip(labels, runs, strict=True))
        if label not in known
    ]
    if not absent:
        return frame
    order = {label: place for place, label in enumerate(dict.fromkeys(labels))}
    empty = pd.DataFrame(absent).reindex(columns=frame.columns)
    full = pd.concat([frame, empty], ignore_index=True) if len(frame) else empty
    return full.sort_values("label", key=lambda s: s.map(order), kind="stable", ignore_index=True)


def keyed(
    parts: Sequence[pd.DataFrame], runs: Sequence[Run], columns: Sequence[str]
) -> pd.DataFrame:
    """One frame of the parts of several runs, with ``label, seed, run`` in front.

    ``parts``: each with ``run``, the place of its run; empty ones are left out, so they spoil no
    dtype; ``columns``: columns of the result if every part is empty.
    """
    full = [part for part in parts if len(part)]
    if not full:
        return pd.DataFrame(columns=[*RUN_KEYS, *columns])
    frame = pd.concat(full, ignore_index=True)
    labels, seeds = dict(enumerate(run_labels(runs))), {p: run.seed for p, run in enumerate(runs)}
    rest = [name for name in frame if name != "run"]
    places = frame["run"]
    keys = {"label": places.map(labels), "seed": places.map(seeds), "run": places}
    return pd.concat([pd.DataFrame(keys), frame[rest]], axis=1)


def _with_place(frame: pd.DataFrame, place: int) -> pd.DataFrame:
    return frame.reset_index(drop=True).assign(run=place)
