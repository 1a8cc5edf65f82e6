"""Which values of event files, downloads, charts and W&B's history are numbers of the log."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.logged import read
from wapo_analysis.errors import UserError
from wapo_analysis.importers.boards import _history, is_panel, metric_of
from wapo_analysis.importers.report import ImportReport


def board(folder: Path, steps: int = 4) -> Any:
    """An event file's writer that logged a reward."""
    summary = pytest.importorskip("torch.utils.tensorboard")
    writer = summary.SummaryWriter(str(folder))
    for step in range(1, steps + 1):
        writer.add_scalar("reward", step / 10, step)
    return writer


def test_tensors_of_other_plugins_and_of_several_numbers_are_no_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
    from tensorboard.util.tensor_util import make_tensor_proto

    def value(tag: str, array: Any, plugin: str) -> Any:
        data = SummaryMetadata.PluginData(plugin_name=plugin)
        return Summary.Value(
            tag=tag, tensor=make_tensor_proto(array), metadata=SummaryMetadata(plugin_data=data)
        )

    with board(tmp_path / "tb") as writer:
        values = [
            value("entropy", np.float32(0.5), "scalars"), value("loss", np.int64(2), ""),
            value("a", np.float32(0.5), "pr_curves"), value("b", np.arange(2.0), "scalars"),
            value("c", np.bool_(True), "scalars"), value("d", np.array(["x"]), "scalars"),
            Summary.Value(tag="e", image=Summary.Image(height=1, width=1)),
        ]  # fmt: skip
        writer.file_writer.add_summary(Summary(value=values), 2)
    steps, report = read(tmp_path / "tb", tmp_path / "out")
    assert steps.loc[2, ["entropy", "loss"]].tolist() == [0.5, 2]
    assert sorted(report.mapped) == ["entropy", "loss", "reward"]
    assert not report.kept_keys


def test_an_event_file_cut_before_its_first_number_says_so(tmp_path: Path) -> None:
    with board(tmp_path / "tb"):
        pass
    (file,) = (tmp_path / "tb").iterdir()
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(UserError, match="is cut or damaged after step 0"):
        read(tmp_path / "tb", tmp_path / "out")


def test_reading_event_files_leaves_the_librarys_log_as_it_was(tmp_path: Path) -> None:
    with board(tmp_path / "tb"):
        pass
    logger = logging.getLogger("tensorboard")
    before = logger.level, logger.propagate, list(logger.handlers)
    logger.setLevel(logging.ERROR)
    try:
        read(tmp_path / "tb", tmp_path / "out")
        assert (logger.level, logger.propagate) == (logging.ERROR, before[1])
        assert logger.handlers == before[2]
    finally:
        logger.setLevel(before[0])


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("my_step", None), ("global_step", None), ("rewards_name_mean", None),
        ("run_1_val_stop_rate", None), ("eval_dataset", None), ("reward_mean", "reward/mean"),
        ("train-completions_mean_length", "completions/mean_length"), ("x_mean_length",
        "mean_length"), ("grad_norm", "grad_norm"), ("xgrad_norm", None),
        ("run-a-tag-accuracy", "accuracy"), ("tag_token_accuracy", None), ("x_prompt_len", None),
    ],
)  # fmt: skip
def test_a_file_name_tells_the_longest_known_metric_at_its_end(stem: str, name: str | None) -> None:
    assert metric_of(stem) == name


def test_rows_of_a_download_without_a_step_or_a_value_are_named(tmp_path: Path) -> None:
    rows = [[1.76e9, 1, 0.5], [1.0, None, 0.5], [1.0, 3, "x"], [1.0, 4], "text", [1.0, 6, 0.25]]
    (tmp_path / "run-tag-entropy.json").write_text(json.dumps(rows))
    steps, report = read(tmp_path / "run-tag-entropy.json", tmp_path / "a")
    assert steps["entropy"].to_dict() == {1: 0.5, 6: 0.25}
    assert report.broken == [f"run-tag-entropy.json:{n}: no step or no value" for n in (2, 3, 4, 5)]
    assert (report.files, report.lines) == (1, 6)
    table = "Wall time,Step,Value\n1,1,0.5\n1,,0.5\n1,3,x\n1,4,0.25\n"
    (tmp_path / "run-tag-entropy.csv").write_text(table)
    steps, report = read(tmp_path / "run-tag-entropy.csv", tmp_path / "b")
    assert steps["entropy"].to_dict() == {1: 0.5, 4: 0.25}
    assert report.broken == [f"run-tag-entropy.csv:{n}: no step or no value" for n in (3, 4)]
    assert report.events == ["run-tag-entropy.csv is read as entropy"]


def test_a_chart_has_gaps(tmp_path: Path) -> None:
    """Rows without a step or a number of the chosen run are left out, which is no fault."""
    table = '"Step","a - reward","b - reward"\n1,0.5,\n,0.25,\n3,,0.5\n4,0.125,\n'
    (tmp_path / "panel.csv").write_text(table)
    steps, report = read(tmp_path / "panel.csv", tmp_path / "out", run="a")
    assert steps["reward"].to_dict() == {1: 0.5, 4: 0.125}
    assert (report.broken_lines, report.lines) == (0, 4)


@pytest.mark.parametrize(
    ("names", "panel"),
    [
        (["Relative Time (Wall)", "a - x"], True), (["Wall Time", "_step", "a - x"], True),
        (["a - x", "b - x"], False), (["Step", "_step"], False),
    ],
)  # fmt: skip
def test_a_chart_has_a_counter_beside_its_runs(names: list[str], panel: bool) -> None:
    assert is_panel(names) is panel


def test_values_of_a_wandb_summary_are_named_by_its_only_line(tmp_path: Path) -> None:
    files = tmp_path / "run" / "files"
    files.mkdir(parents=True)
    (files / "wandb-summary.json").write_text('{"reward": 0.5, "loss": "x", "_step": 7, "lr": NaN}')
    steps, report = read(tmp_path / "run", tmp_path / "out")
    assert (steps["reward"].to_dict(), report.files) == ({7: 0.5}, 1)
    assert report.places["values of loss that are no number, left out"] == ["wandb-summary.json:1"]
    (files / "wandb-summary.json").write_text("[1]")
    with pytest.raises(UserError, match="nothing to import"):
        read(tmp_path / "run", tmp_path / "b")


def history_of(*items: tuple[list[str], str], step: int | None = None) -> Any:
    """A record of W&B's history, with the fields and numbers of wandb_internal.proto."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="history.proto", package="w", syntax="proto3")
    fields: dict[str, list[tuple[str, int, int, int, str]]] = {
        "Item": [("key", 1, kind.TYPE_STRING, kind.LABEL_OPTIONAL, ""),
                 ("nested_key", 2, kind.TYPE_STRING, kind.LABEL_REPEATED, ""),
                 ("value_json", 16, kind.TYPE_STRING, kind.LABEL_OPTIONAL, "")],
        "Step": [("num", 1, kind.TYPE_INT64, kind.LABEL_OPTIONAL, "")],
        "History": [("item", 1, kind.TYPE_MESSAGE, kind.LABEL_REPEATED, ".w.Item"),
                    ("step", 2, kind.TYPE_MESSAGE, kind.LABEL_OPTIONAL, ".w.Step")],
    }  # fmt: skip
    for name, mine in fields.items():
        message = file.message_type.add(name=name)
        for field, number, of, label, of_type in mine:
            part = message.field.add(name=field, number=number, type=of, label=label)
            if of_type:
                part.type_name = of_type
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    found = message_factory.GetMessageClass(pool.FindMessageTypeByName("w.History"))()
    for path, value in items:
        names = {"key": path[0]} if len(path) == 1 else {"nested_key": path}
        found.item.add(value_json=value, **names)
    if step is not None:
        found.step.num = step
    return found


def test_a_record_of_wandbs_history() -> None:
    report = ImportReport("wandb", "w")
    items = [(["reward"], "0.5"), (["train", "loss"], "2"), (["bad"], "{"), (["plain"], '{"a": 1}'),
             (["image"], '{"_type": "image-file"}'), (["name"], '"_type"')]  # fmt: skip
    found = _history(history_of(*items, step=7), Path("run.wandb"), 3, report)
    assert found == {
        "reward": 0.5, "train/loss": 2, "plain": {"a": 1}, "name": "_type", "_step": 7,
    }  # fmt: skip
    what = "values of a W&B history that are no JSON"
    assert (report.counts[what], report.places[what]) == (1, ["run.wandb:3"])
    own = _history(history_of((["_step"], "9"), step=7), Path("run.wandb"), 1, report)
    assert own == {"_step": 9}
    assert _history(history_of((["reward"], "1")), Path("run.wandb"), 1, report) == {"reward": 1}
