"""The performance page: harness, results, page and command."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from experiments.bench import run
from experiments.bench.__main__ import main
from experiments.bench.errors import GateError
from experiments.bench.harness import (
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
from experiments.bench.numbers import NUMBERS
from experiments.bench.options import Options
from experiments.bench.page import shown, to_markdown
from experiments.bench.run import load, merged, run_bench, save
from experiments.bench.scaling import Growth, page
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


@pytest.mark.slow
def test_a_process_that_fails_is_told_with_its_last_line() -> None:
    with pytest.raises(RuntimeError, match=r"bench\.memory no-such .*failed: .*Error"):
        in_fresh_process("experiments.bench.memory", ["no-such", "ours", "2", "4"])


# ---- numbers, results, page ----------------------------------------------------------------------


def test_numbers_are_named_once() -> None:
    assert len({number.key for number in NUMBERS}) == len(NUMBERS)
    assert len({number.name for number in NUMBERS}) == len(NUMBERS)


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


def test_results_hold_flat_keys_and_failures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measures = {"store_bytes_per_token": Measure(20.0, 19.0, 21.0, "some")}
    fake_areas(monkeypatch, store=measures, head=GateError("fused head is off"))
    found = run_bench(Options(), ["store", "head"])
    assert found["store_bytes_per_token"] == 20.0
    assert found["failures"] == {"head": "fused head is off"}
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
    second = load(ROOT / "docs" / "performance_second.json")
    again = (
        "python -m experiments.bench --results docs/performance.json "
        "--second docs/performance_second.json --doc docs/performance.md"
    )
    made = to_markdown(results, load(gpu) if gpu.exists() else None, second)
    assert page == made, f"run {again}"
    assert not results["failures"] | second["failures"]
    measured = {number.key for number in NUMBERS if not number.gpu}
    assert measured <= set(results["measures"]) | set(second["measures"]), again


def test_the_page_grades_nothing() -> None:
    page = (ROOT / "docs" / "performance.md").read_text().lower()
    for word in ("must", "target", "stretch", "falls short", "verdict"):
        assert not re.search(rf"\b{word}\b", page), word


def test_results_of_several_benches_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_areas(monkeypatch, store={"a": Measure(1.0), "b": Measure(2.0)}, head={"b": Measure(3.0)})
    parts = [run_bench(Options(), [area], command=area) for area in ("store", "head")]
    one = merged(parts)
    assert {name: found["value"] for name, found in one["measures"].items()} == {"a": 1, "b": 3}
    assert (one["a"], one["b"], one["command"]) == (1, 3, "store; head")
    assert one["seconds"] == sum(part["seconds"] for part in parts)
    parts[1]["machine"] = {**parts[1]["machine"], "cpu": "another"}
    with pytest.raises(UserError, match="several processors"):
        merged(parts)


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


def test_the_command_writes_files_and_reads_them_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_areas(monkeypatch, store={"store_bytes_per_token": Measure(20.0)})
    out, doc = tmp_path / "results.json", tmp_path / "page.md"
    assert main(["--only", "store", "--out", str(out), "--doc", str(doc)]) == 0
    assert "bytes on disk per token" in capfd.readouterr().out
    written = load(out)
    assert written["store_bytes_per_token"] == 20.0
    assert written["command"].endswith("--only store --out results.json --doc page.md")
    assert doc.read_text() == to_markdown(written)
    assert main(["--results", str(out)]) == 0
    assert "bytes on disk per token" in capfd.readouterr().out


def test_numbers_that_are_wrong_fail_the_command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    fake_areas(monkeypatch, head=GateError("fused head is off"))
    assert main(["--only", "head"]) == 1
    assert "head gave no numbers: fused head is off" in capfd.readouterr().out


@pytest.mark.slow
def test_the_gpu_script_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    paths = ":".join(path for path in sys.path if path)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.bench.gpu",
            *("--device", "cpu", "--tiny", "--out", str(out)),
        ],
        capture_output=True,
        text=True,
        env={"PATH": "", "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/taxonomy:{paths}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = load(out)
    assert found["measures"]["gpu_error_eager"]["value"] < 1e-5
    keys = {number.key for number in NUMBERS if number.gpu} - {"gpu_share_1b"}
    try:
        import trl.kernels.chunked_logprob  # noqa: F401
    except ImportError:
        keys -= {"gpu_speedup_vs_reference_trl", "gpu_fused_head_stats_vs_plain"}
    assert keys <= set(found["measures"])


# ---- scaling -------------------------------------------------------------------------------------


def test_a_growth_has_its_exponent_and_its_cost_of_one_more() -> None:
    growth = Growth("work", "rows", {10: 1.2146, 100: 12.146, 1_000: 121.46})
    assert growth.exponent == pytest.approx(1.0)
    assert growth.per_unit == pytest.approx(0.12146)
    assert "| 10: 1,210 · 100: 12,100 · 1,000: 121,000 |" in growth.row()


def test_the_estimate_multiplies_what_was_measured() -> None:
    names = ("vocabulary", "rows", "totals", "summary", "ranks", "steps")
    costs = {"rows": 5e-7, "totals": 1e-7, "summary": 1e-8}
    found = {
        name: Growth(name, "rows", {1: costs.get(name, 1.0), 2: 2 * costs.get(name, 1.0)})
        for name in names
    }
    text = page(found, 20.0, "command", "machine")
    assert "| 2.0 | 0.4 | 0.4 |" in text  # 4 million tokens a process
    assert "| 5.12 | 0 | 0.080 |" in text  # 256 million rows of 20 bytes
    assert "| class summary of one step, CPU seconds | 2.6 |" in text


def test_the_scaling_page_was_made_by_its_command() -> None:
    text, _, _ = (ROOT / "docs" / "scaling.md").read_text().partition("## On paper")
    assert "python -m experiments.bench.scaling --doc docs/scaling.md" in text
    exponents = re.findall(r"\| (\d\.\d\d) \|$", text, re.M)
    assert len(exponents) == 6
    assert max(map(float, exponents)) < 1.15, "nothing grows faster than its size"
