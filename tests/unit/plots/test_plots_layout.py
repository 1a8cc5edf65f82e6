"""What is written in a figure can be read: no text leaves it, no title runs into the next one."""

from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.transforms import Bbox

from tests.support.builders import write_fake_run
from wapo_analysis.plots import render
from wapo_analysis.plots.style import WIDTH, inches, wrapped
from wapo_analysis.store import Run, open_run

LONG = "GRPO neg_peak only, after step 0: include_bins none"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Four settings, two of them with long names; two seeds of one."""
    folder = tmp_path_factory.mktemp("layout")
    labels = ["GRPO", "GRPO", LONG, LONG.replace("GRPO", "DAPO"), "WAPO"]
    return [
        open_run(
            write_fake_run(
                folder / str(n), label=label, seed=n, steps=6, probe_every=2, rescore_every=2
            )
        )
        for n, label in enumerate(labels)
    ]


@pytest.mark.parametrize(
    "name",
    ["entropy", "class_share", "waterfall", "prob_shift", "entropy_percentiles", "top_tokens"],
)
def test_no_text_leaves_the_figure_or_covers_another_title(name: str, runs: list[Run]) -> None:
    figure = render(name, runs)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, _ = canvas.get_width_height()
    legends = [text for legend in figure.legends for text in legend.get_texts()]
    titles = [title for ax in figure.axes for title in (ax._left_title, ax._right_title)]  # type: ignore[attr-defined]
    sides = [ax.yaxis.label for ax in figure.axes]
    own = [text for ax in figure.axes for text in ax.texts]
    every = [t for t in (*figure.texts, *legends, *titles, *sides, *own) if t.get_text()]
    boxes = [text.get_window_extent() for text in every]
    for text, box in zip(every, boxes, strict=True):
        assert box.x0 >= -1, text.get_text()
        assert box.x1 <= width + 1, text.get_text()
    for some in (titles, sides):
        drawn = [(text, text.get_window_extent()) for text in some if text.get_text()]
        for (one, a), (other, b) in combinations(drawn, 2):
            assert Bbox.intersection(a, b) is None, (one.get_text(), other.get_text())


def test_a_title_takes_the_lines_it_needs() -> None:
    for text in ("WMWM " * 40, "iil " * 100, "W" * 300):
        lines = wrapped(text).split("\n")
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")
        assert all(inches(line, 12.5, "bold") <= WIDTH - 0.2 for line in lines)
    assert len(wrapped("WMWM " * 40).split("\n")) > len(wrapped("iiii " * 40).split("\n"))
    assert wrapped("short") == "short"
    assert wrapped("") == ""
    assert wrapped("one A > 0 two", 0.7, 10).split("\n") == ["one", "A > 0", "two"]


def test_a_sum_over_probes_is_that_of_a_run(runs: list[Run]) -> None:
    labels = [ax.get_xlabel() for ax in render("waterfall", runs).axes]
    assert labels[0].split("\n") == [
        "dH of all tokens (nats), mean of 2 runs",
        "sum over 3 probed updates, steps 2 to 6",
    ]
    assert labels[1].startswith("dH of all tokens (nats)\nsum over 3")
