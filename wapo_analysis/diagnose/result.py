"""What a diagnosis is: verdict, drivers, findings, and what could not be checked."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from wapo_analysis.diagnose.advice import Advice
from wapo_analysis.errors import unknown_name
from wapo_analysis.results import (
    Block,
    Command,
    Grid,
    Items,
    Result,
    Say,
    Section,
    percent,
    plain,
    short,
    step_words,
)

Severity = Literal["info", "warning", "critical"]
Verdict = Literal[
    "healthy",
    "entropy_explosion",
    "entropy_collapse",
    "reward_collapse",
    "reward_without_answer",
    "stalled",
    "diverged",
    "insufficient_data",
]
SEVERITIES: tuple[Severity, ...] = ("info", "warning", "critical")
Number = float | int | str | None
VERDICT_WORDS: Mapping[str, str] = {
    "healthy": "healthy",
    "entropy_explosion": "entropy explosion",
    "entropy_collapse": "entropy collapse",
    "reward_collapse": "reward collapse",
    "reward_without_answer": "reward without the answer",
    "stalled": "stalled",
    "diverged": "diverged",
    "insufficient_data": "insufficient data",
}
#: Significant digits of numbers in JSON.
DIGITS = 6
LACK_WORDS: Mapping[str, str] = {
    "tokens": "token rows",
    "classes": "class totals",
    "rollouts": "completions or their answers",
    "probes": "probes",
    "rewards/*/mean": "single reward functions",
    "eval_reward": "a held-out score",
    "distinct": "diversity of completions",
    "value_loss": "a critic",
    "kl_ref": "KL to a reference",
    "kl_positional/0": "KL by position",
    "engine_kl": "a second engine",
    "lr": "learning rate",
}
#: Kinds of missing data that are named in text.
MOST_MISSING = 5
#: Share below which no rollout is worth naming.
_SPREAD = 0.03


@dataclass(frozen=True, slots=True)
class Driver:
    """Predicted change of the entropy by one class of tokens.

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
        Part of what all classes predict in the direction of the verdict. Those that predict it sum
        to 1; a negative share is a class that predicts the opposite.
    steps : (int, int), optional
        First and last step of the window.
    """

    cls: str
    predicted_dentropy: float
    counterfactual_dentropy: float | None
    share: float
    steps: tuple[int, int] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "class": self.cls,
            "predicted_dentropy": plain(self.predicted_dentropy, DIGITS),
            "counterfactual_dentropy": plain(self.counterfactual_dentropy, DIGITS),
            "share": plain(self.share, DIGITS),
            "steps": None if self.steps is None else list(self.steps),
        }


@dataclass(frozen=True, slots=True)
class Culprits:
    """Tokens and rollouts that the predicted dH of one class came from.

    Attributes
    ----------
    finding : str
        Name of the finding they stand behind.
    cls : str
        Class name of the taxonomy.
    steps : tuple of int
        Steps whose token rows were read.
    tokens : tuple of (str, float)
        Texts of the tokens and their shares of the class's predicted dH, largest first.
    rollouts : tuple of (int, int, float)
        Steps, numbers and shares of rollouts, largest first.
    """

    finding: str
    cls: str
    steps: tuple[int, ...]
    tokens: tuple[tuple[str, float], ...]
    rollouts: tuple[tuple[int, int, float], ...]

    def words(self) -> str:
        """One sentence with tokens, rollouts and their shares."""
        several = len(self.steps) > 1
        tokens = ", ".join(f"{text!r} {percent(share)}" for text, share in self.tokens)
        parts = [f"tokens {tokens}"] if tokens else []
        if self.rollouts:
            parts.append(self._rollout_words(several))
        return (
            f"Predicted dH of {self.cls} at {step_words(self.steps)} comes from "
            f"{'; '.join(parts) or 'tokens that the source does not name'}."
        )

    def _rollout_words(self, several: bool) -> str:
        top = self.rollouts[0][2]
        if top < _SPREAD:
            return f"many rollouts, none above {top:.1%}"
        return "rollouts " + ", ".join(
            f"{number}{f' of step {step}' if several else ''} {percent(share)}"
            for step, number, share in self.rollouts
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "class": self.cls,
            "token_steps": list(self.steps),
            "tokens": [{"token": text, "share": plain(s, DIGITS)} for text, s in self.tokens],
            "rollouts": [
                {"step": step, "rollout": number, "share": plain(s, DIGITS)}
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
        One plain sentence with the numbers.
    evidence : mapping of str to number
        The numbers it rests on.
    advice : Advice
        What to do, in the names of the run's trainer.
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
    advice: Advice
    reference: str
    warned: int | None = None
    until: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "name": self.name,
            "severity": self.severity,
            "step": self.step,
            "evidence": plain(dict(self.evidence), DIGITS),
            "advice": self.advice.text,
            "reference": self.reference,
            "steps": [step.text for step in self.advice.steps],
        }

    def section(self, said: bool) -> Section:
        """Part of a page; without message and advice where they have been ``said`` already."""
        numbers = ", ".join(f"{key} {short(value)}" for key, value in self.evidence.items())
        parts: list[Block] = [] if said else [Say(self.message)]
        parts += [Say(f"evidence: {numbers}")]
        parts += [] if said else self.to_do()
        parts += [Say(f"see: {self.reference}")]
        return Section(f"[{self.severity}] {self.name} at step {self.step}", parts)

    def to_do(self) -> list[Block]:
        """The advice and its numbered steps."""
        steps = [step.text for step in self.advice.steps]
        return [Say(f"do: {self.advice.text}"), *([Items(steps, numbered=True)] if steps else [])]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A check that could not be made, and the columns that were missing."""

    name: str
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"name": self.name, "missing": list(self.missing)}


@dataclass(frozen=True, kw_only=True)
class Diagnosis(Result):
    """Judgement of one run.

    Attributes
    ----------
    run : str
        Name of the run.
    verdict : str
        One of healthy, entropy_explosion, entropy_collapse, reward_collapse, reward_without_answer,
        stalled, diverged, insufficient_data.
    onset_step : int or None
        First step of the departure that led to the verdict; None if healthy.
    first_warning_step : int or None
        First step beyond any warning threshold, whatever came of it.
    drivers : tuple of Driver
        Classes, the one that predicts most in the direction of the verdict first.
    culprits : Culprits or None
        Tokens and rollouts behind the predicted dH of the driving class; None without a verdict or
        an early warning, or without token rows near it.
    findings : tuple of Finding
        The one behind the verdict first, then most severe first, then by step.
    skipped : tuple of Skipped
        Checks without data.
    sentence : str
        The verdict in plain words.
    best_step, best_checkpoint : int or None
        Step of the highest smoothed reward, and the checkpoint in the run folder whose policy
        earned most; None where nothing tells.
    best_words : str
        Both in words, with their rewards.
    command : str or None
        Command that tests the first remedy: it goes on from the last checkpoint before the onset,
        or from the start where there is none. Of failed runs of the built-in trainer.
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
    best_step: int | None = None
    best_checkpoint: int | None = None
    best_words: str = ""
    command: str | None = None

    @property
    def worst_severity(self) -> Severity | None:
        """Severity of the worst finding, None without findings."""
        ranks = [SEVERITIES.index(finding.severity) for finding in self.findings]
        return SEVERITIES[max(ranks)] if ranks else None

    def reaches(self, severity: str) -> bool:
        """Whether a finding is at or above a severity.

        Raises UserError on a name that is no severity.
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
            "sentence": self.sentence,
            "best_step": self.best_step,
            "best_checkpoint": self.best_checkpoint,
            "command": self.command,
        }

    def _finding_dict(self, finding: Finding) -> dict[str, Any]:
        """A finding, with the tokens and rollouts behind it in its evidence."""
        form = finding.to_dict()
        if self.culprits is not None and self.culprits.finding == finding.name:
            form["evidence"] |= self.culprits.to_dict()
        return form

    @property
    def title(self) -> str:
        """Run and verdict."""
        since = f" since step {self.onset_step}" if self.onset_step is not None else ""
        return f"{self.run}: {VERDICT_WORDS[self.verdict]}{since}"

    def page(self) -> Section:
        """Verdict, what to do, tokens, class shares, findings, what could not be checked."""
        parts: list[Block] = [Say(self.sentence)]
        parts += [Say(self.culprits.words())] if self.culprits else []
        failed = self.onset_step is not None
        if failed:
            when = f"First warning at step {self.first_warning_step}. {self.best_words}"
            parts += [Say(when.strip()), *self.findings[0].to_do()]
        if self.command:
            parts += [Say("Test the first of these on this very run:"), Command(self.command)]
        parts += [_driver_section(self.drivers)] if self.drivers else []
        parts += [f.section(failed and f is self.findings[0]) for f in self.findings]
        if self.skipped:
            parts.append(Section("Not checked", [Say(self._missing())]))
        return Section(self.title, parts)

    def _missing(self) -> str:
        """How many checks were not made and what is not here that most of them need."""
        counts = Counter(what for s in self.skipped for what in {_kind(lack) for lack in s.missing})
        kinds = [f"{what} ({count})" for what, count in counts.most_common(MOST_MISSING)]
        rest = len(counts) - len(kinds)
        more = f" and {rest} more" if rest > 0 else ""
        many = "1 check needs" if len(self.skipped) == 1 else f"{len(self.skipped)} checks need"
        return f"{many} what is not here: {', '.join(kinds)}{more}. Each by name: --format json."


def _kind(lack: str) -> str:
    """What a missing column is part of, in words."""
    first = lack.partition(" or ")[0]
    table, dot, _ = first.partition(".")
    return LACK_WORDS.get(table if dot else first, first)


def _driver_section(drivers: tuple[Driver, ...]) -> Section:
    """Predicted dH of every class, the sum, and what the numbers are."""
    alone = any(driver.counterfactual_dentropy is not None for driver in drivers)
    net = sum(driver.predicted_dentropy for driver in drivers)
    way = "rise" if drivers[0].predicted_dentropy > 0 else "fall"
    rows = [["class", "predicted dH", f"of the {way}", *(["class alone, measured (nats)"] * alone)]]
    for one in drivers:
        measured = one.counterfactual_dentropy
        last = [short(measured) if measured is None else f"{measured:+.3g}"]
        rows.append([one.cls, f"{one.predicted_dentropy:+.3g}", percent(one.share), *last * alone])
    rows.append(["sum", f"{net:+.3g}", "", *([""] * alone)])
    begin, end = drivers[0].steps or (0, -1)
    when = f", {step_words(range(begin, end + 1))}" if drivers[0].steps else ""
    return Section(
        f"Predicted dH (first-order) by class{when}, nats per unit learning rate",
        [Grid(rows), Say("Of each token alone; what is measured can differ in sign.")],
    )
