"""What the page shows, as plain values: the same for a file and for a live server.

One run is one dictionary: verdict and advice, the step columns, the predicted dH per class and
step, findings with the steps and rollouts they point at, and how far the prediction can be trusted.
What a single step holds (rollouts, tokens) is made by :mod:`wapo_analysis.report.steps`.
"""

from __future__ import annotations

import hashlib
import math
import os
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import wapo_taxonomy as tax

from wapo_analysis.audit import first_audit
from wapo_analysis.diagnose import VERDICT_WORDS, Diagnosis, Finding, diagnose
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors.entropy import entropy_band
from wapo_analysis.errors import UserError
from wapo_analysis.probes import trust
from wapo_analysis.results import step_words
from wapo_analysis.schema import STEPS
from wapo_analysis.settings import recorded_settings, shown_value
from wapo_analysis.store import Run
from wapo_analysis.store.manifest import OPENED_FROM
from wapo_analysis.train.config import TrainConfig

Json = dict[str, Any]
FACTS = ("source", "status", "task", "model", "temperature", "seed", "device", "started")
#: Most columns beside the schema's that a page carries of a run.
SHOWN_FOREIGN = 40


def run_data(run: Run, found: Diagnosis | None = None) -> Json:
    """Everything of a run that does not belong to a single step.

    Returns plain values for JSON: strings, finite numbers, None, lists, dictionaries. ``run``: an
    open run, finished or still being written; ``found``: its diagnosis, if the caller has it.
    """
    found = found or diagnose(run)
    context = Context(run)
    return {
        "id": run_id(run.path),
        "name": run.name,
        "label": run.label,
        "seed": run.seed,
        "path": place(run),
        "imported": bool(run.manifest.imported),
        "facts": _facts(run),
        "settings": {name: shown_value(value) for name, value in recorded_settings(run).items()},
        **verdict(run, found),
        "bands": _bands(context),
        "steps": step_columns(run),
        "classes": class_columns(run),
        "trust": trust(run.probes).to_dict("records"),
        "token_steps": run.token_steps(),
        "has_rollouts": bool(run.recorded_steps("rollouts")),
        "updates": plain(pd.Series(run.column("updates")).median()),
    }


def run_id(folder: Path) -> str:
    """Short name of a run in addresses: one folder always has the same."""
    return hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:12]


def verdict(run: Run, found: Diagnosis) -> Json:
    """The first screen in words: what, since when, what to do; then every finding."""
    worst = found.worst_severity
    told = next((f for f in found.findings if f.severity != "info"), None)
    # The best step is worth a word after a failure, or where a checkpoint can be had of it.
    best = (
        found.verdict not in ("healthy", "insufficient_data") or found.best_checkpoint is not None
    )
    return {
        "verdict": found.verdict,
        "verdict_words": VERDICT_WORDS[found.verdict],
        "tone": _tone(found),
        "severity": worst,
        "sentence": found.sentence,
        "onset": found.onset_step,
        "first_warning": found.first_warning_step,
        "advice": told.advice.lines() if told else [],
        "best_step": found.best_step if best else None,
        "best_checkpoint": found.best_checkpoint,
        "best_words": found.best_words if best else "",
        "command": found.command,
        "drivers": [driver.to_dict() for driver in found.drivers],
        "findings": [_finding(found, finding) for finding in found.findings],
        "skipped": [skipped.to_dict() for skipped in found.skipped],
        "audit": _audit(run),
    }


def _audit(run: Run) -> Json | None:
    """What the trainer really computes, by its first steps; None without token rows."""
    found = first_audit(run)
    if found is None:
        return None
    told = found.to_dict()
    missing = [f"{name}: {why}" for name, why in found.missing.items()]
    return {"summary": found.summary, "deviations": told["deviations"], "missing": missing}


def _tone(found: Diagnosis) -> str:
    if found.verdict == "insufficient_data":
        return "unknown"
    if found.verdict != "healthy":
        return "bad"
    return "warn" if found.reaches("warning") else "good"


def _finding(found: Diagnosis, finding: Finding) -> Json:
    """A finding with what a reader can click: its step, its tokens and rollouts."""
    named = found.culprits
    mine = named if named is not None and named.finding == finding.name else None
    return {
        "name": finding.name,
        "severity": finding.severity,
        "step": finding.step,
        "message": finding.message,
        "advice": finding.advice.lines(),
        "reference": finding.reference,
        "evidence": finding.to_dict()["evidence"],
        "tokens": [{"text": t, "share": plain(s)} for t, s in mine.tokens] if mine else [],
        "rollouts": [
            {"step": step, "rollout": number, "share": plain(share)}
            for step, number, share in (mine.rollouts if mine else ())
        ],
        "cls": mine.cls if mine else None,
        "when": step_words(mine.steps) if mine else "",
    }


def place(run: Run) -> str:
    """Where a user finds a run: its folder, or the source that was opened as one."""
    return str(run.manifest.get(OPENED_FROM) or run.path)


def _facts(run: Run) -> list[list[str]]:
    # What a source does not say is no fact: an import fills in these two.
    left_out = ("status", "temperature") if run.manifest.imported else ()
    known = [(name, run.manifest.get(name)) for name in FACTS if name not in left_out]
    known += list(_settings(run).items())
    return [[name, str(value)] for name, value in known if value not in (None, "")]


def _settings(run: Run) -> dict[str, str]:
    """Settings of a built-in run off their default, and the command that trains it again."""
    if run.manifest.source != "built-in":
        return {}
    try:
        config = TrainConfig.from_dict(run.manifest.config)
    except UserError:  # of another version, or of a task whose package is not installed here
        return {}
    off = {name: value for name, value in config.changed().items() if name not in FACTS}
    told = {name: shown_value(value) for name, value in off.items()}
    command = shlex.join(["wapo", "train", *config.options(), "--out", str(run.path)])
    return told if run.manifest.forked else {**told, "made by": command}


def _bands(context: Context) -> Json:
    """Levels that entropy and reward are judged by."""
    band, reward = entropy_band(context), context.reward
    bands: Json = {}
    if band is not None:
        bands["entropy"] = {
            name: plain(getattr(band, name))
            for name in ("level", "low", "high", "lowest", "highest")
        }
    if reward is not None:
        series = reward.series
        bands["reward"] = {
            "level": plain(series.level),
            "low": plain(series.level - reward.margin),
            "high": plain(series.level + reward.margin),
        }
    return bands


def step_columns(run: Run) -> Json:
    """Step columns as lists, those without a number left out; units and words beside them."""
    frame = run.steps
    values: dict[str, list[float | None]] = {}
    foreign = 0
    for name in frame.columns:
        numbers = pd.to_numeric(frame[name], errors="coerce").to_numpy(np.float64)
        if not np.isfinite(numbers).any():
            continue
        foreign += name not in STEPS
        if name in STEPS or foreign <= SHOWN_FOREIGN:
            values[str(name)] = plain_list(numbers)
    known = {name: STEPS[name] for name in values if name in STEPS}
    return {
        "values": values,
        "units": {name: "" if c.unit in ("1", "text") else c.unit for name, c in known.items()},
        "docs": {name: column.doc for name, column in known.items()},
    }


def class_columns(run: Run) -> Json:
    """Per step and class: tokens, gradient mass, predicted dH, all exact over every token."""
    totals = run.classes
    if totals.empty:
        return {"step": []}
    named = totals.assign(cls=totals["cls"].astype(str))
    steps = sorted(int(step) for step in named["step"].unique())
    data: Json = {"step": steps}
    for column in ("tokens", "grad_mass", "pred_dentropy_sum", "dentropy_sum"):
        table = named.pivot_table(
            index="step", columns="cls", values=column, aggfunc=lambda v: v.sum(min_count=1)
        )
        table = table.reindex(index=steps, columns=tax.CLASSES)
        if np.isfinite(table.to_numpy(np.float64)).any():
            # A class without tokens has nothing to add: zero is its true value.
            data[column] = {name: plain_list(table[name].fillna(0.0)) for name in tax.CLASSES}
    return data


def plain(value: Any) -> float | int | None:
    """A number for JSON: six digits, None for what is not finite."""
    if value is None:
        return None
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if number.is_integer() and abs(number) < 1e15 else float(f"{number:.6g}")


def plain_list(values: Iterable[Any]) -> list[float | int | None]:
    """Numbers for JSON; see :func:`plain`."""
    return [plain(value) for value in values]


def comparison_data(runs: Sequence[Run]) -> Json | None:
    """The verdict table of several runs; None for one."""
    if len(runs) < 2:
        return None
    from wapo_analysis.compare import compare

    found = compare(runs)
    header, *rows = found.rows()
    return {"header": header, "rows": rows, "sentences": list(found.sentences())}
