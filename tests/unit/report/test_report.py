"""The page: its data are the run's, it holds what it says, and no text of a run becomes code."""

import gzip
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from tests.support.builders import write_fake_run
from wapo_analysis import Recorder
from wapo_analysis.diagnose import diagnose
from wapo_analysis.errors import UserError, printable
from wapo_analysis.report import MODULES, build_report, bundle
from wapo_analysis.report.data import class_columns, run_data, step_columns
from wapo_analysis.report.steps import block, chosen_steps, merged_passes, rounded, step_data
from wapo_analysis.results import distinguishing
from wapo_analysis.store import Run, open_run

ROOT = Path(__file__).parents[3]
HOSTILE = "</script><script>alert(1)</script><!-- \u202e\x00\x1b[2J <img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    path = write_fake_run(tmp_path_factory.mktemp("page") / "run", drift="explosion", steps=30)
    return open_run(path)


@pytest.fixture(scope="module")
def page(run: Run) -> str:
    return build_report([run])


class Scripts(HTMLParser):
    """Elements of a page: scripts with their attributes and text, names of all tags."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.tags: list[str] = []
        self._open: dict[str, str | None] | None = None

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._open = dict(attrs) if tag == "script" else None

    def handle_data(self, data: str) -> None:
        if self._open is not None:
            self.scripts.append((self._open, data))

    def handle_endtag(self, tag: str) -> None:
        self._open = None


def parsed(page: str) -> Scripts:
    reader = Scripts()
    reader.feed(page)
    return reader


def embedded(page: str) -> dict[str, object]:
    (text,) = (t for a, t in parsed(page).scripts if a.get("id") == "page-data")
    data: dict[str, object] = json.loads(text)
    return data


def test_the_page_says_what_diagnose_says(run: Run, page: str) -> None:
    found = diagnose(run)
    (told,) = embedded(page)["runs"]  # type: ignore[misc]
    assert told["verdict"] == found.verdict == "entropy_explosion"
    assert (told["onset"], told["first_warning"]) == (found.onset_step, found.first_warning_step)
    assert [f["name"] for f in told["findings"]] == [f.name for f in found.findings]
    assert told["sentence"] == found.sentence
    (behind,) = [f for f in told["findings"] if f["tokens"]]
    assert found.culprits is not None
    assert f"at {behind['when']} comes from" in found.culprits.words()


def test_step_columns_are_those_of_the_run(run: Run) -> None:
    told = step_columns(run)
    np.testing.assert_allclose(told["values"]["entropy"], run.steps["entropy"], rtol=1e-5)
    assert told["units"]["entropy"] == "nats"


def test_class_columns_add_up_to_the_exact_totals(run: Run) -> None:
    told = class_columns(run)
    total = sum(sum(v) for v in told["pred_dentropy_sum"].values())
    cells = run.classes
    known = cells[cells["sign"] != 0]["pred_dentropy_sum"].sum()
    assert total == pytest.approx(known, rel=1e-4)


def test_a_step_travels_whole(run: Run) -> None:
    data = step_data(run, 12)
    raw = gzip.decompress(block(data))
    length = int.from_bytes(raw[:4], "little")
    head = json.loads(raw[4 : 4 + length])
    rows = merged_passes(run.tokens([12]))
    assert head["tokens"]["count"] == len(rows)
    form, at = head["tokens"]["arrays"]["pred_dentropy"]
    planes = np.frombuffer(raw[4 + length + at :][: 3 * len(rows)], np.uint8).reshape(3, -1)
    words = sum(planes[i].astype(np.uint32) << (8 * (i + 1)) for i in range(3))
    got = np.asarray(words, "<u4").view("<f4")
    assert form == "f3"
    np.testing.assert_allclose(got, rows["pred_dentropy"], rtol=1e-3, atol=1e-12)


def test_a_step_whose_logits_were_not_finite_travels_without_their_alternatives(
    tmp_path: Path,
) -> None:
    ids, logits = torch.tensor([[1, 2, 0]]), torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    logits = logits.expand(1, 3, 4).clone()
    logits[0, 1] = torch.nan
    with Recorder(tmp_path / "r", topk=2) as recorder:
        logp = logits.log_softmax(-1).gather(2, ids[..., None])[..., 0].requires_grad_()
        recorder.watch(logp, ids, torch.ones(1, 3), torch.ones(1), None, logits=logits)
        logp.nansum().backward()
        recorder.finish_step(1)
    assert recorder.failure is None
    data = step_data(open_run(tmp_path / "r"), 1)
    assert data["top"] == {"0": {n: [[0, 0.5, None], [1, 0.25, None]] for n in ("0", "2")}}
    assert block(data)


def test_passes_of_a_token_become_one_row_with_the_sum_of_what_they_did() -> None:
    rows = pd.DataFrame(
        {
            "rollout": [0, 0], "group": [0, 0], "position": [3, 3], "minibatch": [1, 0],
            "cls": ["neg_peak", "neg_peak"], "logp": [-2.0, -1.0], "grad_norm": [1.0, 2.0],
            "pred_dentropy": [0.5, 0.25], "coef": [-1.0, -2.0], "dprob": [0.2, 0.1],
            "dentropy": [0.02, 0.01],
        }
    )  # fmt: skip
    (one,) = merged_passes(rows).to_dict("records")
    assert (one["logp"], one["grad_norm"], one["pred_dentropy"]) == (-1.0, 3.0, 0.75)
    assert (one["coef"], one["dprob"]) == (-3.0, 0.2)


def test_rounding_keeps_three_digits_and_nan() -> None:
    values = np.array([1.2345678, -3e-7, np.nan, 0.0], "<f4")
    got = rounded(values)
    np.testing.assert_allclose(got[[0, 1, 3]], values[[0, 1, 3]], rtol=5e-4)
    assert np.isnan(got[2])
    assert not (got.view("<u4") & 0x1FFF).any()


def test_steps_that_findings_name_come_first_and_the_budget_holds(run: Run) -> None:
    tokens = int(run.steps["tokens"].iloc[0])
    chosen = chosen_steps(run, [13], 3 * tokens)
    assert 13 in chosen
    assert len(chosen) == 3
    assert chosen_steps(run, [], 10**9) == run.token_steps()


def test_the_page_says_what_it_leaves_out(run: Run) -> None:
    tokens = int(run.steps["tokens"].iloc[0])
    small = build_report([run], rows=2 * tokens)
    assert "2 of 30 recorded steps" in small
    assert "recorded steps of" not in build_report([run], rows=10**9)


def test_the_same_runs_give_the_same_page(run: Run, page: str) -> None:
    assert build_report([run]) == page


def test_nothing_is_loaded_and_only_our_scripts_may_run(page: str) -> None:
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy is not None
    assert "default-src 'none'" in policy[1]
    assert "unsafe-eval" not in policy[1]
    assert "unsafe-inline" not in policy[1].split("style-src")[0]
    found = parsed(page)
    assert not {"link", "iframe", "object", "img"} & set(found.tags)
    assert not any(attributes.get("src") for attributes, _ in found.scripts)


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    path = write_fake_run(tmp_path / "run", drift="explosion", steps=12, label=HOSTILE)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "name": HOSTILE}))
    page = build_report([open_run(path)])
    plain = parsed(build_report([open_run(write_fake_run(tmp_path / "plain", steps=12))]))
    found = parsed(page)
    code = [t for a, t in found.scripts if not a.get("type")]
    assert code == [t for a, t in plain.scripts if not a.get("type")]
    assert "img" not in found.tags
    (told,) = embedded(page)["runs"]  # type: ignore[misc]
    assert told["name"] == printable(HOSTILE)


def test_one_bundle_without_names_declared_twice() -> None:
    code = bundle()
    assert not re.search(r"(?m)^(import|export) ", code)
    names = re.findall(r"(?m)^(?:async )?(?:function|class|const|let) (\w+)", code)
    assert len(names) == len(set(names))
    files = {f.stem for f in (ROOT / "wapo_analysis/report/page").glob("*.mjs")}
    assert files == set(MODULES)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_the_page_code_in_node() -> None:
    done = subprocess.run(
        ["node", "--test", "tests/page"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_several_runs_bring_the_table_and_their_settings(tmp_path: Path) -> None:
    runs = [
        open_run(write_fake_run(tmp_path / str(seed), steps=12, seed=seed)) for seed in range(2)
    ]
    data = embedded(build_report(runs))
    assert len(data["runs"]) == 2  # type: ignore[arg-type]
    assert data["comparison"]["rows"]  # type: ignore[index]
    assert len({one["setting"] for one in data["runs"]}) == 1  # type: ignore[attr-defined]


def test_prompts_are_shown_by_what_sets_them_apart() -> None:
    head = "<|im_start|>system You are a helpful assistant. user "
    asked = [f"{head}What is {n}+1? <|end|>" for n in (3, 4)]
    assert distinguishing(asked) == ["... 3+1? ...", "... 4+1? ..."]
    assert distinguishing(["same", "same"]) == ["same", "same"]
    assert distinguishing(["", "a"]) == ["", "a"]


def test_no_runs_and_a_bad_place_are_one_line(run: Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least one run"):
        build_report([])
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write report"):
        build_report([run], tmp_path / "file" / "report.html", rows=0)


def test_a_page_is_written_over_a_page_and_over_nothing_else(
    run: Run, page: str, tmp_path: Path
) -> None:
    log, old, empty = tmp_path / "train.html", tmp_path / "old.html", tmp_path / "empty.html"
    log.write_text("<table><tr><td>reward</td></tr></table>")
    old.write_text(page.replace("neg_peak", "other"))
    empty.touch()
    for taken in (log, tmp_path, Path("/dev/null")):
        with pytest.raises(UserError, match="is no page of wapo; choose another --out"):
            build_report([run], taken)
    assert log.read_text().startswith("<table>")
    for free in (old, empty):
        build_report([run], free)
        assert free.read_text() == page


def test_a_best_step_is_named_after_a_failure_and_no_rollouts_are_said(tmp_path: Path) -> None:
    for name, last, best in (("well", 0.5, None), ("lost", 0.0, 20)):
        with Recorder(tmp_path / name) as recorder:
            for step in range(1, 41):
                recorder.finish_step(step, reward=0.5 if step <= 20 else last)
        data = run_data(open_run(tmp_path / name))
        assert data["best_step"] == best
        assert bool(data["best_words"]) == (best is not None)
        assert data["has_rollouts"] is False


def test_numbers_of_a_run_are_finite_or_null(run: Run) -> None:
    json.dumps(run_data(run), allow_nan=False)
