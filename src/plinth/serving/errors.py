"""Errors as OpenAI's wire format has them: {"error": {"message", "type", "param", "code"}} and a status code."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException

LOG = logging.getLogger("plinth.serving")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
SHAPES = {
    "prompt": "a string, a list of strings, a list of token ids, or a list of lists of token ids",
    "stop": "a string, or a list of up to 4 strings",
    "content": "a string, or a list of parts {'type': 'text', 'text': ...}",
}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorDetail


DESCRIBED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "The request is at fault, or comes at a bad time."},
    "5XX": {"model": ErrorAnswer, "description": "The server is at fault, or stops."},
}


class ApiError(Exception):
    """A request that is answered with an error object.

    `param` names the field at fault, `code` is for machines, `retry_after_s` becomes the Retry-After header.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.retry_after_s = status, param, code, retry_after_s

    def body(self) -> dict[str, Any]:
        """Return the JSON body."""
        kind = "server_error" if self.status >= 500 else TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the HTTP answer."""
        headers = {"Retry-After": str(self.retry_after_s)} if self.retry_after_s is not None else None
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def bad_request(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Return a 400 that names the field `param`."""
    return ApiError(400, message, param=param, code=code)


def internal_error() -> ApiError:
    """Return the 500 that says nothing of the server's inside; the cause is in the server's log."""
    return ApiError(500, "The server failed on this request; its log has the cause.", code="internal_error")


def describe_validation(errors: list[ErrorDetails] | Any) -> ApiError:
    """Turn pydantic's list of errors into one 400 that names the first field, its value and the rule."""
    first = errors[0]
    location = [str(part) for part in first.get("loc", ()) if part != "body"]
    if first["type"] == "json_invalid":
        return bad_request("The body is not valid JSON.", code="invalid_json")
    if first["type"] == "missing" and not location:
        return bad_request("The body is empty. Send a JSON object with Content-Type: application/json.")
    if first["type"] in ("model_attributes_type", "model_type") and not location:
        return bad_request("The body is not a JSON object sent with Content-Type: application/json.")
    name = next((part for part in location if part in SHAPES), None)
    if name is not None and first["type"] != "missing":
        path = ".".join(location[: location.index(name) + 1])
        rule = first["msg"] if first["type"].startswith("value_error") else f"must be {SHAPES[name]}"
        return bad_request(f"{path} {rule.removeprefix('Value error, ')}.", param=path)
    path = ".".join(location)
    if first["type"] == "missing":
        return bad_request(f"{path} is missing.", param=path, code="missing_required_parameter")
    message = first["msg"].removeprefix("Value error, ")
    if not path:
        return bad_request(message)
    return bad_request(f"{path}={shorten(first.get('input'))}: {message}.", param=path, code="invalid_value")


def shorten(value: Any, limit: int = 60) -> str:
    """Return repr(value), cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def install(app: FastAPI) -> None:
    """Make every failure of `app` an error object."""

    @app.exception_handler(ApiError)
    async def _api(_: Request, error: ApiError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def _validation(_: Request, error: RequestValidationError) -> JSONResponse:
        return describe_validation(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code == 404:
            message = f"{request.url.path} is not an address of this server. See /v1/models, /v1/completions, /v1/chat/completions."
        elif error.status_code == 405:
            message = f"{request.method} is not answered at {request.url.path}."
        else:
            message = str(error.detail)
        response = ApiError(error.status_code, message).response()
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(Exception)
    async def _unexpected(request: Request, error: Exception) -> JSONResponse:
        LOG.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return internal_error().response()
