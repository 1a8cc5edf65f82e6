"""Logs as strangers keep them: printed by name, tables in a text, JSON of every shape, pages."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from wapo_analysis.errors import UserError
from wapo_analysis.importers import ImportReport, import_run
from wapo_analysis.importers.rows import _at_most_zero
from wapo_analysis.importers.shapes import told_apart
from wapo_analysis.store import find_runs, open_run

STEPS = 12
ROWS = [
    {"step": s, "reward": s / 100, "entropy": 0.5 - s / 100, "grad_norm": 0.25, "loss": -0.01}
    for s in range(1, STEPS + 1)
]
NAMES = list(ROWS[0])
FRAME = pd.DataFrame(ROWS)


def read(source: Path, out: Path) -> tuple[pd.DataFrame, ImportReport]:
    """Steps by their number, and the report."""
    report = import_run(source, out)
    return open_run(out).steps.set_index("step"), report


def lines(form: str, end: str = "\n") -> str:
    return "".join(form.format(**row) + end for row in ROWS)


def assert_whole(steps: pd.DataFrame, first: int = 1) -> None:
    assert steps.index.tolist() == list(range(first, first + STEPS))
    assert steps["reward"].tolist() == pytest.approx(FRAME["reward"].tolist())


PAIRS = "reward={reward} entropy={entropy:.3f} loss={loss}"
TABLE = "".join(f"| {' | '.join(str(v) for v in row.values())} |\n" for row in ROWS)
HEADER = f"| {' | '.join(NAMES)} |\n"
PRINTED = {
    "logfmt": lines("step={step} " + PAIRS),
    "times": lines('2026-03-01T12:00:01Z level=info msg="a step" step={step} ' + PAIRS),
    "logging": lines("2026-03-01 12:00:01,123 - INFO - step={step}, reward={reward}, took=3.1s"),
    "ray": lines("\x1b[36m(Task pid=12)\x1b[0m [rank0] step={step} | reward={reward} | lr=1.0e-06"),
    "colons": lines("INFO:train: step: {step}, reward: {reward}, entropy: {entropy:.3f}"),
    "brackets": lines("[step {step}] reward={reward} entropy={entropy:.3f} tok/s=1,234"),
    "of all": lines("Step {step}/12 | loss: {loss} | reward: {reward} | lr: 1e-6 | 3.2s/it"),
    "torchtune": lines("Step {step} | loss:{loss} rewards:{reward} lr:1e-06 "),
    "nanogpt": lines("iter {step}: loss {loss}, reward {reward}, time 12.3ms"),
    "loguru": lines("2026-03-01 12:00:05.1 | INFO | train:main:42 - Step {step}: " + PAIRS),
    "documents": lines("step: {step}\nreward: {reward}\nentropy: {entropy:.3f}\n---"),
    "NeMo-RL": lines(
        "\n===== Step {step}/12 =====\n▶ Preparing batch...\n📊 Training Results:\n"
        "  • Loss: {loss}\n  • Avg Reward: {reward}\n  • Mean Generation Length: 80.5\n"
        "⏱️  Timing:\n  • Total step time: 12.34s"
    ),
    "torchforge": lines(
        "INFO === [GlobalReduce] - METRICS STEP {step} ===\n  episode/avg_prompt_tokens: 80.5\n"
        "  reward/evaluate_response/avg_total_reward: {reward}\n  rl_trainer/loss: {loss}\n"
        "=============================="
    ),
    "AReaL": lines(
        "Epoch 1/1 Step {step}/12 Train step {step}/12 done.\n"
        "│ ppo_actor/task_reward/avg │ {reward} │ ppo_actor/update/grad_norm │ 0.25 │"
    ),
    "bars": lines("\rtrain: 5%|# | {step}/12 [00:01<01:00, 1.0s/it, reward={reward}]", ""),
    "markdown": f"# My run\n\n{HEADER}|---|:--|---|---|--:|\n{TABLE}\nThe end.\n",
    "terminal": HEADER.replace("|", "┃") + TABLE.replace("|", "│"),
    "pandas": FRAME.to_string(),
    "blanks": FRAME.to_string(index=False),
}  # fmt: skip


@pytest.mark.parametrize("form", PRINTED)
def test_numbers_printed_by_name(form: str, tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(f"loading 7 shards, seed=3\n{PRINTED[form]}")
    steps, report = read(log, tmp_path / "run")
    assert_whole(steps)
    assert not report.alarms
    assert not report.broken_lines


def test_a_bar_by_epochs_goes_on_where_the_last_ended(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    bar = "Epoch {epoch}:  10%|# | {n}/6 [00:01<00:09, 1.0it/s, v_num=0, reward={r}]\n"
    log.write_text(
        "".join(
            bar.format(epoch=(s - 1) // 6, n=(s - 1) % 6 + 1, r=r)
            for s in range(1, STEPS + 1)
            for r in (0.0, s / 100)  # a bar is drawn before its numbers change and after
        )
    )
    assert_whole(read(log, tmp_path / "run")[0])


def test_lines_without_any_step_are_counted_and_blocks_are_one_record(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(lines("reward: {reward}\nentropy: {entropy:.3f}\n"))
    steps, report = read(log, tmp_path / "run")
    assert_whole(steps)
    assert steps["entropy"].notna().all()
    assert any("counted from 1" in text for text in report.events)


def test_records_whose_only_counter_counts_tokens_are_counted_themselves(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    rows = [{"num_tokens": 500 * row.pop("step"), **row} for row in map(dict, ROWS)]
    log.write_text("".join(json.dumps(row) + "\n" for row in rows))
    steps, report = read(log, tmp_path / "run")
    assert_whole(steps)
    assert any("counted from 1" in text for text in report.events)


def test_names_nobody_knows_are_listed(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(lines("step={step} my_return={reward} other=2"))
    _, report = read(log, tmp_path / "run")
    assert "--map reward=my_return" in report.alarms[0]


def test_a_log_that_is_none_and_prose_are_refused(tmp_path: Path) -> None:
    log = tmp_path / "notes.txt"
    log.write_text("ratio = 3: see step 4 of the recipe\nhttp://x:80/ at 12:00:01\n" * 9)
    with pytest.raises(UserError, match="no known file"):
        read(log, tmp_path / "run")


def test_a_log_that_ends_in_an_error_says_so(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(
        "ValueError: of an earlier start\n"
        + PRINTED["logfmt"]
        + "Traceback (most recent call last):\n"
        + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n"
    )
    _, report = read(log, tmp_path / "run")
    assert report.events == [
        "train.log ends in an error (line 15): torch.OutOfMemoryError: CUDA out of memory. "
        "Tried to allocate 2 GiB"
    ]


def test_an_unfinished_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    log = tmp_path / "train.log"
    log.write_text(PRINTED["logfmt"] + "step=13 reward=0.1 entropy=0.3 lo")
    steps, report = read(log, tmp_path / "run")
    assert_whole(steps)
    assert report.half_lines == ["train.log"]


LISTS = {name: FRAME[name].tolist() for name in NAMES}
INDEXED = FRAME.set_index("step")
SHAPES: dict[str, Any] = {
    "lists": LISTS,
    "lists beside settings": {"name": "a", "lr": 1e-6, "betas": [0.9, 0.95], **LISTS},
    "lists below a name": {"config": {"lr": 1e-6}, "history": LISTS},
    "records below a name": {"config": {"lr": 1e-6}, "history": {"train": ROWS}},
    "sacred": {n: {"steps": LISTS["step"], "values": LISTS[n]} for n in NAMES[1:]},
    "pairs": {n: [[row["step"], row[n]] for row in ROWS] for n in NAMES[1:]},
    "step to record": {str(r["step"]): {n: r[n] for n in NAMES[1:]} for r in ROWS},
    "long": [{"metricName": n, "metricValue": r[n], "step": r["step"]}
             for r in ROWS for n in NAMES[1:]],
    **{f"pandas {o}": json.loads(FRAME.to_json(orient=o))
       for o in ("split", "records", "index", "columns", "table")},
    **{f"pandas by step {o}": json.loads(INDEXED.to_json(orient=o))
       for o in ("split", "index", "columns", "table")},
}  # fmt: skip


@pytest.mark.parametrize("form", SHAPES)
def test_json_of_every_shape(form: str, tmp_path: Path) -> None:
    log = tmp_path / "metrics.json"
    log.write_text(json.dumps(SHAPES[form]))
    assert_whole(read(log, tmp_path / "run")[0])


def test_lists_of_another_length_are_left_out_and_said(tmp_path: Path) -> None:
    log = tmp_path / "metrics.json"
    log.write_text(json.dumps({**LISTS, "eval_reward": [0.1, 0.2, 0.3]}))
    steps, report = read(log, tmp_path / "run")
    assert_whole(steps)
    assert steps["eval_reward"].isna().all()
    assert any("eval_reward has another length" in text for text in report.events)


def test_json_lines_under_the_name_of_json_with_their_numbers_below_a_name(tmp_path: Path) -> None:
    log = tmp_path / "train.json"
    log.write_text("".join(json.dumps({"msg": "metrics", "metrics": row}) + "\n" for row in ROWS))
    assert_whole(read(log, tmp_path / "run")[0])


def test_a_record_by_name_knows_training_from_validation(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    entry = {"name": "reward", "value": 0.0, "step": 0, "context": {"subset": "train"}}
    log.write_text(
        "".join(
            json.dumps({**entry, "value": v, "step": row["step"], "context": {"subset": s}}) + "\n"
            for row in ROWS
            for s, v in (("train", row["reward"]), ("val", 0.5))
        )
    )
    steps, _ = read(log, tmp_path / "run")
    assert_whole(steps)
    assert (steps["eval_reward"] == 0.5).all()


def test_scalars_downloaded_as_json(tmp_path: Path) -> None:
    folder = tmp_path / "downloads"
    folder.mkdir()
    for name in ("reward", "entropy"):
        points = [[1.7e9 + r["step"], r["step"], r[name]] for r in ROWS]
        (folder / f"run1_train_{name}.json").write_text(json.dumps(points))
    steps, report = read(folder, tmp_path / "run")
    assert_whole(steps)
    assert steps["entropy"].notna().all()
    assert report.format == "tensorboard"


def test_metrics_of_mlflow(tmp_path: Path) -> None:
    for run in ("a1", "b2"):
        folder = tmp_path / "mlruns" / "0" / run / "metrics" / "train"
        folder.mkdir(parents=True)
        for name in ("reward", "entropy"):
            (folder / name).write_text(
                "".join(f"{1700000000000 + r['step']} {r[name]} {r['step']}\n" for r in ROWS)
            )
    assert_whole(read(tmp_path / "mlruns" / "0" / "a1", tmp_path / "run")[0])
    with pytest.raises(UserError, match="2 runs; choose one with --run"):
        read(tmp_path / "mlruns", tmp_path / "other")


def test_a_notebook_and_a_page(tmp_path: Path) -> None:
    html = FRAME.to_html()
    printed = [str({n: row[n] for n in NAMES[1:]}) + "\n" for row in ROWS]
    for name, output in (
        ("table", {"output_type": "display_data", "data": {"text/html": [html]}}),
        ("printed", {"output_type": "stream", "text": printed}),
    ):
        book = {"cells": [{"cell_type": "code", "outputs": [output]}], "nbformat": 4}
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(book))
        assert_whole(read(tmp_path / f"{name}.ipynb", tmp_path / f"run-{name}")[0])
    (tmp_path / "page.html").write_text(f"<html><body><h1>Run</h1>{html}</body></html>")
    assert_whole(read(tmp_path / "page.html", tmp_path / "run-page")[0])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("frame.pkl", b"\x80\x04", "a pickle can run code"),
        ("runs.xlsx", b"PK\x03\x04", "a workbook"),
        ("logs.zip", b"PK\x03\x04", "an archive.: unpack it"),
        ("metrics.yaml", b"- step: 1\n", "YAML"),
        ("values.json", b"[[1, 0.5], [2, 0.5]]", "looked for a list of objects"),
        ("bare.csv", b"1,0.5\n2,0.6\n3,0.7\n", "its first line must name the columns"),
    ],
)
def test_what_is_not_read_says_why_in_a_line(
    name: str, content: bytes, said: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=said) as raised:
        read(tmp_path / name, tmp_path / "run")
    assert "\n" not in str(raised.value)


def test_a_folder_with_a_manifest_of_another_tool_is_no_run_of_ours(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    (folder / "samples").mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"schema_version": 1, "run_id": "a"}))
    (folder / "events.jsonl").write_text(
        json.dumps({"timestamp": 1.7e9, "kind": "checkpoint", "step": 3, "data": {}}) + "\n"
    )
    parts = {"kl_positional": [0.1, 0.2], "reward_component.format": 0.5, "timestamp": 1.8e9}
    rows = [
        {"step": r["step"], "reward_mean": r["reward"], "entropy_mean": r["entropy"], **parts}
        for r in ROWS
    ]
    pd.DataFrame(rows).to_parquet(folder / "steps.parquet")
    texts = [
        {"step": r["step"], "group_id": "g", "prompt_text": "p", "completion_text": "c",
         "reward_total": 1.0, "capture_reason": reason}
        for r in ROWS for reason in ("random", "top_k")
    ]  # fmt: skip
    pd.DataFrame(texts).to_parquet(folder / "samples" / "shard-00000.parquet")
    steps, report = read(folder, tmp_path / "run")
    assert_whole(steps)
    assert (steps["kl_positional/1"] == 0.2).all()
    assert (steps["rewards/format/mean"] == 0.5).all()
    assert report.rollouts == STEPS
    assert report.counts["completions kept for their reward, left out"] == STEPS
    assert find_runs(tmp_path) == [tmp_path / "run"]


def test_each_held_out_set_is_kept_beside_their_mean(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    names = "val-core/gsm8k/acc/mean@4", "val-core/aime/acc/mean@4"
    log.write_text(
        "".join(
            json.dumps({"step": r["step"], "data": {names[0]: 0.75, names[1]: 0.25}}) + "\n"
            for r in ROWS
        )
    )
    steps, _ = read(log, tmp_path / "run")
    assert steps["eval_reward"].iloc[0] == pytest.approx(0.5)
    assert steps["eval_reward/gsm8k"].iloc[0] == pytest.approx(0.75)
    assert steps["eval_reward/aime"].iloc[0] == pytest.approx(0.25)


def test_what_is_told_of_an_import_is_short_and_names_the_first(tmp_path: Path) -> None:
    report = ImportReport("text", "log.txt")
    for number in range(1, 26):
        report.bad_line(tmp_path / "log.txt", number, "no number")
        report.count("odd values", tmp_path / "log.txt", number, times=2)
    assert report.broken_lines == 25
    assert report.broken == [f"log.txt:{number}: no number" for number in range(1, 21)]
    assert report.counts["odd values"] == 50
    assert report.places["odd values"] == ["log.txt:1", "log.txt:2", "log.txt:3"]


def test_a_row_of_a_long_table_is_its_metric_and_its_split() -> None:
    for given, expected in (
        ({"step": 1, "metric": "reward", "value": 0.5}, {"step": 1, "reward": 0.5}),
        ({"step": 1, "metric": " ", "value": 0.5}, {"step": 1, "metric": " ", "value": 0.5}),
        ({"step": 1, "metric": "reward", "value": "x"},
         {"step": 1, "metric": "reward", "value": "x"}),
        ({"step": 1, "split": "val", "reward": 0.5, "loss": None}, {"step": 1, "eval/reward": 0.5}),
        ({"step": 1, "split": "train", "reward": 0.5},
         {"step": 1, "split": "train", "reward": 0.5}),
    ):  # fmt: skip
        assert told_apart(given) == expected


def test_log_probabilities_just_above_zero_are_zero_and_others_null() -> None:
    report = ImportReport("text", "log.txt")
    values = np.array([-1.0, 0.0, 5e-6, 2e-5, np.nan])
    np.testing.assert_array_equal(
        _at_most_zero(values, "logp", report), [-1.0, 0.0, 0.0, np.nan, np.nan]
    )
    assert dict(report.counts) == {"logp above 0, now null": 1}
