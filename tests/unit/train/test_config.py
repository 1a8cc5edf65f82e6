"""Settings declared once: what is refused and how, what options and tables say, the schedule."""

from dataclasses import fields
from pathlib import Path

import pytest

from wapo_analysis.cli import run
from wapo_analysis.cli.train import as_settings
from wapo_analysis.declare import assigned, declared_settings
from wapo_analysis.errors import UserError
from wapo_analysis.objectives.config import ObjectiveSettings
from wapo_analysis.train.config import TrainConfig

SETTINGS = declared_settings(TrainConfig)
REFUSED = {
    "steps": 0, "rollouts_per_prompt": 1, "seed": -1, "microbatch_size": 0, "lr": 0.0,
    "temperature": float("inf"), "beta2": 1.0, "weight_decay": -0.1, "token_fraction": 0.0,
    "store_bits": 24, "precision": "float16", "lr_schedule": "step", "chat": "yes",
    "log_to": "stdout",
    "lora_rank": 0, "lora_alpha": -1.0, "lora_targets": (), "stop": ("",), "eval_samples": 0,
    "keep_checkpoints": 0, "device": "tpu", "max_prompt_tokens": 0, "optimizer": "lion",
}  # fmt: skip


@pytest.mark.parametrize(("name", "value"), REFUSED.items())
def test_bad_values_are_refused(name: str, value: object) -> None:
    limit = SETTINGS[name].limit
    assert limit is not None
    with pytest.raises(UserError) as caught:
        TrainConfig.from_dict({name: value})
    assert str(caught.value) == f"{name} must be {limit.refusal(value)}, got {value!r}"


def test_every_setting_is_declared_and_none_passes_only_where_it_means_something() -> None:
    assert list(SETTINGS) == [field.name for field in fields(TrainConfig)]
    for name, declared in SETTINGS.items():
        assert bool(declared.unset) == ("None" in declared.kind), name
        assert declared.doc.endswith("."), name
    TrainConfig(microbatch_size=None, lora_alpha=None)
    with pytest.raises(TypeError):
        TrainConfig(steps=None)  # type: ignore[arg-type]


SILLY: list[dict[str, object]] = [
    {"lora_rank": 10**6},
    {"lora_rank": 2**31},
    {"sample_batch_size": 10**30},
    {"microbatch_size": 10**30},
    {"eval_prompts": 10**30, "eval_every": 1},
    {"eval_prompts": 2**63, "eval_every": 1},
    {"eval_samples": 2**31, "eval_every": 1},
    {"prompts_per_step": 2**31, "rollouts_per_prompt": 2},
    {"epochs": 10**30},
    {"clip_eps": 1e308},
    # of the same kind: each alone is in its limits, or no float can hold it
    {"prompts_per_step": 100_000, "rollouts_per_prompt": 1000},
    {"eval_prompts": 100_000, "eval_samples": 10_000, "eval_every": 1},
    {"lr": 10**400},
    {"temperature": 1e-300},
    {"minibatches": 10**30},
]
"""Settings that passed the check and ended in a traceback or never."""


@pytest.mark.parametrize("settings", SILLY, ids=str)
def test_silly_numbers_are_refused_by_name(settings: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"^{next(iter(settings))} (must|times)") as caught:
        TrainConfig.from_dict(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [n for n, s in SETTINGS.items() if s.kind.startswith("int")])
def test_every_whole_number_has_an_upper_limit(name: str) -> None:
    for value in (2**63, 10**30):
        with pytest.raises(UserError, match=f"^{name} must be at most|7 to 23"):
            TrainConfig.from_dict({name: value})


@pytest.mark.parametrize("name", [n for n, s in SETTINGS.items() if s.kind.startswith("float")])
def test_no_number_is_infinite_or_beyond_reason(name: str) -> None:
    for value in (float("inf"), float("nan"), 1e308, 10**400, -(10**400)):
        with pytest.raises(UserError, match=f"^{name} must be"):
            TrainConfig.from_dict({name: value})


def test_text_with_nul_is_refused_before_a_file_is_opened_by_it() -> None:
    for values in ({"model": "a\0b"}, {"stop": ["x", "\0"]}, {"data": "\0"}):
        with pytest.raises(UserError, match="without NUL"):
            TrainConfig.from_dict(values)


def test_a_file_nested_without_end_is_one_line(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text(f"stop = {'[' * 5000}{']' * 5000}")
    with pytest.raises(UserError, match="is not valid TOML"):
        TrainConfig.from_toml(file)


def test_settings_of_the_objective_are_those_of_the_trainer() -> None:
    own = {field.name for field in fields(ObjectiveSettings)}
    assert own < set(SETTINGS)
    config = TrainConfig(mask_negative_advantages=True, clip_eps=0.3, max_seq_len=7)
    objective = config.objective_config(max_new_tokens=9)
    assert objective.drops_negative
    assert {n: getattr(objective, n) for n in own} == {n: getattr(config, n) for n in own}
    assert TrainConfig().objective_config(9).max_seq_len == 9


def test_a_wrong_name_is_answered_with_the_closest() -> None:
    for values, asked in (
        ({"objective": "grop"}, "unknown objective 'grop'; allowed: grpo, .*mean 'grpo'"),
        ({"rollout-per-prompt": 3}, "unknown setting .* did you mean 'rollouts_per_prompt'"),
        ({"prompts": 3}, "unknown setting 'prompts'; did you mean 'prompts_per_step'"),
        ({"task": "chainsum"}, "unknown task 'chainsum'; .* did you mean 'chain-sum'"),
        ({"include_bins": ["neg_peek"]}, "neg_peek.* did you mean 'neg_peak'"),
    ):
        with pytest.raises(UserError, match=asked):
            TrainConfig.from_dict(values)


def test_none_takes_a_number_back() -> None:
    assert TrainConfig.from_dict({"probe_rows": "none"}).probe_rows is None
    with pytest.raises(UserError, match="steps must be of type int"):
        TrainConfig.from_dict({"steps": "none"})


def test_options_give_the_same_settings_again() -> None:
    assert TrainConfig().options() == []
    config = TrainConfig(
        objective="wapo", lr=1e-4, include_bins=("pos",), stop=("a b", "c"), official=True,
        label="my run", prompts_per_step=4, lr_schedule="cosine", probe_rows=None,
    )  # fmt: skip
    words = config.options()
    assert words[:2] == ["--objective", "wapo"]
    given = dict(zip(words[::2], words[1::2], strict=True))
    named = {s.option: name for name, s in SETTINGS.items()}
    changes = assigned([v for o, v in zip(words[::2], words[1::2], strict=True) if o == "--set"])
    changes |= as_settings({named[o]: v for o, v in given.items() if o != "--set"})
    changes |= {"prompts_per_step": int(changes["prompts_per_step"]), "lr": float(changes["lr"])}
    assert TrainConfig.from_dict(changes) == config


def test_help_shows_every_option_with_its_default(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow terminal breaks "mini-batch" at its hyphen
    assert run(["train", "--help"]) == 0
    shown = " ".join(capfd.readouterr().out.split())
    for declared in SETTINGS.values():
        if declared.option:
            assert f" {declared.option} <" in shown
            assert f"default: {declared.shown_default}]" in shown


# --- the learning rate, by hand ------------------------------------------------------------------


def rates(**settings: object) -> list[float]:
    config = TrainConfig.from_dict({"lr": 1.0, "steps": 6, **settings})
    return [config.learning_rate(step) for step in range(1, config.steps + 1)]


def test_warm_up_then_constant() -> None:
    assert rates(warmup_steps=4) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])
    assert rates() == [1.0] * 6


def test_linear_falls_towards_zero_and_the_last_step_still_moves() -> None:
    assert rates(lr_schedule="linear", warmup_steps=2) == pytest.approx(
        [0.5, 1, 1, 0.75, 0.5, 0.25]
    )


def test_cosine_halves_in_the_middle() -> None:
    assert rates(lr_schedule="cosine", steps=4) == pytest.approx([1, 0.8535534, 0.5, 0.1464466])


def test_a_warm_up_longer_than_the_run_only_rises() -> None:
    assert rates(lr_schedule="cosine", warmup_steps=12) == pytest.approx(
        [n / 12 for n in range(1, 7)]
    )
