"""What ``attach`` sets of a trainer's watching, unless said."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.unit.capture.test_trl_facade import Own, with_head
from wapo_analysis.capture import trl
from wapo_analysis.capture.trl import DETAILS, Attachment, attach
from wapo_analysis.errors import UserError
from wapo_analysis.record import on_schedule
from wapo_analysis.store import Manifest, read_manifest
from wapo_analysis.store.manifest import write_manifest

STEPS = range(1, 26)
EVERY, TENTH, NEVER = list(STEPS), [1, 11, 21], list[int]()


@pytest.mark.parametrize(
    ("detail", "rows", "again", "exact"),
    [
        ("totals", NEVER, NEVER, TENTH),
        ("sampled", TENTH, TENTH, TENTH),
        ("full", EVERY, EVERY, EVERY),
    ],
)
def test_a_detail_says_of_which_steps_rows_are_written_scored_again_and_exact(
    detail: str, rows: list[int], again: list[int], exact: list[int]
) -> None:
    every = DETAILS[detail]
    for name, steps in (("token_every", rows), ("rescore_every", again), ("exact_every", exact)):
        assert [step for step in STEPS if on_schedule(step, every[name])] == steps


class Watcher:
    """Keeps what a watcher is given."""

    given: dict[str, Any]

    def __init__(self, watched: Any, recorder: Any, patches: Any, **given: Any) -> None:
        Watcher.given = given


@pytest.fixture
def raw(monkeypatch: pytest.MonkeyPatch) -> Own:
    monkeypatch.setattr(trl, "TrlWatcher", Watcher)
    own = Own(model=with_head())
    own.accelerator.process_index, own.accelerator.num_processes = 0, 1
    own.waited = []
    own.accelerator.wait_for_everyone = lambda: own.waited.append(1)
    return own


def attached(raw: Own, path: Path, **given: Any) -> Attachment:
    with attach(raw, path, **given) as attachment:
        return attachment


def test_what_is_not_said_is_sampled_passive_and_without_probes(raw: Own, tmp_path: Path) -> None:
    recorder = attached(raw, tmp_path / "r").recorder
    assert Watcher.given == {
        "exact_every": 10, "log_metrics": True, "probe_rows": 16, "replace": False,
        "resume_after": None,
    }  # fmt: skip
    assert (recorder.token_every, recorder.rescore_every, recorder.probe_every) == (10, 10, 0)
    manifest = read_manifest(tmp_path / "r")
    assert manifest["capture"] == {"mode": "passive", "rule": "as set"}
    assert manifest["token_fraction"] == 1.0
    assert not recorder.sequence_level
    assert raw.waited == []
    assert "_wapo_attachment" not in vars(raw)


@pytest.mark.parametrize(
    ("given", "exact"),
    [
        ({"token_every": 3}, 3), ({"exact_every": 0}, 0), ({"token_every": 3, "exact_every": 0}, 0),
        ({"exact_every": 1}, 1), ({"detail": "full", "rescore_every": 5}, 1),
        ({"detail": "totals"}, 10),
    ],
)  # fmt: skip
def test_the_head_is_read_as_often_as_rows_are_written(
    given: dict[str, Any], exact: int, raw: Own, tmp_path: Path
) -> None:
    recorder = attached(raw, tmp_path / "r", **given).recorder
    assert Watcher.given["exact_every"] == exact
    every = DETAILS[given.get("detail", "sampled")]
    assert recorder.token_every == given.get("token_every", every["token_every"])
    assert recorder.rescore_every == given.get("rescore_every", every["rescore_every"])


def test_numbers_below_zero_are_refused(raw: Own, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"exact_every must be 0 \(never\) or positive"):
        attach(raw, tmp_path / "r", exact_every=-1)
    assert not (tmp_path / "r").exists()


def test_several_processes_wait_for_each_other(raw: Own, tmp_path: Path) -> None:
    raw.accelerator.num_processes = 2
    raw.importance_sampling_level = "sequence"
    attachment = attached(raw, tmp_path / "r", manifest={"seed": 9})
    assert raw.waited == [1]
    assert attachment.recorder.sequence_level
    assert read_manifest(tmp_path / "r")["seed"] == 9


@pytest.mark.parametrize(("resumed", "told"), [(None, 1), (["2026-01-01"], 2)])
def test_a_continued_run_keeps_when_it_was_started(
    resumed: list[str] | None, told: int, tmp_path: Path
) -> None:
    assert trl._continued(tmp_path, None) == {}
    begun = Manifest.begun("trl", (), name="r", label="r")
    earlier = begun.changed({"started": "2026-01-01", "resumed": resumed} if resumed else {})
    write_manifest(tmp_path, earlier)
    found = trl._continued(tmp_path, 3)
    assert found.get("started") == earlier.started
    assert len(found["resumed"]) == told
    assert found["resumed"][: told - 1] == (resumed or [])
    with pytest.raises(UserError, match="already holds a run"):
        trl._check_folder(tmp_path, None)
    trl._check_folder(tmp_path, 3)
    trl._check_folder(tmp_path / "elsewhere", None)


def test_replace_mode_is_checked_and_passive_is_not(raw: Own, tmp_path: Path) -> None:
    watched = SimpleNamespace(hidden_by="Unsloth", raw=raw, model=raw.model)
    trl._check_mode(watched, "passive")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="cannot be used with Unsloth"):
        trl._check_mode(watched, "replace")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="mode must be passive or replace, got 'auto'"):
        trl._check_mode(watched, "auto")  # type: ignore[arg-type]
    watched.hidden_by = None
    with pytest.raises(UserError, match="stands in for the fused head"):
        trl._check_mode(watched, "replace")  # type: ignore[arg-type]
