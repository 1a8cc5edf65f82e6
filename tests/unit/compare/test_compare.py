"""Means over seeds, Student intervals, pairing by seed, and what the table may say."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import wapo_taxonomy as tax
from scipy import stats

from tests.support.builders import write_fake_run
from wapo_analysis.compare import METRICS, Comparison, Interval, Metric, compare
from wapo_analysis.errors import UserError
from wapo_analysis.results import marked
from wapo_analysis.store import RunWriter, open_run

REWARD_LAST = next(metric for metric in METRICS if metric.name == "reward_last")


def write_run(
    path: Path, label: str, seed: int | None, rewards: Sequence[float], **manifest: object
) -> Path:
    """Run whose reward is given step by step; entropy constant, no class totals."""
    writer = RunWriter(
        path, {"name": path.name, "label": label, "objective": {"name": "grpo"}, **manifest}
        | ({} if seed is None else {"seed": seed}),
    )  # fmt: skip
    for step, reward in enumerate(rewards, start=1):
        writer.append_step({"step": step, "reward": float(reward), "entropy": 0.5})
    writer.close("finished")
    return path


def seeds(
    folder: Path, label: str, ends: Sequence[float], first_seed: int = 0, **manifest: object
) -> list[Path]:
    """Runs of 30 steps that go from 0.2 to the given last rewards."""
    return [
        write_run(
            folder / f"{label}-{i}", label, first_seed + i, [0.2] * 20 + [end] * 10, **manifest
        )
        for i, end in enumerate(ends)
    ]


def table(paths: Sequence[Path]) -> Comparison:
    return compare([open_run(path) for path in paths])


def row(comparison: Comparison, title: str) -> list[str]:
    (found,) = [r for r in comparison.rows() if r[0] == title]
    return found


# ---- intervals ----------------------------------------------------------------------------------


def test_interval_is_students_t() -> None:
    values = np.array([0.1, 0.4, 0.5, 0.9])
    interval = Interval.of(values)
    low, high = stats.t.interval(0.95, 3, values.mean(), stats.sem(values))
    assert interval.n == 4
    assert interval.mean - interval.half == pytest.approx(low)
    assert interval.mean + interval.half == pytest.approx(high)
    assert interval.clear == (low > 0)


def test_interval_leaves_out_what_is_missing() -> None:
    assert Interval.of(np.array([1.0, np.nan, 3.0, np.inf])).n == 2
    one = Interval.of(np.array([2.0]))
    assert (one.n, one.mean, one.clear) == (1, 2.0, False)
    assert math.isnan(one.half)
    assert one.to_dict() == {"n": 1, "mean": 2.0, "low": None, "high": None}
    assert Interval.of(np.array([])).to_dict() == {"n": 0, "mean": None, "low": None, "high": None}


@pytest.mark.parametrize(
    ("percent", "signed", "interval", "text"),
    [
        (False, False, Interval(3, 0.50512, 0.139), "0.51 ± 0.14"),
        (False, True, Interval(3, 2.7313, 0.0023), "+2.7313 ± 0.0023"),
        (False, False, Interval(3, 31.7, 12.0), "32 ± 12"),
        (False, False, Interval(1, 0.33333, math.nan), "0.333"),
        (True, False, Interval(3, 0.181, 0.0672), "18.1 ± 6.7%"),
        (True, True, Interval(3, -0.041, 0.012), "-4.1 ± 1.2 pp"),
        (True, False, Interval(1, 0.1812, math.nan), "18.1%"),
        (False, False, Interval(0, math.nan, math.nan), "n/a"),
        (False, False, Interval(3, 0.0, 0.0), "0.00 ± 0.00"),
    ],
)
def test_numbers_are_shown_to_the_digits_their_interval_allows(
    percent: bool, signed: bool, interval: Interval, text: str
) -> None:
    metric = Metric("x", "x", lambda run: 0.0, percent=percent)
    assert metric.show(interval, signed) == text


# ---- settings -----------------------------------------------------------------------------------


def test_seeds_of_one_label_make_one_column(tmp_path: Path) -> None:
    comparison = table(
        [*seeds(tmp_path, "GRPO", [0.5, 0.6, 0.7]), *seeds(tmp_path, "WAPO", [0.8, 0.8, 0.9])]
    )
    assert comparison.labels == ("GRPO", "WAPO")
    header = comparison.rows()[0]
    assert header == ["", "GRPO (n=3)", "WAPO (n=3)", "WAPO minus GRPO"]
    assert row(comparison, "reward, first 10% of steps")[1:3] == ["0.20 ± 0.00", "0.20 ± 0.00"]
    found = comparison.interval("GRPO", REWARD_LAST)
    assert found.mean == pytest.approx(0.6)
    assert found.half == pytest.approx(stats.t.ppf(0.975, 2) * 0.1 / math.sqrt(3))
    assert row(comparison, "reward, last 10%")[1] == "0.60 ± 0.25"
    assert row(comparison, "entropy, last 10% (nats)")[2] == "0.50 ± 0.00"
    assert all(len(r) == 4 for r in comparison.rows())


def test_the_difference_is_paired_by_seed(tmp_path: Path) -> None:
    """Seeds differ a lot, the objectives by the same small step in each: pairing sees it."""
    grpo = seeds(tmp_path, "GRPO", [0.3, 0.6, 0.9])
    wapo = seeds(tmp_path, "WAPO", [0.36, 0.65, 0.96])[::-1]
    comparison = table([*grpo, *wapo])
    gap = comparison.difference(REWARD_LAST)
    expected = Interval.of(np.array([0.06, 0.05, 0.06]))
    assert (gap.n, gap.mean, gap.half) == pytest.approx((3, expected.mean, expected.half))
    assert gap.clear
    assert row(comparison, "reward, last 10%")[3].endswith("*")
    assert any("over 3 shared seeds" in s and "clear of zero" in s for s in comparison.sentences())


def test_only_shared_seeds_are_paired(tmp_path: Path) -> None:
    grpo = seeds(tmp_path, "GRPO", [0.3, 0.6, 0.9])
    wapo = seeds(tmp_path, "WAPO", [0.8, 0.95], first_seed=1)
    gap = table([*grpo, *wapo]).difference(REWARD_LAST)
    assert gap.n == 2
    assert gap.mean == pytest.approx(((0.8 - 0.6) + (0.95 - 0.9)) / 2)
    apart = table([grpo[0], wapo[0]])
    assert apart.difference(REWARD_LAST).n == 0
    assert row(apart, "reward, last 10%")[3] == "n/a"
    assert any("share no seed" in s for s in apart.sentences())


def test_one_run_each_has_no_interval(tmp_path: Path) -> None:
    comparison = table([*seeds(tmp_path, "GRPO", [0.5]), *seeds(tmp_path, "WAPO", [0.8])])
    assert row(comparison, "reward, last 10%")[1:] == ["0.5", "0.8", "+0.3"]
    assert any("no interval" in sentence for sentence in comparison.sentences())
    summary = comparison.summary
    assert summary["low"].isna().all()
    assert summary["high"].isna().all()


def test_a_single_setting_has_no_difference(tmp_path: Path) -> None:
    comparison = table(seeds(tmp_path, "GRPO", [0.5, 0.6]))
    assert comparison.rows()[0] == ["", "GRPO (n=2)"]
    assert comparison.to_dict()["difference"] is None
    with pytest.raises(UserError, match="two labels"):
        comparison.difference(REWARD_LAST)


def test_a_run_without_seed_is_averaged_but_not_paired(tmp_path: Path) -> None:
    paths = [
        *seeds(tmp_path, "GRPO", [0.5, 0.6]),
        write_run(tmp_path / "x", "GRPO", None, [0.7] * 20),
        *seeds(tmp_path, "WAPO", [0.9, 0.9]),
    ]
    comparison = table(paths)
    assert comparison.interval("GRPO", REWARD_LAST).n == 3
    assert comparison.difference(REWARD_LAST).n == 2


def test_values_that_only_some_seeds_have_say_how_many(tmp_path: Path) -> None:
    paths = seeds(tmp_path, "GRPO", [0.5, 0.6, math.nan])
    write_run(tmp_path / "none", "GRPO", 3, [math.nan] * 30)
    comparison = table([*paths, tmp_path / "none"])
    assert row(comparison, "reward, last 10%")[1].endswith("(n=3)")
    assert row(comparison, "gradient norm, last 10%")[1] == "n/a"


def test_runs_that_differ_in_more_than_the_objective_are_called_out(tmp_path: Path) -> None:
    like = {"task": "a", "config": {"lr": 1e-4, "steps": 30}}
    other = {"task": "b", "config": {"lr": 5e-5, "steps": 30}}
    same = table([*seeds(tmp_path, "A", [0.5], **like), *seeds(tmp_path, "B", [0.5], **like)])
    assert not any("Not like with like" in s for s in same.sentences())
    mixed = table([tmp_path / "A-0", *seeds(tmp_path, "C", [0.5], **other)])
    (warning,) = [s for s in mixed.sentences() if s.startswith("Not like with like")]
    assert "task (a, b)" in warning
    assert "lr (1e-4, 5e-5)" in warning
    assert "steps" not in warning
    three = table([tmp_path / "A-0", tmp_path / "B-0", tmp_path / "C-0"])
    (warning,) = [s for s in three.sentences() if s.startswith("Not like with like")]
    assert "lr (1e-4 in A, B; 5e-5 in C)" in warning


def test_verdicts_of_seeds_are_counted_each_by_its_name(tmp_path: Path) -> None:
    drifts = ("explosion", "healthy", "collapse", "explosion")
    paths = [
        write_fake_run(tmp_path / f"g{seed}", drift=drift, seed=seed)
        for seed, drift in enumerate(drifts)
    ]
    (said,) = [s for s in table(paths).sentences() if s.startswith("GRPO: ")]
    assert said.startswith("GRPO: entropy explosion in 2, entropy collapse in 1 of 4 runs. g0: ")


def test_runs_of_one_label_that_differ_are_not_pooled(tmp_path: Path) -> None:
    slow, fast = {"config": {"lr": 5e-5}}, {"config": {"lr": 1e-4}}
    comparison = table(
        [
            *seeds(tmp_path, "GRPO", [0.5, 0.6], **slow),
            *seeds(tmp_path / "f", "GRPO", [0.8], **fast),
        ]
    )
    assert comparison.labels == ("GRPO, lr 5e-5", "GRPO, lr 1e-4")
    assert comparison.rows()[0][1:3] == ["GRPO, lr 5e-5 (n=2)", "GRPO, lr 1e-4 (n=1)"]
    assert comparison.interval("GRPO, lr 5e-5", REWARD_LAST).mean == pytest.approx(0.55)
    (told,) = comparison.heads_up
    assert "Runs labelled GRPO differ in lr (5e-5, 1e-4)" in told
    assert told in comparison.sentences()
    assert list(comparison.per_run["label"]) == ["GRPO, lr 5e-5"] * 2 + ["GRPO, lr 1e-4"]
    assert [s["n"] for s in comparison.to_dict()["settings"]] == [2, 1]


def test_one_seed_twice_is_called_out(tmp_path: Path) -> None:
    paths = [*seeds(tmp_path, "GRPO", [0.5, 0.6]), *seeds(tmp_path / "again", "GRPO", [0.5])]
    (told,) = table(paths).heads_up
    assert "GRPO holds runs of one seed: 0 (2 runs)" in told


# ---- whole runs ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    folder = tmp_path_factory.mktemp("runs")
    return table(
        [
            write_fake_run(
                folder / f"{objective}-{seed}",
                objective=objective,
                seed=seed,
                prompts=8,
                drift="explosion" if objective == "grpo" else "healthy",
            )
            for objective in ("grpo", "wapo")
            for seed in range(2)
        ]
    )


def test_class_shares_and_flows_equal_the_totals(whole: Comparison) -> None:
    run, values = whole.runs[0], whole.per_run.iloc[0]
    totals = run.classes.groupby("cls", observed=True)[["tokens", "pred_dentropy_sum"]].sum()
    gross = totals["pred_dentropy_sum"][list(tax.CLASSES)].abs().sum()
    for name in ("pos_peak", "pos_valley", "neg_peak", "neg_valley"):
        share = totals["tokens"][name] / totals["tokens"].sum()
        assert values[f"tokens_{name}"] == pytest.approx(share)
        flow = totals["pred_dentropy_sum"][name] / gross
        assert values[f"pred_dentropy_{name}"] == pytest.approx(flow)
    shares = [values[f"tokens_{n}"] for n in ("pos_peak", "pos_valley", "neg_peak", "neg_valley")]
    assert sum(shares) + values["tokens_none"] == pytest.approx(1)
    wapo = whole.per_run.iloc[2]
    assert (wapo["pred_dentropy_neg_peak"], wapo["pred_dentropy_neg_valley"]) == (0, 0)


def test_verdicts_stand_in_the_table_and_the_sentences(whole: Comparison) -> None:
    assert row(whole, "verdict")[1:] == ["entropy explosion", "healthy", ""]
    first, second = whole.sentences()[:2]
    assert first.startswith("GRPO: entropy explosion in 2 of 2 runs. grpo-0: Entropy rose")
    assert second.startswith("WAPO: healthy in 2 of 2 runs.")
    assert whole.title == "GRPO against WAPO, 40 steps, 4 runs"


def test_json_and_markdown_hold_the_same_numbers(whole: Comparison) -> None:
    form = json.loads(json.dumps(whole.to_dict(), allow_nan=False))
    assert [s["label"] for s in form["settings"]] == ["GRPO", "WAPO"]
    assert form["settings"][0]["runs"] == ["grpo-0", "grpo-1"]
    assert form["settings"][0]["verdicts"] == ["entropy_explosion"] * 2
    found = form["settings"][1]["metrics"]["reward_last"]
    assert found["low"] < found["mean"] < found["high"]
    expected = whole.summary.query("label == 'WAPO' and metric == 'reward_last'").iloc[0]
    assert found["mean"] == pytest.approx(expected["mean"])
    assert form["difference"]["metrics"]["reward_last"]["n"] == 2
    text = whole.to_markdown()
    for cells in whole.rows():
        assert all(marked(cell) in text for cell in cells)


def test_missing_class_totals_are_not_zero(tmp_path: Path) -> None:
    paths = [write_fake_run(tmp_path / "run", missing=("collision_rest", "collision_logp_rest"))]
    comparison = table(paths)
    assert row(comparison, "predicted dH, share of pos_peak")[1] == "n/a"
    bare = table(seeds(tmp_path, "GRPO", [0.5]))
    assert row(bare, "tokens in pos_peak")[1] == "n/a"
    assert row(bare, "predicted dH, share of pos_peak")[1] == "n/a"


def test_empty_runs_and_no_runs(tmp_path: Path) -> None:
    comparison = table([write_run(tmp_path / "empty", "GRPO", 0, [])])
    assert row(comparison, "verdict")[1] == "insufficient data"
    assert row(comparison, "reward, last 10%")[1] == "n/a"
    with pytest.raises(UserError, match="at least one run"):
        compare([])


def test_labels_cannot_break_the_markdown_table(tmp_path: Path) -> None:
    comparison = table([write_run(tmp_path / "a", "A|B", 0, [0.5] * 10)])
    line = comparison.to_markdown().splitlines()[2]
    assert line == "|  | A\\|B (n=1) |"
