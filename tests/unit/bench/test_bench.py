"""Bench: harness, goals, results, page and command."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from wapo_analysis.bench import run
from wapo_analysis.bench.errors import GateError
from wapo_analysis.bench.goals import GOALS, judge
from wapo_analysis.bench.harness import (
    Measure,
    Measures,
    Timings,
    in_fresh_process,
    interleave,
    keep_memory,
    map_memory,
    peak_bytes,
    worst,
)
from wapo_analysis.bench.options import Options
from wapo_analysis.bench.page import shown, to_markdown
from wapo_analysis.bench.run import load, run_bench, save
from wapo_analysis.cli import run as wapo
from wapo_analysis.errors import UserError

ROOT = Path(__file__).parents[3]


# ---- harness -------------------------------------------------------------------------------------


def test_variants_take_turns_and_the_first_one_changes() -> None:
    calls: list[str] = []
    variants = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = interleave(variants, rounds=3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert all(len(seconds) == 3 for seconds in times.seconds.values())


def test_warm_variants_are_not_run_before() -> None:
    calls: list[int] = []
    interleave({"a": lambda: calls.append(1)}, rounds=2, warm=True)
    assert len(calls) == 2


def test_ratio_is_the_median_within_rounds() -> None:
    times = Timings({"own": [1.0, 20.0, 3.0], "base": [1.0, 10.0, 1.0]})
    assert times.ratio("own", "base") == Measure(2.0, 1.0, 3.0)
    assert times.ratio("own", "base").inverse() == Measure(0.5, 1 / 3, 1.0)
    assert times.ratio("own", "base").shifted(-1.0) == Measure(1.0, 0.0, 2.0)
    assert worst([Measure(1.0), Measure(3.0), Measure(2.0)]).value == 3.0


@pytest.mark.parametrize("told", [keep_memory, map_memory])
def test_peak_memory_counts_what_is_freed_again(told: Callable[[], bool]) -> None:
    size = 64 << 20
    told()
    try:
        torch.ones(3 * size, dtype=torch.uint8)  # freed, and perhaps handed out again
        used = peak_bytes(lambda: torch.ones(size, dtype=torch.uint8).max())
        assert 0.9 * size < used < 1.5 * size
        assert peak_bytes(lambda: None) < 0.1 * size
    finally:
        map_memory()


def test_a_process_that_fails_is_told_with_its_last_line() -> None:
    with pytest.raises(RuntimeError, match=r"bench\.memory no-such .*failed: .*Error"):
        in_fresh_process("wapo_analysis.bench.memory", ["no-such", "ours", "2", "4"])


# ---- goals, results, page ------------------------------------------------------------------------


def test_goals_are_in_order_and_named_once() -> None:
    assert len({goal.id for goal in GOALS}) == len({goal.key for goal in GOALS}) == len(GOALS)
    for goal in GOALS:
        bounds = (goal.stretch, goal.target, goal.must)
        assert bounds == tuple(sorted(bounds, reverse=goal.more_is_better)), goal.id
        assert goal.gpu == goal.key.startswith("gpu_")


def test_verdicts_at_the_bounds() -> None:
    less = next(goal for goal in GOALS if goal.id == "1")
    more = next(goal for goal in GOALS if goal.id == "16a")
    cases = [(less, 0.15, "stretch"), (less, 0.25, "target"), (less, 0.35, "pass")]
    cases += [(less, 0.3501, "falls short"), (more, 15.0, "stretch"), (more, 7.0, "target")]
    cases += [(more, 4.0, "pass"), (more, 3.99, "falls short")]
    for goal, value, verdict in cases:
        assert goal.verdict(value) == verdict
    assert less.verdict(None) == "not run"
    assert less.verdict(float("nan")) == "falls short"


def fake_areas(monkeypatch: pytest.MonkeyPatch, **measures: Measures | Exception) -> None:
    """Replace the areas by ones that give or raise what is said."""

    class Area:
        def __init__(self, found: Measures | Exception) -> None:
            self.found = found

        def measure(self, _: Options) -> Measures:
            if isinstance(self.found, Exception):
                raise self.found
            return self.found

    monkeypatch.setattr(run, "AREAS", tuple(measures))
    monkeypatch.setattr(run, "import_module", lambda name: Area(measures[name.rpartition(".")[2]]))


def test_results_hold_flat_keys_goals_and_failures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measures = {"store_bytes_per_token": Measure(20.0, 19.0, 21.0, "some")}
    fake_areas(monkeypatch, store=measures, head=GateError("fused head is off"))
    found = run_bench(Options(), ["store", "head"])
    assert found["store_bytes_per_token"] == 20.0
    assert found["failures"] == {"head": "fused head is off"}
    verdicts = {goal["id"]: goal["verdict"] for goal in found["goals"]}
    assert verdicts["17"] == "target"
    assert verdicts["6"] == "not run"
    save(found, tmp_path / "results.json")
    assert load(tmp_path / "results.json") == json.loads(json.dumps(found))
    page = to_markdown(found)
    assert "20 (19 to 21)" in page
    assert "fused head is off" in page


def test_threads_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_areas(monkeypatch, store={})
    before = torch.get_num_threads()
    run_bench(Options(), ["store"], threads=before + 1)
    assert torch.get_num_threads() == before


def test_an_unknown_area_is_told() -> None:
    with pytest.raises(UserError, match="'speed'"):
        run_bench(Options(), ["speed"])


@pytest.mark.parametrize("text", ["", "[]", '{"measures": {}}'])
def test_files_without_results_are_told(tmp_path: Path, text: str) -> None:
    file = tmp_path / "results.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"results\.json"):
        load(file)


def test_numbers_are_shown_by_unit() -> None:
    assert shown(0.0123, "%") == "1.2%"
    assert shown(3.4e-6, "rel") == "3.4e-06"
    assert shown(0.0, "count") == "0"
    assert shown(22.0, "bytes") == "22"
    assert shown(0.12345, "x") == "0.123"
    assert shown(None, "x") == "-"


def test_the_page_is_made_from_the_results_beside_it() -> None:
    results = json.loads((ROOT / "docs" / "performance.json").read_text())
    gpu = ROOT / "docs" / "performance_gpu.json"
    page = (ROOT / "docs" / "performance.md").read_text()
    again = "wapo bench --results docs/performance.json --doc docs/performance.md"
    assert page == to_markdown(results, load(gpu) if gpu.exists() else None), f"run {again}"
    assert not results["failures"]
    assert [row["id"] for row in results["goals"]] == [row["id"] for row in judge({})], again


def test_gpu_numbers_reach_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_areas(monkeypatch, store={})
    results = run_bench(Options(), ["store"])
    assert "No GPU was used" in to_markdown(results)
    measures = {"gpu_share_1b": {"value": 0.004, "low": 0.003, "high": 0.006, "note": "x"}}
    gpu = {"command": "python it.py", "machine": {"gpu": "H200"}, "measures": measures}
    page = to_markdown(results, gpu)
    assert "0.4% (0.3% to 0.6%)" in page
    assert "gpu H200" in page
    assert "No GPU was used" not in page


# ---- command -------------------------------------------------------------------------------------


def test_the_command_prints_json_writes_files_and_reads_them_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_areas(monkeypatch, store={"store_bytes_per_token": Measure(20.0)})
    out, doc = tmp_path / "results.json", tmp_path / "page.md"
    arguments = ["bench", "--only", "store", "-f", "json", "--out", str(out), "--doc", str(doc)]
    assert wapo(arguments) == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["store_bytes_per_token"] == 20.0
    assert doc.read_text() == to_markdown(printed)
    assert wapo(["bench", "--results", str(out)]) == 0
    assert "bytes on disk per token" in capfd.readouterr().out


def test_numbers_that_are_wrong_fail_the_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_areas(monkeypatch, head=GateError("fused head is off"))
    assert wapo(["bench", "--only", "head"]) == 1
    assert "head gave no numbers: fused head is off" in capfd.readouterr().out


def test_mistakes_are_one_line(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments in (["--only", "speed"], ["--results", str(tmp_path / "none.json")]):
        assert wapo(["bench", *arguments]) == 2
        assert capfd.readouterr().err.startswith("wapo: ")


def test_the_gpu_script_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    script = str(ROOT / "experiments" / "gpu_bench.py")
    paths = ":".join(path for path in sys.path if path)
    done = subprocess.run(
        [sys.executable, script, "--device", "cpu", "--tiny", "--out", str(out)],
        capture_output=True,
        text=True,
        env={"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/taxonomy:{paths}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = load(out)
    assert found["measures"]["gpu_error_eager"]["value"] < 1e-5
    keys = {goal.key for goal in GOALS if goal.gpu} - {"gpu_share_1b"}
    try:
        import trl.kernels.chunked_logprob  # noqa: F401
    except ImportError:
        keys -= {"gpu_speedup_vs_reference_trl", "gpu_fused_head_stats_vs_plain"}
    assert keys <= set(found["measures"])
