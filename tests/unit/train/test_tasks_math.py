"""GSM8K and MATH form: which answer counts, what equal means, and a judge that nothing stops."""

import json
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wapo_analysis.errors import UserError
from wapo_analysis.train.tasks import Problem, get_task, judge
from wapo_analysis.train.tasks.base import BadRow
from wapo_analysis.train.tasks.formats import (
    MAX_BOX,
    Gsm8k,
    MathProblems,
    after_mark,
    last_box,
)
from wapo_analysis.train.tasks.judge import Judge

pytest.importorskip("math_verify", reason="needs the extra [math]")

DATA = Path(__file__).parents[2] / "data" / "tasks"


@pytest.fixture(scope="module")
def gsm8k() -> Gsm8k:
    return Gsm8k()


@pytest.fixture(scope="module")
def mathematics() -> MathProblems:
    return MathProblems()


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{ x }", "x"),
        (r"\boxed 7$ is it", "7"),
        (r"\fbox{3}", "3"),
        (r"\boxed{1} and \boxed{2", None),
        (r"\boxed", None),
        (r"\boxed{}", ""),
        (r"\boxedness{3}", None),
        ("no box", None),
    ],
)
def test_last_box(text: str, box: str | None) -> None:
    assert last_box(text) == box


@pytest.mark.parametrize(
    ("text", "found"),
    [("a\n#### 5", "5"), ("#### 1\n#### 2\nmore", "2"), ("####", None), ("5", None)],
)
def test_after_mark(text: str, found: str | None) -> None:
    assert after_mark(text) == found


@pytest.mark.parametrize(
    ("answer", "completion", "reward"),
    [
        ("1080", r"so \boxed{1,080}", 1),
        ("1080", r"so \boxed{1080.}", 1),
        ("1080", r"so \boxed{\$1080}", 1),
        ("1080", r"so \boxed{1080.00}", 1),
        ("1080", r"so \boxed{1080\text{ shells}}", 1),
        ("1080", "1000 + 80\n#### 1080", 1),
        ("1080", "#### 1,080.", 1),
        ("1080", r"\boxed{1079}" + "\n#### 1080", 0),
        ("1080", r"\boxed{1080} or \boxed{1079}", 0),
        ("1080", r"\boxed{1080}, wait \boxed{", 0),
        ("1080", "#### 1080\n" + r"\boxed{1080", 0),
        ("1080", r"\boxed{1079, 1080}", 0),
        ("1080", "1080", 0),
        ("1080", "The answer is 1080.", 0),
        ("1080", "", 0),
        ("1080", r"\boxed{}", 0),
        ("-3", r"\boxed{3}", 0),
        ("0.5", r"\boxed{\frac{1}{2}}", 1),
    ],
)
def test_word_problem_rewards(gsm8k: Gsm8k, answer: str, completion: str, reward: float) -> None:
    assert gsm8k.reward(Problem("?", answer), completion) == reward


@pytest.mark.parametrize(
    ("answer", "box", "reward"),
    [
        (r"\frac{3}{4}", "0.75", 1),
        (r"\frac{3}{4}", "3/4", 1),
        ("x^2+2x+1", "(x+1)^2", 1),
        ("x^2+2x+1", "(x-1)^2", 0),
        (r"2\sqrt{2}", r"\sqrt{8}", 1),
        (r"2\sqrt{2}", "2.83", 0),
        ("(1,3)", "(1, 3)", 1),
        ("(1,3)", "[1,3]", 0),
        ("3,-3", r"\{-3, 3\}", 1),
        ("3,-3", "3", 0),
        (r"\text{no}", "no", 1),
        (r"\text{(B)}", "B", 1),
        (r"90^\circ", "90", 1),
        ("5", "x = 5", 1),
        ("5", "y", 0),
    ],
)
def test_equal_as_mathematics(
    mathematics: MathProblems, answer: str, box: str, reward: float
) -> None:
    completion = f"It is $\\boxed{{{box}}}$."
    assert mathematics.reward(Problem("?", answer), completion) == reward
    assert mathematics.reward(Problem("?", answer), f"It is ${box}$.") == 0.0


LATEX = st.text(alphabet=r"\{}()[]^_$%&=+-*/!.,0123456789abxyzfrcsqtpinem ", max_size=40)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.text(max_size=60), LATEX, LATEX.map(lambda text: f"\\boxed{{{text}}}")))
def test_any_text_is_graded_the_same_twice(completion: str) -> None:
    form = FUZZED
    first = form.reward(Problem("?", "7"), completion)
    assert first in (0.0, 1.0)
    form.judge._asked.cache_clear()
    assert form.reward(Problem("?", "7"), completion) == first


FUZZED = MathProblems()


def test_what_never_ends_is_wrong_and_grading_goes_on(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(judge.Judge.ask, "__defaults__", (1,))  # one second instead of five
    monkeypatch.setattr(judge, "_WAITING", 100)  # so that it is not the clock that ends it
    form = MathProblems()
    begun = time.monotonic()
    assert form.reward(Problem("?", "5"), r"\boxed{2^{10^{10}}}") == 0.0
    assert form.reward(Problem("?", "5"), r"\boxed{9^{9^{9^{9}}}}") == 0.0
    assert time.monotonic() - begun < 60
    assert form.reward(Problem("?", "5"), r"\boxed{10/2}") == 1.0
    assert form.judge.judge.failures == 2
    assert len(caplog.records) == 1
    assert "task math: a completion that cannot be graded earns 0" in caplog.text


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="needs SIGSTOP")
def test_a_process_that_waits_without_computing_is_ended_by_the_clock(
    mathematics: MathProblems, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(judge, "_WAITING", 1)
    inner = mathematics.judge.judge
    inner.start()
    assert inner._process is not None
    os.kill(inner._process.pid, signal.SIGSTOP)
    assert "ended without a reply" in inner.ask(1, do="math_equal", answer="1", text="1")["error"]
    monkeypatch.setattr(judge, "_WAITING", 12)
    assert inner.score(do="math_equal", answer="1", text="2/2") == 1.0


def test_a_killed_process_is_replaced(mathematics: MathProblems) -> None:
    inner = mathematics.judge.judge
    inner.start()
    assert inner._process is not None
    inner._process.kill()
    inner._process.wait()
    mathematics.judge._asked.cache_clear()
    assert mathematics.reward(Problem("?", "12"), r"\boxed{24/2}") == 1.0


def test_grading_from_other_threads_and_from_a_fork(mathematics: MathProblems) -> None:
    mathematics.judge._asked.cache_clear()
    graded: list[float] = []

    def grade(n: int) -> None:
        graded.append(mathematics.reward(Problem("?", str(n)), f"\\boxed{{{2 * n}/2}}"))

    threads = [threading.Thread(target=grade, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert graded == [1.0] * 6


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_has_a_process_of_its_own(mathematics: MathProblems) -> None:
    mine = mathematics.judge.judge
    mine.start()
    assert mine._process is not None
    before = mine._process.pid
    child = os.fork()
    if child == 0:
        code = 1
        try:
            right = mathematics.reward(Problem("?", "31"), r"\boxed{62/2}") == 1.0
            assert mine._process is not None
            code = 0 if right and mine._process.pid != before else 2
            mine._process.kill()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert mathematics.reward(Problem("?", "41"), r"\boxed{82/2}") == 1.0
    assert mine._process.pid == before


def test_an_interrupted_question_does_not_answer_the_next(
    mathematics: MathProblems, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = mathematics.judge.judge
    inner.start()
    assert inner._process is not None
    stdout = inner._process.stdout
    assert stdout is not None

    class Interrupted:
        def readline(self) -> str:
            raise KeyboardInterrupt

        def close(self) -> None:
            stdout.close()

    monkeypatch.setattr(inner._process, "stdout", Interrupted())
    with pytest.raises(KeyboardInterrupt):
        inner.ask(do="math_equal", answer="1", text="1")
    assert inner.score(do="math_equal", answer="1", text="2") == 0.0
    assert inner.score(do="math_equal", answer="1", text="2/2") == 1.0


def test_a_judge_that_cannot_start_says_so() -> None:
    with pytest.raises(UserError, match="^task x: KeyError: 'nonsense'$"):
        Judge("task x", {"do": "nonsense"}).start()


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judge, "find_spec", lambda name: None)
    with pytest.raises(
        UserError, match=r"^task gsm8k needs math-verify: pip install 'wapo-analysis\[math\]'$"
    ):
        get_task("gsm8k", "x.jsonl")


def test_a_very_long_box_is_wrong_without_asking(mathematics: MathProblems) -> None:
    asked = mathematics.judge._asked.cache_info().misses
    assert mathematics.reward(Problem("?", "1"), f"\\boxed{{{'1' * (MAX_BOX + 1)}}}") == 0.0
    assert mathematics.judge._asked.cache_info().misses == asked


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("3 + 4 = 7", "no '#### answer'"),
        ("7\n####", "nothing after '####'"),
        ("7\n#### $", "nothing after '####'"),
        ("7\n#### seven", "'seven' after '####' is not a number"),
        ("", "'answer' is empty"),
        (None, "no 'answer'"),
        (7, "'answer' is int, not text"),
    ],
)
def test_broken_word_problems(gsm8k: Gsm8k, answer: Any, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        gsm8k.parse({"question": "?", "answer": answer})
    assert str(caught.value) == reason


@pytest.mark.parametrize(
    ("answer", "number"),
    [("#### 1,080", "1080"), ("#### -3", "-3"), ("#### $5", "5"), ("x\n#### 2.50 ", "2.50")],
)
def test_the_number_of_a_word_problem(gsm8k: Gsm8k, answer: str, number: str) -> None:
    problem = gsm8k.parse({"question": "How many?", "answer": answer})
    assert problem.answer == number
    assert problem.prompt.startswith("How many?\n\n")
    assert "\\boxed{}" in problem.prompt


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"answer": r"\frac{1}{2}"}, r"\frac{1}{2}"),
        ({"answer": "$12$."}, "12"),
        ({"answer": 12}, "12"),
        ({"answer": 0.00001}, "0.00001"),
        ({"answer": r"\boxed{3}", "solution": r"\boxed{4}"}, "3"),
        ({"answer": None, "solution": r"First \boxed{3}, then \boxed{4}."}, "4"),
    ],
)
def test_the_answer_of_a_problem(
    mathematics: MathProblems, row: dict[str, Any], answer: str
) -> None:
    assert mathematics.parse({"problem": "?", **row}).answer == answer


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "neither 'answer' nor 'solution'"),
        ({"solution": "It is 4."}, "no answer in the \\boxed{} of 'solution'"),
        ({"solution": r"\boxed{4"}, "no answer in the \\boxed{} of 'solution'"),
        ({"solution": r"\boxed{}"}, "no answer in the \\boxed{} of 'solution'"),
        ({"answer": "", "solution": r"\boxed{4}"}, "'answer' is empty"),
        ({"answer": math.nan}, "'answer' is nan"),
        ({"answer": True}, "'answer' is bool, not text"),
        ({"answer": ["4"]}, "'answer' is list, not text"),
        ({"problem": None, "answer": "4"}, "no 'problem'"),
    ],
)
def test_broken_problems(mathematics: MathProblems, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        mathematics.parse({"problem": "?", **row})
    assert str(caught.value) == reason


@pytest.mark.parametrize("name", ["gsm8k", "math"])
def test_the_sample_files(name: str) -> None:
    task = get_task(name, str(DATA / f"{name}.jsonl"))
    problems = [*task.train, *task.held_out]  # type: ignore[attr-defined]
    lines = (DATA / f"{name}.jsonl").read_text().splitlines()
    assert len(problems) == {"gsm8k": 97, "math": 10}[name]
    for problem in problems:
        row = json.loads(lines[int(problem.source.removeprefix("line ")) - 1])
        assert problem.prompt.startswith((row.get("question") or row["problem"]).strip())
        assert task.reward(problem, f"\\boxed{{{problem.answer}}}") == 1.0
        assert task.reward(problem, "\\boxed{-123457}") == 0.0
    for problem in problems[:10]:
        # The reward above compares equal texts itself; here the judge is really asked.
        assert task.form.judge._ask(problem.answer, problem.answer) == 1.0  # type: ignore[attr-defined]
    skipped = task.data_record()["skipped"]
    expected = {"gsm8k": ["line 4", "line 41", "line 78"], "math": []}[name]
    assert [line.split(":")[0] for line in skipped] == expected
    assert task.data_record()["judge"].startswith("math-verify ")
