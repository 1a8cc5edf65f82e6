"""Numbers about one completion that need nothing but its token ids."""

from collections import Counter
from collections.abc import Sequence


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that occurred before in the same completion, in [0, 1].

    Examples
    --------
    >>> repetition([1, 2, 3, 4, 1, 2, 3, 4])
    0.2
    """
    grams = Counter(zip(*(ids[start:] for start in range(n)), strict=False))
    total = sum(grams.values())
    return (total - len(grams)) / total if total else 0.0
