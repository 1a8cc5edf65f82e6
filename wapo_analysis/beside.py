"""What runs beside a training: an audit after its first steps, a guard that may act on findings.

Both work in the thread that writes the run, on the run folder alone, and keep every failure of
theirs to themselves.
"""

import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

from wapo_analysis.audit import audit
from wapo_analysis.diagnose import Finding, diagnose
from wapo_analysis.record.beside import Action, Ring
from wapo_analysis.store import Run, open_run

log = logging.getLogger(__name__)

#: Steps after which the audit is printed, once.
AUDIT_AFTER = 3
#: Warnings about what the gradient is made of: nothing is lost yet, and often nothing will be.
SHARES = {
    "negative_mass_outweighs", "one_class_dominates", "one_class_takes_the_gradient",
    "positive_mass_outweighs",
}  # fmt: skip
#: A diagnosis waits this many times as long as the last one took: at most 5% of the time.
REST = 20.0


class BesideTraining:
    """Judges the run at a path as its steps are written.

    Parameters
    ----------
    note : callable
        Changes entries of the manifest: ``note(guard=[...])``.
    audit : bool
        Print an audit after the third step.
    on_warning, on_critical : str, callable or None
        What a new finding of that severity leads to; a critical one is a warning as well.
    ring : Ring, optional
        Checkpoints, of which a finding protects one.
    earlier : sequence of mapping
        What the guard did in a run that is continued: it does that no more.
    """

    def __init__(
        self,
        path: Path,
        note: Callable[..., None],
        audit: bool,
        on_warning: Action,
        on_critical: Action,
        ring: Ring | None = None,
        earlier: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        self._path, self._note, self._audit = path, note, audit
        self._actions = {"warning": on_warning, "critical": on_critical}
        self._guards = on_warning is not None or on_critical is not None
        self._did = [dict(entry) for entry in earlier]
        self._met = {(did.get("finding"), did.get("severity")) for did in self._did}
        self._ring, self._failed = ring, any(severity == "critical" for _, severity in self._met)
        self._asked: set[str] = set()
        self._lock = threading.Lock()
        self._next = 0.0

    def __call__(self, step: int) -> None:
        """Judge, if it is time; called in the writer's thread, never raises."""
        try:
            if self._audit and step >= AUDIT_AFTER:
                self._audit = False
                sys.stderr.write(audit(open_run(self._path)).to_text() + "\n")
            if self._guards and perf_counter() >= self._next:
                started = perf_counter()
                self._look(step)
                self._next = perf_counter() + REST * (perf_counter() - started)
        except (Exception, SystemExit) as error:  # sys.exit in a user's function
            self._audit = self._guards = False
            log.warning(
                "judging %s beside its training stopped (%s: %s); training goes on",
                self._path, type(error).__name__, error,
            )  # fmt: skip

    def asked(self, action: str) -> bool:
        """Whether an action was asked for since the last call; called by the training thread."""
        with self._lock:
            found = action in self._asked
            self._asked.discard(action)
            return found

    def _look(self, step: int) -> None:
        self.judge(step, open_run(self._path))

    def judge(self, step: int, run: Run) -> None:
        """Diagnose a run as it stands after a step, and act on what is new."""
        found = diagnose(run)
        if found.verdict == "insufficient_data":
            return
        for finding in found.findings:
            for severity in ("warning", "critical"):
                reached = finding.severity == severity or finding.severity == "critical"
                action = self._actions[severity]
                if not reached or action is None or (finding.name, severity) in self._met:
                    continue
                if finding.name in SHARES and not callable(action):
                    continue
                self._met.add((finding.name, severity))
                self._act(step, finding, severity, action)
            self._failed |= finding.severity == "critical"

    def _act(self, step: int, finding: Finding, severity: str, action: Action) -> None:
        word = action if isinstance(action, str) else getattr(action, "__name__", "a function")
        entry: dict[str, Any] = {"step": step, "finding": finding.name}
        entry |= {"severity": severity, "did": word}
        if self._ring is not None and not self._failed:  # what comes later is of a failed run
            entry["checkpoint"] = self._ring.protect(finding.step)
            if entry["checkpoint"] is not None:
                word += f", the checkpoint of step {entry['checkpoint']} is kept"
        self._did.append(entry)
        log.warning("step %d: %s (%s); %s", step, finding.name, finding.message, word)
        self._note(guard=self._did)
        if callable(action):
            checkpoint = entry.get("checkpoint")
            told = {"message": finding.message, "at": step, "checkpoint": checkpoint}
            action(finding.to_dict() | told)
            return
        with self._lock:
            self._asked.add(str(action))
