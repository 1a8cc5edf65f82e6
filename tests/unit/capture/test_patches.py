"""Changes to foreign objects are put back exactly, in whatever order others change them too."""

import copy
import inspect
import pickle
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from wapo_analysis.capture import (
    CaptureMode,
    Hook,
    Patches,
    choose_mode,
    earlier_mode,
    free_memory,
    own_rank,
    readable,
)
from wapo_analysis.errors import UserError


class Engine:
    def run(self, times: int = 1) -> int:
        return times


def test_wrap_sees_the_call_and_keeps_the_signature() -> None:
    engine, patches = Engine(), Patches()
    patches.wrap(engine, "run", lambda run, *args, **kwargs: run(*args, **kwargs) * 10)
    assert engine.run(times=3) == 30
    assert inspect.signature(engine.run) == inspect.signature(Engine().run)
    patches.close()
    assert vars(engine) == {}


def test_a_copy_is_not_watched_and_works_for_itself() -> None:
    engine, patches, seen = Engine(), Patches(), []
    engine.speed = 2  # type: ignore[attr-defined]
    for _ in range(2):
        patches.wrap(engine, "run", lambda run, *args: seen.append(args) or run(*args))
    twin = copy.deepcopy(engine)
    twin.run.__self__.speed = 5
    assert (twin.run(3), seen) == (3, [])
    assert twin.run.__self__ is twin
    assert (engine.run(4), seen) == (4, [(4,), (4,)])
    assert engine.speed == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize("way", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_hook_goes_with_no_copy_of_what_it_is_in(way: Any) -> None:
    layer, seen = torch.nn.Linear(2, 2), list[Any]()
    hook = Hook(lambda *given: seen.append((given, sys)))  # a module can be neither copied
    layer.register_forward_hook(hook)
    layer.register_forward_hook(hook, with_kwargs=True)
    text = torch.ones(1, 2)
    assert torch.equal(way(layer)(text), layer(text))
    assert len(seen) == 2, "the copy's are silent"
    assert b"wapo_analysis" not in pickle.dumps(layer)


def test_a_plain_function_on_the_instance_comes_back_as_the_same_object() -> None:
    engine, patches = Engine(), Patches()
    own = engine.run = lambda times=1: times + 1  # type: ignore[method-assign]
    patches.wrap(engine, "run", lambda run, *args: run(*args) * 10)
    assert engine.run(1) == 20
    patches.close()
    assert vars(engine)["run"] is own


def test_undo_runs_backwards_and_once() -> None:
    patches, order = Patches(), []
    for number in range(3):
        patches.on_close(lambda number=number: order.append(number))
    patches.close()
    patches.close()
    assert order == [2, 1, 0]


def test_two_layers_close_in_either_order() -> None:
    for first_closed in (0, 1):
        engine, layers = Engine(), [Patches(), Patches()]
        for patches in layers:
            patches.wrap(engine, "run", lambda run, *args: run(*args) + 1)
        assert engine.run(0) == 2
        layers[first_closed].close()
        assert engine.run(0) == 1
        layers[1 - first_closed].close()
        assert engine.run(0) == 0


def test_an_exception_of_the_wrapped_call_passes_through() -> None:
    engine, patches = Engine(), Patches()

    def fail(run: Any) -> None:
        raise KeyboardInterrupt

    patches.wrap(engine, "run", fail)
    with pytest.raises(KeyboardInterrupt):
        engine.run()
    patches.close()
    assert engine.run() == 1


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (1 << 20, "1 MiB"),
        (3 << 30, "3 GiB"), (1 << 40, "1 TiB"), (1 << 50, "1024 TiB"),
    ],
)  # fmt: skip
def test_bytes_in_the_unit_that_fits(count: int, said: str) -> None:
    assert readable(count) == said


@pytest.mark.parametrize(
    ("asked", "logits", "free", "obstacle", "mode", "rule"),
    [
        ("passive", 900, 1000, None, "passive", "as set"),
        ("replace", 1, None, None, "replace", "as set"),
        ("auto", 100, 1000, None, "passive", "take 100 B, 10.0% of the 1000 B free; the limit is"),
        ("auto", 101, 1000, None, "replace", "take 101 B, 10.1% of the 1000 B free; the limit is"),
        ("auto", 900, 1000, "no head", "passive", "the limit is 10%, but no head"),
        ("auto", 9, 1000, "no head", "passive", "the limit is 10%"),
        ("auto", 900, None, None, "passive", "free memory is not known"),
        ("auto", 5, 0, None, "replace", "take 5 B, 500.0% of the 0 B free; the limit is 10%"),
        ("passive", 900, 1000, "no head", "passive", "as set"),
    ],
)
def test_the_mode_is_the_one_asked_for_or_by_the_free_memory(
    asked: str, logits: int, free: int | None, obstacle: str | None, mode: str, rule: str
) -> None:
    found = choose_mode(asked, logits, free, obstacle)
    assert found.mode == mode
    assert rule in found.rule
    assert (found.logits_bytes, found.free_bytes) == (logits, free)


def test_a_mode_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(UserError, match="replace cannot be used with this model: no head"):
        choose_mode("replace", 1, 1, "no head")
    with pytest.raises(UserError, match="must be one of passive, replace, auto, got 'fast'"):
        choose_mode("fast", 1, 1, None)


def test_a_resumed_run_keeps_the_mode_that_auto_chose() -> None:
    chosen = CaptureMode("replace", "auto: large", 900, 1000)
    before = {"capture": chosen.to_dict(), "config": {"capture_mode": "auto"}}
    assert earlier_mode("auto", before) == chosen
    assert earlier_mode("passive", before) is None
    assert earlier_mode("auto", before | {"config": {"capture_mode": "replace"}}) is None
    assert earlier_mode("auto", {"config": {"capture_mode": "auto"}}) is None


@pytest.mark.parametrize(
    ("tensor_rank", "begun", "rank"), [(0, True, 3), (1, True, None), (1, False, 0)]
)
def test_of_processes_that_see_the_same_tokens_the_first_records(
    tensor_rank: int, begun: bool, rank: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(
        model_parallel_is_initialized=lambda: begun,
        get_tensor_model_parallel_rank=lambda: tensor_rank,
        get_data_parallel_rank=lambda with_context_parallel: 3 if with_context_parallel else 1,
    )
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)  # type: ignore[arg-type]
    assert own_rank() == rank


@pytest.mark.parametrize(
    ("text", "free"),
    [("MemFree: 7 kB\nMemAvailable:  100 kB\n", 102_400), ("MemFree: 7 kB\n", None)],
)
def test_free_memory_is_what_the_system_says_is_available(
    text: str, free: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Path, "read_text", lambda self, **how: text)
    assert free_memory(torch.device("cpu")) == free


def test_free_memory_of_a_gpu_is_what_its_driver_says_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5, 9))
    assert free_memory(torch.device("cuda", 0)) == 5
