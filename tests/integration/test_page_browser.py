"""The page in a real Chromium: clicks, keys, widths and colours, live news, hostile texts.

Needs Chromium (``apt-get install chromium``) and ``pip install playwright``; axe-core comes from
npm for the accessibility check. `make test-slow` installs the Python side.
"""

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from tests.support.builders import write_fake_run
from wapo_analysis.attribute import attribute_step
from wapo_analysis.diagnose import diagnose
from wapo_analysis.report import build_report
from wapo_analysis.store import open_run
from wapo_analysis.store.files import step_line

sync_api = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="apt-get install chromium"),
]
HOSTILE = (
    "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'>\u202e\x00\x1b[2J"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_api.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("browser") / "run"
    return write_fake_run(out, drift="explosion", steps=60, probe_every=5, prompts=8)


@pytest.fixture(scope="module")
def report(folder: Path) -> Path:
    out = folder.parent / "report.html"
    build_report([open_run(folder)], out)
    return out


def opened(browser: Any, address: str, **view: Any) -> tuple[Any, list[str]]:
    """A page that is ready, and the list its errors go to."""
    page = browser.new_page(**{"viewport": {"width": 1280, "height": 900}, **view})
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: errors.append(m.text) if m.type == "error" else None)
    page.goto(address)
    page.wait_for_selector("body[data-ready]", timeout=10_000)
    return page, errors


def until(page: Any, condition: str, seconds: float = 5) -> None:
    """Wait for a condition; Playwright's own way needs eval, which the page forbids."""
    end = time.perf_counter() + seconds
    while not page.evaluate(condition):
        assert time.perf_counter() < end, condition
        time.sleep(0.05)


def test_from_the_verdict_to_the_step_the_rollout_and_the_token(
    browser: Any, report: Path, folder: Path
) -> None:
    run = open_run(folder)
    found = diagnose(run)
    page, errors = opened(browser, report.as_uri())
    assert found.sentence in page.inner_text("#verdict")
    assert found.culprits is not None
    step, rollout, share = found.culprits.rollouts[0]
    page.click("#findings-list .finding >> nth=0 >> button.link[data-step] >> nth=1")
    page.wait_for_selector(f'button.rollout[data-rollout="{rollout}"][aria-pressed="true"]')
    assert page.input_value("#step-box") == str(step)
    told = attribute_step(run, step, top=1)
    top = told.rollouts.iloc[0]
    page.select_option("#step-rollouts select", "gradient, largest first")
    first = page.inner_text("#rollout-list button.rollout >> nth=0")
    assert first.startswith(f"rollout {int(top['rollout'])}")
    page.hover("#token-view .token >> nth=0")
    facts = page.inner_text("#token-detail")
    token = run.tokens([step])
    token = token[(token["rollout"] == rollout) & (token["position"] == 0)].iloc[0]
    assert f"{float(token['prob']):.3g}"[:4] in facts
    assert errors == []
    page.close()


def test_one_cursor_for_all_charts_by_click_keys_and_box(browser: Any, report: Path) -> None:
    page, errors = opened(browser, report.as_uri())
    before = int(page.input_value("#step-box"))
    page.click("body", position={"x": 5, "y": 5})
    page.keyboard.press("ArrowRight")
    assert page.input_value("#step-box") == str(before + 1)
    page.fill("#step-box", "41")
    page.keyboard.press("Enter")
    until(page, "window.wapo.step === 41")
    chart = page.locator("#charts").bounding_box()
    page.mouse.click(chart["x"] + chart["width"] * 0.5, chart["y"] + 120)
    until(page, "window.wapo.step !== 41")
    assert abs(page.evaluate("window.wapo.step") - 30) <= 3
    assert page.evaluate("location.hash").endswith(f"step={page.evaluate('window.wapo.step')}")
    assert errors == []
    page.close()


def test_drag_zooms_all_charts_together(browser: Any, report: Path) -> None:
    page, errors = opened(browser, report.as_uri())
    places = "Bokeh.documents[0].roots().map((f) => f.x_range.end - f.x_range.start)"
    before = page.evaluate(places)
    chart = page.locator("#charts").bounding_box()
    page.mouse.move(chart["x"] + chart["width"] * 0.4, chart["y"] + 80)
    page.mouse.down()
    page.mouse.move(chart["x"] + chart["width"] * 0.6, chart["y"] + 140, steps=6)
    page.mouse.up()
    until(page, f"{places}[0] < {before[0] / 2}")
    after = page.evaluate(places)
    assert max(after) - min(after) < 1e-9
    assert errors == []
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 3840])
def test_every_width_and_colour_scheme_fits(
    browser: Any, report: Path, scheme: str, width: int
) -> None:
    view = {"viewport": {"width": width, "height": 800}, "color_scheme": scheme}
    page, errors = opened(browser, report.as_uri(), **view)
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, dark[4:-1].split(","))) < 200) == (scheme == "dark")
    assert errors == []
    page.close()


def test_tokens_are_read_by_keyboard(browser: Any, report: Path) -> None:
    page, _ = opened(browser, report.as_uri())
    page.wait_for_selector("#token-view .token")
    page.focus("#token-view .tokens")
    page.keyboard.press("ArrowRight")
    first = page.inner_text("#token-detail")
    page.keyboard.press("ArrowRight")
    assert page.inner_text("#token-detail") != first
    assert page.locator(".token.here").count() == 1
    page.close()


def test_a_token_shows_what_else_was_probable(browser: Any, report: Path, folder: Path) -> None:
    top = open_run(folder).topk()
    step = int(top["step"].max())
    page, errors = opened(browser, f"{report.as_uri()}#step={step}")
    until(page, "document.querySelectorAll('.token').length > 0")
    page.evaluate("document.querySelector('button.rollout[data-rollout=\"0\"]').click()")
    until(page, "document.querySelector('article .facts').textContent.includes('rollout 0,')")
    page.hover(".token >> nth=0")
    until(page, "document.querySelectorAll('table.top tbody tr').length > 0")
    here = top[(top["step"] == step) & (top["rollout"] == 0) & (top["position"] == 0)]
    rows = page.locator("table.top tbody tr")
    assert rows.count() == len(here)
    best = here.sort_values("place").iloc[0]
    assert f"{best['prob']:.3g}" in rows.nth(0).inner_text()
    assert f"{best['prob_after']:.3g}" in rows.nth(0).inner_text()
    page.locator("#token-detail").screenshot(path=str(folder.parent / "top.png"))
    assert not errors
    page.close()


def test_hostile_texts_run_nothing_and_hide_nothing(browser: Any, tmp_path: Path) -> None:
    texts = dict.fromkeys(("prompt", "completion", "answer", "vocab"), HOSTILE)
    path = write_fake_run(tmp_path / "run", drift="explosion", steps=20, label=HOSTILE, texts=texts)
    build_report([open_run(path)], tmp_path / "page.html")
    page, errors = opened(browser, (tmp_path / "page.html").as_uri())
    page.wait_for_selector("#token-view .token")
    assert page.evaluate("window.hit") is None
    assert page.locator("img").count() == 0
    shown = page.inner_text("main")
    assert not {"\u202e", "\x00", "\x1b"} & set(shown)
    assert errors == []
    page.close()


def test_a_large_page_is_small_and_quick(browser: Any, tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "run", drift="explosion", steps=2000, token_every=10)
    run = open_run(path)
    rows = len(run.tokens())
    assert rows > 15_000
    out = tmp_path / "page.html"
    build_report([run], out, rows=200_000)
    assert out.stat().st_size < 15_000_000
    began = time.perf_counter()
    page, errors = opened(browser, out.as_uri())
    assert time.perf_counter() - began < 2
    assert errors == []
    page.close()


def test_the_board_shows_new_steps_within_two_seconds(browser: Any, folder: Path) -> None:
    uvicorn = pytest.importorskip("uvicorn", reason="needs the extra [board]")
    from wapo_analysis.report.board import application, free_port

    port = free_port("127.0.0.1")
    config = uvicorn.Config(application([folder.parent]), port=port, log_level="error")
    server = uvicorn.Server(config)
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.05)
    page, errors = opened(browser, f"http://127.0.0.1:{port}/")
    log = folder / "steps.jsonl"
    kept = log.read_text()
    last = json.loads(kept.splitlines()[-1])
    del last["crc32"]
    try:
        with log.open("ab") as out:
            out.write(step_line({**last, "step": 61}))
        until(page, "window.wapo.steps.at(-1) === 61", 2)
        assert page.inner_text("#step-of") == "of 61"
    finally:
        log.write_text(kept)
    assert errors == []
    page.close()
    server.should_exit = True
    thread.join(5)


def test_no_serious_accessibility_fault(browser: Any, report: Path, tmp_path: Path) -> None:
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    asked = [npm, "install", "--prefix", str(tmp_path), "--no-save", "--ignore-scripts", "axe-core"]
    if subprocess.run(asked, capture_output=True).returncode:
        pytest.skip("axe-core cannot be installed from npm here")
    axe = tmp_path / "node_modules" / "axe-core" / "axe.min.js"
    for scheme in ("light", "dark"):
        context = browser.new_context(bypass_csp=True, color_scheme=scheme)
        page = context.new_page()
        page.goto(report.as_uri())
        page.wait_for_selector("#token-view .token")
        page.add_script_tag(path=str(axe))
        found = page.evaluate("axe.run()")["violations"]
        bad = [f"{v['id']}: {v['nodes'][0]['html'][:200]}" for v in found
               if v["impact"] in ("serious", "critical")]  # fmt: skip
        assert bad == [], scheme
        context.close()
