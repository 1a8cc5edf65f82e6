"""wapo watch: the band around the entropy and the view."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wapo_taxonomy as tax

from tests.support.builders import write_fake_run
from tests.support.terminal import shown
from wapo_analysis.diagnose import diagnose
from wapo_analysis.diagnose.context import Context
from wapo_analysis.diagnose.detectors.entropy import entropy_band
from wapo_analysis.store import RunWriter, open_run
from wapo_analysis.watch.view import TERMS, Rule, bar, line_chart, one_line, render, resampled


def view(path: Path, width: int = 100) -> str:
    run = open_run(path)
    return shown(render(run, diagnose(run), width=width), width)


# ---- the band -----------------------------------------------------------------------------------


def entropy_run(path: Path, values: np.ndarray[Any, Any], reward: bool) -> Path:
    writer = RunWriter(path, {"name": "r"})
    for step, value in enumerate(values, start=1):
        writer.append_step({"step": step, "entropy": value} | ({"reward": 0.3} if reward else {}))
    writer.close("finished")
    return path


@pytest.mark.parametrize("reward", [True, False])
@pytest.mark.parametrize("level", [0.02, 0.4, 3.0])
def test_the_band_is_where_diagnose_begins_to_warn(
    tmp_path: Path, level: float, reward: bool
) -> None:
    noise = np.random.default_rng(0).normal(0, 0.01 * level, 60)
    flat = open_run(entropy_run(tmp_path / "flat", level + noise, reward))
    band = entropy_band(Context(flat))
    assert band is not None
    assert band.lowest < band.low < band.level < band.high <= band.highest

    def names(end: float) -> set[str]:
        values = level + noise
        values[40:] += end - level
        path = tmp_path / str(len(list(tmp_path.iterdir())))
        run = open_run(entropy_run(path, values, reward))
        return {f.name for f in diagnose(run).findings}

    near, beyond = 0.03, 0.12
    assert not names(band.high * (1 - near)) & {"entropy_rise", "entropy_explosion"}
    assert names(band.high * (1 + beyond)) & {"entropy_rise", "entropy_explosion"}
    assert "entropy_explosion" in names(band.highest * (1 + beyond))
    assert not names(band.low * (1 + beyond)) & {"entropy_fall", "entropy_collapse"}
    assert names(band.low * (1 - beyond)) & {"entropy_fall", "entropy_collapse"}
    assert "entropy_collapse" in names(band.lowest * (1 - 0.5))


def test_no_entropy_no_band(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "r", steps=10, missing=["entropy"]))
    assert entropy_band(Context(run)) is None
    assert "entropy: not recorded" in view(run.path)


# ---- the view -----------------------------------------------------------------------------------


def test_the_view_says_what_diagnose_says(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "bad", steps=60, drift="explosion")
    text = " ".join(view(path).replace("│", " ").split())
    found = diagnose(open_run(path))
    assert f"verdict: entropy explosion since step {found.onset_step}" in text
    assert (
        f"driver: {found.drivers[0].cls} ({found.drivers[0].share:.0%} of the predicted dH)" in text
    )
    assert found.sentence in text
    assert found.findings[0].advice.text in text
    assert "step 60 of 60" in text


def test_class_bars_are_the_shares_of_the_last_steps(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "r", steps=25, drift="noise")
    totals = open_run(path).classes
    totals = totals[(totals.step > 15) & totals.cls.isin(tax.CLASSES)]
    text = view(path)
    assert "classes, steps 16 to 25" in text
    for name in tax.CLASSES:
        row = next(line for line in text.splitlines() if line.startswith(f"│ {name} "))
        mine = totals[totals.cls == name]
        for column in ("tokens", "grad_mass"):
            assert f"{mine[column].sum() / totals[column].sum():.0%}" in row
        assert f"{mine.pred_dentropy_sum.sum():+.2g}" in row


@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        (["collision_rest"], "no token statistics"),
        (["collision_logp_rest"], "n/a"),
        (["reward"], "reward: not recorded"),
    ],
)
def test_what_a_source_lacks_is_said(tmp_path: Path, missing: list[str], expected: str) -> None:
    assert expected in view(write_fake_run(tmp_path / "r", steps=12, missing=missing))


def test_zero_advantages_have_no_class(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "r", steps=12, drift="stalled")
    assert "every advantage is zero" in view(path)


def test_texts_of_a_run_cannot_style_the_terminal(tmp_path: Path) -> None:
    name = "[red]x[/] \x1b[2J"
    path = write_fake_run(tmp_path / "r", steps=12, manifest={"name": name})
    text = view(path)
    assert "[red]x[/]" in text
    assert "\x1b[2J" not in text
    run = open_run(path)
    assert "\x1b" not in one_line(run, diagnose(run))


@pytest.mark.parametrize("width", [20, 80, 200])
def test_every_row_fits_the_terminal(tmp_path: Path, width: int) -> None:
    path = write_fake_run(tmp_path / "r", steps=30, drift="collapse")
    assert max(map(len, view(path, width).splitlines())) <= max(width, 44)


@pytest.mark.parametrize("drift", ["explosion", "collapse", "stalled", "noise"])
@pytest.mark.parametrize("rows", [24, 30, 60])
def test_verdict_and_whole_advice_come_first_and_the_rest_fits(
    tmp_path: Path, drift: Any, rows: int
) -> None:
    run = open_run(write_fake_run(tmp_path / "r", steps=60, drift=drift))
    found = diagnose(run)
    text = shown(render(run, found, width=80, rows=rows, keys=True), 80)
    lines = text.splitlines()
    assert len(lines) < rows, "a row is left for the prompt"
    plain = " ".join(text.replace("│", " ").split())
    places = [plain.index("verdict: ")]
    if found.findings:
        advice = found.findings[0].advice
        places += [plain.index(step) for step in (advice.text, *(s.text for s in advice.steps))]
    if "(smoothed)" in plain:
        places.append(plain.index("(smoothed)"))
    assert places == sorted(places)
    assert "q leave" in plain


def test_terms_are_explained_in_place_of_the_curves(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "r", steps=30))
    text = shown(render(run, diagnose(run), width=80, rows=24, explain=True), 80)
    assert "rolling median" in text
    assert "step 1 " not in text
    assert all(term in text for term, _ in TERMS)


def test_view_and_line_say_the_same_smoothed_values(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "r", steps=60, drift="noise"))
    found = diagnose(run)
    smooth = {name: Context(run).series(name).smooth[-1] for name in ("reward", "entropy")}
    text = shown(render(run, found, width=100), 100)
    assert f"reward {smooth['reward']:.3g} (smoothed)" in text
    assert f"entropy {smooth['entropy']:.3g} nats (smoothed)" in text
    said = f"reward {smooth['reward']:.3g}, entropy {smooth['entropy']:.3g} nats (smoothed)"
    assert said in one_line(run, found)


def test_a_chart_shows_level_line_and_alarm() -> None:
    values = np.r_[np.full(20, 1.0), np.full(20, 3.0)]
    rows = line_chart(
        values,
        width=20,
        height=4,
        style="cyan",
        rules=(Rule(1.0, "dim", "baseline"), Rule(2.0, "yellow", "warns"), Rule(99.0, "red", "x")),
        safe=(0.0, 2.0),
    )
    assert len(rows) == 4
    plain = [row.plain for row in rows]
    assert plain[0].endswith(" 3")
    assert plain[3].endswith("baseline 1")
    assert sum("warns" in row for row in plain) == 1
    assert not any("x" in row for row in plain), "a far level does not flatten the data"
    top, bottom = plain[0][:20].strip(" ┈"), plain[3][:20].strip(" ┈")
    assert 9 <= len(top) <= 12
    assert 9 <= len(bottom) <= 12
    assert any("red" in str(span.style) for span in rows[0].spans)
    assert not any("red" in str(span.style) for span in rows[3].spans)


def test_charts_of_one_value_and_of_very_many() -> None:
    for values in (np.array([0.0]), np.zeros(7), np.linspace(-1, 1, 5001)):
        rows = line_chart(values, width=30, height=3, style="")
        assert all(len(row.plain) >= 30 for row in rows)
        assert any(ord(c) > 0x2800 for row in rows for c in row.plain)
    assert resampled(np.array([0.0, 1.0]), 3).tolist() == [0.0, 0.5, 1.0]
    assert resampled(np.arange(10.0), 5).tolist() == [0.5, 2.5, 4.5, 6.5, 8.5]


def test_bars_are_exact_to_an_eighth() -> None:
    assert bar(0.5, 8, "").plain == "████    "
    assert bar(1 / 64, 8, "").plain == "▏       "
    assert (bar(0.0, 4, "").plain, bar(2.0, 4, "").plain) == ("    ", "████")
