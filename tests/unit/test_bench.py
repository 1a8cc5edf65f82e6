"""Bench: harness, references, error gate, goals, page and command."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wapo_analysis.bench import reference, run
from wapo_analysis.bench.data import load_rows, rlvr_rows, token_columns, token_records
from wapo_analysis.bench.errors import GateError, errors_of, gate, gate_close, textbook_errors
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
from wapo_analysis.bench.head import Head, check
from wapo_analysis.bench.micro_step import MicroStep, Shape, Watcher
from wapo_analysis.bench.options import Options
from wapo_analysis.bench.page import shown, to_markdown
from wapo_analysis.bench.run import load, run_bench, save
from wapo_analysis.bench.step import overheads
from wapo_analysis.cli import run as wapo
from wapo_analysis.errors import UserError
from wapo_analysis.schema import TABLES
from wapo_analysis.stats import token_stats
from wapo_analysis.store import RunWriter, open_run

ROOT = Path(__file__).parents[2]
TINY = Shape(300, 32, 64, 2, 2, 2, "tiny")


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


# ---- references ----------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), temperature=st.sampled_from([0.3, 1.0, 2.5]))
def test_exact_stats_are_the_definitions(seed: int, temperature: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(5, 17, generator=draw, dtype=torch.float64)
    targets = torch.randint(17, (5,), generator=draw)
    p = torch.softmax(logits / temperature, -1)
    chosen = torch.nn.functional.one_hot(targets, 17).bool()
    exact = reference.exact_stats(logits, targets, temperature)
    others = torch.where(chosen, 0.0, p**2)
    torch.testing.assert_close(exact.logp, p[chosen].log())
    torch.testing.assert_close(exact.entropy, -(p * p.log()).sum(-1))
    torch.testing.assert_close(exact.collision_rest, others.sum(-1))
    torch.testing.assert_close(exact.collision_logp_rest, (others * p.log()).sum(-1))
    assert exact.top1.tolist() == (logits.argmax(-1) == targets).tolist()


def test_exact_stats_keep_their_digits_far_from_uncertainty() -> None:
    logits = torch.tensor([[60.0, 0.0, -1.0]], dtype=torch.float64)
    exact = reference.exact_stats(logits, torch.tensor([0]))
    rest = np.exp(-60.0) + np.exp(-61.0)
    assert float(exact.logp) == pytest.approx(-rest, rel=1e-14, abs=0)
    entropy = rest + 60 * np.exp(-60) + 61 * np.exp(-61)
    assert float(exact.entropy) == pytest.approx(entropy, rel=1e-14, abs=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_official_passes_compute_the_same_quantities(dtype: torch.dtype) -> None:
    rows = rlvr_rows(40, 500, dtype=dtype)
    exact = reference.exact_stats(rows.logits, rows.targets, 0.8)
    logp, entropy, collision, collision_logp = reference.four_pass(rows.logits, rows.targets, 0.8)
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    p = exact.logp.exp()
    assert float((logp.double() - exact.logp).abs().mean()) < tolerance
    assert float((entropy.double() - exact.entropy).abs().mean()) < tolerance
    assert float((collision.double() - exact.collision_rest - p**2).abs().mean()) < tolerance
    whole = exact.collision_logp_rest + p**2 * exact.logp
    assert float((collision_logp.double() - whole).abs().mean()) < tolerance
    three = reference.three_pass(rows.logits, rows.targets, 0.8)
    assert all(torch.equal(a, b) for a, b in zip(three, (logp, entropy, collision), strict=True))


def test_selective_takes_sequences_too_and_has_a_gradient() -> None:
    logits = torch.randn(2, 3, 7, requires_grad=True)
    targets = torch.randint(7, (2, 3))
    logp = reference.trl_selective(logits, targets)
    (gradient,) = torch.autograd.grad(logp.sum(), logits)
    expected = torch.nn.functional.one_hot(targets, 7) - logits.softmax(-1)
    torch.testing.assert_close(gradient, expected)


def test_npz_and_json_lines_hold_the_columns(tmp_path: Path) -> None:
    columns = dict(token_records(100).columns)
    file = tmp_path / "step.npz"
    file.write_bytes(reference.npz_bytes(columns))
    with np.load(file) as found:
        assert all(np.array_equal(found[k], v, equal_nan=True) for k, v in columns.items())
    lines = [json.loads(line) for line in reference.jsonl_bytes(columns).splitlines()]
    assert len(lines) == len(np.unique(columns["rollout"]))
    assert sum((line["token_id"] for line in lines), []) == columns["token_id"].tolist()


def test_pandas_summary_is_what_reading_the_run_gives(tmp_path: Path) -> None:
    writer = RunWriter(tmp_path / "run", {"temperature": 0.9})
    for step in (1, 2):
        writer.write_part(token_records(400, step), step)
    writer.close("finished")
    files = sorted((tmp_path / "run" / "tokens").glob("*.parquet"))
    found = reference.pandas_summary(files, 0.9)
    tokens = open_run(tmp_path / "run").tokens().astype({"entropy": "float64"})
    expected = tokens.groupby(["step", "cls"], as_index=False).agg(
        tokens=("entropy", "size"),
        entropy=("entropy", "mean"),
        pred_dentropy_sum=("pred_dentropy", "sum"),
        grad_mass=("grad_norm", "sum"),
    )
    assert len(found) > 4
    for name in expected.columns:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-12)


def test_eight_figures_are_drawn() -> None:
    pages = reference.official_plots(token_columns(2000))
    assert len(pages) == 8
    assert all(page.startswith(b"\x89PNG") for page in pages)


# ---- data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.47, 1.0])
def test_rows_are_as_certain_as_asked(share: float) -> None:
    rows = rlvr_rows(1500, 400, certain=share)
    mode = rows.logits.softmax(-1).max(-1).values
    assert float((mode > 0.99).float().mean()) == pytest.approx(share, abs=0.05)
    off_mode = (rows.logits.argmax(-1) != rows.targets) & (mode > 0.99)
    assert bool(off_mode.any()) == (share > 0)
    assert torch.equal(rlvr_rows(1500, 400, certain=share).logits, rows.logits)


def test_a_share_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"must be in \[0, 1\], got 1.5"):
        rlvr_rows(2, 5, certain=1.5)


def test_recorded_logits_are_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.npz"
    logits = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    np.savez(file, logits=logits, targets=np.array([0, 4, 2]), temperature=0.7)
    rows = load_rows(file)
    assert rows.temperature == pytest.approx(0.7)
    assert np.array_equal(rows.logits.numpy(), logits)
    assert rows.targets.tolist() == [0, 4, 2]


@pytest.mark.parametrize(
    ("arrays", "told"),
    [
        ({"logits": np.zeros((3, 5))}, "cannot read logits from"),
        ({"logits": np.zeros((3, 5)), "targets": np.zeros(2)}, "do not fit"),
        ({"logits": np.zeros(5), "targets": np.zeros(5)}, "do not fit"),
    ],
)
def test_bad_logits_files_are_told(
    tmp_path: Path, arrays: dict[str, np.ndarray], told: str
) -> None:
    file = tmp_path / "rows.npz"
    np.savez(file, **arrays)
    with pytest.raises(UserError, match=told):
        load_rows(file)


def test_token_rows_are_possible_tokens() -> None:
    columns = token_columns(5000)
    p, entropy = np.exp(columns["logp"]), columns["entropy"]
    assert set(columns) <= {column.name for column in TABLES["tokens"].stored}
    assert ((p > 0) & (p <= 1)).all()
    assert (entropy >= 0).all()
    assert (columns["collision_rest"] <= (1 - p) ** 2 * (1 + 1e-12) + 1e-18).all()
    assert (columns["position"][columns["rollout"] == 1] >= 0).all()
    starts = np.flatnonzero(np.diff(columns["rollout"])) + 1
    assert (columns["position"][starts] == 0).all()


# ---- the error gate ------------------------------------------------------------------------------


def test_the_gate_passes_ours_and_stops_wrong_numbers() -> None:
    rows = rlvr_rows(200, 700)
    exact = reference.exact_stats(rows.logits, rows.targets)
    stats = token_stats(rows.logits, rows.targets)
    assert gate("ours", stats, exact).worst < 1e-5
    for name in ("logp", "entropy", "collision_rest"):
        off = stats._replace(**{name: getattr(stats, name) * 1.001})
        with pytest.raises(GateError, match="off is not timed"):
            gate("off", off, exact)
    torn = stats._replace(entropy=stats.entropy.clone().index_fill_(0, torch.tensor([3]), np.nan))
    assert errors_of(torn, exact).worst == np.inf
    with pytest.raises(GateError):
        gate("torn", torn, exact)


def test_a_wrong_sign_is_counted() -> None:
    rows = rlvr_rows(50, 300)
    exact = reference.exact_stats(rows.logits, rows.targets)
    flipped = exact._replace(collision_logp_rest=torch.full_like(exact.logp, 10.0))
    assert errors_of(exact, exact).wrong_signs == 0
    assert errors_of(flipped, exact).wrong_signs > 0
    with pytest.raises(GateError, match="wrong signs"):
        gate("flipped", flipped, exact, must=np.inf)


def test_textbook_forms_fail_where_ours_do_not() -> None:
    rows = rlvr_rows(400, 2000)
    exact = reference.exact_stats(rows.logits, rows.targets)
    forms = textbook_errors(rows, exact)
    assert forms.grad_norm_off > 0.2
    assert forms.wrong_signs > 0.02
    assert errors_of(token_stats(rows.logits, rows.targets), exact).wrong_signs == 0


def test_a_reference_of_another_quantity_is_stopped() -> None:
    with pytest.raises(GateError, match="nats off on average"):
        gate_close("shifted", torch.ones(4), torch.zeros(4, dtype=torch.float64), 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_head_passes_its_check(dtype: torch.dtype) -> None:
    head = Head.random(24, 300, 16, dtype)
    check(head)
    for work in (head.official, head.beside):
        for found, base in zip(work(), head.plain(), strict=True):
            assert torch.equal(found, base)


def test_a_head_with_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    head = Head.random(24, 300, 16, torch.float32)
    hidden, weight = head.fused()
    monkeypatch.setattr(Head, "fused", lambda _: (hidden, 1.01 * weight))
    with pytest.raises(GateError, match="gradient of weight"):
        check(head)


# ---- a micro-step --------------------------------------------------------------------------------


def test_every_way_to_capture_makes_the_same_update(tmp_path: Path) -> None:
    ways = {
        "plain": lambda step: step.plain(),
        "official": lambda step: step.official(),
        "beside": lambda step: step.beside(Watcher.into(tmp_path / "beside")),
        "trainer": lambda step: step.trainer(Watcher.into(tmp_path / "trainer")),
        "fused": lambda step: step.fused(Watcher.into(tmp_path / "fused")),
    }
    weights = {}
    for name, way in ways.items():
        step = MicroStep(TINY, batch=2, length=9)
        way(step)
        weights[name] = torch.cat([p.detach().flatten() for p in step.model.parameters()])
    start = torch.cat(
        [p.detach().flatten() for p in MicroStep(TINY, batch=2, length=9).model.parameters()]
    )
    assert not torch.equal(weights["plain"], start)
    for name in ("official", "beside"):
        assert torch.equal(weights[name], weights["plain"]), name
    for name in ("trainer", "fused"):
        torch.testing.assert_close(weights[name], weights["plain"], atol=3e-6, rtol=0)


def test_the_recorder_of_a_micro_step_holds_the_step(tmp_path: Path) -> None:
    step = MicroStep(TINY, batch=2, length=9)
    watcher = Watcher.into(tmp_path / "run")
    step.beside(watcher)
    assert watcher.seconds > 0
    tokens = open_run(tmp_path / "run").tokens()
    assert len(tokens) == step.tokens
    assert np.isfinite(tokens["coef"]).all()
    assert (tokens["coef"] != 0).all()


def test_overheads_of_both_knobs(tmp_path: Path) -> None:
    found = overheads(MicroStep(TINY, batch=2, length=9), tmp_path, rounds=2)
    assert set(found) == {"capture_overhead_class_totals", "capture_overhead_full"}
    assert all(measure.value > 0 for measure in found.values())
    assert not open_run(tmp_path / "class_totals-0").token_steps()
    assert open_run(tmp_path / "full-0").token_steps()


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
