"""Checkpoints of a guard at their bounds: when one is due, which are kept, what a resume knows."""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.support.step_logs import write_steps
from wapo_analysis.record import beside
from wapo_analysis.record.beside import EVERY, Ring, acts, made_beside
from wapo_analysis.store import RunWriter, open_run

NOT_THERE: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "PAUSE", 0.0)


def filled(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "sub" / "weights").write_bytes(b"0" * 70)
    (folder / "state").write_bytes(b"0" * 30)


def there(root: Path) -> list[int]:
    return sorted(int(folder.name.split("-")[1]) for folder in root.glob("step-*"))


def test_the_first_step_and_every_third_after_one_are_due(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "c", NOT_THERE)
    assert ring.due(1)
    assert ring.write(7, filled)
    assert [step for step in range(7, 13) if ring.due(step)] == [10, 11, 12]
    assert EVERY == 3


@pytest.mark.parametrize(
    ("onset", "protected"), [(3, 1), (4, 1), (5, 1), (6, 4), (2, None), (1, None), (99, 7)]
)
def test_what_is_protected_holds_a_policy_from_before_the_onset(
    onset: int, protected: int | None, tmp_path: Path
) -> None:
    """The checkpoint of step s holds the policy that samples step s + 1."""
    ring = Ring(tmp_path / "c", NOT_THERE)
    for step in (1, 4, 7):
        assert ring.write(step, filled)
    assert ring.protect(onset) == protected
    assert ring.entry()["protected"] == ([] if protected is None else [protected])


def test_two_findings_are_protected_the_newest_ones(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "c", NOT_THERE)
    for step in (1, 4, 7, 10):
        ring.write(step, filled)
    for onset, kept in ((3, [1]), (6, [1, 4]), (3, [4, 1]), (9, [1, 7])):
        ring.protect(onset)
        assert ring.entry()["protected"] == kept
    for step in (13, 16, 19, 22):
        ring.write(step, filled)
    assert there(tmp_path / "c") == [1, 7, 13, 16, 19, 22]
    assert ring.entry()["steps"] == [1, 7, 13, 16, 19, 22]


def test_the_policy_that_earned_most_is_kept_the_first_of_equals(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "c", NOT_THERE)
    rewards = [0.1, 0.5, 0.5, 0.2, None, float("nan"), 0.1, 0.1, 0.1]
    for number, reward in enumerate(rewards):
        ring.write(1 + 3 * number, filled)
        for part in (reward, reward):  # of the steps that this policy samples
            ring.earned(part)
    entry = ring.entry()
    assert (entry["best"], entry["best_reward"]) == (4, 0.5)
    assert there(tmp_path / "c") == [4, 16, 19, 22, 25]
    ring.earned("text")
    assert ring._rewards == [0.1, 0.1]


@pytest.mark.parametrize(("free", "written"), [(200, True), (199, False)])
def test_a_disk_must_have_room_for_two(
    free: int, written: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    ring = Ring(tmp_path / "c", NOT_THERE)
    assert ring.write(1, filled)
    assert ring.entry()["bytes"] == 100
    usage = SimpleNamespace(free=free)
    monkeypatch.setattr(beside.shutil, "disk_usage", lambda path: usage)
    with caplog.at_level(logging.WARNING):
        for step in (4, 7):
            assert ring.write(step, filled) is written
    assert there(tmp_path / "c") == ([1, 4, 7] if written else [1])
    told = [line for line in caplog.messages if "the guard's checkpoint of step 4" in line]
    assert len(told) == len(caplog.messages) == (not written), "once"


def test_a_step_that_is_there_already_is_not_written_again(tmp_path: Path) -> None:
    ring = Ring(tmp_path / "c", NOT_THERE)
    ring.write(1, filled)

    def never(folder: Path) -> None:
        raise AssertionError

    assert ring.write(1, never)


def test_a_resumed_ring_knows_what_is_still_there(tmp_path: Path) -> None:
    root = tmp_path / "c"
    for step in (1, 4, 7, 10, 13):
        (root / f"step-{step:08d}").mkdir(parents=True)
    earlier = {
        "steps": [1, 4, 7, 10, 13, 16], "protected": [1, 16], "best": 4, "best_reward": 0.5
    }  # fmt: skip
    ring = Ring(root, earlier)
    assert ring.held == {1, 4, 7, 10, 13}
    assert ring.entry()["protected"] == [1]
    assert (ring.entry()["best"], ring.entry()["best_reward"]) == (4, 0.5)
    assert not ring.due(15)
    assert ring.due(16)
    gone = Ring(root, {**earlier, "best": 16})
    assert (gone.entry()["best"], gone.entry()["best_reward"]) == (None, None)


def test_of_what_a_guard_did_the_steps_up_to_a_resume_are_kept(tmp_path: Path) -> None:
    assert acts(tmp_path / "none", 5) == {}
    path = write_steps(tmp_path / "r", {"reward": [0.1] * 9})
    assert acts(path, 5) == {}
    did = [{"step": step, "did": "checkpoint"} for step in (3, 5, 6)]
    kept = {"steps": [3, 5, 6], "best": 3}
    manifest = open_run(path).manifest
    writer = RunWriter(path, manifest, resume_after=9)
    writer.update_manifest(guard=did, guard_checkpoints=kept)
    writer.close("finished")
    assert acts(path, 5) == {
        "guard": did[:2], "guard_checkpoints": {"steps": [3, 5], "best": 3}
    }  # fmt: skip
    assert "guard" not in acts(path, 2)


@pytest.mark.parametrize(
    ("given", "judged", "ring"),
    [
        ((False, None, None), False, False), ((True, None, None), True, False),
        ((False, "checkpoint", None), True, True), ((False, None, "stop"), True, True),
        ((False, print, None), True, False),
    ],
)  # fmt: skip
def test_only_what_was_asked_for_is_made(
    given: tuple[Any, ...], judged: bool, ring: bool, tmp_path: Path
) -> None:
    found = made_beside(tmp_path, lambda **changes: None, *given, {})
    assert [part is not None for part in found] == [judged, ring]
