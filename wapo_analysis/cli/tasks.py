"""The command on tasks: ``wapo tasks`` lists them, checks a data file and shows its problems."""

from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from wapo_analysis.cli import DataOption, EvalDataOption, say
from wapo_analysis.errors import UserError

if TYPE_CHECKING:
    from wapo_analysis.train.tasks import Problem, Task


def tasks(
    task: Annotated[
        str | None, Argument(help="A task, or reasoning-gym for its data sets.")
    ] = None,
    data: DataOption = None,
    eval_data: EvalDataOption = None,
    eval_fraction: Annotated[float, Option(help="Share of --data held out.")] = 0.05,
    context_words: Annotated[
        int, Option(help="hotpotqa: most words of paragraphs in a prompt.")
    ] = 800,
    show: Annotated[int, Option(min=0, max=1000, help="Problems to print.")] = 0,
    held_out: Annotated[
        bool, Option("--held-out", help="Print held-out problems, not those trained on.")
    ] = False,
    seed: Annotated[int, Option(min=0, help="Decides which problems are printed.")] = 0,
) -> None:
    """List the tasks, or check the data of one.

    Every row that cannot be used is named with the reason. To begin with:

        wapo tasks
        wapo tasks gsm8k --data train.jsonl --show 3
        wapo tasks reasoning-gym
        wapo tasks reasoning-gym:chain_sum --data seed=1,size=1000 --show 3
    """
    if task is None:
        _list_tasks()
    elif task.rstrip(":") == "reasoning-gym":
        from wapo_analysis.train.tasks.generated import data_set_names

        for name in data_set_names():
            say(f"reasoning-gym:{name}")
    else:
        chosen = _checked(task, data, eval_data, eval_fraction, context_words)
        say(f"{chosen.name}: {chosen.description}")
        _show_record(chosen)
        _show_problems(chosen, show, held_out, seed)


def _checked(
    task: str, data: str | None, eval_data: str | None, eval_fraction: float, context_words: int
) -> "Task":
    """The task; if its data are refused, their bad rows are printed first."""
    from wapo_analysis.train.tasks import get_task
    from wapo_analysis.train.tasks.data_files import DataRefused

    try:
        return get_task(
            task,
            data,
            eval_data=eval_data,
            eval_fraction=eval_fraction,
            context_words=context_words,
        )
    except DataRefused as refused:
        _show_source(refused.report.to_dict())
        raise


def _list_tasks() -> None:
    from wapo_analysis.train.tasks import KINDS

    for kind in KINDS:
        say(f"{kind.name}\n    {kind.description}")
        if kind.data:
            say(f"    --data: {kind.data}; e.g. {kind.example}")
        if kind.extra:
            state = "installed" if kind.ready else "not installed"
            say(f"    needs: pip install 'wapo-analysis[{kind.extra}]' ({state})")
    say(
        "Files: .jsonl, .json, .parquet; folders and hub names NAME[:CONFIG[:SPLIT]] need "
        "'wapo-analysis[data]'."
    )


def _show_record(task: "Task") -> None:
    """Counts, and every row left out that the record names."""
    record = task.data_record()
    if not record:
        say("generated, no data")
        return
    for source in (record, record.get("eval")):
        if source is not None and "rows" in source:
            _show_source(source)
    if "train" in record:
        say(f"train on {record['train']}, held out {record['held_out']}")
    if "size" in record:
        settings = ", ".join(f"{k}={v}" for k, v in record["config"].items())
        say(f"version {record['version']}, {record['size']} entries, {settings}")


def _show_source(source: dict[str, Any]) -> None:
    say(
        f"{source['file']}: {source['rows']} rows, {source['used']} used, "
        f"{source['skipped_rows']} skipped, {source['repeated_rows']} repeated"
    )
    for name in ("skipped", "repeated"):
        for line in source[name]:
            say(f"    {name} {line}")


def _show_problems(task: "Task", count: int, held_out: bool, seed: int) -> None:
    import numpy as np

    if held_out:
        problems = task.held_out_problems(count)
    else:
        problems = task.problems(np.random.default_rng(seed), count)
    solution = getattr(task, "solution", None)
    for number, problem in enumerate(problems, start=1):
        where = f" ({problem.source})" if problem.source else ""
        say(f"\n--- problem {number}{where}\n{problem.prompt}\n--- answer\n{problem.answer}")
        text = solution(problem) if solution is not None else None
        if text is not None:
            _show_reward(task, problem, text)


def _show_reward(task: "Task", problem: "Problem", text: str) -> None:
    """Reward of the right answer; anything below 1 means that it can never be earned."""
    earned = task.reward(problem, text)
    say(f"--- {text!r} earns {earned:g}")
    if earned < 1:
        raise UserError(
            f"{task.name}, {problem.source}: the right answer {problem.answer!r} earns {earned:g}"
        )
