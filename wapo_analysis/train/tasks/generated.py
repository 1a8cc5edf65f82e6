"""Tasks whose problems are generated: the two embedded ones, and any data set of reasoning-gym.

Embedded are chain-sum (arithmetic one step at a time) and two-hop questions: an early slip or a
wrong turn spoils everything after it. reasoning-gym generates and scores by itself, in the grading
process, see ``judge``: some scorers evaluate what they are given.
"""

import difflib
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np

from wapo_analysis.errors import UserError
from wapo_analysis.train.tasks.base import Problem, check_count
from wapo_analysis.train.tasks.data_files import is_held_out
from wapo_analysis.train.tasks.judge import START_SECONDS, Judge, require

# No step of a run draws from this stream: their seeds are (seed, step, 1), see train/batch.py.
HELD_OUT_SEED: Final = 2**40 + 1
SEPARATOR: Final = ";"


class Generated(ABC):
    """What tasks have in common whose problems are made on the spot."""

    __slots__ = ()

    @abstractmethod
    def problems(self, rng: np.random.Generator, n: int) -> list[Problem]:
        """Draw problems; see `Task.problems`."""

    def held_out_problems(self, n: int) -> list[Problem]:
        """Draw ``n`` problems, always the same ones, from a stream that no training step uses."""
        return self.problems(np.random.default_rng(HELD_OUT_SEED), n)

    def data_record(self) -> dict[str, Any]:
        """Nothing: the problems are generated."""
        return {}


@dataclass(frozen=True, slots=True)
class ChainSum(Generated):
    """Add single digits from left to right and write down every running sum.

    ``9+4+5+8+0+7=`` is completed by ``13;18;26;26;33``. Raises UserError if ``terms`` is out of
    range. ``terms``: number of digits to add, at least 2. The embedded base policy knows 6.
    """

    terms: int = 6
    name: str = "chain-sum"

    def __post_init__(self) -> None:
        if self.terms < 2:
            raise UserError(f"chain-sum needs at least 2 terms, got {self.terms}")

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


LETTERS: Final = "abcdefghijklmnopqrstuvwxyz"
DIGITS: Final = "0123456789"


@dataclass(frozen=True, slots=True)
class TwoHop(Generated):
    """Follow two facts of the prompt: from a letter to its bridge, from the bridge to a digit.

    A fact ``am`` says that ``a`` leads to ``m``. ``k3,am,bk,m7;a`` asks where ``a`` leads in two
    hops and is completed by ``m7``. The facts are shuffled and those of the other chains distract:
    every wrong turn ends at a digit that looks like an answer. Raises UserError if ``chains`` is
    out of range. ``chains``: chains of two facts in the prompt, 2 to 10. The embedded base policy
    knows 4.
    """

    chains: int = 4
    name: str = "two-hop"

    def __post_init__(self) -> None:
        if not 2 <= self.chains <= len(DIGITS):
            raise UserError(f"two-hop takes 2 to {len(DIGITS)} chains, got {self.chains}")

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


PREFIX: Final = "reasoning-gym:"
_TRIES: Final = 1000
_OPEN, _CLOSE = "<answer>", "</answer>"


def data_set_names() -> list[str]:
    """Names of the data sets of the installed reasoning-gym.

    Raises UserError if it is not installed.
    """
    require("reasoning_gym", "reasoning-gym", "task reasoning-gym")
    judge = Judge("reasoning-gym", {"do": "gym_names"})
    return list(judge.start()["names"])


def parse_settings(text: str | None) -> dict[str, Any]:
    """Settings of a data set from ``key=value,...`` or a JSON object.

    Raises UserError if it is neither form. ``text``: values are read as JSON where they are JSON,
    else as text.

    Examples
    --------
    >>> parse_settings("seed=1,size=1000,allow_negation=true")
    {'seed': 1, 'size': 1000, 'allow_negation': True}
    """
    if not text or not text.strip():
        return {}
    if text.lstrip().startswith("{"):
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise UserError(f"--data is not a JSON object: {error}") from error
    pairs = [part.partition("=") for part in text.split(",")]
    if wrong := [key for key, sign, _ in pairs if not sign or not key.strip()]:
        raise UserError(
            f"--data of a reasoning-gym task is key=value,... or a JSON object, got {wrong[0]!r}"
        )
    return {key.strip(): _value(value.strip()) for key, _, value in pairs}


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def stated_answer(completion: str) -> str | None:
    """What stands in the last ``<answer>...</answer>``; None without one."""
    head, closed, _ = completion.rpartition(_CLOSE)
    _, opened, inside = head.rpartition(_OPEN)
    return inside.strip() or None if closed and opened else None


class ReasoningGym:
    """Problems of one data set; an entry is an index below the data set's size.

    An entry is held out if its question is, by the rule of the file tasks. Training draws its
    indices with replacement and passes over the held-out ones. Raises UserError if the package is
    not installed, or the name or a setting is unknown to it.

    Parameters
    ----------
    dataset : str
        Name in reasoning-gym.
    settings : dict
        The data set's own; ``seed`` is 0 and ``size`` 10,000 unless given.
    eval_fraction : float
        Share of the questions held out.
    """

    max_new_tokens: int = 512

    def __init__(self, dataset: str, settings: dict[str, Any], eval_fraction: float = 0.05) -> None:
        require("reasoning_gym", "reasoning-gym", f"task {PREFIX}{dataset}")
        self.name = f"{PREFIX}{dataset}"
        self.eval_fraction = eval_fraction
        setup = {"do": "gym_make", "name": dataset, "config": settings}
        self.judge = Judge(f"task {self.name}", setup)
        made = self.judge.start()
        if "unknown" in made:
            raise _unknown(dataset, made["unknown"])
        self.config, self.size, self.version = made["config"], made["size"], made["version"]
        self._problem = lru_cache(4096)(self._generate)
        self._problem(0)  # a data set that cannot make its first entry fails here

    @property
    def description(self) -> str:
        """One sentence for help texts and reports."""
        return f"Generated problems of reasoning-gym's {self.name.removeprefix(PREFIX)}."

    def _generate(self, index: int) -> Problem:
        item = self.judge.ask(START_SECONDS, do="gym_item", index=index)
        if "error" in item:
            raise UserError(f"{self.name}: entry {index} cannot be made: {item['error']}")
        prompt = f"{item['question']}\n\nPut the final answer between {_OPEN} and {_CLOSE}."
        return Problem(prompt, item["answer"] or "", {"index": index}, f"entry {index}")

    def problems(self, rng: np.random.Generator, n: int) -> list[Problem]:
        """Draw ``n`` training problems."""
        return [self._draw(rng) for _ in range(check_count(n))]

    def _draw(self, rng: np.random.Generator) -> Problem:
        for _ in range(_TRIES):
            problem = self._problem(int(rng.integers(self.size)))
            if not is_held_out(problem.prompt, self.eval_fraction):
                return problem
        raise UserError(f"{self.name}: no entry to train on; lower eval_fraction or raise size")

    def held_out_problems(self, n: int) -> list[Problem]:
        """The first ``n`` different held-out problems; all of them if there are fewer.

        Raises UserError if ``n`` is negative or nothing is held out.
        """
        found: dict[str, Problem] = {}
        entries: Iterable[int] = range(self.size) if check_count(n) else ()
        for index in entries:
            problem = self._problem(index)
            if is_held_out(problem.prompt, self.eval_fraction):
                found.setdefault(problem.prompt, problem)
            if len(found) == n:
                break
        if n and not found:
            raise UserError(f"{self.name}: no entry is held out; raise eval_fraction or size")
        return list(found.values())

    def reward(self, problem: Problem, completion: str) -> float:
        """Score of the last ``<answer>...</answer>`` by the data set's scorer; 0 without one.

        Raises UserError if the problem is not one of this task.
        """
        if "index" not in problem.extra:
            raise UserError(f"{self.name}: a problem without its entry's index cannot be graded")
        answer = stated_answer(completion)
        if answer is None:
            return 0.0
        return self.judge.score(do="gym_score", index=problem.extra["index"], text=answer)

    def solution(self, problem: Problem) -> str | None:
        """Shortest completion that must earn 1; None if only the scorer knows one."""
        return f"{_OPEN}{problem.answer}{_CLOSE}" if problem.answer else None

    def data_record(self) -> dict[str, Any]:
        """Data set, version, settings and a digest of them with the first questions."""
        first = [self._problem(i).prompt for i in range(min(self.size, 4))]
        what = json.dumps([self.name, self.version, self.config, first], sort_keys=True)
        return {
            "source": self.name,
            "version": self.version,
            "config": self.config,
            "size": self.size,
            "sha256": hashlib.sha256(what.encode()).hexdigest(),
        }

    def report_lines(self) -> list[str]:
        """Nothing is left out of generated data."""
        return []


def _unknown(name: str, known: list[str]) -> UserError:
    close = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    close += [other for other in known if name and name in other and other not in close]
    hint = f"close to it: {', '.join(close)}" if close else "see `wapo tasks reasoning-gym`"
    return UserError(f"unknown reasoning-gym data set {name!r} of {len(known)}; {hint}")
