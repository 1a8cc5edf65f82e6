"""Feed the collapse suite's scalars to rl-doctor, rlprobe and rlwatch, step by step.

Runs in an environment of its own, which needs none of ours:

    python -m venv rivals && rivals/bin/pip install rldoctor==0.2.0 rlprobe==0.1.0 rlwatch==0.5.1
    rivals/bin/python experiments/suite/rivals.py runs/collapse_suite

Reads ``scalars.json`` (run to list of steps) and writes ``rivals.json``: per tool and run the first
step of a warning or worse, of a critical one, and the names of everything at warning or worse. A
tool sees what a live run would show it: after step n the first n steps. rl-doctor and rlprobe are
asked after every step; rlwatch gets every step logged. "short" cuts waiting times and windows to
what a run of 48 steps can fill, as the shipped ones are made for longer runs.
"""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Rows = list[dict[str, float]]
Alarm = tuple[int, str, str]  # step, "warning" or "critical", name
SHORT = 10
"""Steps of warm-up and window in the short settings."""
LOUD = {"warn": "warning", "warning": "warning", "critical": "critical"}


def trl_names(row: dict[str, float]) -> dict[str, float]:
    """Log entry as TRL's GRPOTrainer writes it."""
    return {
        "step": row["step"],
        "reward": row["reward"],
        "reward_std": row["reward_std"],
        "frac_reward_zero_std": row["groups_all_wrong"] + row["groups_all_right"],
        "entropy": row["entropy"],
        "loss": row["loss"],
        "grad_norm": row["grad_norm"],
        "learning_rate": row["lr"],
        "clip_ratio/low_mean": row["clip_low"],
        "clip_ratio/high_mean": row["clip_high"],
        "clip_ratio/region_mean": row["clip_low"] + row["clip_high"],
        "completions/mean_length": row["length"],
        "completions/clipped_ratio": row["truncated"],
        "step_time": row["seconds"],
    }


def rl_doctor(rows: Rows) -> Iterator[Alarm]:
    """Diagnosis of every beginning of at least eight steps."""
    from rl_doctor import diagnose, run_from_records

    logs = [trl_names(row) for row in rows]
    for stop in range(8, len(logs) + 1):
        for finding in diagnose(run_from_records(logs[:stop])).problems:
            severity = LOUD.get(finding.severity.name.lower())
            if severity is not None:
                yield int(rows[stop - 1]["step"]), severity, finding.detector


def rlprobe(rows: Rows, short: bool = False) -> Iterator[Alarm]:
    """Diagnosis of every beginning; ``short`` lowers the detectors' own least number of steps."""
    from rlprobe.doctor.base import REGISTRY
    from rlprobe.doctor.engine import diagnose_view
    from rlprobe.doctor.runview import RunView
    from rlprobe.schemas import RunManifest, StepRecord

    manifest = RunManifest(run_id="suite", created_at="2026-01-01T00:00:00", algorithm="grpo")
    shipped = {detector: detector.min_steps for detector in REGISTRY}
    records = [
        StepRecord(
            step=int(row["step"]),
            reward_mean=row["reward"],
            reward_std=row["reward_std"],
            entropy_mean=row["entropy"],
            clip_fraction=row["clip_low"] + row["clip_high"],
            zero_variance_group_frac=row["groups_all_wrong"] + row["groups_all_right"],
            loss=row["loss"],
            lr=row["lr"],
            grad_norm=row["grad_norm"],
            nan_count=int(row["nonfinite"]),
            completion_len_mean=row["length"],
            max_len_hit_frac=row["truncated"],
            truncation_rate=row["truncated"],
            repetition_rate=row["repetition"],
            step_time_s=row["seconds"],
        )
        for row in rows
    ]
    try:
        for detector in REGISTRY:
            detector.min_steps = SHORT if short else shipped[detector]
        for stop in range(1, len(records) + 1):
            for finding in diagnose_view(RunView(manifest, records[:stop])):
                if finding.severity in LOUD:
                    yield records[stop - 1].step, LOUD[finding.severity], finding.signature_id
    finally:
        for detector, steps in shipped.items():
            detector.min_steps = steps


def rlwatch(rows: Rows, short: bool = False) -> Iterator[Alarm]:
    """Every step through the detectors, without the delivery of alerts."""
    from rlwatch.config import RLWatchConfig
    from rlwatch.detectors import DetectorSuite

    config = RLWatchConfig()
    if short:
        for part in vars(config).values():
            for name in ("warmup_steps", "consecutive_steps", "rolling_window", "baseline_window"):
                if hasattr(part, name):
                    setattr(part, name, min(getattr(part, name), SHORT))
    detectors = DetectorSuite(config)
    for row in rows:
        alerts = detectors.check_step(
            int(row["step"]),
            entropy=row["entropy"],
            reward_mean=row["reward"],
            reward_std=row["reward_std"],
            loss=row["loss"],
            grad_norm=row["grad_norm"],
        )
        for alert in alerts:
            severity = LOUD.get(alert.severity)
            if severity is not None:
                yield int(row["step"]), severity, alert.detector


TOOLS: dict[str, Callable[[Rows], Iterator[Alarm]]] = {
    "rl-doctor 0.2.0": rl_doctor,
    "rlprobe 0.1.0": rlprobe,
    "rlprobe 0.1.0, short": lambda rows: rlprobe(rows, short=True),
    "rlwatch 0.5.1": rlwatch,
    "rlwatch 0.5.1, short": lambda rows: rlwatch(rows, short=True),
}


def first_alarms(alarms: Iterator[Alarm]) -> dict[str, Any]:
    """First step of each severity and every name."""
    found = list(alarms)
    critical = [step for step, severity, _ in found if severity == "critical"]
    return {
        "warning": min((step for step, _, _ in found), default=None),
        "critical": min(critical, default=None),
        "names": sorted({f"{severity}:{name}" for _, severity, name in found}),
    }


def main() -> None:
    logging.disable(logging.CRITICAL)
    out = Path(sys.argv[1])
    runs: dict[str, Rows] = json.loads((out / "scalars.json").read_text())
    found = {
        tool: {name: first_alarms(watch(rows)) for name, rows in runs.items()}
        for tool, watch in TOOLS.items()
    }
    (out / "rivals.json").write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
