"""Which runs are seeds of one setting."""

from pathlib import Path
from typing import Any

import pytest

from wapo_analysis.engines import COUNTERPARTS
from wapo_analysis.settings import recorded_settings, setting_labels, settings_of, shown_value
from wapo_analysis.store import Run
from wapo_analysis.store.manifest import Manifest

WATCH = ("attach", "the first process")


def run(label: str, seed: int = 0, **manifest: Any) -> Run:
    entries = Manifest.of({"label": label, "seed": seed, **manifest})
    return Run(Path(f"{label}-{seed}"), entries)


def config(**values: Any) -> dict[str, Any]:
    return {"source": "built-in", "objective": {"name": "grpo", "clip_eps": 0.2}, "config": values}


def test_seeds_and_what_only_watches_the_run_do_not_part_it() -> None:
    runs = [
        run("GRPO", 0, **config(lr=1e-4, seed=0, probe_every=5, device="cpu", label=None)),
        run("GRPO", 1, **config(lr=1e-4, seed=1, probe_every=0, device="cuda")),
    ]
    (setting,) = settings_of(runs)
    assert (setting.label, setting.places, setting.differs) == ("GRPO", (0, 1), ())
    assert setting_labels(runs) == ["GRPO", "GRPO"]


@pytest.mark.parametrize("name", [n for n, to in COUNTERPARTS.items() if to in WATCH])
def test_no_setting_of_recording_or_evaluation_parts_seeds(name: str) -> None:
    runs = [run("GRPO", seed, **config(lr=1e-4, **{name: seed})) for seed in range(2)]
    assert setting_labels(runs) == ["GRPO", "GRPO"]


def test_a_setting_that_differs_stands_in_the_label() -> None:
    runs = [
        run("GRPO", 0, **config(lr=1e-4, task="chain-sum")),
        run("WAPO", 0, **config(lr=9.0, task="x")),
        run("GRPO", 1, **config(lr=5e-5, task="two-hop")),
        run("GRPO", 2, **config(lr=1e-4, task="chain-sum")),
    ]
    assert setting_labels(runs) == [
        "GRPO, task chain-sum, lr 1e-4",
        "WAPO",
        "GRPO, task two-hop, lr 5e-5",
        "GRPO, task chain-sum, lr 1e-4",
    ]
    assert settings_of(runs)[0].places == (0, 3)
    assert settings_of(runs)[2].runs == (runs[2],)


def test_what_a_source_does_not_say_contradicts_nothing() -> None:
    bare = [run("verl", seed, source="import", objective={"name": "unknown"}) for seed in range(2)]
    assert setting_labels(bare) == ["verl", "verl"]
    known = run("verl", 2, source="import", objective={"name": "grpo"}, temperature=1.0)
    other = run("verl", 3, source="import", objective={"name": "gspo"}, temperature=1.0)
    labels = setting_labels([*bare, known, other])
    assert labels[:3] == ["verl, objective grpo"] * 3
    assert labels[3] == "verl, objective gspo"


def test_labels_stay_unlike_when_only_the_first_differences_are_named() -> None:
    runs = [run("A", 0, **config(a=1, b=1, c=1, d=d)) for d in (1, 2)]
    assert setting_labels(runs) == ["A, d 1", "A, d 2"]
    many = [run("A", 0, **config(a=i, b=i, c=i, d=d)) for i, d in ((1, 1), (2, 2), (1, 3))]
    assert setting_labels(many) == [
        "A, a 1, b 1, c 1, ...",
        "A, a 2, b 2, c 2, ...",
        "A, a 1, b 1, c 1, ... (2)",
    ]


def test_trl_names_its_objective_once() -> None:
    trl = {"source": "trl", "objective": {"name": "dapo"}, "config": {"loss_type": "dapo"}}
    assert recorded_settings(run("x", 0, **trl)) == {"objective": "dapo"}


@pytest.mark.parametrize(
    ("value", "text"),
    [(5e-5, "5e-5"), (2.5e-6, "2.5e-6"), (0.2, "0.2"), (0.0, "0"), (None, "none"), (True, "True")],
)
def test_values_are_written_as_people_write_them(value: object, text: str) -> None:
    assert shown_value(value) == text
