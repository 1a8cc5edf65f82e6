import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from wapo_analysis.errors import UserError
from wapo_analysis.objectives.config import ObjectiveConfig
from wapo_analysis.objectives.loss import policy_loss
from wapo_analysis.objectives.table import MAX_LOG_RATIO, OBJECTIVES

Array = np.ndarray


def config_of(name: str, **settings: object) -> ObjectiveConfig:
    return ObjectiveConfig(name=name, **{"max_seq_len": 32, **settings})  # type: ignore[arg-type]


def surrogate(low: float, high: float) -> Callable[..., tuple[Array, Array]]:
    def formula(logp: Array, old: Array, a: Array, mask: Array) -> tuple[Array, Array]:
        x = np.exp(logp - old)
        value = -np.minimum(x * a, np.clip(x, low, high) * a)
        active = ((a > 0) & (x > high)) | ((a < 0) & (x < low))
        return value, np.where(active, 0.0, -x * a)

    return formula


def raft(logp: Array, old: Array, a: Array, mask: Array) -> tuple[Array, Array]:
    return -logp, -np.ones_like(logp)


def wapo_no_ratio(logp: Array, old: Array, a: Array, mask: Array) -> tuple[Array, Array]:
    return -a * logp, -a * np.ones_like(logp)


# Token loss and its derivative by the token's own logp, written down from the papers.
CLOSED_FORMS = {
    "grpo": surrogate(0.8, 1.2),
    "dr_grpo": surrogate(0.8, 1.2),
    "dapo": surrogate(0.8, 1.28),
    "dr_dapo": surrogate(0.8, 1.28),
    "dr_dapo_seq": surrogate(0.8, 1.28),
    "raft": raft,
    "raft++": surrogate(0.0, 1.2),
    "wapo": surrogate(0.0, 1.5),
    "wapo without ratio": wapo_no_ratio,
}


@pytest.fixture
def tokens() -> dict[str, torch.Tensor]:
    """Float64 rollouts with ratios on both sides of every clip range, and masked-out tokens."""
    generator = torch.Generator().manual_seed(3)
    old = -3 * torch.rand(6, 9, generator=generator, dtype=torch.float64)
    logp = old + 0.5 * torch.randn(6, 9, generator=generator, dtype=torch.float64)
    mask = torch.ones(6, 9, dtype=torch.bool)
    mask[:, -1] = False
    mask[[1, 3], 1:] = False  # rollouts of one token
    advantage = torch.tensor([1.0, -0.5, 0.25, 2.0, -1.5, 0.75], dtype=torch.float64)
    weight = torch.linspace(0.1, 0.6, 6, dtype=torch.float64)
    return {"logp": logp, "old": old, "mask": mask, "advantage": advantage, "weight": weight}


def settings_for(label: str) -> dict[str, object]:
    special: dict[str, dict[str, object]] = {
        "wapo": {"clip_eps": 0.5},
        "wapo without ratio": {"use_importance_sampling": False},
    }
    return {"mask_ratio_high": 1.28, **special.get(label, {})}


def run(config: ObjectiveConfig, t: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    logp = t["logp"].clone().requires_grad_()
    out = policy_loss(config, logp, t["old"], t["advantage"], t["mask"], t["mask"], t["weight"])
    (coef,) = torch.autograd.grad(out.loss, logp)
    return out.loss.detach(), coef, out.clipped


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("label", CLOSED_FORMS)
def test_loss_and_gradient_equal_the_closed_form(
    label: str, official: bool, tokens: dict[str, torch.Tensor]
) -> None:
    config = config_of(label.split()[0], official=official, **settings_for(label))
    loss, coef, clipped = run(config, tokens)
    logp, old = tokens["logp"].numpy(), tokens["old"].numpy()
    advantage = tokens["advantage"].numpy()[:, None]
    value, slope = CLOSED_FORMS[label](logp, old, advantage, tokens["mask"].numpy())
    scale = tokens["mask"].numpy() * tokens["weight"].numpy()[:, None]
    assert coef.dtype == torch.float64
    np.testing.assert_allclose(loss.numpy(), (value * scale).sum(), rtol=1e-12)
    np.testing.assert_allclose(coef.numpy(), slope * scale, rtol=1e-12, atol=1e-15)
    inside = tokens["mask"].numpy()
    assert (clipped.numpy()[inside] == (slope == 0)[inside]).all()
    if "ratio" not in label and label != "raft":
        assert clipped.numpy()[inside].any(), "the sample must reach the clip branch"


@pytest.mark.parametrize("official", [False, True])
def test_gspo_equals_the_closed_form(official: bool, tokens: dict[str, torch.Tensor]) -> None:
    config = config_of("gspo", clip_eps=0.1, official=official)
    loss, coef, clipped = run(config, tokens)
    mask, weight = tokens["mask"].numpy(), tokens["weight"].numpy()
    gap = (tokens["logp"] - tokens["old"]).numpy() * mask
    n, a = mask.sum(1), tokens["advantage"].numpy()
    x = np.exp(gap.sum(1) / n)
    value = -np.minimum(x * a, np.clip(x, 0.9, 1.1) * a)
    active = ((a > 0) & (x > 1.1)) | ((a < 0) & (x < 0.9))
    assert 0 < active.sum() < len(active)
    # n tokens share one loss whose ratio moves by x / n per unit of any token's logp.
    slope = np.where(active, 0.0, -x * a) * weight
    np.testing.assert_allclose(loss.numpy(), (value * n * weight).sum(), rtol=1e-8)
    np.testing.assert_allclose(coef.numpy(), slope[:, None] * mask, rtol=1e-8, atol=1e-15)
    assert (clipped.numpy()[mask] == np.broadcast_to(active[:, None], mask.shape)[mask]).all()


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_equals_central_differences(
    name: str, official: bool, tokens: dict[str, torch.Tensor]
) -> None:
    config = config_of(name, official=official, clip_eps=0.15)
    _, coef, _ = run(config, tokens)
    step, worst = 1e-6, 0.0
    for index in [(0, 0), (1, 3), (2, 5), (4, 7), (5, 1)]:
        sides = []
        for sign in (1, -1):
            moved = tokens["logp"].clone()
            moved[index] += sign * step
            sides.append(run(config, {**tokens, "logp": moved})[0])
        worst = max(worst, abs(float((sides[0] - sides[1]) / (2 * step) - coef[index])))
    assert worst < 1e-8


def test_a_ratio_on_the_bound_passes_its_whole_gradient() -> None:
    logp = torch.tensor([[-0.5], [-0.5]], dtype=torch.float64, requires_grad=True)
    mask, one = torch.ones(2, 1, dtype=torch.bool), torch.ones(2, dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0], dtype=torch.float64)
    config = config_of("grpo", clip_eps=0.0)
    out = policy_loss(config, logp, logp.detach(), advantage, mask, mask, one)
    out.loss.backward()  # type: ignore[no-untyped-call]
    assert logp.grad is not None
    assert logp.grad.ravel().tolist() == [-1.0, 1.0]
    assert not out.clipped.any()


def test_a_loss_without_a_ratio_reports_it() -> None:
    """How far the policy has moved is told, though RAFT's loss does not hold it."""
    logp, old = torch.tensor([[-1.0, -3.0, -0.5]]), torch.tensor([[-2.0, -1.0, -90.0]])
    mask, one = torch.ones(1, 3, dtype=torch.bool), torch.ones(1)
    out = policy_loss(config_of("raft"), logp.requires_grad_(), old, one, mask, mask, one)
    np.testing.assert_allclose(out.ratio, np.exp([[1.0, -2.0, MAX_LOG_RATIO]]), rtol=1e-6)
    assert not out.clipped.any()


def test_registry_matches_the_published_table() -> None:
    rows = {
        name: (o.advantage, o.level, o.default_clip_eps, o.positive_only)
        for name, o in OBJECTIVES.items()
    }
    assert rows == {
        "grpo": ("standardized", "seq", 0.2, False),
        "dr_grpo": ("centered", "global", 0.2, False),
        "dapo": ("standardized", "group", None, False),
        "dr_dapo": ("centered", "group", None, False),
        "dr_dapo_seq": ("centered", "seq", None, False),
        "gspo": ("standardized", "seq", 0.04, False),
        "raft": ("raw", "seq", None, True),
        "raft++": ("raw", "seq", 0.2, True),
        "wapo": ("centered", "group", 9.0, True),
    }


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("grpo", {}, (0.8, 1.2)),
        ("gspo", {}, (0.96, 1.04)),
        ("dapo", {"mask_ratio_high": 1.28, "clip_eps": 0.5}, (0.8, 1.28)),
        ("raft++", {}, (0.0, 1.2)),
        ("raft", {}, (0.0, np.inf)),
        ("grpo", {"clip_eps": 0.0}, (1.0, 1.0)),
        ("wapo", {"clip_eps": 0.0}, (0.0, 1.0)),
        ("wapo", {}, (0.0, 10.0)),
        ("wapo", {"clip_eps": 0.5}, (0.0, 1.5)),
    ],
)
def test_clip_range(name: str, settings: dict[str, object], expected: tuple[float, float]) -> None:
    bounds = config_of(name, **settings).bounds
    assert (bounds.low, bounds.high) == pytest.approx(expected)
    assert bounds.max_log_ratio == MAX_LOG_RATIO
    assert config_of(name, official=True, **settings).bounds.max_log_ratio == np.inf


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"mask_ratio_low": 0.0}, True), ({"mask_ratio_low": 1.0}, True),
        ({"mask_ratio_low": -1e-9}, False), ({"mask_ratio_low": 1 + 1e-9}, False),
        ({"mask_ratio_high": 1.0}, True), ({"mask_ratio_high": 1e9}, True),
        ({"mask_ratio_high": 1 - 1e-9}, False), ({"mask_ratio_high": 1.1e9}, False),
        ({"clip_eps": 0.0}, True), ({"clip_eps": 1e9}, True), ({"clip_eps": -1e-9}, False),
        ({"clip_eps": 1.1e9}, False), ({"max_seq_len": 1}, True), ({"max_seq_len": 0}, False),
        ({"max_seq_len": 10_000_000}, True), ({"max_seq_len": 10_000_001}, False),
    ],
)  # fmt: skip
def test_settings_at_their_bounds(settings: dict[str, float], allowed: bool) -> None:
    if allowed:
        config = config_of("dapo", **settings)
        assert all(getattr(config, name) == value for name, value in settings.items())
    else:
        with pytest.raises(UserError):
            config_of("dapo", **settings)


@pytest.mark.parametrize(
    ("name", "level", "rule"),
    [
        ("grpo", None, "seq"),
        ("grpo", "group", "group"),
        ("dr_grpo", None, "longest"),
        ("dr_grpo", "global", "global"),
        ("wapo", None, "fixed_length"),
        ("wapo", "group", "fixed_length"),
        ("wapo", "seq", "seq"),
        ("dapo", None, "group"),
    ],
)
def test_weight_rule(name: str, level: str | None, rule: str) -> None:
    assert config_of(name, loss_mean_level=level).weight_rule == rule


def test_importance_sampling_switch_changes_wapo_alone() -> None:
    for name in OBJECTIVES:
        on, off = config_of(name), config_of(name, use_importance_sampling=False)
        assert (on.token_loss is not off.token_loss) == (name == "wapo")
        assert off.uses_ratio == (name not in ("wapo", "raft"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "ppo"}, "grpo, dr_grpo, dapo"),
        ({"include_bins": ("peaks",)}, "pos_peak, pos_valley, neg_peak, neg_valley, pos, neg"),
        ({"exclude_bins": ("pos", "vale")}, "unknown bin in exclude_bins 'vale'"),
        ({"include_bins": "peak"}, "must be a list of names"),
        ({"include_bins": ("pos",), "exclude_bins": ("peak",)}, "not both"),
        ({"loss_mean_level": "batch"}, "seq, group, global"),
        ({"clip_eps": -0.1}, "clip_eps must be"),
        ({"clip_eps": float("nan")}, "clip_eps must be"),
        ({"mask_ratio_low": 1.1}, "0 <= low <= 1 <= high"),
        ({"mask_ratio_high": 0.9}, "0 <= low <= 1 <= high"),
        ({"mask_ratio_high": float("inf")}, "0 <= low <= 1 <= high"),
        ({"max_seq_len": 0}, "max_seq_len must be"),
        ({"name": "wapo", "max_seq_len": None}, "set max_seq_len"),
        ({"name": "wapo", "include_bins": ("neg_peak",)}, "leave no token to train on"),
        ({"name": "raft", "mask_positive_advantages": True}, "leave no token to train on"),
        ({"exclude_bins": ("peak", "valley")}, "leave no token to train on"),
    ],
)
def test_settings_are_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ObjectiveConfig(**{"name": "grpo", "max_seq_len": 8, **settings})  # type: ignore[arg-type]


def test_wapo_needs_a_length_only_where_it_divides_by_it() -> None:
    for settings in ({"loss_mean_level": "seq"}, {"normalize_by_kept_tokens": True}):
        config_of("wapo", **{"max_seq_len": None, **settings})


def test_official_mode_takes_unknown_names_as_the_published_code_does() -> None:
    config = config_of("grpo", official=True, include_bins=("peaks",), loss_mean_level="batch")
    assert config.included_classes == ()
    assert config.level == "global"
    both = config_of("grpo", official=True, include_bins=("pos",), exclude_bins=("pos",))
    assert both.included_classes == ("pos_peak", "pos_valley")
    assert both.excluded_classes == ()


def test_objectives_load_no_torch() -> None:
    code = "import sys, wapo_analysis.objectives.config; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])
