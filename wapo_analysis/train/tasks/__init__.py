"""The two embedded tasks: problems without end, exact rewards, no download.

``chain-sum`` is arithmetic, ``two-hop`` is question answering over facts in the prompt. In both a
completion writes down its intermediate results and ends with the answer, and only the answer is
judged. Rewards are pure functions of the problem and the text, so that a stored run can be graded
again.

Demonstrations are what the embedded base policy was pre-trained on. They are wrong at a stated rate
on purpose: a policy that imitates them is right about half the time and has real entropy, which is
what reinforcement learning needs to start from.
"""

from typing import Final

from wapo_analysis.errors import unknown_name
from wapo_analysis.train.tasks.base import EmbeddedTask, Problem, Task
from wapo_analysis.train.tasks.chain_sum import ChainSum
from wapo_analysis.train.tasks.two_hop import TwoHop

__all__ = ["TASKS", "ChainSum", "EmbeddedTask", "Problem", "Task", "TwoHop", "get_task"]

TASKS: Final[dict[str, EmbeddedTask]] = {task.name: task for task in (ChainSum(), TwoHop())}


def get_task(name: str) -> EmbeddedTask:
    """Look an embedded task up by its name.

    Parameters
    ----------
    name : str
        A key of `TASKS`.

    Returns
    -------
    EmbeddedTask
        The task with the settings the embedded base policy was pre-trained on.

    Raises
    ------
    UserError
        If there is no such task; the message lists those there are.
    """
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]
