"""What the page says: verdicts in words, findings, completions, provenance."""

import json
import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from wapo_analysis.compare import Comparison
from wapo_analysis.diagnose import SEVERITIES, VERDICT_WORDS, Diagnosis, Driver
from wapo_analysis.report.samples import Sample, pick_samples
from wapo_analysis.store import Run

TRAIN_OPTIONS = {
    "objective": "objective",
    "task": "task",
    "model": "model",
    "include_bins": "include-bins",
    "exclude_bins": "exclude-bins",
    "steps": "steps",
    "seed": "seed",
    "lr": "lr",
    "epochs": "epochs",
    "minibatches": "minibatches",
    "prompts_per_step": "prompts",
    "rollouts_per_prompt": "rollouts",
    "temperature": "temperature",
}
"""Setting to option of ``wapo train``."""
FACTS = ("status", "task", "model", "tokenizer", "temperature", "seed", "device", "started")


@dataclass(frozen=True)
class Card:
    """Verdict on one setting in plain words."""

    label: str
    verdict: str
    tone: str
    count: str
    sentence: str
    since: str
    advice: str
    drivers: tuple[Driver, ...]
    drivers_title: str
    culprits: str


def verdict_cards(comparison: Comparison) -> list[Card]:
    """One card per setting; with several seeds the first run that went wrong speaks for it."""
    return [_card(label, comparison.diagnoses_of(label)) for label in comparison.labels]


def _card(label: str, diagnoses: list[Diagnosis]) -> Card:
    bad = [d for d in diagnoses if d.onset_step is not None]
    told = bad or diagnoses
    one = told[0]
    same = sum(d.verdict == one.verdict for d in diagnoses)
    warning = next((f for f in one.findings if f.severity != "info"), None)
    return Card(
        label=label,
        verdict=VERDICT_WORDS[one.verdict],
        tone="bad" if bad else "unknown" if one.verdict == "insufficient_data" else "good",
        count=f"{same} of {len(diagnoses)} runs" if len(diagnoses) > 1 else "",
        sentence=(f"{one.run}: " if len(diagnoses) > 1 else "") + one.sentence,
        since=_since(one),
        advice=warning.advice if warning else "",
        drivers=one.drivers,
        drivers_title=_drivers_title(one),
        culprits="" if one.culprits is None else one.culprits.words(),
    )


def _since(diagnosis: Diagnosis) -> str:
    if diagnosis.onset_step is None:
        return ""
    first = diagnosis.first_warning_step
    noticed = f", first warning at step {first}" if first is not None else ""
    return f"Began at step {diagnosis.onset_step}{noticed}."


def _drivers_title(diagnosis: Diagnosis) -> str:
    if not diagnosis.drivers:
        return ""
    way = "up" if diagnosis.drivers[0].predicted_dentropy > 0 else "down"
    window = "around the onset" if diagnosis.onset_step is not None else "over the run"
    return f"What pushed entropy {way} {window} (below zero: against it)"


def key_figure(comparison: Comparison) -> str:
    """Name of the picture that shows the verdict: entropy if it left its range, else reward."""
    moved = any(d.verdict.startswith("entropy") for d in comparison.diagnoses)
    return "entropy" if moved else "reward"


def table_notes(comparison: Comparison) -> list[str]:
    """Sentences on the table; the verdicts among them stand in the cards."""
    return [*comparison.heads_up, *comparison.notes()[len(comparison.labels) :]]


def finding_lists(comparison: Comparison) -> list[Diagnosis]:
    """Diagnoses with something to tell in detail, worst first."""
    telling = [d for d in comparison.diagnoses if d.findings or d.skipped]
    return sorted(telling, key=lambda d: not d.reaches("critical"))


def headline(diagnosis: Diagnosis) -> str:
    """Run, verdict and how many findings of which severity."""
    counts = Counter(finding.severity for finding in diagnosis.findings)
    told = [f"{counts[name]} {name}" for name in reversed(SEVERITIES) if counts[name]]
    return f"{diagnosis.run}: {VERDICT_WORDS[diagnosis.verdict]} ({', '.join(told) or 'silent'})"


def sample_lists(runs: Sequence[Run]) -> list[tuple[str, list[Sample]]]:
    """Run name and sample completions of the first run of every label that has some."""
    chosen: dict[str, tuple[str, list[Sample]]] = {}
    for run in runs:
        if run.label not in chosen and (samples := pick_samples(run)):
            chosen[run.label] = (run.name, samples)
    return list(chosen.values())


@dataclass(frozen=True)
class Provenance:
    """Where a run comes from: facts for the table, the whole manifest, the command."""

    name: str
    facts: tuple[tuple[str, str], ...]
    manifest: str


def provenance(run: Run) -> Provenance:
    """Facts of the manifest that a reader checks first, and the rest as JSON."""
    manifest = run.manifest
    objective = manifest.get("objective")
    settings = objective if isinstance(objective, dict) else {"name": objective}
    facts = [
        ("label", run.label),
        ("source", manifest.get("source")),
        ("steps", len(run.steps)),
        ("objective", _pairs(settings)),
        *((name, manifest.get(name)) for name in FACTS),
        ("versions", _pairs(manifest.get("versions"))),
        ("token rows", _pairs({k: manifest.get(k) for k in ("token_fraction", "token_every")})),
    ]
    return Provenance(
        name=run.name,
        facts=tuple((name, str(value)) for name, value in facts if value not in (None, "")),
        manifest=json.dumps(manifest.to_dict(), indent=1, ensure_ascii=False),
    )


def _pairs(values: Any) -> str:
    """Settings that are set, as ``name value`` with commas; other things as they are."""
    if not isinstance(values, dict):
        return "" if values is None else str(values)
    known = {k: v for k, v in values.items() if v not in (None, [], (), "", False)}
    return ", ".join(f"{name} {value}" for name, value in known.items())


def commands(runs: Sequence[Run]) -> list[str]:
    """Commands that make the runs and this page again; runs of other sources have no first part."""
    folders = shlex.join(str(run.path) for run in runs)
    made = [_train_command(run) for run in runs if run.manifest.get("source") == "built-in"]
    return [*made, *(f"wapo diagnose {shlex.quote(str(run.path))}" for run in runs[:1]),
            f"wapo figures {folders}", f"wapo report {folders}"]  # fmt: skip


def _train_command(run: Run) -> str:
    config = run.manifest.get("config")
    words = ["wapo", "train"]
    for setting, option in TRAIN_OPTIONS.items():
        value = config.get(setting) if isinstance(config, dict) else None
        if value not in (None, [], ()):
            text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            words += [f"--{option}", text]
    return shlex.join([*words, "--out", str(run.path)])
