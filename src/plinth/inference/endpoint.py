"""A model behind a server that speaks OpenAI's chat completions, asked over HTTP with the standard library alone."""

from __future__ import annotations

import http.client
import json
import math
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from plinth.config import UserError
from plinth.inference.chat_model import Answer, Conversation, OptionLogprobs
from plinth.inference.sampling_params import SamplingParams

RETRIED = (408, 409, 429, 500, 502, 503, 504)


@dataclass(frozen=True)
class EndpointConfig:
    """Where a server is and how it is asked."""

    url: str | None = None
    """address of the API, such as http://127.0.0.1:8000/v1 (default: none is asked)"""
    model: str = ""
    """name that the server knows the model by"""
    api_key_env: str = "OPENAI_API_KEY"
    """environment variable that holds the key; one that is not set sends none"""
    requests_at_once: int = 8
    """requests that are under way together"""
    timeout_s: float = 120.0
    """seconds to wait for an answer"""
    tries: int = 5
    """attempts at a request before giving up; the pause between them doubles"""
    first_pause_s: float = 1.0
    """seconds before the second attempt"""
    top_logprobs: int = 20
    """alternatives that are asked for where options are compared; some servers allow 5 only"""

    def __post_init__(self) -> None:
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise UserError(f"url={self.url!r} does not begin with http:// or https://. An example is http://127.0.0.1:8000/v1.")
        for name in ("requests_at_once", "tries", "top_logprobs"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)} must be at least 1.")


class Endpoint:
    """A chat model behind a server; several requests are under way at once, and each is tried again when the server is busy."""

    def __init__(self, config: EndpointConfig):
        if config.url is None or not config.model:
            raise UserError(f"url={config.url} and model={config.model!r} must both be given to ask a server.")
        self.config, self.url = config, config.url.rstrip("/")
        self.identity: dict[str, Any] = {"url": self.url, "model": config.model}

    def answers(self, conversations: Sequence[Conversation], params: Sequence[SamplingParams]) -> list[Answer]:
        """Return the answer to each conversation; of the parameters those that OpenAI's interface names are sent."""

        def ask(i: int) -> Answer:
            chosen = params[i]
            wanted = {
                "temperature": chosen.temperature, "top_p": chosen.top_p, "max_tokens": chosen.max_tokens, "seed": chosen.seed,
                "stop": list(chosen.stop) or None,
            }  # fmt: skip
            choice = self._ask(conversations[i], {name: value for name, value in wanted.items() if value is not None})
            return Answer((choice.get("message") or {}).get("content") or "", choice.get("finish_reason", "stop") == "stop")

        return self._all(ask, len(conversations))

    def option_logprobs(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[OptionLogprobs]:
        """Return the log-probability of each option as the first token of the answer, with or without blanks around it.

        An option that is not among the alternatives that the server tells of is given the least probability among these, which it cannot
        exceed. Raises UserError when the server tells of none.
        """
        wanted = {"temperature": 1.0, "max_tokens": 1, "logprobs": True, "top_logprobs": self.config.top_logprobs}

        def ask(i: int) -> OptionLogprobs:
            places = ((self._ask(conversations[i], wanted).get("logprobs") or {}).get("content")) or []
            if not places or not places[0].get("top_logprobs"):
                raise UserError(f"{self.url} gave no top_logprobs, which options are compared by. Use a server and a model that give them.")
            return found_options(places[0]["top_logprobs"], options)

        return self._all(ask, len(conversations))

    def _all(self, ask: Callable[[int], Any], count: int) -> list[Any]:
        with ThreadPoolExecutor(self.config.requests_at_once) as pool:
            waiting = [pool.submit(ask, i) for i in range(count)]
            try:
                return [future.result() for future in waiting]
            finally:
                for future in waiting:  # after an error those that have not begun are not sent
                    future.cancel()

    def _ask(self, conversation: Conversation, more: dict[str, Any]) -> dict[str, Any]:
        answer = self._post({"model": self.config.model, "messages": conversation, **more})
        try:
            return answer["choices"][0]
        except (KeyError, IndexError, TypeError):
            raise UserError(f"{self.url} answered without choices: {str(answer)[:200]}") from None

    def _post(self, body: dict[str, Any]) -> Any:
        config = self.config
        key = os.environ.get(config.api_key_env)
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        address = f"{self.url}/chat/completions"
        request = urllib.request.Request(address, json.dumps(body).encode(), headers)
        for attempt in range(config.tries):
            pause = config.first_pause_s * 2**attempt
            try:
                with urllib.request.urlopen(request, timeout=config.timeout_s) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                why = f"answered {error.code}: {error.read()[:200].decode(errors='replace')}"
                if error.code not in RETRIED:
                    break
                pause = max(pause, _seconds(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException) as error:
                why = f"could not be reached: {getattr(error, 'reason', error)}"
            except json.JSONDecodeError:
                why = "answered with what is no JSON"
            if attempt + 1 < config.tries:
                time.sleep(pause)
        raise UserError(f"{address} {why}. What was answered before is kept; the same command goes on from there.")


def found_options(alternatives: Sequence[dict[str, Any]], options: Sequence[str]) -> OptionLogprobs:
    """Return each option's log-probability from a server's alternatives {token, logprob}, None when none is among them."""
    sums = [
        _log_sum([each["logprob"] for each in alternatives if each["token"].strip() == option.strip()]) for option in options
    ]  # fmt: skip
    if not any(math.isfinite(value) for value in sums):
        return None
    least = min(each["logprob"] for each in alternatives)
    return [value if math.isfinite(value) else least for value in sums]


def _log_sum(values: Sequence[float]) -> float:
    top = max(values, default=-math.inf)
    return top if not math.isfinite(top) else top + math.log(sum(math.exp(value - top) for value in values))


def _seconds(text: str | None) -> float:
    try:
        return min(60.0, float(text or 0))
    except ValueError:
        return 0.0
