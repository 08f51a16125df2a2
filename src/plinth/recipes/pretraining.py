"""Pretraining: a decoder on token shards, next-token cross-entropy."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from plinth.config import UserError, from_dict, to_dict
from plinth.data.loader import Packing, TokenLoader
from plinth.data.shards import read_manifest
from plinth.models.config import DecoderConfig
from plinth.models.cost import train_flops_per_token
from plinth.models.hub import save_model
from plinth.models.meta import on_meta
from plinth.models.transformer import Transformer
from plinth.ops.roofline import matmul_rate
from plinth.run import Run
from plinth.scaling.plan_record import Plan, save_plan
from plinth.tokenizer.encode import Tokenizer
from plinth.training.device import choose_device
from plinth.training.loop import TrainConfig, train
from plinth.training.objectives import causal_lm_loss
from plinth.training.parallel import ParallelConfig, Ranks, open_ranks
from plinth.training.prefetch import prefetched
from plinth.training.schedule import BatchSchedule, Rows, Stage
from plinth.training.step import Batch
from plinth.training.transfer import Name, Parametrization, init_model, initial_weights, scales

if TYPE_CHECKING:
    from plinth.training.sharded_weights import ShardedWeights


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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """how processes that torchrun launches share the work; with --resume the new command's counts"""
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
    with open_ranks(config.parallel) as ranks, tempfile.TemporaryDirectory(prefix="plinth-rank-") as scratch:
        folders = [shards] if isinstance(shards, Path) else list(shards)
        tokenizer = Tokenizer.load(tokenizer_dir)
        check_shards(folders, tokenizer, tokenizer_dir)
        if ranks is None:
            run, config = _open_run(out, folders, tokenizer_dir, config, resume, device, argv, plan)
        else:
            here = replace(config, train=_one_process(config.train, ranks))
            opened = ranks.is_leader and _open_run(out, folders, tokenizer_dir, here, resume, str(ranks.device), argv, plan)
            run, config = _share_run(ranks, opened, Path(scratch))
            warn = warn if ranks.is_leader else lambda text: None
        if run.is_done:
            return Run(out)
        if config.model.vocab_size < tokenizer.vocab_size:
            raise UserError(f"model.vocab_size={config.model.vocab_size} is below the tokenizer's {tokenizer.vocab_size} entries.")
        summary, model = _train(run, open_loader(folders, config), config, ranks, resume, warn)
        if ranks is None or ranks.is_leader:
            save_model(model, tokenizer, run.model_dir)
            run.finish(summary)
        if ranks is not None:
            ranks.wait()
    return Run(out)


def _open_run(
    out: Path, folders: list[Path], tokenizer_dir: Path, config: PretrainConfig, resume: bool, device: str | None, argv, plan: Plan | None
) -> tuple[Run, PretrainConfig]:
    """Make the run directory, or open it to go on; return it with its resolved configuration."""
    if resume:
        run, parallel = Run.open(out), config.parallel
        if run.is_done:
            return run, config
        config = replace(read_config(out), parallel=parallel)
        if device not in (None, config.train.device):  # another roof
            config = replace(config, train=config.train.moved_to(device), matmul_flops_per_s=None)
        return run, with_roofline(config)
    config = replace(config, train=replace(config.train, device=device or config.train.device))
    optimizer = config.train.optimizer.resolved(config.model.hidden_size, max(stage.tokens_per_step for stage in config.schedule_stages()))
    config = with_roofline(replace(config, train=replace(config.train.resolved(500), optimizer=optimizer)))
    open_loader(folders, config)  # a mistake in the mixture is found before there is a run
    run = Run.create(out, "pretrain", to_dict(config), [*folders, tokenizer_dir], argv, config.train.seed)
    if plan is not None:
        save_plan(plan, run.path / "plan.json")
    return run, config


def _one_process(train: TrainConfig, ranks: Ranks) -> TrainConfig:
    """Return how one rank of several trains: in one thread, on its own device, uncompiled. Raises UserError for CUDA graphs."""
    if train.cuda_graphs:
        raise UserError(f"train.cuda_graphs=True works on one process, not on {ranks.world_size}. Leave it out.")
    return replace(train, device=str(ranks.device), num_threads=1, compile=False)


def _share_run(ranks: Ranks, opened: tuple[Run, PretrainConfig] | Literal[False], scratch: Path) -> tuple[Run, PretrainConfig]:
    """Return this rank's run directory and configuration: the leader's own, for the others a passing one and the leader's configuration."""
    told = ranks.tell(opened and (to_dict(opened[1]), opened[0].is_done))
    config = from_dict(PretrainConfig, told[0])
    here = _one_process(config.train, ranks)
    if opened:
        return opened[0], replace(config, train=here)
    run = Run.create(scratch / "run", "pretrain", told[0])
    if told[1]:
        run.finish({})
    return run, replace(config, train=replace(here, telemetry=replace(here.telemetry, trackers=())))


def _train(
    run: Run, loader: TokenLoader, config: PretrainConfig, ranks: Ranks | None, resume: bool, warn: Callable[[str], None]
) -> tuple[dict[str, Any], Transformer | None]:
    """Train; return the summary and the model, which only the leader of several ranks has whole."""
    generator = torch.Generator().manual_seed(config.train.seed)
    model: Any
    if ranks is None:
        model, masters, num_processes = init_model(config.model, config.transfer, generator), None, 1
    else:
        model, masters = spread_model(config, ranks, generator)
        num_processes = ranks.world_size
    schedule = BatchSchedule(config.schedule_stages(), config.train.steps or 1)

    def loader_steps(step: int) -> int:
        """Return how many of the loader's own steps have the tokens before a step."""
        return round(schedule.tokens(step) / (config.seq_len * config.sequences_per_step))

    for text in loader.warnings(loader_steps(config.train.steps or 1)):
        warn(text)
    device = choose_device(config.train.device)
    with prefetched(lambda step: scheduled_batches(loader, own_rows(schedule.rows(step), ranks), config), device) as batches_at:
        summary = train(
            run,
            model,
            causal_lm_loss,
            batches_at,
            config.train,
            description="pretraining",
            flops_per_token=config.mean_flops_per_token(),
            matmul_flops_per_s=config.matmul_flops_per_s and config.matmul_flops_per_s * num_processes,
            describe_batch=lambda step, rows=None: loader.describe_batch(step, rows, schedule.rows(step)),
            data_metrics=lambda steps: {"epochs": loader.epochs(loader_steps(steps))},
            scales=scales(meta_model(config), config.transfer, config.train.optimizer.name),
            masters=masters,
            data={**loader.fingerprint(), "stages": config.stages},
            resume=resume,
            warn=warn,
        )
    if ranks is not None:
        model = Transformer(config.transfer.apply(config.model)) if ranks.is_leader else None
        masters.gather_into(model)
    summary["epochs"] = loader.epochs(loader_steps(summary["steps"]))
    summary["padding"] = loader.padding()
    summary["data"] = [to_dict(account) for account in loader.accounts(loader_steps(summary["steps"]))]
    summary["num_params"] = sum(p.numel() for p in meta_model(config).parameters())
    return summary, model


def own_rows(rows: Rows, ranks: Ranks | None) -> Rows:
    """Return this rank's share of a step's rows: the shares of all ranks in order are the step's rows, whatever their number."""
    if ranks is None:
        return rows
    first, count = ranks.share_rows(rows.num_rows)
    return rows._replace(first=rows.first + first, num_rows=count)


def meta_model(config: PretrainConfig) -> Transformer:
    """Return the decoder's shape without memory for its weights."""
    return on_meta(lambda: Transformer(config.transfer.apply(config.model)))


def spread_model(config: PretrainConfig, ranks: Ranks, generator: torch.Generator) -> tuple[nn.Module, ShardedWeights]:
    """Make the decoder with its initial weights spread over the ranks: the same weights as on one process."""
    from plinth.training.sharded_weights import ShardedWeights  # torch.distributed.tensor takes half a second to import
    from plinth.training.sharding import shard_model

    assert config.train.dtype is not None, "takes a resolved configuration"
    weights = initial_weights(meta_model(config), config.transfer, generator)
    model = shard_model(meta_model(config), ranks, config.train.dtype, weights)
    return model, ShardedWeights(model, config.train.dtype, ranks)


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
