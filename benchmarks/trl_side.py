"""TRL's side of posttraining_peers.py, and plain loops on transformers: runs in an environment that has TRL, knows nothing of Plinth.

    python benchmarks/trl_side.py trl|transformers TASK SETTINGS FOLDER THREADS

The tasks are sft, dpo, reward and grpo; the settings float32, bfloat16 or defaults. Examples come as tokens, so that all sides train on the
same ones. Reads one JSON object a line, {"examples", "per_step"}, trains one epoch on so many from the weights in FOLDER, and answers
with its seconds, its processor's seconds, updates, the first update's loss and norm of the gradient, and the process's largest memory.

TRL's trainers run as they come; with float32 or bfloat16 without gradient checkpointing and saves, which cost time, with defaults with all
of theirs but the saves. The plain loops are what one writes oneself: padded batches in random order, transformers' own loss or PyTorch's
log-softmax over all positions, AdamW, clipping; bfloat16 is autocast, as TRL's is.
"""

from __future__ import annotations

import contextlib
import json
import random
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers

LR, BETA, CLIP, PAD_LABEL = 1e-5, 0.1, 1.0, -100
transformers.logging.set_verbosity_error()


def read(folder: Path, name: str, count: int) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.tokens.jsonl").read_text().splitlines()[:count]]


def load(folder: Path, cls: Any = transformers.AutoModelForCausalLM, name: str = "hf") -> Any:
    torch.manual_seed(0)
    return cls.from_pretrained(folder / name, dtype=torch.float32)


class Trl:
    """TRL's trainer of the task."""

    def __init__(self, task: str, settings: str, folder: Path):
        import trl

        self.trl, self.task, self.settings, self.folder = trl, task, settings, folder
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")

    def run(self, work: dict[str, int]) -> dict[str, Any]:
        from datasets import Dataset

        notes: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as out:
            trainer = getattr(self, self.task)(out, work, Dataset)
            trainer.add_callback(noting(notes))
            trainer.train()
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        return notes | {"loss": log[0]["loss"], "grad_norm": log[0].get("grad_norm")}

    def options(self, out: str, work: dict[str, int], **more: Any) -> dict[str, Any]:
        same = {} if self.settings == "defaults" else {"gradient_checkpointing": False, "bf16": self.settings == "bfloat16"}
        return {
            "output_dir": out, "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "num_train_epochs": 1,
            "per_device_train_batch_size": work["per_step"], "logging_steps": 1, "learning_rate": LR, **same, **more,
        }  # fmt: skip

    def sft(self, out: str, work: dict[str, int], dataset: Any) -> Any:
        rows = [
            {"input_ids": row["tokens"], "labels": [t if flag else PAD_LABEL for t, flag in zip(row["tokens"], row["learnt"])]}
            for row in read(self.folder, "sft", work["examples"])
        ]
        options = self.trl.SFTConfig(**self.options(out, work))
        return self.trl.SFTTrainer(load(self.folder), options, train_dataset=dataset.from_list(rows), processing_class=self.tokenizer)

    def dpo(self, out: str, work: dict[str, int], dataset: Any) -> Any:
        class Tokenised(self.trl.DPOTrainer):  # the examples are tokens already
            def _prepare_dataset(self, rows: Any, *others: Any, **more: Any) -> Any:
                return rows

        rows = dataset.from_list(read(self.folder, "pairs", work["examples"]))
        options = self.trl.DPOConfig(**self.options(out, work))
        return Tokenised(load(self.folder), load(self.folder), options, train_dataset=rows, processing_class=self.tokenizer)

    def reward(self, out: str, work: dict[str, int], dataset: Any) -> Any:
        rows = [
            {"chosen_ids": row["prompt_ids"] + row["chosen_ids"], "rejected_ids": row["prompt_ids"] + row["rejected_ids"]}
            for row in read(self.folder, "pairs", work["examples"])
        ]

        class Tokenised(self.trl.RewardTrainer):
            def _prepare_dataset(self, rows: Any, *others: Any, **more: Any) -> Any:
                return rows

        model = load(self.folder, transformers.AutoModelForSequenceClassification, "hf-reward")
        options = self.trl.RewardConfig(**self.options(out, work))
        return Tokenised(model, options, train_dataset=dataset.from_list(rows), processing_class=self.tokenizer)

    def grpo(self, out: str, work: dict[str, int], dataset: Any) -> Any:
        rows = [{"prompt": row["prompt"]} for row in read(self.folder, "prompts", work["examples"])]

        def chance(completion_ids: list[list[int]], **columns: Any) -> list[float]:
            return [float(random.random() < 0.5) for _ in completion_ids]

        more = {"num_generations": work["group"], "max_completion_length": work["new"], "temperature": 1.0}
        more |= {} if self.settings == "defaults" else {"loss_type": "grpo"}
        size = {"per_device_train_batch_size": work["per_step"] * work["group"]}
        options = self.trl.GRPOConfig(**self.options(out, work, **more) | size)
        return self.trl.GRPOTrainer(
            load(self.folder), chance, args=options, train_dataset=dataset.from_list(rows), processing_class=self.tokenizer
        )


def noting(notes: dict[str, Any]) -> transformers.TrainerCallback:
    """Return a callback that notes the seconds of training and its updates."""

    class Clock(transformers.TrainerCallback):
        def on_train_begin(self, *arguments: Any, **more: Any) -> None:
            self.began, self.worked = time.perf_counter(), time.process_time()

        def on_step_end(self, args: Any, state: Any, *others: Any, **more: Any) -> None:
            notes.update(seconds=time.perf_counter() - self.began, processor_s=time.process_time() - self.worked, updates=state.global_step)

    return Clock()


class Plain:
    """A loop on transformers."""

    def __init__(self, task: str, settings: str, folder: Path):
        self.task, self.folder = task, folder
        self.bf16 = settings == "bfloat16"

    def run(self, work: dict[str, int]) -> dict[str, Any]:
        torch.manual_seed(0)
        policy = load(self.folder).train()
        frozen = load(self.folder).eval() if self.task == "dpo" else None
        rows = read(self.folder, {"sft": "sft", "dpo": "pairs"}[self.task], work["examples"])
        optimizer = torch.optim.AdamW(policy.parameters(), lr=LR)
        random.Random(0).shuffle(rows)
        first: dict[str, float] = {}
        began, worked = time.perf_counter(), time.process_time()
        for start in range(0, len(rows), work["per_step"]):
            batch = rows[start : start + work["per_step"]]
            with torch.autocast("cpu", torch.bfloat16) if self.bf16 else contextlib.nullcontext():
                loss = self.sft(policy, batch) if self.task == "sft" else self.dpo(policy, frozen, batch)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
            first = first or {"loss": loss.item(), "grad_norm": norm.item()}
        updates = -(-len(rows) // work["per_step"])
        spent = {"seconds": time.perf_counter() - began, "processor_s": time.process_time() - worked}
        return {**spent, "updates": updates, **first}

    def sft(self, policy: Any, batch: list[dict]) -> torch.Tensor:
        ids, attended, labels = pad([(row["tokens"], row["learnt"]) for row in batch])
        return policy(input_ids=ids, attention_mask=attended, labels=labels).loss

    def dpo(self, policy: Any, frozen: Any, batch: list[dict]) -> torch.Tensor:
        rows = [
            (row["prompt_ids"] + row[side], [0] * len(row["prompt_ids"]) + [1] * len(row[side]))
            for side in ("chosen_ids", "rejected_ids")
            for row in batch
        ]
        ids, attended, labels = pad(rows)
        with torch.no_grad():
            reference = sequence_log_probs(frozen(input_ids=ids, attention_mask=attended).logits, labels)
        ratios = sequence_log_probs(policy(input_ids=ids, attention_mask=attended).logits, labels) - reference
        chosen, rejected = ratios.chunk(2)
        return -F.logsigmoid(BETA * (chosen - rejected)).mean()


def pad(rows: list[tuple[list[int], list[int]]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids, attention mask and labels, padded on the right to the longest row."""
    width = max(len(tokens) for tokens, _ in rows)
    ids, attended, labels = (torch.full((len(rows), width), fill) for fill in (0, 0, PAD_LABEL))
    for i, (tokens, learnt) in enumerate(rows):
        ids[i, : len(tokens)] = torch.tensor(tokens)
        attended[i, : len(tokens)] = 1
        labels[i, : len(tokens)] = torch.tensor([t if flag else PAD_LABEL for t, flag in zip(tokens, learnt)])
    return ids, attended, labels


def sequence_log_probs(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the summed log-probability of each row's labels."""
    targets = labels[:, 1:]
    log_probs = logits[:, :-1].float().log_softmax(-1)
    return (log_probs.gather(-1, targets.clamp_min(0)[..., None])[..., 0] * (targets >= 0)).sum(-1)


def main() -> None:
    side, task, settings, folder, threads = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4]), int(sys.argv[5])
    torch.set_num_threads(threads)
    answers, sys.stdout = sys.stdout, sys.stderr  # what the libraries print is not for the reader of answers
    worker = (Trl if side == "trl" else Plain)(task, settings, folder)
    print(json.dumps({"ready": True, "versions": versions(side)}), file=answers, flush=True)
    for line in sys.stdin:
        answer = worker.run(json.loads(line))
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps(answer | {"peak_memory_bytes": peak}), file=answers, flush=True)


def versions(side: str) -> dict[str, str]:
    import importlib.metadata

    names = ("torch", "transformers", "accelerate", "trl") if side == "trl" else ("torch", "transformers")
    return {name: importlib.metadata.version(name) for name in names}


if __name__ == "__main__":
    main()
