"""What a model costs, as one record: read its config.json, count, and say how each number came about."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plinth.config import UserError, read_json
from plinth.models.counts.families import count
from plinth.models.counts.ledger import Ledger
from plinth.models.counts.memory import (
    OPTIMIZERS,
    SHARDINGS,
    WEIGHT_BYTES,
    activation_bytes,
    adapter_bytes,
    adapter_params,
    serve_bytes,
    state_bytes,
)
from plinth.models.presets import find_preset
from plinth.run import find_model

DEFAULT_CONTEXT = 4096
CACHE_BYTES = 2
FORMULAS = {
    "training_without_attention": "6 x matmul parameters: 2 forward, 4 backward, for each that a token is multiplied with",
    "training": "the same + 12 x layers x heads x head_dim x context: scores and weighted values, to every position",
    "training_causal": "the same with the positions that a causal mask or a window shows, on average",
    "decoding": "2 x matmul parameters + 4 x layers x heads x head_dim x context, for one token after that context",
}


@dataclass(frozen=True)
class CostQuestion:
    """For what a model's cost is asked."""

    context: int | None = None
    """tokens of a sequence (default: the model's longest, at most 4096)"""
    sequences: int = 1
    """sequences served at once, each of that context"""
    gpus: int = 8
    """accelerators that training's state is sharded over"""
    lora_rank: int = 16
    """rank of low-rank adapters on all matrices"""

    def __post_init__(self) -> None:
        for name in ("context", "sequences", "gpus", "lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}={value} must be at least 1.")


def read_values(source: str) -> tuple[dict[str, Any], Path | None]:
    """Return the values of config.json of a published model's name, a run, a model folder or a file; and the folder, where there is one.

    Raises UserError with the nearest name when it is none of these.
    """
    path = Path(source)
    if path.is_file():
        return _described(read_json(path), path), None
    if path.is_dir():
        folder = path if _is_model_config(path / "config.json") else find_model(path)
        return _described(read_json(folder / "config.json"), folder / "config.json"), folder
    if "/" in source or path.suffix == ".json":
        raise UserError(f"{source} does not exist. Name a model folder, a config.json or a published model (`plinth params --list`).")
    return find_preset(source), None


def _is_model_config(file: Path) -> bool:
    return file.is_file() and "model_type" in _described(read_json(file), file)


def _described(values: Any, file: Path) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{file} is no config.json: it holds a {type(values).__name__}, not a table of fields.")
    return values


def stored_params(folder: Path) -> int | None:
    """Return how many numbers the safetensors files of a folder hold, from their headers alone; None where there are none."""
    files = sorted(folder.glob("*.safetensors"))
    total = 0
    for file in files:
        with open(file, "rb") as stream:
            size = struct.unpack("<Q", stream.read(8).ljust(8, b"\0"))[0]
            try:
                header = json.loads(stream.read(min(size, 100 << 20)))
            except ValueError:
                raise UserError(f"{file} is truncated or no safetensors file. Copy the model again.") from None
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total if files else None


def describe(source: str, question: CostQuestion | None = None) -> dict[str, Any]:
    """Return what a model costs as JSON values: parameters, operations a token, cache, memory to train and to serve.

    All are exact but `activation_bytes`, which is an estimate and says so.
    """
    question = question or CostQuestion()
    values, folder = read_values(source)
    ledger = count(values)
    context = question.context or min(ledger.max_seq_len or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    return {
        "name": source,
        "model_type": values["model_type"],
        "architecture": (values.get("architectures") or [None])[0],
        "parameters": {name: getattr(ledger, name) for name in ("total", "active", "embedding", "matmul")},
        "stored": None if folder is None else stored_params(folder),
        "context": context,
        "flops_a_token": flops_record(ledger, context),
        "cache": cache_record(ledger, context),
        "train_memory": train_record(ledger, question, context),
        "serve_memory": serve_record(ledger, question, context),
        "formulas": FORMULAS,
        "pieces": pieces_record(ledger),
    }


def flops_record(ledger: Ledger, context: int) -> dict[str, Any]:
    """Return the operations a token of training, and of decoding where the model generates."""
    decoding = None
    if ledger.kv_per_token:
        keys = ledger.lengths(context)
        seen = {group: min(keys[group.keys or group.stream], group.window or context) for group in ledger.attending if group.cached}
        side = {group.stream for group in seen}
        matrices = sum(2 * p.size * p.copies_used for p in ledger.pieces if p.kind == "matrix" and p.stream in side)
        decoding = matrices + sum(2 * g.layers * g.heads * g.head_widths * n for g, n in seen.items())
    return {
        "training_without_attention": ledger.train_flops_per_token(context, attention="none"),
        "training": ledger.train_flops_per_token(context),
        "training_causal": ledger.train_flops_per_token(context, attention="causal"),
        "decoding": decoding,
        "tokens": {stream.name: ledger.lengths(context)[stream.name] for stream in ledger.streams if stream.counted},
    }


def cache_record(ledger: Ledger, context: int) -> dict[str, int]:
    """Return the bytes of keys and values in bf16."""
    numbers = ledger.kv_numbers(context)
    return {"bytes_a_token": ledger.kv_per_token * CACHE_BYTES, "bytes_a_sequence": numbers * CACHE_BYTES}


def train_record(ledger: Ledger, question: CostQuestion, context: int) -> dict[str, Any]:
    """Return bytes of state on each accelerator by optimizer and sharding, of adapters, and about those of activations."""
    rows = [
        {"optimizer": name, "bytes_a_parameter": state.total}
        | {sharding: state_bytes(ledger.total, state, question.gpus, sharding) for sharding in SHARDINGS}
        for name, state in OPTIMIZERS.items()
    ]
    adapters = {
        "rank": question.lora_rank,
        "parameters": adapter_params(ledger, question.lora_rank),
        "lora_bytes": adapter_bytes(ledger, question.lora_rank),
        "qlora_bytes": adapter_bytes(ledger, question.lora_rank, quantised=True),
    }
    activations = {"kept": activation_bytes(ledger, context), "recomputed": activation_bytes(ledger, context, recompute=True)}
    return {"gpus": question.gpus, "states": rows, "adapters": adapters, "activation_bytes": activations}


def serve_record(ledger: Ledger, question: CostQuestion, context: int) -> dict[str, Any]:
    """Return the bytes to serve by format of the weights; the cache is in bf16."""
    cache = question.sequences * ledger.kv_numbers(context) * CACHE_BYTES
    total = {name: serve_bytes(ledger, context, question.sequences, size) for name, size in WEIGHT_BYTES.items()}
    return {"sequences": question.sequences, "cache_bytes": cache, "total_bytes": total}


def pieces_record(ledger: Ledger) -> list[dict[str, Any]]:
    """Return every piece with its shape, copies and parameters, which add up to the total."""
    return [
        {"name": p.name, "shape": list(p.shape), "copies": p.copies, "used": p.copies_used, "kind": p.kind, "parameters": p.params}
        for p in ledger.pieces
    ]
