"""Which figures there are, when one can be drawn, and that each survives every kind of run."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.support.builders import DRIFTS, write_fake_run
from wapo_analysis.errors import UserError
from wapo_analysis.plots import (
    FIGURES,
    FORMATS,
    encode_figure,
    get_figure,
    prepare_marks,
    render,
    unavailable,
)
from wapo_analysis.schema import TABLES
from wapo_analysis.store import Run, open_run

ROOT = Path(__file__).parents[3]
RUN_FIGURES = [name for name, spec in FIGURES.items() if spec.needs]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Run]]:
    folder = tmp_path_factory.mktemp("cases")

    def run(name: str, **options: object) -> Run:
        return open_run(write_fake_run(folder / name, **{"steps": 6, "probe_every": 2, **options}))  # type: ignore[arg-type]

    grpo, wapo = run("grpo"), run("wapo", objective="wapo")
    blind = ("collision_rest", "collision_logp_rest", "entropy_pos", "clip_low", "pass_rate")
    bare = {"seed": None, "label": None, "objective": {}}
    return {
        "two labels": [grpo, wapo],
        "seeds": [
            grpo,
            run("grpo1", seed=1, steps=8),
            wapo,
            run("wapo1", objective="wapo", seed=1),
        ],
        "one step": [run("short", steps=1), run("short wapo", steps=1, objective="wapo")],
        "diverged, hot": [run("nan", drift="diverged", temperature=2.0)],
        "one is blind": [grpo, run("blind", objective="wapo", missing=blind, rescore_every=0)],
        "no tokens": [run("quiet", token_every=0, probe_every=0), wapo],
        "stalled": [run("stalled", drift="stalled"), wapo],
        "many, bare": [run("bare", manifest=bare)]
        + [run(f"many{i}", label=f"setting {i}", steps=2) for i in range(4)],
    }


@pytest.fixture(scope="module")
def marks(cases: dict[str, list[Run]]) -> dict[str, pd.DataFrame]:
    return {case: prepare_marks(runs) for case, runs in cases.items()}


CASES = ("two labels", "seeds", "one step", "diverged, hot", "one is blind", "no tokens",
         "stalled", "many, bare")  # fmt: skip


# Each figure draws two of the kinds in the fast tests, each kind is drawn by a quarter of them.
PAIRS = [
    pytest.param(name, case, marks=[pytest.mark.slow] * ((i + j) % 4 > 0))
    for i, name in enumerate(RUN_FIGURES)
    for j, case in enumerate(CASES)
]


@pytest.mark.parametrize(("name", "case"), PAIRS)
def test_every_figure_draws_every_kind_of_run(
    name: str, case: str, cases: dict[str, list[Run]], marks: dict[str, pd.DataFrame]
) -> None:
    runs = cases[case]
    spec = FIGURES[name]
    reason = unavailable(spec, runs)
    if reason is not None:
        assert "no" in reason.split()
        return
    figure = render(name, runs, marks[case])
    title = figure.get_suptitle()
    assert title == spec.title or any(sign.isdigit() for sign in title), "the answer has a number"
    if case not in ("many, bare", "one step"):
        figure.set_layout_engine("none")  # the layout takes most of the time
    figure.draw_without_rendering()
    words = " ".join(ax.get_xlabel() + ax.get_ylabel() for ax in figure.axes)
    assert words.strip(), "axes need labels"


@pytest.mark.parametrize("name", ["entropy_flow", "theory_map", "train_vs_behaviour"])
def test_figures_in_every_format(
    name: str, cases: dict[str, list[Run]], marks: dict[str, pd.DataFrame]
) -> None:
    figure = render(name, cases["two labels"], marks["two labels"])
    for kind in FORMATS:
        assert 5_000 < len(encode_figure(figure, kind)) < 700_000


@pytest.mark.parametrize("name", RUN_FIGURES)
def test_full_runs_can_feed_every_figure(name: str, cases: dict[str, list[Run]]) -> None:
    assert unavailable(FIGURES[name], cases["seeds"]) is None


@pytest.mark.parametrize("drift", DRIFTS)
def test_entropy_figures_of_every_course(drift: str, tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "a", drift=drift, steps=8))
    marks = prepare_marks([run])
    for name in ("entropy", "entropy_flow", "class_share"):
        assert render(name, [run], marks).axes


def test_specs_are_complete() -> None:
    for name, spec in FIGURES.items():
        assert spec.name == name
        assert spec.title.endswith("?"), "a title states the question"
        assert spec.caption.endswith(".")
        assert spec.caption.startswith("Look ")
        for need in spec.needs:
            for choice in (need, *need.others):
                assert choice.column in TABLES[choice.table]
    assert sum(not spec.needs for spec in FIGURES.values()) == 3


def test_unknown_figure_names_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"unknown figure 'entropie'; .*did you mean 'entropy'\?"):
        get_figure("entropie")


def test_reason_says_what_is_missing(cases: dict[str, list[Run]], tmp_path: Path) -> None:
    blind = cases["one is blind"][1:]
    assert unavailable(FIGURES["entropy"], []) == "it needs at least one run"
    assert (
        unavailable(FIGURES["bin_mass"], blind) == "blind has no 'grad_mass' in its classes table"
    )
    assert "no token that was re-scored" in str(unavailable(FIGURES["prob_shift"], blind))
    assert "no token rows" in str(unavailable(FIGURES["rule_breaks"], cases["no tokens"][:1]))
    with pytest.raises(UserError, match="figure 'bin_mass' cannot be drawn: blind has no"):
        render("bin_mass", blind)
    empty = open_run(write_fake_run(tmp_path / "empty", steps=0))
    assert unavailable(FIGURES["reward"], [empty]) == "empty has no steps yet"
    assert unavailable(FIGURES["class_share"], [empty]) == (
        "empty has no class totals (recorded by wapo train, attach or watched_loss)"
    )


def test_one_run_that_can_is_enough(cases: dict[str, list[Run]]) -> None:
    assert unavailable(FIGURES["bin_mass"], cases["one is blind"]) is None


@pytest.mark.parametrize("name", RUN_FIGURES)
def test_frames_name_their_runs_and_stay_as_they_were(
    name: str, cases: dict[str, list[Run]]
) -> None:
    spec = FIGURES[name]
    frame = spec.prepare(cases["two labels"])
    assert list(dict.fromkeys(frame["label"])) == ["GRPO", "WAPO"]
    assert {"seed", "run"} <= set(frame.columns)
    before = frame.copy(deep=True)
    spec.plot(frame)
    pd.testing.assert_frame_equal(frame, before)
    if spec.says is not None:
        assert re.search(r"GRPO.*\d", spec.says(frame)), spec.says(frame)


def test_a_label_with_any_characters_is_drawn_and_shown_escaped(tmp_path: Path) -> None:
    label = "a\x00\x1b[31m\u202eb\ud800 $x$ \u4f60"
    texts = {"vocab": "a\x07\u202e"}
    run = open_run(write_fake_run(tmp_path / "a", steps=3, label=label, texts=texts))
    svg = encode_figure(render("top_tokens", [run]), "svg").decode()
    assert "a\\x00\\x1b[31m\\u202eb\\ud800 $x$" in svg
    assert "'a\\x07\\u202e'" in svg


def test_a_run_in_progress_can_be_drawn(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "live", steps=4, status="running")
    with (path / "steps.jsonl").open("a") as log:
        log.write('{"step": 5, "rew')
    assert render("reward", [open_run(path)]).axes


@pytest.mark.slow
def test_script_writes_the_formats(tmp_path: Path, cases: dict[str, list[Run]]) -> None:
    script, run = ROOT / "figures" / "make.py", cases["two labels"][0].path
    named = ["entropy", "--out", str(tmp_path), "--runs", str(run)]
    command = [sys.executable, str(script), *named]
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'taxonomy'}"}
    done = subprocess.run(command, capture_output=True, text=True, env=path, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "entropy.pdf", "entropy.png", "entropy.svg",
    ]  # fmt: skip
    command[-1] = str(tmp_path / "absent")
    failed = subprocess.run(command, capture_output=True, text=True, env=path, check=False)
    assert failed.returncode != 0
    assert failed.stderr.startswith("error: no run folder at")


def test_gallery_page_lists_every_figure_with_its_question() -> None:
    page = (ROOT / "figures" / "README.md").read_text()
    printed = subprocess.run(
        [sys.executable, str(ROOT / "figures" / "make.py"), "--index"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert printed in page
    assert all(f"| `{name}` | {spec.title} |" in printed for name, spec in FIGURES.items())
    shown = re.findall(r"\]\((gallery/\w+\.png)\)", page)
    sizes = [(ROOT / "figures" / file).stat().st_size for file in shown]
    assert len(shown) == len(set(shown)) >= 6
    assert sum(sizes) < 1_500_000
