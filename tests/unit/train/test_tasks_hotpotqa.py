"""HotpotQA form: the standard comparison of answers, the rule for paragraphs, broken rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wapo_analysis.cli import run as wapo
from wapo_analysis.errors import UserError
from wapo_analysis.train.tasks import Problem, get_task
from wapo_analysis.train.tasks.base import BadRow, tools_of
from wapo_analysis.train.tasks.hotpotqa import (
    HotpotQA,
    HotpotSearch,
    exact_match,
    f1,
    normalize,
    stated_answer,
)

SAMPLE = str(Path(__file__).parents[2] / "data" / "tasks" / "hotpotqa.json")
ROW = {
    "question": "Where was the painter born?",
    "answer": "Alvora",
    "context": [
        ["Noise", ["one two three four."]],
        ["Painter", ["Ines was born in Alvora.", " She paints."]],
        ["More noise", ["five six."]],
        ["Alvora", ["Alvora is a town."]],
    ],
    "supporting_facts": [["Painter", 0], ["Alvora", 0]],
}


@pytest.mark.parametrize(
    ("answer", "found", "em", "score"),
    [
        ("The Beatles", "beatles", 1, 1),
        ("the Eiffel Tower", "Eiffel  tower.", 1, 1),
        ("U.S.", "US", 1, 1),
        ("Robert Oppenheimer", "J. Robert Oppenheimer", 0, 0.8),
        ("yes", "Yes!", 1, 1),
        ("yes", "yes it is", 0, 0),
        ("no", "no one", 0, 0),
        ("no one", "no", 0, 0),
        ("noanswer", "noanswer here", 0, 0),
        ("red red blue", "red blue blue", 0, 2 / 3),
        ("Paris", "", 0, 0),
        ("Paris", "London", 0, 0),
        ("1,000", "1000", 1, 1),
        ("a man", "the man", 1, 1),
        ("Anna", "na", 0, 0),
        ("well-known", "well known", 0, 0),
    ],
)
def test_the_standard_comparison(answer: str, found: str, em: float, score: float) -> None:
    assert exact_match(answer, found) == em
    assert f1(answer, found) == pytest.approx(score)


@given(st.text(), st.text())
def test_f1_is_a_symmetric_share_and_one_for_equal_answers(a: str, b: str) -> None:
    assert 0.0 <= f1(a, b) <= 1.0
    assert f1(a, b) == f1(b, a)
    assert f1(a, a) == (1.0 if normalize(a) else 0.0)
    assert exact_match(a, b) <= f1(a, b) or not normalize(a)
    assert normalize(normalize(a)) == normalize(a) or "İ" in a


@pytest.mark.parametrize(
    ("completion", "answer"),
    [
        ("I think so.\nAnswer: Paris", "Paris"),
        ("Answer: Rome\nNo.\nAnswer: Paris \nDone", "Paris"),
        ("**Answer:** Paris", "Paris"),
        ("answer: Paris", "Paris"),
        ("The answer: Paris", None),
        ("Paris", None),
        ("Answer:", ""),
        ("", None),
    ],
)
def test_the_stated_answer(completion: str, answer: str | None) -> None:
    assert stated_answer(completion) == answer


def test_rewards_by_name() -> None:
    problem = Problem("?", "Robert Oppenheimer")
    said = "He built it.\nAnswer: J. Robert Oppenheimer"
    assert HotpotQA("hotpotqa").reward(problem, said) == 0.0
    assert HotpotQA("hotpotqa-f1").reward(problem, said) == pytest.approx(0.8)
    assert HotpotQA("hotpotqa").reward(problem, "**Answer:** Robert Oppenheimer.") == 1.0
    assert HotpotQA("hotpotqa-f1").reward(problem, "Robert Oppenheimer") == 0.0


@given(st.text())
def test_any_completion_is_graded(completion: str) -> None:
    for name in ("hotpotqa", "hotpotqa-f1"):
        assert 0.0 <= HotpotQA(name).reward(Problem("?", "yes"), completion) <= 1.0


@pytest.mark.parametrize(
    ("words", "titles"),
    [
        (800, ["Noise", "Painter", "More noise", "Alvora"]),
        (22, ["Noise", "Painter", "More noise", "Alvora"]),
        (21, ["Noise", "Painter", "Alvora"]),
        (17, ["Painter", "More noise", "Alvora"]),
        (15, ["Painter", "Alvora"]),
        (13, ["Painter", "Alvora"]),
    ],
)
def test_supporting_paragraphs_come_first_and_the_file_decides_the_order(
    words: int, titles: list[str]
) -> None:
    prompt = HotpotQA(context_words=words).parse(ROW).prompt
    shown, _, rest = prompt.partition("\n\nQuestion: ")
    assert [p.splitlines()[0] for p in shown.split("\n\n")] == titles
    assert len(shown.split()) <= words
    assert rest.startswith("Where was the painter born?\n")
    assert "'Answer: '" in rest


def test_supporting_paragraphs_that_do_not_fit_make_a_bad_row() -> None:
    with pytest.raises(BadRow, match="supporting paragraphs have 13 words, limit 12"):
        HotpotQA(context_words=12).parse(ROW)
    with pytest.raises(BadRow, match="no paragraph within 2 words"):
        HotpotQA(context_words=2).parse({**ROW, "supporting_facts": None})
    with pytest.raises(UserError, match="context_words must be at least 1, got 0"):
        HotpotQA(context_words=0)


def test_columns_of_the_hub_give_the_same_problem() -> None:
    columns = {
        **ROW,
        "context": {
            "title": [title for title, _ in ROW["context"]],  # type: ignore[misc]
            "sentences": [sentences for _, sentences in ROW["context"]],  # type: ignore[misc]
        },
        "supporting_facts": {"title": ["Painter", "Alvora"], "sent_id": [0, 0]},
    }
    assert HotpotQA().parse(columns) == HotpotQA().parse(ROW)
    apart = {**ROW, "context": [["Painter", ["One.", "Two."]]], "supporting_facts": None}
    assert "One. Two." in HotpotQA().parse(apart).prompt


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"context": None}, "no 'context'"),
        ({"context": "text"}, "'context' is neither a list of pairs nor columns"),
        ({"context": [["Painter"]]}, "'context' is neither"),
        ({"context": [["Painter", "text"]]}, "not a list of [title, [sentences]]"),
        ({"context": [[["Painter"], ["text"]]]}, "not a list of [title, [sentences]]"),
        ({"context": {"title": ["a"], "sentences": []}}, "'context' is neither"),
        ({"context": [["Painter", [""]]]}, "'context' is empty"),
        ({"context": [["Painter", ["\ud800"]], ["Alvora", []]]}, "'context' is not valid Unicode"),
        ({"supporting_facts": [["Nowhere", 0]]}, "'Nowhere' is not in 'context'"),
        ({"supporting_facts": [[["Painter"], 0]]}, "'supporting_facts' is not a list"),
        ({"supporting_facts": "Painter"}, "'supporting_facts' is neither"),
        ({"answer": "The."}, "'answer' 'The.' is empty without articles"),
        ({"answer": None}, "no 'answer'"),
        ({"question": 3}, "'question' is int, not text"),
    ],
)
def test_broken_rows_say_what_is_wrong(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        HotpotQA().parse({**ROW, **change})
    assert reason in str(caught.value)


@pytest.fixture
def search() -> HotpotSearch:
    """Tools over the paragraphs of two rows."""
    pytest.importorskip("bm25s", reason="needs the extra [search]")
    form = HotpotSearch()
    form.parse(ROW)
    other = [["Harbour", ["Ships of Alvora anchor here, " + "far " * 30 + "out."]]]
    form.parse(
        {"question": "Which ships?", "answer": "none", "context": [*other, ROW["context"][1]]}
    )
    return form


def test_a_question_with_tools_shows_no_paragraph(search: HotpotSearch) -> None:
    problem = search.parse(ROW)
    assert problem.prompt.startswith("Question: Where was the painter born?\n")
    assert "Alvora" not in problem.prompt
    assert search.reward(problem, search.solution(problem)) == 1.0
    assert search.record() == {"paragraphs": 5}
    with pytest.raises(BadRow, match="'Nowhere' is not in 'context'"):
        search.parse({**ROW, "supporting_facts": [["Nowhere", 0]]})


def test_search_finds_what_read_shows(search: HotpotSearch) -> None:
    found = search.search("where was the painter Ines born").splitlines()
    assert found[0] == "Painter: Ines was born in Alvora. She paints."
    assert {line.partition(":")[0] for line in search.search("Alvora").splitlines()} == {
        "Painter", "Alvora", "Harbour",
    }  # fmt: skip
    (harbour,) = (line for line in search.search("ships").splitlines())
    assert harbour.endswith(" ...")
    assert search.read("Harbour").endswith("far out.")
    for nothing in ("", "the", "zzz", 7):
        assert search.search(nothing) == "nothing found"  # type: ignore[arg-type]
    assert search.read("Nowhere") == "no paragraph has this title"


def test_tools_have_the_descriptions_that_chat_templates_ask_for(search: HotpotSearch) -> None:
    from transformers.utils import get_json_schema

    for tool, argument in zip(search.tools(), ("query", "title"), strict=True):
        told = get_json_schema(tool)["function"]
        assert told["name"] == tool.__name__
        assert told["parameters"]["required"] == [argument]
    assert tools_of(get_task("hotpotqa", SAMPLE)) == tools_of(get_task("chain-sum")) == []
    assert len(tools_of(get_task("hotpotqa-search", SAMPLE))) == 2


def test_the_built_in_trainer_calls_no_tools(
    search: HotpotSearch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    arguments = ["--task", "hotpotqa-search", "--data", SAMPLE, "--steps", "1", "--out", str(out)]
    assert wapo(["train", *arguments]) == 2
    expected = "wapo: task hotpotqa-search needs tools, which only --engine trl calls\n"
    assert capfd.readouterr().err.endswith(expected)
    assert not out.exists()


def test_the_sample_file() -> None:
    task = get_task("hotpotqa", SAMPLE)
    rows = {row["question"]: row for row in json.loads(Path(SAMPLE).read_text())}
    problems = [*task.train, *task.held_out]  # type: ignore[attr-defined]
    assert len(problems) == len(rows) == 24
    for problem in problems:
        question = problem.prompt.partition("Question: ")[2].splitlines()[0]
        assert rows[question]["answer"] == problem.answer
        assert task.reward(problem, task.solution(problem)) == 1.0  # type: ignore[attr-defined]
        assert task.reward(problem, problem.answer) == 0.0
