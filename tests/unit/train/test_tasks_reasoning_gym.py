"""reasoning-gym by name: its own problems and scorers, the same ones every time."""

import re

import numpy as np
import pytest

from wapo_analysis.errors import UserError
from wapo_analysis.train.tasks import Problem, get_task, judge
from wapo_analysis.train.tasks.data_files import is_held_out
from wapo_analysis.train.tasks.generated import (
    ReasoningGym,
    data_set_names,
    parse_settings,
    stated_answer,
)

gym = pytest.importorskip("reasoning_gym", reason="needs the extra [reasoning-gym]")


@pytest.fixture(scope="module")
def sums() -> ReasoningGym:
    return ReasoningGym("chain_sum", {"seed": 5, "size": 400, "max_terms": 3}, 0.2)


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        (None, {}),
        ("", {}),
        ("seed=1,size=1000", {"seed": 1, "size": 1000}),
        (
            " seed = 1 , p=0.5,flag=true,name=abc",
            {"seed": 1, "p": 0.5, "flag": True, "name": "abc"},
        ),
        ('{"seed": 1, "sizes": [1, 2]}', {"seed": 1, "sizes": [1, 2]}),
    ],
)
def test_settings(text: str | None, settings: dict[str, object]) -> None:
    assert parse_settings(text) == settings


@pytest.mark.parametrize(
    ("text", "message"),
    [("seed", "got 'seed'"), ("a=1,,b=2", "got ''"), ("=3", "got ''"), ('{"a": 1', "JSON object")],
)
def test_settings_of_no_form(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_settings(text)


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("<answer>5</answer>", "5"),
        ("<answer>1</answer> no <answer> 2\n</answer>.", "2"),
        ("<answer>1</answer> <answer>2", "1"),
        ("<answer></answer>", None),
        ("5</answer>", None),
        ("5", None),
    ],
)
def test_stated_answer(completion: str, answer: str | None) -> None:
    assert stated_answer(completion) == answer


def test_problems_are_the_data_set_s_own(sums: ReasoningGym) -> None:
    data = gym.create_dataset("chain_sum", seed=5, size=400, max_terms=3)
    drawn = sums.problems(np.random.default_rng(0), 30)
    assert len({p.prompt for p in drawn}) > 20
    for problem in drawn:
        entry = data[problem.extra["index"]]
        assert problem.prompt.startswith(entry["question"] + "\n\n")
        assert problem.answer == entry["answer"]
        assert not is_held_out(problem.prompt, 0.2)
        for said in (entry["answer"], "7", f"about {entry['answer']}"):
            expected = data.score_answer(said, entry)
            assert sums.reward(problem, f"so <answer>{said}</answer>") == expected
        assert sums.reward(problem, sums.solution(problem) or "") == 1.0
        assert sums.reward(problem, entry["answer"]) == 0.0
    assert sums.problems(np.random.default_rng(0), 30) == drawn
    assert sums.problems(np.random.default_rng(1), 30) != drawn


def test_held_out_entries_are_never_trained_on(sums: ReasoningGym) -> None:
    held = sums.held_out_problems(20)
    assert held == sums.held_out_problems(20)
    assert len({p.prompt for p in held}) == 20
    trained = {p.prompt for p in sums.problems(np.random.default_rng(3), 300)}
    assert trained.isdisjoint(p.prompt for p in held)
    assert sums.held_out_problems(0) == []
    assert 40 < len(sums.held_out_problems(1000)) < 120


def test_the_record_names_version_and_settings(sums: ReasoningGym) -> None:
    record = sums.data_record()
    assert record["config"] == {"seed": 5, "size": 400, "max_terms": 3}
    assert re.fullmatch(r"[0-9.]+", record["version"])
    other = ReasoningGym("chain_sum", {"seed": 6, "size": 400, "max_terms": 3})
    assert other.data_record()["sha256"] != record["sha256"]
    assert ReasoningGym("chain_sum", {}).config == {"seed": 0, "size": 10_000}


def test_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError,
        match=r"^unknown reasoning-gym data set 'chainsum' of 1\d\d; close to it: chain_sum",
    ):
        get_task("reasoning-gym:chainsum")
    with pytest.raises(UserError, match="unknown reasoning-gym data set 'zzz'.*wapo tasks"):
        get_task("reasoning-gym:zzz")
    with pytest.raises(UserError, match="unknown setting 'terms'; allowed: min_terms, max_terms"):
        get_task("reasoning-gym:chain_sum", "terms=3")
    with pytest.raises(UserError, match="^task reasoning-gym:chain_sum: AssertionError"):
        get_task("reasoning-gym:chain_sum", "min_terms=9,max_terms=2")
    with pytest.raises(UserError, match="no entry is held out"):
        ReasoningGym("chain_sum", {"size": 5}, 0.0).held_out_problems(1)
    with pytest.raises(UserError, match="no entry to train on"):
        ReasoningGym("chain_sum", {"size": 2}, 0.999).problems(np.random.default_rng(0), 1)
    with pytest.raises(UserError, match="without its entry's index"):
        get_task("reasoning-gym:chain_sum").reward(Problem("1 + 1", "2"), "<answer>2</answer>")
    monkeypatch.setattr(judge, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs reasoning-gym: pip .*\[reasoning-gym\]'$"):
        get_task("reasoning-gym:leg_counting")


def test_a_scorer_that_fails_gives_nothing(sums: ReasoningGym) -> None:
    life = ReasoningGym("game_of_life", {"size": 3})
    (problem,) = life.problems(np.random.default_rng(0), 1)
    assert life.reward(problem, "<answer>{}</answer>") == 0.0  # raises KeyError in the scorer
    assert life.judge.failures == 1
    assert life.reward(problem, life.solution(problem) or "") == 1.0


def test_answers_that_only_a_scorer_knows() -> None:
    task = ReasoningGym("rubiks_cube", {"size": 20})
    (problem,) = task.problems(np.random.default_rng(0), 1)
    assert (problem.answer, task.solution(problem)) == ("", None)
    assert 0.0 <= task.reward(problem, "<answer>U R</answer>") < 1.0


@pytest.mark.slow
def test_every_data_set_makes_and_scores_its_problems() -> None:
    names = [
        name for name in data_set_names() if name != "composite"
    ]  # made of others, by settings
    assert len(names) > 100
    for name in names:
        task = ReasoningGym(name, {"size": 50})
        for problem in task.problems(np.random.default_rng(0), 3):
            solution = task.solution(problem)
            if solution is not None:
                assert task.reward(problem, solution) == 1.0, name
            for text in ("", "x", "[", "1/0", "é" * 40, "{}"):
                assert 0.0 <= task.reward(problem, f"<answer>{text}</answer>") <= 1.0, name
