"""What recorded settings say: which runs are seeds of one setting, which steps sampled anew.

Comparisons, figures and pages group by setting. Runs are pooled only if they carry one label and no
recorded setting but the seed contradicts it. Runs of one label whose settings differ become
settings of their own, with the difference in their label: "GRPO, lr 5e-5" and "GRPO, lr 1e-4".
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Final

from wapo_analysis.store import Run

#: Entries of a manifest's ``config`` that leave the trained policy as it is, seeds among them.
BESIDE_TRAINING: Final = frozenset(
    {
        "seed", "data_seed", "label", "name", "device", "log_to", "checkpoint_every",
        "keep_checkpoints", "eval_every", "eval_prompts", "eval_samples", "token_every",
        "token_fraction", "store_bits", "capture_mode", "rescore_every", "probe_every",
        "probe_rows", "microbatch_size", "sample_batch_size", "gradient_checkpointing", "topk",
        "audit", "on_warning", "on_critical", "eval_data",
    }
)  # fmt: skip
_MANIFEST: Final = ("trainer", "model", "task", "temperature")
#: Differences that a label names at most.
_NAMED: Final = 3


#: Settings of the objective: that they differ is what a comparison is made for.
COMPARED = frozenset(
    {
        "objective", "loss_type", "clip_eps", "mask_ratio_low", "mask_ratio_high", "epsilon",
        "epsilon_high", "delta", "bounds", "use_importance_sampling", "include_bins",
        "exclude_bins", "loss_mean_level", "normalize_by_kept_tokens", "official", "max_seq_len",
        "importance_sampling_level", "scale_rewards",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """Runs that differ by their seed alone."""

    #: Name in legends and tables, unlike that of every other setting.
    label: str
    #: Label the runs carry themselves.
    given: str
    #: Recorded settings in which it differs from others of the same given label.
    differs: tuple[str, ...]
    #: Places of its runs in the list that was given.
    places: tuple[int, ...]
    runs: tuple[Run, ...]


def settings_of(runs: Sequence[Run]) -> tuple[Setting, ...]:
    """Group runs into settings, in the order of their first run.

    Every run is in exactly one. ``runs``: opened runs. Of imported ones little but the label is
    known; what a source does not say contradicts nothing.
    """
    groups: list[_Group] = []
    for place, run in enumerate(runs):
        mine = recorded_settings(run)
        group = next((g for g in groups if g.label == run.label and g.admits(mine)), None)
        if group is None:
            groups.append(group := _Group(run.label, {}, []))
        group.known.update(mine)
        group.places.append(place)
    return tuple(_named(group, groups, runs) for group in groups)


def setting_labels(runs: Sequence[Run]) -> list[str]:
    """Label of the setting of every run, in the order given."""
    labels = [""] * len(runs)
    for setting in settings_of(runs):
        for place in setting.places:
            labels[place] = setting.label
    return labels


def recorded_settings(run: Run) -> dict[str, Any]:
    """What a manifest says of how the policy was trained, seeds left out.

    The trainer's settings (``config``), model, task, temperature and the objective: its name, and
    all of its fields where there is no ``config`` that repeats them. What is not known is left out.
    """
    found = {name: run.manifest.get(name) for name in _MANIFEST}
    objective, config = run.manifest.objective, run.manifest.config
    name = objective.get("name")
    found |= config or {k: v for k, v in objective.items() if k != "name"}
    if name not in (None, "unknown"):
        found["objective"] = name
        found.pop("loss_type", None)  # TRL's word for it
    return {k: v for k, v in found.items() if v is not None and k not in BESIDE_TRAINING}


@dataclass
class _Group:
    """Runs put together so far, and everything that is known of their setting."""

    label: str
    known: dict[str, Any]
    places: list[int]

    def admits(self, mine: Mapping[str, Any]) -> bool:
        return all(self.known[name] == mine[name] for name in self.known.keys() & mine.keys())


def _named(group: _Group, groups: Sequence[_Group], runs: Sequence[Run]) -> Setting:
    alike = [other for other in groups if other.label == group.label]
    names = [n for n in _in_order(alike) if _differs(n, alike)]
    told = [f"{name} {shown_value(group.known.get(name))}" for name in names]
    more = ["..."] if len(told) > _NAMED else []
    label = ", ".join([group.label, *told[:_NAMED], *more])
    before = alike[: alike.index(group)]
    twins = sum(all(o.known.get(n) == group.known.get(n) for n in names[:_NAMED]) for o in before)
    return Setting(
        label=f"{label} ({twins + 1})" if twins else label,
        given=group.label,
        differs=tuple(names),
        places=tuple(group.places),
        runs=tuple(runs[place] for place in group.places),
    )


def _in_order(groups: Sequence[_Group]) -> list[str]:
    return list(dict.fromkeys(name for group in groups for name in group.known))


def _differs(name: str, groups: Sequence[_Group]) -> bool:
    values = [group.known[name] for group in groups if name in group.known]
    return any(value != values[0] for value in values[1:])


def heads_up(runs: Sequence[Run], settings: Sequence[Setting]) -> tuple[str, ...]:
    """What has to be known before runs are compared: which are no seeds of one setting.

    ``settings``: of these runs, see `settings_of`.
    """
    return (*_split(settings), *_repeated(settings), *_unlike(runs, settings))


def _split(settings: Sequence[Setting]) -> list[str]:
    given: dict[str, list[Setting]] = {}
    for setting in settings:
        given.setdefault(setting.given, []).append(setting)
    return [
        f"Runs labelled {label} differ in "
        f"{_values(alike[0].differs, [run for s in alike for run in s.runs])}; "
        "they are not seeds of one setting, so each setting has its own column."
        for label, alike in given.items()
        if len(alike) > 1
    ]


def _repeated(settings: Sequence[Setting]) -> list[str]:
    """Runs of one setting and one seed are no independent draws."""
    told = []
    for setting in settings:
        counts = Counter(run.seed for run in setting.runs if run.seed is not None)
        twice = [f"{seed} ({count} runs)" for seed, count in counts.items() if count > 1]
        if twice:
            told.append(
                f"{setting.label} holds runs of one seed: {', '.join(twice)}; they are not "
                "independent, so its intervals are too narrow."
            )
    return told


def _unlike(runs: Sequence[Run], settings: Sequence[Setting]) -> list[str]:
    """Settings in which the runs differ although a comparison wants them equal."""
    named = {name for setting in settings for name in setting.differs}
    known = [recorded_settings(run) for run in runs]
    names = [
        name
        for name in dict.fromkeys(name for values in known for name in values)
        if name not in COMPARED | named
        and len({shown_value(values[name]) for values in known if name in values}) > 1
    ]
    done = dict.fromkeys(str(len(run.steps)) for run in runs)
    differ = [_by_setting(name, settings) for name in names]
    differ += [f"steps done ({', '.join(done)})"] if len(done) > 1 else []
    return [f"Not like with like: the runs differ in {'; '.join(differ)}."] if differ else []


def _by_setting(name: str, settings: Sequence[Setting]) -> str:
    """A setting with its values; which runs have which, where some share one."""
    labels: dict[str, list[str]] = {}
    for setting in settings:
        known = (recorded_settings(run).get(name) for run in setting.runs)
        value = next((value for value in known if value is not None), None)
        labels.setdefault(shown_value(value), []).append(setting.label)
    shared = any(len(some) > 1 for some in labels.values())
    told = [f"{v} in {', '.join(some)}" if shared else v for v, some in labels.items()]
    return f"{name} ({('; ' if shared else ', ').join(told)})"


def _values(names: Sequence[str], runs: Sequence[Run]) -> str:
    """Settings with the values they take, such as ``lr (5e-5, 1e-4)``."""
    known = [recorded_settings(run) for run in runs]
    return "; ".join(
        f"{name} ({', '.join(dict.fromkeys(shown_value(values.get(name)) for values in known))})"
        for name in names
    )


def shown_value(value: Any) -> str:
    """A setting's value as people write it.

    Examples
    --------
    >>> shown_value(1e-4), shown_value(["neg_peak", "neg_valley"]), shown_value([]), shown_value(8)
    ('1e-4', 'neg_peak+neg_valley', 'none', '8')
    """
    if value is None or value == [] or value == ():
        return "none"
    if isinstance(value, list | tuple):
        return "+".join(shown_value(item) for item in value)
    if isinstance(value, float):
        return f"{value:g}" if not value or abs(value) >= 1e-3 else _power(value)
    return str(value)


def _power(value: float) -> str:
    digits, exponent = f"{value:e}".split("e")
    return f"{float(digits):g}e{int(exponent)}"


def steps_per_batch(settings: Mapping[str, Any]) -> int:
    """Optimizer steps from one that begins with a generated batch to the next, by TRL's settings.

    TRL takes an optimizer step every ``gradient_accumulation_steps`` passes, trains
    ``num_iterations`` times on a batch, and splits it into ``steps_per_generation`` passes. Raises
    ValueError if one of the three is no whole number above 0, as nothing that TRL itself wrote is.

    Examples
    --------
    >>> steps_per_batch({"num_iterations": 2, "steps_per_generation": 4,
    ...                  "gradient_accumulation_steps": 2})
    4
    """

    def whole(name: str, default: int) -> int:
        value = settings.get(name) or default
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r:.40}")
        return value

    passes = whole("steps_per_generation", 1)
    taken = whole("gradient_accumulation_steps", passes)
    passes *= whole("num_iterations", 1)
    return passes // gcd(passes, taken)


def fresh_steps(manifest: Mapping[str, Any], steps: Iterable[int]) -> list[int]:
    """Of some steps those that train on rollouts sampled just before; the first is sure to."""
    if manifest.get("source") != "trl":
        return list(steps)
    try:
        period = steps_per_batch(manifest.get("config") or {})
    except ValueError:
        return [step for step in steps if step == 1]
    return [step for step in steps if (step - 1) % period == 0]
