"""verl's rollouts and metrics, TRL's trainer states and completions."""

import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.support.import_sources import STEPS, write_lines, write_trl, write_verl
from wapo_analysis.errors import UserError
from wapo_analysis.importers import import_run
from wapo_analysis.store import open_run


@pytest.mark.parametrize("uid", [False, True])
def test_verl_rollouts_and_metrics_make_one_run(uid: bool, tmp_path: Path) -> None:
    report = import_run(write_verl(tmp_path / "v", uid=uid), tmp_path / "out")
    run = open_run(tmp_path / "out")
    step = run.steps.set_index("step").loc[4]
    assert step[["reward", "entropy", "grad_norm", "lr", "length"]].tolist() == [
        0.5, 0.96, 0.3, 1e-6, 12.0,
    ]  # fmt: skip
    assert step[["reward_std", "pass_rate", "groups_all_wrong"]].tolist() == [0.5, 0.5, 0.0]
    assert step["rollouts/acc"] == pytest.approx(0.375)
    rows = run.rollouts.query("step == 4")
    assert rows["group"].tolist() == [0, 0, 1, 1]
    assert rows["prompt"].tolist() == ["ask 0", "ask 0", "ask 1", "ask 1"]
    assert rows["answer"].tolist() == ["0", "1", "2", "3"]
    assert (report.format, report.steps, report.rollouts) == ("verl", STEPS, 4 * STEPS)
    assert set(report.unknown_keys) == {"request_id"}
    assert "actor/ppo_kl" in report.kept_keys, "its mean log-ratio is not our k3 estimate"
    assert math.isnan(step["kl_old"])


def test_one_prompt_drawn_twice_in_a_verl_step_makes_two_groups(tmp_path: Path) -> None:
    row = {"input": "q", "output": "a", "gts": "a", "step": 7}
    scores = {"s0_0_0": 1.0, "s0_1_0": 1.0, "s1_0_0": 0.0, "s1_1_0": 0.0}
    rows = [row | {"uid": uid, "score": score} for uid, score in scores.items()]
    write_lines(tmp_path / "v" / "7.jsonl", rows)
    import_run(tmp_path / "v", tmp_path / "out")
    run = open_run(tmp_path / "out")
    assert run.rollouts["group"].tolist() == [0, 0, 1, 1]
    assert run.steps["groups_all_wrong"].tolist() == [0.5]


def test_a_verl_metric_is_mapped_by_hand(tmp_path: Path) -> None:
    source = write_verl(tmp_path / "v") / "run.jsonl"
    from wapo_analysis.importers.run import ImportSettings

    import_run(source, tmp_path / "out", ImportSettings(mapping={"kl_old": "actor/ppo_kl"}))
    assert open_run(tmp_path / "out").steps["kl_old"].tolist() == [0.001] * STEPS


def test_verl_steps_repeated_after_a_resume(tmp_path: Path) -> None:
    log = write_verl(tmp_path / "v") / "run.jsonl"
    with log.open("a") as stream:
        stream.write(json.dumps({"step": 9, "data": {"actor/entropy": 7.0}}) + "\n")
        stream.write('{"step": "x", "data": {"a": 1}}\n{"step": 3}\n{"st')
    report = import_run(log, tmp_path / "out")
    assert report.repeated_steps == {9}
    assert [text.split(": ")[0] for text in report.broken] == ["run.jsonl:12", "run.jsonl:13"]
    assert report.half_lines == ["run.jsonl"]
    assert open_run(tmp_path / "out").steps.set_index("step").loc[9, "entropy"] == 7.0


def test_old_verl_dumps_take_the_step_from_the_name(tmp_path: Path) -> None:
    row = {"input": "q", "output": "a", "gts": "a", "score": 1.0}
    write_lines(tmp_path / "v" / "7.jsonl", [row, row | {"score": None}])
    report = import_run(tmp_path / "v", tmp_path / "out")
    assert open_run(tmp_path / "out").rollouts["step"].tolist() == [7]
    assert report.broken == ["7.jsonl:2: no step or no score"]


def test_trl_log_and_completions(tmp_path: Path) -> None:
    report = import_run(write_trl(tmp_path / "t"), tmp_path / "out")
    run = open_run(tmp_path / "out")
    steps = run.steps.set_index("step")
    assert len(steps) == STEPS, "the newest checkpoint holds the whole log"
    assert steps.loc[5, ["reward", "length", "truncated", "clip_high"]].tolist() == [
        0.5, 9.0, 0.1, 0.02,
    ]  # fmt: skip
    assert steps.loc[STEPS, "eval/loss"] == 0.7
    assert steps.loc[STEPS, "summary/train_runtime"] == 9.0
    assert steps.loc[5, "trl/num_tokens"] == 10.0
    rows = run.rollouts.query("step == 2")
    assert rows["reward"].tolist() == [1.5, 0.5, 0.0, 0.0], "a reward that was not given adds none"
    assert rows["group"].tolist() == [0, 0, 1, 1]
    assert rows["advantage"].tolist() == [0.5, -0.5, 0.0, 0.0]
    assert steps.loc[2, "groups_all_wrong"] == 0.5
    assert set(report.unknown_keys) == {"source"}
    assert any("plain sum of exact, format" in note for note in report.notes)
    assert not report.repeated_steps
    assert "attach" in report.cannot_feed["class_share"]


def test_trl_state_alone_and_completions_alone(tmp_path: Path) -> None:
    source = write_trl(tmp_path / "t")
    state = source / "checkpoint-10" / "trainer_state.json"
    assert import_run(state, tmp_path / "a").steps == STEPS
    report = import_run(source / "completions", tmp_path / "b")
    assert (report.rollouts, report.steps) == (4 * STEPS, STEPS)
    assert any("every numeric column" in note for note in report.notes)


def test_chat_messages_become_text(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    folder = tmp_path / "t"
    folder.mkdir()
    table = pa.table({"step": [1], "prompt": [chat], "completion": ["c"], "r": [1.0]})
    pq.write_table(table, folder / "completions_00001.parquet")
    import_run(folder, tmp_path / "out")
    assert open_run(tmp_path / "out").rollouts["prompt"].tolist() == ["one\ntwo"]


def test_broken_trl_files_are_named(tmp_path: Path) -> None:
    source = write_trl(tmp_path / "t")
    (source / "checkpoint-5" / "trainer_state.json").write_text("{")
    report = import_run(source, tmp_path / "a")
    assert report.broken == ["trainer_state.json:1: not a trainer state"]
    with pytest.raises(UserError, match="is no trainer state"):
        import_run(source / "checkpoint-5" / "trainer_state.json", tmp_path / "b")
    file = source / "completions" / "completions_00003.parquet"
    file.write_bytes(file.read_bytes()[:40])
    with pytest.raises(UserError, match="completions_00003.parquet is broken"):
        import_run(source, tmp_path / "c")
