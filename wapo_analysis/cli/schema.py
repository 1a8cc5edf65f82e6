"""``wapo schema``."""

import json

from typer import echo

from wapo_analysis.cli import FormatOption


def schema(format: FormatOption = "text") -> None:
    """Show every table of a run, with columns, units and meaning."""
    from dataclasses import asdict

    from wapo_analysis.schema import TABLES

    if format == "json":
        echo(json.dumps({name: asdict(table) for name, table in TABLES.items()}, indent=1))
        return
    for table in TABLES.values():
        if format == "markdown":
            echo(f"## {table.name}\n\nOne row is {table.row}.\n")
            echo("| column | type | unit | kind | meaning |\n|---|---|---|---|---|")
            for c in table:
                meaning = c.doc.replace("|", "\\|")
                echo(f"| `{c.name}` | {c.dtype} | {c.unit} | {c.kind} | {meaning} |")
            echo("")
        else:
            echo(f"{table.name}: one row is {table.row}")
            for c in table:
                echo(f"  {c.name:20} {c.dtype:8} {c.unit:12} {c.kind:9} {c.doc}")
            echo("")
