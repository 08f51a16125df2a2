"""The curves and the report of a run, shown beside the model of it that is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import FileResponse, Response

from plinth.config import UserError, read_json
from plinth.serving.errors import ApiError
from plinth.watch.app import create_app

# The report is one file with its own style and no script.
REPORT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"


def find_run(path: Path) -> Path | None:
    """Return the build or run that a served path belongs to: itself, or what its `model` folder lies in; None for a bare model."""
    path = path.resolve()
    run = path.parent if path.name == "model" else path
    return run if stage_of(run) is not None else None


def stage_of(run: Path) -> str | None:
    """Return what stage a run's provenance names, 'build' for a build; None where there is none."""
    try:
        provenance = read_json(run / "provenance.json")
    except (UserError, OSError):
        return None
    return provenance.get("stage") if isinstance(provenance, dict) else None


def report_of(run: Path) -> Path | None:
    """Return the report of a run or build, or of the build that a run is a stage of, where it has been written."""
    reports = (folder / "report.html" for folder in (run, run.parent) if folder == run or stage_of(folder) == "build")
    return next((report for report in reports if report.is_file()), None)


def add_run(app: FastAPI, path: Path, has_keys: bool) -> None:
    """Add the curves and the report of the run that `path` belongs to, and tell the page of them (`app.state.run_pages`).

    A server with keys shows neither: a frame cannot send one.
    """
    run = find_run(path)
    if run is None:
        return
    app.state.run_pages = lambda: run_pages(run, has_keys)
    if has_keys:
        return
    app.mount("/run/curves", create_app(run))

    @app.get("/run/report", include_in_schema=False)
    def report() -> Response:
        found = report_of(run)
        if found is None:
            raise ApiError(404, f"{run} has no report. Write it with `plinth report {run}`.", code="not_found")
        return FileResponse(found, media_type="text/html", headers={"Content-Security-Policy": REPORT_POLICY, "Cache-Control": "no-cache"})


def run_pages(run: Path, has_keys: bool) -> dict[str, Any]:
    """Return the addresses of what there is to show, and what to say of the rest."""
    report = report_of(run)
    if has_keys:
        note = f"This server asks for API keys, which these pages cannot send. See `plinth watch {run} --serve`"
        return {"note": note + (f" and {report}." if report else ".")}
    return {
        "curves": "/run/curves/",
        "report": "/run/report" if report else None,
        "note": None if report else f"There is no report of {run}: a build writes one, and so does `plinth report` on its directory.",
    }
