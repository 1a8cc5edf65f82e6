"""Lines as trainers of today print them, and what stands between them in a log."""

import json
from pathlib import Path

import pytest

from tests.support.import_sources import write_lines
from tests.support.logged import read
from wapo_analysis.errors import UserError
from wapo_analysis.importers.printed import line_of

STEPS = range(1, 13)
REWARD = [0.3 + n / 50 for n in STEPS]


def log(folder: Path, text: str) -> Path:
    """A log with some text for each step: its number, its reward, its number from 0."""
    file = folder / "t.log"
    file.write_text("".join(text.format(n=n, r=0.3 + n / 50, i=n - 1) + "\n" for n in STEPS))
    return file


def test_prime_rl_prints_the_time_before_names_without_a_colon(tmp_path: Path) -> None:
    orchestrator = (
        "12:00:00 SUCCESS Step {n} |  1m 20s | Reward {r:.4f} | Trainable 96/512 (18.8%) | "
        "Turns 1.0 | Max Off-Policy 2 | Error 0.0% | Truncation 12.5%\n"
        "12:00:01 SUCCESS Evaluated aime24 (Step {n}) | Policy v{n} |    12s | Reward 0.1000 | "
        "Turns 1.0 | Truncation 2.0%"
    )
    steps, report = read(log(tmp_path, orchestrator), tmp_path / "out")
    assert steps["reward"].tolist() == pytest.approx(REWARD), "without the held-out reward"
    assert (steps["eval_reward"] == 0.1).all()
    assert (steps["truncated"] == 0.125).all()
    assert (steps["seconds"] == 80).all()
    assert report.trainer == "prime-rl"
    assert not report.events


def test_prime_rls_trainer_prints_its_gradient_norm(tmp_path: Path) -> None:
    trainer = (
        "12:00:00 SUCCESS Step {n} |   350ms | Loss 0.0010 | Entropy 0.4000 | Mismatch KL 0.0020 | "
        "Grad. Norm 0.2500 | LR 1.00e-06 | Throughput 1234 tokens/s | MFU 12.3%"
    )
    steps, _ = read(log(tmp_path, trainer), tmp_path / "out")
    columns = ["entropy", "kl_old", "grad_norm", "lr", "seconds"]
    assert (
        steps[columns].to_numpy().tolist() == [pytest.approx([0.4, 0.002, 0.25, 1e-6, 0.35])] * 12
    )


def test_names_close_to_their_numbers_may_have_commas_between_them(tmp_path: Path) -> None:
    agent = (
        "Epoch:[1/1]({n}/12), Reward:{r:.4f}, KL:0.0010, GrpStd:0.3000, AdvStd:0.9000, "
        "Loss:0.0100, AvgLen:420.50, AdvMean:0.0000, LR:0.00000100"
    )
    steps, report = read(log(tmp_path, agent), tmp_path / "out")
    assert steps["reward"].tolist() == pytest.approx(REWARD)
    columns = ["kl_ref", "advantage_std", "loss", "length", "lr"]
    assert steps[columns].to_numpy().tolist() == [[0.001, 0.9, 0.01, 420.5, 1e-6]] * 12
    assert report.trainer == "minimind"


@pytest.mark.parametrize(
    "heading",
    [
        "[INFO|nano_r1_script.py:891] Iteration {i}/1000",
        "[rlvr_pipeline.py (487)] [INFO] pipeline step {i} start...",
        "Starting step {i}",
    ],
)
def test_dicts_without_a_step_have_that_of_the_heading_above_them(
    heading: str, tmp_path: Path
) -> None:
    text = heading + "\n[INFO] KEY METRICS: {{'train/rewards': {r}, 'loss': 0.1}}"
    steps, report = read(log(tmp_path, text), tmp_path / "out")
    assert steps.index.tolist() == [n - 1 for n in STEPS]
    assert steps["reward"].tolist() == pytest.approx(REWARD)
    assert not report.events


@pytest.mark.parametrize(
    "line",
    [
        "[step {n}] eval: reward=0.1 acc=0.2",
        "Validation step {n}, reward: 0.1, acc: 0.2",
        "[eval] step={n} reward=0.1 acc=0.2",
        "step {n} | test | reward 0.1 | acc 0.2",
        "Eval | reward: 0.1 | acc: 0.2",
        "  val reward=0.1 acc=0.2",
    ],
)
def test_lines_of_an_evaluation_are_not_of_the_training(line: str, tmp_path: Path) -> None:
    file = log(tmp_path, "step {n}: reward={r} entropy=0.4\n" + line)
    steps, _ = read(file, tmp_path / "out")
    assert steps["reward"].tolist() == pytest.approx(REWARD)
    assert (steps["eval_reward"] == 0.1).all()
    assert (steps["eval/acc"] == 0.2).all()


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("step 3 loss=0.1 eval_reward=0.5", {"loss": 0.1, "eval_reward": 0.5}),
        ("step 3 loss=0.1 val loss=0.5", {"loss": 0.1}),
        ("train step 3, test: loss=0.1", {"loss": 0.1}),
        ("step 3 evals=4 loss=0.1", {"evals": 4, "loss": 0.1}),
        ("Evaluating: 3/10 [00:01<00:02, 1.2it/s, reward=0.5]", None),
        ("eval step 3 eval/loss=0.5", {"eval/loss": 0.5}),
    ],
)
def test_which_lines_are_those_of_an_evaluation(text: str, values: dict[str, float] | None) -> None:
    line = line_of(text)
    assert (line.values if line else None) == values


def test_lines_after_an_evaluation_without_a_heading_are_of_the_training(tmp_path: Path) -> None:
    text = "Evaluating...\nEvaluation:\nloss: 0.1, reward: {r}, entropy: 0.4"
    steps, _ = read(log(tmp_path, text), tmp_path / "out")
    assert steps["reward"].tolist() == pytest.approx(REWARD)


@pytest.mark.parametrize("name", ["[test]", "test-grpo", "[test-2]", "eval:"])
def test_a_run_may_be_called_test(name: str, tmp_path: Path) -> None:
    steps, _ = read(log(tmp_path, name + " step={n} reward={r} entropy=0.4"), tmp_path / "out")
    assert steps["reward"].tolist() == pytest.approx(REWARD)
    assert (steps["entropy"] == 0.4).all()


def test_text_between_the_lines_that_names_a_step_is_no_step(tmp_path: Path) -> None:
    text = "step {n}: reward={r} length=100\nSample: Step {k}: y = 5, so the length = 9"
    file = tmp_path / "t.log"
    file.write_text(
        "".join(
            text.format(n=n, r=r, k=n % 3 + 1) + "\n" for n, r in zip(STEPS, REWARD, strict=True)
        )
    )
    steps, report = read(file, tmp_path / "out")
    assert steps["length"].tolist() == [100.0] * 12
    assert any("as completions do: 12" in text for text in report.events)


@pytest.mark.parametrize(
    "other", ["update {i}: grad_norm=0.5", "iteration {n}: grad_norm=0.5", "iter 7: grad_norm=0.5"]
)
def test_lines_that_count_otherwise_are_kept(other: str, tmp_path: Path) -> None:
    text = "step 1{n:02}: reward={r} entropy=0.4\n" + other
    steps, _ = read(log(tmp_path, text), tmp_path / "out")
    kept = int((steps["grad_norm"] == 0.5).sum()) if "grad_norm" in steps else 0
    assert kept == (0 if "iter 7" in other else 12)
    assert steps["reward"].dropna().tolist() == pytest.approx(REWARD)


@pytest.mark.parametrize("first", [0, 1])
def test_steps_that_are_counted_anew_in_each_epoch_follow_each_other(
    first: int, tmp_path: Path
) -> None:
    rows = [{"epoch": i // 4, "step": i % 4 + first, "reward": i / 20} for i in range(12)]
    steps, report = read(write_lines(tmp_path / "m.jsonl", rows), tmp_path / "a")
    assert steps.index.tolist() == list(range(first, 12 + first))
    assert steps["reward"].tolist() == [i / 20 for i in range(12)]
    assert report.events == ["the step counts within each epoch: the epochs follow each other"]
    file = tmp_path / "t.log"
    file.write_text(
        "".join(f"Epoch {r['epoch'] + 1}/3 Step {r['step']}/4 reward={r['reward']}\n" for r in rows)
    )
    again, _ = read(file, tmp_path / "b")
    assert again["reward"].tolist() == steps["reward"].tolist()


def test_a_run_that_was_resumed_in_an_epoch_goes_on_from_there(tmp_path: Path) -> None:
    rows = [{"epoch": i // 4, "step": i % 4, "reward": i / 20} for i in range(12)]
    again = [{**row, "reward": 1.0} for row in rows[6:8]]
    steps, report = read(write_lines(tmp_path / "m.jsonl", rows[:10] + again), tmp_path / "a")
    assert steps.index.tolist() == list(range(10))
    assert steps["reward"].tolist()[5:9] == [0.25, 1.0, 1.0, 0.4]
    one = [{"epoch": 0.1 * i, "step": i, "reward": i / 20} for i in (1, 2, 3, 2, 3, 4)]
    steps, report = read(write_lines(tmp_path / "n.jsonl", one), tmp_path / "b")
    assert steps.index.tolist() == [1, 2, 3, 4]
    assert "within each epoch" not in " ".join(report.events)


def test_a_learning_rate_that_was_rounded_away_is_not_zero(tmp_path: Path) -> None:
    text = "Step {n}:\n{{'policy/policy_lr': '0.0000', 'reward/avg_raw_reward': '{r:.4f}'}}"
    steps, report = read(log(tmp_path, text), tmp_path / "out")
    assert steps["reward"].tolist() == pytest.approx(REWARD)
    assert steps["lr"].isna().all()
    assert any("policy_lr is printed as 0" in note for note in report.notes)


def test_an_epoch_above_headings_goes_on_and_results_of_a_validation_are_its_own(
    tmp_path: Path,
) -> None:
    text = ""
    for n in STEPS:
        if n % 4 == 1:
            text += f"\n{'=' * 25} Epoch {n // 4 + 1}/3 {'=' * 25}\n"
        text += f"\n{'=' * 25} Step {(n - 1) % 4 + 1}/4 {'=' * 25}\n▶ Preparing batch...\n"
        text += f"\n📊 Training Results:\n  • Loss: 0.0100\n  • Avg Reward: {0.3 + n / 50:.4f}\n"
        text += "\n📊 Validation Results:\n    • Accuracy: 0.1000\n"
    (tmp_path / "t.log").write_text(text)
    steps, report = read(tmp_path / "t.log", tmp_path / "out")
    assert steps.index.tolist() == list(STEPS)
    assert steps["reward"].tolist() == pytest.approx(REWARD)
    assert (steps["eval_reward"] == 0.1).all()
    assert report.events == ["the step counts within each epoch: the epochs follow each other"]


@pytest.mark.parametrize(
    "text",
    [
        "🚀 Step {n}/12 │ 🎯 reward {r:.3f} │ 🔥 entropy 0.4 │ ⏱ 8.1s",
        "---- iteration {n} ----\nreward_mean : {r:.3f}\nentropy     : 0.4\ntokens/s    : 12.5",
    ],
)
def test_bars_of_boxes_and_headings_in_words(text: str, tmp_path: Path) -> None:
    steps, report = read(log(tmp_path, text), tmp_path / "out")
    assert steps.index.tolist() == list(STEPS)
    assert steps["reward"].tolist() == pytest.approx(REWARD)
    assert (steps["entropy"] == 0.4).all()
    assert not report.events


def test_the_table_of_a_notebook_goes_before_what_its_cells_printed(tmp_path: Path) -> None:
    rows = "".join(f"<tr><td>{n}</td><td>{0.3 + n / 50}</td></tr>" for n in STEPS)
    table = f"<table><tr><th>Step</th><th>reward</th></tr>{rows}</table>"
    said = "".join(f"Response:\nstep 1: the loss = {n}\n" for n in STEPS)
    outputs = [
        {"output_type": "stream", "name": "stdout", "text": said},
        {"output_type": "display_data", "metadata": {}, "data": {"text/html": table}},
    ]
    cells = [{"cell_type": "code", "metadata": {}, "source": "", "outputs": outputs}]
    file = tmp_path / "n.ipynb"
    file.write_text(json.dumps({"nbformat": 4, "metadata": {}, "cells": cells}))
    steps, _ = read(file, tmp_path / "out")
    assert steps["reward"].tolist() == pytest.approx(REWARD)


@pytest.mark.parametrize("column", ["seed", "method"])
def test_runs_of_one_table_by_seed_or_method_are_told_apart(column: str, tmp_path: Path) -> None:
    kinds = [0, 1] if column == "seed" else ["grpo", "dapo"]
    rows = [{column: k, "step": n, "reward": n / 20 + 1} for k in kinds for n in STEPS]
    file = write_lines(tmp_path / "m.jsonl", rows)
    with pytest.raises(UserError, match=r"holds 2 runs; choose one .* (seed-0, seed-1|grpo, dapo)"):
        read(file, tmp_path / "a")
    steps, _ = read(file, tmp_path / "b", run="seed-1" if column == "seed" else "dapo")
    assert len(steps) == 12


@pytest.mark.parametrize("more", [{}, {"prompt": "a", "completion": "b"}])
def test_a_seed_of_each_step_or_sample_names_no_run(more: dict[str, str], tmp_path: Path) -> None:
    rows = [{"seed": n if not more else n % 2, "step": n, "reward": 0.5} | more for n in STEPS]
    steps, _ = read(write_lines(tmp_path / "m.jsonl", rows), tmp_path / "out")
    assert len(steps) == 12


@pytest.mark.parametrize(
    "text",
    [
        "✨ Global step {n}: {{'reward': {r}, 'policy_loss': 0.1, 'vllm_kl': 0.0}}\n✨ Evaluation "
        "completed in 0:01:02, global_step {n}, eval_metrics: {{'eval_math500_pass1': 0.1}}",
        "Step {n}: \n{{'reward/avg_raw_reward': '{r:.4f}', 'trainer/global_step': {n}}}\n"
        "Step {n}: \n{{'eval/all/avg_score': '0.1000'}}",
    ],
)
def test_a_printed_evaluation_without_a_step_is_of_the_step_before(
    text: str, tmp_path: Path
) -> None:
    steps, _ = read(log(tmp_path, text), tmp_path / "out")
    assert steps.index.tolist() == list(STEPS)
    assert steps["reward"].tolist() == pytest.approx(REWARD)
    assert (steps["eval_reward"] == 0.1).all()


def test_a_downloaded_scalar_of_an_unknown_name_is_kept_beside_known_ones(tmp_path: Path) -> None:
    tags = ["global_train_rewards_score_mean", "actor_train_perplexity", "val_acc"]
    for tag in tags:
        rows = "".join(f"{1.7e9 + n},{n},{n / 20}\n" for n in STEPS)
        file = tmp_path / "tb" / f"run-.-tag-{tag}.csv"
        file.parent.mkdir(exist_ok=True)
        file.write_text("Wall time,Step,Value\n" + rows)
    steps, _ = read(tmp_path / "tb", tmp_path / "out")
    assert steps["reward"].tolist() == [n / 20 for n in STEPS]
    assert steps["tensorboard/actor_train_perplexity"].tolist() == steps["reward"].tolist()
    assert steps["eval_reward"].tolist() == steps["reward"].tolist()


def test_prime_rls_trainer_and_orchestrator_are_one_run(tmp_path: Path) -> None:
    line = "12:00:00 SUCCESS Step {n} |     9s | "
    for name, text in [("orchestrator", "Reward {r:.4f} | Turns 1.0"), ("trainer", "Entropy 0.4")]:
        log(tmp_path, line + text).rename(tmp_path / f"{name}.log")
    steps, report = read(tmp_path, tmp_path.parent / f"{tmp_path.name}-out")
    assert steps["reward"].tolist() == pytest.approx(REWARD)
    assert (steps["entropy"] == 0.4).all()
    assert not report.events


@pytest.mark.parametrize("text", ["[{n}] step={n} reward={r}", "[{n}] Step {n} | reward {r} | x 1"])
def test_a_number_in_brackets_begins_no_json(text: str, tmp_path: Path) -> None:
    steps, _ = read(log(tmp_path, text), tmp_path / "out")
    assert steps["reward"].tolist() == pytest.approx(REWARD)
