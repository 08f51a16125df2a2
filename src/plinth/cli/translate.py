"""`plinth translate`: text from one language to another, or a test set scored."""

from __future__ import annotations

import dataclasses
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from plinth.cli.options import read_options
from plinth.cli.output import emit
from plinth.config import UserError, write_atomic


@dataclass(frozen=True)
class TranslateCommand:
    """Translate texts, a file line by line, or a test set whose references it is scored against."""

    run: tyro.conf.Positional[Path]
    """a run of `plinth pretrain --pairs`, or a model folder (T5, Marian)"""
    text: tuple[str, ...] = ()
    """texts to translate"""
    file: Path | None = None
    """file to translate, a sentence a line, gzip where its name ends in .gz"""
    pairs: tuple[Path, Path] | None = None
    """a source file and its references, for BLEU and chrF (extra `translation`)"""
    out: Path | None = None
    """file for the translations, a line each"""
    prefix: str = ""
    """text put before each source, such as T5's 'translate English to German: '"""
    beams: Annotated[int | None, tyro.conf.arg(aliases=["-b"])] = None
    """search for the most probable translation with this many beams"""
    length_penalty: float = 1.0
    """with --beams: a translation's log-probability is divided by its length to this power"""
    temperature: float = 0.0
    """divisor of the scores; 0 = always the most probable token"""
    top_k: int | None = None
    """with a temperature: choose among this many most probable tokens only"""
    top_p: float | None = None
    """with a temperature: choose among the most probable tokens that together have this probability, 0 to 1"""
    seed: int | None = None
    """seed; text i gets seed + i. None = a fresh one"""
    max_tokens: int = 256
    """tokens to write at most for each text; the model's context bounds it too"""
    batch_size: int = 32
    """texts that run together"""
    limit: int | None = None
    """only the first so many lines of --file or --pairs"""
    weights: Literal["fp32", "bf16"] = "fp32"
    """format of the weights while running"""
    json: bool = False
    """print one JSON object"""


def main(argv: list[str]) -> int:
    """Translate and print; exit code 0 on success."""
    command = read_options(TranslateCommand, args=argv, prog="plinth translate", description=TranslateCommand.__doc__)
    result = translate(command)
    emit(result, command.json, lambda console: _show(console, result, command))
    return 0


def translate(command: TranslateCommand) -> dict[str, Any]:
    """Translate what the command names; returns what is printed with --json."""
    import torch

    from plinth.evaluation.translation import translation_scores
    from plinth.inference.translate import Translator

    sources, references = read_sources(command)
    params = parameters(command)
    translator = Translator.load(command.run, torch.bfloat16 if command.weights == "bf16" else torch.float32)
    started = time.perf_counter()
    found = translator.translate(
        [command.prefix + source if source.strip() else source for source in sources], params, batch_size=command.batch_size
    )
    elapsed_s = time.perf_counter() - started
    texts = [one.text for one in found]
    if command.out is not None:
        write_atomic(command.out, "".join(" ".join(text.splitlines()) + "\n" for text in texts))
    count = sum(len(one.tokens) for one in found)
    scores = [] if references is None else [dataclasses.asdict(score) for score in translation_scores(texts, references)]
    return {
        "model": str(command.run),
        "translations": [
            {"source": source, "text": one.text, "logprob": one.logprob, "finish_reason": one.finish_reason}
            for source, one in zip(sources, found)
        ],
        "scores": scores,
        "completion_tokens": count,
        "time_s": elapsed_s,
        "tokens_per_s": count / elapsed_s,
    }


def read_sources(command: TranslateCommand) -> tuple[list[str], list[str] | None]:
    """Return the texts to translate and their references, where there are some. Raises UserError unless one source of text is named."""
    from plinth.data.parallel import read_lines, read_pairs

    given = [name for name in ("text", "file", "pairs") if getattr(command, name)]
    if len(given) != 1:
        names = " and ".join(f"--{name}" for name in given) or "nothing"
        raise UserError(f"{names} given: name the text to translate once, with --text, --file or --pairs.")
    if command.text:
        return list(command.text), None
    if command.file is not None:
        return read_lines(command.file)[: command.limit], None
    assert command.pairs is not None
    pairs = read_pairs(command.pairs)[0][: command.limit]
    return [pair.source for pair in pairs], [pair.target for pair in pairs]


def parameters(command: TranslateCommand):
    """Return how the translations are chosen. Raises UserError where options contradict one another."""
    from plinth.inference.beam import BeamParams
    from plinth.inference.sampling_params import SamplingParams

    limit = command.max_tokens
    if command.beams is not None:
        if command.temperature or command.top_k or command.top_p:
            raise UserError("--beams and --temperature are two ways to choose a translation. Give one of them.")
        return BeamParams(num_beams=command.beams, max_tokens=limit, length_penalty=command.length_penalty)
    if command.length_penalty != 1.0:
        raise UserError("--length-penalty needs --beams.")
    return SamplingParams(
        temperature=command.temperature, top_k=command.top_k, top_p=command.top_p, seed=command.seed, max_tokens=limit
    )  # fmt: skip


def _show(console, result: dict[str, Any], command: TranslateCommand) -> None:
    if command.pairs is None and command.out is None:
        for one in result["translations"]:
            console.print(one["text"], highlight=False, markup=False, soft_wrap=True)
        return
    where = "" if command.out is None else f" to {command.out}"
    count = len(result["translations"])
    console.print(f"{count} translated{where} in {result['time_s']:.1f} s ({result['tokens_per_s']:.0f} tokens/s).", highlight=False)
    for score in result["scores"]:
        interval = "" if score["ci95"] is None else f" (95 %: {score['ci95'][0]:.2f} to {score['ci95'][1]:.2f})"
        console.print(
            f"{score['name']} {score['value']:.2f}{interval}  {score['signature']}", highlight=False, markup=False, soft_wrap=True
        )
