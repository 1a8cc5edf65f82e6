"""What ``import wapo_analysis`` hands out: a run and its doors."""

from pathlib import Path

import pytest

import wapo_analysis
from tests.support.builders import write_fake_run
from wapo_analysis.errors import UserError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> wapo_analysis.Run:
    path = tmp_path_factory.mktemp("runs") / "boom"
    return wapo_analysis.open_run(write_fake_run(path, drift="explosion", steps=24, token_every=8))


def test_a_run_diagnoses_and_draws_itself(run: wapo_analysis.Run) -> None:
    assert isinstance(run, wapo_analysis.Run)
    assert run.diagnose().verdict == "entropy_explosion"
    figure = run.plot("entropy")
    assert figure.axes[0].lines
    with pytest.raises(UserError, match="unknown figure 'entropi'"):
        run.plot("entropi")


def test_a_run_writes_its_report(run: wapo_analysis.Run, tmp_path: Path) -> None:
    out = run.report(tmp_path / "page.html")
    assert out == tmp_path / "page.html"
    assert "entropy explosion" in out.read_text()


def test_a_run_shows_itself_in_a_notebook(run: wapo_analysis.Run) -> None:
    shown = run._repr_html_()
    assert "boom" in shown
    assert "<table" in shown
