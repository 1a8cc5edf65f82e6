"""What our settings become in TRL: every one has a place, and what has none is refused."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl", reason="needs the extra [trl]")

from wapo_analysis.declare import declared_settings
from wapo_analysis.engines import COUNTERPARTS, check_counterparts, trl_settings
from wapo_analysis.errors import UserError
from wapo_analysis.train.config import TrainConfig

PAGE = (Path(__file__).parents[3] / "docs" / "scale.md").read_text()


@pytest.mark.parametrize("name", sorted(COUNTERPARTS))
def test_the_page_says_where_a_setting_goes(name: str) -> None:
    assert name in declared_settings(TrainConfig)
    assert f"| `{name}` | `{COUNTERPARTS[name]}` |" in PAGE


def test_a_setting_without_a_place_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """So one that somebody adds is never ignored in silence."""
    monkeypatch.delitem(COUNTERPARTS, "beta2")  # type: ignore[arg-type]
    check_counterparts(TrainConfig(engine="trl", capture_mode="passive"))
    with pytest.raises(UserError, match="beta2 has no counterpart on engine trl"):
        check_counterparts(TrainConfig(engine="trl", capture_mode="passive", beta2=0.9))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_a_batch_of_ours_is_one_of_trls(processes: int, tmp_path: Path) -> None:
    config = TrainConfig(
        engine="trl", prompts_per_step=4, rollouts_per_prompt=6, minibatches=3, epochs=2,
        steps=5, microbatch_size=3, checkpoint_every=2,
    )  # fmt: skip
    made = trl_settings(config, tmp_path, processes)
    from trl import GRPOConfig

    assert set(made) <= {field.name for field in fields(GRPOConfig)}
    size = made["per_device_train_batch_size"]
    assert size <= 3
    assert size * made["gradient_accumulation_steps"] * processes == 4 * 6 // 3
    assert size * made["steps_per_generation"] * processes == 4 * 6
    assert (made["max_steps"], made["save_steps"]) == (5 * 2 * 3, 2 * 2 * 3)


def test_a_batch_that_cannot_be_split_is_one_line(tmp_path: Path) -> None:
    config = TrainConfig(engine="trl", prompts_per_step=3, rollouts_per_prompt=4, minibatches=4)
    with pytest.raises(UserError, match="mini-batch of 3 rollouts .* evenly over 2 processes"):
        trl_settings(config, tmp_path, 2)


@pytest.mark.parametrize(
    "settings",
    [
        {"stop": ("x",)}, {"sample_batch_size": 4}, {"store_bits": 23},
        {"official": True}, {"normalize_by_kept_tokens": True}, {"capture_mode": "auto"},
    ],
    ids=lambda s: next(iter(s)),
)  # fmt: skip
def test_settings_without_counterpart_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(settings))):
        check_counterparts(TrainConfig(engine="trl", **settings))


def test_trls_own_settings_are_passed_on(tmp_path: Path) -> None:
    given = ("use_vllm=true", "vllm_mode=colocate", "vllm_gpu_memory_utilization=0.3")
    made = trl_settings(TrainConfig(engine="trl", trl_settings=given), tmp_path, 1)
    assert made["use_vllm"] is True
    assert made["vllm_mode"] == "colocate"
    assert made["vllm_gpu_memory_utilization"] == 0.3


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("use_vllm", "NAME=VALUE"),
        ("use_vlm=true", "use_vllm"),
        ("learning_rate=1", "follows from our own settings"),
    ],
)
def test_a_wrong_setting_of_trl_is_one_line(given: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=told):
        trl_settings(TrainConfig(engine="trl", trl_settings=(given,)), tmp_path, 1)


def test_settings_of_trl_need_its_engine() -> None:
    with pytest.raises(UserError, match="engine trl"):
        TrainConfig(trl_settings=("use_vllm=true",))
