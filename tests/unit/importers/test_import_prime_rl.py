"""prime-rl: token exports, and the file monitor with annotated traces."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.import_sources import (
    STEPS,
    write_lines,
    write_prime_exports,
    write_prime_monitor,
)
from wapo_analysis.errors import UserError
from wapo_analysis.importers import import_run
from wapo_analysis.store import open_run


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in file.read_text().splitlines()]


def exported(source: Path, step: int) -> list[dict[str, Any]]:
    files = sorted(source.glob(f"token_exports/step_{step}/rank_*.jsonl"))
    return [record for file in files for record in records(file)]


def test_exported_tokens_come_through_token_for_token(tmp_path: Path) -> None:
    source = write_prime_exports(tmp_path / "run")
    report = import_run(source, tmp_path / "out")
    run = open_run(tmp_path / "out")
    rows = run.tokens([3])
    sequences = exported(source, 3)
    for ours, theirs in (("logp", "trainer_logprobs"), ("logp_old", "inference_logprobs"),
                         ("entropy", "entropy"), ("advantage", "advantages"),
                         ("token_id", "token_ids"), ("clipped", "is_masked")):  # fmt: skip
        wanted = [v for r in sequences for v, m in zip(r[theirs], r["loss_mask"], strict=True) if m]
        np.testing.assert_allclose(rows[ours].astype(float), wanted, rtol=2e-5, err_msg=ours)
    assert rows["rollout"].nunique() == 6
    assert rows["position"].tolist() == [i for _ in range(2) for n in (4, 5, 6) for i in range(n)]
    assert rows["kept"].all()
    assert report.format == "prime-rl"
    assert set(report.unknown_keys) == {"env_name"}


def test_class_totals_and_step_columns_add_up(tmp_path: Path) -> None:
    source = write_prime_exports(tmp_path / "run")
    import_run(source, tmp_path / "out")
    run = open_run(tmp_path / "out")
    rows, totals = run.tokens([2]), run.classes.query("step == 2")
    assert totals["tokens"].sum() == totals["kept"].sum() == len(rows) == 30
    assert totals["clipped"].sum() == rows["clipped"].sum()
    assert totals["logp_sum"].sum() == pytest.approx(rows["logp"].sum(), rel=1e-4)
    assert totals["rule_breaks"].isna().all(), "without collision sums no rule can be checked"
    step = run.steps.set_index("step").loc[2]
    ratio = rows["logp"] - rows["logp_old"]
    assert step["kl_old"] == pytest.approx((np.exp(ratio) - 1 - ratio).mean(), rel=1e-2)
    assert step["entropy"] == pytest.approx(rows["entropy"].mean(), rel=1e-4)
    up = rows[rows["advantage"] > 0]
    assert step["entropy_pos"] == pytest.approx(up["entropy"].mean(), rel=1e-4)
    assert step["clip_high"] == pytest.approx(up["clipped"].sum() / len(rows))
    assert math.isnan(step["reward"])


def test_a_step_without_its_mark_is_left_out_and_said(tmp_path: Path) -> None:
    source = write_prime_exports(tmp_path / "run")
    (source / "token_exports/step_9/STABLE").unlink()
    report = import_run(source, tmp_path / "out")
    assert open_run(tmp_path / "out").token_steps() == list(range(9))
    assert any("step_9 has no STABLE mark" in note for note in report.notes)


def test_broken_records_are_named_and_the_others_kept(tmp_path: Path) -> None:
    source = write_prime_exports(tmp_path / "run")
    file = source / "token_exports/step_1/rank_0.jsonl"
    good = file.read_text().splitlines()
    short = json.loads(good[1])
    short["entropy"] = short["entropy"][:-1]
    absent = json.loads(good[2])
    absent["trainer_logprobs"][3] = None
    file.write_text("\n".join([good[0], json.dumps(short), "{", json.dumps(absent), good[2][:40]]))
    report = import_run(source, tmp_path / "out")
    assert report.broken_lines == 2
    assert sorted(text.split(":")[1] for text in report.broken) == ["2", "3"]
    assert report.half_lines == ["rank_0.jsonl"]
    rows = open_run(tmp_path / "out").tokens([1])
    assert int(rows["logp"].isna().sum()) == 1, "null stays null"
    assert rows.loc[rows["logp"].isna(), "cls"].tolist() == ["unknown"]


@pytest.mark.parametrize("where", ["monitors/file", "."])
def test_traces_are_joined_with_their_annotations(where: str, tmp_path: Path) -> None:
    source = write_prime_monitor(tmp_path / "run", where=where)
    if where == ".":  # the metrics file is told by its place, so here only traces remain
        (source / "metrics.jsonl").unlink()
    report = import_run(source, tmp_path / "out")
    run = open_run(tmp_path / "out")
    monitor = source / where / "traces"
    updates = [
        json.loads(t) for t in (monitor / "annotations/trainer.jsonl").read_text().splitlines()
    ]
    stream = [json.loads(t) for t in (monitor / "stream.jsonl").read_text().splitlines()]
    rows = run.tokens([4])
    wanted = [
        v for u in updates if u["info"]["train"]["trained_at_step"] == 4
        for v in u["branches"][0]["trainer_logprobs"] if v is not None
    ]  # fmt: skip
    np.testing.assert_allclose(rows["logp"], wanted, rtol=2e-5)
    sampled = [v for e in stream[12:16] for v in e["traces"][0]["nodes"][1]["logprobs"]]
    np.testing.assert_allclose(rows["logp_old"], sampled, rtol=2e-5)
    assert rows["advantage"].tolist() == [-0.5] * 5 + [0.5] * 5 + [-0.5] * 5 + [0.5] * 5
    assert rows["group"].tolist() == [0] * 10 + [1] * 10
    done = run.rollouts.query("step == 4")
    assert done["reward"].tolist() == [0, 2, 0, 2], "score times weight"
    assert done["completion"].tolist() == [f"say t4-{i}" for i in range(4)]
    assert done["finish_reason"].tolist() == ["stop"] * 4
    assert report.counts["traces that were not trained on left out"] == 1


def test_metrics_of_both_producers_are_merged(tmp_path: Path) -> None:
    report = import_run(write_prime_monitor(tmp_path / "run"), tmp_path / "out")
    steps = open_run(tmp_path / "out").steps.set_index("step")
    assert steps.loc[3, ["grad_norm", "entropy", "reward", "seconds"]].tolist() == pytest.approx(
        [0.3, 1.03, 0.15, 3.0]
    )
    assert steps.loc[3, "orchestrator/time/step"] == 99.0
    assert report.mapped["staleness"] == "off_policy/mean"
    assert steps.loc[3, "staleness"] == 0.5
    assert report.counts["metric rows without a step left out"] == 1
    assert not report.repeated_steps
    assert len(steps) == STEPS


def test_the_newest_annotation_wins(tmp_path: Path) -> None:
    source = write_prime_monitor(tmp_path / "run")
    log = source / "monitors/file/traces/annotations/trainer.jsonl"
    again = {"version": 1, "trace_id": "t1-0", "info": {"train": {"trained_at_step": 2}},
             "branches": [{"index": 0, "trainer_logprobs": [None] * 3 + [-0.125] * 5,
                           "entropies": [None] * 3 + [0.5] * 5, "values": [1.0]}]}  # fmt: skip
    with log.open("a") as stream:
        stream.write(json.dumps(again) + "\n")
    report = import_run(source, tmp_path / "out")
    rows = open_run(tmp_path / "out").tokens([2])
    assert rows["logp"].tolist()[:5] == [-0.125] * 5
    assert len(rows) == 25
    assert set(report.unknown_keys) == {"values"}


def test_a_folder_with_nothing_stable_is_refused(tmp_path: Path) -> None:
    source = write_prime_exports(tmp_path / "run", steps=2)
    for mark in source.glob("token_exports/*/STABLE"):
        mark.unlink()
    with pytest.raises(UserError, match="nothing to import.*no STABLE mark"):
        import_run(source, tmp_path / "out")


def test_single_exported_file_and_numbered_parts_of_a_stream(tmp_path: Path) -> None:
    source = write_prime_exports(tmp_path / "run")
    report = import_run(source / "token_exports/step_1/rank_0.jsonl", tmp_path / "one")
    assert report.token_rows == 15
    monitor = write_prime_monitor(tmp_path / "m") / "monitors/file/traces"
    lines = (monitor / "stream.jsonl").read_text().splitlines()
    (monitor / "stream.jsonl").unlink()
    write_lines(monitor / "stream/00000.jsonl", map(json.loads, lines[:7]))
    write_lines(monitor / "stream/00001.jsonl", map(json.loads, lines[7:]))
    assert import_run(tmp_path / "m", tmp_path / "two").rollouts == 4 * STEPS
    (monitor / "stream/00000.jsonl").rename(monitor / "stream/00000.jsonl.zst")
    told = import_run(tmp_path / "m", tmp_path / "three")
    assert told.rollouts == 4 * STEPS - 7
    assert any("1 sealed parts" in note for note in told.notes)


def node(content: str, ids: list[int], mask: list[bool], **more: Any) -> dict[str, Any]:
    return {"message": {"content": content}, "token_ids": ids, "mask": mask, **more}


def test_a_branch_that_was_trained_gives_its_sampled_tokens_and_the_longest_the_length(
    tmp_path: Path,
) -> None:
    """Two answers to one question, the first with a second turn; the second was not trained on."""
    nodes = [
        node("ask", [1, 2], [False, False]),
        node("say", [3, 4, 5], [True] * 3, logprobs=[-1.0, -2.0, -3.0], parent=0),
        node("go on", [6], [False], parent=1),
        node("more", [7, 8], [True, True], logprobs=[-4.0], parent=2),
        node("other", [9], [True], logprobs=[-5.0], parent=0),
    ]
    trace = {"id": "t", "nodes": nodes,
             "rewards": {"a": {"score": 1.0, "weight": 0.5}, "b": {"score": 0.25}}}  # fmt: skip
    monitor = tmp_path / "monitors" / "file" / "traces"
    write_lines(monitor / "stream.jsonl", [{"id": "e", "traces": [trace]}])
    trained = [None, None, -1.5, -2.5, None, None, -4.5, -5.5]
    write_lines(monitor / "annotations" / "trainer.jsonl", [
        {"trace_id": "t", "info": {"train": {"trained_at_step": 3}, "advantage": 0.25},
         "branches": [{"trainer_logprobs": trained, "entropies": [1.0] * 3}]},
        {"trace": "x"},
    ])  # fmt: skip
    report = import_run(tmp_path / "monitors", tmp_path / "out")
    run = open_run(tmp_path / "out")
    rows = run.tokens([3], derived=False)
    assert rows["token_id"].tolist() == [3, 4, 7, 8], "the fifth has no log-probability"
    assert rows["logp"].tolist() == [-1.5, -2.5, -4.5, -5.5]
    np.testing.assert_array_equal(rows["logp_old"], [-1, -2, -4, np.nan])
    np.testing.assert_array_equal(rows["entropy"], [1.0, np.nan, np.nan, np.nan])
    assert rows["advantage"].tolist() == [0.25] * 4
    (done,) = run.rollouts.to_dict("records")
    assert (done["prompt"], done["completion"]) == ("ask", "say\ngo on\nmore\nother")
    assert (done["reward"], done["length"], done["advantage"]) == (0.75, 5, 0.25)
    assert np.isnan(done["finish_reason"])
    assert report.broken == ["trainer.jsonl:2: no trace_id"]


def test_an_exported_completion_has_the_last_of_its_rewards_and_its_sampled_length(
    tmp_path: Path,
) -> None:
    lists = {"token_ids": [1, 2, 3], "loss_mask": [False, True, True], "advantages": [0.5] * 3,
             "trainer_logprobs": [-1.0] * 3}  # fmt: skip
    rows = [
        {"step": 9, "export_step": 2, "rank": 1, "micro_step": 3, **lists, "rewards": [None, 0.25]},
        {"step": 2, **lists, "rewards": ["x"]},
        {"step": 2, **lists, "env": "sums"},
        {**lists},
    ]
    file = write_lines(tmp_path / "token_exports" / "step_2" / "rank_0.jsonl", rows)
    report = import_run(file, tmp_path / "out")
    run = open_run(tmp_path / "out")
    tokens = run.tokens([2], derived=False)
    assert tokens["rank"].tolist() == [1, 1, 0, 0, 0, 0]
    assert tokens["minibatch"].tolist() == [3, 3, 0, 0, 0, 0]
    assert tokens["rollout"].nunique() == 3
    done = run.rollouts
    assert done[["step", "rank", "reward", "length"]].to_numpy().tolist() == [[2, 1, 0.25, 2]]
    assert report.broken == ["rank_0.jsonl:4: no step"]
    assert dict(report.unknown_keys) == {"env": 1}


def test_of_several_exports_only_steps_that_are_marked_whole_are_read(tmp_path: Path) -> None:
    source = write_prime_exports(tmp_path / "run", steps=2)
    (source / "token_exports" / "step_1" / "STABLE").unlink()
    report = import_run(source, tmp_path / "a")
    assert open_run(tmp_path / "a").token_steps() == [0]
    assert any("step_1 has no STABLE mark" in note for note in report.notes)
    with pytest.raises(UserError, match="step_1 has no STABLE mark"):
        import_run(source / "token_exports" / "step_1", tmp_path / "b")
    (source / "token_exports" / "step_1" / "rank_1.jsonl").unlink()
    import_run(source / "token_exports" / "step_1", tmp_path / "b")
    assert open_run(tmp_path / "b").token_steps() == [1], "a file alone is the user's choice"


@pytest.mark.parametrize("masked", [True, False])
def test_what_an_export_feeds_is_told(masked: bool, tmp_path: Path) -> None:
    lists: dict[str, Any] = {"token_ids": [1, 2], "loss_mask": [True, True],
                             "advantages": [0.5] * 2, "trainer_logprobs": [-1.0] * 2}  # fmt: skip
    if masked:
        lists["is_masked"] = [False, True]
    file = tmp_path / "token_exports" / "step_2" / "rank_0.jsonl"
    report = import_run(write_lines(file, [{"step": 2, **lists}]), tmp_path / "out")
    assert report.mapped == {
        "token_id": "token_ids", "loss_mask": "loss_mask", "advantage": "advantages",
        "logp": "trainer_logprobs",
    } | ({"clipped": "is_masked"} if masked else {})  # fmt: skip
    assert any("clipped is prime-rl's is_masked" in note for note in report.notes) is masked


def monitor(root: Path, *nodes: dict[str, Any], **branch: Any) -> Path:
    """One trained trace in the file monitor's layout."""
    traces = root / "monitors" / "file" / "traces"
    trace = {"id": "t", "nodes": nodes, "rewards": {"a": {"score": 1.0}}}
    write_lines(traces / "stream.jsonl", [{"id": "e", "traces": [trace]}])
    note = {"trace_id": "t", "info": {"train": {"trained_at_step": 3}}, "branches": [branch]}
    write_lines(traces / "annotations" / "trainer.jsonl", [note])
    return root / "monitors"


def test_indexes_and_live_copies_of_streams_are_not_read(tmp_path: Path) -> None:
    source = monitor(tmp_path, node("say", [1], [True]), extra=[1], more=[2])
    traces = source / "file" / "traces"
    write_lines(traces / "stream.index.jsonl", [{"line": 1}] * 2)
    write_lines(traces / "live" / "stream.jsonl", [{"id": "e", "traces": [{"id": "u"}]}])
    report = import_run(source, tmp_path / "out")
    assert (report.rollouts, report.broken_lines) == (1, 0)
    assert not report.counts
    assert dict(report.unknown_keys) == {"extra": 1, "more": 1}


def test_a_completion_begins_with_the_first_text_that_was_sampled_in_part(tmp_path: Path) -> None:
    nodes = [node("ask", [1, 2], [False, False]), node("say", [3, 4], [False, True], parent=0)]
    import_run(monitor(tmp_path, *nodes), tmp_path / "out")
    (done,) = open_run(tmp_path / "out").rollouts.to_dict("records")
    assert (done["prompt"], done["completion"], done["length"]) == ("ask", "say", 1)


def test_a_trace_without_a_sampled_token_has_no_length(tmp_path: Path) -> None:
    import_run(monitor(tmp_path, node("ask", [1], [False])), tmp_path / "out")
    (done,) = open_run(tmp_path / "out").rollouts.to_dict("records")
    assert np.isnan(done["length"])


@pytest.mark.parametrize("parent", [2, 3, -1, 1, "0", None])
def test_a_parent_that_is_no_node_is_none(parent: Any, tmp_path: Path) -> None:
    nodes = [node("ask", [1], [False]), node("say", [2, 3], [True] * 2, parent=parent)]
    streams = {"trainer_logprobs": [-0.5, -1.5], "advantages": [0.5, 0.5]}
    report = import_run(monitor(tmp_path, *nodes, index=1, **streams), tmp_path / "out")
    assert (report.broken_lines, report.rollouts) == (0, 1)
    if parent == 1:  # its own parent: no branch ends there
        assert report.token_rows == 0
    else:
        tokens = open_run(tmp_path / "out").tokens([3], derived=False)
        assert tokens["token_id"].tolist() == [2, 3]
