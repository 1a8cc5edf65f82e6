"""Every figure by name: its question, its caption, what it needs, how it is made."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd

from wapo_analysis.plots import (
    behaviour,
    bins,
    calibration,
    classes,
    entropy,
    shift,
    theory,
    theory_map,
    training,
    waterfall,
)
from wapo_analysis.plots.panels import AxesArray
from wapo_analysis.store import Run

Prepare = Callable[[Sequence[Run]], pd.DataFrame]
Plot = Callable[[pd.DataFrame], AxesArray]


@dataclass(frozen=True, kw_only=True)
class FigureSpec:
    """One figure.

    Attributes
    ----------
    name : str
        Name on the command line and of the file.
    title : str
        The question it answers, printed above it.
    caption : str
        One sentence: what to look for.
    group : str
        Section of the report it belongs to.
    needs : tuple of str
        ``table.column`` a run must have; alternatives are parted by ``|``. Empty: no run needed.
    prepare, plot : callable
        Runs to tidy frame, and frame to axes.
    """

    name: str
    title: str
    caption: str
    group: str
    needs: tuple[str, ...]
    prepare: Prepare
    plot: Plot


_SPECS = (
    FigureSpec(
        name="reward",
        title="Does the policy learn?",
        caption="Look for a curve that rises and stays up; a fall after a rise is a collapse.",
        group="training",
        needs=("steps.reward|steps.pass_rate",),
        prepare=training.prepare_reward,
        plot=training.plot_reward,
    ),
    FigureSpec(
        name="entropy",
        title="Does entropy leave the range it began in?",
        caption="Look for the step where a line crosses a dotted line, half or twice its own "
        "beginning: upwards is an explosion, downwards without a rising reward a collapse.",
        group="entropy",
        needs=("steps.entropy",),
        prepare=entropy.prepare_entropy,
        plot=entropy.plot_entropy,
    ),
    FigureSpec(
        name="entropy_by_sign",
        title="Is it the rewarded or the punished tokens whose entropy moves?",
        caption="Look for the two lines parting: punished tokens that stay uncertain while "
        "rewarded ones settle are the ones negative updates keep flat.",
        group="entropy",
        needs=("steps.entropy_pos|steps.entropy_neg",),
        prepare=entropy.prepare_entropy_by_sign,
        plot=entropy.plot_entropy_by_sign,
    ),
    FigureSpec(
        name="entropy_flow",
        title="Which class pushes entropy up, which down?",
        caption="Look for the colours that outweigh the others: above zero their updates flatten "
        "the policy, below zero they sharpen it (black: net; lower row: what was measured).",
        group="entropy",
        needs=("classes.pred_dentropy_sum",),
        prepare=entropy.prepare_entropy_flow,
        plot=entropy.plot_entropy_flow,
    ),
    FigureSpec(
        name="class_share",
        title="Which classes are the tokens in?",
        caption="Look for a class that grows at the cost of the others; grey tokens had no "
        "advantage and taught nothing.",
        group="classes",
        needs=("classes.tokens",),
        prepare=classes.prepare_class_share,
        plot=classes.plot_class_share,
    ),
    FigureSpec(
        name="gradient_mass",
        title="Which class holds the gradient?",
        caption="Look for a class whose share of the gradient (above) exceeds its share of the "
        "tokens, and whether the mass (below) fades as training goes on.",
        group="classes",
        needs=("classes.grad_mass",),
        prepare=classes.prepare_gradient_mass,
        plot=classes.plot_gradient_mass,
    ),
    FigureSpec(
        name="rule_breaks",
        title="How often is the class's entropy rule wrong?",
        caption="Look for a large right panel: many wrong tokens matter little while their share "
        "of the entropy change stays small.",
        group="classes",
        needs=("tokens.pred_dentropy",),
        prepare=classes.prepare_rule_breaks,
        plot=classes.plot_rule_breaks,
    ),
    FigureSpec(
        name="prob_shift",
        title="Did the tokens' probabilities move as predicted?",
        caption="Look for dots (measured) along the line (predicted), on axes that are logarithmic "
        "away from zero; a gap is the work of other tokens through shared parameters.",
        group="shift",
        needs=("tokens.dprob",),
        prepare=shift.prepare_prob_shift,
        plot=shift.plot_prob_shift,
    ),
    FigureSpec(
        name="entropy_shift",
        title="Did the tokens' entropy move as predicted?",
        caption="Look for dots (measured) on the side of zero where the line (predicted) is; a "
        "gap is the work of other tokens through shared parameters.",
        group="shift",
        needs=("tokens.dentropy",),
        prepare=shift.prepare_entropy_shift,
        plot=shift.plot_entropy_shift,
    ),
    FigureSpec(
        name="calibration",
        title="Is the taxonomy's prediction right?",
        caption="Look for points near the dashed line: open ones off it are moved by other tokens "
        "of the same class, filled ones by the other classes and by momentum.",
        group="shift",
        needs=("probes.counterfactual_dentropy",),
        prepare=calibration.prepare_calibration,
        plot=calibration.plot_calibration,
    ),
    FigureSpec(
        name="waterfall",
        title="What made up the change of the entropy?",
        caption="Look for the longest bar: it is the class, or the momentum of earlier batches, "
        "that moved the entropy; the parts add up to the measured change.",
        group="entropy",
        needs=("probes.counterfactual_dentropy",),
        prepare=waterfall.prepare_waterfall,
        plot=waterfall.plot_waterfall,
    ),
    FigureSpec(
        name="train_vs_behaviour",
        title="How far is the trained policy from the one that sampled?",
        caption="Look for mass away from the diagonal: tokens beyond the dashed lines have an "
        "importance ratio that the objective can clip.",
        group="policy",
        needs=("tokens.logp_old",),
        prepare=behaviour.prepare_train_vs_behaviour,
        plot=behaviour.plot_train_vs_behaviour,
    ),
    FigureSpec(
        name="bin_mass",
        title="At which probabilities does the gradient sit?",
        caption="Look for the tallest bar: it names the probability and the sign that own the "
        "update, and the black tick shows what the (1 - p) proxy says.",
        group="policy",
        needs=("classes.grad_mass",),
        prepare=bins.prepare_bin_mass,
        plot=bins.plot_bin_mass,
    ),
    FigureSpec(
        name="token_strength",
        title="How hard is a single token pushed?",
        caption="Look for bars that grow towards small probabilities: there one token weighs more "
        "than its share (coef is the official w x ratio x A with clipping and normaliser in it).",
        group="policy",
        needs=("classes.coef_sum",),
        prepare=bins.prepare_token_strength,
        plot=bins.plot_token_strength,
    ),
    FigureSpec(
        name="gradient_norm",
        title="Does the gradient fade or flare up?",
        caption="Look for spikes and crosses (not finite) before a collapse, and for a norm that "
        "fades because nothing is left to learn.",
        group="training",
        needs=("steps.grad_norm",),
        prepare=training.prepare_gradient_norm,
        plot=training.plot_gradient_norm,
    ),
    FigureSpec(
        name="lengths",
        title="Are the samples healthy?",
        caption="Look for length, truncation or repetition running away, for clipping on one "
        "side, and for groups that give no signal.",
        group="training",
        needs=("steps.length|steps.truncated|steps.repetition|steps.clip_low|steps.clip_high",),
        prepare=training.prepare_lengths,
        plot=training.plot_lengths,
    ),
    FigureSpec(
        name="theory_vocabulary",
        title="What does one update do to every token?",
        caption="Look below: a rewarded peak or a punished valley feeds the favourite, a rewarded "
        "valley or a punished peak feeds the rest.",
        group="theory",
        needs=(),
        prepare=theory.prepare_theory_vocabulary,
        plot=theory.plot_theory_vocabulary,
    ),
    FigureSpec(
        name="theory_map",
        title="Where does an update raise entropy, where lower it?",
        caption="Look at the dashed border p = S: the colour changes beside it, so the class tells "
        "the direction of the entropy everywhere but in the thin strip between the lines.",
        group="theory",
        needs=(),
        prepare=theory_map.prepare_theory_map,
        plot=theory_map.plot_theory_map,
    ),
    FigureSpec(
        name="theory_classes",
        title="Where do many updates of one class lead?",
        caption="Look at the right panel: the push on a rewarded token dies out as it wins, the "
        "push on a punished one stays.",
        group="theory",
        needs=(),
        prepare=theory.prepare_theory_classes,
        plot=theory.plot_theory_classes,
    ),
)

FIGURES: Mapping[str, FigureSpec] = {spec.name: spec for spec in _SPECS}
