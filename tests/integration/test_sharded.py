"""Weights that no process holds as a whole: FSDP2 on two gloo processes, ZeRO-3 by a stand-in."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

import wapo_analysis
from tests.support.processes import ROOT, ended, started
from wapo_analysis import open_run

LOOP = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM
from wapo_analysis import Recorder, UserError, watched_loss
from wapo_analysis.stats import fused_head_stats, token_stats

out, ways = Path(sys.argv[1]), sys.argv[2].split(",")
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, mesh = dist.get_rank(), init_device_mesh("cpu", (2,))
B, PROMPT, T, V = 4, 3, 8, 24


class Scored(nn.Module):
    "The whole step of scoring in one forward: inside it the weights are whole."

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids, way):
        if way != "head":
            return self.model(input_ids=ids).logits[:, PROMPT - 1 : -1], None
        hidden = self.model.model(input_ids=ids).last_hidden_state[:, PROMPT - 1 : -1]
        stats = fused_head_stats(hidden, self.model.lm_head.weight, ids[:, PROMPT:])
        return None, stats


def surrogate(logp, old, adv, mask):
    ratio = (logp - old).exp()
    return -(torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv) * mask).sum() / mask.sum()


for way in ways:
    torch.manual_seed(0)
    policy = Scored(LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64,
    )))
    for layer in policy.model.model.layers:
        fully_shard(layer, mesh=mesh)
    if way == "own unit":
        fully_shard(policy.model.lm_head, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)
    loss_fn, recorder = surrogate, None
    if way == "loss":
        names = {"logp": "logp", "logp_old": "old", "advantages": "adv", "mask": "mask"}
        loss_fn = watched_loss(surrogate, run=out / way, names=names, token_every=1)
    elif way != "plain":
        recorder = Recorder(out / way, rank=rank)
    torch.manual_seed(1 + rank)
    expected = []
    for step in range(1, 4):
        ids = torch.randint(V, (B, PROMPT + T))
        adv, mask = torch.randn(B)[:, None].expand(B, T), torch.ones(B, T)
        logits, stats = policy(ids, way)
        if way == "head":
            logp = stats.logp.view(B, T)
        else:
            logp = logits.log_softmax(-1).gather(-1, ids[:, PROMPT:, None])[..., 0]
        old = logp.detach() + 0.3 * torch.randn(B, T)
        logp.retain_grad()
        if recorder is not None:
            given = {"logits": logits} if stats is None else {"stats": stats}
            recorder.watch(logp, ids[:, PROMPT:], mask, adv, None, logp_old=old, **given)
        loss = loss_fn(logp, old, adv, mask)
        optimizer.zero_grad()
        loss.backward()
        expected.append(-logp.grad.flatten())
        optimizer.step()
        if recorder is not None:
            recorder.finish_step(step, reward=adv[:, 0], loss=loss)
    watching = recorder if recorder is not None else loss_fn
    if way != "plain":
        assert watching.failure is None, watching.failure
        watching.close()
    weights = {n: p.full_tensor() for n, p in policy.named_parameters()}
    torch.save({"weights": weights, "coef": torch.cat(expected)}, out / f"{way}-{rank}.pt")

# Outside a forward the head is a shard: gathered where no gradient is asked for, else refused.
head, hidden = policy.model.lm_head.weight, torch.randn(5, 32)
targets = torch.arange(5)
try:
    fused_head_stats(hidden, head, targets)
    raise AssertionError("a shard with a gradient was taken")
except UserError as error:
    assert "inside the model's forward" in str(error)
with torch.no_grad():
    stats = fused_head_stats(hidden, head, targets)
    full = token_stats(hidden @ head.full_tensor().T, targets)
torch.testing.assert_close(stats.collision_rest, full.collision_rest, rtol=1e-4, atol=1e-8)
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def looped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-W", "ignore", "-c", LOOP, str(out), "plain,logits,loss,head"]
    for code, _, errors in ended(started(command, cwd=ROOT)):
        assert code == 0, errors[-3000:]
    return out


def saved(out: Path, way: str, rank: int) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(out / f"{way}-{rank}.pt", weights_only=True)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("way", ["logits", "loss", "head"])
def test_a_loop_over_a_sharded_model_has_every_row_and_exact_coefficients(
    way: str, looped: Path
) -> None:
    run = open_run(looped / way)
    rows = run.tokens()
    assert len(rows) == 192
    assert run.steps.step.tolist() == [1, 2, 3]
    for rank in range(2):
        own = rows[rows["rank"] == rank]
        np.testing.assert_allclose(own.coef, saved(looped, way, rank)["coef"], rtol=4e-5)
    assert set(rows.cls) == {"pos_peak", "pos_valley", "neg_peak", "neg_valley"}
    assert run.classes.tokens.sum() == 192
    totals = run.classes.groupby("step").grad_mass.sum()
    np.testing.assert_allclose(totals, rows.groupby("step").grad_norm.sum(), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["logits", "loss"])
def test_watching_a_sharded_model_changes_no_bit(way: str, looped: Path) -> None:
    for rank in range(2):
        plain, seen = (saved(looped, name, rank)["weights"] for name in ("plain", way))
        assert all(torch.equal(value, seen[name]) for name, value in plain.items())


@pytest.mark.slow
def test_our_head_inside_the_forward_gives_the_statistics_of_the_logits(looped: Path) -> None:
    columns = ["coef", "logp", "entropy", "collision_rest", "collision_logp_rest"]
    logits, head = (open_run(looped / way).tokens() for way in ("logits", "head"))
    pd.testing.assert_frame_equal(logits[columns], head[columns], rtol=1e-3, atol=1e-5)
    ours = saved(looped, "head", 0)["weights"]
    for name, value in saved(looped, "plain", 0)["weights"].items():
        torch.testing.assert_close(value, ours[name], rtol=1e-3, atol=1e-3)


TRAINER = """
import sys, warnings
from pathlib import Path
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from tests.support.trl_toy import WatchedLoss, toy_trainer
from wapo_analysis import attach

out = Path(sys.argv[1])
for way in sys.argv[2].split(","):
    warnings.simplefilter("ignore")
    trainer = toy_trainer(
        out / "out", WatchedLoss, max_steps=2, loss_type="grpo", num_iterations=1,
        # All processes make as many forward passes, for each of them is a collective.
        generation_kwargs={"min_new_tokens": 8},
    )
    # Accelerate shards on accelerators only: the model is sharded here, as it would be.
    mesh = init_device_mesh("cpu", (2,))
    for layer in trainer.model.model.layers:
        fully_shard(layer, mesh=mesh)
    if "unit" in way:
        fully_shard(trainer.model.lm_head, mesh=mesh)
    fully_shard(trainer.model, mesh=mesh)
    trainer.accelerator.prepare_model = lambda model, **_: model
    norms, clip = [], trainer.accelerator.clip_grad_norm_
    def clipping(*args, **kwargs):
        norm = clip(*args, **kwargs)
        norms.append(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm))
        return norm
    trainer.accelerator.clip_grad_norm_ = clipping
    rank = trainer.accelerator.process_index
    if way.startswith("plain"):
        trainer.train()
    else:
        with attach(
            trainer, out / way, mode="replace" if "replace" in way else "passive",
            token_every=1, exact_every=1, rescore_every=1,
        ) as attachment:
            if "fail" in way and rank == 1:
                attachment.recorder.fail(OSError("disk full"))
            trainer.train()
            recorder = attachment.recorder
        assert "fail" in way or recorder.failure is None, recorder.failure
    coefs = [c[i["completion_mask"].bool()] for c, i in trainer.expected()]
    for module in trainer.model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    weights = {n: p.full_tensor() for n, p in trainer.model.named_parameters()}
    found = {"weights": weights, "coef": torch.cat(coefs), "norms": norms}
    torch.save(found, out / f"{way}-{rank}.pt")
"""
"""Of a trainer whose processes average gradients; its ``coef`` is divided by their number."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("trl", minversion="1.15", reason="needs a head without logits")
    out = tmp_path_factory.mktemp("trl")
    ways = "plain,root,replace,fail,plain unit,unit,unit fail"
    command = [sys.executable, "-W", "ignore", "-c", TRAINER, str(out), ways]
    for code, _, errors in ended(started(command, cwd=ROOT)):
        assert code == 0, errors[-3000:]
    return out


@pytest.mark.slow
@pytest.mark.parametrize("way", ["root", "unit", "replace"])
def test_a_trl_trainer_over_a_sharded_model_is_recorded_exactly(way: str, trained: Path) -> None:
    run = open_run(trained / way)
    rows = run.tokens()
    assert run.manifest["statistics_from"] == (
        "our head in place of the trainer's" if way == "replace" else "hidden states and head"
    )
    np.testing.assert_allclose(run.steps.grad_norm, saved(trained, way, 0)["norms"], rtol=1e-5)
    assert rows[["coef", "entropy", "collision_logp_rest", "logp_after"]].notna().all(axis=None)
    assert "unknown" not in set(rows.cls)
    for rank in range(2):
        own = rows[rows["rank"] == rank]
        coef = saved(trained, way, rank)["coef"] / 2
        np.testing.assert_allclose(own.coef, coef, rtol=1e-3, atol=1e-7)
    if way != "replace":
        for rank in range(2):
            plain = saved(trained, "plain unit" if way == "unit" else "plain", rank)["weights"]
            seen = saved(trained, way, rank)["weights"]
            assert all(torch.equal(value, seen[name]) for name, value in plain.items())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fail", "unit fail"])
def test_a_process_that_records_no_more_does_not_stop_the_other_at_the_head(
    way: str, trained: Path
) -> None:
    run = open_run(trained / way)
    assert set(run.tokens()["rank"]) == {0}
    assert len(run.steps) == 2


class Partitioned:
    """Stands in for ZeRO-3: a head is empty but inside its own forward and where it is gathered."""

    def __init__(self, head: torch.nn.Linear) -> None:
        self.weight, self.full, self.gathered = head.weight, head.weight.data, 0
        head.requires_grad_(False)  # its gradient is DeepSpeed's own affair
        self.weight.ds_id, self.weight.ds_shape = 0, self.full.shape  # type: ignore[attr-defined]
        head.register_forward_pre_hook(lambda *_: self.fill(True))
        head.register_forward_hook(lambda *_: self.fill(False))
        self.fill(False)

    def fill(self, full: bool) -> None:
        self.weight.data = self.full if full else torch.empty(0)

    @contextmanager
    def gather(self, *_: Any) -> Iterator[None]:
        self.gathered += 1
        self.fill(True)
        yield
        self.fill(False)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_head_that_zero_3_has_taken_away_is_gathered_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", minversion="1.15", reason="needs a head without logits")
    from tests.support.trl_toy import toy_trainer

    found = {}
    for name in ("whole", "partitioned"):
        trainer = toy_trainer(tmp_path / "out", max_steps=2)
        head = trainer.model.lm_head
        head.requires_grad_(False)
        if name == "partitioned":
            stand_in = Partitioned(head)
            monkeypatch.setattr("trl.trainer.utils.maybe_gather_lm_head_ctx", stand_in.gather)
        with wapo_analysis.attach(trainer, tmp_path / name, token_every=1, exact_every=2):
            trainer.train()
        found[name] = open_run(tmp_path / name)
    assert stand_in.gathered > 0
    assert found["partitioned"].manifest["vocabulary"] == len(stand_in.full)
    assert found["partitioned"].manifest["statistics_from"] == "hidden states and head"
    rows, plain = found["partitioned"].tokens(), found["whole"].tokens()
    assert rows[rows.step == 1].collision_logp_rest.notna().all(), "exact"
    assert rows[rows.step == 2].collision_logp_rest.isna().all(), "of the fused head"
    pd.testing.assert_frame_equal(rows, plain)
