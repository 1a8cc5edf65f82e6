"""One import from beginning to end: what becomes of the folder, what is refused, what is said."""

import json
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.import_sources import write_lines
from tests.support.logged import read
from wapo_analysis.errors import UserError
from wapo_analysis.importers import import_run
from wapo_analysis.importers.report import ImportReport
from wapo_analysis.importers.run import ImportSettings, _raise_alarms
from wapo_analysis.store import open_run


def log(file: Path, steps: int = 4, **more: Any) -> Path:
    rows = [{"step": s, "reward": 0.5, "entropy": 0.4} | more for s in range(1, steps + 1)]
    return write_lines(file, rows)


def test_an_imported_run_may_be_read_by_others(tmp_path: Path) -> None:
    import_run(log(tmp_path / "m.jsonl"), tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o755


@pytest.mark.parametrize(
    ("settings", "name", "label"),
    [
        ({}, "out", "out"),
        ({"name": "mine"}, "mine", "mine"),
        ({"objective": "wapo"}, "out", "WAPO"),
        ({"objective": "wapo", "name": "mine"}, "mine", "WAPO"),
        ({"objective": "wapo", "label": "ours"}, "out", "ours"),
        ({"label": "ours"}, "out", "ours"),
    ],
)
def test_name_and_label_of_an_imported_run(
    settings: dict[str, str], name: str, label: str, tmp_path: Path
) -> None:
    source = log(tmp_path / "m.jsonl", 1)
    import_run(source, tmp_path / "out", ImportSettings(**settings))  # type: ignore[arg-type]
    run = open_run(tmp_path / "out")
    assert (run.name, run.label) == (name, label)


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_is_positive(temperature: float, tmp_path: Path) -> None:
    source = log(tmp_path / "m.jsonl", 1)
    with pytest.raises(UserError, match="temperature must be positive"):
        import_run(source, tmp_path / "out", ImportSettings(temperature=temperature))
    import_run(source, tmp_path / "out", ImportSettings(temperature=0.5))
    assert open_run(tmp_path / "out").temperature == 0.5


def test_the_run_may_not_lie_in_the_folder_that_is_read(tmp_path: Path) -> None:
    log(tmp_path / "job" / "m.jsonl")
    with pytest.raises(UserError, match="lies inside the source"):
        import_run(tmp_path / "job", tmp_path / "job" / "run")
    import_run(tmp_path / "job" / "m.jsonl", tmp_path / "job" / "run")
    assert len(open_run(tmp_path / "job" / "run").steps) == 4


def test_of_logs_in_other_forms_four_are_named(tmp_path: Path) -> None:
    data = {"critic/score/mean": 0.5, "actor/entropy": 0.4}
    write_lines(tmp_path / "job" / "run.jsonl", [{"step": s, "data": data} for s in range(1, 5)])
    text = "".join(f"step:{s} - critic/score/mean:0.5 - actor/entropy:0.4\n" for s in range(1, 5))
    for n in range(5):
        (tmp_path / "job" / f"rank{n}.log").write_text(text + f"# {n}\n")
    _, report = read(tmp_path / "job", tmp_path / "out")
    (said,) = [text for text in report.events if text.startswith("also there")]
    names = "rank0.log, rank1.log, rank2.log, rank3.log"
    assert said == f"also there, not read: {names}; name one to read it instead"


def test_a_sample_of_tokens_alone_is_a_run(tmp_path: Path) -> None:
    data = tmp_path / "plots" / "run" / "data"
    (data / "token_bins").mkdir(parents=True)
    (data / "token_bins" / "token_bins.jsonl").write_text("{}\n")
    half = np.full(3, 0.5)
    np.savez(data / "scatter_step_0.npz", prob_train=half, prob_inference=half, advantages=half)
    report = import_run(tmp_path / "plots", tmp_path / "out")
    assert (report.steps, report.token_rows) == (0, 3)


@pytest.mark.parametrize(
    ("chosen", "reward"),
    [("b", 0.2), ("b.jsonl", 0.2), ("seed-1", 0.1), ("x", None), (None, None)],
)
def test_of_several_logs_one_is_chosen_by_its_name_or_a_part_of_its_path(
    chosen: str | None, reward: float | None, tmp_path: Path
) -> None:
    log(tmp_path / "job" / "seed-1" / "ab.jsonl", reward=0.1)
    log(tmp_path / "job" / "seed-2" / "b.jsonl", reward=0.2)
    if reward is None:
        with pytest.raises(UserError, match="2 files .* look like 2 runs"):
            read(tmp_path / "job", tmp_path / "out", run=chosen)
        return
    steps, _ = read(tmp_path / "job", tmp_path / "out", run=chosen)
    assert steps["reward"].tolist() == [reward] * 4


def test_one_log_is_read_whatever_run_is_asked_for(tmp_path: Path) -> None:
    assert len(read(log(tmp_path / "m.jsonl"), tmp_path / "out", run="other")[0]) == 4


# ---- what is said first


def alarms(kept: str, mapped: str = "", **more: int) -> list[str]:
    report = ImportReport("table", "t", mapped={name: name for name in mapped.split()}, **more)
    report.kept_keys.update(kept.split())
    _raise_alarms(report)
    return report.alarms


def test_the_log_of_supervised_fine_tuning_is_said_to_be_one() -> None:
    said = "this is the log of supervised fine-tuning"
    assert alarms("mean_token_accuracy", "loss")[0].startswith(said)
    assert alarms("mean_token_accuracy", "loss reward") == []
    assert alarms("mean_token_accuracy", "loss entropy") == []
    assert alarms("mean_token_accuracy", "loss", rollouts=1) == []
    assert alarms("mean_token_accuracy", "loss", token_rows=1) == []


def test_the_log_of_a_preference_objective_is_said_to_be_one() -> None:
    said = "rewards/chosen and rewards/rejected are of a preference objective"
    both = "rewards/chosen train/rewards/rejected"
    assert alarms(both, "loss")[0].startswith(said)
    assert len(alarms(both, "loss")) == 1
    assert alarms(both, "loss reward") == []
    assert not any(text.startswith(said) for text in alarms("rewards/chosen", "loss"))


def test_names_that_look_like_reward_or_entropy_are_proposed_where_neither_is_known() -> None:
    (told,) = alarms("my_return other", "loss")
    assert told.startswith("neither reward nor entropy was found")
    assert told.endswith("--map reward=my_return")
    assert alarms("other", "loss") == []
    (alone,) = alarms("my_return time/forward", "loss entropy")
    assert alone == "no reward was found; if this is what it looks like: --map reward=my_return"
    assert alarms("time/forward", "loss entropy") == [], "letters alone are no likeness here"
    assert alarms("policy_ent", "loss reward") == []


def test_a_log_without_any_column_to_judge_names_what_is_there() -> None:
    (told,) = alarms("zz my_return")
    assert "nothing to diagnose; numbers there: my_return, zz; if they are what" in told
    (bare,) = alarms("zz", "lr")
    assert bare.endswith("numbers there: lr, zz")
    (nothing,) = alarms("")
    assert nothing.endswith("so there is nothing to diagnose")


@pytest.mark.parametrize("names", [30, 31])
def test_of_many_names_the_first_thirty_are_named(names: int) -> None:
    (told,) = alarms(" ".join(f"n{k:02}" for k in range(names)))
    shown = ", ".join(f"n{k:02}" for k in range(30))
    assert told.endswith(f"numbers there: {shown}" + (" and 1 more" if names > 30 else ""))


# ---- why nothing was imported


def refused(file: Path, *lines: dict[str, Any] | str, **mapping: str) -> str:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    if texts:
        file.write_text("".join(f"{text}\n" for text in texts))
    with pytest.raises(UserError) as raised:
        read(file, file.parent / "out", **mapping)
    return str(raised.value)


def test_a_step_under_another_name_is_proposed_with_its_first_numbers(tmp_path: Path) -> None:
    rows = [{"tick": 3 * n, "reward": 0.5} for n in range(4)]
    told = refused(tmp_path / "m.jsonl", *rows)
    assert told.endswith("--map step=tick takes tick (0, 3, 6, ...)")
    unknown = [{"tick": 3 * n, "my_return": 0.5} for n in range(4)]
    told = refused(tmp_path / "n.jsonl", *unknown)
    assert told.endswith("--map step=tick --map reward=my_return takes tick (0, 3, 6, ...)")
    more = [{f"tick{k}": n for k in range(7)} | {"reward": 0.5} for n in range(4)]
    told = refused(tmp_path / "o.jsonl", *more)
    assert told.endswith("(0, 1, 2, ...); or one of tick1, tick2, tick3, tick4, tick5")


@pytest.mark.parametrize("records", [1, 2])
def test_results_are_no_log_of_a_training(records: int, tmp_path: Path) -> None:
    row = {f"score{k}": 0.25 for k in range(7)} | {"model": "m"}
    told = refused(tmp_path / "m.jsonl", *[row] * records)
    many = "its 2 records have" if records > 1 else "its record has"
    names = ", ".join(f"score{k}" for k in range(6))
    assert f"{many} no step (numbers: {names}), so it is no log of a training" in told
    words = refused(tmp_path / "n.jsonl", *[{"model": "m"}] * records)
    assert f"{many} no step and no number" in words


def test_the_first_broken_line_is_the_reason_where_all_are_broken(tmp_path: Path) -> None:
    told = refused(tmp_path / "m.jsonl", {"step": "x", "reward": 0.5}, '{"step": 1, "rew')
    assert told.endswith("no step, token row or rollout; first broken line: m.jsonl:1: no step")


def test_records_without_a_step_among_broken_lines_do_not_hide_these(tmp_path: Path) -> None:
    told = refused(tmp_path / "m.jsonl", {"a": 0.5}, {"step": "x", "a": 0.25})
    assert told.endswith("no step, token row or rollout; first broken line: m.jsonl:2: no step")
    empty = refused(tmp_path / "n.jsonl", {"step": 1}, {"step": 2})
    assert empty.endswith("n.jsonl: no step, token row or rollout")


def test_the_first_two_things_that_an_import_did_are_named_where_it_held_nothing(
    tmp_path: Path,
) -> None:
    (tmp_path / "m.csv").write_text("step,step,b,b,c,c\nx,x,x,x,x,x\ny,y,y,y,y,y\n")
    told = refused(tmp_path / "m.csv")
    assert told.count("the first is read, the rest is") == 2


def test_a_name_of_the_mapping_that_is_nowhere_is_refused_with_those_that_are(
    tmp_path: Path,
) -> None:
    rows = [{"step": s, "reward": 0.5, "note": "x"} for s in (1, 2)]
    told = refused(tmp_path / "m.jsonl", *rows, entropy="ent")
    assert "in --map 'ent'; allowed: note, reward" in told
    assert refused(tmp_path / "n.jsonl", *rows, reward="rewrad").endswith("did you mean 'reward'?")
