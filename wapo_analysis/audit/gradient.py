"""Checks of the gradient itself: which tokens get it, with which sign, and where the clip acts."""

from collections.abc import Iterator

import numpy as np

from wapo_analysis.audit.core import CORES, core
from wapo_analysis.audit.declared import Declared
from wapo_analysis.audit.evidence import Evidence
from wapo_analysis.audit.result import Statement
from wapo_analysis.table import Array

_LEAST_MOVE = 5e-3
"""Log-ratio below which no clip range lies, nats."""


class Checks:
    """Checks of one run.

    Parameters
    ----------
    evidence : Evidence
    said : Declared
        What the run says of itself.
    """

    def __init__(self, evidence: Evidence, said: Declared) -> None:
        self.e, self.said = evidence, said
        self.form = ""

    def unknown(self, check: str, why: str) -> Statement:
        """A check that cannot be made here."""
        return Statement(check=check, kind="unknown", says=why)

    def holds(self, check: str, says: str) -> Statement:
        """A check that found nothing against the trainer."""
        return Statement(check=check, kind="holds", says=says)


class GradientChecks(Checks):
    """Which tokens carry gradient, and how the clip takes it."""

    def outside(self) -> Statement:
        """Whether positions that the loss should not see get gradient."""
        steps = self.e.run.steps.set_index("step").reindex(list(self.e.steps))
        if "grad_outside" not in steps or steps["grad_outside"].isna().all():
            return self.unknown("mask", "gradient outside the loss mask was not counted")
        count = int(np.nansum(steps["grad_outside"]))
        if not count:
            return self.holds("mask", "only tokens of the loss mask get gradient")
        return Statement(
            check="mask", kind="deviates",
            says=f"{count:,} tokens outside the loss mask get gradient in {len(self.e.steps)} "
            "steps: of prompts, padding, or after the end",
            cause="the loss sums over the whole padded row, or the mask is shifted by one",
            place="where the per-token loss is multiplied with the completion mask",
            evidence={"tokens": float(count)},
        )  # fmt: skip

    def left_out(self) -> Iterator[Statement]:
        """Tokens with an advantage that get no gradient, and where they stand."""
        e = self.e
        wanted = np.isfinite(e.coef) & (e.advantage != 0)
        wanted &= ~e.clipped
        if self.said.positive_only:
            wanted &= e.advantage > 0
        absent = wanted & (e.coef == 0)
        if not wanted.any() or not absent.any():
            if wanted.any():
                yield self.holds("coverage", "every token with an advantage gets gradient")
            return
        share = float(absent.sum() / wanted.sum())
        last = (
            e.rows["position"].to_numpy() == e.pieces["length"].reindex(e.rows["piece"]).to_numpy()
        )
        first = e.rows["position"].to_numpy() == 0
        whole = (
            e.rows.assign(absent=absent, wanted=wanted).groupby("piece")[["absent", "wanted"]].sum()
        )
        gone = whole[whole["wanted"] > 0]
        by_rollout = bool((gone["absent"].isin([0]) | (gone["absent"] == gone["wanted"])).all())
        told = f"{share:.1%} of the tokens with an advantage get no gradient"
        for place, name in ((last, "last"), (first, "first")):
            all_of = (absent | ~wanted)[place].all() and absent[place].any()
            if all_of and not absent[~place].any():
                yield Statement(
                    check="coverage", kind="deviates",
                    says=f"the {name} token of every rollout gets no gradient ({told})",
                    cause="a mask or a shift that is off by one",
                    place="where logits, labels and completion mask are aligned",
                    tokens=e.named(absent), evidence={"share": share},
                )  # fmt: skip
                return
        if by_rollout:
            yield self.holds("coverage", f"{told}: whole rollouts are left out (a filter)")
            return
        entropy = e.column("entropy")
        if np.isfinite(entropy).any() and self._splits(entropy, absent, wanted):
            yield self.holds("coverage", f"{told}: those of lowest entropy (an entropy mask)")
            return
        yield self.unknown("coverage", f"{told}; no pattern in where they stand")

    def _splits(self, values: Array, absent: Array, wanted: Array) -> bool:
        """Whether absent tokens have smaller values than the others, pass by pass."""
        passes = self.e.rows["passes"].to_numpy()
        for number in np.unique(passes[absent]):
            here = wanted & (passes == number)
            low, high = values[here & absent], values[here & ~absent]
            if len(high) and np.nanmax(low) > np.nanmin(high) + 1e-3:
                return False
        return True

    def beside(self) -> Statement:
        """Whether tokens without advantage get gradient: a KL term or the like."""
        e = self.e
        idle = np.isfinite(e.coef) & (e.advantage == 0)
        if not idle.any():
            return self.unknown("terms beside", "no token without advantage was recorded")
        other = float(np.abs(e.coef[idle]).sum())
        share = other / max(float(np.nansum(np.abs(e.coef))), 1e-300)
        if not other:
            return self.holds(
                "terms beside", "tokens without advantage get no gradient: no KL term"
            )
        told = (
            f"{share:.1%} of the gradient lies on tokens without advantage: a KL term or the like"
        )
        if self.said.kl is False:
            return Statement(
                check="terms beside", kind="deviates", says=f"{told}, though none is declared",
                cause="a KL or penalty term is on, or advantages are not those of the loss",
                place="what is added to the per-token loss", tokens=e.named(idle & (e.coef != 0)),
                evidence={"share": share},
            )  # fmt: skip
        return self.holds("terms beside", told)

    def signs(self, beside: Statement) -> Statement:
        """Whether coefficients have the signs of their advantages."""
        e = self.e
        wrong = e.active & (np.sign(e.coef) != np.sign(e.advantage))
        share = float(wrong.sum() / max(e.active.sum(), 1))
        if not e.active.any():
            return self.unknown("sign", "no token has both an advantage and a gradient")
        if not wrong.any():
            return self.holds("sign", "every coefficient has the sign of its advantage")
        if "lies on tokens" in beside.says or beside.kind == "unknown" and share < 0.5:
            return self.unknown(
                "sign", f"{share:.1%} of the signs differ; a KL term may explain it"
            )
        if share > 0.99 and core(e).names == ("inverted token ratio",):
            return Statement(
                check="sign", kind="deviates",
                says="the ratio is inverted, old over new: every coefficient pushes the wrong way",
                cause="old and new log-probabilities are swapped in the difference",
                place="ratio = exp(logp - logp_old)", tokens=e.named(wrong),
                evidence={"share": share},
            )  # fmt: skip
        return Statement(
            check="sign", kind="deviates",
            says=f"{share:.1%} of the coefficients have the sign opposite to their advantage",
            cause="the loss lacks its minus, or the advantages belong to other rollouts",
            place="the sign of the policy loss, the order of advantages and rows",
            tokens=e.named(wrong), evidence={"share": share},
        )  # fmt: skip

    def clip(self) -> Statement:
        """From which ratio on tokens lose their gradient, on which side."""
        e = self.e
        log_ratio = CORES[self.form](e) if "rollout" in self.form else e.column("log_ratio")
        known = np.isfinite(log_ratio) & np.isfinite(e.coef) & (e.advantage != 0)
        idle = known & (e.coef == 0)
        if self.said.positive_only:
            known, idle = known & (e.advantage > 0), idle & (e.advantage > 0)
        if not known.any():
            return self.unknown("clip", "no ratio was recorded")
        if not idle.any():
            low, high = np.exp(log_ratio[known].min()), np.exp(log_ratio[known].max())
            return self.unknown("clip", f"no token was stopped (ratios {low:.3g} to {high:.3g})")
        told, wrong = [], np.zeros(len(idle), bool)
        for sign, side in ((1, "above"), (-1, "below")):
            mine = np.sign(e.advantage) == sign
            here, own = idle & mine, known & ~idle & mine
            bound, against = (_bound(d * sign * log_ratio, here, own) for d in (1, -1))
            if bound is not None:
                name = ">" if sign > 0 else "<"
                count = int((here & (sign * log_ratio > 0)).sum())
                told.append(f"A {name} 0 {side} {np.exp(sign * bound):.3g} ({count:,} tokens)")
            elif against is not None and not self.said.two_sided:
                farther = own & (sign * log_ratio > against + 0.02)
                wrong |= here & (-sign * log_ratio > 0) & farther.any()
        if wrong.any():
            return Statement(
                check="clip", kind="deviates",
                says=f"{wrong.sum():,} tokens lose their gradient on the wrong side: their ratio "
                "moved against their advantage, while farther ones on the other side keep it",
                cause="min and max, or the bounds, are swapped for one sign of the advantage",
                place="min(ratio * A, clip(ratio) * A)", tokens=e.named(wrong),
                evidence={"tokens": float(wrong.sum())},
            )  # fmt: skip
        if not told:
            return self.unknown("clip", "tokens without gradient have not left a clip range")
        return self.holds("clip", "; ".join(told))


def _bound(moved: Array, idle: Array, own: Array) -> float | None:
    """Least move from which on all tokens are idle, nats; None if idle and other tokens mix."""
    stopped, going = moved[idle & (moved > 0)], moved[own & (moved > 0)]
    if not len(stopped) or stopped.min() < _LEAST_MOVE:
        return None
    bound = float(stopped.min())
    return bound if going.max(initial=0.0) <= bound + 1e-3 else None
