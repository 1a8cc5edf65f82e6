"""Logs in forms that people bring: what a researcher must read of each of them.

Names of EasyR1, ROLL, PipelineRL, tunix and ART are those of their sources (2026-11).
"""

import csv
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.support.import_sources import write_lines
from tests.support.logged import read
from wapo_analysis.errors import UserError

STEPS = range(1, 13)
Write = Callable[[Path], Path]


def reward(step: int) -> float:
    return round(0.2 + 0.03 * step, 3)


def entropy(step: int) -> float:
    return round(0.6 - 0.02 * step, 3)


def text(name: str, make: Callable[[int], str], before: str = "") -> Write:
    """A file of one text a step."""

    def write(root: Path) -> Path:
        (root / name).write_text(before + "".join(map(make, STEPS)))
        return root / name

    return write


def lines(name: str, make: Callable[[int], Mapping[str, Any]]) -> Write:
    return lambda root: write_lines(root / name, map(make, STEPS))


def table(name: str, make: Callable[[int], Sequence[Mapping[str, Any]]]) -> Write:
    def write(root: Path) -> Path:
        rows = [row for step in STEPS for row in make(step)]
        with (root / name).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return root / name

    return write


def trl_dict(s: int) -> str:
    return f"{{'loss': 0.01, 'reward': {reward(s)}, 'entropy': {entropy(s)}, 'grad_norm': 0.3}}"


def easyr1_lines(s: int) -> str:
    block = (
        f"Step {s}\nactor:\n  entropy_loss: {entropy(s)}\n  lr: 1.0e-06\n  pg_loss: 0.01\n"
        f"critic:\n  rewards:\n    mean: {reward(s)}\n  score:\n    max: 1.0\n"
        f"    mean: {reward(s)}\n    min: 0.0\nresponse_length:\n  mean: 80.0\n"
    )
    return "".join(f"\x1b[36m(Runner pid=7)\x1b[0m {line}\n" for line in block.splitlines())


def zipped_utf16(root: Path) -> Path:
    printed = "".join(f"{trl_dict(s)}\r\n" for s in STEPS)
    (root / "train.log.gz").write_bytes(gzip.compress(printed.encode("utf-16")))
    return root / "train.log.gz"


def clearml(root: Path) -> Path:
    steps = list(STEPS)
    series = {"reward": map(reward, steps), "entropy": map(entropy, steps)}
    told = {n: {"name": n, "x": steps, "y": list(values)} for n, values in series.items()}
    (root / "scalars.json").write_text(json.dumps({"train": told}))
    return root / "scalars.json"


SAMPLES: dict[str, Write] = {
    "EasyR1": lines(
        "experiment_log.jsonl",
        lambda s: {"step": s, "actor": {"entropy_loss": entropy(s), "pg_loss": 0.01},
                   "reward": {"overall": reward(s), "format": 0.9},
                   "critic": {"score": {"mean": reward(s), "max": 1}},
                   "val": {"reward_score": 0.5}},
    ),
    "EasyR1's console": text("job.log", easyr1_lines, "Config\ndata:\n  rollout_batch_size: 512\n"),
    "ROLL's console": text(
        "roll.log",
        lambda s: f"[2025-06-13 10:{s:02}:00] [tracking.py (161)] [INFO] [PID 8] metrics_tag: "
        + json.dumps({"step": s, "metrics": {
            "critic/score/mean": reward(s), "critic/entropy/mean": entropy(s), "actor/lr": 1e-6,
            "token/response_length/mean": 80.0}}) + "\n",
    ),
    "PipelineRL": table(
        "history.csv",
        lambda s: [{"_step": s, "rl/reward": reward(s), "rl/entropy": entropy(s),
                    "rl/max_reward": 1, "stats/grad_norm": 0.3, "stats/lr": 1e-6}],
    ),
    "ART": table(
        "art.csv",
        lambda s: [
            {"_step": s, "train/reward": reward(s), "train/loss": "", "train/entropy": ""},
            {"_step": s, "train/reward": "", "train/loss": 0.01, "train/entropy": entropy(s)},
        ],
    ),
    "epochs and spreads": text(
        "learning.log",
        lambda s: f"[Epoch 0.{s:02}]  loss=0.01  grad=0.3  lr=1.00e-06  reward={reward(s)}±0.412"
        f"  entropy={entropy(s)}  frac_zero_std=0.12\n",
    ),
    "blocks below a bar": text(
        "run.log",
        lambda s: f"  0%|   | {s}/12 [01:29<67:59, 8.22s/it]\nLogging 44 metrics for train mode\n"
        f"Reward Metrics:\n   rewards/mc/mean: {reward(s)}\n   ... and 7 more\nOther Metrics:\n"
        f"   reward: {reward(s)}\n   entropy: {entropy(s)}\n",
    ),
    "times in place of steps": table(
        "t.csv",
        lambda s: [{"timestamp": f"2025-03-01 12:{s:02}:00", "reward": reward(s),
                    "entropy": entropy(s)}],
    ),
    "a table of Excel": text(
        "e.csv",
        lambda s: f"{s};{reward(s):.3f};{entropy(s):.3f}\n".replace(".", ","),
        "sep=;\nstep;reward;entropy\n",
    ),
    "UTF-16, zipped": zipped_utf16,
    "a container's log": lines(
        "c.log",
        lambda s: {"log": f"{trl_dict(s)}\n", "stream": "stdout", "time": f"00:{s:02}:01Z"},
    ),
    "kubectl": text("k.log", lambda s: f"2025-01-01T00:00:{s:02}.1Z stdout F {trl_dict(s)}\n"),
    "structured events": text(
        "s.jsonl",
        lambda s: json.dumps({"event": "rollout", "n": 128}) + "\n"
        + json.dumps({"event": "update", "step": s, "reward_mean": reward(s),
                      "entropy": entropy(s)}) + "\n",
    ),
    "a collector's log": lines(
        "g.jsonl",
        lambda s: {"timestamp": 1.7e9 + s, "severity": "INFO", "textPayload": trl_dict(s)},
    ),
    "events before the numbers": text(
        "v.jsonl",
        lambda s: json.dumps({"message": "update", "step": s, "reward": reward(s),
                              "entropy": entropy(s)}) + "\n",
        json.dumps({"message": "started", "host": "a"}) + "\n",
    ),
    "ClearML": clearml,
    "numbers of numpy and torch": text(
        "n.log",
        lambda s: f"step {s}: {{'reward': tensor({reward(s)}, device='cuda:0'), "
        f"'entropy': np.float64({entropy(s)}), 'loss': np.float32(0.01)}}\n",
    ),
    "loguru": text(
        "l.log",
        lambda s: f"2025-05-01 12:00:{s:02}.123 | INFO     | trainer.loop:step:88 - Step: {s} | "
        f"Reward: {reward(s)} | Entropy: {entropy(s)} nats | Grad norm: 0.3 | 12.3s\n",
    ),
    "Comet": table(
        "comet.csv",
        lambda s: [{"experimentKey": "k1", "metricName": name, "step": s, "value": value}
                   for name, value in (("train/reward", reward(s)), ("train/entropy", entropy(s)),
                                       ("sys.gpu.0.memory", 80))],
    ),
    "indented records": text(
        "p.json",
        lambda s: json.dumps({"step": s, "reward": reward(s), "entropy": entropy(s)}, indent=2)
        + "\n",
    ),
    "steps by name": lines(
        "m.jsonl", lambda s: {"step": f"step_{s}", "reward": reward(s), "entropy": entropy(s)}
    ),
    "a block an iteration": text(
        "b.log",
        lambda s: f"===== Iteration {s} / 12 =====\nmean reward      : {reward(s)}\n"
        f"mean entropy     : {entropy(s)}\ngrad norm        : 0.3\n\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("sample", SAMPLES)
def test_reward_and_entropy_are_read(sample: str, tmp_path: Path) -> None:
    steps, report = read(SAMPLES[sample](tmp_path), tmp_path / "out")
    assert steps.index.tolist() == list(STEPS)
    assert steps["reward"].tolist() == pytest.approx(list(map(reward, STEPS)))
    assert steps["entropy"].tolist() == pytest.approx(list(map(entropy, STEPS)))
    assert not report.alarms


def test_a_table_of_an_unsloth_notebook(tmp_path: Path) -> None:
    head = ("Step", "Training Loss", "reward", "completions / mean_length", "kl",
            "rewards / check_answer / mean")  # fmt: skip
    rows = [(s, 0.01, reward(s), 80.0, 0.002, 0.5) for s in STEPS]
    source = tmp_path / "unsloth.txt"
    source.write_text("".join("\t".join(map(str, row)) + "\n" for row in (head, *rows)))
    steps, report = read(source, tmp_path / "out")
    known = ["loss", "reward", "length", "kl_ref", "rewards/check_answer/mean"]
    assert steps.loc[2, known].tolist() == [0.01, reward(2), 80.0, 0.002, 0.5]
    assert report.trainer == "TRL"


def test_tunix(tmp_path: Path) -> None:
    write = table(
        "tunix.csv",
        lambda s: [{"Step": s, "global/train/rewards/score/mean": reward(s),
                    "global/train/rewards/score/max": 1, "actor/train/kl": 0.002,
                    "actor/train/loss": 0.01, "global/train/completions/mean_length": 80}],
    )  # fmt: skip
    steps, _ = read(write(tmp_path), tmp_path / "out")
    assert steps.loc[3, ["reward", "kl_ref", "loss", "length"]].tolist() == [
        reward(3), 0.002, 0.01, 80
    ]  # fmt: skip


def test_runs_of_an_exported_table_are_asked_for(tmp_path: Path) -> None:
    write = table(
        "runs.csv",
        lambda s: [{"Name": name, "_step": s, "train/reward": value}
                   for name, value in (("grpo-a", reward(s)), ("grpo-b", 0.1))],
    )  # fmt: skip
    source = write(tmp_path)
    with pytest.raises(UserError, match="2 runs; choose one with --run NAME: grpo-a, grpo-b"):
        read(source, tmp_path / "out")
    assert read(source, tmp_path / "out", run="grpo-a")[0]["reward"].tolist()[-1] == reward(12)


def test_names_that_look_like_reward_and_entropy_are_offered(tmp_path: Path) -> None:
    write = table(
        "metrics.csv",
        lambda s: [{"step": s, "train_reward_step": reward(s), "entropy_step": entropy(s),
                    "grad_norm": 0.3}],
    )  # fmt: skip
    _, report = read(write(tmp_path), tmp_path / "out")
    (alarm,) = report.alarms
    assert alarm.endswith("--map reward=train_reward_step --map entropy=entropy_step")


def test_a_log_of_dpo_is_said_to_be_one(tmp_path: Path) -> None:
    write = lines(
        "d.jsonl",
        lambda s: {"step": s, "loss": 0.6, "rewards/chosen": 0.1, "rewards/rejected": -0.1,
                   "rewards/margins": 0.2},
    )  # fmt: skip
    _, report = read(write(tmp_path), tmp_path / "out")
    (alarm,) = report.alarms
    assert "a preference objective (as DPO)" in alarm
    assert "--map" not in alarm


def test_entropy_in_bits_is_not_offered_as_nats(tmp_path: Path) -> None:
    write = table("b.csv", lambda s: [{"step": s, "score_pct": 20 + s, "entropy_bits": 0.5}])
    _, report = read(write(tmp_path), tmp_path / "out")
    assert "--map reward=score_pct" in report.alarms[0]
    assert "entropy=entropy_bits" not in report.alarms[0]


def test_names_and_numbers_side_by_side(tmp_path: Path) -> None:
    source = tmp_path / "a.log"
    source.write_text(
        "".join(f"step {s:4} acc {100 * reward(s):5.1f}% kl 0.01 gnorm 0.31\n" for s in STEPS)
    )
    steps, report = read(source, tmp_path / "out", reward="acc", grad_norm="gnorm")
    assert steps["reward"].tolist() == pytest.approx(list(map(reward, STEPS)), abs=1e-3)
    assert steps["grad_norm"].tolist() == [0.31] * 12
    assert not report.alarms
