"""Who may import whom (docs/architecture.md), read from the imports themselves."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LEVELS: dict[str, int] = {
    "errors": 0, "schema": 0, "workers": 0, "declare": 1,
    "table": 1, "stats": 1, "results": 1,
    "derive": 2, "series": 2,
    "objectives": 3, "store": 3,
    "record": 4, "settings": 4,
    "probes": 5,
    "capture": 6, "diagnose": 6, "audit": 6, "compare": 6, "plots": 6, "attribute": 6,
    "train": 7, "beside": 7, "report": 7, "watch": 7, "importers": 7,
    "verify": 8, "bench": 8, "run": 8, "testing": 8, "assistants": 8, "engines": 8,
    "cli": 9,
    "__main__": 10,
}  # fmt: skip
# Same level, yet one may use the other: comparisons and figures show what diagnose finds.
ALLOWED_BESIDE = {("compare", "diagnose"), ("report", "train"), ("plots", "diagnose")}
OF_ALL = ("UserError", "__version__")
"""What the package itself holds before it loads anything."""
TORCH_ALLOWED = {
    "stats",
    "objectives",
    "record",
    "probes",
    "capture",
    "train",
    "verify",
    "bench",
    "testing",
    "engines",
}
SOURCES = sorted((ROOT / "wapo_analysis").rglob("*.py"))


def imported(file: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room(file: Path) -> str:
    return file.relative_to(ROOT / "wapo_analysis").parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_imports_go_down_the_levels(file: Path) -> None:
    mine = room(file)
    if mine == "__init__":
        return
    assert mine in LEVELS, f"{mine} has no level; add it to LEVELS and docs/architecture.md"
    for name in imported(file):
        parts = name.split(".")
        if parts[0] == "torch":
            assert mine in TORCH_ALLOWED, f"{file.name} imports torch"
        if parts[0] in ("matplotlib", "seaborn"):
            # run names the type of what run.plot() returns; the test below shows it loads nothing.
            assert mine in ("plots", "run"), f"{file.name} imports {name}"
        if (
            parts[0] != "wapo_analysis"
            or len(parts) < 2
            or parts[1] in (mine, "UserError", "__version__")
        ):
            continue
        other = parts[1]
        lower = LEVELS.get(other, 0) < LEVELS[mine]
        assert lower or (mine, other) in ALLOWED_BESIDE, f"{file.name} imports {name}"


def test_no_two_modules_need_each_other() -> None:
    """Also not by an import within a function; imports for types alone do not count."""
    modules = {".".join(f.relative_to(ROOT).with_suffix("").parts): f for f in SOURCES}
    packages = {name.removesuffix(".__init__"): name for name in modules}
    needs: dict[str, set[str]] = {}
    for name, file in modules.items():
        tree = ast.parse(file.read_text())
        typed = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECK" in ast.dump(n)]
        left_out = {id(part) for node in typed for part in ast.walk(node)}
        found = {
            packages.get(f"{node.module}.{alias.name}") or packages.get(str(node.module))
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and id(node) not in left_out
            for alias in node.names
        }
        needs[name] = {other for other in found if other not in (None, name)}
    assert len(list(graphlib.TopologicalSorter(needs).static_order())) == len(modules)


def test_taxonomy_imports_nothing_of_ours_and_no_array_library() -> None:
    for file in (ROOT / "taxonomy" / "wapo_taxonomy").glob("*.py"):
        for name in imported(file):
            assert name.split(".")[0] not in ("wapo_analysis", "numpy", "torch", "pandas"), file


def test_nothing_imports_experiments_figures_or_tests() -> None:
    for file in SOURCES:
        for name in imported(file):
            assert name.split(".")[0] not in ("experiments", "figures", "tests"), file


LIGHT = {
    "import": "import wapo_analysis; wapo_analysis.open_run",
    "help": "from wapo_analysis.cli import run; run(['--help'])",
    "report": "import wapo_analysis.report, wapo_analysis.diagnose, wapo_analysis.compare",
    "figures": "from wapo_analysis.plots import render; render('theory_map', [])",
}


def test_loads_no_torch() -> None:
    """One process for all, the lightest first; matplotlib is not loaded before figures are."""
    lines = ["import sys"]
    for what, code in LIGHT.items():
        lines.append(f"{code}; assert 'torch' not in sys.modules, {what!r}")
        if what != "figures":
            lines.append(f"assert 'matplotlib' not in sys.modules, {what!r}")
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("file", SOURCES, ids=lambda f: str(f.relative_to(ROOT)))
def test_modules_stay_small(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 400


@pytest.mark.parametrize(
    "name", ["torch", "transformers", "numpy", "pandas", "matplotlib", "seaborn", "typer"]
)
def test_the_fixed_stack_stays(name: str) -> None:
    """Named by the project's user and not ours to drop: each is a dependency and is used."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(re.split(r"[<>=]", one)[0] == name for one in project["dependencies"])
    assert any(n.split(".")[0] == name for file in SOURCES for n in imported(file))


def test_test_files_have_names_of_their_own() -> None:
    # pytest imports them by name alone: two of one name cannot run together.
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
