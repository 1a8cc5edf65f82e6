"""HotpotQA: questions over several paragraphs in the prompt, exact match or F1 as the reward.

Answers are compared as in the data set's standard evaluation: lower case, without punctuation and
without articles, white space collapsed. The prompt shows paragraphs up to a number of words: those
the question rests on come first in the choice, then the others in the order of the file, each that
still fits; what was chosen is shown in the order of the file. In the form with tools the policy
looks for the paragraphs itself.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from wapo_analysis.errors import UserError
from wapo_analysis.train.tasks.base import BadRow, Problem, text_field

_PUNCTUATION: Final = str.maketrans("", "", string.punctuation)
_ARTICLES: Final = re.compile(r"\b(?:a|an|the)\b")
_ANSWER: Final = re.compile(r"^[\s*_#>]*answer[*_]*:(.*)$", re.IGNORECASE | re.MULTILINE)
_STATE_IT: Final = "end with a line 'Answer: ' and the answer in a few words."
_HITS, _SHOWN = 5, 20  # paragraphs that a search finds, and words of each that it shows
_WHOLE: Final = frozenset({"yes", "no", "noanswer"})


def normalize(text: str) -> str:
    """Lower case, punctuation and articles removed, white space collapsed.

    >>> normalize(" The  Eiffel-Tower, Paris. ")
    'eiffeltower paris'
    """
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, found: str) -> float:
    """1 if both are the same after :func:`normalize`, else 0."""
    return float(normalize(answer) == normalize(found))


def f1(answer: str, found: str) -> float:
    """Harmonic mean of precision and recall over words; ``yes`` and ``no`` count whole or not.

    >>> f1("Robert Oppenheimer", "J. Robert Oppenheimer")
    0.8
    """
    right, given = normalize(answer), normalize(found)
    if right != given and (right in _WHOLE or given in _WHOLE):
        return 0.0
    words, shown = right.split(), given.split()
    common = sum((Counter(words) & Counter(shown)).values())
    return 2 * common / (len(words) + len(shown)) if common else 0.0


def stated_answer(completion: str) -> str | None:
    """What follows ``Answer:`` on the last line that begins so; None if no line does."""
    lines = _ANSWER.findall(completion)
    return lines[-1].strip(" \t\r*_") if lines else None


@dataclass(frozen=True)
class HotpotQA:
    """Questions of HotpotQA's distractor setting.

    Raises UserError if ``context_words`` is less than 1. ``name``: reward: exact match, or F1;
    ``context_words``: most words of paragraphs, titles included, in a prompt.
    """

    name: str = "hotpotqa"
    context_words: int = 800
    max_new_tokens: int = 160
    question: str = "question"
    one_answer: bool = True

    def __post_init__(self) -> None:
        if self.context_words < 1:
            raise UserError(f"context_words must be at least 1, got {self.context_words}")

    @property
    def description(self) -> str:
        """One sentence for help texts and reports."""
        reward = "F1" if self.name.endswith("f1") else "exact match"
        return f"Multi-hop questions over paragraphs in the prompt, {reward} as the reward."

    def parse(self, values: Mapping[str, Any]) -> Problem:
        """Make a problem of a row, its paragraphs chosen by the rule of this module.

        Raises BadRow if a field is missing, empty or malformed, the answer normalizes to nothing,
        or the paragraphs that the question rests on are missing or do not fit.
        """
        question, answer = text_field(values, "question"), text_field(values, "answer")
        if not normalize(answer):
            raise BadRow(f"'answer' {answer[:20]!r} is empty without articles and punctuation")
        paragraphs = _paragraphs(values.get("context"))
        titles = _supporting(values.get("supporting_facts"))
        if missing := sorted(titles - {title for title, _ in paragraphs}):
            raise BadRow(f"supporting paragraph {missing[0]!r} is not in 'context'")
        return Problem(self._prompt(question, paragraphs, titles), answer)

    def _prompt(self, question: str, paragraphs: list[tuple[str, str]], titles: set[str]) -> str:
        shown = "\n\n".join(self._chosen(paragraphs, titles))
        return (
            f"{shown}\n\nQuestion: {question}\n"
            f"Answer the question from the paragraphs above. Reason briefly, then {_STATE_IT}"
        )

    def _chosen(self, paragraphs: list[tuple[str, str]], titles: set[str]) -> list[str]:
        """Paragraphs that fit, supporting ones first in the choice, in the order of the file."""
        texts = [f"{title}\n{text}" for title, text in paragraphs]
        sizes = [len(text.split()) for text in texts]
        first = [i for i, (title, _) in enumerate(paragraphs) if title in titles]
        room = self.context_words - sum(sizes[i] for i in first)
        if room < 0:
            needed = self.context_words - room
            raise BadRow(f"supporting paragraphs have {needed} words, limit {self.context_words}")
        chosen = set(first)
        for i, size in enumerate(sizes):
            if i not in chosen and size <= room:
                chosen.add(i)
                room -= size
        if not chosen:
            raise BadRow(f"no paragraph within {self.context_words} words")
        return [texts[i] for i in sorted(chosen)]

    def reward(self, problem: Problem, completion: str) -> float:
        """Exact match or F1 of the stated answer; 0 without an ``Answer:`` line."""
        found = stated_answer(completion)
        if found is None:
            return 0.0
        return (f1 if self.name.endswith("f1") else exact_match)(problem.answer, found)

    def solution(self, problem: Problem) -> str:
        """Shortest completion that must earn 1."""
        return f"Answer: {problem.answer}"

    def record(self) -> dict[str, Any]:
        """Length of the prompts."""
        return {"context_words": self.context_words}


@dataclass(frozen=True)
class HotpotSearch(HotpotQA):
    """The same questions without paragraphs: two tools look for them in all of the data.

    ``paragraphs``: text of each title, over all rows that were parsed; of two texts the first
    counts.
    """

    name: str = "hotpotqa-search"
    max_new_tokens: int = 1024
    paragraphs: dict[str, str] = field(default_factory=dict, repr=False, compare=False)

    @property
    def description(self) -> str:
        """One sentence for help texts and reports."""
        return (
            "Multi-hop questions, paragraphs found by tools in several turns (engine trl), exact "
            "match as the reward."
        )

    def _prompt(self, question: str, paragraphs: list[tuple[str, str]], titles: set[str]) -> str:
        for title, text in paragraphs:
            self.paragraphs.setdefault(title, text)
        return (
            f"Question: {question}\nFind the answer with the tools: search for paragraphs, read "
            f"those that may help, search again if need be. Then {_STATE_IT}"
        )

    def tools(self) -> list[Callable[..., str]]:
        """What the policy may call."""
        return [self.search, self.read]

    def search(self, query: str) -> str:
        """Find paragraphs by words; gives the titles of the best ones and how each begins.

        Args:
            query: Words to look for.
        """
        import bm25s

        titles, words = list(self.paragraphs), bm25s.tokenize(str(query), show_progress=False)
        best, scores = self._index.retrieve(
            words, k=min(_HITS, len(titles)), show_progress=False, n_threads=0
        )
        found = [titles[i] for i, score in zip(best[0], scores[0], strict=True) if score > 0]
        lines = [f"{title}: {_beginning(self.paragraphs[title])}" for title in found]
        return "\n".join(lines) or "nothing found"

    def read(self, title: str) -> str:
        """Read a whole paragraph.

        Args:
            title: Its title, as search gives it.
        """
        return self.paragraphs.get(str(title).strip(), "no paragraph has this title")

    @cached_property
    def _index(self) -> Any:
        """Index of titles and texts (Okapi BM25 with the package's parameters)."""
        import bm25s

        texts = [f"{title} {text}" for title, text in self.paragraphs.items()]
        index = bm25s.BM25()
        index.index(bm25s.tokenize(texts, show_progress=False), show_progress=False)
        return index

    def record(self) -> dict[str, Any]:
        """Number of the paragraphs."""
        return {"paragraphs": len(self.paragraphs)}


def _beginning(text: str) -> str:
    words = text.split()
    return " ".join(words[:_SHOWN]) + " ..." * (len(words) > _SHOWN)


def _paragraphs(context: Any) -> list[tuple[str, str]]:
    """Title and text of each paragraph, from pairs or from the hub's columns."""
    if context is None:
        raise BadRow("no 'context'")
    pairs = _pairs(context, "context", ("title", "sentences"))
    if not all(isinstance(title, str) and _is_texts(sentences) for title, sentences in pairs):
        raise BadRow("'context' is not a list of [title, [sentences]]")
    found = [(title.strip(), "".join(_spaced(sentences)).strip()) for title, sentences in pairs]
    if not any(text for _, text in found):
        raise BadRow("'context' is empty")
    _check_unicode(found)
    return found


def _check_unicode(paragraphs: list[tuple[str, str]]) -> None:
    try:
        "".join(title + text for title, text in paragraphs).encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("'context' is not valid Unicode") from None


def _spaced(sentences: list[str]) -> list[str]:
    """Sentences with a space between; the original data carry it at their beginning."""
    return [s if s[:1].isspace() else f" {s}" for s in sentences]


def _supporting(facts: Any) -> set[str]:
    """Titles of the paragraphs that a question rests on; none if the data do not say."""
    if facts is None:
        return set()
    titles = [title for title, _ in _pairs(facts, "supporting_facts", ("title", "sent_id"))]
    if not all(isinstance(title, str) for title in titles):
        raise BadRow("'supporting_facts' is not a list of [title, sentence number]")
    return {title.strip() for title in titles}


def _pairs(value: Any, name: str, columns: tuple[str, str]) -> list[tuple[Any, Any]]:
    """Pairs of a list of pairs or of two columns."""
    if isinstance(value, Mapping):
        first, second = (value.get(column) for column in columns)
        if isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
            return list(zip(first, second, strict=True))
    elif isinstance(value, list) and all(
        isinstance(v, list | tuple) and len(v) == 2 for v in value
    ):
        return [(first, second) for first, second in value]
    raise BadRow(f"{name!r} is neither a list of pairs nor columns {' and '.join(columns)}")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(v, str) for v in value)
