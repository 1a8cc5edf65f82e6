"""A task whose problems stand in a file: what every format shares.

A format says how a row becomes a problem and how a completion is graded. Everything else is here:
counting and naming bad rows, the split into training and held-out problems, drawing.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from wapo_analysis.errors import UserError
from wapo_analysis.train.tasks.base import (
    BadRow,
    Format,
    Problem,
    check_count,
    text_field,
    tools_of,
)
from wapo_analysis.train.tasks.data_files import DataReport, Source, digest, read_rows, split

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class FileTask:
    """A task over the rows of one format.

    Attributes
    ----------
    form : Format
    train : list of Problem
        Problems to train on, in the order of the file.
    held_out : list of Problem
        Problems for evaluation, in the order of their digests.
    reports : tuple of DataReport
        On the training data and, if there is one, the evaluation file.
    overlap : int
        Training rows left out because the evaluation file asks the same.
    """

    form: Format
    train: list[Problem]
    held_out: list[Problem]
    reports: tuple[DataReport, ...]
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

        Raises
        ------
        UserError
            If ``n`` is negative or nothing is held out.
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
    the one with the largest is trained on.

    Parameters
    ----------
    form : Format
    data, eval_data : str
        What :func:`~wapo_analysis.train.tasks.data_files.read_rows` takes.
    eval_fraction : float
        In [0, 1); 0 holds nothing out. Without effect if ``eval_data`` is given.

    Returns
    -------
    FileTask
        What was left out is logged in one line per source.

    Raises
    ------
    UserError
        If the data cannot be read or too much of it is unusable.
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
