"""GET /health, /metrics and /v1/models: what is served, and how it is."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, PlainTextResponse, Response

from plinth.serving.errors import ApiError
from plinth.serving.server import Server


def add_health(app: FastAPI, server: Server) -> None:
    """Add the health check, the metrics and the list of models."""

    @app.get("/healthz", include_in_schema=False)
    @app.get("/health")
    async def health() -> JSONResponse:
        """Tell whether the engine runs, and how many sequences are in the batch and wait for it."""
        alive = server.batcher.is_alive
        body = {
            "status": "ok" if alive else "engine stopped",
            "model": server.model_name,
            "active": server.batcher.num_active,
            "waiting": server.batcher.num_waiting,
            "max_batch": server.batcher.max_batch,
        }
        return JSONResponse(body, status_code=200 if alive else 503)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        try:
            from plinth.serving.exposition import CONTENT_TYPE_LATEST, exposition  # at the first scrape: start-up does not wait for it
        except ModuleNotFoundError:
            raise ApiError(501, "prometheus-client is not installed: pip install prometheus-client.", code="missing_package") from None
        return Response(exposition(server), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the one model that is served."""
        return {"object": "list", "data": [server.model()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Return the model's entry."""
        server.check_model(name)
        return server.model()
