"""`plinth generate`: text from a model."""

from __future__ import annotations

import sys
import time
import warnings
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from plinth.cli.generate_search import SearchOptions, choose_best, search_beams
from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.config import UserError


@dataclass(frozen=True)
class GenerateCommand:
    """Continue a prompt, or answer it as a chat message, with a trained model."""

    run: tyro.conf.Positional[Path]
    """a run, a build, or a model folder in Hugging Face's format"""
    adapter: Path | None = None
    """run with --adapter.rank, or a folder that PEFT saved, whose adapter is merged into the model in memory; None = the model as it is"""
    prompt: Annotated[tuple[str, ...], tyro.conf.arg(aliases=["-p"])] = ()
    """texts to go on from, all at once in one batch; none: standard input is the prompt"""
    chat: bool = False
    """send each prompt as a user's message and print the answer"""
    system: str | None = None
    """with --chat: a system message before it"""
    max_tokens: int = 128
    """tokens to generate at most, for each prompt"""
    temperature: float = 1.0
    """divisor of the scores; 0 = always the most probable token"""
    top_k: int | None = None
    """choose among this many most probable tokens only"""
    top_p: float | None = None
    """choose among the most probable tokens that together have this probability, 0 to 1"""
    min_p: float | None = None
    """choose among tokens at least this many times as probable as the first one, 0 to 1"""
    typical_p: float | None = None
    """choose among the tokens of the most expected surprise that together have this probability, 0 to 1"""
    repetition_penalty: float | None = None
    """make tokens of the prompt and the answer less likely, above 1"""
    presence_penalty: float | None = None
    """take this off the score of each token that is in the answer, -2 to 2"""
    frequency_penalty: float | None = None
    """take this off a token's score for each time it is in the answer, -2 to 2"""
    min_tokens: int = 0
    """tokens to generate at least"""
    seed: int | None = None
    """seed; prompt i gets seed + i. None = a fresh one"""
    stop: tuple[str, ...] = ()
    """texts that end the answer; they are left out"""
    logprobs: int | None = None
    """show each token's log-probability (nats, of the raw model) and this many alternatives"""
    weights: Literal["fp32", "bf16", "int8", "int4"] | None = None
    """format of the weights while running; None = bf16 where this processor has our kernels, else fp32"""
    json_schema: Path | None = None
    """file with a JSON Schema that each answer must satisfy"""
    regex: str | None = None
    """regular expression that each answer must match from beginning to end"""
    choice: tuple[str, ...] = ()
    """texts of which each answer must be one"""
    grammar: Path | None = None
    """file with a context-free grammar of the answers: GBNF where its name ends in .gbnf, else Lark"""
    lenient: bool = False
    """with --json-schema: ignore keywords that cannot be enforced, with a warning; answers are validated"""
    search: tyro.conf.OmitArgPrefixes[SearchOptions] = field(default_factory=SearchOptions)
    speculate: str | None = None
    """guess tokens ahead, which changes no answer: prompt-lookup, or a smaller model of the same tokenizer"""
    draft_tokens: int | None = None
    """with --speculate: tokens guessed at a time, 1 to 15; None = 8 by prompt-lookup, 4 by a model"""
    answer_cache: Path | None = None
    """file that keeps answers which would come out the same again (greedy or seeded), to give them without computing; None = none kept"""
    min_likeness: float | None = None
    """with answer_cache: cosine (0 to 1) from which a prompt takes another's answer, perhaps wrongly; None = equal prompts only"""
    json: bool = False
    """print one JSON object"""


def main(argv: list[str]) -> int:
    """Generate and print; exit code 0 on success."""
    command = read_options(GenerateCommand, args=argv, prog="plinth generate", description=GenerateCommand.__doc__)
    if command.system is not None and not command.chat:
        raise UserError("--system needs --chat: a plain continuation has no system message.")
    prompts = command.prompt or (_read_stdin(),)
    result = generate(command, prompts)
    emit(result, command.json, lambda console: _show(console, result, command.logprobs is not None))
    return 0


def _read_stdin() -> str:
    if sys.stdin.isatty():
        raise UserError('no prompt. Give one: plinth generate RUN --prompt "text", or pipe it to standard input.')
    return sys.stdin.read()


def generate(command: GenerateCommand, prompts: tuple[str, ...]) -> dict[str, Any]:
    """Run the prompts in one batch; returns what is printed with --json."""
    from plinth.cli.answers import keep_answers
    from plinth.cli.speculate import speculate, speculation_counts
    from plinth.inference.sampling_params import SamplingParams

    grammar = read_grammar(command)
    names = {one.name for one in fields(SamplingParams)} & {one.name for one in fields(GenerateCommand)}
    params = SamplingParams(**{name: getattr(command, name) for name in names})  # a mistake here should not wait for the model
    command.search.check()
    if grammar is not None and command.search.answers_each > 1:
        raise UserError("--beams and --best-of take no grammar. Draw single answers under it.")
    engine = load_engine(
        command.run, command.weights, max_batch=min(64, len(prompts) * command.search.answers_each), adapter=command.adapter
    )
    refuse_without_engine(engine, command, grammar)
    speculate(engine, command.speculate, command.draft_tokens, command.weights)
    keep_answers(engine, command.run, command.answer_cache, command.min_likeness, command.adapter)
    if grammar is not None:
        for ignored in compile_grammar(engine, grammar):
            say(f"warning: not enforced: {ignored}")
    started = time.perf_counter()
    completions, facts = _answer(engine, command, prompts, params, grammar)
    elapsed_s = time.perf_counter() - started
    count = sum(len(completion.tokens) for completion in completions)
    return {
        "model": str(command.run),
        "completions": [_plain(engine, *each) | more for *each, more in zip(prompts, completions, facts)],
        "completion_tokens": count,
        "time_s": elapsed_s,
        "tokens_per_s": count / elapsed_s,
        **speculation_counts(engine.engine),
        **({} if command.answer_cache is None else {"known_answers": engine.engine.counters.known_answers}),
    }


def _answer(engine, command: GenerateCommand, prompts: tuple[str, ...], params, grammar) -> tuple[list[Any], list[dict[str, Any]]]:
    """Return a completion of each prompt, and what there is to say about how it was chosen."""
    system = [{"role": "system", "content": command.system}] if command.system is not None else []
    conversations = [[*system, {"role": "user", "content": prompt}] for prompt in prompts]
    search = command.search
    if search.beams is None and search.best_of is None:
        completions = engine.chat(conversations, params, grammar) if command.chat else engine.complete(prompts, params, grammar)
        return completions, [{} for _ in completions]
    encoded = [engine.render(one) for one in conversations] if command.chat else [engine.encode(prompt) for prompt in prompts]
    if search.beams is not None:
        found = search_beams(engine, encoded, search, params.max_tokens)
    else:
        found = choose_best(engine, encoded, params, search)
    return [completion for completion, _ in found], [more for _, more in found]


def refuse_without_engine(engine, command: GenerateCommand, grammar) -> None:
    """Raise UserError for an option that needs the paged engine, where the model does not run on it."""
    from plinth.inference.step_text import StepText

    if not isinstance(engine, StepText):
        return
    asked = {
        "--chat": command.chat, "--best-of": command.search.best_of, "--speculate": command.speculate,
        "--answer-cache": command.answer_cache, "a grammar": grammar,
    }  # fmt: skip
    for name, value in asked.items():
        if value not in (None, False):
            raise UserError(f"{command.run} holds a recurrent model, and {name} needs a decoder. Leave it out, or name a decoder.")


def read_grammar(command: GenerateCommand):
    """Return the grammar that the options ask for, or None. Raises UserError when there are several or a file cannot be read."""
    named = {"--json-schema": command.json_schema, "--regex": command.regex, "--choice": command.choice, "--grammar": command.grammar}
    given = [name for name, value in named.items() if value not in (None, ())]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} say two things of one answer. Give one of them.")
    if command.lenient and command.json_schema is None:
        raise UserError("--lenient needs --json-schema: other grammars are enforced in full.")
    if not given:
        return None
    from plinth.inference.grammar import Grammar

    if command.json_schema is not None:
        return Grammar.json_schema(_read_file(command.json_schema), mode="lenient" if command.lenient else "strict")
    if command.regex is not None:
        return Grammar.regex(command.regex)
    if command.choice:
        return Grammar.choice(command.choice)
    assert command.grammar is not None
    text = _read_file(command.grammar)
    return Grammar.gbnf(text) if command.grammar.suffix == ".gbnf" else Grammar.lark(text)


def _read_file(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8.") from None


def compile_grammar(engine, grammar) -> tuple[str, ...]:
    """Return what of a grammar is not enforced. Raises UserError when it cannot be compiled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is said by the caller
        return engine.grammars.compile(grammar).warnings


def load_engine(run: Path, weights: Literal["fp32", "bf16", "int8", "int4"] | None, max_batch: int = 1, adapter: Path | None = None):
    """Load a run for generation, with an adapter merged into it: a decoder on the engine, a recurrent language model token by token."""
    from plinth.inference.step_text import StepText, goes_by_steps

    if adapter is None and goes_by_steps(run):
        return StepText.load(run, weights)
    return load_text_engine(run, weights, max_batch, adapter)


def load_text_engine(run: Path, weights: Literal["fp32", "bf16", "int8", "int4"] | None, max_batch: int, adapter: Path | None):
    """Load a decoder on the engine, with an adapter merged into it where one is named."""
    from plinth.inference.text import TextEngine

    if adapter is None:
        return TextEngine.load(run, weights, max_batch=max_batch)
    from plinth.posttraining.adapted_models import load_adapted_decoder

    return TextEngine.of(*load_adapted_decoder(run, adapter), weights, max_batch=max_batch)


def _plain(engine, prompt: str, completion) -> dict[str, Any]:
    def name(token: int) -> str:
        return engine.tokenizer.decode([token], skip_special=False)

    return {
        "prompt": prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "valid": completion.valid,
        "why_invalid": completion.why_invalid,
        "closed_early": completion.closed_early,
        "prompt_tokens": completion.prompt_tokens,
        "tokens": [
            {
                "id": token,
                "text": name(token),
                "logprob": logprob,
                "top_logprobs": [{"id": other, "text": name(other), "logprob": value} for other, value in top],
            }
            for token, logprob, top in zip(completion.tokens, completion.logprobs, completion.top_logprobs)
        ],
    }


def _show(console, result: dict[str, Any], with_logprobs: bool) -> None:
    from rich.table import Table
    from rich.text import Text

    several = len(result["completions"]) > 1
    for completion in result["completions"]:
        if several:
            console.print(Text(f"> {completion['prompt']}", style="bold"))
        console.print(Text(completion["text"]), soft_wrap=True)
        if completion["valid"] is False:
            say(f"not valid: {completion['why_invalid']}")
        if with_logprobs:
            table = Table("token", "logprob, nats", "alternatives", box=None)
            for token in completion["tokens"]:
                others = "  ".join(f"{top['text']!r} {top['logprob']:.2f}" for top in token["top_logprobs"])
                table.add_row(Text(repr(token["text"])), f"{token['logprob']:.3f}", Text(others))
            console.print(table)
