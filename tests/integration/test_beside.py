"""What runs beside a training: top tokens and audit in TRL, the guard everywhere."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from experiments.bug_bench.loop import train as train_loop
from tests.support.builders import write_fake_run
from tests.support.step_logs import ramp, write_flows, write_steps
from wapo_analysis import Recorder, TrainConfig
from wapo_analysis.beside import BesideTraining
from wapo_analysis.errors import UserError
from wapo_analysis.record.beside import PROTECTED, RECENT, Ring, acts
from wapo_analysis.store import open_run
from wapo_analysis.train.loop import train

KEYS = ["step", "minibatch", "rank", "rollout", "position"]
SHORT = TrainConfig(
    steps=30, prompts_per_step=3, rollouts_per_prompt=4, minibatches=1, max_new_tokens=24,
    rescore_every=0, checkpoint_every=0, keep_checkpoints=20, token_every=0, device="cpu",
)  # fmt: skip
EXPLODES = {"lr": 3e-3, "include_bins": ("neg_peak",), "epochs": 3, "warmup_steps": 15}


def config(**settings: Any) -> TrainConfig:
    from dataclasses import replace

    return replace(SHORT, **settings)


def test_wrong_actions_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="on_warning must be 'checkpoint' or a function"):
        Recorder(tmp_path / "r", on_warning="stop")
    assert not (tmp_path / "r").exists(), "a refused run leaves no folder"


def test_a_guard_with_nothing_to_do_changes_no_weight(tmp_path: Path) -> None:
    weights = [
        train(config(steps=3, **given), tmp_path / str(n)).module.state_dict()
        for n, given in enumerate([{}, {"on_warning": "checkpoint", "on_critical": "stop"}])
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert "guard" not in json.loads((tmp_path / "1" / "manifest.json").read_text())


@pytest.mark.slow
def test_a_run_that_explodes_is_stopped_after_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wapo_analysis.beside.REST", 0.0)
    monkeypatch.setattr("wapo_analysis.record.beside.PAUSE", 0.0)
    run = tmp_path / "r"
    with pytest.raises(KeyboardInterrupt):
        train(config(on_warning="checkpoint", on_critical="stop", steps=60, **EXPLODES), run)
    found = open_run(run)
    did = found.manifest["guard"]
    assert found.status == "interrupted"
    assert {entry["did"] for entry in did} <= {"checkpoint", "stop"}
    assert "stop" in {entry["did"] for entry in did}
    saved = sorted(int(f.name.split("-")[1]) for f in (run / "checkpoints").glob("step-*"))
    kept = [entry["checkpoint"] for entry in did if entry.get("checkpoint") is not None]
    assert kept
    assert set(kept[-PROTECTED:]) <= set(saved), "what a finding protects stays"
    assert len(saved) <= RECENT + PROTECTED + 2, "few are kept"
    assert saved[-1] == found.steps.step.iloc[-1] < 60
    resumed = config(steps=saved[-1] + 1, **EXPLODES)
    assert train(resumed, run, resume=True) is not None


def filled(folder: Path) -> None:
    (folder / "weights").write_bytes(b"0" * 100)


def steps_in(root: Path) -> list[int]:
    return sorted(int(f.name.split("-")[1]) for f in root.glob("step-*"))


def test_the_ring_keeps_few_checkpoints_and_the_right_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wapo_analysis.record.beside.PAUSE", 0.0)
    root = tmp_path / "checkpoints"
    ring = Ring(root, {})
    for step in range(1, 61):
        ring.earned(step / 31 if step <= 31 else 0.0)  # the policy after step 28 earns most
        if ring.due(step):
            assert ring.write(step, filled)
        if step == 45:
            assert ring.protect(42) == 40  # it holds the policy that sampled step 41
        assert len(steps_in(root)) <= RECENT + 1 + PROTECTED
    assert steps_in(root) == [28, 40, *(49 + 3 * n for n in range(4))]
    assert ring.protect(41) == 28
    again = Ring(root, json.loads(json.dumps(ring.entry())))
    assert again.held == ring.held == set(steps_in(root))
    assert not again.due(60)
    assert again.due(61)  # 3 after the last


def test_the_ring_rests_ten_times_as_long_as_a_checkpoint_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("wapo_analysis.record.beside.perf_counter", lambda: now[0])

    def slowly(folder: Path) -> None:
        filled(folder)
        now[0] += 2.0

    ring = Ring(tmp_path / "checkpoints", {})
    assert ring.write(1, slowly)
    now[0] += 19.9
    assert not ring.due(9)
    now[0] += 0.2
    assert ring.due(9)


def test_a_nearly_full_disk_gets_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    free = [10**9]
    monkeypatch.setattr(
        "wapo_analysis.record.beside.shutil.disk_usage", lambda _: SimpleNamespace(free=free[0])
    )
    ring = Ring(tmp_path / "checkpoints", {})
    assert ring.write(1, filled), "100 bytes"
    free[0] = 250
    assert ring.write(4, filled)
    free[0] = 150
    assert not ring.write(7, filled), "no room for two"
    assert steps_in(tmp_path / "checkpoints") == [1, 4]
    assert "the disk is nearly full" in caplog.text


def test_a_checkpoint_that_cannot_be_written_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("wapo_analysis.record.beside.PAUSE", 0.0)

    def fails(folder: Path) -> None:
        (folder / "half").write_bytes(b"0")
        raise OSError(28, "No space left on device")

    with Recorder(tmp_path / "r", synchronous=True, on_warning="checkpoint") as recorder:
        for step in range(1, 13):
            recorder.finish_step(step, reward=0.5)
            recorder.checkpoint(filled if step < 4 else fails)
    assert recorder.failure is None
    assert caplog.text.count("was not written") == 1
    assert [f.name for f in (tmp_path / "r" / "checkpoints").iterdir()] == ["step-00000001"]
    assert open_run(tmp_path / "r").manifest["guard_checkpoints"]["steps"] == [1]


def test_what_the_gradient_is_made_of_keeps_no_checkpoint_but_is_told_a_function(
    tmp_path: Path,
) -> None:
    run = write_steps(tmp_path / "r", {"reward": np.full(60, 0.4)})
    even = np.full(60, 1.0)
    masses = {(-1, 1): ramp(1, 12, 60, 20, 20), (1, 0): even, (1, 1): even, (-1, 0): even}
    write_flows(run, masses, "grad_mass")
    did: list[Any] = []
    told: list[str] = []

    def note(guard: list[Any]) -> None:
        did[:] = guard

    BesideTraining(run, note, False, "checkpoint", "stop").judge(60, open_run(run))
    assert did == []
    function = BesideTraining(run, note, False, lambda found: told.append(found["name"]), None)
    function.judge(60, open_run(run))
    assert set(told) == {"one_class_takes_the_gradient", "negative_mass_outweighs"}


def test_a_run_that_goes_on_knows_what_its_guard_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wapo_analysis.record.beside.PAUSE", 0.0)
    monkeypatch.setattr("wapo_analysis.beside.REST", 0.0)
    guard: Any = {"on_warning": "checkpoint", "on_critical": "stop", "synchronous": True}
    for resume_after in (None, 30):
        with Recorder(tmp_path / "r", resume_after=resume_after, **guard) as recorder:
            for step in range((resume_after or 0) + 1, (resume_after or 0) + 31):
                reward = 0.8 + 0.02 * (step % 3) if step < 20 else 0.0
                recorder.finish_step(step, reward=reward)
                recorder.checkpoint(filled)
            assert recorder.asked("stop") is (resume_after is None), "only what is new"
    did = open_run(tmp_path / "r").manifest["guard"]
    assert did[0]["checkpoint"] in steps_in(tmp_path / "r" / "checkpoints")
    assert did[0]["checkpoint"] < 20
    assert len({(entry["finding"], entry["severity"]) for entry in did}) == len(did)


def test_a_loop_of_one_s_own_asks_what_the_guard_wants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wapo_analysis.beside.REST", 0.0)
    told: list[dict[str, Any]] = []
    with Recorder(tmp_path / "r", synchronous=True, on_critical=told.append) as recorder:
        for step in range(1, 41):
            late = step > 20
            recorder.finish_step(
                step, reward=0.0 if late else 0.8, entropy=3.0 if late else 0.5 + 0.01 * (step % 3)
            )
    assert told, "a critical finding reaches the function"
    assert {"name", "severity", "message", "at"} <= set(told[0])
    assert not (tmp_path / "r" / "checkpoints").exists(), "a function keeps what it wants"
    assert open_run(tmp_path / "r").manifest["guard"][0]["finding"] == told[0]["name"]


def test_a_run_that_goes_on_after_step_20_keeps_what_was_done_up_to_it(tmp_path: Path) -> None:
    did = [{"step": step, "did": "checkpoint"} for step in (10, 20, 21)]
    kept = {"steps": [17, 20, 23], "protected": [17], "best": None}
    manifest = {"guard": did, "guard_checkpoints": kept}
    run = write_fake_run(tmp_path / "r", steps=2, manifest=manifest)
    found = acts(run, 20)
    assert [entry["step"] for entry in found["guard"]] == [10, 20]
    assert found["guard_checkpoints"] == kept | {"steps": [17, 20]}
    assert acts(run, 9) == {"guard_checkpoints": kept | {"steps": []}}
    assert acts(tmp_path / "none", 9) == {}


@pytest.mark.parametrize("error", [RuntimeError("no"), SystemExit(1)])
def test_a_failing_function_never_stops_the_training(tmp_path: Path, error: BaseException) -> None:
    def fails(finding: dict[str, Any]) -> None:
        raise error

    with Recorder(tmp_path / "r", synchronous=True, on_warning=fails) as recorder:
        for step in range(1, 41):
            recorder.finish_step(step, reward=0.5, entropy=0.5 if step < 20 else 4.0)
    assert recorder.failure is None
    assert len(open_run(tmp_path / "r").steps) == 40


def test_the_guard_rests_between_two_looks(tmp_path: Path) -> None:
    looks: list[int] = []
    beside = BesideTraining(tmp_path, lambda **_: None, False, "checkpoint", None)
    beside._look = looks.append  # type: ignore[method-assign]
    beside._next = float("inf")
    beside(1)
    assert looks == []


def test_audit_is_printed_once_while_a_loop_goes_on(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_loop(tmp_path / "r", steps=5, audit=True)
    said = capfd.readouterr().err
    assert said.count("No deviation found") == 1
    assert "behaves as grpo (mean over each rollout's tokens), as declared" in said


trl = pytest.importorskip("trl")


def test_trl_records_the_most_probable_tokens(tmp_path: Path) -> None:
    from tests.support.trl_toy import run, toy_trainer
    from wapo_analysis import attach

    plain = run(toy_trainer(tmp_path / "a"))
    trainer = toy_trainer(tmp_path / "b")
    with attach(trainer, tmp_path / "run", detail="full", audit=True):
        watched = run(trainer)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    opened = open_run(tmp_path / "run")
    both = opened.topk().merge(opened.tokens(), on=KEYS, suffixes=("", "_own"))
    assert len(both) >= 8 * 4
    own = both[both.token_id == both.token_id_own]
    np.testing.assert_allclose(own.logp, own.logp_own, rtol=2e-3, atol=2e-4)
    np.testing.assert_allclose(own.logp_after, own.logp_after_own, rtol=2e-3, atol=2e-4)


def test_trl_stops_where_the_guard_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.support.trl_toy import run, toy_trainer
    from wapo_analysis import attach

    monkeypatch.setattr(BesideTraining, "_look", lambda self, step: self._asked.add("stop"))
    trainer = toy_trainer(tmp_path / "b", max_steps=5, save_strategy="no")
    with attach(trainer, tmp_path / "run", on_critical="stop") as attachment:
        monkeypatch.setattr(attachment.recorder._steps._thread, "_synchronous", True)
        run(trainer)
    assert trainer.state.global_step < 5
    assert list((tmp_path / "b").glob("checkpoint-*"))


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_trl_goes_on_from_a_checkpoint_of_the_guard_and_keeps_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.trl_toy import run, toy_trainer
    from wapo_analysis import attach

    monkeypatch.setattr("wapo_analysis.record.beside.PAUSE", 0.0)
    monkeypatch.setattr("wapo_analysis.record.beside.EVERY", 2)
    every: Any = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    plain = run(toy_trainer(tmp_path / "a", **every))
    trainer = toy_trainer(tmp_path / "b", **every)
    with attach(trainer, tmp_path / "run", on_warning="checkpoint"):
        watched = run(trainer)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    own, theirs = (sorted(f.name for f in (tmp_path / n).glob("checkpoint-*")) for n in "ba")
    assert own == theirs
    assert steps_in(tmp_path / "run" / "checkpoints") == [1, 3, 5]
    again = toy_trainer(tmp_path / "c", **every)
    start = tmp_path / "run" / "checkpoints" / "step-00000003"
    with attach(again, tmp_path / "run", on_warning="checkpoint", resume_after=3):
        again.train(resume_from_checkpoint=str(start))
    assert list(open_run(tmp_path / "run").steps.step) == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(plain[n], p) for n, p in again.model.state_dict().items())
