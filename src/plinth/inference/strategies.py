"""Ways to get a valid document from a model, to be compared: asking, mending, asking again, constraining."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from plinth.config import UserError
from plinth.inference.grammar import Grammar
from plinth.inference.json_validity import SchemaChecker
from plinth.inference.repair import repair_json
from plinth.inference.sampling import SamplingParams
from plinth.inference.text import TextEngine


@dataclass(frozen=True)
class Attempted:
    """What one way made of one prompt."""

    text: str
    """the document, or what the model wrote where there is none"""
    valid: bool
    """whether it is a document that the schema allows"""
    attempts: int
    """completions that were generated"""
    completion_tokens: int
    """tokens of all of them"""
    changes: tuple[str, ...] = ()
    """what was mended"""


def schema_prompt(question: str, schema: dict) -> str:
    """Return a prompt that asks for an answer as JSON of a schema, for models that are good at following instructions."""
    return f"{question}\nAnswer with JSON of this schema and nothing else:\n{json.dumps(schema, ensure_ascii=False)}\n"


def ask(engine: TextEngine, prompts: Sequence[str], grammar: Grammar, params: SamplingParams) -> list[Attempted]:
    """Take what the model writes as it is."""
    checker = _checker(grammar)
    completions = engine.complete(prompts, params)
    return [Attempted(c.text, checker.valid(c.text), 1, len(c.tokens)) for c in completions]


def ask_and_repair(engine: TextEngine, prompts: Sequence[str], grammar: Grammar, params: SamplingParams) -> list[Attempted]:
    """Look for a document in what the model writes and mend it."""
    return [_repaired(each, _checker(grammar)) for each in ask(engine, prompts, grammar, params)]


def _repaired(attempt: Attempted, checker: SchemaChecker) -> Attempted:
    found = None if attempt.valid else repair_json(attempt.text)
    if found is None:
        return attempt
    return replace(attempt, text=found.text, valid=checker.valid(found.text), changes=found.changes)


def retry(
    engine: TextEngine, prompts: Sequence[str], grammar: Grammar, params: SamplingParams, max_attempts: int = 8, *, repair: bool = False
) -> list[Attempted]:
    """Ask again, with another seed each time, until the document is valid or max_attempts completions were spent.

    Prompts that are still open run together. Raises UserError at temperature 0, where every attempt is the same.
    """
    if params.temperature == 0 and max_attempts > 1:
        raise UserError("retry at temperature=0 gives the same text each time. Use a temperature above 0, or max_attempts=1.")
    checker, seed = _checker(grammar), params.seed if params.seed is not None else 0
    results: dict[int, Attempted] = {}
    waiting = list(range(len(prompts)))
    for attempt in range(1, max_attempts + 1):
        each = [replace(params, seed=seed + i + len(prompts) * (attempt - 1)) for i in waiting]
        for i, completion in zip(waiting, engine.complete([prompts[i] for i in waiting], each)):
            spent = results[i].completion_tokens if i in results else 0
            made = Attempted(completion.text, checker.valid(completion.text), attempt, spent + len(completion.tokens))
            results[i] = _repaired(made, checker) if repair else made
        waiting = [i for i in waiting if not results[i].valid]
        if not waiting:
            break
    return [results[i] for i in range(len(prompts))]


def constrain(engine: TextEngine, prompts: Sequence[str], grammar: Grammar, params: SamplingParams) -> list[Attempted]:
    """Let the model choose only what the grammar allows."""
    completions = engine.complete(prompts, params, grammar)
    return [Attempted(c.text, bool(c.valid), 1, len(c.tokens)) for c in completions]


def _checker(grammar: Grammar) -> SchemaChecker:
    if not grammar.is_json:
        raise UserError(f"a grammar of kind {grammar.kind} has no schema to validate against. Use Grammar.json_schema.")
    return SchemaChecker(json.loads(grammar.source))
