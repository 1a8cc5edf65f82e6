"""What a user installs: two import names, the base policy, the template, the type markers."""

import zipfile
from pathlib import Path

import pytest

builder = pytest.importorskip("hatchling.builders.wheel", reason="needs the extra [dev]")

ROOT = Path(__file__).parent.parent
DATA = (
    "wapo_analysis/py.typed",
    "wapo_taxonomy/py.typed",
    "wapo_analysis/report/page/page.html",
    "wapo_analysis/report/page/main.mjs",
    "wapo_analysis/assets/base/model.safetensors",
    "wapo_analysis/assets/base/tokenizer.json",
)


def test_the_wheel_holds_two_names_and_its_data(tmp_path: Path) -> None:
    built = next(
        builder.WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    )
    names = zipfile.ZipFile(built).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert top == {"wapo_analysis", "wapo_taxonomy"}
    assert set(DATA) <= set(names)
    assert not [name for name in names if name.endswith((".pyc", ".ipynb"))]
    weights = zipfile.ZipFile(built).getinfo("wapo_analysis/assets/base/model.safetensors")
    assert weights.file_size < 2_000_000
