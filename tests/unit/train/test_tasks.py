"""The embedded tasks: answers by brute force, rewards on any text, error rates."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wapo_analysis.errors import UserError
from wapo_analysis.train.tasks import TASKS, ChainSum, Problem, Task, TwoHop, get_task

CHAIN = Problem("9+4+5+8+0+7=", "33")
HOPS = Problem("k3,am,bk,m7;a", "7")
ALL_TASKS = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def draw(task: Task, n: int, seed: int = 0) -> list[Problem]:
    return task.problems(np.random.default_rng(seed), n)


def solve_two_hop(prompt: str) -> list[str]:
    """Every digit two facts away from the question, by trying all pairs of facts."""
    facts, asked = prompt.split(";")
    pairs = facts.split(",")
    return [
        second[1]
        for first in pairs
        for second in pairs
        if first[0] == asked and first[1] == second[0]
    ]


def test_chain_sum_answers_are_the_sum_of_the_digits() -> None:
    for problem in draw(TASKS["chain-sum"], 500):
        digits = [int(c) for c in problem.prompt if c.isdigit()]
        assert len(digits) == 6
        assert problem.prompt == "+".join(map(str, digits)) + "="
        assert problem.answer == str(sum(digits))


def test_two_hop_answers_are_the_only_digit_two_facts_away() -> None:
    for problem in draw(TASKS["two-hop"], 500):
        assert solve_two_hop(problem.prompt) == [problem.answer]


@pytest.mark.parametrize("chains", [2, 4, 10])
def test_two_hop_facts_leave_no_ambiguity(chains: int) -> None:
    for problem in draw(TwoHop(chains=chains), 100):
        facts, asked = problem.prompt.split(";")
        heads = [fact[0] for fact in facts.split(",")]
        targets = [fact[1] for fact in facts.split(",")]
        assert len(heads) == len(set(heads)) == 2 * chains
        assert len(set(targets)) == 2 * chains
        assert asked in heads
        assert asked not in targets  # a question starts a chain, never its middle


def test_facts_are_shuffled_and_the_answer_is_not_in_a_fixed_place() -> None:
    places = [p.prompt.index(p.answer) for p in draw(TASKS["two-hop"], 400)]
    counts = np.bincount(np.array(places) // 3, minlength=8)
    assert counts.min() > 20  # 50 expected at each of 8 places


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("13;18;26;26;33", 1.0),
        ("13;18;27;27;33", 1.0),  # wrong on the way, right at the end: an outcome reward
        ("13;18;26;26;34", 0.0),
        ("33", 0.0),  # right, but without the work
        ("13;18;26;26;26;33", 0.0),
        ("13;18;26;26;33;", 0.0),
        ("13;18;26;26;033", 0.0),
        ("13;18;;26;33", 0.0),
        ("13;-8;26;26;33", 0.0),
        ("13;18;26;26;33\n", 0.0),
        (" 13;18;26;26;33", 0.0),
        ("13;18;26;26;３３", 0.0),  # full-width digits, which int() would accept
        ("١٣;18;26;26;33", 0.0),
        ("", 0.0),
        (";;;;33", 0.0),
        ("a;b;c;d;33", 0.0),
        ("\U0001f600" * 9, 0.0),
        ("1" * 10_000 + ";1;1;1;33", 1.0),  # long numbers cost nothing and raise nothing
    ],
)
def test_chain_sum_reward(completion: str, reward: float) -> None:
    assert TASKS["chain-sum"].reward(CHAIN, completion) == reward


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("m7", 1.0),
        ("k7", 1.0),  # wrong bridge, right answer: an outcome reward
        ("m3", 0.0),
        ("7", 0.0),
        ("m77", 0.0),
        ("am7", 0.0),
        ("m7\n", 0.0),
        ("m７", 0.0),
        ("M7", 0.0),
        ("é7", 0.0),
        ("", 0.0),
    ],
)
def test_two_hop_reward(completion: str, reward: float) -> None:
    assert TASKS["two-hop"].reward(HOPS, completion) == reward


def test_exactly_one_final_answer_in_a_hundred_is_rewarded() -> None:
    for problem in draw(TASKS["chain-sum"], 20):
        rewarded = [n for n in range(100) if TASKS["chain-sum"].reward(problem, f"1;2;3;4;{n}")]
        assert rewarded == [int(problem.answer)]
    for problem in draw(TASKS["two-hop"], 20):
        rewarded = [n for n in range(10) if TASKS["two-hop"].reward(problem, f"x{n}")]
        assert rewarded == [int(problem.answer)]


@given(text=st.text() | st.text(alphabet="0123456789;am", max_size=16))
def test_reward_takes_any_text_and_pays_only_for_the_answer(text: str) -> None:
    for task, problem in ((TASKS["chain-sum"], CHAIN), (TASKS["two-hop"], HOPS)):
        reward = task.reward(problem, text)
        assert reward in (0.0, 1.0)
        assert reward == task.reward(problem, text)
        assert text.endswith(problem.answer) or reward == 0.0


@ALL_TASKS
def test_the_generator_decides_the_problems(task: Task) -> None:
    assert draw(task, 30, seed=5) == draw(task, 30, seed=5)
    assert draw(task, 30, seed=5) != draw(task, 30, seed=6)
    rng = np.random.default_rng(5)
    assert task.problems(rng, 10) + task.problems(rng, 20) == draw(task, 30, seed=5)
    assert task.problems(rng, 0) == []


@ALL_TASKS
def test_names_and_descriptions(task: Task) -> None:
    assert get_task(task.name) is task
    assert task.description.endswith(".")


def test_mistakes_are_named_with_what_is_allowed() -> None:
    with pytest.raises(UserError, match="unknown task 'sudoku'; allowed: chain-sum, two-hop"):
        get_task("sudoku")
    with pytest.raises(UserError, match="0 or more, got -1"):
        draw(TASKS["chain-sum"], -1)
    with pytest.raises(UserError, match="0 or more, got -1"):
        draw(TASKS["two-hop"], -1)
    with pytest.raises(UserError, match="at least 2 terms, got 1"):
        ChainSum(terms=1)
    with pytest.raises(UserError, match="2 to 10 chains, got 11"):
        TwoHop(chains=11)


def test_tasks_load_no_heavy_library() -> None:
    code = (
        "import sys, wapo_analysis.train.tasks\n"
        "assert not {'torch', 'transformers', 'matplotlib'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, timeout=60)
