"""Does this trainer do what it says? Detected from the recorded tokens alone.

>>> from wapo_analysis.audit import audit
>>> audit(run)  # doctest: +SKIP
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from wapo_analysis.audit import checks, rollouts, sampling, terms
from wapo_analysis.audit.coefficient import MEANS, Coefficient, Core, read_coefficient
from wapo_analysis.audit.declared import Known, declared_of, exact, library, look, settings_of
from wapo_analysis.audit.evidence import Deviation, Evidence, Findings
from wapo_analysis.audit.rollouts import RULES, Advantages, read_advantages
from wapo_analysis.errors import UserError
from wapo_analysis.results import Block, Items, Result, Say, Section, plain
from wapo_analysis.store import Need, Run

__all__ = ["Audit", "Deviation", "audit", "first_audit"]

#: Steps with token rows that are looked at.
STEPS = 10


@dataclass(frozen=True, kw_only=True)
class Audit(Result):
    """What a trainer computes, detected from its recorded tokens.

    Attributes
    ----------
    run : str
        Name of the run.
    declared : str
        Objective that the run names.
    fits : tuple of str
        Known objectives that fit everything that was seen; several if the data cannot tell them
        apart, none if nothing known fits or it cannot be told.
    summary : str
        The first line.
    steps : tuple of int
        Steps that were looked at.
    tokens : int
        Their token rows.
    deviations, facts, missing
        See `Findings`.
    """

    run: str
    declared: str
    fits: tuple[str, ...]
    summary: str
    steps: tuple[int, ...]
    tokens: int
    deviations: tuple[Deviation, ...]
    facts: dict[str, str]
    missing: dict[str, str]

    @property
    def line(self) -> str:
        """The audit in one line, for a diagnosis."""
        names = ", ".join(found.name for found in self.deviations)
        return f"{self.summary}; deviations: {names}" if names else self.summary

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return plain(asdict(self))  # type: ignore[no-any-return]

    def page(self) -> Section:
        """First line, deviations, what was checked, what could not be."""
        parts: list[Block] = [Say(self.summary)]
        parts += [self._deviation(found) for found in self.deviations]
        if not self.deviations and self.tokens:
            parts.append(Say("No deviation found."))
        facts = [f"{name}: {text}" for name, text in self.facts.items()]
        missing = [
            f"{name}: not available here, because {why}" for name, why in self.missing.items()
        ]
        parts += [Section("Checked", [Items(facts)])] if facts else []
        parts += [Section("Not checked", [Items(missing)])] if missing else []
        return Section(f"Audit of {self.run}, {_steps(self.steps)}, {self.tokens} tokens", parts)

    @staticmethod
    def _deviation(found: Deviation) -> Section:
        lines = [f"tokens: {found.tokens}", f"usual cause: {found.cause}", f"look at: {found.look}"]
        return Section(f"Deviation: {found.says}", [Items(lines)])


def _steps(steps: Sequence[int]) -> str:
    if not steps:
        return "no steps"
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"{len(steps)} steps from {steps[0]} to {steps[-1]}"


def audit(run: Run, steps: int = STEPS) -> Audit:
    """Say what objective is in force and where the trainer deviates from what it declares.

    Parameters
    ----------
    run : Run
    steps : int
        How many of the first steps with token rows are looked at.

    Raises
    ------
    UserError
        If a file of the run is broken; the message names it.
    """
    return judge(Evidence.of_run(run, steps), run.name)


def first_audit(run: Run, steps: int = 3) -> Audit | None:
    """Audit of the first steps, for what shows it beside other things.

    Returns None if the run has no token rows with a gradient, or a file of it is broken.
    """
    try:
        known = run.token_steps() and run.lacks(Need("tokens", "coef")) is None
        return audit(run, steps) if known else None
    except UserError:
        return None


def judge(seen: Evidence, name: str) -> Audit:
    """Audit of evidence; ``name`` is that of the run."""
    found = Findings()
    declared = declared_of(seen.manifest)
    told = str((seen.manifest.get("objective") or {}).get("name") or "unknown")
    told = "nothing" if told == "unknown" else told
    if not len(seen):
        why = "no token rows were recorded (token_every, attach, or an import of token tables)"
        found.missing["everything"] = why
        return _audit(seen, name, told, (), f"cannot be audited: {why}", found)
    coefficient = read_coefficient(seen, settings_of(seen.manifest))
    advantages = read_advantages(seen)
    _check_coefficient(seen, coefficient, found)
    _check_advantages(seen, advantages, found)
    steps: tuple[Callable[[Evidence, Findings], None], ...] = (
        checks.check_outside, checks.check_first_token, checks.check_end, sampling.check_tail,
        checks.check_whose_advantage, sampling.check_first_pass,
        sampling.check_sampling, sampling.check_weights_move, checks.check_precision,
        rollouts.check_groups, rollouts.check_rewards, rollouts.check_duplicates,
    )  # fmt: skip
    for check in steps:
        check(seen, found)
    checks.check_clip(seen, coefficient, declared, found)
    terms.check_extra_terms(seen, coefficient, declared, found)
    terms.check_scale(seen, coefficient, declared, found)
    gated = _gated(seen)
    fits = _fits(seen, declared, coefficient, advantages, gated)
    if declared is not None:
        _compare(seen, declared, coefficient, advantages, found)
    summary = _summary(told, declared, fits, coefficient, found)
    return _audit(seen, name, told, fits, summary, found)


def _audit(
    seen: Evidence, name: str, told: str, fits: tuple[str, ...], summary: str, found: Findings
) -> Audit:
    return Audit(
        run=name,
        declared=told,
        fits=fits,
        summary=summary,
        steps=tuple(int(s) for s in np.unique(seen["step"])) if len(seen) else (),
        tokens=len(seen),
        deviations=tuple(found.deviations),
        facts=found.facts,
        missing=found.missing,
    )


def _check_coefficient(seen: Evidence, coefficient: Coefficient, found: Findings) -> None:
    if coefficient.why_not is not None:
        found.missing["objective"] = coefficient.why_not
    if coefficient.against >= 1 - 0.002:
        found.deviates(
            "pushed against the advantage",
            "every token is pushed against its advantage: good ones down, bad ones up",
            tokens=f"{int(coefficient.pushed.sum())} tokens",
            cause="a sign is lost in the loss, or the ratio is inverted (old over new)",
            look=look(seen.source, "ratio"),
        )
    if coefficient.only_first is not None:
        found.facts["objective"] = (
            f"detected from the first gradient pass alone: in later ones {coefficient.only_first}"
        )
    if coefficient.fits:
        found.facts["ratio"] = _words([str(core) for core in coefficient.fits], coefficient)
        found.facts["mean"] = _list(coefficient.means)
        if all(core.kind == "inverse" for core in coefficient.fits):
            found.deviates(
                "ratio inverted",
                "the gradient falls with the ratio as 1 / ratio does",
                tokens=f"{int(coefficient.pushed.sum())} tokens",
                cause="the ratio is p_old / p in the place of p / p_old",
                look=look(seen.source, "ratio"),
            )


def _words(cores: list[str], coefficient: Coefficient) -> str:
    if not coefficient.ratio_moves and len(cores) > 1:
        return "ratios hardly leave 1, so which ratio the loss uses cannot be told"
    return " or ".join(cores)


def _check_advantages(seen: Evidence, advantages: Advantages, found: Findings) -> None:
    if advantages.why_not is not None:
        found.missing["advantages"] = advantages.why_not
        return
    found.facts["advantages"] = " or ".join(RULES[r] for r in RULES if r in advantages.rules)
    if advantages.turned is not None:
        found.facts["advantages"] += f", but {advantages.turned}"
        found.deviates(
            "advantages of other rollouts" if "sign" not in advantages.turned
            else "advantages with the wrong sign",
            advantages.turned,
            tokens=f"all tokens of {advantages.rollouts} rollouts; with that, the advantages are "
            f"exactly {' or '.join(RULES[r] for r in RULES if r in advantages.rules)}",
            cause="view, repeat or gather in another order than rollouts have",
            look=look(seen.source, "advantage"),
        )  # fmt: skip


def _gated(seen: Evidence) -> bool | None:
    """Whether rollouts with A < 0 are left out; None if there are none or hardly any."""
    inside = (seen["advantage"] < 0) & np.isfinite(seen["coef"]) & ~(np.abs(seen.log_ratio) > 0.1)
    if inside.sum() < 8:
        return None
    share = float((seen["coef"][inside] != 0).mean())
    return True if share == 0 else False if share > 0.05 else None


def _cores_agree(known: Known, coefficient: Coefficient) -> set[str]:
    """Means that fit with a core of a known loss; empty if no core of it fits."""
    found = [m for core, m in coefficient.fits.items() if not known.cores or core in known.cores]
    return set().union(*found) if found else set()


def _fits(
    seen: Evidence, declared: Known | None, coefficient: Coefficient, advantages: Advantages,
    gated: bool | None,
) -> tuple[str, ...]:  # fmt: skip
    """Names of the losses that nothing seen speaks against, the declared one first."""
    fitting = {
        known.name: known for known in library(seen.source).values()
        if _agrees(known, coefficient, gated)
    }  # fmt: skip
    fitting.pop(declared.name if declared else "", None)
    rules = advantages.rules if exact(seen.source) else set()
    others = [n for n, k in fitting.items() if not _contradicts(k, rules)]
    if declared is None or not _agrees(declared, coefficient, gated):
        return tuple(others)
    # Another loss may have just these advantages.
    if _contradicts(declared, rules) and any(fitting[n].advantages for n in others):
        return tuple(others)
    return (declared.name, *others)


def _contradicts(known: Known, rules: set[str]) -> bool:
    """Whether a loss forms advantages in another way than was seen."""
    return bool(rules and known.advantages and not known.advantages & rules)


def _agrees(known: Known, coefficient: Coefficient, gated: bool | None) -> bool:
    """Whether ratio, mean and gate are those of a loss as far as they were seen."""
    means = _cores_agree(known, coefficient)
    if not means or (known.means and not means & known.means):
        return False
    return None in (gated, known.positive_only) or gated == known.positive_only


def _compare(
    seen: Evidence, declared: Known, coefficient: Coefficient, advantages: Advantages,
    found: Findings,
) -> None:  # fmt: skip
    """Deviations from the declared loss, part by part."""
    shown = f"{int(coefficient.pushed.sum())} tokens with gradient"
    if declared.cores and coefficient.fits and not declared.cores & coefficient.fits.keys():
        wanted = " or ".join(sorted(str(core) for core in declared.cores))
        found.deviates(
            "another ratio",
            f"the loss uses {found.facts['ratio']}, declared {declared.name} uses {wanted}",
            tokens=shown,
            cause=_ratio_cause(coefficient.fits),
            look=look(seen.source, "ratio"),
        )
    means = _cores_agree(declared, coefficient) or coefficient.means
    if means and declared.means and not means & declared.means and not found_scale(found):
        found.deviates(
            "another mean",
            f"{_list(means)}, declared {declared.name} ({declared.mean})",
            tokens=shown,
            cause="the token losses are averaged over something else than intended, such as means "
            "of micro-batches or the padded length",
            look=look(seen.source, "mean"),
        )
    gated = _gated(seen)
    differs = None not in (gated, declared.positive_only) and gated != declared.positive_only
    if differs and exact(seen.source):
        found.deviates(
            "rollouts with A < 0",
            f"tokens with A < 0 carry {'no' if gated else 'a'} gradient, declared {declared.name} "
            f"{'trains on' if gated else 'leaves out'} them",
            tokens=f"{int((seen['advantage'] < 0).sum())} tokens with A < 0",
            cause="a gate on the advantage",
            look=look(seen.source, "advantage"),
        )
    stated = bool((seen.manifest.get("objective") or {}).get("advantage"))
    firm = exact(seen.source) or stated
    if advantages.rules and declared.advantages and advantages.turned is None:
        if not declared.advantages & advantages.rules and (firm or _odd(advantages.rules)):
            found.deviates(
                "another advantage",
                f"advantages are {found.facts['advantages']}, declared "
                + " or ".join(RULES.get(a, a) for a in sorted(declared.advantages)),
                tokens=f"{advantages.rollouts} rollouts",
                cause="mean or std over another axis, another denominator (N or N - 1), no scaling",
                look=look(seen.source, "advantage"),
            )


def _odd(rules: set[str]) -> bool:
    """Whether rules are none of a group: a name of an objective alone never means these."""
    return all(rule.startswith("batch") for rule in rules)


def found_scale(found: Findings) -> bool:
    """Whether the size of the weights is known to be off, so that they name no mean."""
    return any(d.name == "loss divided twice by accumulation" for d in found.deviations)


def _ratio_cause(fits: dict[Core, Any]) -> str:
    if all(core.kind in ("none", "unit") for core in fits):
        return "the ratio is detached, or the loss takes log p in its place"
    if all(core.level != "token" for core in fits):
        return "the ratio is averaged over the rollout"
    return "another loss than intended"


def _list(means: set[str]) -> str:
    if {"batch", "constant", "sum"} <= means:
        return "the same weight for every token"
    return " or ".join(MEANS[name] for name in MEANS if name in means)


def _summary(
    told: str, declared: Known | None, fits: tuple[str, ...], coefficient: Coefficient,
    found: Findings,
) -> str:  # fmt: skip
    if coefficient.why_not is not None and not found.deviations:
        return f"the objective cannot be told, because {coefficient.why_not}"
    mean = _list(coefficient.means) or "mean unknown"
    if not fits:
        if coefficient.fits:
            how = f"behaves as no known objective ({found.facts['ratio']}; {mean})"
            return f"{how}, declared {told}"
        return f"declared {told}; the objective cannot be told"
    first, *others = fits
    tied = f"; {', '.join(others)} cannot be told apart from it here" if others else ""
    if declared is not None and first == declared.name:
        return f"behaves as {first} ({mean}), as declared{tied}"
    known = f"{told} ({declared.mean})" if declared is not None else told
    return f"behaves as {first} ({mean}), declared {known}{tied}"
