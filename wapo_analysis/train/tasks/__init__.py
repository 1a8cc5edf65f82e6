"""Tasks: problems to draw and a verifiable reward.

Two are embedded, ``chain-sum`` (arithmetic) and ``two-hop`` (question answering over facts in the
prompt): problems without end, exact rewards, no download. In both a completion writes down its
intermediate results and ends with the answer, and only the answer is judged. Demonstrations are
what the embedded base policy was pre-trained on. They are wrong at a stated rate on purpose: a
policy that imitates them is right about half the time and has real entropy, which is what
reinforcement learning needs to start from.

The others read data: GSM8K, MATH and HotpotQA format, any data set of reasoning-gym, and a reward
function of the user's own; see docs/tasks.md. Rewards are functions of the problem and the text
alone, so that a stored run can be graded again.
"""

from wapo_analysis.train.tasks.base import EmbeddedTask, Problem, Task
from wapo_analysis.train.tasks.catalogue import KINDS, TASKS, TaskKind, check_task, get_task
from wapo_analysis.train.tasks.embedded import ChainSum, TwoHop

__all__ = [
    "KINDS",
    "TASKS",
    "ChainSum",
    "EmbeddedTask",
    "Problem",
    "Task",
    "TaskKind",
    "TwoHop",
    "check_task",
    "get_task",
]
