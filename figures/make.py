"""Draw published figures: python figures/make.py NAME... [--runs RUN...] [--out DIR].

With --all every figure, with --index the table of README.md instead.
"""

import argparse
import sys
from pathlib import Path

from wapo_analysis.errors import UserError
from wapo_analysis.plots import FIGURES, FORMATS, get_figure, render, save_figure, unavailable
from wapo_analysis.store import find_runs, open_run

HERE = Path(__file__).parent
DEMO = HERE.parent / "runs" / "demo"


def index() -> str:
    """Markdown table of every figure: its question and the columns it reads."""
    rows = [
        f"| `{name}` | {spec.title} | {'; '.join(map(str, spec.needs)) or 'nothing'} |"
        for name, spec in FIGURES.items()
    ]
    return "\n".join(["| figure | question it answers | needs |", "|---|---|---|", *rows])


def draw(names: list[str], folders: list[Path], out: Path, formats: list[str]) -> None:
    """Draw figures of the runs at or below the folders; theory figures need none."""
    fed = [name for name in names if get_figure(name).needs]
    paths = [run for folder in folders for run in find_runs(folder)] if fed else []
    runs = [open_run(path) for path in paths]
    for name in names:
        reason = unavailable(FIGURES[name], runs)
        if reason is not None:
            print(f"{name}: skipped, {reason}")
            continue
        figure = render(name, runs)
        files = [save_figure(figure, out / f"{name}.{kind}") for kind in formats]
        print(f"{name}: {', '.join(file.name for file in files)} in {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--all", action="store_true", help="draw every figure")
    parser.add_argument("--index", action="store_true", help="print the table of README.md")
    parser.add_argument(
        "--runs", nargs="*", type=Path, default=[DEMO], help="run folders (default: runs/demo)"
    )
    parser.add_argument(
        "--out", type=Path, default=HERE / "gallery", help="folder to write to (default: gallery)"
    )
    parser.add_argument(
        "--format", nargs="*", choices=FORMATS, default=FORMATS, help="default: all three"
    )
    args = parser.parse_args()
    if args.index:
        print(index())
    elif args.all or args.names:
        try:
            draw(list(FIGURES) if args.all else args.names, args.runs, args.out, args.format)
        except UserError as error:
            sys.exit(f"error: {error}")
    else:
        parser.error("name a figure, or give --all")


if __name__ == "__main__":
    main()
