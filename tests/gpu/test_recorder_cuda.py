"""The way from a GPU to the run folder: one copy, nobody waits, the same numbers."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments.bench.micro_step import MicroStep, Shape, Watcher
from tests.support.pretend_device import LEDGER, installed
from tests.support.recorder_passes import ROLLOUTS, record, spell, tokens
from wapo_analysis.record.recorder import Recorder, TokenPass
from wapo_analysis.record.tokens import DevicePass, on_host
from wapo_analysis.store import open_run

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]


def on_gpu(given: TokenPass) -> TokenPass:
    moved = {name: values.cuda() for name, values in given.given().items()}
    return TokenPass(**moved, minibatch=given.minibatch)


def test_a_pass_from_the_gpu_has_the_numbers_of_the_host() -> None:
    given = tokens(1)
    here, there = on_host(given), on_host(on_gpu(given))
    assert isinstance(there, DevicePass)
    expected, found = here.columns(1, 0), there.columns(1, 0)
    assert all((expected[name] == found[name]).all() for name in expected)


def test_starting_the_copy_does_not_wait_for_the_device() -> None:
    given = on_gpu(tokens(1, rows=1000))
    DevicePass(given).columns(1, 0)  # pinned memory is allocated once
    torch.cuda.synchronize()
    started = torch.cuda.Event()
    torch.cuda._sleep(200_000_000)  # cycles: a tenth of a second
    started.record()
    waiting = DevicePass(given)
    assert not started.query(), "the copy was started while the device was still at work"
    assert len(waiting.columns(1, 0)["logp"]) == 1000
    assert started.query()


def test_a_run_recorded_from_the_gpu_equals_that_from_the_host(tmp_path: Path) -> None:
    host = Recorder(tmp_path / "host", {"name": "r"})
    record(host, range(1, 5))
    host.close("finished")
    device = Recorder(tmp_path / "gpu", {"name": "r"})
    for step in range(1, 5):
        for number in range(2):
            device.watch_pass(on_gpu(tokens(10 * step + number, minibatch=number)))
        device.finish_step(step, reward=step / 10, rollouts=ROLLOUTS, texts=spell)
    device.close("finished")
    assert device.failure is None
    one, other = open_run(tmp_path / "host"), open_run(tmp_path / "gpu")
    assert one.tokens().equals(other.tokens())
    assert one.classes.equals(other.classes)
    assert one.vocab == other.vocab


def test_a_watched_step_on_the_gpu_holds_its_tokens(tmp_path: Path) -> None:
    step = MicroStep(Shape(300, 32, 64, 2, 2, 2, "tiny"), batch=2, length=9, device="cuda")
    step.beside(Watcher.into(tmp_path / "run"))
    rows = open_run(tmp_path / "run").tokens()
    assert len(rows) == step.tokens
    assert set(rows["rollout"]) == {0, 1}


def test_off_schedule_nothing_but_totals_leaves_the_gpu(tmp_path: Path) -> None:
    recorders = [Recorder(tmp_path / name, {"name": "r"}, token_every=2) for name in "hd"]
    copied = []
    for step, rows in ((1, 4000), (2, 4000), (3, 4000), (4, 40_000)):
        for recorder, move in zip(recorders, (TokenPass, on_gpu), strict=True):
            before = LEDGER.to_host
            for number in range(2):
                given = tokens(10 * step + number, rows, minibatch=number)
                recorder.watch_pass(given if move is TokenPass else move(given))
            with LEDGER.counting() as waits:
                recorder.finish_step(step, reward=0.5, sums={}, texts=spell)
            assert not waits or installed()
            recorder.flush()
        copied.append(LEDGER.to_host - before)
    for recorder in recorders:
        recorder.close("finished")
        assert recorder.failure is None
    host, device = (open_run(tmp_path / name) for name in "hd")
    pd.testing.assert_frame_equal(host.classes, device.classes, rtol=1e-12, atol=0)
    assert host.tokens().equals(device.tokens())
    timed = [name for name in host.steps if name.startswith("seconds")]
    one, other = (run.steps.drop(columns=timed) for run in (host, device))
    pd.testing.assert_frame_equal(one, other, rtol=1e-12, atol=0)
    if installed():
        assert copied[0] == copied[2] > 2 * 4000 * 4 * 10
        assert copied[1] == copied[3] < 2 * 30_000, "the same for four thousand tokens and forty"
