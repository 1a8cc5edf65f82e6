"""What to do about a finding, as data: sentences with settings in braces, and what they change.

A detector writes ``Advice("Lower {lr}.")``; what a reader sees is made here, once it is known which
trainer wrote the run, which classes it trains on, and whether its steps are too large. Nothing is
advised that does not apply, and nothing that changes the training comes with a mere remark.
"""

import json
import re
import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

import wapo_taxonomy as tax

from wapo_analysis.diagnose.trainers import SETTINGS, has_setting, setting_name
from wapo_analysis.settings import shown_value

_NAMED = re.compile(r"\{(\w+)\}")
_BESIDE_TRAINING: Final = {"checkpoint_every"}
NO_CHANGE: Final = "Nothing to change."
#: Factor on the learning rate where the steps are too large.
TENFOLD = 0.1


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing to do, or several.

    Attributes
    ----------
    text : str
        A sentence. ``{lr}`` stands for what the run's trainer calls the setting that is ``lr`` in
        the built-in one (`SETTINGS`).
    steps : tuple of Advice
        What to try, in order, each for itself.
    needs : tuple of str
        What must hold for it: a setting the trainer must have, a class (or ``neg``, ``pos``) that
        must be trained on, or another fact of the `Situation`.
    change : mapping of str to object
        Settings of the built-in trainer that it changes; of ``lr`` a factor, else the value.
    """

    text: str
    steps: tuple["Advice", ...] = ()
    needs: tuple[str, ...] = ()
    change: Mapping[str, Any] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The sentence, then each step with its number."""
        return [self.text, *(f"{n}. {step.text}" for n, step in enumerate(self.steps, start=1))]

    def __str__(self) -> str:
        return " ".join(self.lines())

    @property
    def intervenes(self) -> bool:
        """Whether following it changes the training."""
        return bool(self.change or set(_NAMED.findall(self.text)) - _BESIDE_TRAINING)


@dataclass(frozen=True)
class Situation:
    """What decides which advice applies to a run."""

    #: Trainer whose names are told; see `trainer_of`.
    trainer: str | None
    #: Classes and signs that are trained on, ``restricted`` if the run was told to train on some
    #: classes only (else ``unrestricted``), ``large_steps`` if the updates are too large for any
    #: first-order law.
    facts: frozenset[str]

    def told(self, advice: Advice, *, remark: bool = False) -> Advice:
        """Advice in the trainer's names, without what does not apply.

        ``remark``: it belongs to a finding that is no warning: then nothing that changes the
        training.
        """
        fitting = [step for step in advice.steps if self.applies(step)]
        if remark:
            fitting = [step for step in fitting if not step.intervenes]
        elif "large_steps" in self.facts:
            fitting.sort(key=lambda step: "lr" not in step.change)
        text = NO_CHANGE if remark and advice.intervenes else self._named(advice.text)
        steps = tuple(replace(step, text=self._named(step.text)) for step in fitting)
        return replace(advice, text=text, steps=steps)

    def applies(self, advice: Advice) -> bool:
        """Whether all that an advice needs is there."""
        return all(
            has_setting(need, self.trainer) if need in SETTINGS else need in self.facts
            for need in advice.needs
        )

    def _named(self, text: str) -> str:
        named = _NAMED.sub(lambda found: setting_name(found[1], self.trainer), text)
        return named[:1].upper() + named[1:] if text.startswith("{") else named


def trained_classes(objective: Mapping[str, Any], positive_only: bool) -> frozenset[str]:
    """Classes that an objective gives a gradient to, and their signs.

    ``objective``: ``objective`` of a manifest; what it does not say leaves nothing out;
    ``positive_only``: it trains on positive advantages alone by design.

    Examples
    --------
    >>> sorted(trained_classes({"exclude_bins": ["neg_peak"]}, positive_only=False))
    ['neg', 'neg_valley', 'pos', 'pos_peak', 'pos_valley']
    """
    included = _expanded(objective.get("include_bins")) or tax.CLASSES
    excluded = _expanded(objective.get("exclude_bins"))
    kept = {name for name in included if name not in excluded}
    if positive_only:
        kept = {name for name in kept if name.startswith("pos")}
    return frozenset(kept | {name.split("_")[0] for name in kept})


def _expanded(bins: object) -> tuple[str, ...]:
    if not isinstance(bins, list | tuple):
        return ()
    try:
        return tuple(tax.expand_bins(tuple(map(str, bins))))
    except ValueError:
        return ()


# ---- advice that several detectors give ----------------------------------------------------------

LOWER_LR = Advice("Lower {lr} tenfold, or lower {updates}.", change={"lr": TENFOLD})
POSITIVE_ONLY = Advice(
    "Train on positive advantages alone ({positive_only}); if that shows the same, the steps are "
    "too large.",
    needs=("neg", "unrestricted"),
    change={"objective": "wapo"},
)
ALL_CLASSES = Advice(
    "Train on all classes: this run was told to train on some alone ({include_bins}).",
    needs=("restricted",),
    change={"include_bins": ()},
)


def leave_out(*classes: str) -> Advice:
    """Take classes out of the loss."""
    names = ", ".join(classes)
    return Advice(
        f"Leave {names} tokens out of the loss ({{exclude_bins}} = {','.join(classes)}).",
        needs=("exclude_bins", "unrestricted", *classes),
        change={"exclude_bins": classes},
    )


#: What a class does when it drives the entropy, and what to try.
CLASS_ADVICE: Final[Mapping[str, Advice]] = {
    "pos_peak": Advice(
        "pos_peak makes likely tokens likelier still.",
        steps=(ALL_CLASSES, LOWER_LR, leave_out("pos_peak")),
    ),
    "pos_valley": Advice(
        "pos_valley raises unlikely tokens.",
        steps=(
            ALL_CLASSES,
            LOWER_LR,
            leave_out("pos_valley"),
            Advice("Lower {clip_high}.", needs=("clip_high",)),
        ),
    ),
    "neg_peak": Advice(
        "neg_peak pushes likely tokens down, and nothing limits that.",
        steps=(ALL_CLASSES, leave_out("neg_peak"), POSITIVE_ONLY, LOWER_LR),
    ),
    "neg_valley": Advice(
        "neg_valley takes from unlikely tokens what goes to the dominant ones.",
        steps=(
            ALL_CLASSES,
            leave_out("neg_valley"),
            POSITIVE_ONLY,
            LOWER_LR,
            Advice("Raise {clip_high}.", needs=("clip_high",)),
        ),
    ),
}


def fork_command(
    run: str, at: int, change: Mapping[str, Any], config: Mapping[str, Any]
) -> str | None:
    """Command that goes on from a checkpoint of a built-in run with one thing changed.

    Returns None if the change needs a number the run does not record.

    Parameters
    ----------
    at : int
        Step after which the change is in force; 0 for the first.
    change : mapping
        As in `Advice`.
    config : mapping
        Settings the run was trained with.
    """
    words = [f"wapo fork {shlex.quote(run)} --at {at}"]
    for name, value in change.items():
        if name == "lr":
            if not isinstance(config.get("lr"), float):
                return None
            lowered = float(f"{config['lr'] * value:.2g}")
            words.append(f"--set lr={shown_value(lowered)}")
        elif name == "objective":
            words.append(f"--objective {value}")
        elif name == "exclude_bins":
            words.append(f"--exclude-bins {','.join(_joined(config.get(name), value))}")
        else:
            shown = json.dumps(list(value)) if isinstance(value, tuple) else str(value)
            words.append(f"--set {shlex.quote(f'{name}={shown}')}")
    return " ".join(words) if change else None


def _joined(before: object, more: Iterable[str]) -> list[str]:
    known = list(before) if isinstance(before, list | tuple) else []
    return list(dict.fromkeys([*map(str, known), *more]))
