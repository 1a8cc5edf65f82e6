"""Settings declared once: default, meaning, limits, option of the command line, resume rule.

A frozen dataclass declares each field by `setting`; its checks, the reading of plain values, the
options of ``wapo train`` and the table of docs/training.md all come from that one line::

    lr: float = setting(5e-5, "Peak learning rate.", above_zero(1000), cli=True)
"""

import math
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from wapo_analysis.errors import UserError, unknown_name

_KEY = "declared"
#: Whole numbers beyond it have no float.
_HUGE = 1e300
#: Of more words than these the one that is meant is named.
_FEW = 4


@dataclass(frozen=True, slots=True)
class Limit:
    """What a value may be."""

    #: The test of a value.
    holds: Callable[[Any], bool]
    #: What is allowed, in words.
    allowed: str
    #: All allowed values, if they are a few words.
    words: tuple[str, ...] = ()
    #: Largest allowed number.
    high: float = math.inf
    #: Said instead of ``allowed`` of a number that is not too large.
    short: str = ""

    def refusal(self, value: Any) -> str:
        """What the value must be, by the side on which it is wrong."""
        if self.short and value > self.high:
            return f"at most {_said(self.high)}"
        return self.short or self.allowed


def between(low: float, high: float) -> Limit:
    """Numbers from ``low`` to ``high``."""
    words = f"{_said(low)} to {_said(high)}"
    return Limit(lambda v: low <= v <= high, words, (), high, f"at least {_said(low)}")


def above_zero(high: float, low: float = 0.0) -> Limit:
    """Numbers above 0, from ``low`` if that is not 0, up to ``high``."""
    words = f"{_said(low)} to {_said(high)}" if low else f"above 0, at most {_said(high)}"
    short = f"positive, at least {_said(low)}" if low else "positive and finite"
    return Limit(lambda v: v > 0 and low <= v <= high, words, (), high, short)


def _said(number: float) -> str:
    return str(number) if isinstance(number, int) else f"{number:g}"


def one_of(*words: str) -> Limit:
    """One of a few words."""
    return Limit(lambda v: v in words, f"{', '.join(words[:-1])} or {words[-1]}", words)


@dataclass(frozen=True, slots=True, kw_only=True)
class Declared:
    """What is declared of one setting."""

    #: Of the field; the kind is its type, e.g. ``int | None``.
    name: str = ""
    kind: str = ""
    default: Any
    #: What it means.
    doc: str
    #: What it may be, beside its type.
    limit: Limit | None
    #: What None stands for; empty where None is not allowed.
    unset: str
    #: A run that is continued, or forked, may change it.
    resumable: bool
    forkable: bool
    #: Its option of ``wapo train``; empty if it only stands in a file or after ``--set``.
    option: str

    @property
    def allowed(self) -> str:
        """Its limit in words, or what its type allows."""
        if self.limit is not None:
            return self.limit.allowed
        return "true or false" if self.kind == "bool" else ""

    @property
    def shown_default(self) -> str:
        """Default as a user reads it."""
        if self.default is None:
            return self.unset
        if isinstance(self.default, tuple):
            return ",".join(self.default) or "none"
        return str(self.default).lower() if self.kind == "bool" else str(self.default)

    def check(self, value: Any) -> None:
        """Check a value of the right type.

        Raises UserError if it is beyond the limit, naming the setting, the value and what is
        allowed.
        """
        texts = value if isinstance(value, tuple) else (value,)
        if any("\0" in text for text in texts if isinstance(text, str)):
            raise UserError(f"{self.name} must be text without NUL characters, got {value!r}")
        limit = self.limit
        if limit is None or (value is None and self.unset) or limit.holds(value):
            return
        if len(limit.words) > _FEW:
            raise unknown_name(self.name, value, limit.words)
        raise UserError(f"{self.name} must be {limit.refusal(value)}, got {value!r}")

    def typed(self, value: Any) -> Any:
        """A plain value as the setting's type: whole numbers pass as floats, lists as tuples.

        The word none stands for None, which TOML has not, where text has no place. Raises UserError
        if its type is another.
        """
        wanted = self.kind.split(" | ")
        if isinstance(value, list | tuple):
            if "tuple[str, ...]" in wanted and all(isinstance(v, str) for v in value):
                return tuple(value)
        elif value is None or (value == "none" and "str" not in wanted):
            if "None" in wanted:
                return None
        elif type(value).__name__ in wanted:
            return value
        elif type(value) is int and "float" in wanted:
            return float(value) if abs(value) < _HUGE else math.inf if value > 0 else -math.inf
        raise UserError(f"{self.name} must be of type {self.kind}, got {value!r}")


def setting(
    default: Any,
    doc: str,
    limit: Limit | None = None,
    *,
    unset: str = "",
    resumable: bool = False,
    forkable: bool = True,
    cli: bool | str = False,
) -> Any:
    """Declare one field of a dataclass of settings.

    Parameters
    ----------
    doc : str
        What it means; default and limit are shown beside it.
    unset : str
        What None stands for, where None is allowed.
    resumable : bool
        A run that is continued may change it, for it does not decide the weights.
    forkable : bool
        A fork may change it, for it leaves prompts and parameters what they are.
    cli : bool or str
        Give it an option of ``wapo train``; a text is the option's name.
    """
    declared = Declared(
        default=default,
        doc=doc,
        limit=limit,
        unset=unset,
        resumable=resumable,
        forkable=forkable,
        option=cli if isinstance(cli, str) else "--" if cli else "",
    )
    return field(default=default, metadata={_KEY: declared})


def declared_settings(cls: Any) -> dict[str, Declared]:
    """Settings of a dataclass by name, in the order they are declared."""
    found = {}
    for each in fields(cls):
        if _KEY in each.metadata:
            plain: Declared = each.metadata[_KEY]
            kind = each.type if isinstance(each.type, str) else _type_name(each.type)
            option = f"--{each.name.replace('_', '-')}" if plain.option == "--" else plain.option
            found[each.name] = replace(plain, name=each.name, kind=kind, option=option)
    return found


def _type_name(declared: Any) -> str:
    return declared.__name__ if isinstance(declared, type) else str(declared)


def check_settings(config: Any) -> None:
    """Check every setting of an instance against its limit.

    Raises UserError on the first that is beyond it.
    """
    for name, declared in declared_settings(type(config)).items():
        declared.check(getattr(config, name))


def typed_values(cls: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Plain values as the types of the settings they name.

    Raises UserError on an unknown name or a value of the wrong type.
    """
    known = declared_settings(cls)
    options = {declared.option.lstrip("-"): name for name, declared in known.items()}
    for name in values:
        if name not in known:
            raise unknown_name("setting", options.get(name, name), known, given=name)
    return {name: known[name].typed(value) for name, value in values.items()}


def assigned(pairs: Iterable[str], option: str = "--set") -> dict[str, Any]:
    """Settings from NAME=VALUE texts: numbers, booleans and lists as in TOML, else plain text."""
    found: dict[str, Any] = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign:
            raise UserError(f"{option} takes NAME=VALUE, got {pair!r}")
        try:
            found[name.strip()] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            found[name.strip()] = value.strip()
    return found


def settings_table(cls: Any) -> str:
    """Every setting as a Markdown table: default, limits, option, resume rule, meaning."""
    rows = [("setting", "default", "allowed", "option", "resume", "meaning"), ("---",) * 6]
    for name, each in declared_settings(cls).items():
        option = f"`{each.option}`" if each.option else ""
        resume = "may change" if each.resumable else ""
        rows.append((f"`{name}`", each.shown_default, each.allowed, option, resume, each.doc))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
