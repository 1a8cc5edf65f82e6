"""A reward of the user's own: what it is given, and every way in which it can be wrong."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from wapo_analysis.cli import run
from wapo_analysis.errors import UserError
from wapo_analysis.store import open_run
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.tasks import get_task
from wapo_analysis.train.tasks.base import FileTask

CODE = '''
"""Rewards of a user."""
import numpy as np
import torch

LIMIT = 3
seen = []

def last_field(completion, answer):
    """The last field is the sum.

    More text.
    """
    return completion.split(";")[-1] == answer

def everything(prompt, completion, problem, answer, unit="m", **rest):
    seen.append((prompt, completion, problem, answer, unit, rest))
    return 1

def needs(completion, tests):
    return len(tests) / 10

def no_answer(completion): return 0.5
def numpy_number(completion): return np.float32(0.5)
def tensor(completion): return torch.tensor(0.25)
def text(completion): return "1"
def nothing(completion): return None
def nan(completion): return float("nan")
def large(completion): return 1.5
def negative(completion): return -0.1
def failing(completion, answer):
    table = {}
    return table[completion]
def leaving(completion): raise SystemExit(3)
async def later(completion): return 1.0
def late(completion):
    if completion: raise ValueError("two\\nlines")
    return 0.0
def positional(completion, /): return 1.0
def without(answer): return 1.0
'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CODE)
    rows = [{"prompt": f"{n}+1=", "answer": str(n + 1), "tests": [n], "k": n} for n in range(9)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def task_of(function: str, data: str = "p.jsonl") -> FileTask:
    task = get_task(f"mine.py:{function}", data)
    assert isinstance(task, FileTask)
    return task


def test_a_function_is_given_what_it_names(here: Path) -> None:
    task = task_of("last_field")
    (problem,) = task.problems(np.random.default_rng(0), 1)
    assert task.reward(problem, f"0;{problem.answer}") == 1.0
    assert task.reward(problem, "0;x") == 0.0
    assert task.description == "The last field is the sum."
    whole = task_of("everything")
    problem = whole.train[0]
    assert whole.reward(problem, "text") == 1.0
    module = sys.modules[whole.form.function.__module__]  # type: ignore[attr-defined]
    prompt, completion, given, answer, unit, rest = module.seen[-1]
    assert (prompt, completion, given, unit) == (problem.prompt, "text", problem, "m")
    assert answer == problem.answer
    assert rest == {"tests": problem.extra["tests"], "k": problem.extra["k"]}


def test_parameters_decide_which_fields_a_row_must_have(here: Path) -> None:
    rows = [{"prompt": f"p{n}", "tests": [n]} for n in range(30)]
    (here / "q.jsonl").write_text("\n".join(map(json.dumps, [*rows, {"prompt": "p"}])))
    assert task_of("needs", "q.jsonl").reports[0].skipped == ("line 31: no 'tests'",)
    assert task_of("no_answer", "q.jsonl").reports[0].skipped == ()
    with pytest.raises(UserError, match=r"31 of 31 rows .* line 1: no 'answer'"):
        task_of("last_field", "q.jsonl")
    (here / "e.jsonl").write_text(json.dumps({"prompt": "p", "answer": ""}))
    with pytest.raises(UserError, match="'answer' is empty"):
        task_of("last_field", "e.jsonl")


@pytest.mark.parametrize(
    ("function", "reward"), [("numpy_number", 0.5), ("tensor", 0.25), ("no_answer", 0.5)]
)
def test_numbers_of_any_kind_are_rewards(here: Path, function: str, reward: float) -> None:
    task = task_of(function)
    assert task.reward(task.train[0], "x") == reward


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("text", r"reward mine.py:text, line \d: must return a number in \[0, 1\], got str"),
        ("nothing", "got NoneType"),
        ("nan", "got nan"),
        ("large", "got 1.5"),
        ("negative", "got -0.1"),
        ("failing", r"reward mine.py:failing, line \d: KeyError: '' \(mine.py, line 33\)$"),
        ("leaving", "SystemExit: 3"),
        ("positional", "parameter 'completion' cannot be given by name"),
        ("without", "must have a parameter 'completion'"),
        ("missing", "'missing'; allowed: last_field, everything, needs"),
        ("LIMIT", "unknown function in .*: 'LIMIT'"),
    ],
)
def test_a_wrong_function_is_told_before_training(here: Path, function: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_of(function)


@pytest.mark.filterwarnings("ignore:coroutine")
def test_a_coroutine_is_no_number(here: Path) -> None:
    with pytest.raises(UserError, match="got coroutine"):
        task_of("later")


def test_a_failure_on_some_text_is_one_line_with_the_row(here: Path) -> None:
    task = task_of("late")
    problem = task.train[0]
    with pytest.raises(UserError) as caught:
        task.reward(problem, "x")
    assert str(caught.value).startswith(
        f"reward mine.py:late, {problem.source}: ValueError: two lines (mine.py, line "
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nowhere.py:f", "no reward file at nowhere.py"),
        ("nowhere.deep:f", "own reward nowhere.deep:f: no module 'nowhere.deep'"),
        ("broken.py:f", r"own reward broken.py:f cannot be loaded: SyntaxError: .*line 1"),
        ("raising.py:f", r"cannot be loaded: ZeroDivisionError: .* \(raising.py, line 2\)"),
        ("lacking.py:f", "cannot be loaded: ModuleNotFoundError: No module named 'not_there'"),
        ("mine:", "must be module:function"),
        (":f", "must be module:function"),
    ],
)
def test_a_module_that_cannot_be_loaded(here: Path, spec: str, message: str) -> None:
    (here / "broken.py").write_text("def f(:\n")
    (here / "raising.py").write_text("\nx = 1 / 0\n")
    (here / "lacking.py").write_text("import not_there\n")
    with pytest.raises(UserError, match=message):
        get_task(spec, "p.jsonl")


def test_a_module_of_the_current_folder_and_a_changed_file(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (here / "own_rewards_module.py").write_text("def f(completion): return 1.0\n")
    path = list(sys.path)
    task = get_task("own_rewards_module:f", "p.jsonl")
    assert sys.path == path
    assert task.reward(task.held_out_problems(1)[0], "") == 1.0
    monkeypatch.delitem(sys.modules, "own_rewards_module")
    first = task_of("no_answer")
    (here / "mine.py").write_text("def no_answer(completion): return 0.125\n")
    again = task_of("no_answer")
    assert again.reward(again.train[0], "") == 0.125
    assert again.data_record()["reward_sha256"] != first.data_record()["reward_sha256"]


@pytest.fixture
def sums(here: Path, tiny_config: TrainConfig) -> TrainConfig:
    """Settings of a run on sums of six digits, as the base policy knows them, one row broken."""
    rng = np.random.default_rng(0)
    rows = []
    for digits in rng.integers(0, 10, size=(40, 6)).tolist():
        rows.append({"prompt": "+".join(map(str, digits)) + "=", "answer": str(sum(digits))})
    (here / "sums.jsonl").write_text("\n".join([*map(json.dumps, rows), "{"]))
    return replace(
        tiny_config, task="mine.py:last_field", data="sums.jsonl", max_new_tokens=20, steps=2
    )


def test_a_run_on_own_data_records_them_and_goes_on_with_them_alone(
    here: Path, sums: TrainConfig
) -> None:
    from wapo_analysis.train.loop import train

    train(sums, here / "run")
    run = open_run(here / "run")
    data = run.manifest["data"]
    assert (data["file"], data["rows"], data["used"]) == ("sums.jsonl", 41, 40)
    assert data["skipped"] == [
        "line 41: broken JSON (Expecting property name enclosed in double quotes)"
    ]
    assert data["train"] + data["held_out"] == 40
    rows = run.rollouts
    assert rows.reward.tolist() == [
        float(c.split(";")[-1] == a) for c, a in zip(rows.completion, rows.answer, strict=True)
    ]
    assert 0 < rows.reward.mean() < 1
    held = {p.prompt for p in sums.load_task().held_out_problems(100)}
    assert held.isdisjoint(rows.prompt)
    train(replace(sums, steps=3), here / "run", resume=True)
    assert open_run(here / "run").manifest["data"] == data
    whole = here / "whole"
    train(replace(sums, steps=3), whole)
    assert open_run(whole).rollouts.completion.equals(open_run(here / "run").rollouts.completion)
    with (here / "sums.jsonl").open("a") as stream:
        stream.write('\n{"prompt": "1+1+1+1+1+1=", "answer": "6"}')
    with pytest.raises(UserError, match="data of task mine.py:last_field changed since the run"):
        train(replace(sums, steps=4), here / "run", resume=True)


def test_the_command_says_once_what_was_skipped(
    here: Path,
    sums: TrainConfig,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def wapo(*arguments: Any) -> tuple[int, str]:
        return run([str(argument) for argument in arguments]), capfd.readouterr().err

    small = ("--steps", 1, "--prompts", 2, "--rollouts", 2, "--minibatches", 1, "--threads", 1)
    own = ("--task", "mine.py:last_field", "--data", "sums.jsonl", "--max-new-tokens", 20)
    code, told = wapo("train", *own, *small, "--out", "run")
    assert code == 0, told
    said = f"{told}{caplog.text}"
    assert said.count("1 of 41 rows of sums.jsonl skipped: line 41: broken JSON") == 1
    wrong = ("--task", "mine.py:nan", "--data", "sums.jsonl", *small, "--out", "x")
    code, told = wapo("train", *wrong)
    assert code == 2
    assert told.splitlines()[-1].startswith("wapo: reward mine.py:nan, line 1: must return")
    assert not (here / "x").exists()
