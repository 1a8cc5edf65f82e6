"""Tasks: problems to draw and a verifiable reward.

Two are embedded, ``chain-sum`` (arithmetic) and ``two-hop`` (question answering over facts in the
prompt): problems without end, exact rewards, no download. In both a completion writes down its
intermediate results and ends with the answer, and only the answer is judged. The embedded base
policy was pre-trained on demonstrations (experiments/pretrain_base.py) that are wrong at a stated
rate on purpose: a policy that imitates them is right about half the time and has real entropy,
which is what reinforcement learning needs to start from.

The others read data: GSM8K, MATH and HotpotQA format, any data set of reasoning-gym, and a reward
function of the user's own; see docs/tasks.md. Rewards are functions of the problem and the text
alone, so that a stored run can be graded again.
"""

from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from wapo_analysis.errors import UserError, unknown_name
from wapo_analysis.train.tasks.base import (
    FileTask,
    Format,
    Problem,
    Task,
    load_file_task,
)
from wapo_analysis.train.tasks.formats import Gsm8k, MathProblems, OwnReward
from wapo_analysis.train.tasks.generated import (
    PREFIX,
    ChainSum,
    ReasoningGym,
    TwoHop,
    parse_settings,
)
from wapo_analysis.train.tasks.hotpotqa import HotpotQA, HotpotSearch
from wapo_analysis.train.tasks.judge import require

__all__ = [
    "KINDS",
    "TASKS",
    "ChainSum",
    "Problem",
    "Task",
    "TaskKind",
    "TwoHop",
    "check_task",
    "get_task",
]

TASKS: Final[dict[str, Task]] = {task.name: task for task in (ChainSum(), TwoHop())}


@dataclass(frozen=True, slots=True)
class TaskKind:
    """A line of the list of tasks.

    Attributes
    ----------
    name : str
        What is typed; capitals stand for something of the user's.
    description : str
        One sentence.
    data : str
        What ``--data`` holds; empty if the task takes none.
    example : str
        A value of ``--data``.
    package, extra : str
        Module it needs and the extra that brings it; empty if none.
    """

    name: str
    description: str
    data: str = ""
    example: str = ""
    package: str = ""
    extra: str = ""

    @property
    def ready(self) -> bool:
        """Whether the package it needs is installed."""
        return not self.package or find_spec(self.package) is not None


_GYM: Final = f"{PREFIX}NAME"
_OWN: Final = "FILE.py:FUNCTION"
_HOTPOT_DATA: Final = "rows with question, answer, context, supporting_facts"
KINDS: Final = (
    *(TaskKind(task.name, task.description) for task in TASKS.values()),
    TaskKind(
        "gsm8k",
        Gsm8k.description,
        "rows with question and answer ('... #### 42')",
        "openai/gsm8k:main",
        "math_verify",
        "math",
    ),
    TaskKind(
        "math",
        MathProblems.description,
        "rows with problem and answer, or solution with \\boxed{}",
        "train.jsonl",
        "math_verify",
        "math",
    ),
    *(
        TaskKind(name, HotpotQA(name).description, _HOTPOT_DATA, "hotpotqa/hotpot_qa:distractor")
        for name in ("hotpotqa", "hotpotqa-f1")
    ),
    TaskKind(
        HotpotSearch.name,
        HotpotSearch().description,
        _HOTPOT_DATA,
        "hotpotqa/hotpot_qa:distractor",
        "bm25s",
        "search",
    ),
    TaskKind(
        _GYM,
        "Generated problems of any reasoning-gym data set.",
        "its settings, if any",
        "seed=1,size=1000",
        "reasoning_gym",
        "reasoning-gym",
    ),
    TaskKind(
        _OWN,
        "Your own reward over your prompts (or MODULE:FUNCTION).",
        "rows with prompt and the fields your function names",
        "prompts.jsonl",
    ),
)
_BY_NAME: Final = {kind.name: kind for kind in KINDS}


def kind_of(name: str) -> TaskKind:
    """The kind of task that a name stands for.

    Raises UserError if there is none; the message lists those there are.
    """
    if name.startswith(PREFIX):
        return _BY_NAME[_GYM]
    if ":" in name and name not in _BY_NAME:
        return _BY_NAME[_OWN]
    if name in _BY_NAME and name not in (_GYM, _OWN):
        return _BY_NAME[name]
    raise unknown_name("task", name, _BY_NAME)


def names_code(name: str) -> bool:
    """Whether a task is a function of the user's own, which is executed."""
    return kind_of(name).name == _OWN


def check_task(name: str, data: str | None, eval_data: str | None, eval_fraction: float) -> None:
    """Check what can be checked of a task's settings without reading data.

    Raises UserError if the name is unknown, data are missing or not taken, or a package is not
    installed.
    """
    kind = kind_of(name)
    gym = kind.name == _GYM
    if not kind.data and data is not None:
        raise UserError(f"task {name} takes no data, got {data!r}")
    if kind.data and not gym and data is None:
        raise UserError(f"task {name} needs data: {kind.data}, e.g. --data {kind.example}")
    if eval_data is not None and (gym or not kind.data):
        raise UserError(f"task {name} takes no eval_data: it draws its own held-out problems")
    if not 0.0 <= eval_fraction < 1.0:
        raise UserError(f"eval_fraction must be in [0, 1), got {eval_fraction}")
    if kind.package:
        require(kind.package, kind.extra, f"task {name}")


def get_task(
    name: str,
    data: str | None = None,
    *,
    eval_data: str | None = None,
    eval_fraction: float = 0.05,
    context_words: int = 800,
) -> Task:
    """Make a task by its name; one made before from unchanged files is returned again.

    Embedded tasks have the settings the embedded base policy was pre-trained on. Raises
    UserError on an unknown name, missing data, a package that is not installed, or data that cannot
    be used.

    Parameters
    ----------
    name : str
        A key of `TASKS`, ``gsm8k``, ``math``, ``hotpotqa``, ``hotpotqa-f1``, ``hotpotqa-search``,
        ``reasoning-gym:NAME``, ``module:function`` or ``path/file.py:function``.
    data : str, optional
        File, folder or hub name; settings of a reasoning-gym data set.
    eval_data : str, optional
        Held-out problems, in the form of ``data``.
    eval_fraction : float
        Share of ``data`` held out where there is no ``eval_data``.
    context_words : int
        hotpotqa: most words of paragraphs in a prompt.
    """
    if name in TASKS and (data, eval_data) == (None, None):
        return TASKS[name]
    check_task(name, data, eval_data, eval_fraction)
    files = (name.rpartition(":")[0], data, eval_data)
    stamps = tuple(_stamp(file) for file in files if file is not None)
    return _made(name, data, eval_data, eval_fraction, context_words, stamps)


def _stamp(file: str) -> tuple[int, int] | None:
    """Time and size of a file; None for what is no file."""
    path = Path(file)
    if not file or len(file) > 1000 or not path.is_file():
        return None
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


@lru_cache(maxsize=8)
def _made(
    name: str,
    data: str | None,
    eval_data: str | None,
    eval_fraction: float,
    context_words: int,
    stamps: tuple[tuple[int, int] | None, ...],
) -> FileTask | ReasoningGym:
    if name.startswith(PREFIX):
        return ReasoningGym(name.removeprefix(PREFIX), parse_settings(data), eval_fraction)
    assert data is not None
    task = load_file_task(_format(name, context_words), data, eval_data, eval_fraction)
    if isinstance(task.form, OwnReward):
        task.reward(task.train[0], "")  # a mistake in it shows now, not after the first rollouts
    return task


def _format(name: str, context_words: int) -> Format:
    if name == "gsm8k":
        return Gsm8k()
    if name == "math":
        return MathProblems()
    if name in ("hotpotqa", "hotpotqa-f1"):
        return HotpotQA(name, context_words)
    if name == HotpotSearch.name:
        return HotpotSearch()
    return OwnReward(name)
