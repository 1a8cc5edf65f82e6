"""Instructions a token row takes to derive, sum up and encode, counted by valgrind.

A count does not depend on the load of the machine, nor, as valgrind shows programs one set of
vector units, much on the processor. What a job takes is the difference of two processes that do it
a different number of times. The eager statistics are counted in tests/unit/stats/test_work.py.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest

ROWS, FEW, MANY = 1 << 14, 1, 9
PROGRAM = f"""
import sys
import numpy as np
from wapo_analysis.derive import class_totals, derive
from wapo_analysis.schema import TOKENS
from wapo_analysis.store.parquet import arrow_table, parquet_bytes
from wapo_analysis.table import Records

draw, rows = np.random.default_rng(0), {ROWS}
prob = draw.uniform(0.01, 0.999, rows)
rest = (1 - prob) ** 2 * draw.uniform(0.1, 1, rows)
count = np.arange(rows)
tokens = Records.build(TOKENS, {{
    "step": np.ones(rows), "rank": np.zeros(rows), "minibatch": count * 4 // rows,
    "rollout": count // 64, "group": count // 512, "position": count % 64,
    "token_id": draw.integers(0, 5000, rows), "advantage": draw.standard_normal(rows),
    "logp": np.log(prob), "logp_old": np.log(prob) + 0.01, "entropy": 1 - prob,
    "collision_rest": rest, "collision_logp_rest": -rest, "coef": draw.standard_normal(rows),
    "clipped": draw.random(rows) < 0.2, "kept": np.ones(rows, bool), "top1": prob > 0.5,
}})
jobs = {{
    "derive": lambda: class_totals(derive(tokens, 1.0)),
    "encode": lambda: parquet_bytes(arrow_table(tokens)),
}}
for _ in range(int(sys.argv[2])):
    jobs[sys.argv[1]]()
"""
STORED = {"derive": 1031, "encode": 2228}
"""Instructions a row; numpy 2.4, pyarrow 26."""


def instructions(job: str, times: int) -> int:
    """Instructions of a process that does a job some times."""
    count = "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null"
    done = subprocess.run(
        ["valgrind", *count, sys.executable, "-c", PROGRAM, job, str(times)],
        env={**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = re.search(r"I +refs: +([\d,]+)", done.stderr)
    assert found is not None, done.stderr[-500:]
    return int(found[1].replace(",", ""))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="needs valgrind")
@pytest.mark.parametrize("job", STORED)
def test_instructions_a_row(job: str) -> None:
    taken = instructions(job, MANY) - instructions(job, FEW)
    assert taken / (MANY - FEW) / ROWS <= 1.1 * STORED[job]
