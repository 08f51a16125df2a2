"""`plinth params`: what a model holds and costs, exactly, from its config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from rich import box
from rich.console import Console
from rich.table import Table

from plinth.cli.options import read_options
from plinth.cli.output import emit
from plinth.config import UserError
from plinth.models.counts.describe import CostQuestion, describe
from plinth.models.counts.families import COUNTED
from plinth.models.presets import PRESETS

GIB = 2**30


@dataclass(frozen=True)
class ParamsCommand:
    """Count a model's parameters, operations a token, cache and memory from its config.json; no weights are read or downloaded."""

    model: Annotated[str | None, tyro.conf.Positional] = None
    """a published model's name, a run, a model folder or a config.json"""
    question: Annotated[CostQuestion, tyro.conf.arg(name="")] = field(default_factory=CostQuestion)
    """for which context, accelerators and requests"""
    explain: bool = False
    """show every tensor that is counted, and the formulas"""
    list: bool = False
    """name the published models that are known, and the architectures that are counted"""
    json: bool = False
    """print one JSON object"""


def main(argv: list[str]) -> int:
    """Print the counts; exit code 0 on success."""
    command = read_options(ParamsCommand, args=argv, prog="plinth params", description=ParamsCommand.__doc__)
    if command.list:
        result = {"models": [*PRESETS], "architectures": [*COUNTED]}
        emit(result, command.json, lambda console: console.print("\n".join(f"{name}: {', '.join(v)}" for name, v in result.items())))
        return 0
    if command.model is None:
        raise UserError("plinth params needs a model: a published name (`plinth params --list`), a run, a model folder or a config.json.")
    record = describe(command.model, command.question)
    emit(record, command.json, lambda console: show(record, console, command.explain))
    return 0


def show(record: dict[str, Any], console: Console, explain: bool) -> None:
    """Print a record of `describe`."""
    for line in headline(record):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(memory_table(record))
    adapters, kept = record["train_memory"]["adapters"], record["train_memory"]["activation_bytes"]
    lines = [
        f"adapters of rank {adapters['rank']}: {adapters['parameters']:,} parameters, {gib(adapters['lora_bytes'])} (4-bit: "
        f"{gib(adapters['qlora_bytes'])})",
        f"activations of one example, about: {gib(kept['kept'])}, {gib(kept['recomputed'])} when blocks are computed again",
        f"to serve {record['serve_memory']['sequences']} x {record['context']:,} tokens: "
        + ", ".join(f"{gib(size)} {name}" for name, size in record["serve_memory"]["total_bytes"].items()),
    ]
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    if explain:
        show_pieces(record, console)


def headline(record: dict[str, Any]) -> list[str]:
    """Return the lines of parameters, operations and cache."""
    counts, flops, cache = record["parameters"], record["flops_a_token"], record["cache"]
    lines = [
        f"{record['name']}: {counts['total']:,} parameters ({record['architecture'] or record['model_type']})",
        f"  active a token {counts['active']:,}; lookup tables {counts['embedding']:,}; multiplied with a token {counts['matmul']:,}",
        f"  training a token, {', '.join(f'{n:,} {name}' for name, n in flops['tokens'].items())}: {flops['training']:.4g} FLOP; "
        f"causal {flops['training_causal']:.4g}; without attention {flops['training_without_attention']:.4g}",
    ]
    if flops["decoding"]:
        lines.append(f"  decoding a token after that context: {flops['decoding']:.4g} FLOP")
        lines.append(f"  cache, bf16: {cache['bytes_a_token']:,} bytes a token, {gib(cache['bytes_a_sequence'])} at that context")
    if record["stored"] is not None:
        same = "the count" if record["stored"] == counts["total"] else f"{record['stored'] - counts['total']:+,} against the count"
        lines.append(f"  in its safetensors: {record['stored']:,} numbers, {same}")
    return lines


def memory_table(record: dict[str, Any]) -> Table:
    """Return what training state takes; one unit for all numbers, so that they fit into 80 columns."""
    states, shardings = record["train_memory"]["states"], ("none", "zero1", "zero2", "zero3")
    unit, divisor = ("GiB", GIB) if max(row["none"] for row in states) >= 10 * GIB else ("MiB", 2**20)
    title = f"state to train, {unit} on each of {record['train_memory']['gpus']} accelerators"
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for name in ("", "bytes each", "unsharded", "ZeRO-1", "ZeRO-2", "ZeRO-3"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for row in states:
        table.add_row(row["optimizer"], str(row["bytes_a_parameter"]), *(f"{row[sharding] / divisor:,.1f}" for sharding in shardings))
    return table


def show_pieces(record: dict[str, Any], console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD)
    for name in ("tensor", "copies", "used", "shape of one", "parameters", "kind"):
        table.add_column(name, justify="left" if name in ("tensor", "kind") else "right")
    for piece in record["pieces"]:
        copies, used = (f"{piece[name]:,}" for name in ("copies", "used"))
        table.add_row(piece["name"], copies, used, " x ".join(map(str, piece["shape"])) or "1", f"{piece['parameters']:,}", piece["kind"])
    table.add_row("total", "", "", "", f"{record['parameters']['total']:,}", "")
    console.print(table)
    for name, formula in record["formulas"].items():
        console.print(f"{name}: {formula}", highlight=False, markup=False, soft_wrap=True)


def gib(size: int) -> str:
    """Return bytes as GiB, or as MiB where they are few."""
    return f"{size / GIB:,.1f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.1f} MiB"
