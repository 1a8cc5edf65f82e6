"""Advice speaks of the settings of the trainer that wrote the run."""

import ast
import re
from pathlib import Path

import pytest

import wapo_analysis.diagnose as package
from tests.support.builders import write_fake_run
from wapo_analysis.diagnose import diagnose
from wapo_analysis.diagnose.advice import in_names_of
from wapo_analysis.diagnose.drivers import CLASS_ADVICE
from wapo_analysis.store import open_run

OURS = re.compile(
    r"\b(lr|clip_eps|mask_ratio_\w+|minibatches|rollouts_per_prompt|max_new_tokens|dtype =)(?!\w)"
)


def written_advice() -> list[str]:
    """Every text that stands behind ``advice=`` in the detectors, and what is said of classes."""
    texts = [text for _, text in CLASS_ADVICE.values()]
    for file in Path(package.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.keyword) and node.arg == "advice":
                texts += [
                    part.value
                    for part in ast.walk(node.value)
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                ]
    return texts


@pytest.mark.parametrize("source", ["trl", "verl"])
def test_no_setting_of_ours_is_left_unexplained(source: str) -> None:
    texts = written_advice()
    assert sum(bool(OURS.search(text)) for text in texts) >= 12
    for text in texts:
        told = in_names_of(source, text).replace("actor.optim.lr", "")
        allowed = {"dtype ="} if source == "verl" else set()
        assert set(OURS.findall(told)) <= allowed, told


@pytest.mark.parametrize("source", ["built-in", "loop", None])
def test_other_sources_keep_our_names(source: str | None) -> None:
    for text in written_advice():
        assert in_names_of(source, text) == text


def test_a_trl_run_is_told_of_trl_settings(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "run", drift="explosion", manifest={"source": "trl"})
    advice = diagnose(open_run(path)).findings[0].advice
    assert "Lower learning_rate or epsilon_high" in advice
    assert "TRL has no setting for it; wapo train: exclude_bins = pos_valley" in advice
    ours = write_fake_run(tmp_path / "ours", drift="explosion")
    assert "Lower lr or clip_eps" in diagnose(open_run(ours)).findings[0].advice
