"""What a diagnosis says of tokens, classes and checks, word for word."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.support.step_logs import finding, judge, names, ramp, write_flows, write_steps
from wapo_analysis.diagnose import Diagnosis, diagnose
from wapo_analysis.diagnose.advice import Advice
from wapo_analysis.diagnose.result import Culprits, Driver, Finding, Skipped
from wapo_analysis.results import Grid, Section
from wapo_analysis.store import RunWriter, open_run


@pytest.mark.parametrize(
    ("steps", "tokens", "rollouts", "said"),
    [
        ((3,), (("1", 0.21), ("x", 0.2)), ((3, 7, 0.4),),
         "at step 3 comes from tokens '1' 21%, 'x' 20%; rollouts 7 40%."),
        ((3, 5), (("1", 0.21),), ((3, 7, 0.4), (5, 0, 0.1)),
         "at steps 3, 5 comes from tokens '1' 21%; rollouts 7 of step 3 40%, 0 of step 5 10%."),
        ((3,), (), ((3, 7, 0.03),), "at step 3 comes from rollouts 7 3%."),
        ((3,), (), ((3, 7, 0.029),), "at step 3 comes from many rollouts, none above 2.9%."),
        ((3,), (), (), "at step 3 comes from tokens that the source does not name."),
    ],
)  # fmt: skip
def test_tokens_and_rollouts_in_words(
    steps: tuple[int, ...],
    tokens: tuple[tuple[str, float], ...],
    rollouts: tuple[tuple[int, int, float], ...],
    said: str,
) -> None:
    culprits = Culprits("entropy_explosion", "neg_peak", steps, tokens, rollouts)
    assert culprits.words() == f"Predicted dH of neg_peak {said}"


@pytest.mark.parametrize(("way", "sign"), [("rise", 1), ("fall", -1)])
def test_classes_stand_with_their_sum_and_what_was_measured(
    tmp_path: Path, way: str, sign: int
) -> None:
    healthy = judge(tmp_path, reward=np.full(20, 0.5))
    drivers = (
        Driver("neg_peak", sign * 2.0, None, 1.0),
        Driver("pos_peak", -sign * 0.5, None, -0.25),
    )
    lines = [line.split() for line in replace(healthy, drivers=drivers).to_text().splitlines()]
    assert ["class", "predicted", "dH", "of", "the", way] in lines
    assert ["neg_peak", f"{sign * 2:+}", "100%"] in lines
    assert ["sum", f"{sign * 1.5:+}"] in lines
    probed = (replace(drivers[0], counterfactual_dentropy=sign * 0.125), drivers[1])
    lines = [line.split() for line in replace(healthy, drivers=probed).to_text().splitlines()]
    assert ["neg_peak", f"{sign * 2:+}", "100%", f"{sign * 0.125:+}"] in lines


def test_how_many_checks_were_not_made(tmp_path: Path) -> None:
    found = judge(tmp_path, reward=np.full(20, 0.5))
    one = replace(found, skipped=found.skipped[:1])
    assert "1 check needs what is not here: " in one.to_text()
    assert f"{len(found.skipped)} checks need what is not here: " in found.to_text()
    last = found.to_text().splitlines()[-1]
    assert last.count("(") == 5, "five kinds are named"
    kinds = {lack for skipped in found.skipped for lack in skipped.missing}
    assert len(kinds) > 5
    assert " more. Each by name: --format json." in last
    assert "more" not in one.to_text().splitlines()[-1]


def test_a_short_run_is_told_what_a_verdict_needs(tmp_path: Path) -> None:
    short = np.full(4, 0.5)
    needs = "a verdict needs at least 8"
    assert judge(tmp_path / "a", loss=short).sentence == (
        f"None of 4 steps has entropy or reward; {needs}."
    )
    for number, columns in enumerate(({"reward": short}, {"entropy": short})):
        found = judge(tmp_path / str(number), **columns)
        assert found.sentence == f"Only 4 steps; {needs} with entropy or reward."
    assert judge(tmp_path / "one", reward=short[:1]).sentence.startswith("Only 1 step; ")


@pytest.mark.parametrize(
    ("part", "where"), [(0, "the beginning"), (3, "part 4 of 8"), (7, "the end")]
)
def test_the_part_of_the_completions_that_left_the_reference_is_named(
    tmp_path: Path, part: int, where: str
) -> None:
    parts = {f"kl_positional/{n}": np.full(60, 0.05) for n in range(8)}
    parts[f"kl_positional/{part}"] = ramp(0.05, 0.6, 60, 20, 15)
    found = finding(judge(tmp_path, **parts), "kl_by_position")
    assert f"leaves the reference model at {where} of completions" in found.message
    assert f"0.6 nats a token in part {part + 1} of 8, 0.05 in the others" in found.message
    assert (found.evidence["part"], found.evidence["others"]) == (part + 1, pytest.approx(0.05))


@pytest.mark.parametrize(
    ("before", "after", "severity"),
    [(0.5, 0.7, "info"), (0.1, 0.64, "info"), (0.1, 0.75, "warning")],
)
def test_problems_that_split_into_learned_and_out_of_reach_are_a_warning_while_the_reward_gains(
    tmp_path: Path, before: float, after: float, severity: str
) -> None:
    flat, reward = ramp(before, after, 60, 20, 15), ramp(0.2, 0.7, 60, 5, 55)
    found = judge(tmp_path, reward=reward, groups_flat=flat)
    assert finding(found, "zero_signal").severity == severity


# ---- the whole of a diagnosis -------------------------------------------------------------------

EXPLODED = {"entropy": ramp(0.4, 3, 100, 40, 20), "reward": ramp(0.5, 0, 100, 40, 20)}


def found(name: str, severity: str, step: int = 3, **given: object) -> Finding:
    return Finding(name=name, severity=severity, step=step, message=f"{name} was seen.",
                   evidence={"size": 0.5}, advice=Advice(f"Mend {name}.", steps=(Advice("Try."),)),
                   reference="somewhere", **given)  # type: ignore[arg-type] # fmt: skip


def remedy(diagnosis: Diagnosis) -> str:
    """The first step of the verdict's advice that changes the training."""
    return next(step.text for step in diagnosis.findings[0].advice.steps if step.change)


def page_of(diagnosis: Diagnosis, title: str) -> list[Section]:
    return [p for p in diagnosis.page().parts if isinstance(p, Section) and title in p.title]


@pytest.mark.parametrize(
    ("severities", "worst"),
    [((), None), (("info",), "info"), (("info", "warning"), "warning"),
     (("warning", "critical", "info"), "critical")],
)  # fmt: skip
def test_the_worst_severity_is_what_a_diagnosis_reaches(
    tmp_path: Path, severities: tuple[str, ...], worst: str | None
) -> None:
    calm = judge(tmp_path, reward=np.full(20, 0.5))
    d = replace(calm, findings=tuple(found(f"f{n}", s) for n, s in enumerate(severities)))
    assert d.worst_severity == worst
    order = ("info", "warning", "critical")
    reached = [d.reaches(severity) for severity in order]
    assert reached == [worst is not None and n <= order.index(worst) for n in range(3)]


def test_tokens_and_rollouts_stand_in_the_evidence_of_their_finding_alone(tmp_path: Path) -> None:
    culprits = Culprits("b", "neg_peak", (3,), (("x", 1 / 3),), ((3, 7, 1 / 7),))
    calm = judge(tmp_path, reward=np.full(20, 0.5))
    d = replace(calm, findings=(found("a", "warning"), found("b", "warning")), culprits=culprits)
    first, second = d.to_dict()["findings"]
    assert first["evidence"] == {"size": 0.5}
    assert second["evidence"]["tokens"] == [{"token": "x", "share": 0.333333}]
    assert second["evidence"]["rollouts"] == [{"step": 3, "rollout": 7, "share": 0.142857}]
    assert first["steps"] == ["Try."]


def test_the_verdict_is_said_once_and_first(tmp_path: Path) -> None:
    calm = judge(tmp_path, reward=np.full(20, 0.5))
    findings = (found("a", "critical"), found("b", "warning"))
    failed = replace(calm, findings=findings, onset_step=3, sentence="a was seen.")
    first, second = page_of(failed, " at step 3")
    text = failed.to_text()
    assert text.count("a was seen.") == text.count("Mend a.") == 1
    assert text.index("Mend a.") < text.index("[critical] a at step 3")
    assert len(second.parts) == len(first.parts) + 3  # message, advice, its steps
    healthy = replace(calm, findings=findings)
    assert [len(section.parts) for section in page_of(healthy, " at step 3")] == [5, 5]
    assert "Mend a." not in healthy.to_text().split("[critical]")[0]


@pytest.mark.parametrize(
    ("kinds", "said"),
    [
        (1, "1 check needs what is not here: kind 0 (1). Each"),
        (5, "kind 4 (1). Each"),
        (6, "kind 4 (1) and 1 more. Each"),
        (7, "kind 4 (1) and 2 more. Each"),
    ],
)
def test_five_kinds_of_what_is_missing_are_named(tmp_path: Path, kinds: int, said: str) -> None:
    calm = judge(tmp_path, reward=np.full(20, 0.5))
    skipped = tuple(Skipped(f"check {n}", (f"kind {n}",)) for n in range(kinds))
    assert said in replace(calm, skipped=skipped).to_text()
    several = replace(calm, skipped=(Skipped("x", ("tokens.logp or lr", "tokens.coef")),))
    assert ": token rows (1). Each" in several.to_text()


@pytest.mark.parametrize("measured", [None, 0.125])
def test_classes_stand_in_a_table(tmp_path: Path, measured: float | None) -> None:
    calm = judge(tmp_path, reward=np.full(20, 0.5))
    drivers = (
        Driver("neg_peak", 0.5, None, 1.0, (2, 6)),
        Driver("pos_peak", -0.25, measured, -0.5, (2, 6)),
    )
    (section,) = page_of(replace(calm, drivers=drivers), "Predicted dH")
    assert "by class, steps 2 to 6, nats" in section.title
    one = (replace(drivers[0], steps=(3, 3)),)
    assert "by class, step 3, nats" in page_of(replace(calm, drivers=one), "Predicted dH")[0].title
    grid = section.parts[0]
    assert isinstance(grid, Grid)
    head = ["class", "predicted dH", "of the rise"]
    rows = [["neg_peak", "+0.5", "100%"], ["pos_peak", "-0.25", "-50%"], ["sum", "+0.25", ""]]
    if measured is not None:
        head.append("class alone, measured (nats)")
        rows = [[*row, more] for row, more in zip(rows, ("n/a", "+0.125", ""), strict=True)]
    assert [list(row) for row in grid.rows] == [head, *rows]


@pytest.mark.parametrize(
    ("steps", "span"),
    [
        (range(1, 21), "20 steps"),
        (range(0, 40, 2), "20 records from step 0 to 38"),
        (range(0, 60, 3), "20 records from step 0 to 57"),
        ([*range(1, 20), 500], "20 steps"),
        ([*range(1, 12), *range(20, 38, 2)], "20 steps"),
        ([*range(1, 10), *range(20, 42, 2)], "20 records from step 1 to 40"),
        ([5], "Only 1 step;"),
        ([5, 9], "Only 2 records from step 5 to 9;"),
        ([], "None of 0 steps has"),
    ],
)
def test_records_that_are_further_apart_are_told_by_their_steps(
    tmp_path: Path, steps: object, span: str
) -> None:
    writer = RunWriter(tmp_path / "run", {"source": "loop"})
    for step in steps:  # type: ignore[attr-defined]
        writer.append_step({"step": step, "reward": 0.5, "entropy": 0.4})
    writer.close("finished")
    sentence = diagnose(open_run(tmp_path / "run")).sentence
    assert (f"over {span}; no collapse" if span[0] in "123456789" else span) in sentence


def test_a_calm_sentence_counts_the_warnings(tmp_path: Path) -> None:
    norms = np.where(np.arange(60) == 16, np.nan, 1.0)
    flat = {"entropy": np.full(60, 0.4), "reward": np.full(60, 0.5)}
    one = judge(tmp_path / "a", grad_norm=norms, **flat)
    assert names(one) == {"nonfinite_step"}
    assert one.sentence.endswith("over 60 steps; no collapse seen. 1 warning below.")
    assert one.sentence.startswith("Entropy went from 0.4 to 0.4 nats; ")
    assert judge(tmp_path / "none", **flat).sentence.endswith("over 60 steps; no collapse seen.")
    lonely = judge(tmp_path / "b", entropy=np.full(60, 0.4))
    assert lonely.sentence.startswith("Entropy went from 0.4 to 0.4 nats")
    rows = judge(tmp_path / "c", reward=np.full(8, 0.5))
    assert (rows.verdict, judge(tmp_path / "d", reward=np.full(7, 0.5)).verdict) == (
        "healthy", "insufficient_data",
    )  # fmt: skip


@pytest.mark.parametrize(("flow", "large"), [(0.004, False), (0.0, False), (-0.004, True)])
def test_entropy_that_moves_against_all_classes_is_of_too_large_steps(
    tmp_path: Path, flow: float, large: bool
) -> None:
    """Then the learning rate comes first."""
    path = write_steps(tmp_path / "run", EXPLODED)
    write_flows(path, {(-1, 1): np.full(100, 0.006), (1, 1): np.full(100, flow - 0.006)})
    d = diagnose(open_run(path))
    assert d.verdict == "entropy_explosion"
    assert remedy(d).startswith("Lower lr" if large else "Leave neg_peak")
    collapsed = {"entropy": ramp(0.4, 0.01, 100, 40, 20), "reward": np.full(100, 0.3)}
    path = write_steps(tmp_path / "other", collapsed)
    write_flows(path, {(-1, 1): np.full(100, -0.006), (1, 1): np.full(100, 0.006 - flow)})
    d = diagnose(open_run(path))
    assert d.verdict == "entropy_collapse"
    assert remedy(d).startswith("Lower lr" if large else "Leave neg_peak")


def test_steps_told_to_be_too_large_lower_the_learning_rate_first(tmp_path: Path) -> None:
    for name, more in (("a", {}), ("b", {"kl_old": ramp(0.002, 0.2, 100, 20, 20)})):
        path = write_steps(tmp_path / name, EXPLODED | more)
        write_flows(path, {(-1, 1): np.full(100, 1.0)})
        d = diagnose(open_run(path))
        assert ("off_policy_drift" in names(d)) is bool(more)
        assert remedy(d).startswith("Lower lr" if more else "Leave neg_peak")


@pytest.mark.parametrize(("fell", "said"), [(False, "fall of the entropy (first-order), yet it "
                                             "rose"), (True, "rise of the entropy (first-order), "
                                                       "yet it fell")])  # fmt: skip
def test_a_reward_that_collapses_while_the_entropy_moves_against_its_classes(
    tmp_path: Path, fell: bool, said: str
) -> None:
    entropy = ramp(0.4, 0.3, 60, 30, 10) if fell else ramp(0.3, 0.4, 60, 30, 10)
    path = write_steps(tmp_path / "run", {"entropy": entropy, "reward": ramp(0.9, 0, 60, 30, 6)})
    write_flows(path, {(1, 1): np.full(60, 1.0 if fell else -1.0)})
    d = diagnose(open_run(path))
    assert d.verdict == "reward_collapse"
    assert said in d.sentence
    healthy = write_steps(tmp_path / "calm", {"entropy": entropy, "reward": np.full(60, 0.5)})
    write_flows(healthy, {(1, 1): np.full(60, 1.0 if fell else -1.0)})
    assert "All classes" not in diagnose(open_run(healthy)).sentence


def test_the_first_warning_is_the_earliest_of_all(tmp_path: Path) -> None:
    grad = np.ones(100)
    grad[9] = np.nan
    d = judge(tmp_path, **EXPLODED, grad_norm=grad)
    assert d.first_warning_step == 10
    assert d.onset_step is not None
    assert d.onset_step > 30
    assert d.findings[0].name == "entropy_explosion"
    others = [(f.severity, f.step) for f in d.findings[1:]]
    order = ("critical", "warning", "info")
    assert others == sorted(others, key=lambda pair: (order.index(pair[0]), pair[1]))
