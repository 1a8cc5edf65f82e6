"""Rollouts, steps and log of an attached trl GRPOTrainer: who is who, and both sides agree."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("trl", reason="needs the extra [trl]")

from tests.support.trl_toy import run, toy_trainer
from tests.support.trl_watched import watched_run
from wapo_analysis import attach, open_run

# TRL, transformers and peft warn about each other's future versions; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize(
    ("accumulate", "per_generation", "iterations"),
    [(2, 2, 1), (2, 4, 2), (4, 2, 1)],
    ids=["aligned", "split-and-reused", "two-batches-per-step"],
)
def test_rollouts_keep_their_identity(
    tmp_path: Path, accumulate: int, per_generation: int, iterations: int
) -> None:
    trainer, _ = watched_run(
        tmp_path, gradient_accumulation_steps=accumulate, steps_per_generation=per_generation,
        num_iterations=iterations, max_steps=4, per_device_train_batch_size=4,
    )  # fmt: skip
    found = open_run(tmp_path / "run")
    tokens, rollouts = found.tokens(), found.rollouts.set_index(["step", "rollout"])
    assert rollouts.index.is_unique
    assert len(rollouts) == 4 * accumulate * 4
    for key, rows in tokens.groupby(["step", "rollout"]):
        line = rollouts.loc[key]
        assert (rows["group"] == line["group"]).all()
        np.testing.assert_allclose(rows["advantage"], line["advantage"], rtol=1e-4)
        text = "".join(found.vocab[i] for i in rows.sort_values("position")["token_id"])
        assert text.replace("<eos>", "").replace("<pad>", "") == line["completion"]
        assert len(rows) == line["length"]
    assert (rollouts.groupby(["step", "group"])["prompt"].nunique() == 1).all()
    digits = rollouts["completion"].str.count(r"\d") / 8
    np.testing.assert_allclose(rollouts["reward"], digits, atol=1e-6)
    answers = rollouts["prompt"].map(lambda p: str(int(p[0]) + int(p[2])))
    assert (rollouts["answer"] == answers).all()


def test_step_rows_agree_with_the_trainers_own_log(tmp_path: Path) -> None:
    trainer, _ = watched_run(tmp_path, max_steps=3)
    steps = open_run(tmp_path / "run").steps.set_index("step")
    log = {row["step"]: row for row in trainer.state.log_history if "reward" in row}
    ours = {"reward": "reward", "loss": "loss", "grad_norm": "grad_norm", "entropy": "entropy"}
    ours |= {"length": "completions/mean_length", "truncated": "completions/clipped_ratio"}
    for name, theirs in ours.items():
        for step, row in log.items():
            assert steps.loc[step, name] == pytest.approx(row[theirs], rel=0.02, abs=1e-6), name
    assert steps["lr"].tolist() == pytest.approx([row["learning_rate"] for row in log.values()])
    assert (steps["seconds_capture"] > 0).all()


def test_scalars_flow_back_into_the_trainers_log(tmp_path: Path) -> None:
    trainer, steps = watched_run(tmp_path, max_steps=3)
    rows = [row for row in trainer.state.log_history if "reward" in row]
    for tokens, row in zip(steps, rows, strict=True):
        for name, sign in (("entropy_pos", 1), ("entropy_neg", -1)):
            chosen = np.sign(tokens["advantage"]) == sign
            assert chosen.any() == (f"wapo/{name}" in row)
            if not chosen.any():
                continue
            assert row[f"wapo/{name}"] == pytest.approx(tokens["entropy"][chosen].mean(), rel=1e-5)
        for code, name in enumerate(("pos_peak", "pos_valley", "neg_peak", "neg_valley")):
            of_class = tokens["cls"] == code
            assert row[f"wapo/share/{name}"] == pytest.approx(of_class.mean())
            flow = tokens["pred_dentropy"][of_class].sum()
            assert row[f"wapo/entropy_flow/{name}"] == pytest.approx(flow, rel=1e-5, abs=1e-9)
            total, mass = tokens["grad_norm"].sum(), tokens["grad_norm"][of_class].sum()
            assert row["wapo/grad_mass"] == pytest.approx(total, rel=1e-5)
            assert row.get(f"wapo/grad_share/{name}", 0.0) * total == pytest.approx(mass, rel=1e-5)


def test_flow_is_left_out_of_the_log_where_it_is_not_known(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "out")
    with attach(trainer, tmp_path / "run", token_every=0):
        run(trainer)
    row = next(row for row in trainer.state.log_history if "reward" in row)
    assert "wapo/share/pos_peak" in row
    assert not any("entropy_flow" in name for name in row)
    found = open_run(tmp_path / "run")
    assert found.token_steps() == []
    assert found.classes["pred_dentropy_sum"].isna().all()
    assert found.classes["grad_mass"].notna().all()
