"""What the ranks of test_parallel.py run: groups of processes, one after the other, whose leaders write what they found as JSON.

usage: ranks_session.py FOLDER COUNT:CHECK[,CHECK...] ...

Everything is imported once, then each group is forked: a process of its own a rank, with its standard error in FOLDER/CHECK.RANK.err, its
exit status in FOLDER/CHECK.codes.json, and the leader's findings in FOLDER/CHECK.json.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import socket
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import torch

from plinth.config import UserError
from plinth.models.config import DecoderConfig
from plinth.models.transformer import Transformer
from plinth.recipes.pretraining import PretrainConfig, pretrain
from plinth.run import file_sha256
from plinth.training.loop import TrainConfig
from plinth.training.objectives import causal_lm_loss
from plinth.training.optim import OptimizerConfig, build_optimizer
from plinth.training.parallel import ParallelConfig, Ranks, open_ranks
from plinth.training.precision import MasterWeights
from plinth.training.sharded_weights import ShardedWeights
from plinth.training.sharding import shard_model
from plinth.training.step import InlineWorker, train_step

# 50 rows of vocabulary and 40 features are no multiples of what they are cut into; the scales of the heads' norms are shared by ranks.
CONFIG = DecoderConfig(
    vocab_size=50, hidden_size=24, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, intermediate_size=40, max_seq_len=16
)
SHAPES = {
    "tied": CONFIG,
    "untied": DecoderConfig(**{**CONFIG.__dict__, "tie_embeddings": False, "learnable_norm": True}),
}
PRETRAINING = PretrainConfig(
    model=replace(CONFIG, vocab_size=300),
    train=TrainConfig(steps=8, warmup_steps=2, dtype="float32", num_threads=1, keep_every_steps=1),
    seq_len=16, sequences_per_step=8, micro_batch_size=2, matmul_flops_per_s=1e9,
)  # fmt: skip
STEPS = 5
ROWS = 8
LAYOUTS = {
    2: [{"dp_replicate": 2}, {"dp_shard": 2}, {"tp": 2}],
    4: [{"dp_replicate": 4}, {"dp_shard": 4}, {"dp_replicate": 2, "dp_shard": 2}, {"dp_shard": 2, "tp": 2}, {"dp_replicate": 2, "tp": 2}],
}


def plain_model(shape: DecoderConfig) -> Transformer:
    """Return initial weights without the zero projections, which would hide half of the gradients at first."""
    model = Transformer(shape).init_weights(torch.Generator().manual_seed(0))
    for i, layer in enumerate(model.layers):
        for weight in (layer.attention.out.weight, layer.mlp.down.weight):
            torch.nn.init.normal_(weight, 0, 0.1, generator=torch.Generator().manual_seed(i))
    return model


def rows_of(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a step's rows; the first half of them counts few tokens, so that a mean of means would show."""
    generator = torch.Generator().manual_seed(step % 2)
    tokens = torch.randint(CONFIG.vocab_size, (ROWS, 13), generator=generator)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].clone()
    targets[: ROWS // 2, 2:] = -1
    return inputs, targets


def curve(masters, optimizer, rows: slice, steps: range) -> list[tuple[float, float]]:
    """Train on a share of each step's rows, one row a micro-batch; return (loss, gradient norm) of each step."""
    measured = []
    for step in steps:
        inputs, targets = rows_of(step)
        batches = list(zip(inputs[rows].split(1), targets[rows].split(1)))
        result = train_step(masters, causal_lm_loss, batches, optimizer, InlineWorker(), clip_grad_norm=0.5)
        measured.append((result.loss_nats, result.grad_norm))
    return measured


def spread(shape: DecoderConfig, ranks: Ranks, dtype: str = "float32") -> ShardedWeights:
    with torch.device("meta"):
        model = Transformer(shape)
    return ShardedWeights(shard_model(model, ranks, dtype, plain_model(shape).named_parameters()), dtype, ranks)


def optimizer_of(masters, name: str):
    return build_optimizer(masters, OptimizerConfig(name=name, lr=0.01, muon_lr=0.02))


def check_layouts(out: dict) -> None:
    """Compare every layout with one process, for both optimizers and both shapes."""
    for layout in LAYOUTS[torch.distributed.get_world_size()]:
        for optimizer, shape, checkpointing in (("muon", "tied", "selective"), ("adamw", "untied", "block")):
            config = ParallelConfig(**layout, activation_checkpointing=checkpointing)
            with open_ranks(config) as ranks:
                masters = spread(SHAPES[shape], ranks)
                update = optimizer_of(masters, optimizer)
                first, count = ranks.share_rows(ROWS)
                measured = curve(masters, update, slice(first, first + count), range(STEPS))
                weights = Transformer(SHAPES[shape]) if ranks.is_leader else None
                masters.gather_into(weights)
                held = masters.held_bytes(), sum(t.numel() * t.element_size() for t in update.state.values())
                entry = {"layout": layout, "optimizer": optimizer, "shape": shape, "curve": measured, "held": ranks.gather(held)}
                entry["equal_copies"] = len({str([t.tolist() for t in m]) for m in copies(ranks, masters)}) == 1
                if ranks.is_leader:
                    entry["whole"] = one_process(SHAPES[shape], optimizer, weights)
                    out.setdefault("entries", []).append(entry)


def copies(ranks: Ranks, masters: ShardedWeights) -> list[list[torch.Tensor]]:
    """Return the shards of the ranks that should hold the same as the leader: one of each copy."""
    return ranks.gather(list(masters.tensors.values()))[:: ranks.copy_size]


@functools.cache
def trained_alone(shape: DecoderConfig, optimizer: str):
    masters = MasterWeights(plain_model(shape), torch.float32)
    update = optimizer_of(masters, optimizer)
    return masters, update, curve(masters, update, slice(0, ROWS), range(STEPS))


def one_process(shape: DecoderConfig, optimizer: str, spread_weights: Transformer) -> dict:
    masters, update, measured = trained_alone(shape, optimizer)
    found = dict(spread_weights.named_parameters())
    apart = max(float((found[name] - tensor).abs().max() / tensor.abs().max()) for name, tensor in masters.tensors.items())
    held = sum(t.numel() * 4 for t in masters.tensors.values()), sum(t.numel() * 4 for t in update.state.values())
    return {"curve": measured, "weights_apart": apart, "held": held}


def check_bf16(out: dict) -> None:
    """Train in bf16 with fp32 shards, and report the curve beside that of fp32."""
    curves = {}
    for dtype in ("float32", "bfloat16"):
        with open_ranks(ParallelConfig(dp_shard=2)) as ranks:
            masters = spread(CONFIG, ranks, dtype)
            first, count = ranks.share_rows(ROWS)
            curves[dtype] = curve(masters, optimizer_of(masters, "muon"), slice(first, first + count), range(STEPS))
            kinds = {str(t.dtype) for t in masters.tensors.values()}
    out.update(bf16=curves, master_dtypes=sorted(kinds))


def check_errors(out: dict) -> None:
    """Collect the texts of what is refused."""
    texts = out.setdefault("errors", [])
    attempts = [
        lambda: open_ranks(ParallelConfig(dp_shard=3)).__enter__(),
        lambda: within({"tp": 2}, lambda ranks: spread(DecoderConfig(**{**CONFIG.__dict__, "num_kv_heads": 1}), ranks)),
        lambda: within({"dp_shard": 2}, lambda ranks: ranks.share_rows(7)),
        lambda: within({"dp_shard": 2}, lambda ranks: build_optimizer(spread(CONFIG, ranks), OptimizerConfig(normuon_beta2=0.9))),
    ]
    for attempt in attempts:
        try:
            attempt()
        except UserError as error:
            texts.append(str(error))


def within(layout: dict, action) -> None:
    """Open ranks without the rule that only the first failure speaks, which would end this session."""
    with open_ranks(ParallelConfig(**layout)) as ranks:
        try:
            action(ranks)
        except UserError as error:
            failure = error
        else:
            return
    raise failure


def check_failure(out: dict) -> None:
    """Let rank 1 alone meet a mistake of the user; the other waits for it in vain."""
    with open_ranks(ParallelConfig(timeout_s=60)) as ranks:
        if ranks.rank == 1:
            raise UserError("rank one met a mistake.")
        ranks.wait()


def check_death(out: dict) -> None:
    """Let rank 1 die without a word."""
    with open_ranks(ParallelConfig(timeout_s=60)) as ranks:
        if ranks.rank == 1:
            os._exit(9)
        ranks.sum([1.0])


def tell(text: str) -> None:
    print(text, file=sys.stderr)


def train_on(out: dict, layout: dict, resume: bool) -> None:
    """Pretrain through the recipe in the session's folder; the run's metrics go into the findings."""
    folder = Path(os.environ["SESSION_FOLDER"])
    config = replace(PRETRAINING, parallel=ParallelConfig(**layout))
    pretrain(
        folder / "run",
        folder / "shards",
        folder / "tokenizer",
        config,
        resume=resume,
        warn=lambda text: print(text, file=sys.stderr),
    )
    if os.environ["RANK"] == "0":
        checkpoints = folder / "run" / "checkpoints"
        out["metrics"] = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        out["weights"] = file_sha256(folder / "run" / "model" / "model.safetensors")
        out["files"] = sorted(file.name for file in max(checkpoints.glob("step_*")).iterdir())


def check_start_on_four(out: dict) -> None:
    train_on(out, {"dp_shard": 2, "tp": 2}, resume=False)


def check_resume_on_two(out: dict) -> None:
    """Go on from step 4, which four ranks saved; a byte of the file of step 5 is wrong."""
    if os.environ["RANK"] == "0":
        checkpoints = rewind(5)
        file = checkpoints / "step_000005" / "__1_0.distcp"
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)
    torch.distributed.barrier()
    train_on(out, {"dp_replicate": 2}, resume=True)


def rewind(step: int) -> Path:
    """Put the run back to where a crash after `step` would leave it."""
    run = Path(os.environ["SESSION_FOLDER"]) / "run"
    (run / "DONE").unlink()
    shutil.rmtree(run / "model")
    for path in (run / "checkpoints").glob("step_*"):
        if int(path.name.removeprefix("step_")) > step:
            shutil.rmtree(path)
    return run / "checkpoints"


CHECKS = {
    check.__name__: check
    for check in (check_layouts, check_bf16, check_errors, check_failure, check_death, check_start_on_four, check_resume_on_two)
}


def run_rank(names: str, out_file: Path) -> int:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")  # one for all checks: open_ranks joins it
    out: dict = {}
    try:
        for name in names.split(","):
            CHECKS[name](out)
    except UserError as error:
        if str(error):
            print(f"plinth: {error}", file=sys.stderr)
        return 1
    if os.environ["RANK"] == "0":
        out_file.write_text(json.dumps(out))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return 0


def fork_rank(rank: int, count: int, port: int, names: str, folder: Path) -> int:
    """Start a rank; return its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.dup2(os.open(folder / f"{names}.{rank}.err", os.O_WRONLY | os.O_CREAT), 2)
        code = run_rank(names, folder / f"{names}.json")
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def main(folder: Path, groups: list[str]) -> None:
    os.environ["SESSION_FOLDER"] = str(folder)
    for group in groups:
        count, names = group.split(":")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        pids = [fork_rank(rank, int(count), port, names, folder) for rank in range(int(count))]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
        (folder / f"{names}.codes.json").write_text(json.dumps(codes))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
