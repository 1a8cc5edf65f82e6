"""The two embedded tasks: chain-sum (arithmetic one step at a time) and two-hop questions.

An early slip or a wrong turn spoils everything after it.
"""

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


LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"
DIGITS: Final = "0123456789"


@dataclass(frozen=True, slots=True)
class TwoHop(Generated):
    """Follow two facts of the prompt: from a letter to its bridge, from the bridge to a digit.

    A fact ``am`` says that ``a`` leads to ``m``. ``k3,am,bk,m7;a`` asks where ``a`` leads in two
    hops and is completed by ``m7``. The facts are shuffled and those of the other chains distract:
    every wrong turn ends at a digit that looks like an answer.

    Parameters
    ----------
    chains : int
        Chains of two facts in the prompt, 2 to 10. The embedded base policy knows 4.
    error_rate : float
        Probability that a hop of a pre-training demonstration is wrong.

    Raises
    ------
    UserError
        If ``chains`` or ``error_rate`` is out of range.
    """

    chains: int = 4
    error_rate: float = 0.3
    name: str = "two-hop"

    def __post_init__(self) -> None:
        if not 2 <= self.chains <= len(DIGITS):
            raise UserError(f"two-hop takes 2 to {len(DIGITS)} chains, got {self.chains}")
        check_rate(self.error_rate)

    @property
    def description(self) -> str:
        """One sentence for help texts and reports."""
        return "Chain two facts of the prompt: with k3,am,bk,m7 the question a is answered by m7."

    @property
    def max_new_tokens(self) -> int:
        """Bridge, answer and end-of-sequence, and as many again to let rambling show."""
        return 6

    def problems(self, rng: np.random.Generator, n: int) -> list[Problem]:
        """Draw problems with distinct letters and distinct digits, facts shuffled."""
        return [self._problem(rng) for _ in range(check_count(n))]

    def _problem(self, rng: np.random.Generator) -> Problem:
        letters = [LETTERS[i] for i in rng.permutation(len(LETTERS))[: 2 * self.chains]]
        values = [DIGITS[i] for i in rng.permutation(len(DIGITS))[: self.chains]]
        heads, bridges = letters[: self.chains], letters[self.chains :]
        facts = [f"{a}{b}" for a, b in zip(heads + bridges, bridges + values, strict=True)]
        shuffled = ",".join(facts[i] for i in rng.permutation(len(facts)))
        return Problem(f"{shuffled};{heads[0]}", values[0])

    def reward(self, problem: Problem, completion: str) -> float:
        """Give 1 for one letter and the right digit, and nothing else.

        Only the final digit is judged for truth: the right answer after a wrong bridge is rewarded,
        as in any outcome reward.
        """
        match = re.fullmatch(r"[a-z]([0-9])", completion)
        return float(match is not None and match[1] == problem.answer)

    def demonstrate(self, problem: Problem, rng: np.random.Generator, error_rate: float) -> str:
        """Write bridge and answer; each hop goes wrong with probability ``error_rate``.

        A wrong hop lands on another bridge or another digit of the prompt; after a wrong bridge the
        second hop starts from there.
        """
        check_rate(error_rate)
        facts, asked = problem.prompt.split(";")
        follow = {fact[0]: fact[1] for fact in facts.split(",")}
        bridge = _slip(follow[asked], [b for b in follow.values() if b in follow], rng, error_rate)
        answer = _slip(
            follow[bridge], [v for v in follow.values() if v not in follow], rng, error_rate
        )
        return f"{bridge}{answer}"


def _slip(right: str, choices: list[str], rng: np.random.Generator, error_rate: float) -> str:
    """Return ``right``, or with probability ``error_rate`` one of the other choices."""
    if rng.random() >= error_rate:
        return right
    return str(rng.choice([choice for choice in choices if choice != right]))
