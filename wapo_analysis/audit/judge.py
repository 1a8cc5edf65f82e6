"""The audit: every check on the recorded tokens, and the objective they add up to."""

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from wapo_analysis.audit.core import Core, Level, core, level
from wapo_analysis.audit.declared import declared, known_as
from wapo_analysis.audit.evidence import Evidence, steps_to_look_at
from wapo_analysis.audit.gradient import GradientChecks
from wapo_analysis.audit.inputs import InputChecks
from wapo_analysis.audit.result import Audit, Statement
from wapo_analysis.store import Run

STEPS = 10
"""Steps that are looked at by default."""
_FEW = 0.002
"""Share of the tokens that a few odd ones may have."""


def audit(run: Run, steps: int = STEPS) -> Audit:
    """Tell from the recorded tokens what objective a run trains on, and where it deviates.

    Parameters
    ----------
    run : Run
        With token rows that have a gradient (``coef``); what is missing is said.
    steps : int
        The first so many steps with token rows are looked at.
    """
    chosen = steps_to_look_at(run, steps)
    said = declared(run)
    if not chosen:
        why = "no token rows were recorded (token_every, or detail='sampled')"
        nothing = Statement(check="tokens", kind="unknown", says=why)
        return Audit(
            run=run.name, behaves_as="", declared=said.name, steps=(), statements=(nothing,)
        )
    evidence = Evidence.of(run, chosen)
    checks = _AllChecks(evidence, said)
    statements = tuple(checks.all())
    return Audit(
        run=run.name, behaves_as=checks.behaves_as, declared=said.name, steps=evidence.steps,
        statements=statements,
    )  # fmt: skip


class _AllChecks(GradientChecks, InputChecks):
    """All checks of one run; the first ones decide what the later ones may say."""

    behaves_as = ""

    def all(self) -> Iterator[Statement]:
        """Every statement, in the order a reader asks."""
        if not np.isfinite(self.e.coef).any():
            yield self.unknown("gradient", "no gradient per token was recorded (coef)")
        else:
            yield self.outside()
            yield from self.left_out()
            beside = self.beside()
            yield beside
            yield self.signs(beside)
            yield from self.objective(beside)
            yield self.clip()
        yield self.advantages()
        yield self.first_pass()
        yield self.weights_change()
        yield self.duplicates()

    def objective(self, beside: Statement) -> Iterator[Statement]:
        """The form of the coefficient, and over what the loss is averaged."""
        if "lies on tokens" in beside.says:
            yield self.unknown("ratio", "a term beside the policy loss hides it")
            yield self.unknown("mean", "a term beside the policy loss hides it")
            return
        found = core(self.e)
        if not found.names:
            why = (
                f"no form explains the coefficients (the best {found.share:.1%} of them)"
                if found.tokens >= 8 else "too few tokens with an advantage and a gradient"
            )  # fmt: skip
            yield self.unknown("ratio", why)
            return
        found, averaged = self._with_level(found)
        yield self._ratio(found)
        yield self._mean(averaged)
        self.form = found.names[0]
        self.behaves_as = known_as(found, averaged, self.said)

    def _with_level(self, found: Core) -> tuple[Core, Level]:
        """Of forms that fit alike take the one whose weights follow a length, if it is one alone.

        Within a rollout one ratio for all its tokens is a part of its weight; only between
        rollouts can it be told from none.
        """
        levels = {name: level(self.e, name) for name in found.names}
        regular = [name for name, averaged in levels.items() if averaged.names]
        if len(regular) == 1:
            found = replace(found, names=(regular[0],))
        return found, levels[found.names[0]]

    def _ratio(self, found: Core) -> Statement:
        words = " or ".join(found.names)
        told = (
            f"each coefficient is advantage times {words} ({found.share:.1%} of "
            f"{found.tokens:,} tokens)"
        )
        if len(found.names) > 1:
            told = (
                f"cannot be told apart here: {words}; within rollouts log-ratios differ by "
                f"{found.spread:.1e} nats"
            )
        expected = self.said.cores
        if expected and not set(expected) & set(found.names):
            return Statement(
                check="ratio", kind="deviates",
                says=f"{told}, declared is {' or '.join(expected)}",
                cause="another loss type or importance-sampling level than declared",
                place="the policy loss", evidence={"share": found.share},
            )  # fmt: skip
        return self.holds("ratio", told) if len(found.names) == 1 else self.unknown("ratio", told)

    def _mean(self, averaged: Level) -> Statement:
        if not averaged.names:
            why = (
                "too few rollouts in a pass"
                if averaged.pieces < 4
                else ("the weights of rollouts follow neither their length nor that of their group")
            )
            return self.unknown("mean", why)
        words = {"rollout": "over each rollout", "group": "over the tokens of each group",
                 "tokens": "over tokens, all alike"}  # fmt: skip
        across = {
            "": "",
            "same": ", one constant for all passes of a step",
            "per pass": ", each pass by itself",
            "padded": ", by the padded length of a pass",
        }
        told = "mean " + " or ".join(words[n] for n in averaged.names) + across[averaged.across]
        expected = self.said.levels
        evidence = {} if np.isnan(averaged.total) else {"total": averaged.total}
        if expected and not set(expected) & set(averaged.names):
            return Statement(
                check="mean", kind="deviates",
                says=f"{told}, declared is a mean {' or '.join(words[n] for n in expected)}",
                cause="another normaliser than declared", place="the division of the summed loss",
                evidence=evidence,
            )  # fmt: skip
        if len(averaged.names) > 1:
            return self.unknown("mean", f"cannot be told apart here: {told}")
        if averaged.across == "padded" or (
            averaged.across == "per pass" and self.said.across == "same"
        ):
            return Statement(
                check="mean", kind="deviates", says=told,
                cause="means of micro-batches are averaged though their lengths differ, or the "
                "mean runs over padding", place="the division of the summed loss",
                evidence=evidence,
            )  # fmt: skip
        count, updates = self._passes_of_update()
        total = averaged.total / updates
        if self.said.total == 1 and count > 1 and abs(total * count - 1) < 0.01:
            return Statement(
                check="mean", kind="deviates",
                says=f"{told}; the weights of an update add up to 1/{count}, the number of its "
                "gradient passes, instead of 1",
                cause="the loss is divided by the accumulation steps twice",
                place="gradient accumulation: the loss and the trainer both divide",
                evidence=evidence,
            )  # fmt: skip
        return Statement(check="mean", kind="holds", says=told, evidence=evidence)

    def _passes_of_update(self) -> tuple[int, float]:
        """Gradient passes of an update, 0 if that differs, and updates of a step."""
        counts = self.e.pieces.groupby("step")["passes"].nunique()
        steps = self.e.run.steps.set_index("step").reindex(list(self.e.steps))
        given = steps["updates"].dropna()
        updates = float(given.iloc[0]) if given.nunique() == 1 else 1.0
        return (int(counts.iloc[0] / updates) if counts.nunique() == 1 else 0), updates
