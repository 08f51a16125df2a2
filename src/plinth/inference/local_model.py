"""One of our models, asked as a judge, a critic or a writer: the engine behind the protocol of chat_model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from plinth.inference.chat_model import BATCH, Answer, Conversation, OptionLogprobs
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.text import TextEngine
from plinth.run import find_model, tree_sha256


class LocalModel:
    """One of our models, asked through the engine."""

    def __init__(self, text: TextEngine, identity: dict[str, Any]):
        self.text, self.identity = text, identity

    @classmethod
    def load(cls, path: Path | str, *, max_batch: int = BATCH) -> LocalModel:
        """Load a run, a build or a model folder."""
        folder = find_model(Path(path))
        return cls(TextEngine.load(folder, max_batch=max_batch), {"model": str(path), "model_sha256": tree_sha256(folder)})

    def answers(self, conversations: Sequence[Conversation], params: Sequence[SamplingParams]) -> list[Answer]:
        """Return the answer to each conversation."""
        return [Answer(each.text, each.finish_reason == "stop") for each in self.text.chat(conversations, params)]

    def option_logprobs(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[OptionLogprobs]:
        """Return the log-probability of each option behind the assistant's header, summed over its tokens."""
        prompts = [self.text.render(conversation) for conversation in conversations]
        endings = [self.text.tokenizer.encode(option) for option in options]
        scores = self.text.engine.score([prompt + ending for prompt in prompts for ending in endings])
        totals = iter([sum(score[-len(ending) :]) for score, ending in zip(scores, endings * len(prompts))])
        return [[next(totals) for _ in endings] for _ in prompts]
