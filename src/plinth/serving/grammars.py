"""Grammars of requests: compiled and judged in a thread of their own, so that neither the event loop nor the engine waits."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from plinth.config import UserError
from plinth.inference.grammar import Grammar
from plinth.inference.grammar_constraint import GrammarConstraint, GrammarWarning
from plinth.inference.text import TextEngine
from plinth.inference.verdict import why_invalid
from plinth.serving.errors import bad_request

T = TypeVar("T")


class Structure:
    """What the answers of one request must be."""

    def __init__(self, grammars: Grammars, start: GrammarConstraint, warnings: tuple[str, ...]):
        self.grammar, self.warnings = start.grammar, warnings
        self._grammars, self._start = grammars, start

    def constraint(self, behind: Sequence[int] = ()) -> GrammarConstraint:
        """Return the state at the beginning of one answer, or behind its first tokens."""
        constraint = self._start.copy()
        for token in behind:
            constraint.advance(token)
        return constraint

    async def valid(self, text: str, reason: str | None) -> bool:
        """Return whether a finished answer is what was asked for; one that was cut off is not."""
        compiler = self._start.compiler
        return await self._grammars.run(lambda: why_invalid(compiler, self.grammar, text, reason or "") is None)


class Grammars:
    """Compiles the grammars of requests, one at a time."""

    def __init__(self, text_engine: TextEngine):
        self._text_engine = text_engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="plinth-grammar")

    async def run(self, function: Callable[[], T]) -> T:
        """Return what `function` returns in the grammars' thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    async def structure(self, make: Callable[[], Grammar | None], max_tokens: int) -> Structure | None:
        """Return what the answers of a request must be; `make` returns its grammar. Raises ApiError (400)."""

        def start() -> Structure | None:
            grammar = make()
            if grammar is None:
                return None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", GrammarWarning)  # said in the answer's headers instead
                compiler = self._text_engine.grammars
                return Structure(self, compiler.start(grammar, max_tokens), compiler.compile(grammar).warnings)

        try:
            return await self.run(start)
        except UserError as error:
            raise bad_request(str(error), code="invalid_grammar") from None

    def close(self) -> None:
        """Stop the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)
