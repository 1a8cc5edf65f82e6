"""What detectors read: step columns as series, the reward, the predicted dH by class."""

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import takewhile
from pathlib import Path

import numpy as np
import pandas as pd
import wapo_taxonomy as tax

from wapo_analysis.derive import per_class
from wapo_analysis.diagnose.advice import (
    CLASS_ADVICE,
    LOWER_LR,
    Advice,
    Situation,
    trained_classes,
)
from wapo_analysis.diagnose.result import Driver
from wapo_analysis.diagnose.reward import (
    SOLVED,
    Fall,
    RewardState,
    ends_solved,
    reward_state,
)
from wapo_analysis.diagnose.samples import (
    answer_shares,
    completion_rows,
    first_pass_gap,
    length_pay,
    noise_share,
    shared_answers,
)
from wapo_analysis.diagnose.trainers import trainer_of
from wapo_analysis.objectives.table import OBJECTIVES
from wapo_analysis.schema import ALL_TOKENS
from wapo_analysis.series import Series
from wapo_analysis.store import Run
from wapo_analysis.table import Array

#: Step columns of the held-out score: as imported, and as our own trainer writes it.
HELD_OUT = ("eval_reward", "eval/reward")
#: Mean of a reward function in [0, 1] up to which it is hardly earned.
A_BIT = 0.25
#: Parts of names of reward functions that grade the form of an answer, not what it says.
FORM = ("format", "xml", "tag", "json", "style", "think", "lang", "length", "brief", "strict",
        "soft", "syntax", "penalty")  # fmt: skip

#: Folders of checkpoints: ours, those of trainers built on Transformers, verl's.
_CHECKPOINT = re.compile(r"(?:step-|checkpoint-|global_step_)(\d+)")


@dataclass(frozen=True)
class Context:
    """A run as detectors see it; every part is computed once, when asked for."""

    run: Run

    _series: dict[str, Series] = field(default_factory=dict, repr=False)

    @cached_property
    def step_numbers(self) -> Array:
        """Step numbers of the step table, shape (n,)."""
        return self.run.steps["step"].to_numpy(np.int64)

    def values(self, column: str) -> Array:
        """A step column as float64, shape (n,); whatever is not finite is NaN."""
        return self.run.column(column)

    def null(self, column: str) -> Array:
        """Steps whose record holds the column, but nothing finite; shape (n,)."""
        steps = self.run.steps.attrs.get("null", {}).get(column, ())
        return np.isin(self.step_numbers, np.fromiter(steps, np.int64, len(steps)))

    def series(self, column: str) -> Series:
        """Finite values of a step column with their steps."""
        if column not in self._series:
            values = self.values(column)
            finite = np.isfinite(values)
            self._series[column] = Series(self.step_numbers[finite], values[finite])
        return self._series[column]

    @cached_property
    def reward(self) -> RewardState | None:
        """Judged reward, None without one."""
        series = self.series("reward")
        return reward_state(series, self._solved()) if len(series) else None

    def _solved(self) -> bool:
        """A score within [0, 1] ends high: of the rollouts, else held out, else of the content."""
        if self.form_alone:
            return False
        for name in ("pass_rate", "reward", *HELD_OUT):
            series = self.series(name)
            if len(series) and series.values.min() >= 0 and series.values.max() <= 1:
                return ends_solved(series)
        content = [s for name, s in self.reward_functions.items() if not grades_form(name)]
        return bool(content) and all(SOLVED <= s.end <= 1 for s in content)

    @cached_property
    def form_alone(self) -> bool:
        """Functions of the form of answers pay, and none of their content gives more than a bit."""
        content = [s.end for name, s in self.reward_functions.items() if not grades_form(name)]
        return 0 < len(content) < len(self.reward_functions) and max(content) <= A_BIT

    @cached_property
    def held_out(self) -> Series:
        """Score on held-out problems, over the steps with an evaluation."""
        imported, own = map(self.series, HELD_OUT)
        return imported if len(imported) else own

    @cached_property
    def held_out_sets(self) -> dict[str, Series]:
        """The same by the name of each set, where the log has several; else under no name."""
        names = [c for c in map(str, self.run.steps.columns) if c.startswith("eval_reward/")]
        found = {name.partition("/")[2]: self.series(name) for name in names}
        return {name: s for name, s in found.items() if len(s)} or {"": self.held_out}

    @cached_property
    def reward_functions(self) -> dict[str, Series]:
        """Mean of each reward function, by its name; empty where none is logged."""
        return self._of_functions("mean")

    @cached_property
    def reward_spreads(self) -> dict[str, Series]:
        """Standard deviation of each reward function over a batch, by its name."""
        return self._of_functions("std")

    def _of_functions(self, what: str) -> dict[str, Series]:
        found = {}
        for column in map(str, self.run.steps.columns):
            first, _, rest = column.partition("/")
            name, _, last = rest.rpartition("/")
            if name and (first, last) == ("rewards", what) and len(self.series(column)):
                found[name] = self.series(column)
        return found

    @cached_property
    def advantage_spread(self) -> Series:
        """Standard deviation of the advantages, else their range as verl logs it."""
        given = self.series("advantage_std")
        if len(given):
            return given
        spread = self.values("critic/advantages/max") - self.values("critic/advantages/min")
        known = np.isfinite(spread)
        return Series(self.step_numbers[known], spread[known])

    @cached_property
    def kl_parts(self) -> list[Series]:
        """KL to the reference in each part of the completions, first to last, where logged."""
        names = (f"kl_positional/{part}" for part in range(len(self.run.steps.columns)))
        return list(takewhile(len, map(self.series, names)))

    @property
    def fall(self) -> Fall | None:
        """A fall of the reward in means of blocks, None without one."""
        return self.reward.fall if self.reward is not None else None

    @cached_property
    def flat_groups(self) -> Series:
        """Share of groups whose rewards are all equal, however the source counts them."""
        flat = self.series("groups_flat")
        wrong, right = self.series("groups_all_wrong"), self.series("groups_all_right")
        if len(flat):
            return flat
        if len(wrong) and np.array_equal(wrong.steps, right.steps):
            return Series(wrong.steps, wrong.values + right.values)
        return wrong if len(wrong) else right

    @cached_property
    def second_engine(self) -> bool | None:
        """Whether another engine than the trainer sampled the tokens, None if that is unknown."""
        manifest = self.run.manifest
        logged = any(
            len(self.series(f"engine_{name}")) for name in ("kl", "logp_diff", "prob_diff")
        )
        if logged or manifest.source not in ("built-in", "trl"):
            return True if logged else None
        return bool(manifest.config.get("use_vllm"))

    @cached_property
    def checkpoints(self) -> tuple[int, ...]:
        """Steps of the checkpoints that are there, ascending: of the run, or beside its source."""
        found = [f.name for f in (self.run.path / "checkpoints").glob("step-*")]
        source = self.run.manifest.imported.get("source")
        if isinstance(source, str):
            folder = Path(source) if Path(source).is_dir() else Path(source).parent
            inside = folder.parent if _CHECKPOINT.fullmatch(folder.name) else folder
            found += [f.name for f in inside.glob("*") if f.is_dir()]
        steps = {int(named[1]) for name in found if (named := _CHECKPOINT.fullmatch(name))}
        return tuple(sorted(steps))

    def checkpoint_before(self, step: int) -> int | None:
        """Newest checkpoint whose policy still behaved as before a step.

        The checkpoint of step s holds the policy that samples at step s + 1.
        """
        return max((saved for saved in self.checkpoints if saved + 1 < step), default=None)

    def best_checkpoint(self, before: int | None = None) -> int | None:
        """Checkpoint, before a step, whose policy earned the highest smoothed reward; or None."""
        reward = self.series("reward")
        scored = [s for s in self.checkpoints if s and len(reward) and (not before or s < before)]
        return max(scored, key=self.earned_by, default=None)

    def earned_by(self, saved: int) -> float:
        """Smoothed reward of the policy of a checkpoint."""
        reward = self.series("reward")
        place = int(np.searchsorted(reward.steps, saved + 1))
        return float(reward.smooth[min(place, len(reward) - 1)])

    def go_back(self, step: int) -> Advice:
        """Where training can go on from: a checkpoint before a step, or how to have one."""
        saved = self.checkpoint_before(step)
        if saved is not None:
            return Advice(f"Go back to the checkpoint of step {saved}.")
        if self.run.manifest.source == "built-in":
            return Advice(
                f"No checkpoint from before step {step} is left: start again, with "
                "{checkpoint_every} set lower."
            )
        if step <= 1:
            return Advice("Start again: nothing is from before it.")
        return Advice(f"Go back to the last checkpoint before step {step}.")

    @cached_property
    def situation(self) -> Situation:
        """What decides which advice applies, but for the size of the steps."""
        told = self.run.manifest.objective
        known = OBJECTIVES.get(str(told.get("name")))
        trained = trained_classes(told, known is not None and known.positive_only)
        restricted = "restricted" if told.get("include_bins") else "unrestricted"
        return Situation(trainer_of(self.run.manifest), trained | {restricted})

    @cached_property
    def pred_dentropy(self) -> pd.DataFrame:
        """Predicted dH in nats per unit learning rate, shape (steps, classes).

        Zero where a class had no token; no rows if the run has no such totals.
        """
        return per_class(self.run.classes, "pred_dentropy_sum")

    @cached_property
    def gradient_mass(self) -> pd.DataFrame:
        """Sum of exact logit-gradient norms, laid out like :attr:`pred_dentropy`."""
        return per_class(self.run.classes, "grad_mass")

    @cached_property
    def first_pass(self) -> pd.DataFrame:
        """How far the first gradient pass is from the sampling policy, one row per sampled step.

        Columns k3 (nats), ess (share of the tokens), max_dp (probability), tokens; see
        :func:`first_pass_gap`. No rows if the run has no token rows with ``logp_old``.
        """
        return first_pass_gap(self.run)

    @cached_property
    def completions(self) -> pd.DataFrame:
        """Rows of the rollouts table of a bounded number of steps."""
        return completion_rows(self.run)

    @cached_property
    def sameness(self) -> Series:
        """Share of completions that another prompt got too, over the sampled steps."""
        return shared_answers(self.completions)

    @cached_property
    def answers(self) -> tuple[Series, Series]:
        """Completions that hold the reference answer, and rewarded ones that do not: shares."""
        return answer_shares(self.completions)

    @cached_property
    def noise(self) -> Series:
        """Share of completions that are noise, over the sampled steps."""
        return noise_share(self.completions)

    @cached_property
    def length_pay(self) -> Series:
        """Correlation of reward and length within groups, over the sampled steps."""
        return length_pay(self.completions)

    @cached_property
    def has_prediction(self) -> bool:
        """Whether the class totals hold predicted entropy changes at all."""
        return bool(self.run.classes["pred_dentropy_sum"].notna().any())


def grades_form(name: str) -> bool:
    """Whether a reward function, by its name, grades the form of an answer.

    Examples
    --------
    >>> grades_form("soft_format_reward_func"), grades_form("correctness")
    (True, False)
    """
    return any(part in name.lower() for part in FORM)


#: Steps over which drivers are ranked, at least.
MIN_WINDOW = 5


def entropy_drivers(
    context: Context, first: int | None, last: int | None, direction: int
) -> tuple[Driver, ...]:
    """Rank the classes by their predicted dH over a window of steps.

    Largest share in the direction first. Empty if the run has no class totals with statistics.
    ``predicted_dentropy`` is the exact first-order sum over all tokens (taxonomy/README.md).
    ``first``, ``last``: first and last step of the window, widened to at least ``MIN_WINDOW`` steps
    on its early side; None leaves that side open; ``direction``: 1 if the entropy rose, -1 if it
    fell, 0 to take the sign of the total.
    """
    predicted = _window(context.pred_dentropy, first, last)
    if predicted.empty:
        return ()
    total = predicted.sum()
    toward = total if (direction or total.sum()) >= 0 else -total
    gross = float(toward.clip(lower=0).sum())
    alone = _counterfactual(context, predicted.index.to_numpy())
    window = (int(predicted.index[0]), int(predicted.index[-1]))
    drivers = [
        Driver(name, float(total[name]), alone.get(name), float(toward[name]) / gross, window)
        for name in toward.sort_values(ascending=False, kind="stable").index
        if gross > 0 and total[name] != 0
    ]
    return tuple(drivers)


def _window(predicted: pd.DataFrame, first: int | None, last: int | None) -> pd.DataFrame:
    """Rows of the window; the rows before it too if it holds fewer than ``MIN_WINDOW``."""
    until = predicted if last is None else predicted[predicted.index <= last]
    inside = until if first is None else until[until.index >= first]
    return until.tail(max(len(inside), MIN_WINDOW))


def _counterfactual(context: Context, steps: np.ndarray) -> dict[str, float]:
    """Measured entropy change of each class applied alone, summed over the probed steps."""
    probes = context.run.probes
    if probes.empty:
        return {}
    probes = probes[probes["tokens_of"] == ALL_TOKENS]
    known = probes[probes["step"].isin(steps) & probes["part"].isin(range(len(tax.CLASSES)))]
    sums = known.dropna(subset=["counterfactual_dentropy"]).groupby("part")
    totals = sums["counterfactual_dentropy"].sum()
    return dict(zip(totals.index.map(tax.CLASS_NAMES), totals.to_list(), strict=True))


def driver_words(drivers: tuple[Driver, ...], direction: int) -> str:
    """One clause on the class that predicts most of the change; empty without drivers."""
    if not drivers:
        return ""
    way, other = ("rise", "fall") if direction == 1 else ("fall", "rise")
    said = f"{drivers[0].cls} tokens account for {drivers[0].share:.0%} of the predicted {way}"
    if direction * sum(driver.predicted_dentropy for driver in drivers) < 0:
        said += f", though all classes together predict a {other}"
    return said


def driver_advice(drivers: tuple[Driver, ...]) -> Advice:
    """What to change for the class that predicts most of the change."""
    if not drivers:
        return Advice(
            "Which tokens drive it is not in this record; docs/watch_your_trainer.md shows how to "
            "record it.",
            steps=(LOWER_LR,),
        )
    return CLASS_ADVICE[drivers[0].cls]
