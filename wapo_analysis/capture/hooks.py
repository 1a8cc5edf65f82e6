"""Changing somebody else's objects and putting every one of them back."""

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

_ABSENT = object()


class Patches:
    """Owns every change made to foreign objects; `close` undoes them, last one first.

    A wrapper that another tool has wrapped in turn cannot be taken out from under it. It stays
    where it is and, once closed, does nothing but call what it wraps.

    Examples
    --------
    >>> class Clock:
    ...     def tick(self) -> int:
    ...         return 1
    >>> clock, patches = Clock(), Patches()
    >>> patches.wrap(clock, "tick", lambda tick: tick() + 1)
    >>> clock.tick()
    2
    >>> patches.close()
    >>> clock.tick(), vars(clock)
    (1, {})
    """

    def __init__(self) -> None:
        self.closed = False
        self._undo: list[Callable[[], object]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute of one object, to be restored or deleted on `close`.

        Parameters
        ----------
        owner : object
            Instance whose ``__dict__`` may hold the attribute; its class is never touched.
        name : str
        value : object
        """
        before = vars(owner).get(name, _ABSENT)
        setattr(owner, name, value)
        put = vars(owner).get(name)

        def restore() -> None:
            if vars(owner).get(name) is not put:
                return
            if before is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        self._undo.append(restore)

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Call ``around(original, *args, **kwargs)`` in place of a method of one object.

        Parameters
        ----------
        owner : object
        name : str
            Name of the method; signature, and whether it is bound, stay as they are.
        around : callable
            Gets the original bound method first.
        """
        original = getattr(owner, name)
        if isinstance(original, MethodType):

            @functools.wraps(original.__func__)
            def method(_owner: Any, *args: Any, **kwargs: Any) -> Any:
                return call(*args, **kwargs)

            replacement: Any = MethodType(method, owner)
        else:

            @functools.wraps(original)
            def replacement(*args: Any, **kwargs: Any) -> Any:
                return call(*args, **kwargs)

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.closed:
                return original(*args, **kwargs)
            return around(original, *args, **kwargs)

        self.set(owner, name, replacement)

    def on_close(self, undo: Callable[[], object]) -> None:
        """Call ``undo`` on `close`, before everything that was done earlier is undone."""
        self._undo.append(undo)

    def close(self) -> None:
        """Undo everything; a second call does nothing."""
        self.closed = True
        while self._undo:
            self._undo.pop()()
