"""Finding our columns among the names of a source: the user's mapping first, then known names."""

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from functools import cache, lru_cache
from typing import Any

import numpy as np

from wapo_analysis.errors import UserError, printable, unknown_name
from wapo_analysis.importers.alias import PER_FUNCTION, Alias
from wapo_analysis.importers.names import ALIASES
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.schema import ROLLOUTS, STEPS, TOKENS, Table

#: Column of ours to their key, and their keys that are left.
Plan = tuple[dict[str, str], list[str]]

# Not columns, yet what other tools store: turned into logp, logp_old and collision_rest; rows
# outside the loss mask are left out.
PSEUDO_TOKENS = ("prob", "prob_old", "collision", "loss_mask")
#: Step columns without any of which a log says nothing about a training run.
VITAL = ("reward", "entropy", "length", "grad_norm", "loss")

_TABLES: Mapping[str, Table] = {"tokens": TOKENS, "steps": STEPS, "rollouts": ROLLOUTS}
_FUNCTIONS = [row for row in ALIASES if row.column in PER_FUNCTION]
_TELLING = {"global_step/max_steps": "ms-swift", "current_steps": "LLaMA-Factory",
            "train_speed(iter/s)": "ms-swift", "train_speed(s/it)": "ms-swift"}  # fmt: skip
# Names that anybody would choose; they tell no trainer.
_COMMON = set(
    "reward reward_std loss entropy grad_norm kl lr learning_rate policy_loss return step_time"
    " response_length kl_loss entropy_loss rewards scores reward/mean reward/std rollout/reward"
    " avg_reward reward_mean entropy_mean kl_mean kl_penalty pg_loss actor_loss critic_loss"
    " value_loss clipfrac clip_fraction adv_std advantages_std truncation_rate repetition_rate"
    " time/total validation/accuracy eval/reward eval_reward".split()
)
# Columns whose mean over a batch other programs call avg_x or x_mean.
_MEANS = (*VITAL, "kl_ref", "truncated", "clip_any", "repetition")
_MEAN = re.compile(r"^(?:avg|mean|average)[_ ]|[_ ./](?:avg|mean|average)$")
# Groups under which a log puts numbers of the policy and of its samples.
_TRAIN = re.compile(r"^train(?:ing)?[_./]")
_GROUP = re.compile(r"^(?:actor|agent|metrics?|model|optim\w*|policy|rollout|stats)[./]")
_COUNTS = tuple(f"batch/solve_{which}" for which in ("none", "all", "partial"))
_NO_FUNCTION = {"mean", "std", "min", "max", "chosen", "rejected", "accuracies", "margins"}
# Parts of names in use for the vital columns, for suggestions alone.
_HINTS: Mapping[str, tuple[str, ...]] = {
    "reward": ("return", "score", "acc", "rew", "success", "correct"),
    "entropy": ("ent",),
    "length": ("len", "num_tokens", "toks"),
    "grad_norm": ("grad", "gnorm"),
    "loss": ("loss", "objective"),
}


def allowed_columns() -> tuple[str, ...]:
    """Names of ours that a mapping may give."""
    names = [c.name for table in _TABLES.values() for c in table.stored]
    return tuple(dict.fromkeys([*names, *PSEUDO_TOKENS]))


def parse_mapping(items: Iterable[str]) -> dict[str, str]:
    """``ours=theirs`` texts as a dictionary.

    Raises UserError if a text is no such pair, or gives a column of ours that does not exist or
    twice.
    """
    mapping: dict[str, str] = {}
    for item in items:
        ours, _, theirs = (part.strip() for part in item.partition("="))
        if not ours or not theirs:
            raise UserError(f"--map wants ours=theirs, such as logp=my_logprob; got {item!r}")
        if ours in mapping:
            raise UserError(f"--map gives {ours!r} twice")
        mapping[ours] = theirs
    check_mapping(mapping)
    return mapping


def check_mapping(mapping: Mapping[str, str]) -> None:
    """Refuse columns that do not exist. Raises UserError on a name of ours that no table has."""
    for ours in mapping:
        if ours not in allowed_columns():
            raise unknown_name("column", ours, allowed_columns())


def map_option(pairs: Mapping[str, str]) -> str:
    """``--map`` options as they would be typed."""
    words = (f"{ours}={theirs}" for ours, theirs in pairs.items())
    return " ".join(f"--map {shlex.quote(printable(word))}" for word in words)


@dataclass(frozen=True)
class Feed:
    """What feeds a step column."""

    #: Their names, averaged if there are several.
    names: tuple[str, ...]
    #: Names of the same quantity for steps at which the first is missing.
    fallbacks: tuple[str, ...] = ()
    #: 1 - x is meant, or -x.
    complement: bool = False
    negative: bool = False


@dataclass
class NameTable:
    """Finds our columns among their keys.

    ``mapping``: ours to theirs, as the user gave it. ``seen``: their names of the mapping that
    occurred in the source.
    """

    mapping: Mapping[str, str]
    seen: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        # Records of a log come in a few shapes, again and again.
        self._plan = lru_cache(self._make)
        self._step_key = lru_cache(self._counter)

    def plan(self, table: str, keys: Sequence[str]) -> Plan:
        """Which key feeds which column of a table of rows ("tokens" or "rollouts")."""
        return self._plan(table, tuple(keys))

    def _make(self, table: str, keys: tuple[str, ...]) -> Plan:
        by_name = _plain(keys)
        taken: dict[str, str] = {}
        columns = [column.name for column in _TABLES[table].stored]
        for ours in [*columns, *(PSEUDO_TOKENS if table == "tokens" else ())]:
            wanted = self.mapping.get(ours)
            if wanted is not None:
                if wanted in keys:
                    taken[ours] = wanted
                    self.seen.add(wanted)
                continue
            rows = (row for row in rows_of(table) if row.column == ours)
            names = (ours, *(name for row in rows for name in row.names))
            known = (by_name.get(name) for name in names)
            free = (key for key in known if key and key not in self.mapping.values())
            found = next(free, None)
            if found is not None:
                taken[ours] = found
        used = set(taken.values())
        return taken, [key for key in keys if key not in used]

    def step_key(self, keys: Sequence[str]) -> str | None:
        """Key that counts the steps of a log, None if none is known."""
        return self._step_key(tuple(keys))

    def _counter(self, keys: tuple[str, ...]) -> str | None:
        wanted = self.mapping.get("step")
        if wanted is not None:
            self.seen.update({wanted} & set(keys))
            return wanted if wanted in keys else None
        by_name = _plain(keys)
        names = next(row.names for row in rows_of("steps") if row.column == "step")
        return next((by_name[name] for name in names if name in by_name), None)

    def feeds(self, keys: Sequence[str]) -> dict[str, Feed]:
        """What feeds the step columns, among all names of a log."""
        by_name = _plain(keys)
        meant = {theirs: _meant(theirs, keys) for theirs in self.mapping.values()}
        self.seen.update(theirs for theirs, key in meant.items() if key in keys)
        used = set(meant.values())
        found: dict[str, Feed] = {}
        for column in STEPS.stored:
            ours = column.name
            if ours == "step":
                continue
            if ours in self.mapping:
                key = meant[self.mapping[ours]]
                if key in keys:
                    found[ours] = Feed((key,), negative=key != self.mapping[ours])
                continue
            free = {n: k for n, k in by_name.items() if k not in used}
            feed = self._feed(ours, free)
            if feed is None and ours in (*_MEANS, "lr"):
                feed = self._feed(ours, _bare(free, ours), common=True)
            if feed is not None:
                found[ours] = feed
                used.update(feed.names)
        return found

    def read_by(self, keys: Sequence[str]) -> set[str]:
        """Names that feed a step column."""
        feeds = self.feeds(keys).values()
        return {key for feed in feeds for key in (*feed.names, *feed.fallbacks)}

    def _feed(self, ours: str, by_name: Mapping[str, str], common: bool = False) -> Feed | None:
        if ours in by_name:
            return Feed((by_name[ours],))
        for row in rows_of("steps") if by_name else ():
            if row.column != ours or (common and row.trainer not in ("any", "TRL")):
                continue
            sets = [(name, _matches(row, place, by_name)) for place, name in enumerate(row.names)]
            given = [(name, keys) for name, keys in sets if keys]
            if given:
                name, keys = given[0]
                rest = tuple(keys[0] for _, keys in given[1:] if len(keys) == 1)
                return Feed(keys, rest, complement=name.startswith("1 - "))
        return None

    def never_seen(self) -> list[str]:
        """``ours=theirs`` pairs of the mapping whose key did not occur."""
        return [f"{o}={t}" for o, t in self.mapping.items() if t not in self.seen]


def _meant(theirs: str, keys: Sequence[str]) -> str:
    """Key of a mapping; ``-key`` is minus its numbers."""
    return theirs[1:] if theirs not in keys and theirs.startswith("-") else theirs


def _plain(keys: Iterable[str]) -> dict[str, str]:
    """Keys by their name in lower case: loggers put "train/" before every name, or do not.

    Notebooks show blanks around a slash; lines for people have blanks, now underscores, in names.
    """
    by_name: dict[str, str] = {}
    for key in keys:
        by_name.setdefault(key.lower().replace(" / ", "/").removeprefix("train/"), key)
    return by_name


def _bare(by_name: Mapping[str, str], ours: str) -> dict[str, str]:
    """The same for names without the word that says that they are means, and without their group.

    avg_entropy, kl_mean, policy/entropy, train_reward. A KL of the policy's group may be to the old
    policy, and a learning rate is no mean.
    """
    found: dict[str, str] = {}
    for name, key in by_name.items():
        bare = _TRAIN.sub("", name)
        bare = bare if ours == "kl_ref" else _GROUP.sub("", bare)
        bare = bare if ours == "lr" else _MEAN.sub("", bare)
        if bare not in by_name:
            found.setdefault(bare, key)
    return found


def _matches(row: Alias, place: int, by_name: Mapping[str, str]) -> tuple[str, ...]:
    name = row.names[place].removeprefix("1 - ")
    if "*" not in name and "DATASET" not in name:
        key = by_name.get(name.lower())
        return (key,) if key else ()
    if "DATASET" in name and "eval/step" not in by_name:
        return ()
    return tuple(key for low, key in by_name.items() if row.patterns[place].fullmatch(low))


def function_column(key: str) -> str:
    """Name under which a number of one reward function is kept; other names stay as they are."""
    plain = key.replace(" / ", "/").removeprefix("train/")
    for row in _FUNCTIONS:
        found = row.patterns[0].fullmatch(plain)
        if found and found["function"] not in _NO_FUNCTION:
            return row.column.replace("NAME", found["function"])
    return key


def set_names(names: Sequence[str]) -> dict[str, str]:
    """What tells names of held-out sets apart: without the words that all of them share."""
    words = [name.split("/") for name in names]
    same = [len(set(place)) == 1 for place in zip(*words, strict=False)]
    if len({len(w) for w in words}) > 1 or all(same):
        return {name: name for name in names}
    return {
        name: "/".join(w for w, shared in zip(parts, same, strict=True) if not shared)
        for name, parts in zip(names, words, strict=True)
    }


def likely_trainer(keys: Iterable[str]) -> str | None:
    """Trainer most of whose names occur among the names of a log; None if fewer than two do."""
    by_name = _plain(keys)
    told = next((trainer for key, trainer in _TELLING.items() if key in by_name), None)
    if told is not None:
        return told
    counts: Counter[str] = Counter()
    own: Counter[str] = Counter()
    for row in rows_of("steps"):
        if row.trainer == "any":
            continue
        fits = {key for place in range(len(row.names)) for key in _matches(row, place, by_name)}
        if row.column in PER_FUNCTION:
            fits = {key for low, key in by_name.items() if row.patterns[0].fullmatch(low)}
        counts[row.trainer] += bool(fits)
        own[row.trainer] += any(key.lower().removeprefix("train/") not in _COMMON for key in fits)
    best = [trainer for trainer, _ in counts.most_common() if own[trainer]]
    return best[0] if best and counts[best[0]] >= 2 else None


def nearest(
    keys: Iterable[str], columns: Iterable[str] = VITAL, least: float = 0.6
) -> dict[str, str]:
    """Column to the name that most looks like it, at most one each; no name for two columns."""
    left, found = list(keys), {}
    for column in columns:
        scored = [(_likeness(column, key), key) for key in left]
        score, key = max(scored, default=(0.0, ""))
        if score >= least:
            found[column] = key
            left.remove(key)
    return found


def _likeness(column: str, key: str) -> float:
    low = key.lower()
    words = re.split(r"[^a-z]+", low)
    if column == "entropy" and {"bits", "loss", "sum", "total", "coef"} & set(words):
        return 0.0  # of another unit than nats, a sum, or a term with a sign
    if any(hint in words or (len(hint) > 3 and hint in low) for hint in _HINTS.get(column, ())):
        return 0.9
    if column in low:
        return 1.0
    return SequenceMatcher(None, column, words[-1] or low).ratio()


def shares_of_counts(
    columns: dict[str, dict[int, float]], feeds: Mapping[str, Feed], rows: dict[int, dict[str, Any]]
) -> None:
    """Prompts counted as solved by none, all and some of their completions, made shares of them."""
    for ours, key in zip(("groups_all_wrong", "groups_all_right"), _COUNTS, strict=False):
        if ours not in feeds or feeds[ours].names != (key,):
            continue
        most = 1 if any(0 < value < 1 for value in columns[key].values()) else 0
        for step, value in columns[key].items():
            counts = [columns.get(name, {}).get(step) for name in _COUNTS]
            known = [c for c in counts if c is not None]
            if len(known) == 3 and sum(known) > 0:
                rows[step][ours] = value / sum(known)
            elif value > most:
                del rows[step][ours]  # a count, of prompts nobody knows how many


@cache
def rows_of(table: str) -> tuple[Alias, ...]:
    """Rows of one table in the order they are tried."""
    return tuple(row for row in ALIASES if row.table == table)


#: Names that fine-tuning on given answers logs (trl/trainer/sft_trainer.py, ms-swift).
SUPERVISED = {"mean_token_accuracy", "token_acc", "token_accuracy"}


def is_supervised(keys: Iterable[str]) -> bool:
    """Whether a log without reward is of fine-tuning on given answers."""
    by_name = _plain(keys)
    return bool(SUPERVISED & by_name.keys()) and not any("reward" in name for name in by_name)


def drop_impossible(
    feeds: dict[str, Feed], columns: Mapping[str, Mapping[int, float]], report: ImportReport
) -> None:
    """What is no such quantity keeps its name.

    An entropy of given answers, not of the policy's; one below 0, a term of a loss; a KL below 0; a
    learning rate of 0 that was printed.
    """
    if is_supervised(columns):
        feeds.pop("entropy", None)
    signed = {ours: feeds[ours] for ours in ("kl_ref", "entropy") if ours in feeds}
    known = {ours: np.array([v for name in feed.names for v in columns[name].values()])
             for ours, feed in signed.items() if not feed.negative}  # fmt: skip
    if (
        report.format == "console"
        and "lr" in feeds
        and not any(columns[feeds["lr"].names[0]].values())
    ):
        feed = feeds.pop("lr")
        report.note(f"{feed.names[0]} is printed as 0 throughout, so it was rounded away")
    if np.nansum(known.get("kl_ref", ())) < 0:
        feed = feeds.pop("kl_ref")
        report.note(f"{feed.names[0]} is negative on average: a log-ratio, not a KL divergence")
    if np.fmax.reduce(known.get("entropy", ()), initial=np.nan) < 0:
        feed = feeds.pop("entropy")
        report.told(
            f"{feed.names[0]} is negative, so it is a loss term and not the entropy; if it is "
            f"minus the entropy: {map_option({'entropy': f'-{feed.names[0]}'})}"
        )
