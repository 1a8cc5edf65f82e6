"""Checks of what goes into an update: advantages, sampler, weights, completions."""

import numpy as np

from wapo_analysis.audit.gradient import Checks
from wapo_analysis.audit.making import first_pass, making
from wapo_analysis.audit.result import Statement
from wapo_analysis.table import Array

_STRANGE = -14.0
"""Log-probability of a completion below which its copy is no chance: one in a million."""


class InputChecks(Checks):
    """What an update is made of, and whether it changes anything."""

    def advantages(self) -> Statement:
        """How advantages were made from rewards."""
        rollouts = self.e.run.rollouts
        if rollouts.empty or not {"reward", "advantage", "group"} <= set(rollouts):
            return self.unknown("advantages", "rewards of the rollouts were not recorded")
        here = rollouts[rollouts["step"].isin(self.e.steps)]
        found = making(here)
        if found is None:
            return self.unknown("advantages", "rewards that differ within a step were not recorded")
        words = " or ".join(found.names)
        if found.shifted:
            return Statement(
                check="advantages", kind="deviates",
                says=f"advantages are those of the neighbour's reward ({words}, shifted by "
                f"{abs(found.shifted)})",
                cause="rewards or advantages are in another order than the rollouts",
                place="where rewards are gathered, sorted or split over processes",
            )  # fmt: skip
        if found.regrouped:
            return Statement(
                check="advantages", kind="deviates",
                says=f"advantages are taken over other groups than those of the prompts ({words})",
                cause="rewards are reshaped to (group, prompt) though they lie the other way",
                place="the view or reshape before the group mean",
            )  # fmt: skip
        if not found.names:
            return self.unknown("advantages", "made in a way that this audit does not know")
        expected = self.said.advantages
        if expected and not set(expected) & set(found.names):
            return Statement(
                check="advantages", kind="deviates",
                says=f"made as {words}, declared is {' or '.join(expected)}",
                cause="another normalisation of rewards than declared",
                place="where rewards become advantages",
            )  # fmt: skip
        return self.holds("advantages", words)

    def first_pass(self) -> Statement:
        """Whether the sampler's probabilities are those of the first pass."""
        e = self.e
        fresh = (e.rows["minibatch"] == 0).to_numpy() & e.rows["step"].isin(
            self.said.fresh(e.steps)
        ).to_numpy()
        old = e.column("old")
        if not (fresh & np.isfinite(old)).any():
            return self.unknown("first pass", "no log-probabilities of the sampler were recorded")
        error = 2 * e.ratio_error
        seen = first_pass(
            e.column("logp")[fresh], old[fresh], e.column("entropy")[fresh], error[fresh]
        )
        if seen is None:
            return self.unknown("first pass", "too few tokens")
        if seen.off <= 0.01:
            return self.holds(
                "first pass", "the ratio is 1 up to rounding: sampler and trainer agree"
            )
        told = (
            f"at the first pass {seen.off:.0%} of the ratios are not 1 (mean |log-ratio| "
            f"{seen.size:.2g} nats)"
        )
        if np.isfinite(seen.temperature):
            cause = (
                "a temperature: the differences follow log p + H, as of 1/T "
                f"{seen.temperature:.2f} times the sampler's"
            )
        elif seen.one_sided:
            cause = "a truncated sampler (top-p, top-k): nearly all probabilities were larger there"
        else:
            cause = "dropout, another engine or precision, or older weights: not told apart here"
        return Statement(
            check="first pass", kind="deviates", says=told, cause=cause,
            place="sampling settings; the pass that computes old log-probabilities",
            tokens=e.named(fresh & (np.abs(e.column("log_ratio")) > error)),
            evidence={"share": seen.off, "mean": seen.mean, "size": seen.size},
        )  # fmt: skip

    def weights_change(self) -> Statement:
        """Whether updates change any log-probability."""
        e = self.e
        pushed = e.rows["step"].isin(e.rows.loc[e.active, "step"].unique()).to_numpy()
        after = e.column("logp_after")
        scored = pushed & np.isfinite(after)
        again = (
            e.rows[pushed]
            .groupby(["step", "rank", "rollout", "position"])["logp"]
            .agg(["size", "min", "max"])
        )
        again = again[again["size"] > 1]
        if scored.sum() < 20 and len(again) < 20:
            why = "no token was scored twice (rescore_every, or two epochs)"
            return self.unknown("weights", why)
        same = bool((after == e.column("logp"))[scored].all())
        still = bool((again["min"] == again["max"]).all())
        if not (same and still):
            return self.holds("weights", "log-probabilities change with the updates")
        count = int(scored.sum()) + len(again)
        return Statement(
            check="weights", kind="deviates",
            says=f"no log-probability changes with an update ({count:,} tokens)",
            cause="frozen weights, a learning rate of 0, gradients cleared before the step, or "
            "updates that underflow",
            place="optimizer.step, its parameters, zero_grad, lr", evidence={},
        )  # fmt: skip

    def _seen_before(self) -> Array:
        """Rows of rollouts that were in an earlier pass of their step."""
        rows = self.e.rows
        first = rows.groupby(["step", "rank", "rollout"])["minibatch"].transform("min")
        return (rows["minibatch"] > first).to_numpy()

    def duplicates(self) -> Statement:
        """Whether equal completions are more than chance."""
        e = self.e
        first = e.rows[~self._seen_before()].sort_values("position")
        if (first["token_id"] < 0).any():
            return self.unknown("duplicates", "token ids were not recorded")
        sampled = first["logp_old"].fillna(first["logp"])
        rollouts = first.assign(sampled=sampled).groupby(["step", "group", "rank", "rollout"]).agg(
            ids=("token_id", tuple), logp=("sampled", "sum")
        ).reset_index()  # fmt: skip
        copies = rollouts[rollouts.duplicated(["step", "group", "ids"], keep="first")]
        strange = copies[copies["logp"] < _STRANGE]
        if len(strange) < 3 or (rollouts["group"] < 0).any():
            says = "no more equal completions than their probability explains"
            return self.holds("duplicates", says)
        shown = strange[["step", "rollout"]].head(3).to_numpy(int)
        return Statement(
            check="duplicates", kind="deviates",
            says=f"{len(strange):,} completions are copies of another of their group, each with a "
            f"probability below e^{_STRANGE:.0f} (median ln p {strange['logp'].median():.0f})",
            cause="one sample is repeated in the place of several, or one noise serves all",
            place="how prompts are repeated and completions gathered",
            tokens=tuple((int(step), int(rollout), 0) for step, rollout in shown),
            evidence={"copies": float(len(strange))},
        )  # fmt: skip
