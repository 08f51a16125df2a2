"""The pages in plinth.web and their files, under a policy that lets their own style and script run and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response

from plinth.serving.errors import ApiError

CONTENT_TYPES = {".css": "text/css; charset=utf-8", ".js": "text/javascript; charset=utf-8"}
HEADERS = {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}


@cache
def read_page(name: str) -> tuple[str, str]:
    """Return a page of plinth.web, and its content security policy.

    It allows what stands in the page itself by its hash, files and frames of this server, and nothing else.
    """
    html = files("plinth.web").joinpath(name).read_text(encoding="utf-8")
    allowed = {}
    for tag in ("style", "script"):
        inline = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        allowed[tag] = " ".join(f"'sha256-{_hash(part)}'" for part in inline) or "'self'"
    policy = (
        f"default-src 'none'; style-src {allowed['style']}; script-src {allowed['script']}; connect-src 'self'; frame-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
    )
    return html, policy


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def page_response(name: str) -> HTMLResponse:
    """Return the answer that holds a page."""
    html, policy = read_page(name)
    return HTMLResponse(html, headers={**HEADERS, "Content-Security-Policy": policy})


@cache
def page_files() -> dict[str, tuple[bytes, str]]:
    """Return the bytes and the content type of every file that pages load, by name."""
    return {
        file.name: (file.read_bytes(), kind)
        for file in files("plinth.web").iterdir()
        if (kind := CONTENT_TYPES.get(file.name[file.name.rfind(".") :])) is not None
    }


def add_page(app: FastAPI) -> None:
    """Add the page, its files, and what it asks about the run (`app.state.run_pages`, which whoever knows the run sets)."""
    app.state.run_pages = lambda: {"note": "This model lies in no run, so there are no curves and no report to show."}

    @app.get("/", include_in_schema=False)
    async def page() -> HTMLResponse:
        """Return the page."""
        return page_response("index.html")

    @app.get("/web/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        """Return a file of the page; only names that are known are looked up, never a path."""
        found = page_files().get(name)
        if found is None:
            raise ApiError(404, f"There is no file {name!r} of the page.", code="not_found")
        return Response(found[0], media_type=found[1], headers=HEADERS)

    @app.get("/page/run", include_in_schema=False)
    def run_pages(request: Request) -> dict[str, Any]:
        """Return {curves, report, note}: addresses, and what to say of what is missing."""
        return request.app.state.run_pages()
