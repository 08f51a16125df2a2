"""Translation: texts in, texts out, by any model that encodes a source and writes its target token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from plinth.config import UserError
from plinth.data.parallel import Marks
from plinth.inference.beam import BeamParams, beam_search
from plinth.inference.request import each_params
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.step_space import StepSpace, sample_sequences
from plinth.models.hub import load_model, read_config
from plinth.run import find_model
from plinth.tokenizer.encode import Tokenizer

TARGET_TOKENIZER = "target_tokenizer"  # folder in a model folder, where the target has a vocabulary of its own


@dataclass(frozen=True)
class Translation:
    """What a model made of one source."""

    text: str
    """the translation"""
    tokens: list[int]
    """its token ids without the end"""
    logprob: float
    """log-probability in nats of its tokens; from a beam search that of its end too"""
    finish_reason: str
    """'stop' (the end) or 'length'; 'empty' where the source is blank"""
    source_tokens: list[int]
    """token ids that the encoder read"""


class Translator:
    """A translating model with its tokenizers."""

    def __init__(self, model: Any, source_tokenizer: Tokenizer, target_tokenizer: Tokenizer | None = None):
        """Take a `StepModel` that encodes sources; without a tokenizer for the target, both sides have one."""
        self.model, self.source_tokenizer = model, source_tokenizer
        self.target_tokenizer = target_tokenizer or source_tokenizer
        config = model.config
        own = hasattr(config, "start_id")
        self.marks = Marks(config.pad_id, config.start_id, config.end_id) if own else Marks.of(self.target_tokenizer)
        self.max_seq_len: int | None = getattr(config, "max_seq_len", None)

    @classmethod
    def load(cls, run: Path, dtype: torch.dtype = torch.float32) -> Translator:
        """Read a run or a model folder. Raises UserError when it holds no model that translates."""
        folder = find_model(Path(run))
        used_by = read_config(folder)[0].used_by
        if "translate" not in used_by:
            raise UserError(f"{run} holds no model that translates; it goes with {used_by}. Train one on `plinth pretrain --pairs`.")
        own = folder / TARGET_TOKENIZER
        return cls(load_model(folder, dtype), Tokenizer.load(folder), Tokenizer.load(own) if own.is_dir() else None)

    def translate(
        self, texts: Sequence[str], params: SamplingParams | BeamParams | None = None, *, batch_size: int = 32
    ) -> list[Translation]:
        """Translate each text, by sampling (temperature 0 is greedy, the default) or by beam search; results in the texts' order.

        A blank text stays empty. Texts of like length run together, `batch_size` at a time. Raises UserError for a text that is longer
        than the model's context.
        """
        params = params or SamplingParams(temperature=0, max_tokens=256)
        sources = self._sources(texts)
        order = sorted((i for i, source in enumerate(sources) if source), key=lambda i: -len(sources[i]))
        found: dict[int, Translation] = {}
        each = None if isinstance(params, BeamParams) else each_params(params, len(texts))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            rows = [sources[i] for i in part]
            results = self._sampled(rows, [each[i] for i in part]) if each else self._searched(rows, params)  # type: ignore[arg-type]
            found |= dict(zip(part, results))
        return [found.get(i) or Translation("", [], 0.0, "empty", []) for i in range(len(texts))]

    def _sources(self, texts: Sequence[str]) -> list[list[int]]:
        rows = [[*row, self.marks.end_id] if text.strip() else [] for text, row in zip(texts, self.source_tokenizer.encode_batch(texts))]
        for number, row in enumerate(rows, start=1):
            if self.max_seq_len is not None and len(row) > self.max_seq_len:
                raise UserError(
                    f"text {number} has {len(row)} tokens, its end included, more than the model's max_seq_len={self.max_seq_len}. "
                    "Cut it into sentences."
                )
        return rows

    def write(self, sources: list[list[int]], params: SamplingParams) -> list[Translation]:
        """Translate sources that are token ids with their end already."""
        return self._sampled(sources, each_params(params, len(sources)))

    def _sampled(self, rows: list[list[int]], params: list[SamplingParams]) -> list[Translation]:
        marks = self.marks
        found = sample_sequences(
            self.model, rows, params, (marks.end_id,), start_id=marks.start_id, pad_id=marks.pad_id, max_seq_len=self.max_seq_len
        )
        return [self._translation(row, one.tokens, sum(one.logprobs), one.finish_reason) for row, one in zip(rows, found)]

    def _searched(self, rows: list[list[int]], params: BeamParams) -> list[Translation]:
        if self.max_seq_len is not None:
            params = replace(params, max_tokens=min(params.max_tokens, self.max_seq_len))
        space = StepSpace(self.model, self.marks.start_id, self.marks.pad_id)
        space.prepare(rows)
        found = beam_search(space, rows, params, (self.marks.end_id,))
        return [self._translation(row, best.tokens, best.logprob, best.finish_reason) for row, (best, *_) in zip(rows, found)]

    def _translation(self, source: list[int], tokens: list[int], logprob: float, finish_reason: str) -> Translation:
        return Translation(self.target_tokenizer.decode(tokens).strip(), tokens, logprob, finish_reason, source)
