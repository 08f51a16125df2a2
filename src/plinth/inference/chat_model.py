"""A model that is asked things by another part of the toolkit, as a judge, a critic or a writer: ours, or one behind a server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from plinth.inference.sampling_params import SamplingParams
from plinth.tokenizer.chat import Message

Conversation = list[Message]
OptionLogprobs = list[float] | None
BATCH = 64  # conversations asked at once; what was answered before an interruption is kept


class Answer(NamedTuple):
    """What a model wrote."""

    text: str
    """the answer"""
    finished: bool
    """whether the model ended it; else it was cut off for its length"""


class ChatModel(Protocol):
    """Answers conversations, and says how likely it is to begin its answer with each of some words."""

    identity: dict[str, Any]
    """what its answers depend on beside the question"""

    def answers(self, conversations: Sequence[Conversation], params: Sequence[SamplingParams]) -> list[Answer]:
        """Return the answer to each conversation, with parameters of its own."""
        ...

    def option_logprobs(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[OptionLogprobs]:
        """Return for each conversation the log-probability in nats of each option as the answer's beginning, None where none is known."""
        ...


class KeptAnswers:
    """A model whose answers are kept in a file of JSON Lines as they come: what it was asked before, it is not asked again.

    So an interrupted job goes on where it was, and nothing is paid for twice. A line that was cut off is left out.
    """

    def __init__(self, model: ChatModel, path: Path):
        self.model, self.identity, self.path = model, model.identity, path
        self.asked = self.known = 0
        self._kept: dict[str, Any] = {}
        written = path.read_bytes() if path.exists() else b""
        for line in written.splitlines():
            try:
                record = json.loads(line)
                self._kept[record["key"]] = record["value"]
            except (ValueError, KeyError, TypeError):
                continue
        self._broken = bool(written) and not written.endswith(b"\n")

    def answers(self, conversations: Sequence[Conversation], params: Sequence[SamplingParams]) -> list[Answer]:
        """Return the answer to each conversation."""
        keys = [self._key("answer", conversation, asdict(each)) for conversation, each in zip(conversations, params)]
        found = self._through(keys, lambda part: self.model.answers([conversations[i] for i in part], [params[i] for i in part]))
        return [Answer(*each) for each in found]

    def option_logprobs(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[OptionLogprobs]:
        """Return the log-probability of each option."""
        keys = [self._key("options", conversation, list(options)) for conversation in conversations]
        return self._through(keys, lambda part: self.model.option_logprobs([conversations[i] for i in part], options))

    def _key(self, kind: str, conversation: Conversation, more: Any) -> str:
        return hashlib.sha256(json.dumps([kind, self.identity, conversation, more], sort_keys=True).encode()).hexdigest()

    def _through(self, keys: list[str], ask: Callable[[list[int]], list[Any]]) -> list[Any]:
        missing = list({key: i for i, key in enumerate(keys) if key not in self._kept}.values())
        self.known += len(keys) - len(missing)
        for start in range(0, len(missing), BATCH):
            part = missing[start : start + BATCH]
            values = ask(part)
            self.asked += len(part)
            self._keep([keys[i] for i in part], values)
        return [self._kept[key] for key in keys]

    def _keep(self, keys: list[str], values: list[Any]) -> None:
        self._kept.update(zip(keys, values))
        lines = "".join(json.dumps({"key": key, "value": value}, ensure_ascii=False) + "\n" for key, value in zip(keys, values))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._broken else "") + lines)
        self._broken = False
