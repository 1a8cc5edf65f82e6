"""The page served live: every run below some folders, read as it is written.

A small ASGI application. It reads run folders through the same readers as every command, writes
nothing, and answers for nothing but the runs it found: a run is asked for by the number made from
its folder, never by a path.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from socket import AF_INET, AF_INET6, socket
from threading import Lock
from typing import TYPE_CHECKING, Any

from wapo_analysis.diagnose import diagnose
from wapo_analysis.errors import UserError
from wapo_analysis.report import render
from wapo_analysis.report.data import Json, comparison_data, run_data, run_id
from wapo_analysis.report.steps import block, step_data
from wapo_analysis.settings import setting_labels
from wapo_analysis.store import MANIFEST, STEP_LOG, Run, open_run, run_folders
from wapo_analysis.store.tail import Tail

if TYPE_CHECKING:
    from starlette.applications import Starlette

LOOPBACK = ("127.0.0.1", "::1", "localhost")
MOST_RUNS = 200
MOST_COMPARED = 40


@dataclass
class Shelf:
    """The runs below some folders, kept open and read on as they grow.

    ``folders``: Run folders, or folders that hold runs; looked through again at each request.
    """

    folders: Sequence[Path]
    _tails: dict[str, Tail] = field(default_factory=dict)
    _told: dict[str, tuple[str, Json]] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def listed(self) -> list[Json]:
        """Every run with a mark that changes when the run does."""
        found: dict[str, Json] = {}
        for folder in self.folders:
            for path in run_folders(folder)[:MOST_RUNS]:
                number = run_id(path)
                self._tails.setdefault(number, Tail(path))
                found[number] = {"id": number, "name": path.name, "mark": _mark(path)}
        return list(found.values())

    def run(self, number: str) -> Json:
        """Everything of a run beside its single steps; see :func:`run_data`."""
        tail = self._tail(number)
        mark = _mark(tail.path)
        with self._lock:
            if self._told.get(number, ("",))[0] != mark:
                tail.poll()
                run = tail.run()
                self._told[number] = mark, run_data(run, diagnose(run))
            return self._told[number][1]

    def step(self, number: str, step: int) -> bytes:
        """Rollouts and tokens of one step, as a block of bytes."""
        return block(step_data(open_run(self._tail(number).path), step))

    def compared(self, numbers: Sequence[str]) -> Json:
        """The table of several runs, and the setting each belongs to."""
        runs = [open_run(self._tail(number).path) for number in numbers[:MOST_COMPARED]]
        settings = dict(zip(numbers, setting_labels(runs), strict=False))
        return {**(comparison_data(runs) or {}), "settings": settings}

    def opened(self) -> list[Run]:
        """All runs, opened."""
        return [open_run(self._tail(one["id"]).path) for one in self.listed()]

    def _tail(self, number: str) -> Tail:
        if number not in self._tails:
            self.listed()
        if number not in self._tails:
            raise UserError("no such run below the folders of this board")
        return self._tails[number]


def _mark(path: Path) -> str:
    """What changes with every step written: sizes and times of log and manifest."""
    marks = []
    for name in (STEP_LOG, MANIFEST):
        try:
            seen = (path / name).stat()
            marks.append(f"{seen.st_size}.{seen.st_mtime_ns}")
        except OSError:
            marks.append("-")
    return "/".join(marks)


def application(folders: Sequence[Path], token: str | None = None) -> Starlette:
    """The board as an ASGI application.

    Raises UserError if the extra [board] is not installed. ``folders``: where runs are looked for;
    ``token``: asked for in every address (``?token=...``); None lets everybody in who can reach it.
    """
    try:
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
        from starlette.routing import Route
    except ImportError as error:
        raise UserError("wapo board needs an extra: pip install 'wapo-analysis[board]'") from error

    shelf = Shelf(folders)

    def answered(make: Any) -> Any:
        """A route: the token is checked, a user's error becomes a line, nothing is cached."""

        def route(request: Request) -> Response:
            given = request.query_params.get("token", "")
            if token is not None and not hmac.compare_digest(given.encode(), token.encode()):
                return PlainTextResponse("this board asks for its token: ?token=...", 403)
            try:
                response: Response = make(request)
            except UserError as error:
                return PlainTextResponse(str(error), 404)
            response.headers["Cache-Control"] = "no-store"
            response.headers["X-Content-Type-Options"] = "nosniff"
            response.headers["Referrer-Policy"] = "no-referrer"
            return response

        return route

    def json_of(value: Any) -> Response:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        return Response(text.encode("utf-8", "backslashreplace"), media_type="application/json")

    def page(request: Request) -> Response:
        data = {"live": True, "runs": [], "comparison": None}
        return HTMLResponse(render(data, title="wapo board", plain="this board needs JavaScript"))

    def one(request: Request) -> Response:
        return json_of(shelf.run(request.path_params["run"]))

    def compared(request: Request) -> Response:
        return json_of(shelf.compared(request.path_params["runs"].split(",")))

    def step(request: Request) -> Response:
        asked = request.path_params
        body = shelf.step(asked["run"], asked["step"])
        return Response(body, media_type="application/octet-stream")

    routes = [
        Route("/", answered(page)),
        Route("/api/runs", answered(lambda request: JSONResponse(shelf.listed()))),
        Route("/api/runs/{run}", answered(one)),
        Route("/api/runs/{run}/steps/{step:int}", answered(step)),
        Route("/api/compare/{runs}", answered(compared)),
    ]
    return Starlette(routes=routes)


def free_port(host: str) -> int:
    """A port nobody listens on."""
    with socket(AF_INET6 if ":" in host else AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def serve(
    folders: Sequence[Path], host: str, port: int, token: str | None, begins: Callable[[], object]
) -> None:
    """Serve the board until it is interrupted; ``begins`` is called before.

    Raises UserError if a folder is missing, the extra is not installed, or the port is taken.
    """
    missing = next((folder for folder in folders if not folder.is_dir()), None)
    if missing is not None:
        raise UserError(f"no folder at {missing}; give folders that hold runs")
    app = application(folders, token)
    try:
        import uvicorn
    except ImportError as error:
        raise UserError("wapo board needs an extra: pip install 'wapo-analysis[board]'") from error
    config = uvicorn.Config(app, host=host, port=port, log_level="warning")
    server = uvicorn.Server(config)
    begins()
    try:
        server.run()
    except SystemExit as error:
        raise UserError(f"cannot serve on {host} port {port}; is it taken? give --port") from error
