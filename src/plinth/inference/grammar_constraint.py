"""Grammars at work: compiled once for a tokenizer, then a state for each completion that says what may come next."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from plinth.config import UserError
from plinth.inference.closing import Closer, TextState
from plinth.inference.grammar import Grammar, short_message
from plinth.inference.trial import needs_trial, shared_trial
from plinth.ops.mask import mask_bytes
from plinth.tokenizer.encode import Tokenizer

CACHED_GRAMMARS = 64
# The library's defaults but for the sizes of dumps in its messages. Fuel is counted in its own steps, some 50,000 a millisecond
# while a grammar is compiled and 14,000 while a mask is computed, so that no grammar holds a step of the engine for long.
LIMITS = {"initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 200_000, "step_max_items": 50_000, "max_grammar_size": 500_000}


class GrammarWarning(UserWarning):
    """A grammar was compiled without some of what it asks for."""


@dataclass(frozen=True)
class CompiledGrammar:
    """A grammar that is ready for one tokenizer."""

    grammar: Grammar
    """what it was made from"""
    matcher: LLMatcher
    """its first state; it is copied, never moved on"""
    warnings: tuple[str, ...]
    """what is not enforced, in lenient mode"""


class GrammarCompiler:
    """Compiles grammars for one tokenizer and keeps the latest of them.

    vocab_size: the model's, which may be larger than the tokenizer's. end_ids: tokens that end a completion; they may come
    where the grammar lets the text end. No other special token may come anywhere.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]):
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.end_ids = tuple(dict.fromkeys(end_ids))
        self._ll = LLTokenizer(TokenizerWrapper(_Vocabulary(tokenizer, vocab_size, self.end_ids)), eos_token=list(self.end_ids) or None)
        self._cache: OrderedDict[Grammar, CompiledGrammar] = OrderedDict()
        token_bytes = [tokenizer.token_bytes(i) for i in range(vocab_size)]
        self._usable = _bits([i for i, spelled in enumerate(token_bytes) if spelled] + list(self.end_ids), vocab_size)
        self._ends = _bits(self.end_ids, vocab_size)
        self._closer = Closer(token_bytes)

    def compile(self, grammar: Grammar) -> CompiledGrammar:
        """Return the grammar ready for use. Raises UserError when it is malformed, too large, or asks for what cannot be enforced.

        What lenient mode ignores is warned of (GrammarWarning) when the grammar is compiled first, and kept in the result.
        """
        if grammar in self._cache:
            self._cache.move_to_end(grammar)
            return self._cache[grammar]
        matcher, ignored = self._matcher(grammar, lenient=False), []
        if matcher.is_error() and grammar.has_schema and grammar.mode == "lenient":
            matcher = self._matcher(grammar, lenient=True)
            ignored = [short_message(message) for message in matcher.get_grammar_warnings()]
        if matcher.is_error():
            raise UserError(_refusal(grammar, short_message(matcher.get_error())))
        if ignored:
            warnings.warn(f"the schema is not enforced in full: {'; '.join(ignored)}.", GrammarWarning, stacklevel=2)
        compiled = CompiledGrammar(grammar, matcher, tuple(ignored))
        self._cache[grammar] = compiled
        if len(self._cache) > CACHED_GRAMMARS:
            self._cache.popitem(last=False)
        return compiled

    def _matcher(self, grammar: Grammar, lenient: bool) -> LLMatcher:
        try:
            source = grammar.compiled_source(lenient)
        except ValueError as error:
            raise UserError(f"the {grammar.kind} cannot be compiled: {short_message(str(error))}.") from None
        if needs_trial(grammar.kind, grammar.source) and not shared_trial().passes(source, LIMITS):
            raise UserError(f"the {grammar.kind} takes too long to compile. Use fewer alternatives, properties or patterns at one place.")
        matcher = LLMatcher(self._ll, source, log_level=0, limits=LLParserLimits(**LIMITS))
        if not matcher.is_error():
            matcher.deep_copy().compute_bitmask()  # fills the lexer's cache, which copies share
        return matcher

    def start(self, grammar: Grammar, max_tokens: int | None = None) -> GrammarConstraint:
        """Return the state at the beginning of a completion.

        With max_tokens a JSON document is closed when the tokens are about to run out: see GrammarConstraint.
        Raises UserError as `compile` does, and when the grammar allows nothing at all.
        """
        constraint = GrammarConstraint(self.compile(grammar), self, max_tokens)
        constraint.allowed()
        if constraint.error is not None:
            raise UserError(f"the {grammar.kind} allows no text: {constraint.error}.")
        return constraint

    def accepts(self, grammar: Grammar, text: str) -> bool:
        """Return whether a whole text is one of those that the grammar allows."""
        matcher = self.compile(grammar).matcher.deep_copy()
        return bool(matcher.consume_tokens(self._ll.tokenize_str(text)) and matcher.is_accepting())


class GrammarConstraint:
    """The state of one completion under a grammar; implements plinth.inference.constraint.Constraint.

    A JSON document with max_tokens is closed in time: while tokens are left, the way to a complete document is looked for
    (greedily: an upper bound of the shortest), and once no more are left than it needs, it is taken. `closed_early` says so.
    """

    def __init__(self, compiled: CompiledGrammar, compiler: GrammarCompiler, max_tokens: int | None):
        self.grammar = compiled.grammar
        self.closed_early = False
        self.error: str | None = None
        """why the grammar cannot go on, where it cannot; the completion ends then"""
        self.compiler = compiler
        self._matcher = compiled.matcher.deep_copy()
        self._words = np.zeros(-(-compiler.vocab_size // 32), np.uint32)
        self._bytes = self._words.view(np.uint8)
        self._mask = self._bytes[: mask_bytes(compiler.vocab_size)]
        self._remaining = max_tokens if compiled.grammar.has_schema else None
        self._look_in = 0  # tokens until the way to the end is looked for again
        self._way: list[int] | None = None
        self._text = TextState()

    def allowed(self) -> np.ndarray:
        """Return the tokens that may come next, one bit each."""
        self._look_for_the_end()
        if self._way is not None:
            self._mask[:] = _bits(self._way[:1], self.compiler.vocab_size) if self._way else self.compiler._ends
            return self._mask
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._mask &= self.compiler._usable
        if self._matcher.is_error() or not self._mask.any():
            self._fail(self._matcher.get_error() or "no token goes on from here")
        return self._mask

    def advance(self, token: int) -> None:
        """Take a token that was chosen."""
        if self.error is None and not self._matcher.consume_token(token):
            self._fail(self._matcher.get_error())
        if self._remaining is not None:
            self._remaining -= 1
            self._look_in -= 1
            self._text.push(self.compiler.tokenizer.token_bytes(token))
        if self._way is not None:
            self._way = self._way[1:]

    def _fail(self, message: str) -> None:
        self.error = short_message(message)
        self._mask[:] = self.compiler._ends

    def forced(self) -> list[int]:
        """Return the tokens that must come now: how the tokenizer would write the text that the grammar leaves no choice about."""
        if self.error is not None:
            return []
        self._look_for_the_end()
        if self._way is not None:
            return list(self._way)
        return self._matcher.compute_ff_tokens() if self.compiler.tokenizer.is_byte_level else []

    def finished(self) -> bool:
        """Return whether nothing may follow."""
        return self.error is not None or self._way == [] or self._matcher.is_stopped()

    def copy(self) -> GrammarConstraint:
        """Return a constraint in the same state."""
        twin = GrammarConstraint.__new__(GrammarConstraint)
        twin.__dict__.update(self.__dict__)
        twin._matcher = self._matcher.deep_copy()
        twin._text = self._text.copy()
        twin._words = self._words.copy()
        twin._bytes = twin._words.view(np.uint8)
        twin._mask = twin._bytes[: len(self._mask)]
        return twin

    def _look_for_the_end(self) -> None:
        """Commit to the way to the end when there is just room for it."""
        if self._remaining is None or self._way is not None or self._look_in > 0 or self.error is not None:
            return
        way = self.compiler._closer.way(self._matcher, self.compiler._usable, self._text)
        if not way:
            self._look_in = 1  # none within reach, or none needed; without one, the completion may be cut off and says so
            return
        spare = self._remaining - len(way)
        if 0 <= spare <= Closer.SPARE and not self._matcher.is_stopped():
            self._way, self.closed_early = way, True
        self._look_in = max(1, (spare - Closer.SPARE) // 3)


class _Vocabulary:
    """What llguidance asks of a tokenizer. Special tokens are named in a way that no text can spell."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_ids: Sequence[int]):
        special = tokenizer.special_ids | set(end_ids)
        self.tokens = [tokenizer.token_bytes(i, skip_special=False) for i in range(vocab_size)]
        self.special_token_ids = sorted(special)
        self.eos_token_id = end_ids[0] if end_ids else vocab_size - 1
        self.bos_token_id = None
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        if not isinstance(text, str):
            raise TypeError("texts only")  # asked once with bytes, to learn which of the two is taken
        return self._tokenizer.encode_continuing(text)


def _bits(ids: Sequence[int], vocab_size: int) -> np.ndarray:
    allowed = np.zeros(vocab_size, bool)
    allowed[list(ids)] = True
    return np.packbits(allowed, bitorder="little")


def _refusal(grammar: Grammar, message: str) -> str:
    if grammar.has_schema and grammar.mode == "strict":
        return (
            f"the {grammar.kind} cannot be enforced: {message}. Take that out, or use mode='lenient', which ignores "
            "unknown keywords with a warning and validates the result."
        )
    return f"the {grammar.kind} cannot be compiled: {message}."
