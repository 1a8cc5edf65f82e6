"""The page is whole, loads nothing, escapes everything and never mixes up its figures."""

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from tests.support.builders import write_fake_run
from wapo_analysis.errors import UserError
from wapo_analysis.plots import FIGURES
from wapo_analysis.report.build import build_report
from wapo_analysis.report.samples import STRONGEST, pick_samples, visible
from wapo_analysis.report.svg import inline_svg
from wapo_analysis.store import Run, RunWriter, open_run

EVIL = "</span><script>alert('x')</script><img src=x onerror=\"alert(2)\">&amp; $\\frac{$"
VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Tags with attributes and text of a page; checks that elements are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def ids(self) -> list[str]:
        return [attrs["id"] for _, attrs in self.tags if attrs.get("id")]


def fake_runs(folder: Path, seeds: int, **settings: object) -> list[Run]:
    return [
        open_run(
            write_fake_run(
                folder / f"{objective}-{seed}",
                probe_every=8,
                objective=objective,
                seed=seed,
                steps=24,
                prompts=8,
                drift="explosion" if objective == "grpo" else "healthy",
                **settings,
            )
        )
        for objective in ("grpo", "wapo")
        for seed in range(seeds)
    ]


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw a few figures only: what is tested does not depend on how many there are."""
    few = ("reward", "entropy", "entropy_flow", "theory_classes")
    subset = {name: FIGURES[name] for name in few}
    monkeypatch.setattr("wapo_analysis.report.figures.FIGURES", subset)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    return fake_runs(tmp_path_factory.mktemp("runs"), 2)


@pytest.fixture(scope="module")
def html(runs: list[Run]) -> str:
    return build_report(runs)


@pytest.fixture(scope="module")
def evil_html(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Every text that comes from a model, a data set or a manifest tries to break out."""
    texts = dict.fromkeys(("prompt", "completion", "answer", "vocab"), EVIL)
    manifest = {
        "name": EVIL,
        "task": EVIL,
        "model": EVIL,
        "source": EVIL,
        "started": EVIL,
        "versions": {EVIL: EVIL},
        "config": {"task": EVIL, "include_bins": [EVIL]},
        "objective": {"name": "grpo", "note": EVIL},
    }
    folder = tmp_path_factory.mktemp("evil")
    return build_report(fake_runs(folder, 1, label=EVIL, texts=texts, manifest=manifest))


def test_six_runs_of_the_demo_would_stay_small(html: str) -> None:
    assert len(html.encode()) < 2_000_000


def test_the_first_screen_holds_verdict_table_and_picture(html: str) -> None:
    text = Page(html).text
    for word in ("GRPO: entropy explosion", "WAPO: healthy", "(2 of 2 runs)", "What to do."):
        assert word in text
    places = [html.index(mark) for mark in ('id="verdict"', 'id="table"', 'id="figure-entropy"')]
    assert places == sorted(places)
    assert places[-1] < html.index('id="group-1"')
    assert re.search(r"Began at step \d+, first warning at step \d+", text)
    assert re.search(r"0\.\d+ ± 0\.\d+", text)


def test_every_figure_is_there_once_with_its_caption(html: str) -> None:
    page = Page(html)
    counts = Counter(attrs.get("id") for tag, attrs in page.tags if tag == "figure")
    assert counts == {f"figure-{name}": 1 for name in FIGURES}
    for spec in FIGURES.values():
        assert " ".join(spec.caption.split()) in page.text
    drawn = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(drawn) == len(FIGURES)
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawn)


def test_samples_taxonomy_and_provenance_are_there(html: str, runs: list[Run]) -> None:
    page = Page(html)
    tokens = [attrs for _, attrs in page.tags if attrs.get("class") == "token"]
    assert tokens
    for part in ("p = ", "H = ", "A = ", "coef = "):
        assert all(part in attrs["title"] for attrs in tokens)
    for word in ("pos_peak", "pos_valley", "neg_peak", "neg_valley", "How to read this"):
        assert word in page.text
    for run in runs:
        assert run.name in page.text
        assert f"--out {run.path}" in page.text
    assert '"schema_version": 1' in page.text


@pytest.mark.parametrize("which", ["html", "evil_html"])
def test_it_loads_nothing_and_runs_nothing(which: str, request: pytest.FixtureRequest) -> None:
    text = request.getfixturevalue(which)
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form", "img"}
    for tag, attrs in page.tags:
        for name, value in attrs.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                assert value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
            for target in re.findall(r"url\(([^)]*)\)", value or ""):
                assert target.startswith("#"), (tag, name, value)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "@import" not in style
    assert "url(" not in style


def test_texts_are_shown_escaped(evil_html: str) -> None:
    assert "<script" not in evil_html
    assert "<img" not in evil_html
    text = Page(evil_html).text
    assert text.count("<script>alert('x')</script>") > 20


@pytest.mark.parametrize("which", ["html", "evil_html"])
def test_ids_are_unique_and_every_reference_is_met(
    which: str, request: pytest.FixtureRequest
) -> None:
    page = Page(request.getfixturevalue(which))
    ids = page.ids()
    assert [name for name, count in Counter(ids).items() if count > 1] == []
    used = {
        target
        for _, attrs in page.tags
        for value in attrs.values()
        for target in re.findall(r"url\(#([^)]+)\)", value or "")
    }
    used |= {
        attrs["href"][1:] for _, attrs in page.tags if (attrs.get("href") or "").startswith("#")
    }
    assert used
    assert used <= set(ids)


@pytest.mark.usefixtures("few_figures")
def test_the_same_runs_give_the_same_page(runs: list[Run]) -> None:
    again = build_report([open_run(run.path) for run in runs])
    assert build_report(runs) == again


@pytest.mark.usefixtures("few_figures")
def test_it_is_written_whole_into_a_new_folder(tmp_path: Path, runs: list[Run]) -> None:
    target = tmp_path / "new" / "page.html"
    page = build_report(runs[:1], target, title="My <run>")
    assert target.read_text(encoding="utf-8") == page
    assert "<h1>My &lt;run&gt;</h1>" in page
    assert page.endswith("</html>")
    assert [file.name for file in target.parent.iterdir()] == ["page.html"]


@pytest.mark.usefixtures("few_figures")
def test_a_target_that_cannot_be_written_is_one_clear_line(tmp_path: Path, runs: list[Run]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write report"):
        build_report(runs[:1], tmp_path / "file" / "page.html")
    with pytest.raises(UserError, match="at least one run"):
        build_report([])


@pytest.mark.usefixtures("few_figures")
@pytest.mark.parametrize("steps", [0, 1])
def test_runs_too_short_to_judge(tmp_path: Path, steps: int) -> None:
    path = write_fake_run(tmp_path / "run", steps=steps)
    text = Page(build_report([open_run(path)])).text
    assert "insufficient data" in text
    assert ("Not available here" in text) == (steps == 0)


@pytest.mark.usefixtures("few_figures")
def test_a_run_of_nothing_but_a_step_log(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {"name": "bare"})
    for step in range(1, 31):
        writer.append_step({"step": step, "entropy": 0.4, "reward": float("nan")})
    writer.close("finished")
    text = Page(build_report([open_run(tmp_path / "run")])).text
    assert "Not available here" in text
    assert "healthy" in text
    assert "n/a" in text


@pytest.mark.usefixtures("few_figures")
def test_missing_statistics_are_named_not_drawn_as_zero(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "run", missing=("collision_rest", "collision_logp_rest"))
    run = open_run(path)
    text = Page(build_report([run])).text
    assert "Not checked" in text
    titles = [token.title for sample in pick_samples(run) for token in sample.tokens]
    assert titles
    assert all("predicted dH = n/a" in title for title in titles)


def test_samples_are_best_and_worst_of_first_and_last_step(runs: list[Run]) -> None:
    run = runs[0]
    samples = pick_samples(run)
    assert [(s.step, s.kind) for s in samples] == [
        (1, "best"), (1, "worst"), (24, "best"), (24, "worst"),
    ]  # fmt: skip
    first = run.rollouts[run.rollouts["step"] == 1]
    assert float(samples[0].reward) == first["reward"].max()
    assert float(samples[1].reward) == first["reward"].min()
    sample = samples[0]
    rows = run.tokens([1])
    chosen = rows[(rows["advantage"] - float(sample.advantage)).abs() < 0.01]
    assert len(sample.tokens) == 6
    assert sample.tokens[0].row[1] in ("pos_peak", "pos_valley")
    assert set(sample.tokens[0].row[4:5]) == {f"{chosen['advantage'].iloc[0]:.3g}"}
    strengths = [token.strength for token in sample.strongest]
    assert strengths == sorted(strengths, reverse=True)
    assert len(strengths) <= STRONGEST
    assert max(strengths) <= 1


@pytest.mark.usefixtures("few_figures")
def test_samples_without_token_rows_keep_their_text(tmp_path: Path) -> None:
    run = open_run(write_fake_run(tmp_path / "run", token_every=0, steps=9))
    samples = pick_samples(run)
    assert len(samples) == 4
    assert all(not sample.tokens and sample.completion for sample in samples)
    assert samples[0].completion in Page(build_report([run])).text


def test_repeated_passes_show_a_token_once(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "run", steps=2)
    run = open_run(path)
    again = run.tokens([1, 2], derived=False).assign(minibatch=7)
    from wapo_analysis.schema import TOKENS
    from wapo_analysis.table import Records

    writer = RunWriter(path, run.manifest, resume_after=99)
    columns = {name: again[name].to_numpy() for name in again.columns}
    writer.write_part(Records.build(TOKENS, columns), 2, rank=9)
    writer.close("finished")
    positions = [len(sample.tokens) for sample in pick_samples(open_run(path))]
    assert positions == [6, 6, 6, 6]


def test_blanks_become_visible() -> None:
    assert visible("a b\n") == "a\u2423b\u23ce"


def test_inline_svg_keeps_the_drawing_and_drops_the_rest() -> None:
    content = b"""<?xml version="1.0"?>
    <svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
         width="10pt" height="5pt" viewBox="0 0 10 5" version="1.1">
     <metadata><x/></metadata><defs><style>*{}</style><path id="m" d="M 0.123456 1"/></defs>
     <g id="a" clip-path="url(#c)" style="fill: #ffffff; stroke: url(#c)">
      <use xlink:href="#m"/><image xlink:href="data:image/png;base64,AA1.23456"/>
      <text>a &lt;b&gt; url(#c) id="m"</text></g>
     <clipPath id="c"/></svg>"""
    svg = inline_svg(content, "fig", 'say "x" < y')
    assert svg.startswith("<svg ")
    assert 'aria-label="say &quot;x&quot; &lt; y"' in svg
    for gone in ("http", "metadata", "<style", "width=", "xlink", 'id="m"/', "#ffffff"):
        assert gone not in svg
    for kept in (
        'id="fig-a"', 'id="fig-m"', 'id="fig-c"', 'href="#fig-m"', 'clip-path="url(#fig-c)"',
        "stroke: url(#fig-c)", 'd="M 0.12 1"', "base64,AA1.23456", "a &lt;b&gt; url(#c)",
        "var(--paper)", 'viewBox="0 0 10 5"',
    ):  # fmt: skip
        assert kept in svg


def test_strength_is_relative_to_the_strong_tokens_of_the_step(runs: list[Run]) -> None:
    samples = pick_samples(runs[0])
    rows = runs[0].tokens([1])
    full = float(np.quantile(rows["grad_norm"][rows["grad_norm"] > 0], 0.95))
    best = samples[0].tokens
    assert max(token.strength for token in best) == pytest.approx(
        min(1.0, max(_size(rows, token.title) for token in best) / full), abs=0.02
    )


def _size(rows: object, title: str) -> float:
    """Gradient norm of the token whose p and coef a title shows."""
    p, coef = (float(re.search(rf"{name} = ([-\d.e]+)", title).group(1)) for name in ("p", "coef"))
    gap = (rows["prob"] - p).abs() / p + (rows["coef"] - coef).abs() / max(abs(coef), 1e-12)
    return float(rows.loc[gap.idxmin(), "grad_norm"])
