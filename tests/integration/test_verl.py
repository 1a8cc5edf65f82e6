"""verl: the adapter on tensors of the documented shapes."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.trainer_losses import VERL_ENGINE
from wapo_analysis import Recorder
from wapo_analysis.capture.verl import VerlWatcher, _dense, _fit, watch_verl, watched
from wapo_analysis.errors import UserError
from wapo_analysis.store import open_run


def clipped_loss(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: Any = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    ratio = (log_prob - old_log_prob).exp()
    loss = -torch.minimum(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    if rollout_is_weights is not None:
        loss = loss * rollout_is_weights
    dp_size = (config.global_batch_info if config else {}).get("dp_size", 1)
    return (loss * response_mask).sum() / response_mask.sum() * dp_size, {"seen": 1.0}


class Data(dict[str, Any]):
    """Stands in for a TensorDict: entries by key and a batch size."""

    batch_size = (4,)


def batch(seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(4, 6)
    mask[1, 4:] = 0
    logp = -torch.rand(4, 6, generator=generator, dtype=torch.float64)
    return {
        "log_prob": logp.requires_grad_(),
        "old_log_prob": logp.detach() + 0.3 * torch.randn(4, 6, generator=generator),
        "advantages": torch.randn(4, 1, generator=generator).expand(4, 6) * mask,
        "response_mask": mask.bool(),
    }


@pytest.fixture
def watcher(tmp_path: Path) -> Iterator[VerlWatcher]:
    watcher = VerlWatcher(lambda rank, t: Recorder(tmp_path / "r", rank=rank, temperature=t))
    yield watcher
    if watcher.recorder is not None:
        watcher.recorder.close()


@pytest.mark.parametrize("dp_size", [1, 4])
def test_a_watched_loss_is_the_loss_and_its_gradient_is_recorded(
    tmp_path: Path, watcher: VerlWatcher, dp_size: int
) -> None:
    config = SimpleNamespace(global_batch_info={"dp_size": dp_size})
    weights = torch.ones(4, 6)
    weights[3] = 0
    tensors = batch()
    plain, _ = clipped_loss(**tensors, config=config, rollout_is_weights=weights)
    (expected,) = torch.autograd.grad(plain, tensors["log_prob"])
    watcher.begin_step(VERL_ENGINE, Data())
    seen = batch()
    loss, metrics = watched(clipped_loss, watcher)(
        **seen, config=config, rollout_is_weights=weights
    )
    loss.backward()
    watcher.end_verl_step()
    assert (loss.item(), metrics) == (plain.item(), {"seen": 1.0})
    assert torch.equal(seen["log_prob"].grad, expected)
    assert watcher.failure is None
    assert watcher.recorder is not None
    watcher.recorder.flush()
    run = open_run(tmp_path / "r")
    assert (run.steps.step.tolist(), run.temperature) == ([1], 1.0), "verl told neither"
    tokens = run.tokens()
    chosen = seen["response_mask"]
    np.testing.assert_allclose(tokens.coef, -expected[chosen] / dp_size, rtol=4e-5)
    np.testing.assert_allclose(tokens.advantage, seen["advantages"][chosen], rtol=4e-5)
    assert tokens.kept.tolist() == (weights[chosen] != 0).tolist()
    stopped = (expected[chosen] == 0) & (weights[chosen] != 0)
    assert 0 < int(stopped.sum()) < len(stopped)
    assert tokens.clipped.tolist() == stopped.tolist()
    assert set(tokens.group) == set(tokens.token_id) == {-1}
    assert set(tokens.cls) == {"unknown"}


def test_evaluation_and_other_processes_are_not_recorded(
    tmp_path: Path, watcher: VerlWatcher
) -> None:
    loss = watched(clipped_loss, watcher)
    loss(**batch())
    silent = SimpleNamespace(**vars(VERL_ENGINE) | {"is_mp_src_rank_with_outputs": lambda: False})
    watcher.begin_step(silent, Data())
    loss(**batch())
    watcher.end_verl_step()
    assert watcher.recorder is None
    watcher.begin_step(VERL_ENGINE, Data())
    with torch.no_grad():
        loss(**batch() | {"log_prob": batch()["log_prob"].detach()})
    watcher.end_verl_step()
    assert open_run(tmp_path / "r").steps.empty


def test_responses_are_padded_and_cut_to_the_width_of_the_log_probabilities() -> None:
    nested = torch.nested.nested_tensor(
        [torch.tensor([1, 2, 3]), torch.tensor([4])], layout=torch.jagged
    )
    dense = _dense(nested)
    assert dense.tolist() == [[1, 2, 3], [4, 0, 0]]
    assert _dense(dense) is dense
    for width in (2, 3, 5):
        expected = [[*row, 0, 0][:width] for row in dense.tolist()]
        assert _fit(dense, torch.Size((2, width))).tolist() == expected


def test_positional_arguments_as_in_the_documented_signature(watcher: VerlWatcher) -> None:
    watcher.begin_step(VERL_ENGINE, Data())
    b = batch()
    watched(clipped_loss, watcher)(
        b["old_log_prob"], b["log_prob"], b["advantages"], b["response_mask"], "token-mean", None
    )
    assert watcher.failure is None
    assert watcher.recorder is not None
    assert watcher.recorder.returned() is not None


def test_a_folder_that_cannot_be_used_warns_once_and_trains_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Recorder(tmp_path / "r").close()
    watcher = VerlWatcher(lambda rank, t: Recorder(tmp_path / "r", rank=rank, temperature=t))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            watcher.begin_step(VERL_ENGINE, Data())
            watched(clipped_loss, watcher)(**batch())[0].backward()
            watcher.end_verl_step()
    assert len(caplog.records) == 1
    assert "already holds a run" in caplog.text


def test_without_verl_the_mistake_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verl", None)
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", None)
    with pytest.raises(UserError, match=r"verl 0\.9\.1 is needed"):
        watch_verl("nowhere")


class Worker:
    """Calls what verl's TrainingWorker calls: the loss within a mini-batch, on one micro-batch."""

    engine = VERL_ENGINE

    def __init__(self) -> None:
        self.loss: Any = None

    def set_loss_fn(self, loss_fn: Any) -> None:
        self.loss = loss_fn

    def train_mini_batch(self, data: Any) -> str:
        loss, _ = self.loss({}, data)
        loss.backward()
        return "done"


def test_watched_losses_stand_in_the_registry_and_a_worker_s_steps_are_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry: dict[str, Any] = {"vanilla": clipped_loss, "gspo": clipped_loss}

    def register_policy_loss(name: str) -> Any:
        return lambda loss: registry.setdefault(name, loss)

    core = SimpleNamespace(POLICY_LOSS_REGISTRY=registry, register_policy_loss=register_policy_loss)
    for name, module in (
        ("verl.trainer.ppo.core_algos", core),
        ("verl.workers.engine_workers", SimpleNamespace(TrainingWorker=Worker)),
        ("verl.workers.utils.padding", SimpleNamespace()),
        ("verl.utils.tensordict_utils", SimpleNamespace(get=lambda d, key, default: d[key])),
    ):
        monkeypatch.setitem(sys.modules, name, module)  # type: ignore[arg-type]
    before = dict(vars(Worker))
    watch = watch_verl(str(tmp_path / "r"), {"label": "mine"}, token_every=1)
    assert watch.names == ["wapo_vanilla", "wapo_gspo"]
    with pytest.raises(UserError, match="verl is already watched in this process"):
        watch_verl(str(tmp_path / "other"))
    worker = Worker()
    tensors: list[dict[str, Any]] = []

    def loss_fn(model_output: Any, data: Any) -> Any:
        tensors.append(batch(len(tensors)))
        return registry["wapo_vanilla"](**tensors[-1])

    worker.set_loss_fn(loss_fn)
    uids, scores = ["a", "a", "b", "prompt 3"], torch.tensor([[0.25, 0.5]] * 3 + [[0.0, 0.0]])
    for step in (5, 6):
        rows = Data(
            responses=torch.arange(24).view(4, 6), uid=uids, global_steps=step,
            token_level_scores=scores, temperature=0.5,
        )  # fmt: skip
        assert worker.train_mini_batch(rows) == "done"
    watch.close()
    watch.close()
    assert list(registry) == ["vanilla", "gspo"]
    assert dict(vars(Worker)) == before
    assert watch.watcher.failure is None
    run = open_run(tmp_path / "r")
    assert (run.label, run.status, run.manifest.source) == ("mine", "finished", "verl")
    found, mask = run.tokens(), tensors[0]["response_mask"]
    assert found.groupby("step").size().tolist() == [int(mask.sum())] * 2
    assert found[found.step == 5].token_id.tolist() == torch.arange(24).view(4, 6)[mask].tolist()
    numbers = [crc32(uid.encode()) % 2**31 for uid in uids]
    assert max(crc32(uid.encode()) for uid in uids) >= 2**31
    assert found[found.step == 6].group.tolist() == [
        numbers[row] for row in mask.nonzero()[:, 0].tolist()
    ]
    assert run.steps.reward.tolist() == [0.5625] * 2
    assert (run.temperature, run.rollouts.reward.tolist()) == (0.5, [0.75, 0.75, 0.75, 0.0] * 2)
    assert found[found.step == 6].rollout.tolist() == mask.nonzero()[:, 0].tolist()
    coef = torch.cat([-given["log_prob"].grad[mask] for given in tensors])
    np.testing.assert_allclose(found.coef, coef, rtol=4e-5, atol=1e-8)


def test_rollouts_of_later_processes_are_numbered_after_those_before(
    watcher: VerlWatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "verl.workers.utils.padding", SimpleNamespace())  # type: ignore[arg-type]
    engine = SimpleNamespace(**vars(VERL_ENGINE) | {"get_data_parallel_rank": lambda: 2})
    data = Data(responses=torch.zeros(4, 6))
    watcher.begin_step(engine, data)
    assert data["wapo_row"].tolist() == [0, 1, 2, 3]
    with watcher.micro_batch(
        {}, {"responses": torch.zeros(2, 6), "wapo_row": torch.tensor([3, 1])}
    ):
        assert watcher._micro["rollouts"].tolist() == [11, 9], "2 x 4 come before"
    assert watcher._micro == {}
    assert watcher.recorder is not None
    assert watcher.recorder.rank == 2
