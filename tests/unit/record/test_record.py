"""What all recording stands on: the guard, step numbers, schedules, how a with-block ends."""

import copy
import json
import logging
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest

from wapo_analysis.errors import UserError
from wapo_analysis.record import Closing, Guarded, Steps, check_schedule, close_at_exit, guarded
from wapo_analysis.record.beside import check_actions
from wapo_analysis.record.recorder import Recorder
from wapo_analysis.store import MANIFEST, open_run


class Watch(Guarded):
    """Counts what it is asked to do."""

    def __init__(self) -> None:
        self.done: list[Any] = []

    @guarded
    def work(self, item: Any, *, twice: bool = False) -> str:
        self.done.append(item)
        if isinstance(item, Exception):
            raise item
        return self.work(f"{item} again") if twice else "done"


def test_the_first_failure_ends_the_watching_and_never_reaches_the_caller() -> None:
    watch = Watch()
    assert watch.work("a") == "done"
    assert watch.work(RuntimeError("\nno kernel\nregistered")) is None
    assert watch.failure == "RuntimeError: no kernel"
    assert watch.work("b") is None
    assert len(watch.done) == 2, "nothing is done any more"
    nameless = Watch()
    nameless.work(ValueError())
    assert nameless.failure == "ValueError: "


def test_what_ends_a_program_is_no_failure_of_the_watching() -> None:
    watch = Watch()
    with pytest.raises(KeyboardInterrupt):
        watch.guard(lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert watch.failure is None
    assert watch.work("a") == "done"


def test_guarded_work_within_guarded_work_is_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr("wapo_analysis.record.perf_counter", lambda: float(next(clock)))
    watch = Watch()
    assert watch.work("a", twice=True) == "done"
    assert watch.done == ["a", "a again"]
    assert watch.seconds == 1.0, "one look at the clock before and one after"
    watch.work(ValueError("x"))
    assert watch.seconds == 2.0, "a failure took its time too"


def test_a_log_handler_that_raises_is_no_matter_of_the_training(tmp_path: Path) -> None:
    class Raises(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError("no space left for the log")

    told, recorder = Raises(), Recorder(tmp_path / "run")
    logging.getLogger("wapo_analysis").addHandler(told)
    try:
        recorder.watch(None, None, None, None, None)  # type: ignore[arg-type]
        assert recorder.failure is not None
        recorder.finish_step(1)
        recorder.close()
    finally:
        logging.getLogger("wapo_analysis").removeHandler(told)
    assert json.loads((tmp_path / "run" / MANIFEST).read_text())["status"] == "recording_failed"


def test_a_failure_stays_within_while_another_thread_is_guarded() -> None:
    watch, within, leave = Watch(), Event(), Event()

    def wait() -> None:
        within.set()
        leave.wait(20)

    one = Thread(target=watch.guard, args=(wait,))
    one.start()
    within.wait(20)
    assert watch.work(ValueError("in the other thread")) is None
    assert watch.failure == "ValueError: in the other thread"
    leave.set()
    one.join()


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda recorder: pickle.loads(pickle.dumps(recorder)),
    "copy of a copy": lambda recorder: copy.deepcopy(copy.copy(recorder)),
}


@pytest.mark.parametrize("way", COPIES)
def test_what_holds_a_recorder_can_be_copied_and_the_copy_says_that_it_records_nothing(
    way: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Recorder(tmp_path / "run") as recorder, caplog.at_level(logging.WARNING):
        (copied,) = COPIES[way]([recorder])
        assert not caplog.messages, "one that is never used needs no word"
        for step in (1, 2):
            copied.finish_step(step, reward=0.5)
        copied.close("failed")
        recorder.finish_step(1, reward=0.5)
    assert caplog.messages == [
        f"recording to {tmp_path / 'run'} stopped (UserError: this is a copy of the recorder that "
        "records, which alone writes); training goes on"
    ]
    assert recorder.failure is None
    assert json.loads((tmp_path / "run" / MANIFEST).read_text())["status"] == "finished"


def test_a_fork_says_that_it_records_nothing_and_ends_no_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder(tmp_path / "run")
    own, recorder._process = recorder._process, -1
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            recorder.finish_step(step, reward=0.5)
    assert [m.split("(")[1].split(",")[0] for m in caplog.messages] == [
        "UserError: this is a fork of the process that records"
    ]
    recorder.close()
    assert json.loads((tmp_path / "run" / MANIFEST).read_text())["status"] == "running"
    recorder._process, recorder.failure = own, None
    recorder.close()


def test_a_training_may_change_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with Recorder("run") as recorder:
        recorder.finish_step(1, reward=0.5)
        recorder.flush()
        monkeypatch.chdir(tmp_path / "elsewhere")
        recorder.finish_step(2, reward=0.5)
    assert recorder.failure is None
    assert len((tmp_path / "run" / "steps.jsonl").read_text().splitlines()) == 2
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("resumed", "given", "numbers"),
    [
        (None, (1, 2, 3), (1, 2, 3)), (None, (0, 1), (0, 1)), (None, (0, 0), (0, 1)),
        (None, (5, 5, 9), (5, 6, 9)), (0, (0, 1), (1, 2)), (7, (8, 9), (8, 9)),
        (7, (7, 8, 20), (8, 9, 20)), (7, (1,), (8,)), (None, (2**31 - 1,), (2**31 - 1,)),
    ],
)  # fmt: skip
def test_steps_count_up(
    resumed: int | None,
    given: tuple[int, ...],
    numbers: tuple[int, ...],
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps = Steps(resumed)
    assert steps.last == (resumed or 0)
    assert tuple(steps.next(step) for step in given) == numbers
    assert steps.last == numbers[-1]
    assert len(caplog.messages) == (given != numbers), "told once"


def test_a_step_counted_on_names_all_three_numbers(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Steps(12).next(4)
    (told,) = caplog.messages
    assert told.startswith(
        "step 4 came after step 12, but steps must count up: recorded as step 13"
    )


@pytest.mark.parametrize("step", [-1, 2**31])
def test_a_number_no_folder_holds_is_refused(step: int) -> None:
    with pytest.raises(UserError, match=f"a step must be 0 to 2147483647, got {step}"):
        Steps(None).next(step)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((-1, 1.0, 1), "rank must be 0 or a whole number above it, got -1"),
        ((0.5, 1.0, 1), "rank must be 0 or a whole number above it, got 0.5"),
        (("0", 1.0, 1), "rank must be 0 or a whole number above it, got '0'"),
        ((0, 0.0, 1), r"token_fraction must be in \(0, 1\], got 0.0"),
        ((0, 1.01, 1), r"token_fraction must be in \(0, 1\], got 1.01"),
        ((0, float("nan"), 1), r"token_fraction must be in \(0, 1\], got nan"),
        ((0, 1.0, 3, -1), r"must be 0 \(never\) or positive"),
        ((0, 1.0, -1, 3), r"must be 0 \(never\) or positive"),
    ],
)
def test_a_schedule_out_of_range_is_refused(given: tuple[Any, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_schedule(*given)


def test_schedules_at_their_bounds_are_allowed() -> None:
    check_schedule(0, 1.0, 0, 0, 0)
    check_schedule(3, 1e-9, 1, 7)


@pytest.mark.parametrize(
    ("kind", "prompt", "status"),
    [
        (None, False, "finished"), (ValueError, False, "failed"),
        (KeyboardInterrupt, False, "interrupted"), (ValueError, True, "finished"),
    ],
)  # fmt: skip
def test_what_is_closed_at_exit_knows_what_ended_the_program(
    kind: Any, prompt: bool, status: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered, told = list[Any](), list[str]()
    monkeypatch.setattr("wapo_analysis.record.atexit.register", registered.append)
    monkeypatch.setattr("wapo_analysis.record.atexit.unregister", registered.remove)
    monkeypatch.delattr(sys, "last_type", raising=False)
    if kind is not None:
        monkeypatch.setattr(sys, "last_type", kind, raising=False)
    if prompt:
        monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    forget = close_at_exit(told.append)
    registered[0]()
    assert told == [status]
    forget()
    assert not registered


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (None, "finished"), (KeyboardInterrupt, "interrupted"), (SystemExit, "failed"),
        (ValueError, "failed"),
    ],
)  # fmt: skip
def test_a_with_block_says_how_it_ended(error: Any, status: str) -> None:
    told = []

    class Ends(Closing):
        def close(self, status: str = "finished") -> None:
            told.append(status)

    def block() -> None:
        with Ends() as ends:
            assert isinstance(ends, Ends)
            if error is not None:
                raise error

    if error is None:
        block()
    else:
        with pytest.raises(error):
            block()
    assert told == [status]


def act(finding: dict[str, Any]) -> None:
    """An action of the user's own."""


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("stop", None), "on_warning must be 'checkpoint' or a function, got 'stop'"),
        ((None, "die"), "on_critical must be 'checkpoint' or 'stop' or a function, got 'die'"),
        ((3, None), "on_warning must be 'checkpoint' or a function, got 3"),
        (("checkpoint", None, 2), "work with one process; leave them None"),
        ((None, act, 2), "work with one process; leave them None"),
    ],
)
def test_what_is_no_action_is_refused(given: tuple[Any, ...], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_actions(*given)


def test_what_is_an_action() -> None:
    check_actions(None, None, 8)
    for given in (("checkpoint", "stop"), (act, act), (None, "checkpoint"), ("checkpoint", None)):
        check_actions(*given)


@pytest.mark.parametrize(
    ("given", "name"), [({"label": "first"}, "mine"), ({"source": "trl"}, None)]
)
def test_a_run_of_which_no_source_is_named_is_a_loop_named_as_its_folder(
    tmp_path: Path, given: dict[str, str], name: str | None
) -> None:
    Recorder(tmp_path / "mine", given).close()
    manifest = open_run(tmp_path / "mine").manifest
    assert manifest.source == given.get("source", "loop")
    assert (manifest.name, manifest.label) == (name, given.get("label"))
