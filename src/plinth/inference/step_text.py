"""Text in, text out, by a language model that goes token by token with a state of its own: a recurrent one."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch

from plinth.config import UserError
from plinth.inference.request import Counters, each_params
from plinth.inference.sampling import SamplingParams
from plinth.inference.step_space import StepModel, StepSpace, sample_sequences
from plinth.inference.text import Prompt, TextCompletion, assemble, end_ids, prompt_ids
from plinth.models.hub import load_model, read_config
from plinth.models.recurrent import AwdLstmConfig
from plinth.run import find_model
from plinth.tokenizer.encode import Tokenizer

WEIGHTS = {None: torch.float32, "fp32": torch.float32, "bf16": torch.bfloat16}


class StepEngine:
    """What searches ask of an engine, on a model that goes token by token."""

    def __init__(self, model: StepModel, eos_ids: Sequence[int]):
        self.model, self.eos_ids, self.counters = model, tuple(eos_ids), Counters()
        self.max_seq_len: int | None = None
        """a state has no longest text"""

    def search(self) -> AbstractContextManager[StepSpace]:
        """Return a space of sequences that grow token by token."""
        return contextlib.nullcontext(StepSpace(self.model))


class StepText:
    """A recurrent language model and its tokenizer, with those of `TextEngine`'s calls that it can answer."""

    def __init__(self, model: StepModel, tokenizer: Tokenizer):
        self.engine, self.tokenizer = StepEngine(model, end_ids(tokenizer)), tokenizer

    @classmethod
    def load(cls, path: Path | str, weights: str | None = None) -> StepText:
        """Load a run or a model folder. Raises UserError for weights other than fp32 and bf16."""
        if weights not in WEIGHTS:
            raise UserError(f"weights={weights!r} is for decoders; a recurrent model runs with fp32 or bf16.")
        folder = find_model(Path(path))
        return cls(load_model(folder, WEIGHTS[weights]), Tokenizer.load(folder))  # type: ignore[arg-type]

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt."""
        return prompt_ids(self.tokenizer, prompt)

    def complete(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, grammar: None = None
    ) -> list[TextCompletion]:
        """Continue each prompt; `params` is one for all (seed + i for prompt i) or one each.

        A stop string is cut off, with what follows it, when all tokens are there.
        """
        assert grammar is None, "a grammar needs the engine"
        each = each_params(params, len(prompts))
        found = sample_sequences(self.engine.model, [self.encode(prompt) for prompt in prompts], each, self.engine.eos_ids)
        return [assemble(self.tokenizer, completion, one.stop) for completion, one in zip(found, each)]


def goes_by_steps(path: Path | str) -> bool:
    """Return whether a run or a model folder holds a recurrent language model."""
    return read_config(find_model(Path(path)))[0].config is AwdLstmConfig
