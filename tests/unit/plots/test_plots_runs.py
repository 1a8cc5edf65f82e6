"""Figures of runs: what they draw is what was prepared, and prepared is what was recorded."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
import wapo_taxonomy as tax
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from tests.support.builders import write_fake_run
from wapo_analysis.plots import classes, entropy, policy, shift, tokens, training
from wapo_analysis.plots.style import CLASS_COLORS, SIGN_COLORS, label_styles, theme
from wapo_analysis.schema import PAPER_EDGES, PROB_EDGES
from wapo_analysis.series import Series
from wapo_analysis.store import Run, open_run


@pytest.fixture(autouse=True)
def _theme() -> object:
    with mpl.rc_context(theme()):
        yield


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two seeds of GRPO, one of WAPO; every fourth step re-scored."""
    folder = tmp_path_factory.mktemp("pair")
    made = [("grpo", 0), ("grpo", 1), ("wapo", 0)]
    return [
        open_run(write_fake_run(folder / f"{o}{s}", objective=o, seed=s, steps=16, rescore_every=4))
        for o, s in made
    ]


def line(ax: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    found = [item for item in ax.lines if str(item.get_label()).startswith(label)]
    assert len(found) == 1, [item.get_label() for item in ax.lines]
    return np.asarray(found[0].get_xdata(), float), np.asarray(found[0].get_ydata(), float)


def texts(ax: Axes) -> str:
    return "\n".join(item.get_text() for item in ax.texts)


def fills(ax: Axes) -> list[str]:
    return [to_hex(color) for item in ax.collections for color in item.get_facecolor()]


# ---- training ---------------------------------------------------------------------------------


def test_reward_line_is_the_mean_over_seeds_with_a_band(pair: list[Run]) -> None:
    frame = training.prepare_reward(pair)
    axes = training.plot_reward(frame)
    assert axes.shape == (1,), "reward and pass rate are one number here"
    steps, drawn = line(axes[0], "GRPO (mean of 2 runs)")
    expected = frame[frame["label"] == "GRPO"].groupby("step")["reward"].mean()
    np.testing.assert_allclose(drawn, expected)
    np.testing.assert_array_equal(steps, expected.index)
    assert len(axes[0].collections) == 1, "WAPO has one run and so no band"
    assert axes[0].get_ylabel() == "mean reward of the batch"
    assert axes[0].get_xlabel() == "rollout step"


def test_pass_rate_gets_its_panel_when_it_differs(pair: list[Run]) -> None:
    frame = training.prepare_reward(pair)
    frame["pass_rate"] = frame["pass_rate"] / 2
    axes = training.plot_reward(frame)
    assert [ax.get_ylabel() for ax in axes] == [
        "mean reward of the batch", "mean pass rate of the batch",
    ]  # fmt: skip


def test_gradient_norm_marks_steps_that_were_not_finite(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "a", steps=12, drift="diverged"))
    frame = training.prepare_gradient_norm([run])
    ax = training.plot_gradient_norm(frame)[0]
    crosses, _ = line(ax, "not a finite number")
    assert crosses.tolist() == frame.loc[frame["grad_norm"].isna(), "step"].tolist()
    assert len(crosses) > 3
    assert ax.get_yscale() == "log"


def test_gradient_norm_of_zero_stands_on_the_edge(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "a", steps=4, drift="stalled"))
    ax = training.plot_gradient_norm(training.prepare_gradient_norm([run]))[0]
    _, drawn = line(ax, "GRPO: no value above 0")
    assert drawn.size == 0
    steps, height = line(ax, "exactly 0")
    assert steps.tolist() == [1, 2, 3, 4]
    assert height.tolist() == [0] * 4


def test_health_panels_have_units_and_start_at_zero(pair: list[Run]) -> None:
    frame = training.prepare_lengths(pair)
    axes = training.plot_lengths(frame)
    assert axes.shape == (2, 3)
    assert axes[0, 0].get_ylabel() == "tokens"
    assert {ax.get_ylabel() for ax in axes.flat[1:]} == {"share"}
    assert all(ax.get_ylim()[0] == 0 for ax in axes.flat)
    steps = pair[0].steps
    np.testing.assert_allclose(
        frame.loc[frame["run"] == 0, "zero_signal"],
        steps["groups_all_wrong"] + steps["groups_all_right"],
    )


# ---- entropy ----------------------------------------------------------------------------------


def test_entropy_shows_half_and_twice_its_own_baseline(pair: list[Run]) -> None:
    frame = entropy.prepare_entropy(pair)
    ax = entropy.plot_entropy(frame)[0]
    start = frame[frame["label"] == "WAPO"]["start"].iloc[0]
    steps = pair[2].steps
    series = Series(steps["step"].to_numpy(), steps["entropy"].to_numpy())
    assert start == pytest.approx(series.level), "the figure and the diagnosis judge by one level"
    color = label_styles(["GRPO", "WAPO"])["WAPO"].color
    dotted = [i for i in ax.lines if i.get_linestyle() == ":" and i.get_color() == color]
    assert sorted(float(i.get_ydata()[0]) for i in dotted) == pytest.approx([start / 2, start * 2])
    assert ax.get_ylabel() == "mean entropy (nats)"
    assert ax.get_yscale() == "linear"


@pytest.mark.parametrize("drift", ["explosion", "collapse"])
def test_entropy_axis_turns_logarithmic_for_large_moves(tmp_path: Path, drift: str) -> None:
    run = open_run(write_fake_run(tmp_path / "a", drift=drift))
    frame = entropy.prepare_entropy([run])
    span = frame["entropy"].max() / frame["entropy"].min()
    scale = entropy.plot_entropy(frame)[0].get_yscale()
    assert (scale == "log") == (span > 8)
    assert drift == "explosion" or scale == "log"


def test_entropy_by_sign_has_one_panel_per_label(pair: list[Run]) -> None:
    frame = entropy.prepare_entropy_by_sign(pair)
    axes = entropy.plot_entropy_by_sign(frame)
    assert axes.shape == (1, 2)
    assert [ax.get_title("left") for ax in axes[0]] == ["GRPO", "WAPO"]
    assert [item.get_color() for item in axes[0, 1].lines] == [SIGN_COLORS[1], SIGN_COLORS[-1]]
    wapo = frame[frame["label"] == "WAPO"].sort_values("step")
    np.testing.assert_allclose(axes[0, 1].lines[0].get_ydata(), wapo["entropy_pos"])


def test_entropy_flow_nets_what_the_classes_add_up_to(pair: list[Run]) -> None:
    frame = entropy.prepare_entropy_flow(pair)
    axes = entropy.plot_entropy_flow(frame)
    assert axes.shape == (2, 2)
    drawn = next(item for item in axes[0, 1].lines if item.get_color() == "#222222")
    sums = pair[2].classes.groupby("step")[["pred_dentropy_sum", "tokens"]].sum()
    scale = frame[frame["run"] == 2].groupby("step")["scale"].first()
    expected = sums["pred_dentropy_sum"] / sums["tokens"] * scale
    steps = np.asarray(drawn.get_xdata(), dtype=int)
    np.testing.assert_allclose(np.asarray(drawn.get_ydata(), float), expected[steps], atol=1e-15)
    assert len(steps) == 16
    assert axes[0, 0].get_ylabel() == "predicted dH\n(nats per token)"
    scored = frame[(frame["run"] == 0) & frame["measured"].notna()]
    assert sorted(scored["step"].unique()) == [4, 8, 12, 16]
    cells = pair[0].classes
    cell = cells[(cells["step"] == 8) & (cells["cls"] == "neg_peak")]
    got = scored[(scored["step"] == 8) & (scored["cls"] == 2)]["measured"].item()
    everyone = cells.loc[cells["step"] == 8, "rescored"].sum()
    assert got == pytest.approx(cell["dentropy_sum"].sum() / everyone)
    mean = pair[0].tokens([8])["dentropy"].mean()
    assert scored[scored["step"] == 8]["measured"].sum() == pytest.approx(mean, abs=1e-6)


def test_entropy_flow_of_wapo_has_no_negative_classes(pair: list[Run]) -> None:
    axes = entropy.plot_entropy_flow(entropy.prepare_entropy_flow(pair))
    assert set(fills(axes[0, 0])) == {CLASS_COLORS[name].lower() for name in tax.CLASSES}
    assert set(fills(axes[0, 1])) == {
        CLASS_COLORS[name].lower() for name in ("pos_peak", "pos_valley")
    }


def test_entropy_flow_without_a_second_scoring_has_one_row(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "a", steps=4, rescore_every=0))
    assert entropy.plot_entropy_flow(entropy.prepare_entropy_flow([run])).shape == (1, 1)


# ---- classes ----------------------------------------------------------------------------------


def test_class_shares_add_up_to_one(pair: list[Run]) -> None:
    frame = classes.prepare_class_share(pair)
    np.testing.assert_allclose(frame.groupby(["run", "step"])["share"].sum(), 1.0)
    cells = pair[0].classes
    first = cells[cells["step"] == 1]
    expected = first.loc[first["cls"] == "pos_peak", "tokens"].sum() / first["tokens"].sum()
    got = frame[(frame["run"] == 0) & (frame["step"] == 1) & (frame["cls"] == 0)]["share"].item()
    assert got == pytest.approx(expected)
    axes = classes.plot_class_share(frame)
    assert axes[0, 0].get_ylim() == (0, 1)
    assert set(fills(axes[0, 0])) <= {color.lower() for color in CLASS_COLORS.values()}


def test_gradient_mass_of_punished_tokens_is_nothing_under_wapo(pair: list[Run]) -> None:
    frame = classes.prepare_gradient_mass(pair)
    punished = frame[(frame["label"] == "WAPO") & frame["cls"].isin([2, 3])]
    assert (punished["grad_mass"] == 0).all()
    axes = classes.plot_gradient_mass(frame)
    assert axes.shape == (2, 2)
    colors = [item.get_color() for item in axes[1, 1].lines if item.get_marker() != "v"]
    assert colors == [CLASS_COLORS["pos_peak"], CLASS_COLORS["pos_valley"]]
    assert axes[1, 0].get_yscale() == "log"
    total = pair[2].classes.groupby("step")["grad_mass"].sum()
    mine = frame[frame["run"] == 2].groupby("step")["grad_mass"].sum()
    pd.testing.assert_series_equal(mine, total, check_names=False, check_index_type=False)


def test_the_title_counts_the_tokens_of_steps_without_a_gradient(pair: list[Run]) -> None:
    frame = classes.prepare_gradient_mass(pair[:1])
    idle = frame["step"] > 8
    frame = frame.assign(
        grad_mass=frame["grad_mass"].mask(idle, 0.0), share=frame["share"].mask(idle)
    )
    said = classes._says_gradient_mass(frame)
    name = said.split()[1]
    cells = pair[0].classes.groupby("cls", observed=True)["tokens"].sum()
    assert f"{cells[name] / cells.sum():.1%} of the tokens" in said
    assert not classes._says_gradient_mass(frame.assign(grad_mass=0.0, share=np.nan))


def test_unknown_classes_are_not_taken_for_empty_ones(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "a", steps=3, missing=("collision_rest",)))
    frame = classes.prepare_gradient_mass([run])
    assert frame["grad_mass"].isna().all()
    axes = classes.plot_gradient_mass(frame)
    assert all("no\ncollision statistics" in texts(ax) for ax in axes.flat)
    shares = classes.prepare_class_share([run])
    seen = shares[shares["share"] > 0]["cls"].unique()
    assert set(seen) <= {-1, 4}


def test_rule_breaks_agree_with_the_exact_class_totals(pair: list[Run]) -> None:
    frame = tokens.prepare_rule_breaks(pair)
    for place, run in enumerate(pair):
        cells = run.classes
        steps = run.tokens()
        moved = steps[steps["pred_dentropy"] != 0].groupby("step").size()
        expected = cells.groupby("step")["rule_breaks"].sum().reindex(moved.index) / moved
        mine = frame[frame["run"] == place].set_index("step")["tokens"]
        np.testing.assert_allclose(mine, expected[mine.index])
    assert (frame["weight"] <= frame["tokens"] + 0.05).all(), "breaks are the small effects"
    axes = tokens.plot_rule_breaks(frame)
    assert axes[0].get_ylabel() == "exact dH against the rule"


# ---- shift ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prepare", "predicted", "measured"),
    [
        (shift.prepare_prob_shift, "pred_dprob", "dprob"),
        (shift.prepare_entropy_shift, "pred_dentropy", "dentropy"),
    ],
)
def test_shift_states_the_honest_numbers(
    pair: list[Run], prepare: object, predicted: str, measured: str
) -> None:
    frame = prepare(pair[:1])  # type: ignore[operator]
    tokens = pair[0].tokens([4, 8, 12, 16])
    tokens = tokens[tokens["cls"].isin(tax.CLASSES)]
    slope = (tokens[predicted] * tokens[measured]).sum() / (tokens[predicted] ** 2).sum()
    np.testing.assert_allclose(frame["factor"], slope)
    for code, rows in frame.groupby("cls"):
        mine = tokens[tokens["cls"] == tax.CLASS_NAMES[code]]
        mine = mine.drop(columns="cls").astype(np.float64)
        np.testing.assert_allclose(rows["measured"], mine[measured].mean())
        np.testing.assert_allclose(rows["predicted"], mine[predicted].mean() * slope)
        moved = mine[mine[predicted] != 0]
        rank = moved[predicted].rank().corr(moved[measured].rank())
        same = (np.sign(moved[predicted]) == np.sign(moved[measured])).mean()
        np.testing.assert_allclose(rows["rank_correlation"], rank)
        np.testing.assert_allclose(rows["sign_agreement"], same)
        assert rows["tokens"].item() == len(mine)


def test_shift_panels_show_outline_bar_and_share(pair: list[Run]) -> None:
    frame = shift.prepare_prob_shift(pair)
    axes = shift.plot_prob_shift(frame)
    assert axes.shape == (2,)
    part = frame[(frame["label"] == "GRPO") & (frame["tokens"] >= 8)]
    heights = [bar.get_height() for bar in axes[0].patches]
    np.testing.assert_allclose(heights[::2], part["predicted"])
    np.testing.assert_allclose(heights[1::2], part["measured"])
    right = frame[(frame["label"] == "GRPO") & (frame["cls"] == 2)]["sign_agreement"].item()
    shown = [tick.get_text() for tick in axes[0].get_xticklabels()]
    assert shown[2] == f"neg_peak\n{right:.0%} right"
    assert axes[1].get_xticklabels()[2].get_text() == "neg_peak\n-", "WAPO leaves it alone"
    assert "(probability)" in axes[0].get_ylabel()
    assert f"{part['factor'].iloc[0]:.3g}" in axes[0].get_xlabel()


def test_deciles_of_p_hold_the_measured_quartiles(pair: list[Run]) -> None:
    frame = shift.prepare_decile_shift(pair[:1])
    tokens = pair[0].tokens([4, 8, 12, 16]).astype({"dprob": float})
    for _, row in frame.iterrows():
        low, high = [(-np.inf, -1), (-1, 0), (0, 1), (1, np.inf)][int(row["advantage"])]
        a = tokens["advantage"].astype(float)
        inside = (a > low) & (a <= high) & (a != 0)
        tenth = np.clip((tokens["prob"] * 10).astype(int), 0, 9) == row["decile"]
        mine = tokens[inside & tenth]["dprob"]
        assert len(mine) == row["tokens"] >= 8
        assert row["median"] == pytest.approx(mine.median())
        assert row["low"] == pytest.approx(mine.quantile(0.25))
    assert shift.plot_decile_shift(frame).shape == (1, 4)


def test_a_perfect_prediction_has_its_slope() -> None:
    rng = np.random.default_rng(0)
    predicted = pd.Series(rng.normal(size=200))
    assert shift._factor(predicted, 3.0 * predicted) == pytest.approx(3.0)


# ---- policy -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"name": "grpo", "clip_eps": 0.2}, (0.8, 1.2)),
        ({"name": "wapo", "clip_eps": None, "bounds": [0.0, 10.0]}, (np.nan, 10.0)),
        ({"name": "raft", "bounds": [0.0, float("inf")]}, (np.nan, np.nan)),
        ({"name": "gspo", "bounds": [0.96, 1.04]}, (np.nan, np.nan)),
        ({"name": "wapo", "bounds": [0.0, 10.0], "use_importance_sampling": False},
         (np.nan, np.nan)),
        ({"name": "dapo", "bounds": [0.8, 1.28]}, (0.8, 1.28)),
        ({"name": "grpo"}, (np.nan, np.nan)),
        ({}, (np.nan, np.nan)),
    ],
)  # fmt: skip
def test_clip_range(objective: dict[str, object], expected: tuple[float, float]) -> None:
    np.testing.assert_allclose(policy.clip_range(objective), expected)


def test_behaviour_counts_tokens_beyond_the_clip(pair: list[Run]) -> None:
    frame = policy.prepare_train_vs_behaviour(pair)
    axes = policy.plot_train_vs_behaviour(frame)
    assert axes.shape == (2, 2)
    part = frame[(frame["label"] == "GRPO") & (frame["sign"] == 1)]
    ratio = part["train"] / part["behaviour"]
    assert f"{(ratio > 1.2).mean():.1%} above 1.2" in texts(axes[0, 0])
    assert f"{(ratio < 0.8).mean():.1%} below 0.8" in texts(axes[0, 0])
    assert axes[0, 0].collections[0].get_array().sum() == len(part)
    assert axes[0, 0].get_title("left") == "GRPO, A > 0"
    assert axes[1, 1].get_title("left") == "WAPO, A < 0"


def test_paper_bins_hold_the_whole_gradient(pair: list[Run]) -> None:
    frame = classes.prepare_bin_mass(pair)
    np.testing.assert_allclose(frame.groupby("run")["exact"].sum(), 1.0)
    assert (frame["proxy"] <= frame["exact"] + 1e-12).all(), "(1 - p) is a lower bound"
    assert frame["prob_bin"].max() <= len(PAPER_EDGES) - 2
    assert set(PAPER_EDGES) <= set(PROB_EDGES)
    cells = pair[0].classes
    signed = cells[(cells["sign"] == 1) & (cells["prob_bin"] >= 4)]
    expected = signed["grad_mass"].sum() / cells["grad_mass"].sum()
    top = frame[(frame["run"] == 0) & (frame["sign"] == 1) & (frame["prob_bin"] == 4)]
    assert top["exact"].item() == pytest.approx(expected)


def test_bin_names_cover_the_scale() -> None:
    assert classes.bin_names(PAPER_EDGES) == ["0-.01", ".01-.1", ".1-.25", ".25-.5", ".5-1"]


def test_bin_bars_are_the_prepared_numbers(pair: list[Run]) -> None:
    frame = classes.prepare_token_strength(pair)
    axes = classes.plot_token_strength(frame)
    assert axes.shape == (2,)
    part = frame[(frame["label"] == "WAPO") & (frame["sign"] == 1)]
    heights = sorted(bar.get_height() for bar in axes[1].patches if bar.get_height() > 0)
    np.testing.assert_allclose(heights, sorted(part["strength"]))
    colors = {to_hex(bar.get_facecolor()) for bar in axes[0].patches}
    assert colors == {SIGN_COLORS[1].lower(), SIGN_COLORS[-1].lower()}
    assert len(axes[0].get_xticklabels()) == len(PAPER_EDGES) - 1
    mass = classes.prepare_bin_mass(pair)
    drawn = [bar.get_height() for bar in classes.plot_bin_mass(mass)[1].patches]
    expected = mass[(mass["label"] == "WAPO") & (mass["exact"] > 0)]["exact"]
    np.testing.assert_allclose(sorted(drawn), sorted(expected))


def test_token_strength_is_the_mean_coefficient(pair: list[Run]) -> None:
    frame = classes.prepare_token_strength(pair[:1])
    tokens = pair[0].tokens()
    mine = tokens[(tokens["sign"] == -1) & (tokens["prob"] >= 0.5)]
    rows = frame[(frame["sign"] == -1) & (frame["prob_bin"] == 4)]
    assert rows["strength"].item() == pytest.approx(mine["coef"].mean(), rel=1e-4)
