"""What langchain-openai can do with a running server: `python benchmarks/langchain_side.py http://127.0.0.1:8000/v1 MODEL`, JSON on stdout.

It lives in an environment of its own, with langchain-openai and nothing of Plinth.
"""

from __future__ import annotations

import json
import sys

from langchain_openai import ChatOpenAI, OpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field


class Person(BaseModel):
    """A person."""

    age: int = Field(ge=0, le=99)
    married: bool


def now(zone: str) -> str:
    """Return the time in a zone."""
    return "12:00"


def main() -> int:
    common = {"base_url": sys.argv[1], "api_key": "none", "model": sys.argv[2]}
    chat = ChatOpenAI(**common, max_tokens=200, temperature=0.7, seed=1)
    calls = {
        "invoke": lambda: isinstance(chat.invoke("hello").content, str),
        "stream": lambda: len(list(chat.stream("hello"))) > 1,
        "logprobs": lambda: chat.bind(logprobs=True, top_logprobs=2).invoke("hello").response_metadata["logprobs"]["content"],
        "structured, json_schema": lambda: chat.with_structured_output(Person).invoke("hello"),
        "structured, strict": lambda: chat.with_structured_output(Person, strict=True).invoke("hello"),
        "structured, function_calling": lambda: chat.with_structured_output(Person, method="function_calling").invoke("hello"),
        "json_object": lambda: chat.bind(response_format={"type": "json_object"}).invoke("hello").content,
        "tool call": lambda: chat.bind_tools([now], tool_choice="required").invoke("hello").tool_calls,
        "legacy completion": lambda: isinstance(OpenAI(**common, max_tokens=10).invoke("hello"), str),
        "embeddings": lambda: len(OpenAIEmbeddings(**common, check_embedding_ctx_length=False).embed_documents(["a", "b"])) == 2,
    }
    found = {}
    for name, call in calls.items():
        try:
            found[name] = "ok" if call() else "empty"
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:200]}"
    print(json.dumps(found))
    return int(set(found.values()) != {"ok"})


if __name__ == "__main__":
    sys.exit(main())
