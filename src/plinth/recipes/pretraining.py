"""Pretraining: a decoder on token shards, next-token cross-entropy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from plinth.config import UserError, from_dict, to_dict
from plinth.data.loader import Packing, TokenLoader
from plinth.data.shards import read_manifest
from plinth.models.config import DecoderConfig
from plinth.models.cost import train_flops_per_token
from plinth.models.hub import save_model
from plinth.ops.roofline import matmul_rate
from plinth.run import Run
from plinth.scaling.plan_record import Plan, save_plan
from plinth.tokenizer.encode import Tokenizer
from plinth.training.device import choose_device
from plinth.training.loop import TrainConfig, train
from plinth.training.objectives import causal_lm_loss
from plinth.training.prefetch import prefetched
from plinth.training.schedule import BatchSchedule, Rows, Stage
from plinth.training.step import Batch
from plinth.training.transfer import Name, Parametrization, init_model, scales


@dataclass(frozen=True)
class PretrainConfig:
    """A decoder, its batches and its schedule."""

    model: DecoderConfig = field(default_factory=DecoderConfig)
    """shape of the decoder"""
    train: TrainConfig = field(default_factory=lambda: TrainConfig(steps=500))
    """length, optimizer and schedule"""
    seq_len: int = 256
    """tokens a sequence"""
    sequences_per_step: int = 32
    """sequences an update"""
    micro_batch_size: int = 16
    """sequences a forward pass"""
    shard_weights: tuple[float, ...] | None = None
    """share of the rows for each shards folder, in their order (default: by their tokens)"""
    stages: tuple[tuple[float, int, int], ...] | None = None
    """stretches of training, each a share of the tokens, seq_len and sequences_per_step, in order (default: one)"""
    kind_weights: dict[str, float] | None = None
    """share of the rows for each kind of document, within each folder (default: as the corpus has them)"""
    packing: Packing = "stream"
    """rows from documents end to end (stream), or whole documents wherever they fit (best_fit)"""
    mask_documents: bool = False
    """attention keeps to its document, and positions restart in it"""
    parametrization: Name = "standard"
    """how rates and initial weights depend on the shape; mup and completep take rates tuned at a base width (and depth)"""
    base_width: int | None = None
    """hidden_size of the model whose rates were tuned (mup, completep)"""
    base_depth: int | None = None
    """num_layers of the model whose rates were tuned (completep)"""
    base_head_dim: int | None = None
    """head_dim of the model whose rates were tuned (default: this model's)"""
    matmul_flops_per_s: float | None = None
    """measured matrix-product rate that MFU refers to, FLOP/s (default: measured at the start)"""

    @property
    def transfer(self) -> Parametrization:
        return Parametrization(self.parametrization, self.base_width, self.base_depth, self.base_head_dim)

    def __post_init__(self) -> None:
        self.transfer.apply(self.model)
        if self.seq_len > self.model.max_seq_len:
            raise UserError(f"seq_len={self.seq_len} exceeds max_seq_len={self.model.max_seq_len}. Lower it, or raise model.max-seq-len.")
        if self.sequences_per_step < 1 or self.micro_batch_size < 1:
            raise UserError("sequences_per_step and micro_batch_size must be at least 1.")
        for stage in self.schedule_stages():
            if stage.seq_len > self.seq_len:
                raise UserError(f"a stage's seq_len={stage.seq_len} exceeds seq_len={self.seq_len}, the longest. Raise seq_len.")

    def schedule_stages(self) -> list[Stage]:
        return [Stage(*stage) for stage in self.stages or ((1.0, self.seq_len, self.sequences_per_step),)]

    def mean_flops_per_token(self) -> float:
        """Return the operations of a training step a token, averaged over the stages."""
        stages = self.schedule_stages()
        weighted = [stage.share * train_flops_per_token(self.model, stage.seq_len) for stage in stages]
        return sum(weighted) / sum(stage.share for stage in stages)


def pretrain(
    out: Path,
    shards: Path | Sequence[Path],
    tokenizer_dir: Path,
    config: PretrainConfig,
    *,
    resume: bool = False,
    device: str | None = None,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda text: None,
    plan: Plan | None = None,
) -> Run:
    """Train a decoder on one or more shards folders and publish it as out/model; returns the finished run.

    `plan` is what the configuration came from, if it came from one; it is kept in the run as plan.json.
    With `resume` the configuration saved in the run counts. `device` takes the place of train.device, with `resume` too:
    a run may go on where another kind of machine stopped. Raises UserError when the shards were packed with another tokenizer, or
    are others than the run began with.
    """
    folders = [shards] if isinstance(shards, Path) else list(shards)
    tokenizer = Tokenizer.load(tokenizer_dir)
    check_shards(folders, tokenizer, tokenizer_dir)
    if resume:
        run = Run.open(out)
        if run.is_done:
            return run
        config = read_config(out)
        if device not in (None, config.train.device):  # another roof
            config = replace(config, train=config.train.moved_to(device), matmul_flops_per_s=None)
        config = with_roofline(config)
        loader = open_loader(folders, config)
    else:
        config = replace(config, train=replace(config.train, device=device or config.train.device))
        stages = config.schedule_stages()
        optimizer = config.train.optimizer.resolved(config.model.hidden_size, max(stage.tokens_per_step for stage in stages))
        config = with_roofline(replace(config, train=replace(config.train.resolved(500), optimizer=optimizer)))
        loader = open_loader(folders, config)  # a mistake in the mixture is found before there is a run
        run = Run.create(out, "pretrain", to_dict(config), [*folders, tokenizer_dir], argv, config.train.seed)
        if plan is not None:
            save_plan(plan, run.path / "plan.json")
    if config.model.vocab_size < tokenizer.vocab_size:
        raise UserError(f"model.vocab_size={config.model.vocab_size} is below the tokenizer's {tokenizer.vocab_size} entries.")
    model = init_model(config.model, config.transfer, torch.Generator().manual_seed(config.train.seed))
    schedule = BatchSchedule(config.schedule_stages(), config.train.steps or 1)

    def loader_steps(step: int) -> int:
        """Return how many of the loader's own steps have the tokens before a step."""
        return round(schedule.tokens(step) / (config.seq_len * config.sequences_per_step))

    for text in loader.warnings(loader_steps(config.train.steps or 1)):
        warn(text)
    device = choose_device(config.train.device)
    with prefetched(lambda step: scheduled_batches(loader, schedule.rows(step), config), device) as batches_at:
        summary = train(
            run,
            model,
            causal_lm_loss,
            batches_at,
            config.train,
            description="pretraining",
            flops_per_token=config.mean_flops_per_token(),
            matmul_flops_per_s=config.matmul_flops_per_s,
            describe_batch=lambda step, rows=None: loader.describe_batch(step, rows, schedule.rows(step)),
            data_metrics=lambda steps: {"epochs": loader.epochs(loader_steps(steps))},
            scales=scales(model, config.transfer, config.train.optimizer.name),
            data={**loader.fingerprint(), "stages": config.stages},
            resume=resume,
            warn=warn,
        )
    save_model(model, tokenizer, run.model_dir)
    summary["epochs"] = loader.epochs(loader_steps(summary["steps"]))
    summary["padding"] = loader.padding()
    summary["data"] = [to_dict(account) for account in loader.accounts(loader_steps(summary["steps"]))]
    summary["num_params"] = sum(p.numel() for p in model.parameters())
    run.finish(summary)
    return run


def with_roofline(config: PretrainConfig) -> PretrainConfig:
    """Measure the matrix-product rate that MFU refers to, unless it is given; takes half a second."""
    if config.matmul_flops_per_s is not None:
        return config
    train = config.train
    assert train.dtype is not None, "takes a resolved configuration"
    rate = matmul_rate(train.dtype, device=choose_device(train.device), num_threads=train.num_threads)
    return replace(config, matmul_flops_per_s=rate)


def read_config(run: Path) -> PretrainConfig:
    """Return the configuration that a pretraining run was begun with."""
    return from_dict(PretrainConfig, Run.open(run).config, f"{run}/config.json: ")


def open_loader(shards: Path | Sequence[Path], config: PretrainConfig) -> TokenLoader:
    """Return the loader that a configuration asks for."""
    return TokenLoader(
        shards,
        config.seq_len,
        config.sequences_per_step,
        config.train.seed,
        kind_weights=config.kind_weights,
        shard_weights=config.shard_weights,
        packing=config.packing,
        mask_documents=config.mask_documents,
    )


def show_batch(shards: Sequence[Path], tokenizer_dir: Path, config: PretrainConfig, step: int) -> str:
    """Return the text of update `step`, counted from 1 as in metrics.jsonl: of each row its documents, and what it predicts of each."""
    if step < 1:
        raise UserError(f"step={step} must be at least 1, the first update.")
    tokenizer = Tokenizer.load(tokenizer_dir)
    check_shards(shards, tokenizer, tokenizer_dir)
    loader = open_loader(shards, config)
    place = BatchSchedule(config.schedule_stages(), config.train.steps or step).rows(step - 1)
    targets_BT = loader.rows(*place)[1].numpy()
    lines = []
    for number, (row, pieces) in enumerate(zip(targets_BT, loader.documents(step - 1, place))):
        lines.append(f"--- row {number}")
        begin = 0
        for piece in pieces:
            lines.append(f"[{piece.name}]")
            lines.append(tokenizer.decode(row[begin : begin + piece.length].tolist()))
            begin += piece.length
        if begin < len(row):
            lines.append(f"[{len(row) - begin} positions of padding]")
    return "\n".join(lines)


def check_shards(folders: Sequence[Path], tokenizer: Tokenizer, tokenizer_dir: Path) -> None:
    """Raise UserError unless all the shards were packed with this tokenizer."""
    for shards in folders:
        packed = read_manifest(shards)["tokenizer_sha256"]
        if packed != tokenizer.sha256:
            raise UserError(
                f"tokenizer {tokenizer.sha256[:8]} of {tokenizer_dir} differs from {packed[:8]} that packed {shards}. "
                f"Re-pack with `plinth data pack --tokenizer {tokenizer_dir}`."
            )


def scheduled_batches(loader: TokenLoader, rows: Rows, config: PretrainConfig) -> Sequence[Batch]:
    """Return a step's rows in micro-batches; shorter rows go more at a time, the same tokens a forward pass."""
    return split_rows(loader.rows(*rows), max(1, config.micro_batch_size * config.seq_len // rows.seq_len))


def split_rows(batch: tuple[torch.Tensor, ...], rows: int) -> Sequence[Batch]:
    """Cut a batch into micro-batches of at most `rows` sequences."""
    return list(zip(*(tensor.split(rows) for tensor in batch)))
