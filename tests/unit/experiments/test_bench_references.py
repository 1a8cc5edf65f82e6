"""Bench: references, data and the error gate."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.bench import reference
from experiments.bench.data import load_rows, rlvr_rows, token_columns, token_records
from experiments.bench.errors import GateError, errors_of, gate, gate_close, textbook_errors
from experiments.bench.head import Head, check
from wapo_analysis.derive import class_codes
from wapo_analysis.errors import UserError
from wapo_analysis.schema import TABLES
from wapo_analysis.stats import token_stats
from wapo_analysis.store import RunWriter, open_run

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
    tokens = tokens.assign(cls=class_codes(tokens["cls"]))
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
