"""Where two runs part: found where it is, not found where it is not, paired where it can be."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.support.builders import write_fake_run
from tests.support.step_logs import noisy, ramp, write_flows, write_steps
from wapo_analysis.compare import compare
from wapo_analysis.compare.divergence import PERSIST, WINDOW, Gap, dentropy_shares, divergence, part
from wapo_analysis.schema import ROLLOUTS
from wapo_analysis.store import Run, RunWriter, open_run
from wapo_analysis.table import Records

STEPS = 60


def gap(difference: np.ndarray, error: float) -> Gap:
    zeros = np.zeros(len(difference))
    return Gap(
        np.arange(1, len(difference) + 1), zeros, difference, np.full(len(difference), error)
    )


def write_rewards(path: Path, rewards: np.ndarray, prompts: list[str]) -> None:
    """One rollout per prompt and step; ``rewards`` has shape (steps, prompts)."""
    writer = RunWriter(path, open_run(path).manifest, resume_after=10**6)
    count = len(prompts)
    for step, row in enumerate(rewards, start=1):
        columns = {
            "step": [step] * count,
            "rank": [0] * count,
            "group": list(range(count)),
            "rollout": list(range(count)),
            "prompt": [f"{prompt} {step}" for prompt in prompts],
            "completion": ["x"] * count,
            "reward": row.tolist(),
        }
        writer.write_part(Records.build(ROLLOUTS, columns), step)
    writer.close("finished")


def run_with(path: Path, entropy: np.ndarray, reward: np.ndarray) -> Run:
    return open_run(write_steps(path, {"entropy": entropy, "reward": reward}))


def both(first: Run, second: Run) -> dict[str, int | None]:
    found = divergence(("A", "B"), [(first, second)], by_seed=True)
    return {p.quantity: p.step for p in found.partings}


def test_a_window_counts_only_if_the_next_ones_agree() -> None:
    difference = np.zeros(40)
    difference[20:] = 1.0
    found = part("entropy", gap(difference, 0.1))
    assert 20 < found.step <= 20 + WINDOW
    assert (found.lasting, found.difference > 0) == (True, True)
    brief = np.zeros(40)
    brief[20] = 1.0  # in WINDOW windows, so it holds, but not to the end
    assert part("entropy", gap(brief, 0.05)).lasting is False
    assert PERSIST <= WINDOW


@pytest.mark.parametrize("seed", range(30))
def test_noise_alone_does_not_part(seed: int) -> None:
    difference = np.random.default_rng(seed).normal(0, 0.1, 200)
    assert part("reward", gap(difference, 0.1)).step is None


def test_no_difference_at_all_does_not_part() -> None:
    assert part("reward", gap(np.zeros(40), 0.0)).step is None


def test_entropy_and_reward_part_each_at_its_own_step(tmp_path: Path) -> None:
    first = run_with(
        tmp_path / "a", noisy(np.full(STEPS, 0.4), 0.01), noisy(np.full(STEPS, 0.5), 0.02, 1)
    )
    second = run_with(
        tmp_path / "b",
        noisy(ramp(0.4, 1.4, STEPS, 20, 20), 0.01, 2),
        noisy(ramp(0.5, 0.0, STEPS, 35, 10), 0.02, 3),
    )
    steps = both(first, second)
    assert 21 <= steps["entropy"] <= 27
    assert 36 <= steps["reward"] <= 44
    assert steps == both(second, first)  # the direction does not matter
    assert "pred_dentropy_neg_peak" not in steps  # no class totals, so no word on them


def test_pairing_by_prompt_finds_what_the_prompts_hide(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    prompts = [f"p{i}" for i in range(16)]
    hard = rng.uniform(0, 1, (STEPS, 16))  # how hard each prompt is drowns the difference
    gain = np.where(np.arange(STEPS) >= 30, 0.04, 0.0)[:, None]
    rewards = {"a": hard, "b": hard + gain + rng.normal(0, 0.02, (STEPS, 16))}
    runs = {}
    for name, values in rewards.items():
        path = write_steps(tmp_path / name, {"reward": values.mean(axis=1)})
        write_rewards(path, values, prompts)
        runs[name] = open_run(path)
    found = divergence(("A", "B"), [(runs["a"], runs["b"])], by_seed=True)
    assert found.paired_by == "prompt"
    assert 31 <= found.parting("reward").step <= 36
    assert found.parting("entropy") is None


def test_other_prompts_are_not_paired(tmp_path: Path) -> None:
    runs = []
    for name in ("a", "b"):
        path = write_steps(tmp_path / name, {"reward": noisy(np.full(STEPS, 0.5), 0.02)})
        write_rewards(path, np.full((STEPS, 4), 0.5), [f"{name}{i}" for i in range(4)])
        runs.append(open_run(path))
    assert divergence(("A", "B"), [(runs[0], runs[1])], by_seed=True).paired_by == "seed"
    assert divergence(("A", "B"), [(runs[0], runs[1])], by_seed=False).paired_by == "order"


def test_the_classes_behind_it_are_named_by_their_share_of_the_flow(tmp_path: Path) -> None:
    calm = write_steps(tmp_path / "a", {"entropy": noisy(np.full(STEPS, 0.4), 0.005)})
    wild = write_steps(tmp_path / "b", {"entropy": noisy(ramp(0.4, 1.5, STEPS, 10, 40), 0.005, 1)})
    even = np.full(STEPS, 1.0)
    write_flows(calm, {(-1, 1): even, (1, 0): even, (1, 1): -even, (-1, 0): -even})
    write_flows(wild, {(-1, 1): 6 * even, (1, 0): even, (1, 1): -even, (-1, 0): -even})
    found = divergence(("A", "B"), [(open_run(calm), open_run(wild))], by_seed=True)
    shares = dentropy_shares(open_run(wild)).iloc[0]
    assert shares.abs().sum() == pytest.approx(1)
    assert found.behind[0] == ("neg_peak", pytest.approx(6 / 9 - 1 / 4))
    assert "pos_valley" not in dict(found.behind)
    text = " ".join(found.sentences())
    assert "neg_peak +42 pp" in text
    assert f"entropy at step {found.parting('entropy').step}" in text


def test_more_pairs_see_a_smaller_difference(tmp_path: Path) -> None:
    pairs = []
    for seed in range(12):
        level = np.full(STEPS, 0.4)
        later = ramp(0.4, 0.414, STEPS, 20, 1)
        runs = [
            run_with(tmp_path / f"{seed}{side}", noisy(values, 0.01, 2 * seed + side), level)
            for side, values in enumerate((level, later))
        ]
        pairs.append((runs[0], runs[1]))
    alone = [divergence(("A", "B"), [pair], by_seed=True).parting("entropy") for pair in pairs]
    together = divergence(("A", "B"), pairs, by_seed=True).parting("entropy")
    assert 21 <= together.step <= 30
    assert sum(p.step is None for p in alone) > len(alone) / 2


def test_comparison_tells_it_in_text_json_and_not_for_one_setting(tmp_path: Path) -> None:
    paths = [
        write_fake_run(tmp_path / f"{name}-{seed}", objective=name, seed=seed, drift=drift)
        for seed in range(2)
        for name, drift in (("grpo", "explosion"), ("wapo", "healthy"))
    ]
    comparison = compare([open_run(path) for path in paths])
    form = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))["parting"]
    assert (form["first"], form["second"], form["pairs"]) == ("GRPO", "WAPO", 2)
    assert {p["quantity"] for p in form["partings"]} >= {
        "reward",
        "entropy",
        "pred_dentropy_neg_peak",
    }
    (said,) = [s for s in comparison.sentences() if s.startswith("Where WAPO parts from GRPO")]
    reward = comparison.divergence.parting("reward")
    runs = [open_run(path).steps.set_index("step")["entropy"] for path in paths]
    entropy = comparison.divergence.parting("entropy")
    window = range(entropy.step - WINDOW + 1, entropy.step + 1)
    grpo, wapo = (np.mean([run[list(window)].mean() for run in runs[n::2]]) for n in (0, 1))
    assert "means of 5 steps up to it" in said
    assert f"entropy at step {entropy.step} ({wapo:.3g} against {grpo:.3g} nats" in said
    assert f"reward at step {reward.step} (" in said
    seeds = compare([open_run(path) for path in paths[::2]])
    assert seeds.divergence.names == ("grpo-0", "grpo-1")
    assert compare([open_run(paths[0])]).to_dict()["parting"] is None
