"""Where probability goes: sums to zero, equals the softmax's derivative, says it in words."""

from pathlib import Path

import numpy as np
import pytest
import torch

from wapo_analysis import Recorder
from wapo_analysis.plots import get_figure, render
from wapo_analysis.plots.probes import GOERS, prepare_mass_flow
from wapo_analysis.store import Run, open_run

B, T, V, ETA = 4, 6, 12, 2e-3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One step of plain gradient descent on the logits themselves: what the formula speaks of."""
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(B, T, V, generator=g, dtype=torch.float64).mul(2).requires_grad_()
    ids = torch.randint(V, (B, T), generator=g)
    advantages = torch.tensor([1.0, -1.0, 0.7, -0.4])
    folder = tmp_path_factory.mktemp("flow") / "run"
    with Recorder(folder, store_bits=23, synchronous=True) as recorder:
        logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
        recorder.watch(logp, ids, torch.ones(B, T), advantages, None, logits=logits)
        (-(logp * advantages[:, None]).sum()).backward()
        assert logits.grad is not None
        after = (logits - ETA * logits.grad).detach().log_softmax(-1)
        (tokens,) = recorder._step.passes
        assert tokens.top is not None
        tokens.logp_after = after.gather(-1, ids[..., None])[..., 0].flatten()
        tokens.entropy_after = -(after.exp() * after).sum(-1).flatten()
        tokens.top.read(after.__getitem__)
        recorder.finish_step(1, reward=[1.0, 0.0, 1.0, 0.0])
    return open_run(folder)


def test_prediction_is_what_happens_to_free_logits(run: Run) -> None:
    frame = prepare_mass_flow([run])
    assert set(frame.goer) == set(GOERS)
    np.testing.assert_allclose(frame.predicted, frame.measured, rtol=1e-2, atol=3e-7)
    sums = frame.groupby("cls")[["predicted", "measured"]].sum()
    assert np.abs(sums.to_numpy()).max() < 1e-9
    assert frame.groupby("cls").tokens.first().sum() == B * T


def test_the_title_names_class_and_goer(run: Run) -> None:
    spec = get_figure("mass_flow")
    assert spec.says is not None
    frame = prepare_mass_flow([run])
    said = spec.says(frame)
    first = frame[frame.goer == "sampled"]
    told = first.loc[(first.measured.abs() * first.tokens).idxmax(), "cls"]
    assert f"a {told} token" in said, "many tokens count for more than a few that move far"
    assert "mean of " in said
    assert "of probability, the " in said
    assert any(goer in said for goer in GOERS[1:])
    assert len(render("mass_flow", [run]).axes) == 4


def test_panels_and_title_count_the_tokens_of_all_runs(run: Run) -> None:
    frame = prepare_mass_flow([run, run])
    figure = render("mass_flow", [run, run])
    tokens = frame[frame.goer == "sampled"].groupby("cls").tokens.sum()
    assert tokens.sum() == 2 * B * T
    shown = [text.get_text() for ax in figure.axes for text in ax.texts]
    shown = [text for text in shown if text != "no token"]
    assert sorted(shown) == sorted(f"{count} tokens" for count in tokens)
    spec = get_figure("mass_flow")
    assert spec.says is not None
    assert any(f"(mean of {count})" in spec.says(frame) for count in tokens)


def test_without_rescoring_it_says_why(tmp_path: Path) -> None:
    with Recorder(tmp_path / "r") as recorder:
        recorder.finish_step(1, reward=0.5)
    why = open_run(tmp_path / "r").lacks(get_figure("mass_flow").needs[0])
    assert "no most probable tokens" in str(why)
