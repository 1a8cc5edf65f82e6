"""The same program on every kind of number: kind, dtype and device kept, values equal."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
import wapo_taxonomy as wt

from tests.unit.taxonomy.test_taxonomy_reference import statistics

LOGITS = np.array([2.0, 1.0, 0.5, -1.0, 12.0])
FIELDS = ("prob", "complement", "logp", "entropy", "collision_rest", "collision_logp_rest")
ROWS = [statistics(LOGITS, y) for y in range(5)]
FLOATS = {name: [float(getattr(row, name)) for row in ROWS] for name in FIELDS}
ADVANTAGE = [1.0, -1.0, 0.0, float("nan"), 2.0]

KINDS = {
    "numpy32": lambda x: np.array(x, np.float32),
    "numpy64": lambda x: np.array(x, np.float64),
    "torch32": lambda x: torch.tensor(x, dtype=torch.float32),
    "torch64": lambda x: torch.tensor(x, dtype=torch.float64),
    "pandas32": lambda x: pd.Series(x, dtype="float32", index=list("abcde")),
    "pandas64": lambda x: pd.Series(x, dtype="float64", index=list("abcde")),
    "scalar": lambda x: np.float64(x[0]),
    "cuda": lambda x: torch.tensor(x, dtype=torch.float32, device="cuda"),
}
CPU_KINDS = [kind for kind in KINDS if kind != "cuda"]
EVERY_KIND = [
    *CPU_KINDS,
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


def results(a, s: dict) -> dict:
    """Call every elementwise function of the package once."""
    p, q, c = s["prob"], s["complement"], s["collision_rest"]
    step = wt.logit_step(a, temperature=0.5, lr=0.1)
    code = wt.class_code(a, p, q, c)
    return {
        "sign_code": wt.sign_code(a),
        "is_peak": wt.is_peak(p, q, c),
        "regime_code": wt.regime_code(p, q, c),
        "class_code": code,
        "rule": wt.rule_dentropy_sign(code),
        "valley_depth": wt.valley_depth(p, q, c),
        "collision": wt.collision(p, c),
        "collision_logp": wt.collision_logp(p, s["logp"], s["collision_logp_rest"]),
        "logit_step": step,
        "grad_norm": wt.grad_norm(a, q, c, 0.5),
        "dprob_sampled": wt.dprob_sampled(step, p, q, c),
        "dprob_other": wt.dprob_other(step, q, p, wt.collision(p, c)),
        "dentropy": wt.dentropy(step, p, q, s["logp"], s["entropy"], c, s["collision_logp_rest"]),
    }


INTEGERS = ("sign_code", "regime_code", "class_code", "rule")


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_kind_and_values_are_kept(kind: str) -> None:
    make = KINDS[kind]
    like = make(ADVANTAGE)
    got = results(like, {name: make(values) for name, values in FLOATS.items()})
    for i in range(like.size if isinstance(like, np.float64) else len(like)):
        expected = results(ADVANTAGE[i], {name: values[i] for name, values in FLOATS.items()})
        for name, value in got.items():
            assert type(value) is type(like) or (kind == "scalar" and np.isscalar(value)), name
            flat = np.atleast_1d(value.cpu() if isinstance(value, torch.Tensor) else value)
            slack = 1e-6 if name == "dprob_other" else 0.0  # its S - p_y - p_v cancels in float32
            value_i = pytest.approx(float(expected[name]), rel=2e-6, abs=slack, nan_ok=True)
            assert float(flat[i]) == value_i, name
            if kind != "scalar":
                check_dtype(name, value, like)


def check_dtype(name: str, value, like) -> None:
    if name == "is_peak":
        assert "bool" in str(value.dtype)
    elif name in INTEGERS:
        assert "int" in str(value.dtype)
    else:
        assert value.dtype == like.dtype, name
    if isinstance(like, torch.Tensor):
        assert value.device == like.device
    if isinstance(like, pd.Series):
        assert value.index.equals(like.index)


def test_python_numbers_stay_python_numbers() -> None:
    got = results(1.0, {name: values[0] for name, values in FLOATS.items()})
    for name in INTEGERS:
        assert type(got[name]) is int, name
    plain = results(1, {"prob": 0.5, "complement": 0.5, "logp": -0.7, "entropy": 0.7} | ONE_OTHER)
    assert type(plain["is_peak"]) is bool
    assert {type(v) for k, v in plain.items() if k not in INTEGERS} == {bool, float}


ONE_OTHER = {"collision_rest": 0.25, "collision_logp_rest": -0.17}


def test_scalars_broadcast_against_arrays() -> None:
    s = {name: np.array(values) for name, values in FLOATS.items()}
    codes = wt.class_code(-1.0, s["prob"], s["complement"], s["collision_rest"])
    assert codes.tolist() == [3, 3, 3, 3, 2]
    rows = wt.class_code(
        torch.tensor([[1.0], [0.0], [-1.0]]),
        *(torch.tensor(s[name]) for name in ("prob", "complement", "collision_rest")),
    )
    assert rows.tolist() == [[1, 1, 1, 1, 0], [4] * 5, [3, 3, 3, 3, 2]]


def test_inputs_are_not_changed() -> None:
    arrays = {name: np.array(values) for name, values in FLOATS.items()}
    before = {name: values.copy() for name, values in arrays.items()}
    results(np.array(ADVANTAGE), arrays)
    for name, values in arrays.items():
        np.testing.assert_array_equal(values, before[name])
    probs = np.array([0.5, 0.3, 0.2])
    wt.predict(probs, 0)
    wt.simulate(probs, 0, 1.0, 0.1, 3)
    assert probs.tolist() == [0.5, 0.3, 0.2]


def test_gradients_flow_through_the_formulas() -> None:
    """dH as a function of the logits can sit inside a loss."""

    def change(logits: torch.Tensor) -> torch.Tensor:
        return wt.predict(torch.softmax(logits, 0), 1, 0.3).dentropy

    logits = torch.tensor([1.0, 0.2, -0.7, 0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(change, (logits,))


def test_package_loads_nothing_but_the_standard_library() -> None:
    program = (
        "import sys; before = set(sys.modules); import wapo_taxonomy; "
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}; "
        "print(sorted(new - set(sys.stdlib_module_names)))"
    )
    path = wt.__path__[0].rpartition("wapo_taxonomy")[0]
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {path!r}); {program}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == "['wapo_taxonomy']"
