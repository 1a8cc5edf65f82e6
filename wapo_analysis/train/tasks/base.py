"""What a task is, what a data format is, and the task whose problems stand in a file.

A task draws problems and checks a reward. A format says how a row becomes a
problem and how a completion is graded; what all of them share is here: counting and naming bad
rows, the split into training and held-out problems, drawing.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from wapo_analysis.errors import UserError
from wapo_analysis.train.tasks.data_files import DataReport, Source, digest, read_rows, split

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Problem:
    """One prompt and the answer that earns the reward.

    Attributes
    ----------
    prompt : str
        The text the policy continues.
    answer : str
        The final answer alone, without the intermediate results; empty where only a scorer knows.
    extra : mapping
        What the task's scorer needs beside the answer.
    source : str
        Where the problem stands in the data, e.g. ``"line 12"``; empty for generated ones.
    """

    prompt: str
    answer: str
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)
    source: str = ""


class Named(Protocol):
    """What is said of tasks and formats alike."""

    @property
    def name(self) -> str:
        """The name typed on the command line."""

    @property
    def description(self) -> str:
        """One sentence for help texts and reports."""

    @property
    def max_new_tokens(self) -> int:
        """Longest completion worth sampling, in tokens, end-of-sequence included."""


class Task(Named, Protocol):
    """What the trainer needs of a task: problems to draw and a verifiable reward."""

    def problems(self, rng: np.random.Generator, n: int) -> list[Problem]:
        """Draw problems to train on; the same generator state gives the same problems.

        Returns ``n`` problems, in the order drawn. Raises UserError if ``n`` is negative or there
        is nothing to draw from. ``rng``: source of randomness; advanced by the call; ``n``: how
        many problems, 0 or more.
        """

    def held_out_problems(self, n: int) -> list[Problem]:
        """At most ``n`` problems for evaluation, always the same ones."""

    def reward(self, problem: Problem, completion: str) -> float:
        """Grade a completion, any text at all without special tokens: in [0, 1], deterministic."""

    def data_record(self) -> dict[str, Any]:
        """What the manifest says of the data: where from, digest, rows; empty if generated."""


def tools_of(task: Any) -> list[Callable[..., str]]:
    """Functions that the policy may call while it answers; none for most tasks."""
    tools: list[Callable[..., str]] = getattr(task, "tools", list)()
    return tools


def check_count(n: int) -> int:
    """Return ``n``, a number of problems to draw. Raises UserError if ``n`` is negative."""
    if n < 0:
        raise UserError(f"the number of problems must be 0 or more, got {n}")
    return n


class BadRow(ValueError):
    """A row that cannot become a problem; the message says why."""


class Format(Named, Protocol):
    """How the rows of one kind of data become problems, and how completions are graded."""

    @property
    def question(self) -> str:
        """Field that holds the question; equal questions are on one side of the split."""

    @property
    def one_answer(self) -> bool:
        """Whether one prompt with two answers is a contradiction."""

    def parse(self, values: Mapping[str, Any]) -> Problem:
        """Make a problem of a row.

        Raises BadRow if a field is missing, empty or of the wrong type.
        """

    def reward(self, problem: Problem, completion: str) -> float:
        """Grade a completion: a number in [0, 1]."""

    def solution(self, problem: Problem) -> str | None:
        """Shortest completion that must earn 1; None if only the scorer knows one."""

    def record(self) -> dict[str, Any]:
        """What else the manifest has to say of the data."""


def text_field(values: Mapping[str, Any], name: str) -> str:
    """Text of a field, outer white space removed.

    Raises BadRow if the field is missing, empty, no text, or holds half a surrogate pair.
    """
    value = values.get(name)
    if value is None:
        raise BadRow(f"no {name!r}")
    if not isinstance(value, str):
        raise BadRow(f"{name!r} is {type(value).__name__}, not text")
    if not value.strip():
        raise BadRow(f"{name!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow(f"{name!r} is not valid Unicode") from None
    return value.strip()


@dataclass(frozen=True, eq=False)
class FileTask:
    """A task over the rows of one format."""

    form: Format
    #: Problems to train on, in the order of the file.
    train: list[Problem]
    #: Problems for evaluation, in the order of their digests.
    held_out: list[Problem]
    #: On the training data and, if there is one, the evaluation file.
    reports: tuple[DataReport, ...]
    #: Training rows left out because the evaluation file asks the same.
    overlap: int = 0

    @property
    def name(self) -> str:
        """The name typed on the command line."""
        return self.form.name

    @property
    def description(self) -> str:
        """One sentence for help texts and reports."""
        return self.form.description

    @property
    def max_new_tokens(self) -> int:
        """Longest completion worth sampling, in tokens, end-of-sequence included."""
        return self.form.max_new_tokens

    def problems(self, rng: np.random.Generator, n: int) -> list[Problem]:
        """Draw ``n`` training problems, all different unless there are fewer than ``n``."""
        drawn: list[Problem] = []
        while len(drawn) < check_count(n):
            order = rng.choice(len(self.train), min(n - len(drawn), len(self.train)), replace=False)
            drawn += [self.train[i] for i in order]
        return drawn

    def held_out_problems(self, n: int) -> list[Problem]:
        """The first ``n`` held-out problems; all of them if there are fewer.

        Raises UserError if ``n`` is negative or nothing is held out.
        """
        if not self.held_out:
            raise UserError(
                f"{self.name}: no problem is held out; raise eval_fraction or give eval_data"
            )
        return self.held_out[: check_count(n)]

    def tools(self) -> list[Callable[..., str]]:
        """Functions that the policy may call while it answers."""
        return tools_of(self.form)

    def reward(self, problem: Problem, completion: str) -> float:
        """Grade a completion: a number in [0, 1]."""
        return self.form.reward(problem, completion)

    def solution(self, problem: Problem) -> str | None:
        """Shortest completion that must earn 1; None if only the scorer knows one."""
        return self.form.solution(problem)

    def data_record(self) -> dict[str, Any]:
        """What the manifest says of the data: file, digest, rows, what was left out."""
        record = {**self.reports[0].to_dict(), **self.form.record()}
        record |= {"train": len(self.train), "held_out": len(self.held_out)}
        if len(self.reports) > 1:
            record |= {"eval": self.reports[1].to_dict(), "overlap": self.overlap}
        return record

    def report_lines(self) -> list[str]:
        """Lines on what was left out, one a source; none if everything is used."""
        lines = [line for report in self.reports if (line := report.to_line())]
        if self.overlap:
            lines.append(
                f"{self.name}: {self.overlap} training rows left out: eval_data asks the same"
            )
        return lines


def load_file_task(
    form: Format, data: str, eval_data: str | None = None, eval_fraction: float = 0.05
) -> FileTask:
    """Read the data of a task and split it.

    With ``eval_data`` its problems are held out and training problems that ask the same are left
    out. Without it a question is held out if its SHA-256, read as a fraction of the largest, is
    below ``eval_fraction``: a question keeps its side when the file grows or is reordered. If that
    holds out nothing, the question with the smallest digest is; if it leaves nothing to train on,
    the one with the largest is trained on. What was left out is logged in one line per source.
    Raises UserError if the data cannot be read or too much of it is unusable. ``data``,
    ``eval_data``: what :func:`~wapo_analysis.train.tasks.data_files.read_rows` takes.
    ``eval_fraction``: in [0, 1); 0 holds nothing out. Without effect if ``eval_data`` is given.
    """
    problems, report = _problems(form, read_rows(data))
    if eval_data is None:
        train, held_out = split(problems, eval_fraction)
        task = FileTask(form, train, held_out, (report,))
    else:
        others, eval_report = _problems(form, read_rows(eval_data))
        asked = {key for key, _ in others}
        kept = [problem for key, problem in problems if key not in asked]
        if not kept:
            raise UserError(f"{form.name}: every question of {data} is also in {eval_data}")
        chosen = [problem for _, problem in sorted(others, key=lambda pair: digest(pair[0]))]
        overlap = len(problems) - len(kept)
        task = FileTask(form, kept, chosen, (report, eval_report), overlap)
    for line in task.report_lines():
        log.warning("%s", line)
    return task


def _problems(form: Format, source: Source) -> tuple[list[tuple[str, Problem]], DataReport]:
    """Question and problem of every usable row, and the account of the others."""
    kept: list[tuple[str, Problem]] = []
    skipped, repeated = [], []
    seen: dict[str, list[Problem]] = {}
    for row in source.rows:
        try:
            if row.values is None:
                raise BadRow(row.reason)
            key = text_field(row.values, form.question)
            problem = form.parse(row.values)
            before = seen.setdefault(problem.prompt, [])
            twin = _twin(form, problem, before)
        except BadRow as error:
            skipped.append(f"{row.where}: {error}")
            continue
        if twin is not None:
            repeated.append(f"{row.where} (as {twin.source})")
            continue
        placed = Problem(problem.prompt, problem.answer, problem.extra, row.where)
        before.append(placed)
        kept.append((key, placed))
    report = DataReport(
        form.name, source.name, source.sha256, len(source.rows), tuple(skipped), tuple(repeated)
    )
    first = next((row.values for row in source.rows if row.values is not None), {})
    report.check(", ".join(sorted(map(str, first))[:12]))
    return kept, report


def _twin(form: Format, problem: Problem, before: list[Problem]) -> Problem | None:
    """The earlier problem that says the same, if any."""
    for other in before:
        if (other.answer, other.extra) == (problem.answer, problem.extra):
            return other
    if before and form.one_answer:
        raise BadRow(f"asks what {before[0].source} asks and answers otherwise")
    return None
