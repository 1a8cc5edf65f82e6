"""What the figure scripts share: read the arguments, open the runs, write PNG, SVG and PDF."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from wapo_analysis.errors import UserError
from wapo_analysis.plots import FIGURES, FORMATS, render, save_figure, unavailable
from wapo_analysis.store import find_runs, open_run

GALLERY = Path(__file__).parent / "gallery"
DEMO = Path(__file__).parents[1] / "runs" / "demo"


def publish(names: Sequence[str], about: str) -> None:
    """Draw figures from the run folders on the command line; theory figures need none."""
    parser = argparse.ArgumentParser(description=about)
    if any(FIGURES[name].needs for name in names):
        parser.add_argument("runs", nargs="*", type=Path, default=[DEMO], help="run folders")
    parser.add_argument("--out", type=Path, default=GALLERY, help="folder to write to")
    parser.add_argument("--format", nargs="*", choices=FORMATS, default=FORMATS)
    args = parser.parse_args()
    try:
        folders = [run for path in getattr(args, "runs", []) for run in find_runs(path)]
        runs = [open_run(folder) for folder in folders]
        for name in names:
            reason = unavailable(FIGURES[name], runs)
            if reason is not None:
                print(f"{name}: skipped, {reason}")
                continue
            figure = render(name, runs)
            files = [save_figure(figure, args.out / f"{name}.{kind}") for kind in args.format]
            print(f"{name}: {', '.join(file.name for file in files)} in {args.out}")
    except UserError as error:
        sys.exit(f"error: {error}")
