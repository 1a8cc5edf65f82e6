"""Probes of real updates: they change nothing, they add up, and the classes do what they must."""

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import wapo_taxonomy as tax

from tests.integration.test_training import assert_same_weights
from wapo_analysis.attribute import attribute_step, what_if
from wapo_analysis.cli import run as wapo
from wapo_analysis.errors import UserError
from wapo_analysis.probes import closure_error, three_numbers
from wapo_analysis.probes.measure import (
    Before,
    check_splits,
    class_gradients,
    left_over,
    split_step,
    with_sums,
)
from wapo_analysis.schema import ALL_TOKENS, GRADIENT, INTERACTION, OTHER_TOKENS, UPDATE
from wapo_analysis.store import open_run
from wapo_analysis.train.config import TrainConfig
from wapo_analysis.train.loop import train

SMALL_STEP = TrainConfig(
    optimizer="sgd",
    lr=1e-3,
    temperature=1.3,  # flat enough that every class, rewarded valleys too, has tokens in a batch
    steps=1,
    minibatches=1,
    probe_every=1,
    probe_rows=None,
    rescore_every=0,
    token_every=0,
    checkpoint_every=0,
)


MORE = {"microbatch_size": 3, "weight_decay": 0.1, "epochs": 2}


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("adamw", MORE),
        pytest.param("sgd", {}, marks=pytest.mark.slow),
        pytest.param("adamw", {}, marks=pytest.mark.slow),
        pytest.param("sgd", MORE, marks=pytest.mark.slow),
    ],
)
def test_probed_and_unprobed_runs_end_bitwise_equal(
    optimizer: str, options: dict[str, float], tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, optimizer=optimizer, **options)
    plain = train(config, tmp_path / "plain")
    probed = train(replace(config, probe_every=1, probe_rows=3), tmp_path / "probed")
    assert_same_weights(plain, probed)
    assert_same_weights(plain, train(config))
    a, b = open_run(tmp_path / "plain"), open_run(tmp_path / "probed")
    assert a.tokens().equals(b.tokens())
    assert a.probes.empty
    assert b.probes["step"].unique().tolist() == [1, 2, 3]
    assert (b.steps["seconds_probe"] > 0).all()
    assert (a.steps["seconds_probe"] == 0).all()


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.slow) for s in range(1, 5))]
)
def test_small_sgd_step_adds_up_and_moves_every_class_as_the_taxonomy_says(
    seed: int, tmp_path: Path
) -> None:
    train(replace(SMALL_STEP, seed=seed), tmp_path / "run")
    probes = open_run(tmp_path / "run").probes
    assert closure_error(probes) < 1e-6
    whole = probes[probes["tokens_of"] == ALL_TOKENS].set_index("part")["counterfactual_dentropy"]
    assert abs(whole[INTERACTION]) < 0.2 * abs(whole[UPDATE])
    table = three_numbers(probes).set_index("tokens_of").loc[list(range(4))]
    rule = tax.rule_dentropy_sign(table.index.to_numpy())
    assert np.sign(table["counterfactual"]).tolist() == rule.tolist()
    assert np.sign(table["predicted"]).tolist() == rule.tolist()
    # Plain SGD has nothing but the gradient: all classes at once are the whole step.
    np.testing.assert_allclose(whole[GRADIENT], whole[UPDATE], rtol=1e-2)


def test_probes_of_adamw_are_complete(tmp_path: Path, tiny_config: TrainConfig) -> None:
    config = replace(tiny_config, steps=6, probe_every=2, probe_rows=4, weight_decay=0.1)
    train(config, tmp_path / "run")
    run = open_run(tmp_path / "run")
    probes = run.probes
    assert sorted(probes["step"].unique()) == [2, 4, 6]
    assert probes.groupby("step")["minibatch"].first().tolist() == [0, 1, 0], "it moves on"
    assert probes["closure_error"].max() < 1e-2
    assert closure_error(probes) < 1e-12
    counts = probes[probes["part"] == UPDATE].pivot(
        index="step", columns="tokens_of", values="tokens"
    )
    assert (counts[ALL_TOKENS] <= 4 * 16).all()
    assert (counts[OTHER_TOKENS] > 0).all()
    steps = probes.groupby("part")["step_norm"].mean()
    assert steps[[6, 7]].gt(0).all(), "momentum and weight decay have parts of their own"
    gram = probes[probes["part"] == GRADIENT].iloc[0]
    dots = gram[[f"dot_{name}" for name in tax.CLASSES]].to_numpy(float)
    np.testing.assert_allclose(dots.sum(), gram["grad_norm"] ** 2, rtol=1e-4)
    assert np.isfinite(what_if(run, ["neg_peak"]).path["estimated"]).all()
    assert len(attribute_step(run, 4, 3).three_numbers) >= 4


def test_gradient_norm_of_all_classes_is_that_of_the_training(tmp_path: Path) -> None:
    train(SMALL_STEP, tmp_path / "run")
    run = open_run(tmp_path / "run")
    joint = run.probes[run.probes["part"] == GRADIENT]["grad_norm"].iloc[0]
    assert joint == pytest.approx(run.steps["grad_norm"].iloc[0], rel=1e-4)


def test_a_failing_probe_lets_training_go_on(
    tiny_config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from wapo_analysis.probes import measure as probe

    def full(*_: object) -> None:
        raise MemoryError("no room for copies")

    monkeypatch.setattr(probe, "split_step", full)
    with caplog.at_level(logging.WARNING):
        probed = train(replace(tiny_config, probe_every=1), tmp_path / "run")
    assert_same_weights(probed, train(tiny_config))
    assert len([r for r in caplog.records if "probing stopped" in r.message]) == 1
    run = open_run(tmp_path / "run")
    assert run.manifest["status"] == "finished"
    assert run.probes.empty


def test_an_update_without_gradient_is_not_probed(tiny_config: TrainConfig, tmp_path: Path) -> None:
    config = replace(
        tiny_config, include_bins=("pos_valley",), probe_every=1, steps=2, temperature=0.3
    )
    train(config, tmp_path / "run")
    run = open_run(tmp_path / "run")
    assert run.manifest["status"] == "finished"
    assert run.probes["counterfactual_dentropy"].notna().all()


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("sgd", marks=pytest.mark.slow)])
def test_resume_keeps_the_probes_before_the_cut(
    optimizer: str, tiny_config: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_config, optimizer=optimizer, probe_every=1, steps=2)
    train(config, tmp_path / optimizer)
    continued = train(replace(config, steps=3), tmp_path / optimizer, resume=True)
    assert_same_weights(train(replace(config, steps=3)), continued)
    assert open_run(tmp_path / optimizer).probes["step"].unique().tolist() == [1, 2, 3]


@pytest.mark.parametrize("decay", [0.0, 0.3])
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_split_step_is_the_step_the_optimizer_took(
    kind: type[torch.optim.Optimizer], decay: float
) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(5, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)]
    parameters = [torch.nn.Parameter(w) for w in weights] + [torch.nn.Parameter(torch.ones(2))]
    optimizer = kind(parameters, lr=0.1, weight_decay=decay)
    for _ in range(4):
        logp = torch.cat([(p**3).flatten() for p in parameters[:2]])
        coef, cls = torch.randn(19).double(), torch.arange(19) % 4
        optimizer.zero_grad()
        gradients = class_gradients(logp, coef, cls, parameters, 4)
        for number, parameter in enumerate(parameters[:2]):
            parameter.grad = 0.5 * sum(g[number] for g in gradients)
        before = Before.of(parameters, optimizer)
        optimizer.step()
        parts = split_step(parameters, optimizer, before, gradients, clip=0.5)
        after = [p.detach().clone() for p in parameters]
        assert left_over(with_sums(parts, before, after)) < 1e-12
    assert all(float(part[2].abs().max()) == 0 for part in parts.values()), "no gradient, no part"


def test_class_gradients_add_up_to_the_gradient_of_any_loss() -> None:
    torch.manual_seed(1)
    weight = torch.nn.Parameter(torch.randn(6, 3, dtype=torch.float64))
    logp = torch.log_softmax(torch.randn(12, 6).double() @ weight, -1)[:, 0]
    loss = (torch.exp(logp) * torch.randn(12)).sum() + (logp**2).mean()
    (slope,) = torch.autograd.grad(loss, logp, retain_graph=True)
    (whole,) = torch.autograd.grad(loss, weight, retain_graph=True)
    cls = torch.arange(12) % 3  # no token of class 3
    parts = class_gradients(logp, -slope, cls, [weight], 4)
    torch.testing.assert_close(sum(part[0] for part in parts), whole)
    assert float(parts[3][0].abs().max()) == 0
    assert all(float(part[0].abs().max()) > 0 for part in parts[:3])


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.AdamW(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.RMSprop(p, lr=0.1),
    ],
)
def test_other_optimizers_are_refused(optimizer) -> None:
    with pytest.raises(UserError, match="allowed: AdamW without amsgrad or maximize, SGD"):
        check_splits(optimizer([torch.nn.Parameter(torch.ones(2))]))


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"optimizer": "adam"}, "optimizer must be adamw or sgd, got 'adam'"),
        ({"probe_every": -1}, "probe_every must be at least 0"),
        ({"probe_rows": 0}, "probe_rows must be at least 1"),
        ({"probe_every": 5, "precision": "bf16-mixed"}, "probe_every needs precision float32"),
    ],
)
def test_bad_settings_are_refused(setting: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told):
        TrainConfig.from_dict(setting)


@pytest.mark.slow
def test_from_training_to_what_if_on_the_command_line(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "run")
    tiny = "--steps 4 --prompts 4 --rollouts 4 --minibatches 2 --threads 1".split()
    assert wapo(["train", "--out", out, "--probe-every", "1", "--probe-rows", "2", *tiny]) == 0
    capfd.readouterr()
    assert wapo(["whatif", out, "--exclude-bins", "neg_peak"]) == 0
    assert "Cannot say what leaving neg_peak out would do" in capfd.readouterr().out
    figures = ["figures", out, "--only", "calibration,waterfall", "--out", str(tmp_path / "f")]
    assert wapo(figures) == 0
    assert {f.name for f in (tmp_path / "f").iterdir()} == {"calibration.png", "waterfall.png"}
