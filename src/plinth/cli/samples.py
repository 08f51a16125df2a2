"""`plinth samples`: what more answers to a question would give, and what they cost."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from plinth.cli.evaluate import build_around
from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.config import UserError, save_json


@dataclass(frozen=True)
class SamplesCommand:
    """Draw many answers to each question about known facts; show the share that is right against their number, and the price."""

    model: tyro.conf.Positional[Path]
    """a run, a build, or a model folder in Hugging Face's format"""
    facts: Path | None = None
    """folder with questions.jsonl and sft.jsonl; None = facts/ of the build around the model"""
    samples: int = 16
    """answers drawn to each question"""
    temperature: float = 1.0
    """divisor of the scores"""
    max_questions: int = 100
    """questions at most, all phrasings of whole facts"""
    seed: int = 0
    """which questions are asked, and how answers are drawn"""
    weights: Literal["fp32", "bf16", "int8", "int4"] | None = None
    """format of the weights while running; None = bf16 where this processor has our kernels, else fp32"""
    out: Path | None = None
    """folder for samples.json and samples.svg; None = nothing is written"""
    json: bool = False
    """print one JSON object"""


def main(argv: list[str]) -> int:
    """Run the verb; returns 0. Raises UserError when there are no questions."""
    command = read_options(SamplesCommand, args=argv, prog="plinth samples", description=SamplesCommand.__doc__)
    result = measure(command)
    if command.out is not None:
        from plinth.evaluation.sampled_answers import picture

        command.out.mkdir(parents=True, exist_ok=True)
        save_json(command.out / "samples.json", result)
        (command.out / "samples.svg").write_text(picture(result))
        say(f"wrote {command.out}/samples.json and samples.svg")
    emit(result, command.json, lambda console: console.print(_table(result)))
    return 0


def measure(command: SamplesCommand) -> dict[str, Any]:
    """Ask and count; returns what is printed with --json."""
    from plinth.evaluation.questions import read_questions, read_shots
    from plinth.evaluation.run import model_style
    from plinth.evaluation.sampled_answers import answer_curve
    from plinth.inference.text import TextEngine
    from plinth.run import find_model

    folder = find_model(command.model)
    facts = command.facts or build_around(folder) / "facts"
    if not (facts / "questions.jsonl").exists():
        raise UserError(f"{facts} holds no questions.jsonl. Name the folder of facts with --facts.")
    text = TextEngine.load(folder, command.weights, max_batch=64)
    style = model_style(folder, text.tokenizer)
    curve = answer_curve(
        text,
        read_questions(facts / "questions.jsonl"),
        samples=command.samples,
        temperature=command.temperature,
        style=style,
        shots=read_shots(facts / "sft.jsonl") if style == "few_shot" else (),
        max_questions=command.max_questions,
        seed=command.seed,
    )
    return {"model": str(folder), **curve}


def _table(result: dict[str, Any]):
    from rich.table import Table

    from plinth.cli.evaluate import cell_text
    from plinth.evaluation.sampled_answers import WAYS

    table = Table("answers", *WAYS.values(), "tokens written", "GFLOP a question", title="share right [95 % interval] n")
    for row in result["rows"]:
        table.add_row(str(row["n"]), *(cell_text(row[key]) for key in WAYS), f"{row['completion_tokens']:.0f}", f"{row['flops'] / 1e9:.3f}")
    return table
