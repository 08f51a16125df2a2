"""How fast does Plinth train on conversations and preferences, against TRL and plain transformers loops, from the same weights?

    python benchmarks/posttraining_peers.py --trl PYTHON [--data FILE] [--task sft:float32 ...] [--rounds 3] [--threads 2]

A decoder in Llama's shape of 4 layers and a vocabulary of 16,384, exported once in Hugging Face's format, and once with one score in the
head's place; every side loads it and trains one epoch on the same tokens: in the same dtype, with AdamW and as many examples an update, and
again with each side's own defaults.
The examples are made up, with lengths as people's chats have them (log-normal), or pairs of a file that `plinth inspect` reads. Every side
is a process of its own that trains anew each round; rounds alternate. The figure is an epoch's seconds divided by its examples, the median
of all rounds; what is computed once before the first update counts, start, reading and saving do not. A first round of one update checks
that the sides agree on loss and gradient. Rounds are appended to rounds.jsonl in the folder, so that a long run can be cut into parts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side_process import SideProcess

from plinth.models.config import DecoderConfig
from plinth.models.hub import save_model
from plinth.models.reward import RewardModel
from plinth.models.transformer import Transformer
from plinth.posttraining.examples import Preference
from plinth.posttraining.formats import read_examples
from plinth.posttraining.masks import render_row
from plinth.run import usable_cores
from plinth.tokenizer.chat import render
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.train import train_tokenizer
from record import spread, write_record

HERE = Path(__file__).parent
CONTEXT, EXAMPLES, PER_STEP = 512, 64, 8
SHAPE = DecoderConfig(
    vocab_size=16_384, hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=64, intermediate_size=768, max_seq_len=CONTEXT,
    qk_norm=False, learnable_norm=True, published_as="llama",
)  # fmt: skip
SIDES = {
    "sft": ("plinth", "trl", "transformers"),
    "dpo": ("plinth", "trl", "transformers"),
    "reward": ("plinth", "trl"),
    "grpo": ("plinth", "trl"),
}
GROUP, NEW, PROMPTS_PER_STEP = 8, 64, 4  # of grpo: completions a prompt, their tokens, and prompts an update
SETTINGS = ("float32", "bfloat16", "defaults")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="Python of an environment that has TRL")
    parser.add_argument("--data", type=Path, help="pairs of chosen and rejected answers (default: made up)")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench-posttraining"), help="model, examples and rounds")
    parser.add_argument("--task", nargs="*", help="TASK:SETTINGS; default: all that lack rounds, then the record")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="examples of an epoch")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--record", action="store_true", help="only write the record of the rounds that there are")
    arguments = parser.parse_args()
    prepare(arguments.folder, arguments.data)
    journal = arguments.folder / "rounds.jsonl"
    tasks = arguments.task or ([] if arguments.record else missing(journal, arguments.rounds))
    for task in tasks:
        run_task(*task.split(":"), arguments, journal)
    if not arguments.task:
        record(journal, arguments)
    return 0


def prepare(folder: Path, data: Path | None) -> None:
    """Write model and examples once, the examples as text for us and as tokens for the peers."""
    if (folder / "DONE").exists():
        return
    pairs = list(made_up()) if data is None else [row for row in read_examples(data, "preference").rows]
    texts = [message["content"] for pair in pairs[:4000] for message in [*pair.prompt, *pair.chosen, *pair.rejected]]
    tokenizer = train_tokenizer(texts, SHAPE.vocab_size)
    model = Transformer(SHAPE).init_weights(torch.Generator().manual_seed(0))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):  # no matrix starts at zero: the sides are compared on gradients of all
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(i))
    save_model(model, tokenizer, folder / "hf")
    save_model(RewardModel.from_decoder(model, torch.Generator().manual_seed(1)), tokenizer, folder / "hf-reward")
    write_examples(folder, pairs, tokenizer)
    (folder / "DONE").touch()


def write_examples(folder: Path, pairs: list[Preference], tokenizer: Tokenizer, count: int = 256) -> None:
    files: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for pair in pairs:
        parts = [part.rendered for part in render_row(tokenizer, pair)]
        if max(len(part.tokens) for part in parts) >= CONTEXT or not all(m["content"].strip() for m in pair.chosen + pair.rejected):
            continue
        conversation = [*pair.prompt, *pair.chosen]
        whole = render(tokenizer, conversation)
        first = parts[0].loss_mask.index(True)
        stops = [len(part.loss_mask) - part.loss_mask[::-1].index(True) for part in parts]
        files["sft"].append({"messages": conversation})
        files["sft.tokens"].append({"tokens": whole.tokens, "learnt": [int(flag) for flag in whole.loss_mask]})
        files["pairs"].append({"prompt": pair.prompt, "chosen": pair.chosen[0]["content"], "rejected": pair.rejected[0]["content"]})
        chosen, rejected = (part.tokens[first:stop] for part, stop in zip(parts, stops))
        files["pairs.tokens"].append({"prompt_ids": parts[0].tokens[:first], "chosen_ids": chosen, "rejected_ids": rejected})
        asked = render(tokenizer, pair.prompt, add_generation_prompt=True).tokens
        if len(asked) + NEW <= CONTEXT:
            files["prompts"].append({"prompt": pair.prompt, "answer": "any"})
            files["prompts.tokens"].append({"prompt": tokenizer.decode(asked, skip_special=False)})
        if len(files["sft"]) == count:
            break
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_up(count: int = 4000) -> Iterator[Preference]:
    """Give pairs of made-up words: one to four exchanges, lengths of messages log-normal."""
    rng = np.random.default_rng(0)
    syllables = ["ka", "to", "mi", "ru", "sen", "dal", "vo", "pi", "lar", "ne", "gu", "shi", "bor", "te", "wan", "zu"]
    words = ["".join(rng.choice(syllables, rng.integers(1, 5))) for _ in range(20_000)]

    def text(median: float) -> str:
        return " ".join(words[min(int(i), len(words) - 1)] for i in rng.pareto(0.8, max(1, int(rng.lognormal(np.log(median), 0.8)))) * 20)

    for _ in range(count):
        prompt = [{"role": "user", "content": text(12)}]
        for _ in range(min(3, rng.geometric(0.45) - 1)):
            prompt += [{"role": "assistant", "content": text(25)}, {"role": "user", "content": text(12)}]
        yield Preference(prompt, [{"role": "assistant", "content": text(25)}], [{"role": "assistant", "content": text(30)}])


class Process(SideProcess):
    """A side of a task, loaded and waiting."""

    def __init__(self, side: str, task: str, settings: str, arguments: argparse.Namespace):
        where = [task, settings, arguments.folder, arguments.threads]
        ours = [sys.executable, HERE / "posttraining_sides.py", *where]
        command = ours if side == "plinth" else [arguments.trl, HERE / "trl_side.py", side, *where]
        super().__init__(command)
        self.versions = self.answer()["versions"]


def run_task(task: str, settings: str, arguments: argparse.Namespace, journal: Path) -> None:
    """Load the sides of a task, check that they agree, and let them take turns."""
    sides = [side for side in SIDES[task] if not (side == "transformers" and settings == "defaults")]
    processes = {side: Process(side, task, settings, arguments) for side in sides}
    for number in range(arguments.rounds + 1):
        for side in sides if number % 2 else reversed(sides):
            answer = processes[side].run(work_of(task, arguments.examples if number else 0))
            line = {"task": task, "settings": settings, "threads": arguments.threads, "side": side, "round": number}
            line |= {"examples": work_of(task, arguments.examples)["examples"], "versions": processes[side].versions, **answer}
            with journal.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(
                {key: line[key] for key in ("task", "settings", "side", "round", "seconds", "processor_s", "loss", "grad_norm")},
                file=sys.stderr,
                flush=True,
            )
    for process in processes.values():
        process.close()


def work_of(task: str, examples: int) -> dict[str, int]:
    """Return a round of so many examples, or the check of one update; GRPO takes a prompt where others take four."""
    if task == "grpo":
        per_step = PROMPTS_PER_STEP
        return {"examples": max(per_step, examples // 4), "per_step": per_step, "group": GROUP, "new": NEW}
    return {"examples": max(PER_STEP, examples), "per_step": PER_STEP}


def read(journal: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in journal.read_text().splitlines()] if journal.exists() else []


def missing(journal: Path, rounds: int) -> list[str]:
    """Return the tasks that have fewer rounds than wanted."""
    found: dict[str, int] = defaultdict(int)
    for line in read(journal):
        if line["side"] == "trl" and line["round"]:
            found[f"{line['task']}:{line['settings']}"] += 1
    return [f"{task}:{settings}" for task in SIDES for settings in SETTINGS if found[f"{task}:{settings}"] < rounds]


def record(journal: Path, arguments: argparse.Namespace) -> None:
    """Write benchmarks/records/posttraining_peers.json."""
    groups: dict[tuple[str, str], dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for line in read(journal):
        groups[line["task"], line["settings"]][line["side"]].append(line)
    rows = [
        {
            "task": task, "settings": settings, "threads": sides["plinth"][0]["threads"],
            "sides": {side: summary(lines) for side, lines in sides.items()},
            "ours_over": ratios(sides, "seconds"),
            "processor_ours_over": ratios(sides, "processor_s"),
        }
        for (task, settings), sides in groups.items()
    ]  # fmt: skip
    more = {"versions_of_peers": next(line["versions"] for line in read(journal) if line["side"] == "trl")}
    question = "How fast does Plinth train on conversations and preferences, against TRL and plain transformers loops?"
    data = "made up" if arguments.data is None else arguments.data.name
    write_record("posttraining_peers", question, rows, data=data, per_step=PER_STEP, context=CONTEXT, **more)


def summary(lines: list[dict]) -> dict[str, Any]:
    rounds = [line for line in lines if line["round"]]
    check = next(line for line in lines if not line["round"])
    return {
        "seconds_per_example": spread([line["seconds"] / line["examples"] for line in rounds]),
        "processor_s_per_example": spread([line["processor_s"] / line["examples"] for line in rounds]),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in rounds),
        "updates": rounds[0]["updates"], "first_loss": check["loss"], "first_grad_norm": check["grad_norm"],
    }  # fmt: skip


def ratios(sides: dict[str, list[dict]], what: str) -> dict[str, dict[str, float]]:
    """Return our part of each peer's, of rounds of the same number."""
    found = {}
    for side in [side for side in sides if side != "plinth"]:
        pairs = [(a, b) for a in sides["plinth"] for b in sides[side] if a["round"] == b["round"] != 0]
        found[side] = spread([a[what] / a["examples"] / (b[what] / b["examples"]) for a, b in pairs])
    return found


if __name__ == "__main__":
    raise SystemExit(main())
