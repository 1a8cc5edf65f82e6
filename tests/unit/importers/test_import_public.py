"""Cuts of public logs, numbers and names alone: what must be read of each, and what is no log."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.import_sources import write_lines
from tests.support.logged import read
from tests.unit.importers.test_import_boards import events
from wapo_analysis.errors import UserError

# minimind, trainer/train_grpo.py: three records of a run, here at every batch of an epoch.
MINIMIND = (
    "Epoch:[{epoch}/2]({at}/8), Reward: {reward:.4f}, KL_ref: -0.0010, Adv Std: 0.9258, "
    "Adv Mean: -0.0000, Actor Loss: 0.0065, Avg Response Len: 286.75, Learning Rate: 0.00000030\n"
)


def test_batches_of_epochs_are_the_steps(tmp_path: Path) -> None:
    log = tmp_path / "grpo.log"
    text = [
        MINIMIND.format(epoch=epoch, at=at, reward=-2 + 0.1 * at)
        for epoch in (1, 2)
        for at in range(1, 9)
    ]
    log.write_text("Model Params: 30.03M\n" + "[DEBUG] gen[0] 50% of 3 * 4 = 12\n".join(text))
    steps, report = read(log, tmp_path / "out")
    assert steps.index.tolist() == list(range(1, 17))
    assert steps["reward"].tolist() == pytest.approx([-2 + 0.1 * n for n in range(1, 9)] * 2)
    assert (steps["length"] == 286.75).all()
    assert (steps["loss"] == 0.0065).all()
    assert report.trainer == "minimind"
    # The mean of reference minus policy is a log-ratio of either sign, not the KL divergence.
    assert steps["kl_ref"].isna().all()
    assert "console/KL_ref" in steps


@pytest.mark.parametrize(
    "form",
    [
        "Epoch: [0][{at:3}/80]  Loss: 0.25  Reward: {reward:.3f}",
        "epoch 1/1 ({at}/80) | reward {reward:.3f} | loss 0.25",
        "[INFO] Epoch 1 [{at} / 80] reward={reward:.3f} loss=0.25",
    ],
)
def test_other_forms_of_a_batch_of_an_epoch(form: str, tmp_path: Path) -> None:
    log = tmp_path / "t.log"
    log.write_text("".join(form.format(at=n, reward=n / 100) + "\n" for n in range(10, 81, 10)))
    steps, _ = read(log, tmp_path / "out")
    assert steps.index.tolist() == list(range(10, 81, 10))
    assert steps["reward"].tolist() == pytest.approx([n / 100 for n in range(10, 81, 10)])


def test_mean_and_std_belong_to_the_word_before_and_bars_within_a_step_are_no_steps(
    tmp_path: Path,
) -> None:
    log, bar = tmp_path / "it.log", "Iter {n} groups: {p}%|#| {k}/4 [00:07<00:02,  7.94s/q, "
    with log.open("w") as out:
        for n in range(1, 10):
            for k in range(5):
                out.write(bar.format(n=n, p=25 * k, k=k) + f"loss=-0.00{k}, mean_r=0.928]\n")
            out.write(
                f"2026-04-26 03:38:38,866 INFO __main__ - Iter {n} | loss=0.0006 | "
                f"reward mean=0.9{n} std=0.164 | groups=12 skipped=8(0var=8) | lr=1.06e-06\n"
            )
    steps, _ = read(log, tmp_path / "out")
    assert steps.index.tolist() == list(range(1, 10))
    assert steps["reward"].tolist() == pytest.approx([0.9 + n / 100 for n in range(1, 10)])
    assert (steps["reward_std"] == 0.164).all()
    assert (steps["loss"] == 0.0006).all()


def test_bars_of_different_length_are_a_record_each(tmp_path: Path) -> None:
    log = tmp_path / "art.log"
    log.write_text(
        "".join(
            f"train: 100%|##| {k}/{n} [02:46<00:00,  1.50it/s, loss={loss}, grad_norm=0.3]\n"
            for n, loss in ((250, 0.5), (12, 0.4), (9, 0.3), (14, 0.2))
            for k in (n // 2, n)
        )
    )
    steps, report = read(log, tmp_path / "out")
    assert steps["loss"].tolist() == [0.5, 0.4, 0.3, 0.2]
    assert not any("logging_steps" in text for text in report.events)


def test_a_mean_by_another_name(tmp_path: Path) -> None:
    record = {"loss": [1e-4] * 9, "avg_entropy": [4.2] * 9, "avg_clip_fraction": [0.1] * 9,
              "mean_kl": [0.02] * 9, "reward_avg": [0.5] * 9, "dev": {"10": 38.4}}  # fmt: skip
    (tmp_path / "m.json").write_text(json.dumps({"step": list(range(1, 10)), **record}))
    steps, _ = read(tmp_path / "m.json", tmp_path / "out")
    row = steps.loc[9, ["reward", "entropy", "clip_any", "kl_ref"]]
    assert row.tolist() == [0.5, 4.2, 0.1, 0.02]


def sft(step: int) -> dict[str, Any]:
    return {"loss": 0.86 - 0.05 * step, "grad_norm": 8.2, "learning_rate": 1.4e-6,
            "entropy": 0.79 - 0.05 * step, "num_tokens": 64220.0 * step,
            "mean_token_accuracy": 0.81, "epoch": 0.02 * step}  # fmt: skip


def grpo(step: int) -> dict[str, Any]:
    return {"loss": 0.01, "grad_norm": 0.3, "reward": 0.36 + 0.04 * step, "reward_std": 0.2,
            "entropy": 0.13, "completions/mean_length": 47.0, "epoch": 0.01 * step}  # fmt: skip


def test_supervised_fine_tuning_is_said_to_be_it(tmp_path: Path) -> None:
    (tmp_path / "sft.log").write_text("".join(f"{sft(n)}\n" for n in range(1, 13)))
    steps, report = read(tmp_path / "sft.log", tmp_path / "out")
    assert steps["entropy"].isna().all()
    assert len(steps) == 12
    (alarm,) = report.alarms
    assert "supervised fine-tuning" in alarm
    assert "--map" not in alarm


def test_fine_tuning_before_the_rl_run_is_left_out(tmp_path: Path) -> None:
    printed = [sft(n) for n in range(1, 6)] + [grpo(n) for n in range(1, 11)]
    text = "".join(f"{record}\n" for record in printed)
    outputs = [{"output_type": "stream", "text": ["{'images': [<PIL>]}\n", text]}]
    book = {"cells": [{"cell_type": "code", "outputs": outputs}]}
    (tmp_path / "n.ipynb").write_text(json.dumps(book))
    steps, report = read(tmp_path / "n.ipynb", tmp_path / "out")
    assert steps["reward"].tolist() == [grpo(n)["reward"] for n in range(1, 11)]
    assert (steps["entropy"] == 0.13).all()
    assert "5 records of supervised fine-tuning left out" in report.events


def test_a_table_of_a_notebook_whose_text_begins_as_json_does(tmp_path: Path) -> None:
    rows = "".join(f"<tr><td>{n}</td><td>0.01</td><td>{n / 10}</td></tr>" for n in range(1, 10))
    head = "<tr><th>Step</th><th>Training Loss</th><th>reward</th></tr>"
    shows = [{"data": {"text/plain": "{'prompt': 'a', 'n': [1, 2]}"}},
             {"data": {"text/plain": "[1, 2, 3]"}},
             {"text": "| file | size |\n|---|---|\n| a | 3 |\n"},
             {"data": {"text/html": f"<table>{head}{rows}</table>"}}]  # fmt: skip
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": [{"outputs": shows}]}))
    steps, report = read(tmp_path / "n.ipynb", tmp_path / "out")
    assert steps["reward"].tolist() == [n / 10 for n in range(1, 10)]
    assert not report.broken_lines
    assert not report.alarms


def test_a_notebook_without_outputs_says_so(tmp_path: Path) -> None:
    (tmp_path / "n.ipynb").write_text(json.dumps({"cells": [{"outputs": []}]}))
    with pytest.raises(UserError, match="n.ipynb shows no numbers: .* saved after its cells"):
        read(tmp_path / "n.ipynb", tmp_path / "out")


def test_a_few_lines_of_one_name_are_no_log(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("Testing the reward\n" + "  Reward: 0.25\n" * 12)
    with pytest.raises(UserError, match="nothing to import"):
        read(tmp_path / "t.txt", tmp_path / "out")


def test_a_start_that_failed_says_the_error(tmp_path: Path) -> None:
    begun = "(WorkerDict pid=19740) Total steps: 30, num_warmup_steps: 0\n{'n': 1, 'top_p': 1}\n"
    ends = "Traceback (most recent call last):\n  raise NotImplementedError\nNotImplementedError\n"
    for name, text in (("a.log", begun + ends), ("b.log", ends)):
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError, match=f"{name} ends in an error .*: NotImplementedError"):
            read(tmp_path / name, tmp_path / "out")


def test_epochs_are_the_steps_where_nothing_else_counts(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    rows = [{"epoch": n, "proxy_loss": 0.2, "avg_reward": 0.8 + n / 100} for n in range(1, 11)]
    (folder / "log.json").write_text(json.dumps(rows, indent=2))
    cells = "".join(f"{r['epoch']},{r['proxy_loss']},{r['avg_reward']}\n" for r in rows)
    (folder / "log.csv").write_text("epoch,proxy_loss,avg_reward\n" + cells)
    steps, report = read(folder, tmp_path / "out")  # the same log twice
    assert steps.index.tolist() == list(range(1, 11))
    assert steps["reward"].tolist() == pytest.approx([0.8 + n / 100 for n in range(1, 11)])
    assert "no record has a step: epoch is read as the step" in report.events


def test_results_are_no_log(tmp_path: Path) -> None:
    for n, result in enumerate(
        (
            {"accuracy": 0.43, "n": 200},
            [{"gold": 18, "pred": 18}, {"gold": 3, "pred": 2}],
            [{"model": "a", "em": 0.4}, {"model": "b", "em": 0.5}, {"model": "c", "em": 0.5}],
        )
    ):
        file = tmp_path / f"result-{n}.json"
        file.write_text(json.dumps(result))
        with pytest.raises(UserError, match=r"no step \(numbers: .*\), so it is no log"):
            read(file, tmp_path / "out")


def test_a_summary_of_runs_is_no_log(tmp_path: Path) -> None:
    rows = "".join(f"grpo-b32-r{n},{n},0.66,0.79\n" for n in (4, 8, 16, 32))
    (tmp_path / "runs.csv").write_text("run_name,num_rollouts,final_val,best_val\n" + rows)
    with pytest.raises(UserError, match="holds 4 runs, .* a summary of runs"):
        read(tmp_path / "runs.csv", tmp_path / "out")


# ---- folders


def test_data_and_results_beside_a_log_do_not_hide_it(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    write_lines(folder / "data" / "val.jsonl", [{"question": "q", "answer": "a"}] * 20)
    (folder / "eval.json").write_text(json.dumps({"em": 0.4, "n": 500}))
    (folder / "train.log").write_text("".join(f"{grpo(n)}\n" for n in range(1, 13)))
    (folder / "sft.log").write_text("".join(f"{sft(n)}\n" for n in range(1, 30)))
    steps, report = read(folder, tmp_path / "out")
    assert steps["reward"].tolist() == [grpo(n)["reward"] for n in range(1, 13)]
    assert "also there, without a reward, not read: sft.log" in report.events


def test_many_runs_of_one_folder_are_no_ranks(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    folder.mkdir()
    for seed in range(5):
        rows = [{"type": "config", "args": {"seed": seed}}]
        rows += [{"step": s, "mean_reward": 0.1 * seed + s / 100} for s in range(0, 60, 5 + seed)]
        write_lines(folder / f"log_seed{seed}.jsonl", rows)
    with pytest.raises(UserError, match="5 files of .* look like 5 runs; name one of them: log_"):
        read(folder, tmp_path / "out")
    steps, _ = read(folder, tmp_path / "one", run="log_seed3")
    assert steps["reward"].iloc[-1] == pytest.approx(0.3 + 56 / 100)


def test_the_last_start_of_a_tensorboard_folder_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "tb"
    for place, (value, last) in enumerate(((0.9, 40), (0.5, 20), (0.1, 3))):
        events(folder, lambda s, v=value: {"reward": v, "loss": 0.1}, range(1, last + 1))
        (new,) = (f for f in folder.iterdir() if not f.name.startswith("events.out.tfevents.1."))
        new.rename(folder / f"events.out.tfevents.1.{place}")
    steps, report = read(folder, tmp_path / "out")
    assert steps["reward"].tolist() == pytest.approx([0.5] * 20)
    assert any("3 starts are in this folder; read is" in text for text in report.events)


def test_what_tensorboard_writes_side_by_side_or_after_a_resume_is_one_run(tmp_path: Path) -> None:
    folder = tmp_path / "tb"
    parts = (("reward", range(1, 13)), ("entropy", range(1, 25)), ("reward", range(13, 25)))
    for place, (name, steps) in enumerate(parts):
        events(folder, lambda s, n=name: {n: s / 100}, steps)
        (new,) = (f for f in folder.iterdir() if not f.name.startswith("events.out.tfevents.1."))
        new.rename(folder / f"events.out.tfevents.1.{place}")
    read_steps, report = read(folder, tmp_path / "out")
    assert read_steps["reward"].tolist() == pytest.approx([s / 100 for s in range(1, 25)])
    assert read_steps["entropy"].tolist() == pytest.approx([s / 100 for s in range(1, 25)])
    assert not report.events


def test_what_was_printed_beside_a_wandb_file_is_read_where_its_library_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run-20250302_115218-abc"
    (run / "files").mkdir(parents=True)
    (run / "run-abc.wandb").write_bytes(b":W&B\xbe\xef\x00")
    line = "(main_task pid=4) step:{n} - critic/score/mean:{reward} - actor/entropy_loss:0.4\n"
    printed = "".join(line.format(n=n, reward=n / 100) for n in range(1, 11))
    (run / "files" / "output.log").write_text(printed)
    monkeypatch.setitem(sys.modules, "wandb.sdk.internal.datastore", None)
    steps, _ = read(run / "run-abc.wandb", tmp_path / "out")
    assert steps["reward"].tolist() == [n / 100 for n in range(1, 11)]
