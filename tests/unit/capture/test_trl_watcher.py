"""One step of a watched TRL trainer, call by call."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from wapo_analysis.capture import Patches
from wapo_analysis.capture.trl.replace import TrlHead
from wapo_analysis.capture.trl.rollouts import log_sums
from wapo_analysis.capture.trl.watcher import TrlWatcher


class Raw:
    """What a watcher that sees no tokens puts its calls around."""

    def __init__(self) -> None:
        self.accelerator = Accelerator()
        self.callbacks: list[Any] = []

    def _generate_and_score_completions(self, inputs: Any) -> None: ...
    def training_step(self) -> None: ...

    def add_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def remove_callback(self, callback: Any) -> None:
        self.callbacks.remove(callback)


class Accelerator:
    def clip_grad_norm_(self) -> None: ...


@pytest.mark.parametrize(("processes", "several"), [(1, False), (2, True), (8, True)])
def test_processes_that_train_together_are_several(processes: int, several: bool) -> None:
    notes: list[dict[str, Any]] = []
    trainer: Any = SimpleNamespace(raw=Raw(), processes=processes, hidden_by="Unsloth")
    recorder: Any = SimpleNamespace(guard=None, note=lambda **given: notes.append(given))
    patches = Patches()
    watcher = TrlWatcher(
        trainer, recorder, patches, exact_every=1, log_metrics=True, probe_rows=1, replace=False,
        resume_after=7,
    )  # fmt: skip
    assert watcher._several is several
    assert (watcher._last, watcher._resume_after) == (7, 7)
    assert notes == [{"tokens_hidden_by": "Unsloth"}]
    assert len(trainer.raw.callbacks) == 1
    patches.close()
    assert trainer.raw.callbacks == []


def test_a_step_says_how_long_its_probe_took(monkeypatch: pytest.MonkeyPatch) -> None:
    watcher = object.__new__(TrlWatcher)
    now, told = [100.0], list[Any]()

    def after_update(*given: Any) -> None:
        now[0] += 2.5
        told.extend(given)

    monkeypatch.setattr("wapo_analysis.capture.trl.watcher.perf_counter", lambda: now[0])
    watcher._trainer = SimpleNamespace(step=7)  # type: ignore[assignment]
    watcher._prober = SimpleNamespace(after_update=after_update)  # type: ignore[assignment]
    watcher._passes, watcher._row = [], {"grad_norm": 0.25}
    watcher.after_update()
    assert told == [7, [], 0.25]
    assert watcher._row == {"grad_norm": 0.25, "seconds_probe": 2.5}


@pytest.mark.parametrize(("loss", "sums"), [(None, (0.0, 0.0)), (torch.tensor(0.25), (0.25, 1.0))])
def test_a_process_without_a_loss_adds_nothing_to_that_of_the_others(
    loss: Any, sums: tuple[float, float]
) -> None:
    watcher = object.__new__(TrlWatcher)
    watcher._loss = loss
    watcher._rollouts = SimpleNamespace(sums=lambda: {"length": 3.0})  # type: ignore[assignment]
    assert watcher._sums_beside_tokens() == {"length": 3.0, "loss": sums[0], "loss n": sums[1]}
    nothing = watcher._no_sums()
    assert set(nothing.values()) == {0.0}
    assert {"length", "loss", "loss n", "rows", "tokens/unknown"} <= nothing.keys()


def test_a_guard_s_stop_waits_until_the_updates_on_a_batch_are_done() -> None:
    asked: list[str] = []
    for between in (False, True):
        watcher = object.__new__(TrlWatcher)
        watcher._trainer = SimpleNamespace(between_batches=between, save=None)  # type: ignore[assignment]
        watcher._recorder = SimpleNamespace(  # type: ignore[assignment]
            checkpoint=lambda save: asked.append("checkpoint"),
            asked=lambda action: bool(asked.append(action)) or True,
        )
        control = SimpleNamespace(should_save=False, should_training_stop=False)
        watcher.obey(control)
        assert (control.should_save, control.should_training_stop) == (between, between)
        assert asked == ["checkpoint", "stop"] * between


def test_the_learning_rate_is_that_of_the_first_group() -> None:
    watcher = object.__new__(TrlWatcher)
    groups = [{"lr": 0.1}, {"lr": 0.2}]
    raw = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups))
    told: list[int] = []
    watcher._trainer = SimpleNamespace(raw=raw, step=7)  # type: ignore[assignment]
    watcher._prober = SimpleNamespace(before_update=told.append)  # type: ignore[assignment]
    watcher._row = {}
    watcher.before_update()
    assert (watcher._row, told) == ({"lr": 0.1}, [7])


def bare(**given: Any) -> Any:
    """A watcher of nothing, for one call at a time; its guard lets everything through."""
    watcher: Any = object.__new__(TrlWatcher)
    watcher._guard = lambda action, *args: action(*args)
    for name, value in given.items():
        setattr(watcher, f"_{name}", value)
    return watcher


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr("wapo_analysis.capture.trl.watcher.perf_counter", lambda: now[0])
    return now


@pytest.mark.parametrize(
    ("resume_after", "last", "done", "continued"),
    [(None, 0, 0, 0), (None, 5, 0, 5), (7, 7, 7, 0), (None, 3, 5, 0), (None, 9, 4, 5)],
)
def test_steps_of_a_second_training_count_on(
    resume_after: int | None, last: int, done: int, continued: int
) -> None:
    forgotten: list[str] = []
    rollouts = SimpleNamespace(start_step=lambda: forgotten.append("rollouts"))
    recorder = SimpleNamespace(forget=lambda: forgotten.append("passes"))
    watcher = bare(
        trainer=SimpleNamespace(done=None), recorder=recorder, rollouts=rollouts, last=last,
        resume_after=resume_after,
    )  # fmt: skip
    watcher.begin_training(done)
    assert watcher._trainer.done == continued
    assert watcher._resume_after is None
    assert forgotten == ["rollouts", "passes"]


def test_a_run_is_continued_where_it_was_left_or_not_at_all() -> None:
    watcher = bare(resume_after=7, last=7)
    with pytest.raises(ValueError, match="resume_after=7, but training starts after step 6"):
        watcher.begin_training(6)


def test_seconds_of_generating_add_up_over_the_batches_of_a_step(clock: list[float]) -> None:
    taken: list[Any] = []
    trainer = SimpleNamespace(training=True)
    rollouts = SimpleNamespace(
        start_step=lambda: None, take_batch=lambda inputs, batch: taken.append((inputs, batch))
    )
    watcher = bare(trainer=trainer, rollouts=rollouts)
    watcher._start_step()

    def generate(inputs: str) -> str:
        clock[0] += 1.5
        assert watcher._generating_now is trainer.training
        return f"batch of {inputs}"

    for name in ("a", "b"):
        assert watcher._generate(generate, name) == f"batch of {name}"
    trainer.training = False
    watcher._generate(generate, "evaluation")
    assert watcher._generating == 3.0
    assert taken == [("a", "batch of a"), ("b", "batch of b")]
    assert not watcher._generating_now


def test_losses_of_the_passes_of_a_step_add_up() -> None:
    watcher = bare(loss=None, saw_tokens=True, training=False)
    for part in (0.25, 0.5):
        loss = torch.tensor(part)
        assert watcher._training_step(lambda loss=loss: loss) is loss
    assert float(watcher._loss) == 0.75


@pytest.mark.parametrize(
    ("inputs", "grad", "generating", "watched"),
    [(None, True, False, 0), (None, True, True, 1), ({}, False, False, 0), ({}, True, False, 2)],
)
def test_only_a_scoring_of_the_loss_is_a_gradient_pass(
    inputs: Any, grad: bool, generating: bool, watched: int
) -> None:
    """One while a batch is made gives old log-probabilities; a reference policy's is none."""
    done: list[str] = []
    stats = SimpleNamespace(scheduled=None, cancel=lambda: done.append("cancelled"))
    watcher = bare(
        inputs=inputs, generating_now=generating, current=None, passes=[], several=False,
        head=TrlHead(), stats=stats, exact_every=10, trainer=SimpleNamespace(step=11),
        recorder=SimpleNamespace(wants_probe=lambda step: False),
        take_scores=lambda scored: done.append("old"), open=lambda inputs: done.append("open"),
        take_pass=lambda inputs, scored, seen: done.append("pass"),
    )  # fmt: skip
    with torch.set_grad_enabled(grad):
        assert watcher._scoring(lambda model: "scored", "model") == "scored"
    assert done == {0: [], 1: ["old"], 2: ["open", "pass", "cancelled"]}[watched]
    assert len(watcher._passes) == (watched == 2)


@pytest.mark.parametrize(
    ("step", "several", "probed", "scheduled"),
    [
        (1, False, False, True), (11, False, False, True), (10, False, False, False),
        (10, False, True, True), (10, True, True, False), (11, True, False, True),
    ],
)  # fmt: skip
def test_the_head_is_read_on_its_schedule_or_for_a_probe_of_one_process(
    step: int, several: bool, probed: bool, scheduled: bool
) -> None:
    stats = SimpleNamespace(scheduled=None, cancel=lambda: None)
    watcher = bare(
        inputs={}, current=None, passes=[], several=several, head=TrlHead(), stats=stats,
        exact_every=10, trainer=SimpleNamespace(step=step),
        recorder=SimpleNamespace(wants_probe=lambda step: probed),
        open=lambda inputs: None, take_pass=lambda *given: None,
    )  # fmt: skip
    watcher._scoring(lambda model: "scored", "model")
    assert stats.scheduled is scheduled


def test_top_tokens_are_chosen_by_the_rollouts_of_the_loss() -> None:
    chosen: list[Any] = []

    def choose(step: int, place: Any, rollout: Tensor, position: Tensor, index: int) -> str:
        chosen.append((step, rollout.tolist(), position.tolist(), index, len(place)))
        return "top"

    tops = SimpleNamespace(wants=lambda step: step == 3, choose=choose)
    opened: list[Any] = []
    watcher = bare(
        recorder=SimpleNamespace(tops=tops), trainer=SimpleNamespace(step=3), passes=["one"],
        rollouts=SimpleNamespace(numbers=lambda inputs: (torch.tensor([6, 9]), torch.zeros(2))),
        stats=SimpleNamespace(open=lambda mask, ids, top: opened.append(top)),
    )  # fmt: skip
    inputs = {"completion_mask": torch.tensor([[1, 1, 0], [0, 1, 0]]), "completion_ids": None}
    watcher._open(inputs)
    watcher._trainer.step = 4
    watcher._open(inputs)
    assert chosen == [(3, [6, 6, 9], [0, 1, 1], 1, 2)]
    assert opened == ["top", None]


@pytest.mark.parametrize(
    ("step", "several", "failure", "rescored"),
    [
        (1, False, None, True), (2, False, None, False), (3, False, None, True),
        (3, False, "broken", False), (3, True, "broken", True), (2, True, None, False),
    ],
)  # fmt: skip
def test_every_process_scores_again_even_where_recording_has_failed(
    step: int, several: bool, failure: str | None, rescored: bool
) -> None:
    done: list[Any] = []
    watcher = bare(
        trainer=SimpleNamespace(step=step + 1, sum_over_processes=lambda sums: {"all": 2.0}),
        several=several, log_metrics=False,
        recorder=SimpleNamespace(rescore_every=2, failure=failure),
        rescore=lambda: done.append("again"), sums=lambda step: {"own": 1.0},
        write=lambda step, sums: done.append((step, sums)), start_step=lambda: done.append("next"),
        finish_step=lambda step, columns, sums: done.append((step, sums)),
        sums_beside_tokens=lambda: {"beside": 0.0},
    )  # fmt: skip
    watcher.end_step()
    written = (step, {"all": 2.0} if several else {"beside": 0.0})
    assert done == [*(["again"] if rescored else []), written, "next"]
    assert watcher._last == step


@pytest.mark.parametrize("told", [{"own": 1.0}, None])
def test_a_process_whose_sums_failed_adds_nothing(told: Any) -> None:
    written: list[Any] = []
    watcher = bare(
        trainer=SimpleNamespace(step=3), several=False, log_metrics=True,
        recorder=SimpleNamespace(rescore_every=0), sums=lambda step: told,
        no_sums=lambda: {"nothing": 0.0}, start_step=lambda: None,
        write=lambda step, sums: written.append((step, sums)),
    )  # fmt: skip
    watcher.end_step()
    assert written == [(2, told or {"nothing": 0.0})]


def test_seconds_of_a_second_scoring_are_the_recorder_s(clock: list[float]) -> None:
    failed: list[str] = []
    recorder = SimpleNamespace(seconds=1.0, fail=lambda error: failed.append(str(error)))

    def precision() -> Any:
        clock[0] += 2.5
        raise ValueError("no memory")

    watcher = bare(recorder=recorder, trainer=SimpleNamespace(precision=precision))
    watcher._rescore()
    assert (recorder.seconds, failed) == (3.5, ["no memory"])


@pytest.mark.parametrize(("several", "named"), [(False, 0), (True, 1)])
def test_of_several_processes_every_token_is_named_once(several: bool, named: int) -> None:
    names: list[Any] = []
    recorder = SimpleNamespace(
        name_tokens=lambda ids, texts: names.append(list(ids)), settle=lambda step, texts: None,
        sequence_level=False,
    )  # fmt: skip
    watcher = bare(
        recorder=recorder, rollouts=SimpleNamespace(texts=None), several=several, named=False,
        trainer=SimpleNamespace(raw=SimpleNamespace(processing_class="abc")), passes=[],
        sums_beside_tokens=lambda: {"beside": 1.0},
    )  # fmt: skip
    for step in (1, 2):
        sums = watcher._sums(step)
    assert names == [[0, 1, 2]] * named
    assert (sums["beside"], sums["rows"]) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("asked", "saw", "logged"), [(True, True, 1), (True, False, 0), (False, True, 0)]
)
def test_the_trainer_s_log_gets_entries_if_asked_for_and_tokens_were_seen(
    asked: bool, saw: bool, logged: int
) -> None:
    log: list[Any] = []
    watcher = bare(
        log_metrics=asked, saw_tokens=saw, trainer=SimpleNamespace(log=log.append),
        finish_step=lambda step, columns: None,
    )  # fmt: skip
    watcher._write(1, log_sums(None))
    assert len(log) == logged


def test_a_step_is_one_update_with_what_all_parts_know_of_it() -> None:
    rows: list[Any] = []
    watcher = bare(
        row={"lr": torch.tensor(0.5)}, generating=2.0,
        rollouts=SimpleNamespace(
            statistics=lambda: {"reward": 1.0, "reward_std": float("nan")},
            columns=lambda: {"rollout": [0]}, texts=None,
        ),
        trainer=SimpleNamespace(logged=lambda: {"kl_ref": 0.1}),
        recorder=SimpleNamespace(finish_step=lambda step, **row: rows.append((step, row))),
    )  # fmt: skip
    watcher._finish_step(4, {"entropy": 0.3})
    ((step, row),) = rows
    assert step == 4
    assert row == {
        "updates": 1, "entropy": 0.3, "lr": 0.5, "kl_ref": 0.1, "reward": 1.0,
        "seconds_rollout": 2.0, "rollouts": {"rollout": [0]}, "texts": None, "sums": None,
    }  # fmt: skip


class Whole(Raw):
    """A trainer whose tokens can be seen."""

    def _compute_loss(self) -> None: ...
    def _get_per_token_logps_and_entropies(self) -> None: ...
    def get_off_policy_mask(self) -> None: ...


@pytest.mark.parametrize(("every", "top1"), [(0, False), (1, True), (10, True)])
def test_top1_is_asked_for_where_rows_are_written(
    every: int, top1: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "wapo_analysis.capture.trl.watcher.StatsReader", lambda *given: asked.append(given[3])
    )
    trainer: Any = SimpleNamespace(raw=Whole(), processes=1, hidden_by=None)
    recorder: Any = SimpleNamespace(guard=None, token_every=every)
    watcher = TrlWatcher(
        trainer, recorder, Patches(), exact_every=1, log_metrics=True, probe_rows=1, replace=False,
        resume_after=None,
    )  # fmt: skip
    assert asked == [top1]
    assert (watcher._last, watcher._resume_after, watcher._generating) == (0, None, 0.0)
    assert {"_compute_loss", "get_off_policy_mask"} <= vars(trainer.raw).keys()


def test_what_a_loss_is_given_is_known_while_it_runs_and_in_training_alone() -> None:
    known: list[Any] = []
    watcher = bare(inputs=None, current="earlier", training=True)

    def loss(model: str, inputs: dict[str, Any]) -> str:
        known.append((watcher._inputs, watcher._current))
        return "loss"

    inputs = {"a": 1}
    assert watcher._compute_loss(loss, "model", inputs) == "loss"
    watcher._training, watcher._current = False, "earlier"
    assert watcher._compute_loss(loss, "model", inputs) == "loss"
    assert known == [(inputs, None), (None, "earlier")]
    assert watcher._inputs is None
