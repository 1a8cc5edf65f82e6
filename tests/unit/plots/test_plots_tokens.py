"""Figures of single tokens and of steps against papers: each number equals its naive program."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import wapo_taxonomy as tax

from tests.support.builders import write_fake_run
from wapo_analysis.plots import (
    draw_marks,
    joined,
    policy,
    prepare_marks,
    step_label,
    tokens,
    training,
)
from wapo_analysis.plots.panels import step_axis
from wapo_analysis.plots.style import new_figure
from wapo_analysis.store import Run, open_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return open_run(write_fake_run(tmp_path_factory.mktemp("tokens") / "a", steps=8, prompts=8))


@pytest.fixture(scope="module")
def rows(run: Run) -> pd.DataFrame:
    return run.tokens().astype({"advantage": float, "logp": float, "entropy": float})


def test_covariance_is_the_mean_product_of_the_deviations(run: Run, rows: pd.DataFrame) -> None:
    frame = tokens.prepare_covariance([run]).set_index("step")
    for step, part in rows.groupby("step"):
        a, logp = part["advantage"].to_numpy(), part["logp"].to_numpy()
        product = (a - a.mean()) * (logp - logp.mean())
        assert frame["covariance"][step] == pytest.approx(np.cov(a, logp, bias=True)[0, 1])
        size = sorted(np.abs(product), reverse=True)
        top = sum(size[: max(1, len(size) // 50)]) / sum(size)
        assert frame["top"][step] == pytest.approx(top)


def test_the_most_uncertain_fifth_and_what_it_holds(run: Run, rows: pd.DataFrame) -> None:
    frame = tokens.prepare_entropy_percentiles([run])
    line = np.quantile(rows["entropy"], 0.8)
    above = rows["entropy"] > line
    first = frame.iloc[0]
    assert first["threshold"] == pytest.approx(line)
    held = rows["entropy"][above].sum() / rows["entropy"].sum()
    assert first["held_entropy"] == pytest.approx(held)
    grad = rows["grad_norm"][above].sum() / rows["grad_norm"].sum()
    assert first["held_gradient"] == pytest.approx(grad)
    assert frame["share"].sum() == pytest.approx(1)
    ax = tokens.plot_entropy_percentiles(frame)[0]
    (dashed,) = ax.lines
    assert dashed.get_xdata()[0] == pytest.approx(line)


def test_top_tokens_are_the_largest_of_their_class(run: Run, rows: pd.DataFrame) -> None:
    frame = tokens.prepare_top_tokens([run])
    for code, part in frame.groupby("cls"):
        mass = rows[rows["cls"] == tax.CLASS_NAMES[code]].groupby("token_id")["grad_norm"].sum()
        expected = (mass / mass.sum()).sort_values(ascending=False).head(6)
        np.testing.assert_allclose(part["share"], expected)
        assert part["text"].tolist() == [f"'{run.vocab[i]}'" for i in expected.index]
    assert (
        tokens.plot_top_tokens(frame)[0, 2].get_yticklabels()[0].get_text()
        == (frame[frame["cls"] == 2]["text"].iloc[0])
    )


def test_position_profile_adds_up(run: Run, rows: pd.DataFrame) -> None:
    frame = tokens.prepare_position_profile([run])
    assert frame["share"].sum() == pytest.approx(1)
    assert frame["tokens"].sum() == pytest.approx(1)
    mine = rows[(rows["position"] == 2) & (rows["cls"] == "pos_peak")]["grad_norm"].sum()
    got = frame[(frame["place"] == 2) & (frame["cls"] == 0)]["share"].item()
    assert got == pytest.approx(mine / rows["grad_norm"].sum())
    axes = tokens.plot_position_profile(frame)
    stacked = [part.get_data() for part in axes[0].patches if part.get_fill()]
    drawn = sum(float((top - base).sum()) for top, _, base in stacked)
    assert drawn == pytest.approx(1)


def test_ratio_histogram_counts_every_token_with_a_sign(run: Run, rows: pd.DataFrame) -> None:
    frame = policy.prepare_ratio_histogram([run])
    signed = rows[rows["sign"] != 0]
    assert frame["share"].sum() == pytest.approx(1)
    below = ((signed["ratio"] < 0.8) & (signed["sign"] < 0)).mean()
    above = ((signed["ratio"] > 1.2) & (signed["sign"] > 0)).mean()
    assert frame[frame["sign"] == -1]["below"].iloc[0] == pytest.approx(below)
    assert frame[frame["sign"] == 1]["above"].iloc[0] == pytest.approx(above)
    axes = policy.plot_ratio_histogram(frame)
    bounds = [line.get_xdata()[0] for line in axes[0].lines]
    assert bounds == pytest.approx([0.8, 1.2])


def test_up_clipped_is_the_mean_p_beyond_the_upper_bound(run: Run, rows: pd.DataFrame) -> None:
    frame = policy.prepare_up_clipped([run]).set_index("step")
    good = rows[rows["sign"] > 0]
    for step, part in good.groupby("step"):
        over = part[part["ratio"] > 1.2]
        assert frame["share"][step] == pytest.approx(len(over) / len(part))
        assert frame["everyone"][step] == pytest.approx(part["prob"].mean())
        if len(over):
            assert frame["up_clipped"][step] == pytest.approx(over["prob"].mean())
        else:
            assert np.isnan(frame["up_clipped"][step])


def test_the_law_of_reward_and_entropy_is_found_where_it_holds() -> None:
    entropy = np.linspace(0.1, 1.2, 30)
    table = pd.DataFrame({"entropy": entropy, "reward": 0.9 - 0.2 * np.exp(entropy)})
    assert training.fit_law(table) == pytest.approx({"a": 0.2, "b": 0.9, "r2": 1.0})
    flat = training.fit_law(table.assign(reward=0.5))
    assert all(np.isnan(value) for value in flat.values())


def test_marks_name_baseline_onset_and_updates(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "a", steps=30, drift="explosion"))
    marks = prepare_marks([run])
    onset = marks["onset"].item()
    assert 10 <= onset <= 18
    assert marks["first"].item() == 1
    assert 1 <= marks["baseline"].item() <= 5
    assert step_label(marks) == "rollout step (2 updates)"
    ax = new_figure(3).subplots()
    step_axis(np.array([ax]), [1, 30])
    ax.set_xlim(1, 30)
    draw_marks([ax], marks)
    assert ax.get_xlabel() == "rollout step (2 updates)"
    assert [text.get_text() for text in ax.texts] == ["baseline", f"onset {onset:g}"]
    assert onset in [line.get_xdata()[0] for line in ax.lines]
    assert ax.get_xlim() == (1, 30)


def test_titles_name_three_labels_and_count_the_rest() -> None:
    assert joined(["a", "b"]) == "a; b"
    assert joined("abcde") == "a; b; c; and 2 more"
