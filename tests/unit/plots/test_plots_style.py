"""Colours, line styles and file formats."""

from itertools import combinations
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest
import seaborn as sns
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from wapo_taxonomy import CLASS_NAMES, CLASSES

from wapo_analysis.errors import UserError
from wapo_analysis.plots import FORMATS, encode_figure, render, save_figure
from wapo_analysis.plots.style import (
    CLASS_COLORS,
    CLASS_INK,
    SIGN_COLORS,
    label_styles,
    new_figure,
    sign_map,
    theme,
)

# Machado, Oliveira, Fernandes (2009), severity 1.0: linear RGB as the colour-blind eye sees it.
BLINDNESS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
}  # fmt: skip


def linear(color: str) -> np.ndarray:
    rgb = np.array(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(linear_rgb: np.ndarray) -> np.ndarray:
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = to_xyz @ np.clip(linear_rgb, 0, 1) / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


def test_every_class_has_one_colour() -> None:
    assert set(CLASS_COLORS) == set(CLASS_NAMES.values())
    assert len(set(CLASS_COLORS.values())) == len(CLASS_COLORS)
    assert SIGN_COLORS[1] == CLASS_COLORS["pos_peak"]
    assert SIGN_COLORS[-1] == CLASS_COLORS["neg_peak"]


@pytest.mark.parametrize("kind", [None, *BLINDNESS])
def test_class_colours_stay_apart_for_the_colour_blind(kind: str | None) -> None:
    see = np.eye(3) if kind is None else np.array(BLINDNESS[kind])
    seen = {name: lab(see @ linear(CLASS_COLORS[name])) for name in CLASSES}
    for one, other in combinations(CLASSES, 2):
        assert np.linalg.norm(seen[one] - seen[other]) > 20, (one, other)


@pytest.mark.parametrize("name", CLASSES)
def test_class_text_is_readable_on_white(name: str) -> None:
    luminance = linear(CLASS_INK[name]) @ np.array([0.2126, 0.7152, 0.0722])
    assert 1.05 / (luminance + 0.05) > 4.0


def test_label_styles_are_stable_and_distinct() -> None:
    alone = label_styles(["WAPO"])["WAPO"]
    both = label_styles(["GRPO", "WAPO", "GRPO"])
    assert list(both) == ["GRPO", "WAPO"]
    assert both["WAPO"] == alone
    assert both["GRPO"].color != both["WAPO"].color
    assert both["GRPO"].dash != both["WAPO"].dash
    twins = label_styles(["GRPO", "GRPO lr 1e-4", "GRPO lr 2e-4", "something else"])
    assert len(set(twins.values())) == 4
    assert label_styles(["DR-GRPO"])["DR-GRPO"] == label_styles(["dr_grpo"])["dr_grpo"]


def test_a_label_that_names_a_class_takes_its_colour() -> None:
    for name in CLASSES:
        label = f"GRPO {name} only"
        assert label_styles([label])[label].color == CLASS_COLORS[name]


def test_sign_map_runs_from_pale_to_dark() -> None:
    for sign in (1, -1):
        tones = sign_map(sign)(np.linspace(0, 1, 9))[:, :3].sum(axis=1)
        assert (np.diff(tones) < 0).all()
        assert tones[0] < 2.9, "a single token must be seen on white"


def test_theme_is_ticks_of_seaborn() -> None:
    ours = theme()
    ticks = {key: value for key, value in sns.axes_style("ticks").items() if key != "image.cmap"}
    own = ("axes.", "font.", "grid.color", "xtick.color", "ytick.color", "figure.facecolor")
    assert {k: ours.get(k) for k in ticks if not k.startswith(own)} == {
        key: value for key, value in ticks.items() if not key.startswith(own)
    }


def test_theme_leaves_the_settings_alone() -> None:
    before = dict(mpl.rcParams)
    render("theory_vocabulary")
    assert dict(mpl.rcParams) == before
    assert theme()["font.sans-serif"][0] == "DejaVu Sans"


def test_figures_are_unknown_to_pyplot() -> None:
    import matplotlib.pyplot as plt

    render("theory_vocabulary")
    assert plt.get_fignums() == []


def test_a_notebook_shows_a_figure_by_itself() -> None:
    assert render("theory_vocabulary")._repr_png_().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def twice() -> tuple[Figure, Figure]:
    """One figure, drawn two times."""
    return render("theory_vocabulary"), render("theory_vocabulary")


@pytest.mark.parametrize("kind", FORMATS)
def test_same_figure_same_bytes(kind: str, twice: tuple[Figure, Figure]) -> None:
    one, two = (encode_figure(figure, kind) for figure in twice)
    assert one == two
    assert one.startswith({"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind])


def test_svg_keeps_text_as_text() -> None:
    svg = encode_figure(render("theory_vocabulary"), "svg").decode()
    assert "What does one update do to every token?" in svg
    assert "<dc:date>" not in svg


def test_save_makes_the_folder_and_takes_the_suffix(tmp_path: Path) -> None:
    path = save_figure(new_figure(1.0), tmp_path / "new" / "a.svg")
    assert path.read_bytes().startswith(b"<?xml")
    other = save_figure(new_figure(1.0), tmp_path / "b", format="pdf")
    assert other.read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("name", ["a.jpg", "a"])
def test_unknown_format_is_one_clear_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="allowed: png, svg, pdf"):
        save_figure(new_figure(1.0), tmp_path / name)
    assert not list(tmp_path.iterdir())
