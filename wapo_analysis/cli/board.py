"""``wapo board``."""

from pathlib import Path
from typing import Annotated

from typer import Option, echo

from wapo_analysis.cli import FoldersArgument


def board(
    folders: FoldersArgument = None,
    host: Annotated[str, Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Option(help="Port; 0 takes a free one.", min=0, max=65535)] = 8765,
    token: Annotated[
        str | None,
        Option(help="Word asked for in the address; made up beyond loopback.  [default: none]"),
    ] = None,
) -> None:
    """Serve the page of all runs below some folders, live.

    New steps show within two seconds.

    It reads run folders and writes nothing. Needs the extra board.

    Example:

        wapo board runs
    """
    from secrets import token_urlsafe

    from wapo_analysis.report.board import LOOPBACK, free_port, serve

    if token is None and host not in LOOPBACK:
        token = token_urlsafe(16)
    port = port or free_port(host)
    shown = f"[{host}]" if ":" in host else host
    place = f"board: http://{shown}:{port}/" + (f"?token={token}" if token else "")
    serve(folders or [Path("runs")], host, port, token, lambda: echo(place))
