"""The run folder: round trips, half-written files, broken files, resume, old schemas."""

import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.support.builders import write_fake_run
from wapo_analysis.errors import UserError
from wapo_analysis.schema import ROLLOUTS, TOKENS
from wapo_analysis.store import (
    Run,
    RunWriter,
    find_runs,
    open_run,
    reader,
    round_mantissa,
    run_folders,
)
from wapo_analysis.store.reader import summed_classes
from wapo_analysis.store.writer import copy_steps
from wapo_analysis.table import Records


def token_records(step: int, rows: int = 50) -> Records:
    rng = np.random.default_rng(step)
    floats = ("advantage", "logp", "entropy", "collision_rest", "coef")
    values = {name: rng.normal(size=rows).astype(np.float32) for name in floats}
    values["logp"] = -np.abs(values["logp"])
    keys = ("minibatch", "rank", "group", "rollout", "position", "token_id")
    return Records.build(
        TOKENS,
        {"step": np.full(rows, step), **{k: rng.integers(0, 9, rows) for k in keys}, **values},
    )


def written_run(path: Path, steps: int = 3) -> Path:
    writer = RunWriter(path, {"name": "r", "objective": {"name": "grpo"}, "temperature": 1.0})
    for step in range(1, steps + 1):
        writer.write_part(token_records(step), step)
        writer.append_step({"step": step, "reward": step / 10, "entropy": float("nan")})
    writer.add_vocab({1: "a", 2: "<b>"})
    writer.close("finished")
    return path


def test_round_trip_keeps_keys_exactly_and_floats_to_15_bits(tmp_path: Path) -> None:
    run = open_run(written_run(tmp_path / "r"))
    stored, original = run.tokens(derived=False), token_records(2)
    second = stored[stored.step == 2]
    np.testing.assert_array_equal(second.token_id, original["token_id"])
    np.testing.assert_allclose(second.logp, original["logp"], rtol=2**-15)
    assert second.logp_old.isna().all(), "a statistic nobody gave is missing, not 0"
    assert run.steps.reward.tolist() == [0.1, 0.2, 0.3]
    assert run.steps.entropy.isna().all()
    assert run.vocab == {1: "a", 2: "<b>"}
    assert run.manifest["status"] == "finished"


def test_rounding_keeps_special_values() -> None:
    values = np.array([np.nan, np.inf, -np.inf, 0.0, -1.0, 3.4e38], np.float32)
    np.testing.assert_array_equal(round_mantissa(values)[:5], values[:5])


def test_all_bits_are_kept_on_demand(tmp_path: Path) -> None:
    for bits in (23, 7):
        writer = RunWriter(tmp_path / str(bits), {}, store_bits=bits)
        writer.write_part(token_records(1), 1)
        writer.close("finished")
    original = token_records(1)["logp"]
    full, few = (open_run(tmp_path / str(bits)).tokens().logp for bits in (23, 7))
    np.testing.assert_array_equal(full, original)
    np.testing.assert_allclose(few, original, rtol=2**-7)
    assert not np.allclose(few, original, rtol=2**-12)
    with pytest.raises(UserError, match="store_bits must be 7 to 23, got 24"):
        RunWriter(tmp_path / "r", {}, store_bits=24)


def test_a_token_takes_at_most_22_bytes(tmp_path: Path) -> None:
    """All columns but the re-scored ones, 32768 tokens of a near-certain policy, off-policy."""
    rng = np.random.default_rng(0)
    rollout, position = np.divmod(np.arange(32_768), 512)
    rest = np.where(rng.random(32_768) < 0.5, 10 ** rng.uniform(-7, -2, 32_768), rng.random(32_768))
    logp = np.log1p(-rest)
    others = rest**2 * rng.uniform(0.1, 1, 32_768)
    advantage = rng.normal(size=64)[rollout]
    old = logp + rng.normal(size=32_768) * 1e-2 * rest
    columns = {
        "step": np.full(32_768, 9),
        "minibatch": rollout // 16,
        "rank": np.zeros(32_768),
        "group": rollout // 8,
        "rollout": rollout,
        "position": position,
        "token_id": np.minimum(rng.zipf(1.2, 32_768), 49_152),
        "advantage": advantage,
        "logp": logp,
        "logp_old": old,
        "entropy": rest * rng.uniform(1, 8, 32_768),
        "collision_rest": others,
        "collision_logp_rest": others * rng.uniform(-8, -1, 32_768),
        "coef": advantage * np.exp(logp - old) / 32_768,
        "clipped": rng.random(32_768) < 0.02,
        "kept": rng.random(32_768) < 0.98,
        "top1": rest < 0.5,
    }
    sizes = {}
    for bits in (15, 23):
        writer = RunWriter(tmp_path / str(bits), {}, store_bits=bits)
        writer.write_part(Records.build(TOKENS, columns), 9)
        writer.close("finished")
        sizes[bits] = (tmp_path / str(bits) / "tokens" / "part-00000009-0.parquet").stat().st_size
    assert sizes[15] <= 22 * 32_768
    assert sizes[23] <= 30 * 32_768


def test_only_the_wanted_steps_are_read(tmp_path: Path) -> None:
    run = open_run(written_run(tmp_path / "r"))
    assert set(run.tokens([2, 3]).step) == {2, 3}
    assert run.token_steps() == [1, 2, 3]


def test_a_step_without_token_rows_is_refused_and_the_recorded_ones_named(tmp_path: Path) -> None:
    run = open_run(written_run(tmp_path / "r", steps=9))
    said = "step 9999 of r has no token rows; nearest of the 9 steps that have: 5, 6, 7, 8, 9"
    with pytest.raises(UserError, match=said):
        run.tokens([2, 9999])
    assert run.tokens([]).empty
    bare = RunWriter(tmp_path / "bare", {"name": "bare"})
    bare.close("finished")
    with pytest.raises(UserError, match="bare has no token rows; record them with token_every"):
        open_run(tmp_path / "bare").tokens(iter([1]))


def test_a_half_written_last_line_is_left_out(tmp_path: Path) -> None:
    path = written_run(tmp_path / "r")
    with (path / "steps.jsonl").open("a") as log:
        log.write('{"step": 4, "rew')
    assert open_run(path).steps.step.tolist() == [1, 2, 3]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = written_run(tmp_path / "r")
    log = path / "steps.jsonl"
    lines = log.read_text().splitlines()
    log.write_text("\n".join([lines[0], lines[1][:9], lines[2]]) + "\n")
    with pytest.raises(UserError, match=r"steps\.jsonl: line 2 is not a step record"):
        _ = open_run(path).steps


def test_a_truncated_part_is_named_and_the_others_stay_readable(tmp_path: Path) -> None:
    path = written_run(tmp_path / "r")
    part = path / "tokens" / "part-00000002-0.parquet"
    part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match=r"part-00000002-0\.parquet is broken or truncated"):
        open_run(path).tokens()
    assert set(open_run(path).tokens([1, 3]).step) == {1, 3}


def test_a_file_takes_its_name_when_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wapo_analysis.store import files

    path = tmp_path / "file"
    path.write_bytes(b"old")
    order, seen = [], []
    fsync, replace = files.os.fsync, files.os.replace

    def renamed(source: Path, target: Path) -> None:
        order.append("rename")
        seen.append((source.read_bytes(), target.read_bytes()))
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", lambda n: order.append("fsync") or fsync(n))
    monkeypatch.setattr(files.os, "replace", renamed)
    files.write_atomic(path, b"new")
    assert order == ["fsync", "rename"]
    assert seen == [(b"new", b"old")]
    assert path.read_bytes() == b"new"
    with pytest.raises(TypeError), files.renamed_when_whole(path) as stream:
        stream.writelines([b"half", "no bytes"])
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("file", b"new")]


def test_an_unfinished_temporary_file_is_ignored(tmp_path: Path) -> None:
    path = written_run(tmp_path / "r")
    (path / "tokens" / ".part-00000004-0.parquet.x1").write_bytes(b"PAR1")
    assert open_run(path).token_steps() == [1, 2, 3]


def test_resume_drops_what_came_after(tmp_path: Path) -> None:
    path = written_run(tmp_path / "r", steps=5)
    with (path / "steps.jsonl").open("a") as log:
        log.write('{"step": 6, "rew')
    writer = RunWriter(path, open_run(path).manifest, resume_after=3)
    writer.append_step({"step": 4, "reward": 0.9})
    writer.close("finished")
    run = open_run(path)
    assert run.steps.step.tolist() == [1, 2, 3, 4]
    assert run.steps.reward.iloc[-1] == 0.9
    assert run.token_steps() == [1, 2, 3]


def test_a_copy_of_the_first_steps_holds_all_of_them_and_no_other(tmp_path: Path) -> None:
    source, target = written_run(tmp_path / "r", steps=5), tmp_path / "copy"
    copy_steps(source, target, 3)
    RunWriter(target, open_run(source).manifest, resume_after=3).close("finished")
    whole, copied = open_run(source), open_run(target)
    assert copied.steps.step.tolist() == copied.token_steps() == [1, 2, 3]
    assert copied.tokens(derived=False).equals(whole.tokens([1, 2, 3], derived=False))
    assert copied.vocab == whole.vocab
    assert whole.token_steps() == [1, 2, 3, 4, 5], "the original keeps its own"


def test_an_existing_run_is_not_overwritten(tmp_path: Path) -> None:
    path = written_run(tmp_path / "r")
    with pytest.raises(UserError, match="already holds a run"):
        RunWriter(path, {})
    assert open_run(path).steps.step.tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "no schema_version"),
        (json.dumps({"schema_version": 99}), "schema version 99; this installation reads"),
    ],
)
def test_bad_manifests_get_one_clear_line(tmp_path: Path, content: str, message: str) -> None:
    path = written_run(tmp_path / "r")
    (path / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message):
        open_run(path)


def test_missing_folder_and_folder_of_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run folder at"):
        find_runs(tmp_path / "absent")
    written_run(tmp_path / "a" / "one")
    written_run(tmp_path / "a" / "two")
    with pytest.raises(UserError, match=r"runs inside it: one, two"):
        open_run(tmp_path / "a")
    assert [p.name for p in find_runs(tmp_path / "a")] == ["one", "two"]


def test_columns_that_were_not_asked_for_are_not_read(tmp_path: Path) -> None:
    run = open_run(written_run(tmp_path / "r"))
    asked = ["step", "logp", "logp_prox"]
    steps = run.token_steps()
    pd.testing.assert_frame_equal(
        run.table("tokens", steps, asked)[asked], run.table("tokens")[asked]
    )
    assert sorted(run.table("tokens", steps, asked)) == sorted(asked)
    assert sorted(run.table("tokens", [], asked)) == sorted(asked)


def test_unknown_column_table_and_step_column_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown column of table 'rollouts' 'rewards'; "):
        Records.build(ROLLOUTS, {"rewards": [1.0]})
    with pytest.raises(UserError, match="needs column 'step'"):
        Records.build(ROLLOUTS, {"reward": [1.0]})
    run = open_run(written_run(tmp_path / "r"))
    with pytest.raises(UserError, match="unknown table 'token'"):
        run.table("token")
    writer = RunWriter(tmp_path / "s", {})
    said = r"unknown step column 'rewrd' \(one of your own has a slash, as 'loop/rewrd'\); did you"
    with pytest.raises(UserError, match=said):
        writer.append_step({"step": 1, "rewrd": 2.0})
    writer.append_step({"step": 1, "loop/rewrd": 2.0})
    writer.close("failed")


def test_a_run_shows_itself(tmp_path: Path) -> None:
    run = open_run(written_run(tmp_path / "r"))
    assert repr(run) == "Run('r', grpo, 3 steps, finished)"
    assert "<table" in run._repr_html_()
    assert isinstance(run, Run)


def test_a_notebook_shows_the_last_five_steps(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "r", steps=7))
    shown = re.findall(r"<tr>\s*<td>(\d+)</td>", run._repr_html_())
    assert shown == ["3", "4", "5", "6", "7"]


def test_files_are_readable_by_others_as_the_umask_says(tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    plain.write_text("")
    path = written_run(tmp_path / "r")
    files = [path / "manifest.json", *(path / "tokens").iterdir()]
    assert {f.stat().st_mode for f in files} == {plain.stat().st_mode}


def test_a_text_is_kept_under_a_trainer_s_own_name_alone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    RunWriter(path, {"name": "run"}).close("finished")
    log = path / "steps.jsonl"
    log.write_text('{"step": 1, "trainer/phase": "warm"}\n')
    assert open_run(path).steps["trainer/phase"].tolist() == ["warm"]
    log.write_text('{"step": 1, "reward": "warm"}\n')
    with pytest.raises(UserError, match="reward is not a number"):
        _ = open_run(path).steps


def test_another_tools_manifest_is_no_run_folder(tmp_path: Path) -> None:
    mine = write_fake_run(tmp_path / "deep" / "mine", steps=2)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "manifest.json").write_text('{"tool": "another"}')
    assert run_folders(tmp_path) == [mine]


def test_class_totals_of_several_processes_are_added_and_missing_ones_left_out() -> None:
    nan = float("nan")
    keys = {"step": [1, 1, 2, 1, 1], "sign": [-1, 1, 1, -1, 0], "regime": [1] * 5}
    mass, flow = [0.5, nan, 1.0, 0.25, 2.0], [nan, nan, 0.25, nan, 1.0]
    frame = pd.DataFrame(
        {**keys, "prob_bin": [3] * 5, "rank": [0, 0, 0, 1, 1], "tokens": [2, 3, 4, 10, 20],
         "grad_mass": mass, "pred_dentropy_sum": flow}
    )  # fmt: skip
    found = summed_classes(frame)
    assert found["step"].tolist() == [1, 1, 1, 2]
    assert found["tokens"].tolist() == [12, 20, 3, 4]
    assert found["cls"].tolist() == ["neg_peak", "none", "pos_peak", "pos_peak"]
    np.testing.assert_array_equal(found["grad_mass"], [0.75, 2.0, nan, 1.0])
    np.testing.assert_array_equal(found["pred_dentropy_sum"], [nan, 1.0, nan, 0.25])
    alone = frame[frame["rank"] == 0]
    assert summed_classes(alone).drop(columns="cls").equals(alone.drop(columns="rank"))


@pytest.mark.parametrize(
    ("rows", "ascending"),
    [
        ([[1, 0], [1, 1], [2, 0]], True), ([[1, 0], [1, 0]], False), ([[1, 1], [1, 0]], False),
        ([[2, 0], [1, 5]], False), ([[1, 5], [2, 0]], True), ([[1, 5]], True),
        ([[1, 0], [2, 0], [1, 5]], False), ([[1, 0], [3, 0], [2, 9]], False),
    ],
)  # fmt: skip
def test_rows_that_come_in_order_and_once(rows: list[list[int]], ascending: bool) -> None:
    assert reader._ascending(np.array(rows)) is ascending
