"""The recorder beside training: packing, order, the same files from another thread."""

import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support.recorder_passes import (
    ROLLOUTS,
    ROWS,
    record,
    spell,
    stuck,
    tokens,
    without_times,
)
from wapo_analysis.record import on_schedule
from wapo_analysis.record import step as step_module
from wapo_analysis.record.recorder import Recorder, TokenPass
from wapo_analysis.record.step import OpenStep
from wapo_analysis.record.tokens import DevicePass, HostPass
from wapo_analysis.record.topk import hashed
from wapo_analysis.store import open_run

ROOT = Path(__file__).parents[3]

# ---- the way to the host ------------------------------------------------------------------------


def test_a_packed_pass_has_the_bits_of_the_plain_one() -> None:
    given = tokens(1)
    given.entropy = given.entropy.to(torch.bfloat16)  # type: ignore[union-attr]
    given.coef = given.coef.double()  # type: ignore[union-attr]
    given.group = torch.full_like(given.group, -1)
    given.rollout = given.rollout.flip(0)[::1]
    given.logp_after, given.kept = torch.full((ROWS,), torch.nan), None
    plain, packed = HostPass(given).columns(7, 3), DevicePass(given).columns(7, 3)
    assert set(plain) == set(packed)
    for name, values in plain.items():
        wanted = values.astype(packed[name].dtype)
        assert wanted.tobytes() == packed[name].tobytes(), name
    assert packed["kept"].all()
    assert (packed["step"] == 7).all()


@pytest.mark.parametrize(
    ("given", "kept"), [((0, 1, 2), [0, 1, 2]), ((1, 1, 2), [1, 2, 3]), ((5, 1, 9), [5, 6, 9])]
)
def test_a_step_that_was_there_already_takes_no_other_ones_place(
    given: tuple[int, ...], kept: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Numbers of epochs, or a loop that begins at 1 again."""
    with Recorder(tmp_path / "r", topk=0) as recorder:
        for number in given:
            record(recorder, [number], passes=1)
    assert recorder.failure is None
    found = open_run(tmp_path / "r")
    assert found.steps.step.tolist() == kept
    assert found.tokens().groupby("step").size().tolist() == [ROWS] * 3
    assert len(caplog.messages) == (list(given) != kept)


def test_what_is_given_may_be_lists_and_columns_and_a_wrong_clip_is_a_line(tmp_path: Path) -> None:
    logits = torch.randn(4, 3, 7, requires_grad=True)
    ids, mask = torch.randint(7, (4, 3)), torch.ones(4, 3)
    for number, given in enumerate(([1.0, 2.0, -1.0, 0.5], torch.ones(4, 1), np.ones(4))):
        with Recorder(tmp_path / str(number)) as recorder:
            logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
            recorder.watch(logp, ids, mask, given, [0, 0, 1, 1])  # type: ignore[arg-type]
            logp.sum().backward()
            recorder.finish_step(1, reward=[1.0, 0.0, 1.0, 0.0])
        assert recorder.failure is None
        rows = open_run(tmp_path / str(number)).tokens()
        assert rows.advantage.tolist() == np.repeat(np.ravel(given), 3).tolist()
    for wrong, said in (({"clip": 0.2}, "clip must be two bounds"), ({}, "logp must be a tensor")):
        recorder = Recorder(tmp_path / said)
        bad = logp if wrong else logp.detach().numpy()
        recorder.watch(bad, ids, mask, torch.ones(4), None, **wrong)  # type: ignore[arg-type]
        assert said in str(recorder.failure)
        recorder.close()


def test_schedules_hold_until_the_recorder_fails(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, {"name": "r"}, rescore_every=3, probe_every=2, synchronous=True)
    steps = range(1, 8)
    assert [step for step in steps if recorder.wants_rescore(step)] == [1, 4, 7]
    assert [step for step in steps if recorder.wants_probe(step)] == [2, 4, 6]
    recorder.fail(RuntimeError("disk"))
    assert not any(recorder.wants_rescore(step) or recorder.wants_probe(step) for step in steps)
    recorder.close()


def test_a_pass_on_the_host_is_not_copied() -> None:
    given = tokens(1)
    assert np.shares_memory(HostPass(given).columns(1, 0)["logp"], given.logp.numpy())


def test_a_packed_pass_takes_one_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    copies = []
    real = torch.Tensor.copy_
    monkeypatch.setattr(torch.Tensor, "copy_", lambda *a, **k: copies.append(1) or real(*a, **k))
    DevicePass(tokens(1))
    assert len(copies) == 1


# ---- same files, another thread -----------------------------------------------------------------


def test_the_thread_writes_the_same_bytes_as_the_caller_would(tmp_path: Path) -> None:
    for name, synchronous in (("caller", True), ("thread", False)):
        recorder = Recorder(
            tmp_path / name, {"name": "r"}, token_fraction=0.6, synchronous=synchronous
        )
        record(recorder, range(1, 8))
        recorder.close("finished")
        assert recorder.failure is None
    here, there = tmp_path / "caller", tmp_path / "thread"
    files = sorted(f.relative_to(here) for f in here.rglob("*.parquet"))
    assert len(files) == 7 * 3 + 1
    assert files == sorted(f.relative_to(there) for f in there.rglob("*.parquet"))
    for file in files:
        assert (here / file).read_bytes() == (there / file).read_bytes(), file
    assert without_times(open_run(here)).equals(without_times(open_run(there)))


def test_what_a_step_holds(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"}, token_every=2, token_fraction=0.5)
    record(recorder, range(1, 4))
    recorder.flush()
    run = open_run(tmp_path / "r")
    assert run.classes.tokens.sum() == 3 * 2 * ROWS, "written before the end"
    assert run.token_steps() == [1, 3]
    assert [part.name for part in sorted((run.path / "tokens").iterdir())] == [
        "part-00000001-0.parquet",
        "part-00000003-0.parquet",
    ], "no file of a step without token rows"
    assert 0 < len(run.tokens()) < 2 * 2 * ROWS
    assert run.steps.token_fraction.tolist() == [0.5, 0.0, 0.5]
    assert (run.steps.seconds_writer > 0).all()
    assert set(run.tokens().token_id) <= set(run.vocab)
    assert run.vocab[int(run.tokens().token_id[0])] == f"<{run.tokens().token_id[0]}>"
    recorder.close("finished")


def test_settling_early_changes_no_file(tmp_path: Path) -> None:
    for name in ("early", "late"):
        recorder = Recorder(tmp_path / name, {"name": "r"})
        recorder.watch_pass(tokens(1))
        if name == "early":
            rows = recorder.settle(1, spell)
            assert rows is not None
            assert np.isfinite(rows["grad_norm"]).all()
        recorder.watch_pass(tokens(2, minibatch=1))
        recorder.finish_step(1, rollouts=ROLLOUTS, texts=spell)
        recorder.close("finished")
    early, late = open_run(tmp_path / "early"), open_run(tmp_path / "late")
    assert early.tokens().equals(late.tokens())
    assert early.classes.equals(late.classes)
    assert early.vocab == late.vocab


def test_columns_of_the_tokens_are_computed_in_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []
    real = step_module.pass_sums

    def pass_sums(*given: Any) -> dict[str, float]:
        threads.append(threading.current_thread().name)
        return real(*given)

    monkeypatch.setattr(step_module, "pass_sums", pass_sums)
    recorder = Recorder(tmp_path / "r", {"name": "r"})
    recorder.watch_pass(tokens(1))
    recorder.finish_step(1, reward=0.5, sums={}, kl_old=7.0)
    recorder.finish_step(2, sums={}, entropy=9.0)
    recorder.watch_pass(tokens(3))
    recorder.finish_step(3, entropy=9.0)
    recorder.close("finished")
    steps = open_run(tmp_path / "r").steps
    assert steps.entropy.tolist() == pytest.approx([float(tokens(1).entropy.mean()), 9.0, 9.0])
    assert steps.kl_old[0] == 7.0, "a column the caller gives stays"
    assert steps.reward[0] == 0.5
    assert steps.kept_tokens.tolist()[0] == int(tokens(1).kept.sum())
    assert steps.kept_tokens.isna().tolist() == [False, True, True], "not asked for is not computed"
    assert threads == ["wapo-writer"]


def test_tokens_that_come_from_a_device_are_named_by_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_module, "on_host", DevicePass)
    threads: list[str] = []

    def named(ids: list[int]) -> list[str]:
        threads.append(threading.current_thread().name)
        return spell(ids)

    recorder = Recorder(tmp_path / "r", {"name": "r"})
    for step in range(1, 4):
        recorder.watch_pass(tokens(step))
        recorder.finish_step(step, texts=named)
        recorder.flush()
    recorder.close("finished")
    assert len(threads) == 3
    assert set(threads) == {threading.current_thread().name}
    run = open_run(tmp_path / "r")
    assert set(run.tokens().token_id) == set(run.vocab)


def test_names_given_beforehand_stand_in_the_vocabulary(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"})
    recorder.name_tokens([3, 5, 3], spell)
    recorder.finish_step(1, reward=0.5)
    recorder.close("finished")
    assert open_run(tmp_path / "r").vocab == {3: "<3>", 5: "<5>"}


def test_threads_and_random_state_of_torch_are_left_alone(tmp_path: Path) -> None:
    before, count = torch.get_rng_state(), torch.get_num_threads()
    recorder = Recorder(tmp_path / "r", {"name": "r"}, token_fraction=0.5)
    record(recorder, range(1, 5))
    recorder.close("finished")
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == count


def test_arrays_the_caller_writes_again_are_copied(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path / "r", {"name": "r"})
    reward = np.array([1.0, 0.5], np.float32)
    with stuck(recorder):
        recorder.finish_step(1, rollouts={"group": [0, 0], "rollout": [0, 1], "reward": reward})
        reward[:] = 7
    recorder.close("finished")
    assert open_run(tmp_path / "r").rollouts.reward.tolist() == [1.0, 0.5]


def test_coef_is_minus_the_gradient_of_the_loss(tmp_path: Path) -> None:
    """What pushes a token up has a positive coefficient, however the pass is given."""
    weight = torch.tensor([[0.5, -2.0, 0.25], [1.0, 4.0, 0.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    for name in ("flat", "padded"):
        logp = torch.full((2, 3), -0.5, requires_grad=True)
        with Recorder(tmp_path / name, store_bits=23) as recorder:
            if name == "flat":
                flat = logp[mask.bool()]
                place = torch.arange(5)
                given = weight[mask.bool()]
                recorder.watch_pass(TokenPass(place, place, place, place, given, flat), flat)
                loss = -(flat * given).sum()
            else:
                recorder.watch(logp, None, mask, weight, None, loss_scale=8.0)
                loss = -(8 * logp * weight * mask).sum()
            loss.backward()
            recorder.finish_step(1, loss=loss)
        assert recorder.failure is None
        found = open_run(tmp_path / name).tokens()
        assert found["coef"].tolist() == weight[mask.bool()].tolist()
        assert (found["minibatch"] == 0).all(), "counted from 0 where nobody gives it"


def test_a_recorder_without_a_folder_takes_everything_and_keeps_nothing(tmp_path: Path) -> None:
    recorder = Recorder(None, token_every=1, rescore_every=1)
    record(recorder, range(1, 3))
    recorder.note(label="x")
    assert recorder.settle(3) is None
    recorder.flush()
    recorder.close()
    assert (recorder.path, recorder.failure, recorder.seconds) == (None, None, 0.0)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sequence_level", [False, True])
def test_blocks_of_rows_give_the_sums_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, sequence_level: bool
) -> None:
    given = tokens(3, rows=999)
    given.entropy[::7] = float("nan")
    given.logp_old[: len(given.logp_old) // 2] -= 0.4
    whole, blocks = (
        OpenStep([given]).job({"step": 4}, {}, sums={}, rank=0, sequence_level=sequence_level)
        for _ in range(2)
    )
    whole.condense()
    monkeypatch.setattr(step_module, "_BLOCK", 32)
    blocks.condense()
    assert set(whole.row) == set(blocks.row)
    for name, value in whole.row.items():
        assert blocks.row[name] == pytest.approx(value, rel=1e-12), name
    (one,), (many,) = whole._totals, blocks._totals
    assert one.columns.keys() == many.columns.keys()
    for name, values in one.columns.items():
        np.testing.assert_allclose(many[name], values, rtol=1e-12, err_msg=name)
    for name, values in whole._chosen[0].columns.items():
        np.testing.assert_array_equal(blocks._chosen[0][name], values, err_msg=name)


def test_a_schedule_begins_with_the_first_step() -> None:
    due = {every: [s for s in range(1, 10) if on_schedule(s, every)] for every in (0, 1, 4)}
    assert due == {0: [], 1: list(range(1, 10)), 4: [1, 5, 9]}


def test_the_share_of_rollouts_is_chosen_by_one_hash_everywhere() -> None:
    """A run that goes on elsewhere keeps the same rollouts: splitmix64, here by whole numbers."""

    def mixed(rollout: int, step: int) -> float:
        x = (rollout + 1) * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9
        x %= 2**64
        x = (x ^ x >> 31) * 0x94D049BB133111EB % 2**64
        return (x >> 11) / 2**53

    for step in (1, 2, 10**6):
        rollouts = np.array([0, 1, 7, 10**6])
        assert hashed(rollouts, step).tolist() == [mixed(int(r), step) for r in rollouts]
    drawn = hashed(np.arange(4000), 3)
    assert np.histogram(drawn, 4, (0, 1))[0] == pytest.approx([1000] * 4, abs=100)


def test_of_a_loss_in_bfloat16_the_ratio_stays_its_own(tmp_path: Path) -> None:
    """Log-probabilities from the logits are the more exact; the old ones move along with them."""
    g = torch.Generator().manual_seed(1)
    logits, ids = 2 * torch.randn(6, 5, 11, generator=g), torch.randint(11, (6, 5), generator=g)
    exact = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    logp, old = exact.bfloat16(), (exact + 0.4 * torch.randn(6, 5, generator=g)).bfloat16()
    ones = torch.ones(6, 5)
    with Recorder(tmp_path / "r", synchronous=True) as recorder:
        recorder.watch(logp, ids, ones, ones[:, 0], groups=None, logits=logits, logp_old=old)
        recorder.finish_step(1)
        assert recorder.failure is None
    rows = open_run(tmp_path / "r").tokens()
    np.testing.assert_allclose(rows["logp"], exact.flatten(), rtol=4e-5, atol=1e-7)
    ratio = (logp - old).float().flatten()
    np.testing.assert_allclose(rows["logp"] - rows["logp_old"], ratio, atol=2e-4)
    off = old.float().flatten().numpy() - rows["logp_old"]
    assert off.abs().max() > 1e-3, "the old ones are not those given"
