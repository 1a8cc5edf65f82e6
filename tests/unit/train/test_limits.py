"""Values a setting may not have are refused with its name, the value and what is allowed."""

from dataclasses import fields

import pytest

from wapo_analysis.errors import UserError
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.limits import LIMITS

REFUSED = {
    "steps": 0, "rollouts_per_prompt": 1, "seed": -1, "microbatch_size": 0, "lr": 0.0,
    "temperature": float("inf"), "beta2": 1.0, "weight_decay": -0.1, "token_fraction": 0.0,
    "store_bits": 24, "dtype": "float16", "lr_schedule": "step", "chat": "yes", "log_to": "stdout",
    "lora_rank": 0, "lora_alpha": -1.0, "lora_targets": (), "stop": ("",), "eval_samples": 0,
    "keep_checkpoints": 0, "device": "tpu", "max_prompt_tokens": 0, "optimizer": "lion",
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED.items())
def test_bad_values_are_refused(name: str, value: object) -> None:
    with pytest.raises(UserError) as caught:
        TrainConfig.from_dict({name: value})
    assert str(caught.value) == f"{name} must be {LIMITS[name].allowed}, got {value!r}"


def test_every_limit_is_of_a_setting_and_the_defaults_hold() -> None:
    assert set(LIMITS) <= {field.name for field in fields(TrainConfig)}
    TrainConfig()


def test_none_passes_only_where_it_means_something() -> None:
    TrainConfig(microbatch_size=None, lora_alpha=None)
    with pytest.raises(TypeError):
        TrainConfig(steps=None)  # type: ignore[arg-type]
