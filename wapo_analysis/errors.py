"""The exception of a user's mistake; the command line makes it one line and exit code 2."""


class UserError(ValueError):
    """Something the user gave is wrong; the message says what, and what is allowed, in one line."""


def unknown_name(kind: str, name: object, allowed: object) -> UserError:
    """Build the error for a name that is not in a list of allowed ones.

    Parameters
    ----------
    kind : str
        What the name stands for, e.g. ``"objective"``.
    name : object
        The name that was given.
    allowed : iterable of str
        The names that exist.
    """
    names = ", ".join(str(a) for a in allowed)  # type: ignore[attr-defined]
    return UserError(f"unknown {kind} {name!r}; allowed: {names}")
