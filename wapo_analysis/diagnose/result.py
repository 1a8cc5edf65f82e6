"""What a diagnosis is: verdict, drivers, findings, and what could not be checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from wapo_analysis.diagnose.words import as_markdown, as_text
from wapo_analysis.errors import unknown_name

Severity = Literal["info", "warning", "critical"]
Verdict = Literal[
    "healthy",
    "entropy_explosion",
    "entropy_collapse",
    "reward_collapse",
    "stalled",
    "diverged",
    "insufficient_data",
]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
Number = float | int | str | None


def plain_number(value: Number) -> Number:
    """Six significant digits; what is not finite becomes None, as JSON has no word for it."""
    if isinstance(value, str) or value is None or isinstance(value, int):
        return value
    return float(f"{value:.6g}") if isfinite(value) else None


@dataclass(frozen=True, slots=True)
class Driver:
    """What one class of tokens pushes the entropy by.

    Attributes
    ----------
    cls : str
        Class name of the taxonomy.
    predicted_dentropy : float
        First-order entropy change, nats per unit learning rate in logit space, summed over the
        tokens of the window around the onset; signed.
    counterfactual_dentropy : float or None
        Entropy change in nats of the class's own step applied alone, summed over the probed steps
        of the window; None without probes.
    share : float
        Part of all push in the direction of the verdict. The pushing classes sum to 1; a negative
        share is a class that pushes against it.
    """

    cls: str
    predicted_dentropy: float
    counterfactual_dentropy: float | None
    share: float

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "class": self.cls,
            "predicted_dentropy": plain_number(self.predicted_dentropy),
            "counterfactual_dentropy": plain_number(self.counterfactual_dentropy),
            "share": plain_number(self.share),
        }


@dataclass(frozen=True, slots=True)
class Culprits:
    """Tokens and rollouts that the push of one class came from.

    Attributes
    ----------
    finding : str
        Name of the finding they stand behind.
    cls : str
        Class name of the taxonomy.
    steps : tuple of int
        Steps whose token rows were read.
    tokens : tuple of (str, float)
        Texts of the tokens and their shares of the class's push, largest first.
    rollouts : tuple of (int, int, float)
        Steps, numbers and shares of rollouts, largest first.
    """

    finding: str
    cls: str
    steps: tuple[int, ...]
    tokens: tuple[tuple[str, float], ...]
    rollouts: tuple[tuple[int, int, float], ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "class": self.cls,
            "token_steps": list(self.steps),
            "tokens": [{"token": text, "share": plain_number(s)} for text, s in self.tokens],
            "rollouts": [
                {"step": step, "rollout": number, "share": plain_number(s)}
                for step, number, s in self.rollouts
            ],
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing seen in a run.

    Attributes
    ----------
    name : str
        Stable name of what was found.
    severity : {"info", "warning", "critical"}
        A verdict other than healthy or insufficient_data has a critical finding of its name.
    step : int
        Step it began.
    message : str
        One plain sentence with the numbers (text forms only).
    evidence : mapping of str to number
        The numbers it rests on.
    advice : str
        What to do, naming the setting to change.
    reference : str
        Where to read more.
    warned : int, optional
        First step beyond the warning threshold, if later than ``step``.
    until : int, optional
        Step beyond the critical threshold, if it got there.
    """

    name: str
    severity: Severity
    step: int
    message: str
    evidence: Mapping[str, Number]
    advice: str
    reference: str
    warned: int | None = None
    until: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "severity": self.severity,
            "step": self.step,
            "evidence": {name: plain_number(value) for name, value in self.evidence.items()},
            "advice": self.advice,
            "reference": self.reference,
        }


@dataclass(frozen=True, slots=True)
class Skipped:
    """A check that could not be made, and the columns that were missing."""

    name: str
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"name": self.name, "missing": list(self.missing)}


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """Judgement of one run.

    Attributes
    ----------
    run : str
        Name of the run.
    verdict : str
        One of healthy, entropy_explosion, entropy_collapse, reward_collapse, stalled, diverged,
        insufficient_data.
    onset_step : int or None
        First step of the departure that led to the verdict; None if healthy.
    first_warning_step : int or None
        First step beyond any warning threshold, whatever came of it.
    drivers : tuple of Driver
        Classes, the one that pushes most in the direction of the verdict first.
    culprits : Culprits or None
        Tokens and rollouts behind the push of the driving class; None without a verdict or an early
        warning, or without token rows near it.
    findings : tuple of Finding
        The one behind the verdict first, then most severe first, then by step.
    skipped : tuple of Skipped
        Checks without data.
    sentence : str
        The verdict in plain words.
    """

    run: str
    verdict: Verdict
    onset_step: int | None
    first_warning_step: int | None
    drivers: tuple[Driver, ...]
    culprits: Culprits | None = None
    findings: tuple[Finding, ...]
    skipped: tuple[Skipped, ...]
    sentence: str

    @property
    def worst_severity(self) -> Severity | None:
        """Severity of the worst finding, None without findings."""
        ranks = [SEVERITIES.index(finding.severity) for finding in self.findings]
        return SEVERITIES[max(ranks)] if ranks else None

    def reaches(self, severity: str) -> bool:
        """Whether a finding is at or above a severity.

        Raises
        ------
        UserError
            On a name that is no severity.
        """
        if severity not in SEVERITIES:
            raise unknown_name("severity", severity, SEVERITIES)
        worst = self.worst_severity
        allowed = SEVERITIES[SEVERITIES.index(severity) :]
        return worst is not None and worst in allowed

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the form of ``wapo diagnose --format json``."""
        return {
            "run": self.run,
            "verdict": self.verdict,
            "onset_step": self.onset_step,
            "first_warning_step": self.first_warning_step,
            "drivers": [driver.to_dict() for driver in self.drivers],
            "findings": [self._finding_dict(finding) for finding in self.findings],
            "skipped": [skipped.to_dict() for skipped in self.skipped],
        }

    def _finding_dict(self, finding: Finding) -> dict[str, Any]:
        """A finding, with the tokens and rollouts behind it in its evidence."""
        form = finding.to_dict()
        if self.culprits is not None and self.culprits.finding == finding.name:
            form["evidence"] |= self.culprits.to_dict()
        return form

    def to_text(self) -> str:
        """Plain text for a terminal."""
        return as_text(self)

    def to_markdown(self) -> str:
        """Markdown for an issue or a notebook."""
        return as_markdown(self)

    def _repr_markdown_(self) -> str:
        return self.to_markdown()
