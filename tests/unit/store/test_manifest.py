"""The manifest: one name for a field, old names read, no shape that crashes a reader."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.builders import write_fake_run
from wapo_analysis.cli import run as wapo
from wapo_analysis.errors import UserError
from wapo_analysis.settings import steps_per_batch
from wapo_analysis.store import Manifest, RunWriter, open_run, read_manifest
from wapo_analysis.store.manifest import plain, write_manifest

OLD_RUN = Path(__file__).parents[2] / "data" / "run_0_1"


def written(folder: Path, entries: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    text = entries if isinstance(entries, str) else json.dumps(entries)
    (folder / "manifest.json").write_text(text)
    return folder


def test_a_run_of_version_0_1_reads_as_it_read_then() -> None:
    run = open_run(OLD_RUN)
    expected = json.loads((OLD_RUN / "expected.json").read_text())
    steps = run.steps[list(expected["steps"])].to_dict("list")
    assert steps == expected["steps"]
    by_class = run.classes.groupby("cls", observed=True)
    classes = by_class[list(expected["classes"])].sum().to_dict("list")
    assert classes == expected["classes"]
    tokens = run.tokens()
    for name, total in expected["tokens"].items():
        assert float(tokens[name].sum()) == total, name
    assert float(run.probes["measured_dentropy"].sum()) == expected["probes"]
    assert len(run.vocab) == expected["vocab"]
    assert run.rollouts["prompt"].tolist()[:3] == expected["prompts"]
    assert run.manifest.problems == ()
    old = json.loads((OLD_RUN / "manifest.json").read_text())
    assert dict(run.manifest) == {name: value for name, value in old.items() if value != {}}


def test_a_field_has_one_name_and_the_old_one_is_read(tmp_path: Path) -> None:
    old = read_manifest(written(tmp_path, {"schema_version": 1, "trainable": 7}))
    assert old.trainable_parameters == 7
    assert "trainable" not in old


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    manifest = Manifest.begun(
        "loop",
        ("torch", "no-such-package"),
        seed=np.int64(3),
        objective={"name": "grpo", "bounds": [0.8, float("inf")]},
        config={"lr": np.float32(0.5), "path": Path("a"), "beta": float("nan")},
        mine={"anything": [1, (2, 3)]},
    )
    write_manifest(tmp_path, manifest)
    json.loads((tmp_path / "manifest.json").read_text(), parse_constant=pytest.fail)
    again = read_manifest(tmp_path)
    assert again == manifest
    assert again.objective["bounds"] == [0.8, None]
    assert again.config == {"lr": 0.5, "path": "a", "beta": None}
    assert again.extra == {"mine": {"anything": [1, [2, 3]]}}
    assert again["seed"] == again.seed == 3
    assert set(again.versions) == {"python", "wapo-analysis", "torch"}


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("label", ["a"]), ("name", {"a": 1}), ("objective", [1]), ("objective", {"name": []}),
        ("objective", {"name": "grpo", "bounds": "wide"}), ("seed", "zero"), ("seed", 2**70),
        ("seed", True), ("vocabulary", 1.5), ("config", []), ("config", "lr"), ("versions", 3),
        ("eval_before", {"eval/pass@1": "high"}), ("eval_before", {"x": 10**400}),
        ("token_fraction", "half"), ("capture", 0), ("resumed", "yesterday"), ("status", {}),
        ("import", []), ("data", "here"), ("not_in_coef", {"a": 1}),
    ],
)  # fmt: skip
def test_another_shape_is_left_out_and_told(
    tmp_path: Path, entry: str, value: Any, caplog: pytest.LogCaptureFixture
) -> None:
    folder = written(tmp_path, {"schema_version": 1, "model": "m", entry: value})
    with caplog.at_level(logging.WARNING):
        manifest = read_manifest(folder)
    assert manifest.model == "m"
    assert len(manifest.problems) == 1
    assert manifest.problems[0].startswith(f"{entry} is ")
    assert str(folder / "manifest.json") in caplog.text
    assert manifest.get(entry) in (None, "running")
    with pytest.raises(UserError, match=f"manifest entry {entry} is .*, not a"):
        Manifest.of({entry: value})


@pytest.mark.parametrize("value", [0, -1, "1", None, [], 10**400, float("inf")])
def test_a_temperature_that_is_none_is_an_error(tmp_path: Path, value: Any) -> None:
    folder = written(tmp_path, {"schema_version": 1, "temperature": value})
    if value is None:
        assert open_run(folder).temperature == 1.0
        return
    with pytest.raises(UserError, match=r"manifest\.json: temperature is .*, not a"):
        read_manifest(folder)


@pytest.mark.parametrize(
    "text",
    ["", "null", "[1]", "3", '"text"', "{}", '{"schema_version": true}', "[" * 100_000,
     '{"schema_version": 1, "config": ' + "[" * 900 + "]" * 900 + "}",
     '{"schema_version": 1, "seed": ' + "9" * 5000 + "}", "\x00", "{'a': 1}",
     '{"schema_version": "1"}', '{"schema_version": 1e0}', '{"schema_version": 2}'],
)  # fmt: skip
def test_no_manifest_is_one_line_that_names_it(tmp_path: Path, text: str) -> None:
    written(tmp_path, text)
    with pytest.raises(UserError) as told:
        read_manifest(tmp_path)
    assert str(tmp_path) in str(told.value)
    assert "\n" not in str(told.value)


def test_a_changed_entry_is_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    RunWriter(tmp_path / "r", {"seed": 1}).close("finished")
    file = tmp_path / "r" / "manifest.json"
    assert read_manifest(tmp_path / "r").problems == ()
    file.write_text(file.read_text().replace('"seed": 1', '"seed": 2'))
    manifest = read_manifest(tmp_path / "r")
    assert (manifest.seed, len(manifest.problems)) == (2, 1)
    assert "do not match their checksum" in caplog.text


def test_a_setting_has_the_kind_of_its_default() -> None:
    manifest = Manifest(name="r", config={"epochs": 2, "lr": 1, "optimizer": "sgd", "bad": "\x00"})
    assert manifest.setting("epochs", 1) == 2
    assert manifest.setting("lr", 0.5) == 1.0
    assert manifest.setting("optimizer", "adamw") == "sgd"
    assert manifest.setting("absent", 0.9) == 0.9
    for name, default in (("bad", 1), ("bad", 1.0), ("epochs", "a"), ("lr", "x")):
        with pytest.raises(UserError, match=f"setting {name} of run r is"):
            manifest.setting(name, default)


def test_whole_numbers_are_those_of_64_bits() -> None:
    for seed, kept in ((2**63 - 1, True), (-(2**63), True), (2**63, False), (-(2**63) - 1, False)):
        if kept:
            assert Manifest.of({"seed": seed}).seed == seed
            continue
        with pytest.raises(UserError, match="manifest entry seed is .*, not a whole number of 64"):
            Manifest.of({"seed": seed})


@pytest.mark.parametrize("value", ["x", [1], 0.5, float("inf"), -3])
def test_settings_that_trl_never_wrote_end_neither_diagnosis_nor_audit(
    value: object, tmp_path: Path
) -> None:
    folder = write_fake_run(tmp_path / "r")
    entries = json.loads((folder / "manifest.json").read_text())
    entries.pop("crc32", None)
    names = ("steps_per_generation", "gradient_accumulation_steps")
    entries |= {"source": "trl", "config": dict.fromkeys(names, value)}
    (folder / "manifest.json").write_text(json.dumps(entries))
    with pytest.raises(ValueError, match="steps_per_generation is"):
        steps_per_batch(entries["config"])
    for command in ("diagnose", "audit"):
        assert wapo([command, str(folder)]) in (0, 1)


@pytest.mark.parametrize(
    ("value", "default", "bounds", "found"),
    [
        (3, 1, (), 3), (None, 7, (), 7), (0, 1, (0, 5), 0), (4, 1, (0, 5), 4),
        (0.25, 1.0, (), 0.25), (2, 1.0, (), 2.0), ("sgd", "adamw", (), "sgd"),
        (5, 1, (0, 5), UserError), (-1, 1, (0, 5), UserError), (0.5, 1, (), UserError),
        (True, 1, (), UserError), ("3", 1, (), UserError), (3, "x", (), UserError),
        (float("inf"), 1.0, (), UserError), (1.0, 0.5, (0.0, 1.0), UserError),
    ],
)  # fmt: skip
def test_a_setting_is_of_its_kind_and_in_its_range(
    value: Any, default: Any, bounds: tuple[Any, ...], found: Any
) -> None:
    manifest = Manifest(name="r", config={"x": value})
    if found is UserError:
        with pytest.raises(UserError, match="setting x of run r is "):
            manifest.setting("x", default, *bounds)
        return
    got = manifest.setting("x", default, *bounds)
    assert (got, type(got)) == (found, type(found))


def test_values_are_kept_as_json_has_them() -> None:
    given = {
        "a": (1, 2.5, None, True), "b": {np.int64(3)}, "c": np.float32(0.5), "d": float("nan"),
        "e": Path("x"), "f": {"g": [float("inf")]}, "h": "\ud83d",
    }  # fmt: skip
    expected = {
        "a": [1, 2.5, None, True], "b": [3], "c": 0.5, "d": None, "e": "x", "f": {"g": [None]},
        "h": "\\ud83d",
    }  # fmt: skip
    assert plain(given) == expected


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"vocabulary": -1}, "vocabulary is -1, not a whole number from 0"),
        ({"seed": 2**63}, f"seed is {2**63}, not a whole number of 64 bits"),
        ({"seed": 1.5}, "seed is 1.5, not a whole number"),
        ({"temperature": 0}, "temperature is 0, not a positive number"),
        ({"token_fraction": float("nan")}, "token_fraction is nan, not a finite number"),
        ({"token_fraction": "x"}, "token_fraction is 'x', not a number"),
        ({"resumed": "x"}, "resumed is 'x', not a list of texts"),
        ({"name": []}, "name is a list, not a text"),
        ({"name": True}, "name is True, not a text"),
        ({"config": 3}, "config is 3, not a table of entries"),
        ({"objective": {"bounds": [1]}}, "objective is a table, not a table whose bounds is two n"),
        ({"objective": {"clip_eps": "x"}}, "not a table whose clip_eps is a number"),
        ({"name": {}}, "name is a table, not a text"),
        ({"seed": "x" * 60}, f"seed is '{'x' * 39}..., not a whole number"),
    ],
)
def test_an_entry_of_another_shape_is_refused(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as caught:
        Manifest.of(entry)
    assert str(caught.value).startswith("manifest entry ")
    assert said in str(caught.value)
    problems: list[str] = []
    Manifest.of(entry, problems)
    assert len(problems) == 1


def test_entries_at_their_bounds_are_kept() -> None:
    given = {
        "vocabulary": 0, "seed": -(2**63), "temperature": 1e-9, "token_fraction": 10**300,
        "objective": "grpo", "resumed": ("a",), "name": 3, "eval_before": {"x": 1, "y": None},
    }  # fmt: skip
    found = Manifest.of(given).to_dict()
    assert found["objective"] == {"name": "grpo"}
    assert (found["vocabulary"], found["seed"], found["temperature"]) == (0, -(2**63), 1e-9)
    assert (found["resumed"], found["name"], found["eval_before"]) == (["a"], "3", {"x": 1.0})
    bounds = Manifest.of({"objective": {"name": None, "bounds": (None, 2)}}).objective
    assert bounds == {"bounds": [None, 2.0]}
