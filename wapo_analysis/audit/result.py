"""What an audit says: statements with evidence, and what could not be checked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from wapo_analysis.results import Block, Grid, Items, Result, Say, Section

Kind = Literal["holds", "deviates", "unknown"]
_WORDS = {"holds": "holds", "deviates": "DEVIATES", "unknown": "not available here"}


@dataclass(frozen=True, kw_only=True)
class Statement:
    """One check and what came of it.

    Attributes
    ----------
    check : str
        Name of the check.
    kind : {"holds", "deviates", "unknown"}
    says : str
        What the tokens show, with the numbers; or why nothing can be said.
    cause : str
        The usual cause of a deviation.
    place : str
        Where to look in a trainer.
    tokens : tuple of tuple of int
        (step, rollout, position) of a few tokens that show it.
    evidence : dict
        The numbers it rests on.
    """

    check: str
    kind: Kind
    says: str
    cause: str = ""
    place: str = ""
    tokens: tuple[tuple[int, int, int], ...] = ()
    evidence: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "check": self.check, "kind": self.kind, "says": self.says, "cause": self.cause,
            "place": self.place, "tokens": [list(token) for token in self.tokens],
            "evidence": self.evidence,
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Audit(Result):
    """What a trainer computes, as its recorded tokens show it.

    Attributes
    ----------
    run : str
        Name of the run.
    behaves_as : str
        The objective in force, in words; "" where the data do not tell.
    declared : str
        Name of the objective that the run declares; "" if it declares none.
    steps : tuple of int
        Steps whose tokens were looked at.
    statements : tuple of Statement
    """

    run: str
    behaves_as: str
    declared: str
    steps: tuple[int, ...]
    statements: tuple[Statement, ...]

    @property
    def deviations(self) -> tuple[Statement, ...]:
        """What the trainer does that it should not, or does not declare."""
        return tuple(s for s in self.statements if s.kind == "deviates")

    @property
    def sentence(self) -> str:
        """The whole answer in one line."""
        if not self.behaves_as:
            named = f"declared {self.declared}; " if self.declared else ""
            base = f"{named}the recorded tokens do not tell the objective"
        else:
            named = f", declared {self.declared}" if self.declared else ""
            base = f"behaves as {self.behaves_as}{named}"
        count = len(self.deviations)
        found = "no deviation found" if not count else f"{count} deviation{'s' * (count > 1)}"
        return f"{base}; {found}"

    @property
    def title(self) -> str:
        """Run and answer."""
        return f"{self.run}: {self.sentence}"

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the form of ``wapo audit --format json``."""
        return {
            "run": self.run, "behaves_as": self.behaves_as, "declared": self.declared,
            "steps": list(self.steps), "sentence": self.sentence,
            "statements": [statement.to_dict() for statement in self.statements],
        }  # fmt: skip

    def page(self) -> Section:
        """Deviations first, each with its size, cause and place; then all checks as a table."""
        parts: list[Block] = [Say(f"Looked at {_steps(self.steps)}.")]
        for found in self.deviations:
            lines = [found.says]
            lines += [f"usual cause: {found.cause}"] if found.cause else []
            lines += [f"look at: {found.place}"] if found.place else []
            if found.tokens:
                shown = "; ".join(f"step {s} rollout {r} position {p}" for s, r, p in found.tokens)
                lines.append(f"tokens: {shown}")
            parts.append(Section(f"[deviates] {found.check}", [Items(lines)]))
        rows = [["check", "result", "what the tokens show"]]
        rows += [[s.check, _WORDS[s.kind], s.says] for s in self.statements if s.kind != "deviates"]
        parts.append(Grid(rows, left=3))
        return Section(self.title, parts)


def _steps(steps: Sequence[int]) -> str:
    if not steps:
        return "no step with token rows"
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"{len(steps)} steps, {steps[0]} to {steps[-1]}"
