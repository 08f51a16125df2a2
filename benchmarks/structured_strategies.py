"""Which way to a valid document gives the most right answers, and at what cost in tokens and seconds?

A small decoder (4 layers of 128) is trained here, in a minute or two, on sentences about invented people and on answers to "Record:"
as people write them: some clean JSON, some with single quotation marks, commas too many, a code fence, prose, or an end missing. With
"Answer as JSON." in front, clean ones are more frequent. Then each way answers the same new questions: asking plainly, asking for JSON,
mending what comes, asking again until it is valid, constrained decoding, and the same model finetuned on clean answers.
Writes benchmarks/records/structured_strategies.json.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from plinth.inference.engine import Engine
from plinth.inference.grammar import Grammar
from plinth.inference.sampling import SamplingParams
from plinth.inference.strategies import ask, ask_and_repair, constrain, retry
from plinth.inference.text import TextEngine
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from record import write_record

NAMES = "Ann Bob Carla Dan Eva Finn Greta Hugo Ines Jan Kim Lena Max Nora Otto Paula Quin Rosa Sam Tina".split()
CITIES = "Ulm Bonn Jena Trier Mainz Kiel Essen Worms Gera Hagen Halle Bremen".split()
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "city": {"type": "string"},
        "adult": {"type": "boolean"},
    },
    "required": ["name", "age", "city", "adult"],
    "additionalProperties": False,
}
GRAMMAR = Grammar.json_schema(SCHEMA, whitespace="single")
INSTRUCTION = "Answer as JSON. "
CONTEXT = 96
SLOPPY = ["quotes", "comma", "fence", "prose", "cut", "word"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=700, help="steps of training")
    parser.add_argument("--finetuning-steps", type=int, default=100, help="further steps on clean answers")
    parser.add_argument("--questions", type=int, default=300, help="new questions that each way answers")
    parser.add_argument("--models", type=Path, help="folder of the trained models; made there when absent, and no more")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "records", help="folder of the record")
    arguments = parser.parse_args()
    tokenizer, models = trained(arguments)
    if models is None:
        return 0
    questions = [person(random.Random(f"question {i}")) for i in range(arguments.questions)]
    rows = compare(models["base"], tokenizer, questions) + compare_finetuned(models["finetuned"], tokenizer, questions)
    question = (__doc__ or "").splitlines()[0]
    training = {"training_steps": arguments.steps, "finetuning_steps": arguments.finetuning_steps}
    print(write_record("structured_strategies", question, rows, arguments.out, questions=len(questions), **training))
    return 0


def trained(arguments: argparse.Namespace) -> tuple[Tokenizer, dict[str, Transformer] | None]:
    """Return the tokenizer and the two models, or None for these when they were only made for a later run."""
    draw = random.Random(0)
    tokenizer = train_tokenizer([example(draw, clean=False) for _ in range(3000)], 600)
    models = {"base": new_model(tokenizer), "finetuned": new_model(tokenizer)}
    files = {name: arguments.models / f"{name}.pt" for name in models} if arguments.models else {}
    if files and all(file.exists() for file in files.values()):
        for name, file in files.items():
            models[name].load_state_dict(torch.load(file, weights_only=True))
        return tokenizer, models
    train(models["base"], tokenizer, draw, arguments.steps, clean=False)
    models["finetuned"].load_state_dict(models["base"].state_dict())
    train(models["finetuned"], tokenizer, draw, arguments.finetuning_steps, clean=True, peak_lr=5e-4)
    for name, file in files.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(models[name].state_dict(), file)
    return tokenizer, None if files else models


def person(draw: random.Random) -> dict[str, Any]:
    age = draw.randint(1, 99)
    return {"name": draw.choice(NAMES), "age": age, "city": draw.choice(CITIES), "adult": age >= 18}


def question_of(someone: dict[str, Any]) -> str:
    return f"{someone['name']} is {someone['age']} years old and lives in {someone['city']}. "


def example(draw: random.Random, clean: bool) -> str:
    """Return a question and an answer as somebody might write it."""
    someone, instructed = person(draw), draw.random() < 0.5
    style = "clean" if clean or draw.random() < (0.6 if instructed else 0.3) else draw.choice(SLOPPY)
    text = json.dumps(someone)
    answer = {
        "clean": text,
        "quotes": str(someone),
        "comma": text[:-1] + ",}",
        "fence": f"Sure:\n```json\n{text}\n```",
        "prose": f"The person is {someone['name']} from {someone['city']}.",
        "cut": text[: draw.randint(20, len(text) - 1)],
        "word": text.replace(str(someone["age"]), f'"{someone["age"]} years"', 1),
    }[style]
    return f"{INSTRUCTION if instructed else ''}{question_of(someone)}Record: {answer}"


def new_model(tokenizer: Tokenizer) -> Transformer:
    config = DecoderConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=128, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=32,
        intermediate_size=384, max_seq_len=256,
    )  # fmt: skip
    return Transformer(config).init_weights(torch.Generator().manual_seed(0))


def train(model: Transformer, tokenizer: Tokenizer, draw: random.Random, steps: int, clean: bool, peak_lr: float = 2e-3) -> None:
    """Take AdamW steps on batches of 32 examples, cut or filled to CONTEXT tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.1)
    end = tokenizer.end_of_text_id
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * min(1.0, (step + 1) / 30, (steps - step) / (0.4 * steps))
        rows = [[end, *tokenizer.encode(example(draw, clean)), end][: CONTEXT + 1] for _ in range(32)]
        tokens_BT = torch.tensor([row + [end] * (CONTEXT + 1 - len(row)) for row in rows])
        wanted_BT = tokens_BT[:, 1:].clone()
        for row, wanted in zip(rows, wanted_BT):
            wanted[len(row) - 1 :] = -100
        loss = F.cross_entropy(model.logits(model(tokens_BT[:, :-1])).flatten(0, 1).float(), wanted_BT.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: {loss.item():.3f} nats a token", file=sys.stderr, flush=True)


def prompts_of(tokenizer: Tokenizer, questions: list[dict[str, Any]], instruction: str) -> list[list[int]]:
    return [[tokenizer.end_of_text_id, *tokenizer.encode(f"{instruction}{question_of(each)}Record:")] for each in questions]


def compare(model: Transformer, tokenizer: Tokenizer, questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    plain, asked = (prompts_of(tokenizer, questions, instruction) for instruction in ("", INSTRUCTION))
    engine = text_engine(model, tokenizer)
    ways = {
        "asked plainly": lambda: ask(engine, plain, GRAMMAR, PARAMS),
        "asked for JSON": lambda: ask(engine, asked, GRAMMAR, PARAMS),
        "asked for JSON, mended": lambda: ask_and_repair(engine, asked, GRAMMAR, PARAMS),
        "asked again until valid, at most 8 times": lambda: retry(engine, asked, GRAMMAR, PARAMS, 8),
        "mended, asked again until valid": lambda: retry(engine, asked, GRAMMAR, PARAMS, 8, repair=True),
        "constrained, asked plainly": lambda: constrain(engine, plain, GRAMMAR, PARAMS),
        "constrained, asked for JSON": lambda: constrain(engine, asked, GRAMMAR, PARAMS),
    }
    return [measured(name, way, questions) for name, way in ways.items()]


def compare_finetuned(model: Transformer, tokenizer: Tokenizer, questions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    asked, engine = prompts_of(tokenizer, questions, INSTRUCTION), text_engine(model, tokenizer)
    ways = {
        "finetuned": lambda: ask(engine, asked, GRAMMAR, PARAMS),
        "finetuned and constrained": lambda: constrain(engine, asked, GRAMMAR, PARAMS),
    }
    return [measured(name, way, questions) for name, way in ways.items()]


PARAMS = SamplingParams(temperature=1.0, max_tokens=80, seed=1, stop=("\n\n",))


def text_engine(model: Transformer, tokenizer: Tokenizer) -> TextEngine:
    return TextEngine(Engine(model.eval(), max_batch=32, eos_ids=(tokenizer.end_of_text_id,)), tokenizer)


def measured(name: str, way, questions: list[dict[str, Any]]) -> dict[str, Any]:
    started = time.perf_counter()
    results = way()
    seconds = time.perf_counter() - started
    right = sum(result.valid and json.loads(result.text) == someone for result, someone in zip(results, questions))
    row = {
        "way": name,
        "valid": sum(result.valid for result in results),
        "right": right,
        "n": len(questions),
        "attempts": sum(result.attempts for result in results) / len(questions),
        "completion_tokens": sum(result.completion_tokens for result in results) / len(questions),
        "seconds": round(seconds, 2),
    }
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
