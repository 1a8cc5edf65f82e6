"""The exception of a user's mistake, one line and exit code 2; and text that is safe to show."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

# Control characters, surrogates, line separators, and format characters that reorder or hide text.
# The joiners U+200C and U+200D stay: Persian, Indic scripts and emoji are written with them.
_UNSAFE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff"
    r"\ufeff\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e007f]"
)
#: Names that an error lists at most; of more none where a close one is found.
_MANY = 40


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, and what is allowed, in one line."""


def closest(name: object, allowed: Iterable[object]) -> str | None:
    """The allowed name that is most like the one given, case, - and _ aside; None if none is.

    Examples
    --------
    >>> closest("Rollout-per-prompt", ["rollouts_per_prompt", "epochs"])
    'rollouts_per_prompt'
    """
    plain = {str(a).lower().replace("-", "_"): str(a) for a in allowed}
    found = get_close_matches(str(name).lower().replace("-", "_"), list(plain), n=1)
    return plain[found[0]] if found else None


def unknown_name(
    kind: str, name: object, allowed: Iterable[object], given: object = None
) -> UserError:
    """Build the error for a name that is not in a list of allowed ones; it names the closest.

    Parameters
    ----------
    kind : str
        What the name stands for, e.g. ``"objective"``.
    name : object
        The name that was given.
    allowed : iterable
        The names that exist.
    given : object, optional
        What was written, where ``name`` is what it likely stands for.
    """
    names = [str(a) for a in allowed]
    like = closest(name, names)
    name = name if given is None else given
    listed = f"; allowed: {few(names, _MANY)}" if like is None or len(names) <= _MANY else ""
    asked = f"; did you mean {like!r}?" if like is not None else ""
    return UserError(f"unknown {kind} {name!r}{listed}{asked}")


def few(names: Iterable[object], most: int = 8) -> str:
    """Names for a sentence; a long list ends with how many more there are.

    Examples
    --------
    >>> few(["a", "b", "c", "d"], most=2)
    'a, b and 2 more'
    """
    texts = list(map(str, names))
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def counted(count: int, what: str) -> str:
    """A number of things: ``1 step``, ``3 steps``."""
    return f"{count} {what}{'' if count == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """First line of what an exception says, or its name if it says nothing."""
    return [*str(error).strip().splitlines(), type(error).__name__][0]


def printable(text: str, keep: str = "") -> str:
    r"""Text of a run as it can be shown on a terminal, in SVG and in HTML.

    Control and bidirectional characters, surrogates and invisible format characters are written as
    backslash escapes, so that a label can neither steer a terminal nor end a drawing. ``keep``:
    characters that stay as they are, such as ``"\n\t"`` where lines are shown as lines.

    Examples
    --------
    >>> print(printable("a\x1b[31m\u202eb"))
    a\x1b[31m\u202eb
    """
    if text.isprintable():
        return text
    return _UNSAFE.sub(lambda found: _escape(found[0], keep), text)


def _escape(character: str, keep: str) -> str:
    return character if character in keep else ascii(character)[1:-1]
