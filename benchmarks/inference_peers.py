"""How fast does Plinth generate, against transformers and llama.cpp, with the same weights on the same processor?

    python benchmarks/inference_peers.py --llama PYTHON [--folder runs/bench-inference] [--task 124M:decode-1:2 ...] [--rounds 5]

Decoders of 25 and 124 million parameters in Qwen3's shape, random weights rounded to bf16, exported once by `plinth export` for each
reader: transformers' generate in bf16 as it comes; llama.cpp through its library, in bf16 and quantised, with flash attention on or off
and at the micro-batch, whichever is faster, at its best. Every side is a process of its own that loads once; rounds alternate, and a
row's figure is the median of all. A task is one size, workload and number of threads. What a task measured is appended to rounds.jsonl
in the folder, so that a long run can be cut into parts; without --task all that lack rounds are run, and the record is written.

Decoding counts the tokens behind each prompt's first, with prompts of 32 tokens; prefill one prompt of 512.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from side_process import SideProcess

from plinth.models.config import DecoderConfig
from plinth.models.cost import count_params
from plinth.models.gguf import write_gguf
from plinth.models.hub import load_decoder, save_model
from plinth.models.transformer import Transformer
from plinth.tokenizer.gguf import gguf_vocabulary
from plinth.tokenizer.train import train_tokenizer
from record import spread, write_record

HERE = Path(__file__).parent
CONTEXT = 1024
SHAPES = {
    "25M": {"vocab_size": 32_000, "hidden_size": 384, "num_layers": 7, "num_heads": 6, "num_kv_heads": 6, "intermediate_size": 1024},
    "124M": {"vocab_size": 50_304, "hidden_size": 768, "num_layers": 12, "num_heads": 12, "num_kv_heads": 12, "intermediate_size": 2048},
}
GGUF = {"bf16": "bf16", "q8_0": "q8_0", "q4_0": "q4_0", "q4_0-pure": "q4_0"}  # pure: embedding and head at 4 bits too


@dataclass(frozen=True)
class Workload:
    question: str
    batch: int
    prompt: int
    new: int
    """completion tokens a sequence, 1 = only the prompt is timed"""
    sides: tuple[str, ...]
    extra: tuple[tuple[str, int], ...] = ()
    variants: tuple[dict[str, Any], ...] = ({},)
    """settings of llama.cpp that are tried; its best counts"""


FLASH = ({"flash": False}, {"flash": True})
UBATCH = tuple({"flash": flash, "ubatch": ubatch} for flash in (False, True) for ubatch in (128, 512))
WORKLOADS = {
    "decode-1": Workload("decode, batch 1, bf16", 1, 32, 96, ("plinth-bf16", "llama-bf16", "transformers-bf16"), variants=FLASH),
    "decode-1-8bit": Workload("decode, batch 1, 8 bits", 1, 32, 96, ("plinth-int8", "llama-q8_0"), variants=FLASH),
    "decode-1-4bit": Workload("decode, batch 1, 4 bits", 1, 32, 96, ("plinth-int4", "llama-q4_0", "llama-q4_0-pure"), variants=FLASH),
    "decode-16": Workload("decode, batch 16, bf16", 16, 32, 32, ("plinth-bf16", "llama-bf16", "transformers-bf16"), variants=FLASH),
    "prefill-512": Workload("prefill, 512 tokens, bf16", 1, 512, 1, ("plinth-bf16", "llama-bf16", "transformers-bf16"), variants=UBATCH),
    "beam-4": Workload("beam search, 4 beams, bf16", 1, 32, 32, ("plinth-bf16", "transformers-bf16"), (("beams", 4),)),
    "best-of-16": Workload("16 samples of one prompt of 256", 1, 256, 32, ("plinth-bf16", "plinth-bf16 separately"), (("samples", 16),)),
    "json-schema": Workload("drawn under a JSON schema, bf16", 1, 32, 96, ("plinth-bf16", "plinth-bf16 constrained"), (("seed", 0),)),
    "bandwidth": Workload("share of the measured bandwidth, batch 1, bf16", 1, 32, 96, ("plinth-bf16", "memory")),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--llama", type=Path, help="Python of an environment that has llama-cpp-python; without it its rows are left out")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-inference"), help="models and rounds")
    parser.add_argument("--task", nargs="*", help="SIZE:WORKLOAD:THREADS; default: all that lack rounds, then the record")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that each side of a task runs")
    parser.add_argument("--sizes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--record", action="store_true", help="only write the record of the rounds that there are")
    arguments = parser.parse_args()
    for size in arguments.sizes:
        prepare(arguments.folder / size, size)
    journal = arguments.folder / "rounds.jsonl"
    tasks = arguments.task or ([] if arguments.record else missing(journal, arguments.sizes, arguments.rounds))
    for task in tasks:
        size, work, threads = task.split(":")
        run_task(arguments.folder, arguments.llama, size, work, int(threads), arguments.rounds, journal)
    if not arguments.task:
        record(journal, arguments.folder)
    return 0


def prepare(folder: Path, size: str) -> None:
    """Make the model once, for every reader."""
    if (folder / "DONE").exists():
        return
    config = DecoderConfig(**SHAPES[size], head_dim=64, max_seq_len=CONTEXT, learnable_norm=True)
    model, generator = Transformer(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            deviation = 1.0 if name == "embed.weight" else parameter.shape[-1] ** -0.5
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, deviation, generator=generator)
            parameter.copy_(parameter.bfloat16().float())
        model.embed.weight.mul_(0.125)  # a power of two, so still bf16: logits of a deviation as a trained model has them
    library = Path(json.__file__).parents[1]
    texts = [
        file.read_text(encoding="utf-8", errors="ignore") for file in sorted(library.glob("*.py")) + sorted(library.glob("*/*.py"))[:600]
    ]
    tokenizer = train_tokenizer(texts, config.vocab_size)
    save_model(model, tokenizer, folder / "hf", torch.bfloat16)
    vocabulary = gguf_vocabulary(tokenizer, config.vocab_size)
    for name, weights in GGUF.items():
        write_gguf(model, vocabulary, folder / f"{name}.gguf", weights=weights, name=size, pure=name.endswith("pure"))
    (folder / "DONE").touch()


class Process(SideProcess):
    """A side, loaded and waiting for workloads."""

    def __init__(self, side: str, folder: Path, llama: Path | None, threads: int):
        name, _, weights = side.partition("-")
        script = [str(llama), HERE / "llama_side.py", folder / f"{weights}.gguf"] if name == "llama" else None
        command = script or [sys.executable, HERE / "inference_sides.py", side, folder / "hf"]
        super().__init__([*command, threads])
        self.answer()


def run_task(folder: Path, llama: Path | None, size: str, name: str, threads: int, rounds: int, journal: Path) -> None:
    """Load the sides of a task, warm them up, and let them take turns."""
    work = WORKLOADS[name]
    sides = [side for side in work.sides if llama or not side.startswith("llama")]
    processes = {program: Process(program, folder / size, llama, threads) for program in dict.fromkeys(map(program_of, sides))}
    generator = random.Random(0)
    vocab_size = SHAPES[size]["vocab_size"]
    for number in range(rounds + 1):
        prompts = [[generator.randrange(300, vocab_size) for _ in range(work.prompt)] for _ in range(work.batch)]
        for side in sides if number % 2 else reversed(sides):
            for variant in work.variants if side.startswith("llama") else ({},):
                asked = {"prompts": prompts, "new": work.new, **dict(work.extra), **variant}
                asked |= {"bandwidth": True} if side == "memory" else {}
                asked |= {"together": "separately" not in side} if name == "best-of-16" else {}
                asked |= {"schema": "constrained" in side, "seed": number} if name == "json-schema" else {}
                asked |= {"new": min(work.new, 4)} if number == 0 and work.new > 1 else {}
                answer = processes[program_of(side)].run(asked)
                if number:  # the first round warms up
                    note(journal, size, name, threads, side, variant, number, answer)
    for process in processes.values():
        process.close()


def program_of(side: str) -> str:
    """Return the process that a side's rounds run in."""
    return {"memory": "plinth-bf16", "plinth-bf16 separately": "plinth-bf16", "plinth-bf16 constrained": "plinth-bf16"}.get(side, side)


def note(journal: Path, size: str, name: str, threads: int, side: str, variant: dict, number: int, answer: dict) -> None:
    line = {"size": size, "workload": name, "threads": threads, "side": side, "variant": variant, "round": number}
    line |= {
        "tokens_per_s": answer["tokens"] / answer["seconds"],
        **{k: answer[k] for k in ("ids", "weight_bytes", "masks_s") if k in answer},
    }
    with journal.open("a") as file:
        file.write(json.dumps(line) + "\n")
    shown = " ".join(f"{key}={value}" for key, value in variant.items())
    print(f"{size} {name} {threads} threads, {side} {shown}: {line['tokens_per_s']:,.1f} tokens/s", file=sys.stderr, flush=True)


def read(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def missing(journal: Path, sizes: list[str], rounds: int) -> list[str]:
    """Return the tasks whose first side has fewer rounds than wanted."""
    found: dict[str, int] = defaultdict(int)
    for line in read(journal):
        if line["side"] == WORKLOADS[line["workload"]].sides[0]:
            found[f"{line['size']}:{line['workload']}:{line['threads']}"] += 1
    tasks = [f"{size}:{name}:{threads}" for size in sizes for name in WORKLOADS for threads in (1, 2)]
    return [task for task in tasks if found[task] < rounds]


def record(journal: Path, folder: Path) -> None:
    """Write benchmarks/records/inference_peers.json."""
    rows = summarise(read(journal))
    sizes = {size: {**SHAPES[size], "num_params": params_of(folder / size)} for size in {row["size"] for row in rows}}
    question = "How fast does Plinth generate against transformers and llama.cpp, with the same weights?"
    write_record("inference_peers", question, rows, sizes=sizes, peers=peer_versions())


def summarise(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each size, workload and number of threads; of llama.cpp's settings the best counts."""
    rows = []
    groups: dict[tuple, dict[str, dict[str, list[dict]]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for line in lines:
        groups[line["size"], line["workload"], line["threads"]][line["side"]][json.dumps(line["variant"])].append(line)
    for (size, name, threads), sides in sorted(groups.items()):
        best = {side: max(variants.values(), key=lambda lines: median_rate(lines)) for side, variants in sides.items()}
        first, *others = [side for side in WORKLOADS[name].sides if side in best]
        rows.append(
            {
                "size": size, "workload": name, "question": WORKLOADS[name].question, "threads": threads,
                "sides": {side: summary(best[side]) for side in best},
                "ours_over": {side: ratio(best[first], best[side]) for side in others},
                **identical(best[first], best[others[0]] if others else []),
            }
        )  # fmt: skip
    return rows


def median_rate(lines: list[dict]) -> float:
    return statistics.median(line["tokens_per_s"] for line in lines)


def summary(lines: list[dict]) -> dict[str, Any]:
    weights = {"weight_bytes": lines[0]["weight_bytes"]} if "weight_bytes" in lines[0] else {}
    masks = sorted(mask for line in lines for mask in line.get("masks_s", ()))
    if masks:
        weights |= {"mask_median_s": masks[len(masks) // 2], "mask_p99_s": masks[int(0.99 * len(masks))], "masks": len(masks)}
    return {"tokens_per_s": spread([line["tokens_per_s"] for line in lines]), "settings": lines[0]["variant"], **weights}


def ratio(ours: list[dict], theirs: list[dict]) -> dict[str, float]:
    """Return the ratios of neighbouring rounds."""
    return spread([a["tokens_per_s"] / b["tokens_per_s"] for a, b in zip(ours, theirs)])


def identical(ours: list[dict], theirs: list[dict]) -> dict[str, Any]:
    pairs = [(a["ids"], b["ids"]) for a, b in zip(ours, theirs) if "ids" in a and "ids" in b]
    return {"identical": sum(a == b for a, b in pairs) / len(pairs)} if pairs else {}


def params_of(folder: Path) -> int:
    return count_params(load_decoder(folder / "hf").config)["total"]


def peer_versions() -> dict[str, str]:
    import transformers

    return {"transformers": transformers.__version__}


if __name__ == "__main__":
    raise SystemExit(main())
