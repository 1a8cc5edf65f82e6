"""Metrics logs as trainers and their boards write them: what is read, under which column."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from tests.support.import_sources import write_lines
from tests.support.logged import STEPS, read, records, trl, verl
from wapo_analysis.errors import UserError
from wapo_analysis.importers import detect
from wapo_analysis.importers.names import ALIASES
from wapo_analysis.schema import TABLES
from wapo_analysis.store import open_run

# What each trainer logs, and the columns that must come of it.
TRAINERS: dict[str, tuple[Callable[[int], dict[str, Any]], dict[str, float]]] = {
    "NeMo-RL": (
        lambda s: {"step": s, "train/reward": 0.5, "train/approx_entropy": 0.4,
                   "train/mean_gen_tokens_per_sample": 80.0, "train/truncation_rate": 0.02,
                   "train/gen_kl_error": 0.003, "train/kl_penalty": 0.002, "train/grad_norm": 0.3,
                   "train/lr": 1e-6, "validation/accuracy": 0.25},
        {"reward": 0.5, "entropy": 0.4, "length": 80, "truncated": 0.02, "engine_kl": 0.003,
         "kl_ref": 0.002, "grad_norm": 0.3, "eval_reward": 0.25},
    ),
    "OpenRLHF": (
        lambda s: {"train/global_step": s, "train/rollout/reward_std": 0.2, "train/reward": 0.5,
                   "train/return": 0.4, "train/entropy_loss": 0.4, "train/response_length": 80.0,
                   "train/actor_grad_norm": 0.3, "train/vllm_kl": 0.003, "train/kl": 0.002,
                   "train/policy_loss": 0.01, "train/actor_lr": 1e-6,
                   "train/rollout/truncated_rate": 0.02},
        {"reward": 0.5, "reward_penalised": 0.4, "entropy": 0.4, "length": 80, "grad_norm": 0.3,
         "engine_kl": 0.003, "kl_ref": 0.002, "truncated": 0.02},
    ),
    "SkyRL": (
        lambda s: {"trainer/global_step": s, "policy/policy_entropy": 0.4,
                   "policy/final_loss": 0.01, "policy/raw_grad_norm": 0.3,
                   "reward/avg_raw_reward": 0.5,
                   "generate/avg_num_tokens": 80.0, "async/staleness_mean": 1.5,
                   "policy/rollout_train_logprobs_abs_diff_mean": 0.02, "eval/all/avg_score": 0.25},
        {"entropy": 0.4, "grad_norm": 0.3, "reward": 0.5, "length": 80, "staleness": 1.5,
         "engine_logp_diff": 0.02, "eval_reward": 0.25},
    ),
    "slime": (
        lambda s: {"rollout/step": s, "rollout/rewards": 0.0, "rollout/raw_reward": 0.5,
                   "rollout/response_len/mean": 80.0, "rollout/truncated_ratio": 0.02,
                   "train/step": s, "train/loss": 0.01, "train/entropy_loss": 0.4,
                   "train/kl_loss": 0.002, "train/grad_norm": 0.3, "eval/step": s, "eval/aime": 0.2,
                   "eval/math-500": 0.3, "eval/aime-truncated_ratio": 0.9,
                   "train/train_rollout_logprob_abs_diff": 0.02},
        {"reward": 0.5, "length": 80, "truncated": 0.02, "entropy": 0.4, "kl_ref": 0.002,
         "grad_norm": 0.3, "engine_logp_diff": 0.02, "eval_reward": 0.25},
    ),
    "open-instruct": (
        lambda s: {"training_step": s, "scores": 0.5, "val/sequence_lengths": 80.0,
                   "val/stop_rate": 0.98, "policy/entropy_avg": 0.4, "objective/kl2_avg": 0.002,
                   "optim/grad_norm": 0.3, "loss/total_avg": 0.01, "num_steps_off_policy": 1.0,
                   "objective/verifiable_correct_rate": 0.4, "objective/math_reward": 0.7},
        {"reward": 0.5, "length": 80, "truncated": 0.02, "entropy": 0.4, "kl_ref": 0.002,
         "grad_norm": 0.3, "staleness": 1.0, "pass_rate": 0.4, "rewards/math/mean": 0.7},
    ),
    "AReaL": (
        lambda s: {"step": s, "ppo_actor/task_reward/avg": 0.5, "ppo_actor/update/entropy/avg": 0.4,
                   "ppo_actor/update/grad_norm": 0.3, "ppo_actor/no_eos_ratios/avg": 0.02,
                   "ppo_actor/update/version_stats/sample_staleness_theta_avg": 1.5},
        {"reward": 0.5, "entropy": 0.4, "grad_norm": 0.3, "truncated": 0.02, "staleness": 1.5},
    ),
    "torchforge": (
        lambda s: {"global_step": s, "reward/evaluate_response/avg_total_reward": 0.5,
                   "rl_trainer/avg_grpo_loss": 0.01, "policy/generate/avg_tokens_generated": 80.0,
                   "reward/evaluate_response/std_MathReward_reward": 0.2},
        {"reward": 0.5, "loss": 0.01, "length": 80, "rewards/MathReward/std": 0.2},
    ),
    "rllm": (
        lambda s: verl(s) | {"step": s, "batch/solve_none": 4, "batch/solve_all": 2,
                             "batch/solve_partial": 10},
        {"groups_all_wrong": 0.25, "groups_all_right": 0.125, "entropy": 0.4},
    ),
}  # fmt: skip


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_trainers_names(trainer: str, tmp_path: Path) -> None:
    make, wanted = TRAINERS[trainer]
    steps, report = read(write_lines(tmp_path / "m.jsonl", records(make)), tmp_path / "out")
    assert steps.index.tolist() == list(range(1, STEPS + 1))
    assert {name: steps.loc[3, name] for name in wanted} == pytest.approx(wanted)
    assert report.trainer == {"rllm": "verl"}.get(trainer, trainer)
    assert not report.alarms


def test_verl_score_and_penalised_reward(tmp_path: Path) -> None:
    rows = [{"step": 0, "data": {}}, {"step": 0, "data": {"val-core/gsm8k/acc/mean@4": 0.25,
            "val-core/math/acc/mean@4": 0.75, "val-aux/gsm8k/reward/std@4": 0.1}},
            *({"step": s, "data": verl(s)} for s in range(1, STEPS + 1))]  # fmt: skip
    steps, report = read(write_lines(tmp_path / "log.jsonl", rows), tmp_path / "out")
    assert steps.index.tolist() == list(range(STEPS + 1)), "an empty record makes no step"
    assert steps.loc[0, "eval_reward"] == 0.5, "the mean over the data sets"
    assert steps.loc[3, ["reward", "reward_penalised"]].tolist() == [0.03, pytest.approx(-0.47)]
    assert steps.loc[3, ["kl_ref", "engine_kl", "engine_prob_diff"]].tolist() == [0.02, 3e-4, 0.003]
    (said,) = report.events
    assert "reward is critic/score/mean; critic/rewards/mean" in said
    assert not report.broken_lines


def test_verl_null_is_not_finite_and_a_missing_name_is_missing(tmp_path: Path) -> None:
    rows = [{"step": s, "data": {"actor/entropy": 0.4, "actor/grad_norm": None if s == 2 else 0.1}
             | ({"critic/score/mean": 0.5} if s != 3 else {})} for s in (1, 2, 3, 4)]  # fmt: skip
    read(write_lines(tmp_path / "log.jsonl", rows), tmp_path / "out")
    null = open_run(tmp_path / "out").steps.attrs["null"]
    assert null == {"grad_norm": {2}}


def test_verl_console(tmp_path: Path) -> None:
    lines = ["Initial validation metrics: {'val-core/x/acc/mean@1': 0.5}", "step:0 - "]
    for step in range(1, STEPS + 1):
        items = " - ".join(f"{name}:{value!r}" for name, value in verl(step).items())
        prefix = ("", "(TaskRunner pid=4711) ", "\x1b[36m(TaskRunner pid=7)\x1b[0m ")[step % 3]
        lines.append(f"{prefix}step:{step} - {items} - a/b:np.float64(0.25) - c/d:nan")
        lines.append("(WorkerDict pid=1) something: else - 3")
    lines.append("step:99 - actor/entropy:0.1")
    (tmp_path / "out.txt").write_text("\n".join(lines))
    steps, report = read(tmp_path / "out.txt", tmp_path / "out")
    assert (report.format, report.trainer) == ("console", "verl")
    assert steps.index.tolist() == list(range(1, STEPS + 1)), "the half last line is left out"
    assert steps.loc[5, ["reward", "entropy", "length", "a/b"]].tolist() == [0.05, 0.4, 90.0, 0.25]
    assert pd.isna(steps.loc[5, "c/d"])


@pytest.mark.parametrize("text", [repr, str, json.dumps])
def test_trl_console_is_counted(text: Callable[[Any], str], tmp_path: Path) -> None:
    lines = ["{'model': 'x', 'seed': 1, 'nested': {'a': 2}}", "loading ..."]
    for step in range(1, STEPS + 1):
        values = trl(step)
        if text is str:  # as newer Transformers print: every value as text
            values = {name: str(value) for name, value in values.items()}
        lines.append(f"  0%| | 0/9 [00:0{step % 10}<?] {text(values)}")
        if step == 6:
            lines.append("{'eval_reward': 0.75, 'eval_loss': 0.5, 'epoch': 0.06}")
    lines.append("{'train_runtime': 9.5, 'train_loss': 0.1, 'epoch': 0.12}")
    (tmp_path / "train.log").write_text("\n".join(lines) + "\n")
    steps, report = read(tmp_path / "train.log", tmp_path / "out")
    assert steps.index.tolist() == list(range(1, STEPS + 1))
    assert steps.loc[6, ["reward", "eval_reward", "groups_flat"]].tolist() == [0.06, 0.75, 0.5]
    assert steps.loc[6, "rewards/exact/std"] == 0.3
    assert steps.loc[6, "engine_logp_diff"] == 0.02
    assert steps.loc[STEPS, "summary/train_runtime"] == 9.5
    assert report.trainer == "TRL"
    assert any(f"the {STEPS} printed records carry no step" in event for event in report.events)


def test_printed_records_take_the_step_of_the_progress_bar_that_moves(tmp_path: Path) -> None:
    bars = "".join(
        f"\r {n}%| | {10 * n}/120 [00:01<00:05, 1.0it/s]\n{trl(n)!r}\n" for n in range(1, STEPS + 1)
    )
    (tmp_path / "train.log").write_text(bars)
    steps, report = read(tmp_path / "train.log", tmp_path / "out")
    assert steps.index.tolist() == [10 * n for n in range(1, STEPS + 1)]
    assert not report.events


def test_a_console_that_starts_again_goes_back_by_its_epoch(tmp_path: Path) -> None:
    again = [trl(n) | {"reward": 9.0} for n in range(7, STEPS + 1)]
    lines = [repr(r) for r in [*records(trl)[:9], *again]]
    (tmp_path / "train.log").write_text("\n".join(lines) + "\n")
    steps, report = read(tmp_path / "train.log", tmp_path / "out")
    assert steps["reward"].tolist() == [*(n / 100 for n in range(1, 7)), *[9.0] * 6]
    assert any("steps 7 to 9 were logged again after a resume" in event for event in report.events)


def test_dicts_over_several_lines_with_their_step_before(tmp_path: Path) -> None:
    text = "".join(
        f"INFO step {n}: {{'train/loss': np.float32(0.5),\n 'train/grad_norm': tensor(0.25, "
        f"device='cuda:0'),\n 'train/entropy_loss': 0.4, 'train/pg_loss': nan}}\n"
        for n in range(STEPS)
    )
    (tmp_path / "job.out").write_text(text)
    steps, _ = read(tmp_path / "job.out", tmp_path / "out")
    assert steps.index.tolist() == list(range(STEPS))
    assert steps.loc[4, ["loss", "grad_norm", "entropy"]].tolist() == [0.5, 0.25, 0.4]


def test_nemo_json_and_other_shapes_of_json(tmp_path: Path) -> None:
    by_step = {
        "train/reward": {str(s): s / 100 for s in range(1, STEPS + 1)},
        "train/approx_entropy": {"2": 0.5, "4": 0.25},
        "validation/accuracy": {},
    }
    (tmp_path / "a.json").write_text(json.dumps(by_step))
    steps, _ = read(tmp_path / "a.json", tmp_path / "a")
    assert steps["reward"].tolist() == [s / 100 for s in range(1, STEPS + 1)]
    assert steps["entropy"].dropna().to_dict() == {2: 0.5, 4: 0.25}
    (tmp_path / "b.json").write_text(json.dumps({"step": [1, 2], "reward": [0.5, 1.0]}))
    assert read(tmp_path / "b.json", tmp_path / "b")[0]["reward"].tolist() == [0.5, 1.0]
    nested = [{"step": s, "train": {"reward": 0.5, "actor": {"lr": 1e-6}}} for s in (1, 2)]
    (tmp_path / "c.json").write_text(json.dumps(nested))
    steps, _ = read(tmp_path / "c.json", tmp_path / "c")
    assert steps.loc[2, ["reward", "lr"]].tolist() == [0.5, 1e-6]


def test_records_without_any_step_are_counted(tmp_path: Path) -> None:
    rows = [{k: v for k, v in trl(s).items() if k not in ("num_tokens", "epoch")} for s in (1, 2)]
    steps, report = read(write_lines(tmp_path / "m.jsonl", rows), tmp_path / "out")
    assert steps["reward"].tolist() == [0.01, 0.02]
    assert report.events == ["no record has a step, so the 2 records are counted from 1"]


# ---- what is the same whatever the log


def test_compressed_logs(tmp_path: Path) -> None:
    lines = "".join(json.dumps(trl(s) | {"step": s}) + "\n" for s in range(1, STEPS + 1))
    (tmp_path / "m.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    assert len(read(tmp_path / "m.jsonl.gz", tmp_path / "a")[0]) == STEPS
    cut = gzip.compress(lines.encode())[:-20]
    (tmp_path / "m.jsonl.gz").write_bytes(cut)
    steps, report = read(tmp_path / "m.jsonl.gz", tmp_path / "b")
    assert 0 < len(steps) <= STEPS
    assert report.events == ["m.jsonl.gz is cut or damaged: what could be unpacked is read"]
    (tmp_path / "m.jsonl.gz").write_bytes(b"\x1f\x8bnonsense")
    with pytest.raises(UserError, match="cannot be unpacked"):
        read(tmp_path / "m.jsonl.gz", tmp_path / "c")


def test_ranks_that_take_turns_are_averaged_and_counts_summed(tmp_path: Path) -> None:
    rows = [{"step": s, "mean_reward": r, "num_items": 3, "reward/max": r, "num_tokens": 100 * s}
            for s in range(6) for r in (0.5, 0.0, 0.5, 1.0)]  # fmt: skip
    steps, report = read(write_lines(tmp_path / "m.jsonl", rows), tmp_path / "out")
    assert steps["reward"].tolist() == [0.5] * 6
    assert steps["table/num_items"].tolist() == [12] * 6
    assert steps["reward/max"].tolist() == [1.0] * 6
    assert steps["table/num_tokens"].tolist() == [100 * s for s in range(6)], "a running total"
    (said,) = report.events
    assert "steps 0 to 5 have several records each" in said
    assert "summed instead: num_items" in said


@pytest.mark.parametrize("turns", [[1, 2, 1, 2, 3, 4, 3, 4, 5, 6, 5, 6], [1, 2, 3, 1, 2, 3]])
def test_ranks_are_known_by_their_turns_or_their_number(turns: list[int], tmp_path: Path) -> None:
    ranked = turns == [1, 2, 3, 1, 2, 3]
    rows: list[dict[str, Any]] = []
    for step in turns:
        before = sum(row["step"] == step for row in rows)
        rows.append({"step": step, "reward": float(before)} | ({"rank": before} if ranked else {}))
    steps, _ = read(write_lines(tmp_path / "m.jsonl", rows), tmp_path / "out")
    assert steps["reward"].tolist() == [0.5] * max(turns)


def test_a_resume_is_the_later_run(tmp_path: Path) -> None:
    rows = [{"step": s, "reward": 0.5, "my/own": 1} for s in range(1, 9)]
    rows += [{"step": s, "reward": 0.75, "my/own": 2} for s in range(5, 12)]
    steps, report = read(write_lines(tmp_path / "m.jsonl", rows), tmp_path / "out")
    assert steps["reward"].tolist() == [0.5] * 4 + [0.75] * 7
    assert steps["my/own"].tolist() == [1] * 4 + [2] * 7
    assert report.events == ["steps 5 to 8 were logged again after a resume: the later run is read"]
    assert report.repeated_steps == {5, 6, 7, 8}


def test_records_that_repeat_word_for_word_are_no_news(tmp_path: Path) -> None:
    rows = [{"step": s, "reward": 0.1, "num_items": 3} for s in (1, 1, 2, 2, 3, 3)]
    steps, report = read(write_lines(tmp_path / "m.jsonl", rows), tmp_path / "out")
    assert steps["table/num_items"].tolist() == [3, 3, 3]
    assert not report.events


def test_updates_of_slime_are_at_the_step_of_their_batch(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    for batch in range(8):
        rows.append({"rollout/step": batch, "rollout/raw_reward": 0.5, "rollout/truncated": 0.0})
        rows += [{"train/step": 4 * batch + u, "train/loss": float(u), "train/entropy_loss": 0.4}
                 for u in range(4)]  # fmt: skip
    steps, report = read(write_lines(tmp_path / "m.jsonl", rows), tmp_path / "out")
    assert steps.index.tolist() == list(range(8))
    assert steps["loss"].tolist() == [1.5] * 8
    assert report.events[0] == (
        "train/step counts updates, 4 a batch: they are at the step of their batch"
    )


def test_two_runs_in_one_folder_are_no_resume(tmp_path: Path) -> None:
    for name, reward in (("a", 0.5), ("b", 0.75)):
        rows = [{"step": s, "reward": reward} for s in range(1, 9)]
        write_lines(tmp_path / "logs" / f"{name}.jsonl", rows)
    with pytest.raises(
        UserError, match=r"2 files .* hold different .*name one of them: a.jsonl, b.jsonl"
    ):
        read(tmp_path / "logs", tmp_path / "x")
    for name in ("a", "b"):
        (tmp_path / "logs" / f"{name}.jsonl").rename(
            tmp_path / "logs" / f"rank_{name == 'b':d}.jsonl"
        )
    steps, _ = read(tmp_path / "logs", tmp_path / "out")
    assert steps["reward"].tolist() == [0.625] * 8


def test_a_folder_reads_one_form_of_a_log_and_names_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "job"
    write_lines(folder / "run.jsonl", [{"step": s, "data": verl(s)} for s in range(1, 9)])
    line = " - ".join(f"{name}:{value}" for name, value in verl(1).items())
    (folder / "train.log").write_text(f"step:1 - {line}\nstep:2 - {line}\n")
    steps, report = read(folder, tmp_path / "out")
    assert (report.format, len(steps)) == ("verl", 8)
    assert any("also there, not read: train.log" in note for note in report.events)
    assert detect(folder / "train.log").format == "console"


def test_names_nobody_knows(tmp_path: Path) -> None:
    rows = records(lambda s: {"iter_no": s, "my_return": 0.5, "policy_ent": 0.4})
    source = write_lines(tmp_path / "m.jsonl", rows)
    with pytest.raises(UserError, match="--map step=iter_no --map reward=my_return --map entropy="):
        read(source, tmp_path / "a")
    steps, report = read(source, tmp_path / "a", step="iter_no")
    assert len(steps) == STEPS
    (alarm,) = report.alarms
    assert "no column of reward, entropy" in alarm
    assert alarm.endswith("--map reward=my_return --map entropy=policy_ent")
    assert report.to_text().splitlines()[1].startswith("  - ! no column of reward")
    steps, report = read(source, tmp_path / "b", step="iter_no", reward="my_return")
    assert steps["reward"].tolist() == [0.5] * STEPS
    assert not report.alarms


def test_most_lines_lost_is_said_first(tmp_path: Path) -> None:
    lines = ["oops"] * 9 + [json.dumps({"step": s, "reward": 0.5}) for s in (1, 2)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines) + "\n")
    _, report = read(tmp_path / "m.jsonl", tmp_path / "out")
    assert report.alarms == ["9 of 11 lines were not read"]


def test_an_entropy_below_zero_is_a_loss(tmp_path: Path) -> None:
    rows = records(lambda s: {"train/global_step": s, "train/entropy_loss": -0.4, "reward": 0.5})
    steps, report = read(write_lines(tmp_path / "m.jsonl", rows), tmp_path / "out")
    assert steps["entropy"].isna().all()
    assert steps["train/entropy_loss"].tolist() == [-0.4] * STEPS
    assert any("is negative" in event for event in report.events)


def test_kept_names_never_overwrite_each_other(tmp_path: Path) -> None:
    row = {"step": 1, "reward": 0.5, "x": 1, "table/x": 2, "rewards/f": 3, "rewards/f/mean": 4}
    steps, _ = read(write_lines(tmp_path / "m.jsonl", [row]), tmp_path / "out")
    names = [name for name in steps if "/" in name]
    assert sorted(steps.loc[1, names]) == [1, 2, 3, 4]


def test_a_source_that_is_nothing_known_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("just words\n")
    with pytest.raises(UserError, match=r"no known file in .*looked for trainer states"):
        read(tmp_path / "notes.txt", tmp_path / "out")


def alias_page() -> str:
    """The table of names as Markdown, for docs/import.md."""
    lines = ["| table | column | trainer | its names | where |", "|---|---|---|---|---|"]
    for row in ALIASES:
        names = ", ".join(f"`{name}`" for name in row.names)
        lines.append(f"| {row.table} | `{row.column}` | {row.trainer} | {names} | {row.source} |")
    return "\n".join(lines)


def test_the_page_lists_every_name() -> None:
    page = (Path(__file__).parents[3] / "docs" / "import.md").read_text()
    assert page.rstrip().endswith(alias_page()), f"the last table must be:\n{alias_page()}"
    for row in ALIASES:
        known = [column.name for column in TABLES[row.table].stored]
        known += ["rewards/NAME/mean", "rewards/NAME/std", "prob", "prob_old", "collision"]
        assert row.column in [*known, "loss_mask"], row
        assert row.source, row


def test_prime_rl_lines_are_read_with_their_units(tmp_path: Path) -> None:
    lines = [
        f"12:00:{n:02d} \x1b[32mSUCCESS\x1b[0m Step {n} | Time: 12.31s | Loss: 0.0019 | "
        f"Entropy: 0.2{n} | Mismatch KL: 0.0006 | Grad. Norm: 0.0680 | LR: 1.00e-06 | T: 9 t/s"
        for n in range(3)
    ]
    file = tmp_path / "trainer.log"
    file.write_text("\n".join(["12:00:00 INFO Starting step 0 | nothing", *lines]) + "\n")
    steps, report = read(file, tmp_path / "out")
    assert report.trainer == "prime-rl"
    assert steps["entropy"].tolist() == [0.20, 0.21, 0.22]
    known = ["loss", "grad_norm", "lr", "kl_old", "seconds"]
    assert steps.loc[2, known].tolist() == [0.0019, 0.068, 1e-6, 0.0006, 12.31]
