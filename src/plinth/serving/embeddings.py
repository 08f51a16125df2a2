"""POST /v1/embeddings: a vector for each text, the mean of the hidden states of its tokens, of length one."""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict

from plinth.serving.disconnect import until_disconnect
from plinth.serving.errors import ApiError, bad_request
from plinth.serving.protocol import Prompts, listed
from plinth.serving.records import RequestRecord, record_of
from plinth.serving.server import Server

MAX_INPUTS = 2048  # OpenAI's
INPUTS_A_CALL = 8  # read between two steps of those who decode


class EmbeddingRequest(BaseModel):
    """The body of POST /v1/embeddings."""

    model_config = ConfigDict(strict=True, extra="forbid")

    model: str
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None


def add_embeddings(app: FastAPI, server: Server) -> None:
    """Add the route."""

    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
        """Return a vector for each text."""
        return await until_disconnect(request, embed(server, body, record_of(request)))


async def embed(server: Server, request: EmbeddingRequest, record: RequestRecord) -> Response:
    """Answer one request for embeddings."""
    server.check_model(request.model)
    texts = listed(request.input, "input")
    if len(texts) > MAX_INPUTS:
        raise bad_request(f"input has {len(texts)} texts; at most {MAX_INPUTS} are taken.", param="input")
    prompts = await server.encode(texts, "input")
    check_inputs(server, request, prompts)
    record.prompt_tokens = sum(map(len, prompts))
    data: list[dict[str, Any]] = []
    for start in range(0, len(prompts), INPUTS_A_CALL):
        part = prompts[start : start + INPUTS_A_CALL]
        vectors_PD = normalised(await server.batcher.call(lambda part=part: server.engine.embed(part).cpu().numpy()))
        data += [
            {"object": "embedding", "index": start + i, "embedding": wire(vector, request.encoding_format)}
            for i, vector in enumerate(vectors_PD)
        ]
    usage = {"prompt_tokens": record.prompt_tokens, "total_tokens": record.prompt_tokens}
    return JSONResponse({"object": "list", "data": data, "model": server.model_name, "usage": usage})


def check_inputs(server: Server, request: EmbeddingRequest, prompts: list[list[int]]) -> None:
    """Raise ApiError (400) for a text that is too long, or another length of the vectors."""
    longest = max(map(len, prompts))
    if longest > server.engine.max_seq_len:
        raise ApiError(
            400,
            f"input has a text of {longest} tokens; the model's context holds {server.engine.max_seq_len}. Shorten it.",
            param="input",
            code="context_length_exceeded",
        )
    if request.dimensions is not None:
        raise bad_request("dimensions is not supported here: vectors have the model's width.", "dimensions", "unsupported_parameter")


def normalised(vectors_PD: Any) -> np.ndarray:
    """Return the vectors as float32 of length one; a vector of zeros stays."""
    vectors_PD = np.asarray(vectors_PD, dtype=np.float32)
    return vectors_PD / np.maximum(np.linalg.norm(vectors_PD, axis=1, keepdims=True), 1e-12)


def wire(vector_D: np.ndarray, encoding: str | None) -> list[float] | str:
    """Return a vector as a list of numbers, or as the base64 of its little-endian float32."""
    return base64.b64encode(vector_D.astype("<f4").tobytes()).decode() if encoding == "base64" else vector_D.tolist()
