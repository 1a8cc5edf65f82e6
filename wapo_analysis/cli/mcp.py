"""``wapo mcp``."""

from pathlib import Path

from wapo_analysis.cli import FoldersArgument


def mcp(folders: FoldersArgument = None) -> None:
    """Let an assistant read runs (Model Context Protocol).

    The assistant starts it and talks to it over standard input and output (docs/mcp.md). Tools:
    list_runs, diagnose, step, tokens, compare, schema; nothing is written, and nothing outside the
    folders is read. Needs the extra mcp. Example:

        wapo mcp runs
    """
    from wapo_analysis.assistants import make_server

    make_server(folders or [Path("runs")]).run()
