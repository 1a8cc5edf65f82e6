"""Demonstrations of the embedded tasks: right where they should be, wrong at the stated rate."""

import numpy as np
import pytest

from experiments.pretrain_base import ERROR_RATES, demonstrate
from wapo_analysis.train.tasks import TASKS, ChainSum, Problem, Task

CHAIN = Problem("9+4+5+8+0+7=", "33")
HOPS = Problem("k3,am,bk,m7;a", "7")
ALL_TASKS = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def draw(task: Task, n: int, seed: int = 0) -> list[Problem]:
    return task.problems(np.random.default_rng(seed), n)


@ALL_TASKS
def test_demonstrations_without_errors_are_right(task: Task) -> None:
    rng = np.random.default_rng(1)
    for problem in draw(task, 200):
        assert task.reward(problem, demonstrate(task.name, problem, rng, 0.0)) == 1.0


def test_demonstrations_without_errors_are_those_of_the_documentation() -> None:
    rng = np.random.default_rng(0)
    assert demonstrate("chain-sum", CHAIN, rng, 0.0) == "13;18;26;26;33"
    assert demonstrate("two-hop", HOPS, rng, 0.0) == "m7"


def test_chain_sum_errs_at_every_sum_when_told_to() -> None:
    rng = np.random.default_rng(0)
    for problem in draw(TASKS["chain-sum"], 200):
        digits = [int(c) for c in problem.prompt if c.isdigit()]
        sums = [int(s) for s in demonstrate("chain-sum", problem, rng, 1.0).split(";")]
        for before, digit, after in zip([digits[0], *sums], digits[1:], sums, strict=False):
            assert after != before + digit
        assert all(0 <= s <= 9 * count for count, s in enumerate(sums, start=2))


def test_chain_sum_errors_carry_on_and_come_at_the_stated_rate() -> None:
    rng = np.random.default_rng(0)
    slips, decisions = 0, 0
    for problem in draw(TASKS["chain-sum"], 2000):
        digits = [int(c) for c in problem.prompt if c.isdigit()]
        sums = [int(s) for s in demonstrate("chain-sum", problem, rng, 0.15).split(";")]
        steps = zip([digits[0], *sums], digits[1:], sums, strict=False)
        slips += sum(after != before + digit for before, digit, after in steps)
        decisions += len(sums)
    assert slips / decisions == pytest.approx(0.15, abs=0.015)  # 4 standard errors


def test_two_hop_errors_stay_plausible_and_come_at_the_stated_rate() -> None:
    rng = np.random.default_rng(0)
    wrong = np.zeros(2)
    problems = draw(TASKS["two-hop"], 4000)
    for problem in problems:
        facts, asked = problem.prompt.split(";")
        follow = {fact[0]: fact[1] for fact in facts.split(",")}
        bridge, answer = demonstrate("two-hop", problem, rng, 0.3)
        assert follow[bridge].isdigit()
        assert answer in follow.values()
        wrong += [bridge != follow[asked], answer != follow[bridge]]
    assert wrong / len(problems) == pytest.approx([0.3, 0.3], abs=0.03)  # 4 standard errors


@ALL_TASKS
def test_demonstrations_are_right_about_half_the_time(task: Task) -> None:
    rng = np.random.default_rng(2)
    rate = ERROR_RATES[task.name]
    problems = draw(task, 2000)
    rewards = [task.reward(p, demonstrate(task.name, p, rng, rate)) for p in problems]
    assert 0.4 < np.mean(rewards) < 0.55


@ALL_TASKS
@pytest.mark.parametrize("error_rate", [0.0, 0.5, 1.0])
def test_every_demonstration_fits_with_its_end(task: Task, error_rate: float) -> None:
    rng = np.random.default_rng(3)
    lengths = [len(demonstrate(task.name, p, rng, error_rate)) for p in draw(task, 500)]
    assert max(lengths) + 1 <= task.max_new_tokens


@pytest.mark.parametrize("terms", [2, 3, 12, 60])
def test_chain_sum_of_other_lengths(terms: int) -> None:
    task = ChainSum(terms=terms)
    rng = np.random.default_rng(0)
    for problem in draw(task, 50):
        assert task.reward(problem, demonstrate(task.name, problem, rng, 0.0)) == 1.0
        assert len(demonstrate(task.name, problem, rng, 1.0)) < task.max_new_tokens
