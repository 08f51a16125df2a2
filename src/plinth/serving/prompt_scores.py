"""`prompt_logprobs` as vLLM has it: how probable the model finds each token of the prompt, and what it finds most probable there."""

from __future__ import annotations

from typing import Any

from plinth.serving.answer import finite, token_name
from plinth.serving.server import Server

PromptScores = list[dict[str, dict[str, Any]] | None]


async def prompt_scores(server: Server, prompt: list[int], count: int | None) -> PromptScores | None:
    """Return for each token {token id: {logprob, rank, decoded_token}}, None for the first, which nothing predicts.

    The token itself is there beside the `count` most probable; its rank is None where it is not one of them. Returns None
    where `count` is None: nobody asked.
    """
    if count is None:
        return None
    if len(prompt) < 2:
        return [None] * len(prompt)
    scored = await server.batcher.call(lambda: server.engine.score_alternatives([prompt], count)[0])
    return [None] + [_entry(server, token, *place) for token, place in zip(prompt[1:], scored)]


def _entry(server: Server, token: int, logprob: float, alternatives: list[tuple[int, float]]) -> dict[str, dict[str, Any]]:
    ranked = {other: (value, rank) for rank, (other, value) in enumerate(alternatives, start=1)}
    ranked.setdefault(token, (logprob, None))
    return {
        str(other): {"logprob": finite(value), "rank": rank, "decoded_token": token_name(server.tokenizer, other)}
        for other, (value, rank) in ranked.items()
    }
