"""Text in, text out, over the engine's tokens: stop strings, whole characters, chat."""

from __future__ import annotations

import codecs
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from plinth.config import UserError
from plinth.inference.engine import Engine, Event, each_params
from plinth.inference.grammar import Grammar
from plinth.inference.grammar_constraint import GrammarCompiler, GrammarConstraint
from plinth.inference.request import Completion
from plinth.inference.runners import Weights, loading_dtype, make_runner
from plinth.inference.sampling import SamplingParams
from plinth.inference.verdict import why_invalid
from plinth.models.hub import load_decoder, read_config
from plinth.models.transformer import Transformer
from plinth.run import find_model
from plinth.tokenizer.chat import Message, render
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.tool_format import Tool

Prompt = str | Sequence[int]
Grammars = Grammar | Sequence[Grammar | None] | None


@dataclass(frozen=True)
class TextCompletion:
    """What the model wrote for one prompt, as text and as tokens."""

    text: str
    """text before the first stop string; bytes that are no UTF-8 show as U+FFFD"""
    tokens: list[int]
    """ids of the tokens whose text begins before the end of the text"""
    logprobs: list[float]
    """log-probability in nats of each token, raw model distribution"""
    top_logprobs: list[list[tuple[int, float]]]
    """the most probable tokens at each place, as many as were asked for"""
    finish_reason: str
    """'stop' (an end token or a stop string) or 'length'"""
    prompt_tokens: int
    """length of the prompt in tokens"""
    valid: bool | None = None
    """whether the text is what its grammar asks for; never when it was cut off; None without a grammar"""
    why_invalid: str | None = None
    """what is wrong with it, where something is"""
    closed_early: bool = False
    """whether a JSON document was closed because the tokens ran out; it is complete, but its model might have gone on"""


@dataclass(frozen=True)
class TextDelta:
    """What one token adds to a stream; `text` may be empty while a character or a possible stop string is held back."""

    text: str
    """text that is certain"""
    tokens: list[int]
    """ids of the tokens that came since the last delta"""
    logprobs: list[float]
    """their log-probabilities in nats"""
    top_logprobs: list[list[tuple[int, float]]]
    """the most probable tokens at each place"""
    finish_reason: str | None
    """'stop' or 'length' on the last delta, else None"""
    valid: bool | None = None
    """on the last delta, as in TextCompletion"""


class TextAssembler:
    """Turns tokens into text that is certain: whole characters, nothing that may become part of a stop string.

    What has been returned is never taken back, and the pieces joined are the text up to the stop string that is complete
    first (of two that are so at once, the one that begins first).
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False
        """whether a stop string was met; nothing more comes then"""

    def push(self, token: int) -> str:
        """Take one token and return the text that became certain."""
        return "" if self.stopped else self._take(self._decoder.decode(self._tokenizer.token_bytes(token)), final=False)

    def flush(self) -> str:
        """End the text: return what was held back; an unfinished character becomes U+FFFD."""
        return "" if self.stopped else self._take(self._decoder.decode(b"", final=True), final=True)

    def _take(self, text: str, final: bool) -> str:
        self._held += text
        # The match that is complete first counts, so the answer is the same however the text is cut into tokens.
        found = [(at + len(stop), at) for stop in self._stop if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            certain, self._held = self._held[: min(found)[1]], ""
            return certain
        keep = 0 if final else self._uncertain()
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain

    def _uncertain(self) -> int:
        """Return how many characters at the end may be the beginning of a stop string."""
        longest = 0
        for stop in self._stop:
            for length in range(min(len(stop) - 1, len(self._held)), longest, -1):
                if self._held.endswith(stop[:length]):
                    longest = length
                    break
        return longest


@dataclass
class _Answer:
    """One completion as it grows."""

    assembler: TextAssembler
    constraint: GrammarConstraint | None = None
    decoder: codecs.IncrementalDecoder = field(default_factory=lambda: codecs.getincrementaldecoder("utf-8")(errors="replace"))
    starts: list[int] = field(default_factory=list)
    num_characters: int = 0
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[list[tuple[int, float]]] = field(default_factory=list)
    finish_reason: str | None = None

    def push(self, event: Event, tokenizer: Tokenizer) -> TextDelta:
        """Take one event; sets finish_reason when the text ends here."""
        added = ""
        ended = event.finish_reason
        if ended != "stop":
            self.starts.append(self.num_characters)
            self.num_characters += len(self.decoder.decode(tokenizer.token_bytes(event.token)))
            self.tokens.append(event.token)
            self.logprobs.append(event.logprob)
            self.top_logprobs.append(event.top_logprobs)
            added = self.assembler.push(event.token)
        if ended is not None:
            added += self.assembler.flush()
        self.finish_reason = "stop" if self.assembler.stopped else ended
        self.text += added
        fresh = slice(len(self.tokens) - 1, None) if ended != "stop" else slice(len(self.tokens), None)
        valid = self.why_invalid() is None if self.finish_reason and self.constraint else None
        return TextDelta(added, self.tokens[fresh], self.logprobs[fresh], self.top_logprobs[fresh], self.finish_reason, valid)

    def why_invalid(self) -> str | None:
        """Return what is wrong with the finished text under its grammar."""
        assert self.constraint is not None and self.finish_reason is not None
        return self.constraint.error or why_invalid(self.constraint.compiler, self.constraint.grammar, self.text, self.finish_reason)

    def finished(self, prompt_tokens: int) -> TextCompletion:
        """Return the completion without the tokens that lie wholly in or behind a stop string."""
        count = len(self.tokens)
        if self.assembler.stopped:
            count = sum(start < len(self.text) for start in self.starts)
        assert self.finish_reason is not None
        parts = self.tokens[:count], self.logprobs[:count], self.top_logprobs[:count]
        completion = TextCompletion(self.text, *parts, self.finish_reason, prompt_tokens)
        if self.constraint is None:
            return completion
        reason = self.why_invalid()
        return replace(completion, valid=reason is None, why_invalid=reason, closed_early=self.constraint.closed_early)


class TextEngine:
    """An engine and its tokenizer."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer):
        if tokenizer.vocab_size > engine.vocab_size:
            raise UserError(
                f"the tokenizer has {tokenizer.vocab_size} ids, the model only {engine.vocab_size}. "
                "They do not belong together: use the tokenizer in the model's own folder."
            )
        self.engine = engine
        self.tokenizer = tokenizer

    @cached_property
    def grammars(self) -> GrammarCompiler:
        """Compiles grammars for this tokenizer; made at the first use."""
        return GrammarCompiler(self.tokenizer, self.engine.vocab_size, (*self.engine.eos_ids, *end_ids(self.tokenizer)))

    @classmethod
    def load(
        cls,
        path: Path | str,
        weights: Weights | None = None,
        *,
        max_batch: int = 32,
        max_seq_len: int | None = None,
        device: torch.device | str = "cpu",
    ) -> TextEngine:
        """Load a run, a build or a model folder; see plinth.inference.runners for its weights.

        Completions end at <|endoftext|> and, where the tokenizer has it, at <|end|>; of a published model at what its own files name.
        """
        folder = find_model(Path(path))
        tokenizer = Tokenizer.load(folder)
        dtype = loading_dtype(read_config(folder)[1], weights, device)
        return cls.of(load_decoder(folder, dtype).to(device), tokenizer, weights, max_batch=max_batch, max_seq_len=max_seq_len)

    @classmethod
    def of(
        cls,
        model: Transformer,
        tokenizer: Tokenizer,
        weights: Weights | None = None,
        *,
        max_batch: int = 32,
        max_seq_len: int | None = None,
    ) -> TextEngine:
        """Take a model that is in memory, on its device; what else is as in `load`."""
        runner = make_runner(model.eval(), weights)
        return cls(Engine(runner, max_batch=max_batch, max_seq_len=max_seq_len, eos_ids=end_ids(tokenizer)), tokenizer)

    def encode(self, prompt: Prompt) -> list[int]:
        """Return the ids of a prompt, as `prompt_ids` does."""
        return prompt_ids(self.tokenizer, prompt)

    def complete(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None, grammar: Grammars = None
    ) -> list[TextCompletion]:
        """Continue each prompt, a text or token ids; `params` is one for all (seed + i for prompt i) or one each.

        grammar: what each completion must be, one for all or one each. Raises UserError when one cannot be enforced.
        """
        if isinstance(prompts, str):
            raise UserError("prompts is one text; give a list of prompts.")
        encoded = [self.encode(prompt) for prompt in prompts]
        each = each_params(params, len(encoded))
        answers: dict[int, _Answer] = {}
        try:
            for tokens, wanted, each_grammar in zip(encoded, each, each_of(grammar, len(encoded))):
                request_id, answer = self._add(tokens, wanted, each_grammar)
                answers[request_id] = answer
            while any(answer.finish_reason is None for answer in answers.values()):
                self._step(answers)
        finally:
            for request_id in answers:
                self.engine.cancel(request_id)
        return [answer.finished(len(tokens)) for answer, tokens in zip(answers.values(), encoded)]

    def _add(self, tokens: list[int], params: SamplingParams, grammar: Grammar | None) -> tuple[int, _Answer]:
        room = min(params.max_tokens, self.engine.max_seq_len - len(tokens))
        constraint = None if grammar is None else self.grammars.start(grammar, room)
        return self.engine.add(tokens, params, constraint), _Answer(TextAssembler(self.tokenizer, params.stop), constraint)

    def _step(self, answers: dict[int, _Answer]) -> None:
        for event in self.engine.step():
            answer = answers.get(event.id)
            if answer is not None and answer.finish_reason is None:
                answer.push(event, self.tokenizer)
                if answer.finish_reason is not None:
                    self.engine.end(event.id)

    def render(self, messages: list[Message], tools: list[Tool] | None = None) -> list[int]:
        """Return the tokens of a conversation with the assistant's header behind it; tools are described in its beginning."""
        return render(self.tokenizer, messages, add_generation_prompt=True, tools=tools).tokens

    def chat(
        self,
        conversations: Sequence[list[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        grammar: Grammars = None,
        tools: list[Tool] | None = None,
    ) -> list[TextCompletion]:
        """Answer each conversation, a list of {role, content}; an answer ends at <|end|> or <|endoftext|>.

        tools: functions that the answers may call; tool_calls.tool_grammar keeps the calls well-formed, parse_answer reads them.
        """
        each = each_params(params, len(conversations))
        prompts = [self.render(messages, tools) for messages in conversations]
        return self.complete(prompts, [replace(p, stop_token_ids=self._chat_ends(p)) for p in each], grammar)

    def _chat_ends(self, params: SamplingParams) -> tuple[int, ...]:
        return tuple({*params.stop_token_ids, *end_ids(self.tokenizer)})

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, grammar: Grammar | None = None
    ) -> Generator[TextDelta, None, None]:
        """Yield the completion of one prompt as it grows. Closing the iterator frees what it holds at once."""
        request_id, answer = self._add(self.encode(prompt), params or SamplingParams(), grammar)
        try:
            while answer.finish_reason is None:
                for event in self.engine.step():
                    if event.id == request_id and answer.finish_reason is None:
                        delta = answer.push(event, self.tokenizer)
                        if answer.finish_reason is not None:
                            self.engine.end(request_id)
                        yield delta
        finally:
            self.engine.cancel(request_id)

    def stream_chat(
        self,
        messages: list[Message],
        params: SamplingParams | None = None,
        grammar: Grammar | None = None,
        tools: list[Tool] | None = None,
    ) -> Generator[TextDelta, None, None]:
        """Yield the answer to a conversation as it grows."""
        params = params or SamplingParams()
        return self.stream(self.render(messages, tools), replace(params, stop_token_ids=self._chat_ends(params)), grammar)


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Return the ids of a prompt: a text with what its tokenizer puts before one; an empty one as what a document begins behind."""
    if not isinstance(prompt, str):
        return list(prompt)
    tokens = tokenizer.prefix_ids + tokenizer.encode(prompt)
    return tokens if tokens or tokenizer.start_id is None else [tokenizer.start_id]


def assemble(tokenizer: Tokenizer, completion: Completion, stop: Sequence[str] = ()) -> TextCompletion:
    """Return a finished completion as text, cut at the first of its stop strings."""
    answer = _Answer(TextAssembler(tokenizer, stop))
    count = len(completion.tokens)
    for i, parts in enumerate(zip(completion.tokens, completion.logprobs, completion.top_logprobs)):
        ended = completion.finish_reason if i == count - 1 and completion.finish_reason == "length" else None
        answer.push(Event(0, *parts, ended), tokenizer)
        if answer.finish_reason is not None:
            break
    if answer.finish_reason is None:
        answer.push(Event(0, -1, 0.0, [], "stop"), tokenizer)
    return answer.finished(completion.prompt_tokens)


def each_of(grammar: Grammars, count: int) -> list[Grammar | None]:
    """Return one grammar a prompt. Raises UserError when there are not as many."""
    if grammar is None or isinstance(grammar, Grammar):
        return [grammar] * count
    if len(grammar) != count:
        raise UserError(f"{len(grammar)} grammars for {count} prompts. Give one for all, or one each.")
    return list(grammar)


def end_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end a completion: <|endoftext|> and <|end|>, and what a published model's own files name."""
    return tokenizer.end_ids
