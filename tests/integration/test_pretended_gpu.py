"""The GPU tier on a device that is not there: device faults and waits of the host show on a CPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from experiments import gpu_five_minutes as five_minutes

ROOT = Path(__file__).parents[2]
# Reports and several processes: minutes, for lines the others have been through.
SLOW = ["tests/gpu/test_recipe_cuda.py"]
# One training of each kind and small vocabularies; others take the same lines, and the most time.
FEW = "not (151936 or 50257 or 32000 or wapo or probe or adapters or (every_way and replace))"
needs_backend = pytest.mark.skipif(
    torch.cuda.is_available() or torch.__version__ < "2.11",
    reason="needs a torch whose extension device can be written in Python, and no GPU",
)


def run(tmp_path: Path, *arguments: str) -> str:
    """Pytest with the pretended device, here and in the processes it starts."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if '--multiprocessing-fork' in sys.orig_argv:\n"
        "    from tests.support.pretend_device import install\n"
        "    install()\n"
    )
    path = [str(tmp_path), str(ROOT), str(ROOT / "taxonomy")]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu"]
    command += ["-p", "no:cacheprovider", "-p", "tests.support.pretend_device", "-rs"]
    done = subprocess.run(
        [*command, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@needs_backend
@pytest.mark.parametrize(
    ("which", "least"),
    [
        pytest.param(("-k", FEW), 50, id="few"),
        pytest.param((), 90, marks=pytest.mark.slow, id="all"),
    ],
)
def test_the_gpu_tier_runs_on_the_pretended_device(
    which: tuple[str, ...], least: int, tmp_path: Path
) -> None:
    printed = run(tmp_path, "tests/gpu", *(f"--ignore={file}" for file in SLOW), *which)
    passed = re.search(r"(\d+) passed", printed)
    assert passed is not None
    assert int(passed[1]) > least
    reasons = set(re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", printed, re.M))
    assert reasons <= {
        "triton is not installed",
        "could not import 'triton': No module named 'triton'",
        "could not import 'triton': import of triton halted; None in sys.modules",
    }


@pytest.mark.slow
@needs_backend
def test_the_first_script_of_a_gpu_runs_on_the_pretended_device(tmp_path: Path) -> None:
    arguments = ["--pretend", "--tiny", "--limit", "300", "--out", str(tmp_path)]
    assert five_minutes.main(arguments) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == list(five_minutes.LIMITS)
    assert results["grpo"]["device"].startswith("cuda")
    assert results["wapo"]["first_pass_off_one"] < 1e-6


@pytest.mark.slow
@needs_backend
def test_the_gpu_recipe_runs_on_the_pretended_device(tmp_path: Path) -> None:
    run(tmp_path, *SLOW)
