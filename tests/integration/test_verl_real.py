"""verl: the adapter on the real package, where it is installed.

Needs ``verl==0.9.1``, which imports without a GPU; it runs the real registry, ``ppo_loss`` and
``TrainingWorker.train_mini_batch`` on a toy policy. Its own pins hold back transformers, so it goes
into an environment of its own:

    pip install --no-deps verl==0.9.1
    pip install ray "tensordict<=0.10" hydra-core codetiming dill pylatexenc torchdata uvicorn
    pip install tensorboard pydantic fastapi cachetools peft accelerate datasets
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.trainer_losses import VERL_ENGINE
from wapo_analysis.capture.verl import PREFIX, watch_verl
from wapo_analysis.errors import UserError
from wapo_analysis.store import open_run

VOCAB, PROMPT, RESPONSE, ROWS = 13, 3, 5, 8


@pytest.fixture
def verl() -> Any:
    return pytest.importorskip("verl", reason="verl==0.9.1 is not installed")


@pytest.fixture
def watch(verl: Any, tmp_path: Path) -> Iterator[Any]:
    handle = watch_verl(str(tmp_path / "run"), {"label": "verl"}, token_every=1)
    yield handle
    handle.close()


def rollouts() -> Any:
    """A step of ROWS rollouts as the driver sends it: dense tensors and plain entries."""
    from verl.utils import tensordict_utils as tu

    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([5, 4, 5, 3, 5, 5, 2, 5])
    mask = (torch.arange(RESPONSE) < lengths[:, None]).long()
    prompts = torch.randint(VOCAB, (ROWS, PROMPT), generator=generator)
    responses = torch.randint(VOCAB, (ROWS, RESPONSE), generator=generator) * mask
    reward = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0])
    scores = torch.zeros(ROWS, RESPONSE)
    scores[torch.arange(ROWS), lengths - 1] = reward
    advantages = (reward.view(4, 2) - reward.view(4, 2).mean(1, keepdim=True)).reshape(-1, 1)
    tensors = {
        "prompts": prompts,
        "responses": responses,
        "attention_mask": torch.cat([torch.ones(ROWS, PROMPT, dtype=torch.long), mask], 1),
        "response_mask": mask,
        "old_log_probs": -2.5 + 0.3 * torch.randn(ROWS, RESPONSE, generator=generator),
        "advantages": advantages * mask,
        "token_level_scores": scores,
        "uid": [f"prompt-{i // 2}" for i in range(ROWS)],
    }
    plain = {
        "temperature": 1.0, "max_response_len": RESPONSE, "mini_batch_size": 4, "epochs": 2,
        "dataloader_kwargs": {"shuffle": True}, "dp_size": 1, "batch_num_tokens": None,
        "global_batch_size": None,
    }  # fmt: skip
    return tu.get_tensordict(tensors, plain)


class Bigram(torch.nn.Module):
    """A causal language model of a table; it is given packed rows, as verl's engine gives them."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = table

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])


def toy_worker(loss_mode: str, own_sums: bool = True) -> Any:
    """A real TrainingWorker around a bigram policy, without Ray, processes or a GPU.

    ``own_sums``: the engine gives entropy and sum p^2; else there are but the model's logits.
    """
    from verl.utils import tensordict_utils as tu
    from verl.workers.config import FSDPActorConfig
    from verl.workers.config.actor import PolicyLossConfig
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils.losses import ppo_loss

    torch.manual_seed(0)
    table = torch.nn.Parameter(0.5 * torch.randn(VOCAB, VOCAB))
    model = Bigram(table)
    optimizer = torch.optim.SGD([table], lr=5.0)
    config = FSDPActorConfig(
        strategy="fsdp",
        rollout_n=2,
        ppo_micro_batch_size_per_gpu=2,
        policy_loss=PolicyLossConfig(loss_mode=loss_mode, dro_beta=0.1),
    )

    def forward(micro: Any) -> dict[str, Tensor]:
        ids = torch.cat([micro["prompts"], micro["responses"]], 1)
        keep = micro["attention_mask"].bool()
        following = ids.roll(-1, dims=1)
        if not own_sums:
            places = torch.arange(ids.shape[1]).expand_as(ids)[keep]
            packed = model(input_ids=ids[keep][None], position_ids=places[None]).logits[0]
            logp = packed.log_softmax(-1).gather(-1, following[keep][:, None])[:, 0]
            return {"log_probs": logp}
        full = table[ids].log_softmax(-1)
        flat = full.gather(-1, following[..., None])[..., 0][keep]
        return {
            "log_probs": flat,
            "entropy": -(full.exp() * full).sum(-1)[keep].detach(),
            "sum_pi_squared": full.exp().square().sum(-1)[keep].detach(),
        }

    def train_batch(data: Any) -> Any:
        optimizer.zero_grad()
        for micro in data.split(2):
            loss, _ = worker.loss_fn(model_output=forward(micro), data=micro, dp_group=None)
            loss.backward()
        optimizer.step()
        return tu.get_tensordict({}, {"metrics": {}})

    worker = TrainingWorker.__new__(TrainingWorker)
    worker.engine = VERL_ENGINE
    worker.profiler = SimpleNamespace(step=lambda: None)
    worker.train_batch = train_batch
    worker.table = table
    worker.set_loss_fn(partial(ppo_loss, config=config))
    return worker


LOSSES = ("vanilla", "gspo", "gpg", "sapo", "cispo", "geo_mean", "dppo_tv", "dppo_kl", "dro")


@pytest.mark.parametrize("name", LOSSES)
def test_real_verl_trains_bitwise_the_same_and_tokens_keep_their_identity(
    name: str, verl: Any, tmp_path: Path
) -> None:
    alone = toy_worker(name)
    for _ in range(2):
        alone.train_mini_batch(rollouts())
    handle = watch_verl(str(tmp_path / "run"), token_every=1)
    try:
        seen = toy_worker(PREFIX + name)
        for _ in range(2):
            seen.train_mini_batch(rollouts())
        assert handle.watcher.failure is None
        assert handle.watcher.recorder is not None
        assert handle.watcher.recorder.failure is None
    finally:
        handle.close()
    assert torch.equal(alone.table, seen.table)
    run = open_run(tmp_path / "run")
    assert run.steps.step.tolist() == [1, 2]
    assert run.steps.reward.tolist() == [0.5, 0.5]
    assert run.steps.entropy.notna().all()
    step, tokens = rollouts(), run.tokens([1])
    lengths = step["response_mask"].sum(1).tolist()
    assert len(tokens) == 2 * sum(lengths), "two epochs"
    assert (tokens[tokens.advantage != 0].cls != "unknown").all(), "classes from sum p^2"
    assert tokens.coef.notna().all()
    for row in tokens.itertuples():
        assert row.token_id == step["responses"][row.rollout, row.position]
        assert row.logp_old == pytest.approx(
            float(step["old_log_probs"][row.rollout, row.position]), rel=4e-5
        )
    groups = run.rollouts[run.rollouts.step == 1].group.to_numpy()
    assert (groups[::2] == groups[1::2]).all()
    assert len(set(groups)) == 4
    assert run.rollouts[run.rollouts.step == 1].length.tolist() == lengths


def test_real_verl_without_padding_has_classes_from_the_models_logits(
    watch: Any, tmp_path: Path
) -> None:
    toy_worker("wapo_vanilla", own_sums=False).train_mini_batch(rollouts())
    watch.close()
    run = open_run(tmp_path / "run")
    assert run.manifest["statistics_from"] == "logits"
    tokens, table = run.tokens(), toy_worker("vanilla").table.detach()
    assert "unknown" not in set(tokens.cls)
    step = rollouts()
    ids = torch.cat([step["prompts"], step["responses"]], 1)
    first = tokens[tokens.minibatch == 0]
    before = ids[first.rollout.to_numpy(), PROMPT + first.position.to_numpy() - 1]
    p = table[before].softmax(-1)
    np.testing.assert_allclose(first.entropy, -(p * p.log()).sum(-1), rtol=1e-4)
    np.testing.assert_allclose(first.collision, p.square().sum(-1), rtol=1e-4)
    assert (
        first.token_id.tolist()
        == step["responses"][first.rollout.to_numpy(), first.position.to_numpy()].tolist()
    )


def test_real_vanilla_coefficients_are_the_hand_computed_ones(watch: Any, tmp_path: Path) -> None:
    worker = toy_worker("wapo_vanilla")
    table = worker.table.detach().clone()
    worker.train_mini_batch(rollouts())
    watch.close()
    tokens = open_run(tmp_path / "run").tokens()
    first = tokens[tokens.minibatch < 2]
    step = rollouts()
    ids = torch.cat([step["prompts"], step["responses"]], 1)
    for _, micro in first.groupby("minibatch"):
        rows = torch.tensor(micro.rollout.to_numpy())
        places = torch.tensor(micro.position.to_numpy())
        before = ids[rows, PROMPT + places - 1]
        logp = table[before].log_softmax(-1).gather(-1, ids[rows, PROMPT + places][:, None])[:, 0]
        ratio = (logp - step["old_log_probs"][rows, places]).exp()
        advantage = step["advantages"][rows, places]
        clip = ((advantage > 0) & (ratio > 1.2)) | ((advantage < 0) & (ratio < 0.8))
        clip |= (advantage < 0) & (ratio > 3)  # the dual clip
        expected = torch.where(clip, 0.0, ratio * advantage) / len(micro)
        np.testing.assert_allclose(micro.coef, expected, rtol=1e-4, atol=1e-7)
        assert micro.clipped.tolist() == (clip & (advantage != 0)).tolist()
        assert micro.kept.all()


def test_closing_restores_verl_and_watching_twice_is_refused(watch: Any) -> None:
    from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
    from verl.workers.engine_workers import TrainingWorker

    assert {PREFIX + name for name in LOSSES} <= set(POLICY_LOSS_REGISTRY)
    with pytest.raises(UserError, match="already watched"):
        watch_verl("elsewhere")
    step = TrainingWorker.train_mini_batch
    watch.close()
    watch.close()
    assert not any(name.startswith(PREFIX) for name in POLICY_LOSS_REGISTRY)
    assert TrainingWorker.train_mini_batch is not step
    assert step.__wrapped__ is TrainingWorker.train_mini_batch
    dispatch = {k: v for k, v in vars(step).items() if k != "__wrapped__"}
    assert (
        dispatch.items()
        >= {
            k: v for k, v in vars(TrainingWorker.train_mini_batch).items() if k != "__wrapped__"
        }.items()
    ), "verl finds its dispatch marks on the wrapper"


def test_the_plugin_reads_the_environment(verl: Any, tmp_path: Path) -> None:
    import os
    import subprocess
    import sys

    code = (
        "import wapo_analysis.capture.verl_plugin as p; print(sorted(p.WATCH.names)[0]); "
        "from verl.trainer.ppo.core_algos import get_policy_loss_fn as g; g('wapo_vanilla')"
    )
    base = {k: v for k, v in os.environ.items() if not k.startswith("WAPO_")}
    base["PYTHONPATH"] = os.pathsep.join(sys.path)

    def start(**given: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", code], env={**base, **given}, text=True, capture_output=True,
            check=False,
        )  # fmt: skip

    assert "wapo_bypass_mode" in start(WAPO_RUN=str(tmp_path / "r")).stdout
    assert "set WAPO_RUN to the run folder" in start().stderr
    wrong = start(WAPO_RUN=str(tmp_path / "r"), WAPO_TOKEN_EVERY="many")
    assert "must be numbers" in wrong.stderr
