"""Changes to foreign objects are put back exactly, in whatever order others change them too."""

import inspect
from typing import Any

import pytest

from wapo_analysis.capture.hooks import Patches


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
