"""Small sources as other tools write them, seeded, with the numbers a test has to find again."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

STEPS = 10


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Write one JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def token_lists(rng: np.random.Generator, prompt: int, length: int) -> dict[str, list[Any]]:
    """Aligned lists of one completion after its prompt, as prime-rl's exporter writes them."""
    total = prompt + length
    trainer = -rng.exponential(0.7, total)
    inference = trainer + rng.normal(0, 0.05, total)
    inside = [False] * prompt + [True] * length
    return {
        "token_ids": rng.integers(0, 50, total).tolist(),
        "position_ids": list(range(total)),
        "loss_mask": inside,
        "advantages": [float(rng.choice([-0.5, 0.5]))] * total,
        "inference_logprobs": np.minimum(inference, 0.0).tolist(),
        "trainer_logprobs": trainer.tolist(),
        "entropy": rng.exponential(1.0, total).tolist(),
        "mismatch_kl": [0.0] * total,
        "is_masked": [bool(i % 5 == 4 and m) for i, m in enumerate(inside)],
    }


def write_prime_exports(root: Path, steps: int = STEPS, ranks: int = 2) -> Path:
    """Write token exports of the first layout; every step is marked STABLE."""
    rng = np.random.default_rng(0)
    for step in range(steps):
        folder = root / "token_exports" / f"step_{step}"
        for rank in range(ranks):
            rows = [
                {
                    "schema_version": 1, "step": step, "rank": rank, "micro_step": 0,
                    "micro_sequence_idx": 0, "export_sequence_idx": index, "env_name": "sums",
                    **token_lists(rng, 2, 4 + index),
                }
                for index in range(3)
            ]  # fmt: skip
            write_lines(folder / f"rank_{rank}.jsonl", rows)
        (folder / "STABLE").touch()
    return root


def _trace(rng: np.random.Generator, name: str, reward: float) -> tuple[dict[str, Any], list[int]]:
    prompt, answer = [1, 2, 3], rng.integers(0, 50, 5).tolist()
    nodes = [
        {"message": {"role": "user", "content": f"ask {name}"}, "token_ids": prompt,
         "mask": [False] * 3},
        {"message": {"role": "assistant", "content": f"say {name}"}, "token_ids": answer,
         "mask": [True] * 5, "logprobs": (-rng.exponential(0.5, 5)).tolist(), "parent": 0},
    ]  # fmt: skip
    return {
        "id": name, "nodes": nodes, "rewards": {"exact": {"score": reward, "weight": 2.0}},
        "calls": [{"finish_reason": "stop"}],
    }, prompt + answer  # fmt: skip


def write_prime_monitor(root: Path, steps: int = STEPS, where: str = "monitors/file") -> Path:
    """Write the file monitor's layout: metrics, trace stream, annotations of two producers."""
    rng = np.random.default_rng(1)
    monitor = root / where
    metrics: list[dict[str, Any]] = [{"step": None, "time": 0.0, "inference/load": 1.0}]
    episodes, trainer, orchestrator = [], [], []
    for step in range(1, steps + 1):
        metrics += [
            {"step": step, "time": 1.0, "producer": "trainer", "optim/grad_norm": 0.1 * step,
             "entropy/all/mean": 1.0 + 0.01 * step, "time/step": 3.0},
            {"step": step, "time": 1.1, "producer": "orchestrator", "reward/all/mean": 0.05 * step,
             "time/step": 99.0, "off_policy/mean": 0.5},
        ]  # fmt: skip
        for index in range(4):
            name = f"t{step}-{index}"
            trace, ids = _trace(rng, name, float(index % 2))
            episodes.append({"id": f"e{name}", "group": {"id": f"g{index // 2}"},
                             "traces": [trace]})  # fmt: skip
            info = {"train": {"trained_at_step": step}}
            trainer.append({
                "version": 1, "trace_id": name, "info": info,
                "branches": [{
                    "index": 0, "entropies": [None] * 3 + [1.5] * 5,
                    "trainer_logprobs": [None] * 3 + (-rng.exponential(0.5, 5)).tolist(),
                }],
            })  # fmt: skip
            orchestrator.append({
                "version": 1, "trace_id": name, "info": {"advantage": 0.5},
                "branches": [{"index": 0, "advantages": [0.5 if index % 2 else -0.5] * len(ids)}],
            })  # fmt: skip
    untrained, _ = _trace(rng, "lost", 0.0)
    episodes.append({"id": "e-lost", "traces": [untrained]})
    write_lines(monitor / "metrics.jsonl", metrics)
    write_lines(monitor / "traces" / "stream.jsonl", episodes)
    write_lines(monitor / "traces" / "stream.index.jsonl", [{"line": 1}])
    write_lines(monitor / "traces" / "annotations" / "trainer.jsonl", trainer)
    write_lines(monitor / "traces" / "annotations" / "orchestrator.jsonl", orchestrator)
    return root


def write_verl(root: Path, steps: int = STEPS, uid: bool = False) -> Path:
    """Write rollouts per step and the file logger's metrics."""
    for step in range(1, steps + 1):
        rows = [
            {"input": f"ask {k // 2}", "output": f"say {k}", "gts": str(k), "score": float(k % 2),
             "step": step, "acc": k / 4, "request_id": f"r{k}"}
            | ({"uid": f"s{k // 2}_{k % 2}_0"} if uid else {})
            for k in range(4)
        ]  # fmt: skip
        write_lines(root / "rollouts" / f"{step}.jsonl", rows)
    data = [
        {"step": step, "data": {
            "critic/rewards/mean": 0.5, "actor/entropy": 1.0 - 0.01 * step, "actor/ppo_kl": 0.001,
            "actor/grad_norm": 0.3, "actor/lr": 1e-6, "response_length/mean": 12.0,
        }}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    write_lines(root / "run.jsonl", data)
    return root


def write_trl(root: Path, steps: int = STEPS) -> Path:
    """Write trainer states of two checkpoints and logged completions of TRL."""
    history = [
        {"step": step, "epoch": 0.1, "loss": 0.01, "grad_norm": 0.2, "learning_rate": 1e-6,
         "entropy": 0.5, "reward": 0.5, "reward_std": 0.4, "rewards/exact/mean": 0.25,
         "rewards/format/mean": 0.25, "completions/mean_length": 9.0,
         "completions/clipped_ratio": 0.1, "clip_ratio/high_mean": 0.02, "num_tokens": 10.0}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    for step in (steps // 2, steps):
        folder = root / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        log = [*history[:step], {"step": step, "eval_loss": 0.7, "train_runtime": 9.0}]
        state = {"global_step": step, "log_history": log}
        (folder / "trainer_state.json").write_text(json.dumps(state))
    (root / "completions").mkdir()
    for step in range(1, steps + 1):
        table = pa.table({
            "step": [step] * 4, "prompt": ["a", "a", "b", "b"], "completion": ["1", "2", "3", "4"],
            "exact": [1.0, 0.0, 0.0, 0.0], "format": [0.5, 0.5, 0.0, None],
            "advantage": [0.5, -0.5, 0.0, 0.0], "source": ["x"] * 4,
        })  # fmt: skip
        pq.write_table(table, root / "completions" / f"completions_{step:05d}.parquet")
    return root


def token_columns(rows: int = 200, steps: int = STEPS) -> dict[str, Any]:
    """Columns of a plain token table under common names."""
    rng = np.random.default_rng(2)
    logp = -rng.exponential(0.5, rows)
    return {
        "global_step": np.repeat(np.arange(1, steps + 1), rows // steps),
        "sample_id": np.tile(np.repeat(["x", "y"], rows // steps // 2), steps),
        "advantages": rng.choice([-1.0, 0.0, 1.0], rows),
        "logprobs": logp,
        "old_logprobs": np.minimum(logp + 0.01, 0.0),
        "entropies": rng.exponential(1.0, rows),
        "sum_p_sq": np.exp(2 * logp) + 0.5 * np.expm1(logp) ** 2,
        "colour": ["red"] * rows,
    }
