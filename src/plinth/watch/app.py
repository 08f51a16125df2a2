"""The live page of a run over HTTP: the page, its state, and its curves; read only."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response

from plinth import __version__
from plinth.serving.limits import SameOrigin
from plinth.serving.page import page_response
from plinth.watch.state import Watcher

MAX_POINTS = 4000


def create_app(path: Path, host_names: frozenset[str] | None = None) -> FastAPI:
    """Return the application that shows the run or build at `path`; `host_names` are the Host headers answered (None: all).

    GET / is the page; /state and /curves are JSON. Both take stage=pretrain|sft|dpo for a build; /curves takes first and last (steps)
    and points, and has an ETag that changes when something was appended.
    """
    app = FastAPI(title="Plinth watch", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(SameOrigin, host_names=host_names)
    watcher, lock = Watcher(path), threading.Lock()  # routes run in threads, and reading moves the files' positions

    @app.get("/", include_in_schema=False)
    def page() -> HTMLResponse:
        return page_response("watch.html")

    @app.get("/healthz")
    def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/state")
    def state(stage: str | None = None) -> Response:
        """Where the run is."""
        with lock:
            return JSONResponse(watcher.state(stage))

    @app.get("/curves")
    def curves(
        request: Request, stage: str | None = None, first: float | None = None, last: float | None = None, points: int = 600
    ) -> Response:
        """The logged values by step, thinned; 304 when nothing was appended since the ETag."""
        infinity = float("inf")
        with lock:
            tag = f'"{abs(hash((watcher.poll(stage), first, last, points))):x}"'
            if request.headers.get("if-none-match") == tag:
                return Response(status_code=304, headers={"ETag": tag})
            body: dict[str, Any] = watcher.curves(
                stage,
                -infinity if first is None else first,
                infinity if last is None else last,
                max(20, min(points, MAX_POINTS)),
            )
        return JSONResponse(body, headers={"ETag": tag, "Cache-Control": "no-cache"})

    return app
