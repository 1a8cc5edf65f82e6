"""The split into training and held-out problems: by what is asked, not by where it stands."""

import hashlib

from wapo_analysis.train.tasks.base import Problem


def digest(question: str) -> int:
    """First 64 bits of a question's SHA-256."""
    return int.from_bytes(hashlib.sha256(question.encode("utf-8")).digest()[:8], "big")


def is_held_out(question: str, fraction: float) -> bool:
    """Whether the SHA-256 of a question, as a fraction of the largest, is below ``fraction``."""
    return digest(question) < fraction * 2.0**64


def split(
    problems: list[tuple[str, Problem]], fraction: float
) -> tuple[list[Problem], list[Problem]]:
    """Split problems by their questions.

    Parameters
    ----------
    problems : list of (str, Problem)
        Question and problem.
    fraction : float
        In [0, 1). If it is above 0 and there are two questions or more, neither side is empty.

    Returns
    -------
    train : list of Problem
        In the order given.
    held_out : list of Problem
        In the order of their digests.
    """
    values = sorted({digest(question) for question, _ in problems})
    count = sum(value < fraction * 2.0**64 for value in values)
    if fraction > 0:
        count = min(max(count, 1), len(values) - 1)
    held = set(values[:count])
    train = [problem for question, problem in problems if digest(question) not in held]
    chosen = [(digest(q), problem) for q, problem in problems if digest(q) in held]
    return train, [problem for _, problem in sorted(chosen, key=lambda pair: pair[0])]
