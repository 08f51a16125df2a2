"""What a small student learns of a teacher by each loss of distillation, and what the chunked loss holds in memory.

    python benchmarks/distillation.py --data runs/reviews     # the world's models (about two minutes, once), then about three minutes

In the world of reviews the finetuned model teaches a decoder of one layer on few conversations. The student first learns their tokens by
cross-entropy, as before any distillation; from there it goes on each way for the same number of updates. Then the loss alone, at a
vocabulary of 32,768: bytes of all living tensors at their most, and seconds, for whole logits and in chunks. Writes
benchmarks/records/distillation.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from live_bytes import LiveBytes

from best_of_n import held_out_answers, kl_to
from plinth.models.config import DecoderConfig
from plinth.models.hub import load_decoder, save_model
from plinth.models.transformer import Transformer
from plinth.posttraining.batches import pad_rows
from plinth.posttraining.distill_losses import Head, chunked_distillation_loss, distillation_loss
from plinth.posttraining.distillation import DistillConfig, distill, distill_loss
from plinth.posttraining.examples import Conversation
from plinth.posttraining.masks import render_row
from plinth.posttraining.sft import train_sft
from plinth.posttraining.sft_config import SftConfig
from plinth.run import find_model
from plinth.tasks.reviews import conversations
from plinth.tokenizer.encode import Tokenizer
from plinth.training.loop import TrainConfig
from plinth.training.optim import OptimizerConfig
from record import write_record
from reviews_world import ready

ROWS, STEPS = 300, 150  # conversations to learn from, updates
SHAPE = {"hidden_size": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 32, "intermediate_size": 128}
WAYS = {
    "the student before": None,
    "cross-entropy of the data": None,
    "forward KL": {"divergence": "forward_kl"},
    "reverse KL": {"divergence": "reverse_kl"},
    "Jensen-Shannon, β = 0.5": {"divergence": "jsd", "beta": 0.5},
    "forward KL and half cross-entropy": {"divergence": "forward_kl", "share": 0.5},
    "forward KL, half of the answers the student's": {"divergence": "forward_kl", "on_policy_share": 0.5, "max_tokens": 60},
}


def students(data: Path) -> list[dict]:
    """Train a student each way and return what it says on held-out prompts."""
    teacher, work = data / "sft", data / "distilled"
    shutil.rmtree(work, ignore_errors=True)
    tokenizer = Tokenizer.load(find_model(teacher))
    config = DecoderConfig(vocab_size=tokenizer.vocab_size, max_seq_len=96, **SHAPE)
    save_model(Transformer(config).init_weights(torch.Generator().manual_seed(0)), tokenizer, work / "start")
    (work / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations(ROWS, seed=7)))
    train = TrainConfig(
        steps=STEPS, warmup_steps=10, num_threads=1, dtype="float32", keep_pre_decay=False, compile=False,
        optimizer=OptimizerConfig(lr=0.002, muon_lr=0.01),
    )  # fmt: skip
    rows = []
    for number, (name, options) in enumerate(WAYS.items()):
        start, out = time.perf_counter(), work / f"student{number}"
        begin = work / ("student0" if number else "start")
        if options is None:
            train_sft(out, begin, work / "data.jsonl", SftConfig(train, conversations_per_step=64, micro_batch_size=16))
        else:
            distill(out, begin, teacher, work / "data.jsonl", DistillConfig(train, examples_per_step=64, **options))
        seconds = time.perf_counter() - start
        _, answers = held_out_answers(out, data / "world", 8)
        rows.append(
            {"name": name, "time_s": seconds, "own_kl_nats": kl_to(out, teacher, answers), **held_out_loss(out, teacher, tokenizer)}
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


@torch.no_grad()
def held_out_loss(student: Path, teacher: Path, tokenizer: Tokenizer) -> dict[str, float]:
    """Return nats a token on held-out conversations: the student's cross-entropy, the teacher's, and KL(teacher ‖ student)."""
    parts = [render_row(tokenizer, Conversation(row["messages"]))[0].rendered for row in conversations(256, seed=1, split="heldout")]
    batch = pad_rows([part.tokens for part in parts], [part.loss_mask for part in parts], tokenizer.pad_id or 0)
    models = [load_decoder(find_model(folder)) for folder in (student, teacher)]
    loss, count, sums = distill_loss(*models, batch, DistillConfig())
    return {"kl_nats": float(loss) / count} | {name: float(value) / count for name, value in sums.items()}


def memory(rows: int = 1024, vocab: int = 32_768, widths: tuple[int, int] = (256, 512)) -> list[dict]:
    """Return peak bytes and seconds of the loss with its gradient, of whole logits and in chunks."""
    generator = torch.Generator().manual_seed(0)
    hidden, other = (torch.randn(rows, width, generator=generator) for width in widths)
    weight, other_weight = (torch.randn(vocab, width, generator=generator) * 0.05 for width in widths)
    targets = torch.randint(0, vocab, (rows,), generator=generator)

    def whole(h, w):
        return distillation_loss(h @ w.T, other @ other_weight.T, targets, name="jsd")[0]

    def chunked(h, w):
        return chunked_distillation_loss(Head(h, w), Head(other, other_weight), targets, name="jsd")[0]

    found = []
    for name, loss in (("whole logits", whole), ("chunks", chunked)):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        with LiveBytes() as live:
            torch.autograd.grad(loss(h, w), [h, w])
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            torch.autograd.grad(loss(h, w), [h, w])
            seconds.append(time.perf_counter() - start)
        found.append({"name": name, "peak_bytes": live.peak, "one_table_bytes": rows * vocab * 4, "time_s": min(seconds)})
        print(json.dumps(found[-1]), flush=True)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("runs/reviews"), help="folder of the world and its models")

    data = ready(parser.parse_args().data)
    torch.set_num_threads(1)
    rows = students(data)
    print(write_record("distillation", "what does a student learn by each loss?", rows, rows_of_data=ROWS, steps=STEPS, memory=memory()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
