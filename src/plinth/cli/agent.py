"""`plinth agent`: a question answered with a calculator and a search of the run's own corpus."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from plinth.cli.generate import load_engine
from plinth.cli.options import read_options
from plinth.cli.output import emit, say
from plinth.config import UserError


@dataclass(frozen=True)
class AgentCommand:
    """Answer a question with tools: a calculator, and a search of the documents that the model was trained on."""

    run: tyro.conf.Positional[Path]
    """a build, one of its stages, or a model folder, with the chat's special tokens"""
    question: tyro.conf.Positional[str]
    """what to answer"""
    tools: tuple[Literal["calculator", "search"], ...] = ("calculator", "search")
    """what the model may call"""
    corpus: Path | None = None
    """documents to search, as for `plinth search`; None = those of the run"""
    max_steps: int = 4
    """calls at most; then the model must answer without tools"""
    max_tokens: int = 512
    """tokens that the model writes at most, all turns together"""
    max_turn_tokens: int = 128
    """tokens of one turn at most"""
    call: bool = False
    """make every turn before the last a call of a tool; small models do not call one by themselves"""
    temperature: float = 0.0
    """divisor of the scores; 0 = always the most probable token"""
    seed: int | None = None
    """seed; turn i gets seed + i. None = a fresh one"""
    weights: Literal["fp32", "bf16", "int8", "int4"] | None = None
    """format of the weights while running; None = bf16 where this processor has our kernels, else fp32"""
    json: bool = False
    """print one JSON object"""


def main(argv: list[str]) -> int:
    """Answer and print, each step on standard error as it is made; exit code 0 also where the answer is empty."""
    command = read_options(AgentCommand, args=argv, prog="plinth agent", description=AgentCommand.__doc__)
    from plinth.inference.agent import AgentLimits, calculator_tool, run_agent, search_tool
    from plinth.inference.retrieval import SearchIndex
    from plinth.inference.sampling_params import SamplingParams

    limits = AgentLimits(command.max_steps, command.max_tokens, command.max_turn_tokens)
    params = SamplingParams(temperature=command.temperature, seed=command.seed)
    tools = [calculator_tool()] if "calculator" in command.tools else []
    if "search" in command.tools:
        tools.append(search_tool(SearchIndex.open(command.corpus or command.run)))
    engine = load_engine(command.run, command.weights)
    if not engine.tokenizer.can_chat:
        raise UserError(f"{command.run} has neither chat tokens nor a chat template. Name a model that was finetuned on conversations.")
    choice = "required" if command.call else "auto"
    result = run_agent(engine, command.question, tools, limits, params, choice=choice, on_step=_tell)
    plain = {"model": str(command.run), **asdict(result)}
    emit(plain, command.json, lambda console: _show(console, plain))
    return 0


def _tell(step) -> None:
    if step.call is not None:
        arguments = ", ".join(f"{name}={value!r}" for name, value in step.arguments.items())
        say(f"{step.call}({arguments})\n  {step.observation}")


def _show(console, result: dict[str, Any]) -> None:
    from rich.text import Text

    console.print(Text(result["answer"] or "(no answer)"), soft_wrap=True)
    for source in result["sources"]:
        facts = "  ".join(filter(None, (source["licence"], source["url"], source["id"])))
        read = "" if source["cited"] else "  (read, not cited)"
        console.print(Text(f"[{source['number']}] {source['source']}  {facts}{read}", style="dim"), soft_wrap=True)
