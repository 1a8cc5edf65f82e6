"""Decisions drawn from bytes: the same bytes make the same input, whoever found them."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


class Draws:
    """Numbers out of a string of bytes; 0 once it is used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def number(self, below: int) -> int:
        """A number from 0 to ``below`` - 1."""
        width = 1 if below <= 256 else 3
        part = self._data[self._at : self._at + width]
        self._at += width
        return int.from_bytes(part, "little") % max(below, 1)

    def pick(self, choices: Sequence[T]) -> T:
        return choices[self.number(len(choices))]

    def chance(self, in_hundred: int) -> bool:
        return self.number(100) < in_hundred

    def bytes(self, length: int) -> bytes:
        part = self._data[self._at : self._at + length]
        self._at += length
        return part or b"\0"
