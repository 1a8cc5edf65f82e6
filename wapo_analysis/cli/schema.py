"""``wapo schema``."""

import json
from typing import Annotated

from typer import Argument, echo

from wapo_analysis.cli import FormatOption
from wapo_analysis.errors import unknown_name


def schema(
    table: Annotated[
        str | None, Argument(help="Table to show.  [default: every one]", metavar="TABLE")
    ] = None,
    format: FormatOption = "text",
) -> None:
    """Show every table of a run, or one, with columns, units and meaning."""
    from dataclasses import asdict

    from wapo_analysis.schema import TABLES

    if table is not None and table not in TABLES:
        raise unknown_name("table", table, TABLES)
    tables = {name: one for name, one in TABLES.items() if table in (None, name)}
    if format == "json":
        echo(json.dumps({name: asdict(one) for name, one in tables.items()}, indent=1))
        return
    for shown in tables.values():
        if format == "markdown":
            echo(f"## {shown.name}\n\nOne row is {shown.row}.\n")
            echo("| column | type | unit | kind | meaning |\n|---|---|---|---|---|")
            for c in shown:
                meaning = c.doc.replace("|", "\\|")
                echo(f"| `{c.name}` | {c.dtype} | {c.unit} | {c.kind} | {meaning} |")
            echo("")
        else:
            echo(f"{shown.name}: one row is {shown.row}")
            for c in shown:
                echo(f"  {c.name:20} {c.dtype:8} {c.unit:12} {c.kind:9} {c.doc}")
            echo("")
