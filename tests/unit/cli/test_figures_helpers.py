"""``wapo figures`` where the process that helps to draw dies."""

import os
from pathlib import Path
from typing import Any

import pytest

from wapo_analysis.cli import figures as figures_module
from wapo_analysis.plots import FIGURES


def _die(*_: Any) -> None:
    os._exit(9)


@pytest.mark.slow
def test_figures_of_a_helper_that_dies_are_drawn_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name, spec in FIGURES.items() if spec.group == "theory"][:2]
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    figures_module.write_figures([], tmp_path / "alone", "png", names)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(figures_module, "_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(figures_module, "_draw_elsewhere", _die)
    assert figures_module.write_figures([], tmp_path / "helped", "png", names) == len(names) == 2
    for name in names:
        alone, helped = (tmp_path / f / f"{name}.png" for f in ("alone", "helped"))
        assert alone.read_bytes() == helped.read_bytes()
