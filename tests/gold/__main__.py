"""``python -m tests.gold DIR``: replay a folder of golden cases through the objectives.

Prints how many cases passed and the worst error of each quantity. Exit code 1 if any fails,
2 if the folder cannot be read.
"""

import sys
from pathlib import Path

from tests.gold.report import check_folder
from wapo_analysis.errors import UserError


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m tests.gold DIR", file=sys.stderr)
        return 2
    try:
        report = check_folder(Path(arguments[0]))
    except UserError as error:
        print(f"gold: {error}", file=sys.stderr)
        return 2
    print(report.to_text())
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
