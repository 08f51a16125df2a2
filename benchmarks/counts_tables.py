"""The tables of docs/counts.md: worked out from the closed forms, nothing is measured."""

from __future__ import annotations

from dataclasses import dataclass

from plinth.models.counts.families import count
from plinth.models.counts.memory import OPTIMIZERS, SHARDINGS, state_bytes
from plinth.models.presets import PRESETS

SHOWN = (
    "gpt-2", "gpt-2-xl", "llama-2-7b", "llama-2-70b", "llama-3-8b", "llama-3-70b", "llama-3.1-405b", "mistral-7b", "qwen3-0.6b",
    "gemma-2-9b", "mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "bert-base-uncased", "electra-small", "t5-base", "clip-vit-b-32",
    "llava-1.5-7b",
)  # fmt: skip


@dataclass(frozen=True)
class SlideRow:
    """A row of the course's slide of Llama dimensions."""

    said: str
    """the name on the slide"""
    layers: int
    """blocks"""
    width: int
    """hidden_size"""
    feed_forward: int
    """intermediate_size"""
    vocab: str
    """the vocabulary, as the slide rounds it"""
    released: str
    """the preset that it means"""
    note: str = ""
    """what else the slide says otherwise than the release"""


SLIDE = (
    SlideRow("Llama 2-7B", 32, 4096, 11008, "32k", "llama-2-7b"),
    SlideRow("Llama 2-13B", 40, 5120, 13824, "32k", "llama-2-13b"),
    SlideRow("Llama 2-70B", 80, 8192, 22016, "32k", "llama-2-70b"),
    SlideRow("Llama 3-7B", 32, 4096, 14336, "128k", "llama-3-8b",
             "the release is called 8B; 128k is the vocabulary, its context is 8,192 (131,072 from 3.1 on)"),
    SlideRow("Llama 3-70B", 80, 8192, 28672, "128k", "llama-3-70b"),
    SlideRow("Llama 3-405B", 126, 16384, 53248, "128k", "llama-3.1-405b", "released as 3.1"),
)  # fmt: skip


def slide_audit() -> str:
    """Return the table of the slide's dimensions beside the released models, and what its errors would come to."""
    lines = [
        "| slide: layers, width, feed-forward, vocabulary | released as | layers, width, feed-forward, vocabulary "
        "| key and value heads | parameters | verdict |",
        "|---|---|---|---|---|---|",
    ]
    for row in SLIDE:
        values = PRESETS[row.released]
        sizes = (values["num_hidden_layers"], values["hidden_size"], values["intermediate_size"])
        right = sizes == (row.layers, row.width, row.feed_forward)
        wrong = [] if right else [f"feed-forward is {sizes[2]:,}, not {row.feed_forward:,}"]
        verdict = "; ".join([*wrong, *([row.note] if row.note else [])]) or "right"
        said = f"{row.said}: {row.layers}, {row.width}, {row.feed_forward}, {row.vocab}"
        heads = f"{values['num_key_value_heads']} of {values['num_attention_heads']}"
        found = f"{sizes[0]}, {sizes[1]}, {sizes[2]}, {values['vocab_size']:,}"
        lines.append(f"| {said} | {row.released} | {found} | {heads} | {count(values).total:,} | {verdict} |")
    return "\n".join([*lines, "", *slide_consequences()])


def slide_consequences() -> list[str]:
    """Return what the slide's 70B would hold, and what leaving out grouped heads does to the cache."""
    released = PRESETS["llama-2-70b"]
    narrow = {**released, "intermediate_size": 22016}
    ungrouped = {**narrow, "num_key_value_heads": narrow["num_attention_heads"]}
    same = " (LLaMA-1-65B)" if count(ungrouped).total == count(PRESETS["llama-1-65b"]).total else ""
    lines = [
        f"A 70B with a feed-forward width of 22,016 would have {count(narrow).total:,} parameters with its 8 key and value heads, and "
        f"{count(ungrouped).total:,} with 64{same}; the released one has {count(released).total:,}.",
        "",
        "The slide leaves out grouped-query attention. Without it the cache of a token would be larger:",
        "",
        "| | bytes a token, bf16 | without grouped heads |",
        "|---|---|---|",
    ]
    for name in ("llama-2-70b", "llama-3-8b", "llama-3-70b", "llama-3.1-405b"):
        values = PRESETS[name]
        all_heads = {**values, "num_key_value_heads": values["num_attention_heads"]}
        ours, more = (2 * count(each).kv_per_token for each in (values, all_heads))
        lines.append(f"| {name} | {ours:,} | {more:,} ({more // ours} times) |")
    return lines


def counts_table() -> str:
    """Return counts of some of the presets."""
    lines = [
        "| | total | active a token | multiplied with a token | cache, bytes a token, bf16 |",
        "|---|---|---|---|---|",
    ]
    for name in SHOWN:
        ledger = count(PRESETS[name])
        lines.append(f"| {name} | {ledger.total:,} | {ledger.active:,} | {ledger.matmul:,} | {2 * ledger.kv_per_token:,} |")
    return "\n".join(lines)


def memory_table() -> str:
    """Return GiB of training's state of one model by optimizer and sharding."""
    params = count(PRESETS["llama-2-7b"]).total
    lines = ["| | bytes a parameter | unsharded | ZeRO-1 | ZeRO-2 | ZeRO-3, FSDP |", "|---|---|---|---|---|---|"]
    for name, state in OPTIMIZERS.items():
        sizes = " | ".join(f"{state_bytes(params, state, 8, sharding) / 2**30:.1f}" for sharding in SHARDINGS)
        lines.append(f"| {name} | {state.total} | {sizes} |")
    return "\n".join(lines)
