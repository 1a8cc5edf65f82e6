"""Chain-sum: arithmetic one step at a time, where an early slip spoils every later sum."""

import re
from dataclasses import dataclass
from typing import Final

import numpy as np

from wapo_analysis.errors import UserError
from wapo_analysis.train.tasks.base import Generated, Problem, check_count, check_rate

SEPARATOR: Final = ";"


@dataclass(frozen=True, slots=True)
class ChainSum(Generated):
    """Add single digits from left to right and write down every running sum.

    ``9+4+5+8+0+7=`` is completed by ``13;18;26;26;33``.

    Parameters
    ----------
    terms : int
        Number of digits to add, at least 2. The embedded base policy knows 6.
    error_rate : float
        Probability that a running sum of a pre-training demonstration is wrong.

    Raises
    ------
    UserError
        If ``terms`` or ``error_rate`` is out of range.
    """

    terms: int = 6
    error_rate: float = 0.15
    name: str = "chain-sum"

    def __post_init__(self) -> None:
        if self.terms < 2:
            raise UserError(f"chain-sum needs at least 2 terms, got {self.terms}")
        check_rate(self.error_rate)

    @property
    def description(self) -> str:
        """One sentence for help texts and reports."""
        return f"Add {self.terms} digits, writing every running sum: 9+4+5= is answered by 13;18."

    @property
    def max_new_tokens(self) -> int:
        """Room for every running sum at its widest, the separators and end-of-sequence."""
        return (self.terms - 1) * (len(str(9 * self.terms)) + 1)

    def problems(self, rng: np.random.Generator, n: int) -> list[Problem]:
        """Draw problems with independent uniform digits."""
        digits = rng.integers(0, 10, size=(check_count(n), self.terms)).tolist()
        return [Problem("+".join(map(str, row)) + "=", str(sum(row))) for row in digits]

    def reward(self, problem: Problem, completion: str) -> float:
        """Give 1 for one whole number per addition, separated by ``;``, the last one the sum.

        Only the final number is judged for truth; the format keeps the policy from skipping the
        work. Running sums that are wrong but cancel out earn the reward, as in any outcome reward.
        """
        fields = completion.split(SEPARATOR)
        if len(fields) != problem.prompt.count("+") or fields[-1] != problem.answer:
            return 0.0
        return float(all(re.fullmatch(r"[0-9]+", field) for field in fields))

    def demonstrate(self, problem: Problem, rng: np.random.Generator, error_rate: float) -> str:
        """Write the running sums; each addition goes wrong with probability ``error_rate``.

        A wrong sum is any other number that many digits can add up to, all equally likely, and the
        error carries on into the sums that follow, as it does when a person slips.
        """
        check_rate(error_rate)
        total, *rest = map(int, problem.prompt.removesuffix("=").split("+"))
        sums = []
        for count, digit in enumerate(rest, start=2):
            total += digit
            if rng.random() < error_rate:
                total = _other_number(total, 9 * count, rng)
            sums.append(str(total))
        return SEPARATOR.join(sums)


def _other_number(right: int, largest: int, rng: np.random.Generator) -> int:
    """Draw uniformly from 0..largest without ``right``."""
    drawn = int(rng.integers(largest))
    return drawn + (drawn >= right)
