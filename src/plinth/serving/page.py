"""The pages in plinth.web: each one file, with a policy that lets its own style and script run and nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from fastapi.responses import HTMLResponse


@cache
def read_page(name: str) -> tuple[str, str]:
    """Return a page of plinth.web, and a content security policy that allows its own style and script and nothing else."""
    html = files("plinth.web").joinpath(name).read_text(encoding="utf-8")
    style, script = (
        base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        for part in (re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)[0] for tag in ("style", "script"))
    )
    policy = (
        f"default-src 'none'; style-src 'sha256-{style}'; script-src 'sha256-{script}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return html, policy


def page_response(name: str) -> HTMLResponse:
    """Return the answer that holds a page."""
    html, policy = read_page(name)
    return HTMLResponse(html, headers={"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"})
