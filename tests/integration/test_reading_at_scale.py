"""The recipes of docs/scale.md for runs too large for one machine give what `Run` gives."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.support.builders import write_fake_run
from wapo_analysis import open_run

PAGE = (Path(__file__).parents[2] / "docs" / "scale.md").read_text()


# Dask and pandas warn about each other's future versions; that is theirs to mend.
pytestmark = pytest.mark.filterwarnings("ignore")


def results(library: str, run: Path) -> dict[str, Any]:
    """What the block of a library leaves behind, on a run."""
    pytest.importorskip(library)
    block = next(b for b in re.findall(r"```python\n(.*?)```", PAGE, re.S) if library in b)
    names: dict[str, Any] = {}
    exec(block.replace("runs/mine", str(run)), names)
    return names


@pytest.mark.parametrize("library", ["duckdb", "dask", pytest.param("ray", marks=pytest.mark.slow)])
def test_classes_and_top_tokens_are_those_of_the_run(library: str, tmp_path: Path) -> None:
    write_fake_run(tmp_path / "run")
    found, run = results(library, tmp_path / "run"), open_run(tmp_path / "run")
    columns = ["tokens", "entropy_sum", "grad_mass"]
    expected = run.classes.groupby(["sign", "regime"])[columns].sum()
    classes = found["classes"]
    if "sign" in classes.columns:
        classes = classes.set_index(["sign", "regime"])
    pd.testing.assert_frame_equal(
        classes.sort_index()[columns].astype(float), expected.astype(float), check_index_type=False
    )
    tokens = run.tokens()
    most = tokens["coef"].abs().groupby(tokens["token_id"]).sum().nlargest(20)
    top = found["top"]
    top = top.set_index("token_id")["coef"] if "token_id" in getattr(top, "columns", ()) else top
    np.testing.assert_allclose(np.sort(top), np.sort(most), rtol=1e-5)
    assert top.index[0] == most.index[0]
