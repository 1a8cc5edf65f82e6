"""Mixed precision and micro-batches by length: what is rounded, what an update does not feel."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from wapo_analysis import UserError
from wapo_analysis.capture import CaptureMode
from wapo_analysis.store import open_run
from wapo_analysis.train import loop, scoring
from wapo_analysis.train.batch import by_length
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import begin, train
from wapo_analysis.train.models import load_policy

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_auto_is_mixed_on_a_gpu_unless_probes_want_float32() -> None:
    config = TrainConfig()
    assert (config.mixed(CPU), config.mixed(GPU)) == (False, True)
    assert not replace(config, probe_every=5).mixed(GPU)
    for precision, mixed in (("float32", False), ("bf16-mixed", True)):
        chosen = replace(config, precision=precision)
        assert chosen.mixed(CPU) is chosen.mixed(GPU) is mixed


def test_dtype_of_older_runs_is_read_as_precision() -> None:
    for dtype, precision in (("float32", "float32"), ("bfloat16", "bf16-mixed")):
        assert TrainConfig.from_dict({"dtype": dtype}).precision == precision
    with pytest.raises(UserError, match="dtype is now precision; allowed: auto, float32, bf16-"):
        TrainConfig.from_dict({"dtype": "float16"})


def test_mixed_rounds_what_samples_and_scores_but_nothing_that_is_trained() -> None:
    plain, mixed = load_policy("base", CPU), load_policy("base", CPU, mixed=True)
    assert plain.rounded is None
    assert {p.dtype for p in mixed.module.parameters()} == {torch.float32}
    assert {p.dtype for p in mixed.rounded.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in mixed.rounded.buffers()} == {b.dtype for b in plain.model.buffers()}
    with torch.no_grad():
        for parameter in mixed.module.parameters():
            parameter.add_(1.0)
    with mixed.sampling() as model:
        pairs = zip(model.parameters(), mixed.module.parameters(), strict=True)
        assert all(torch.equal(own, theirs.bfloat16()) for own, theirs in pairs)
        assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_first_pass_of_a_mixed_run_has_ratio_one(
    tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, precision="bf16-mixed", steps=2, store_bits=23)
    policy = train(config, tmp_path / "run")
    assert {p.dtype for p in policy.module.parameters()} == {torch.float32}
    rows = open_run(tmp_path / "run").tokens()
    first, later = (rows[rows["minibatch"] == number] for number in (0, 1))
    assert np.abs(first["logp"] - first["logp_old"]).max() < 1e-6
    assert np.abs(later["logp"] - later["logp_old"]).max() > 1e-4
    with pytest.raises(UserError, match="precision of a run that is continued cannot change"):
        train(replace(config, precision="float32", steps=3), tmp_path / "run", resume=True)


@pytest.mark.parametrize("kept", [False, True])
def test_microbatches_by_length_do_not_change_the_update(
    kept: bool, tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny_config, steps=1, objective="dapo", normalize_by_kept_tokens=kept)
    whole = train(config)
    shapes = []

    def by_tokens(*given: object) -> CaptureMode:
        return replace(scoring.planned(*given), microbatch_tokens=60)  # type: ignore[arg-type]

    def scored(policy, rollouts, *rest, **how):
        shapes.append((len(rollouts.mask), rollouts.mask.shape[1] + rollouts.prompt_ids.shape[1]))
        return scoring.score(policy, rollouts, *rest, **how)

    monkeypatch.setattr(loop, "planned", by_tokens)
    monkeypatch.setattr(loop, "score", scored)
    split = train(config).module.state_dict()
    assert len(set(shapes)) > 1
    assert all(rows * length <= 60 or rows == 1 for rows, length in shapes)
    for name, value in whole.module.state_dict().items():
        torch.testing.assert_close(value, split[name], rtol=1e-4, atol=2e-6)


def test_every_rollout_is_in_one_part_and_parts_hold_like_lengths() -> None:
    lengths = np.random.default_rng(0).integers(1, 300, (200, 2))
    parts = by_length(lengths, 2000)
    assert sorted(np.concatenate(parts).tolist()) == list(range(200))
    padded = [len(part) * lengths[part].max(axis=0).sum() for part in parts]
    assert max(padded) <= 2000
    assert sum(padded) < 0.75 * 200 * lengths.max(axis=0).sum()
    assert [len(part) for part in by_length(lengths, 1)] == [1] * 200


def test_a_cpu_makes_micro_batches_by_settings_alone(tiny_config: TrainConfig) -> None:
    trainer, _ = begin(tiny_config, None, None)
    assert trainer.capture.microbatch_tokens is None
    assert trainer.capture.mode == "passive"
