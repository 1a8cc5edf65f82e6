"""Every backend gives the eager numbers; Triton in its interpreter, where it is installed."""

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.support.exact_stats import assert_close, by_float64, drawn, some_targets
from wapo_analysis import UserError
from wapo_analysis.stats import eager, token_stats
from wapo_analysis.stats import logits as backends

ROOT = Path(__file__).parents[3]
# torch.compile uses what torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None or " " in torch.__file__,
    reason="torch.compile needs a C++ compiler, and torch in a folder without a space",
)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

INTERPRETED = """
import sys, pytest
options = ["-q", "-p", "no:cacheprovider", "-m", ""]
sys.exit(pytest.main([*options, "tests/unit/stats/triton_cases.py"]))
"""


@needs_triton
def test_the_triton_kernel_in_its_interpreter() -> None:
    """In a process of its own: the interpreter is chosen when the kernel is defined."""
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]


@pytest.mark.skipif(find_spec("triton") is not None, reason="triton is installed")
def test_without_triton_asking_for_it_says_so() -> None:
    with pytest.raises(UserError, match="'triton' cannot run here: triton is not installed"):
        token_stats(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), backend="triton")


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter takes CPU tensors")
@needs_triton
def test_on_a_cpu_asking_for_triton_says_what_is_missing() -> None:
    with pytest.raises(UserError, match="the logits are on cpu, not on a CUDA device"):
        token_stats(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("padding", [0, 50], ids=["finite", "padded"])
def test_the_program_that_is_compiled_is_right_before_it_is(
    dtype: torch.dtype, padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same operations without a compiler; which rows are finite chooses one of two."""
    monkeypatch.setattr(eager, "_kernel", lambda program: program)
    monkeypatch.setattr(eager, "_dynamic", lambda *tensors: tensors)
    for temperature, gap in ((1.0, 15.0), (0.5, 35.0)):
        logits = torch.nn.functional.pad(drawn(70, 300, 3, gap), (0, padding), value=-torch.inf)
        logits, targets = logits.to(dtype), some_targets(logits[:, :300], 1)
        stats = token_stats(logits, targets, temperature, topk=3, backend="compile")
        rtol = 1e-11 if dtype == torch.float64 else 5e-6
        exact = by_float64(logits, targets, temperature)
        assert_close(type(stats)(*stats[:5]), exact, rtol)
        ids = logits.sort(dim=1, descending=True, stable=True).indices
        assert torch.equal(stats.top_ids, ids[:, :3])
        some = token_stats(logits, targets, temperature, backend="compile", chunk_rows=11)
        assert_close(some, exact, rtol)


@pytest.mark.parametrize("padding", [0, 9])
def test_finite_rows_take_the_quick_sums_alone(
    padding: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []

    def kernel(program: Any) -> Any:
        used.append(program.__name__)
        return program

    monkeypatch.setattr(eager, "_kernel", kernel)
    monkeypatch.setattr(eager, "_dynamic", lambda *tensors: tensors)
    logits = torch.nn.functional.pad(drawn(9, 30, 3), (0, padding), value=-torch.inf)
    token_stats(logits, torch.zeros(9, dtype=torch.long), backend="compile")
    careful = ["_compiled_sums"] if padding else []
    assert used == ["_compiled_maxima", "_quick_sums", *careful]


def test_quick_sums_are_the_careful_ones_of_finite_rows() -> None:
    rows = torch.randn(20, 90, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 9
    origin, scale = rows.sort(1).values[:, -2:-1], torch.tensor(1.7, dtype=torch.float64)
    quick = eager._quick_sums(rows, origin, scale, 2.0**-140)
    careful = eager._compiled_sums(rows, origin, scale, -140.0)
    for one, other in zip(quick, careful, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)
    x = ((rows - origin) * 1.7).clamp(max=0)
    e = 2**x
    expected = (e, e * x, e * e, e * e * x)
    for one, term in zip(careful, expected, strict=True):
        torch.testing.assert_close(one, term.sum(1, keepdim=True), rtol=1e-12, atol=0)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_compiled_kernel_equals_float64(dtype: torch.dtype, finite: bool) -> None:
    """Finite rows take the quick sums, the others the careful ones."""
    for rows, vocabulary, temperature, gap in ((40, 5000, 1.0, 15.0), (7, 5000, 0.5, 35.0)):
        logits = drawn(rows, vocabulary, rows, gap).to(dtype)
        targets = some_targets(logits[:, :-50], 1)
        good = torch.ones(rows, dtype=torch.bool)
        if not finite:
            logits[:, -50:] = -torch.inf
            logits[1, 3], logits[2, 4] = torch.nan, torch.inf
            good[1:3] = False
        stats = token_stats(logits, targets, temperature, topk=3, backend="compile")
        assert stats.logp[~good].isnan().all()
        picked = type(stats)(*(part[good] for part in stats))
        rtol = 1e-11 if dtype == torch.float64 else 5e-6
        assert_close(picked, by_float64(logits[good], targets[good], temperature), rtol)
        ids = logits[good].sort(dim=1, descending=True, stable=True).indices
        assert torch.equal(picked.top_ids, ids[:, :3])


@pytest.mark.slow
@needs_compiler
def test_the_compiled_kernel_has_the_same_gradient_and_takes_masks() -> None:
    logits = drawn(12, 300, 1, 5.0).view(3, 4, 300)[:, 1:].float().requires_grad_()
    targets, mask = torch.arange(9).view(3, 3), torch.eye(3, dtype=torch.bool)
    grads = []
    for backend in ("eager", "compile"):
        stats = token_stats(logits, targets, 1.3, mask, backend=backend)
        grads.append(torch.autograd.grad(stats.logp.sum(), logits)[0])
    torch.testing.assert_close(*grads)
    assert token_stats(logits, targets, 1.0, mask & False, backend="compile").logp.shape == (0,)


def test_the_kernel_is_chosen_where_it_can_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every case that a machine cannot have at once; which program is chosen, nothing is run."""
    here, there = torch.device("cpu"), torch.device("cuda", 0)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    for installed, dtype, device, interpreted, obstacle in (
        (False, torch.float32, there, "1", "triton is not installed"),
        (True, torch.float64, there, "1", "float64 is reduced by 'eager'"),
        (True, torch.float32, there, "0", None),
        (True, torch.bfloat16, here, "1", None),
        (True, torch.float32, here, "0", "the logits are on cpu, not on a CUDA device"),
    ):
        monkeypatch.setattr(backends, "find_spec", lambda _, found=installed: found or None)
        monkeypatch.setenv("TRITON_INTERPRET", interpreted)
        logits = SimpleNamespace(dtype=dtype, device=device, is_cuda=device.type == "cuda")
        assert backends._no_triton(logits) == obstacle  # type: ignore[arg-type]
    monkeypatch.setattr(backends, "find_spec", lambda _: None)
    for name, on_gpu, chosen in (
        ("auto", False, eager.reduce_rows),
        ("auto", True, eager.reduce_rows),  # without Triton
        ("eager", True, eager.reduce_rows),
        ("compile", False, eager.reduce_compiled),
    ):
        assert backends.reducer(name, SimpleNamespace(is_cuda=on_gpu)) is chosen  # type: ignore[arg-type]
    monkeypatch.setattr(backends, "find_spec", lambda _: SimpleNamespace())
    there_too = SimpleNamespace(is_cuda=True, dtype=torch.float32)
    for name, chosen in (("eager", eager.reduce_rows), ("compile", eager.reduce_compiled)):
        assert backends.reducer(name, there_too) is chosen, "asked for by name"  # type: ignore[arg-type]


def test_where_nothing_can_be_compiled_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(config, "force_disable_caches", True)
    torch._dynamo.reset()
    with pytest.raises(UserError, match="backend 'compile' cannot run here: .*ompiler"):
        token_stats(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long), backend="compile")
