"""Training runs that others measured and published: the yardstick of the cluster model.

Every row was read at its source. What a source does not say and the prediction needs is in `assumed`. Rows with `calibration` set the
fitted constants (`StepConstants.contention`, and the accelerators' `sustained_share`); all others are predicted with those.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from plinth.scaling.accelerators import Accelerator, find_accelerator
from plinth.scaling.cluster_config import Layout
from plinth.scaling.cluster_memory import GpuMemory, gpu_memory
from plinth.scaling.cluster_time import CONSTANTS, StepConstants, StepTime, step_time
from plinth.scaling.known_models import ModelShape, find_model

MPT = "llm-foundry, scripts/train/benchmarking/README.md, tables of H100 80GB BF16 and of A100 80GB and 40GB"
TITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md"
LLAMA = "Llama 3, arXiv:2407.21783v3, table 4"
OLMO = "OLMo-core, README.md of spring 2025, table of throughput (OLMo-1124 architecture)"
NEMO = "NeMo, docs/source/performance/performance_summary.md, container 24.07"
BRIDGE = "Megatron-Bridge, docs/performance-summary.md, container 25.11"
OLMO_ASSUMED = "64 GPUs in 8 copies (the script: HSDP, a node each); full logits"
MEGATRON_ASSUMED = "optimizer state sharded, nothing recomputed"
GIB = 2**30


@dataclass(frozen=True)
class PublishedRun:
    """One row of somebody's table and the layout that it was measured with."""

    name: str
    """model, accelerators, context"""
    source: str
    """where it stands"""
    model: str
    """name in `known_models.py`"""
    gpu: str
    """name in `accelerators.py`"""
    layout: Layout
    """how it was laid over the accelerators"""
    seq_len: int
    """context, tokens"""
    micro_batches: int
    """micro-batches a step and data-parallel rank"""
    tokens_per_s: float | None = None
    """published tokens/s of one accelerator"""
    flops_per_s: float | None = None
    """published model FLOP/s of one accelerator"""
    memory_bytes: float | None = None
    """published peak memory of one accelerator"""
    dtype: str = "bf16"
    """type of the blocks' products"""
    assumed: str = ""
    """what the source leaves open"""
    calibration: bool = False
    """whether the fitted constants saw this row"""

    @property
    def shape(self) -> ModelShape:
        """The model, with as many positions as the run had where they are learnt."""
        shape = find_model(self.model)
        return replace(shape, decoder=replace(shape.decoder, max_seq_len=max(self.seq_len, shape.decoder.max_seq_len)))

    @property
    def published_tokens_per_s(self) -> float:
        """Published tokens/s of one accelerator, worked out from FLOP/s (causal attention) where only those are given."""
        if self.tokens_per_s is not None:
            return self.tokens_per_s
        assert self.flops_per_s is not None
        return self.flops_per_s / self.shape.train_flops_per_token(self.seq_len)

    def predict(self, constants: StepConstants = CONSTANTS, gpu: Accelerator | None = None) -> tuple[float, StepTime, GpuMemory]:
        """Return (tokens/s of one accelerator, step, memory) as predicted; memory without margin, as allocators report it."""
        gpu = gpu or find_accelerator(self.gpu)
        step = step_time(self.shape, self.layout, gpu, self.seq_len, self.micro_batches, dtype=self.dtype, constants=constants)
        memory = gpu_memory(self.shape, self.layout, self.seq_len, self.micro_batches, chunked_loss=False)
        tokens = self.micro_batches * self.layout.micro_batch_size * self.seq_len * self.layout.data
        return tokens / step.total_s / self.layout.gpus, step, memory

    def mfu(self, tokens_per_s: float) -> float:
        """Return the model FLOPs utilisation of so many tokens/s of one accelerator; attention counted in full, as PaLM does."""
        return tokens_per_s * self.shape.train_flops_per_token(self.seq_len, causal=False) / find_accelerator(self.gpu).peak_bf16


def _mpt(
    size: str, gpu: str, gpus: int, seq_len: int, micro_batch: int, accumulate: int, recompute: bool, tokens_per_s: float, *,
    calibration: bool = False,
) -> PublishedRun:  # fmt: skip
    layout = Layout(shard=gpus, micro_batch_size=micro_batch, checkpointing="block" if recompute else "none")
    name = f"MPT {size}, {gpus} {gpu}, {seq_len}"
    return PublishedRun(name, MPT, f"mpt-{size}", gpu, layout, seq_len, accumulate, tokens_per_s, calibration=calibration)


def _titan(
    name: str, model: str, layout: Layout, micro_batches: int, tokens_per_s: float, gib: float, dtype: str, assumed: str = ""
) -> PublishedRun:
    name = f"torchtitan {name}, {layout.gpus} h100, {dtype}"
    assumed = "; ".join(filter(None, ["context 8192, as its configurations", assumed]))
    return PublishedRun(name, TITAN, model, "h100-sxm-500w", layout, 8192, micro_batches, tokens_per_s, None, gib * GIB, dtype, assumed)


def _llama(data: int, context: int, seq_len: int, micro_batches: int, tflops: float) -> PublishedRun:
    layout = Layout(shard=data, tensor=8, pipeline=16, context=context, reshard=False, reduce_each=False, virtual_stages=8)
    name = f"Llama 3 405B, {layout.gpus} h100, {seq_len}"
    assumed = "a layer a virtual stage; gradients reduced once a step; its FLOP/s count causal attention"
    return PublishedRun(name, LLAMA, "llama-3-405b", "h100-sxm", layout, seq_len, micro_batches, None, tflops * 1e12, assumed=assumed)


def _olmo(name: str, model: str, layout: Layout, tokens_per_s: float, assumed: str = OLMO_ASSUMED) -> PublishedRun:
    micro_batches = 2048 // (layout.data * layout.micro_batch_size)
    return PublishedRun(
        f"OLMo-core {name}, h100, 4096", OLMO, model, "h100-sxm", layout, 4096, micro_batches, tokens_per_s, assumed=assumed
    )


def _megatron(
    source: str, name: str, model: str, gpu: str, layout: Layout, seq_len: int, micro_batches: int, tokens_per_s: float
) -> PublishedRun:
    layout = replace(layout, reshard=False, reduce_each=False)
    name = f"Megatron {name}, {layout.gpus} {gpu}, {seq_len}, fp8"
    return PublishedRun(name, source, model, gpu, layout, seq_len, micro_batches, tokens_per_s, dtype="fp8", assumed=MEGATRON_ASSUMED)


_PIPELINE = "as many micro-batches as stages, its default"
_TWO_CHUNKS = f"{_PIPELINE}; two chunks a rank"
_TITAN_8B = Layout(micro_batch_size=2, checkpointing="alternate")
_TITAN_70B = Layout(shard=32, tensor=8, micro_batch_size=16, checkpointing="block")
_TITAN_405B = Layout(
    shard=8, tensor=8, pipeline=8, micro_batch_size=4, checkpointing="block", overlap_tensor=True, reshard=False, reduce_each=False
)

PUBLISHED_RUNS: tuple[PublishedRun, ...] = (
    _mpt("7b", "h100-sxm", 8, 2048, 6, 1, False, 10643, calibration=True),
    _mpt("13b", "h100-sxm", 64, 2048, 2, 1, False, 4800, calibration=True),
    _mpt("70b", "h100-sxm", 64, 2048, 8, 4, True, 1039, calibration=True),
    _mpt("7b", "a100-sxm", 8, 2048, 6, 2, False, 4641, calibration=True),
    _mpt("70b", "a100-sxm", 64, 2048, 8, 4, True, 410, calibration=True),
    _llama(64, 1, 8192, 32, 430),
    _llama(128, 1, 8192, 16, 400),
    _llama(8, 16, 131072, 16, 380),
    _titan("8B", "llama-3-8b", replace(_TITAN_8B, shard=8), 1, 6667, 77.0, "bf16"),
    _titan("8B", "llama-3-8b", replace(_TITAN_8B, shard=128), 1, 6514, 62.0, "bf16"),
    _titan("8B", "llama-3-8b", replace(_TITAN_8B, shard=8), 1, 8532, 76.8, "fp8"),
    _titan("8B", "llama-3-8b", replace(_TITAN_8B, shard=128), 1, 8380, 61.8, "fp8"),
    _titan("70B 2D", "llama-3-70b", _TITAN_70B, 1, 829, 71.9, "fp8"),
    _titan("70B 2D async", "llama-3-70b", replace(_TITAN_70B, overlap_tensor=True), 1, 876, 67.6, "fp8"),
    _titan("405B 1F1B", "llama-3-405b", _TITAN_405B, 8, 100, 82.5, "fp8", _PIPELINE),
    _titan("405B interleaved", "llama-3-405b", replace(_TITAN_405B, virtual_stages=2), 8, 128, 72.7, "fp8", _TWO_CHUNKS),
    _olmo("7B", "olmo-2-7b", Layout(replicate=8, shard=8, micro_batch_size=2), 10_000),
    _olmo("13B", "olmo-2-13b", Layout(replicate=8, shard=8), 4_600),
    _olmo("32B", "olmo-2-32b", Layout(replicate=32, shard=16, checkpointing="block"), 1_500,
          "512 GPUs in 32 copies, full checkpointing, as its script; full logits"),
    _olmo("Llama 8B", "llama-3-8b", Layout(replicate=8, shard=8, micro_batch_size=2), 9_500),
    _mpt("3b", "h100-sxm", 16, 2048, 10, 3, False, 24142),
    _mpt("3b", "h100-sxm", 64, 2048, 6, 3, False, 22525),
    _mpt("13b", "h100-sxm", 8, 2048, 2, 1, False, 4792),
    _mpt("30b", "h100-sxm", 8, 2048, 3, 21, True, 2002),
    _mpt("30b", "h100-sxm", 32, 2048, 14, 3, True, 2308),
    _mpt("70b", "h100-sxm", 32, 2048, 2, 16, True, 882),
    _mpt("7b", "h100-sxm", 8, 32768, 2, 2, True, 3318),
    _mpt("3b", "a100-sxm", 8, 2048, 10, 2, False, 10811),
    _mpt("13b", "a100-sxm", 8, 2048, 2, 3, False, 2262),
    _mpt("30b", "a100-sxm", 8, 2048, 3, 21, True, 916),
    _mpt("7b", "a100-sxm", 8, 32768, 2, 2, True, 1672),
    _mpt("70b", "a100-sxm-40gb", 128, 2048, 4, 1, True, 376),
    _megatron(NEMO, "Llama 2 7B", "llama-2-7b", "h100-sxm", Layout(shard=8), 4096, 16, 16847),
    _megatron(NEMO, "Llama 2 70B", "llama-2-70b", "h100-sxm", Layout(shard=4, tensor=4, pipeline=4, virtual_stages=20), 4096, 32, 1707),
    _megatron(NEMO, "Llama 3 8B", "llama-3-8b", "h100-sxm", Layout(shard=4, context=2), 8192, 32, 12036),
    _megatron(NEMO, "Llama 3 70B", "llama-3-70b", "h100-sxm", Layout(shard=2, tensor=4, pipeline=4, context=2, virtual_stages=5),
              8192, 64, 1533),
    _megatron(BRIDGE, "Llama 3 70B", "llama-3-70b", "h100-sxm", Layout(shard=2, tensor=4, pipeline=8, virtual_stages=5), 8192, 64, 1602),
    _megatron(BRIDGE, "Llama 3.1 405B", "llama-3-405b", "h100-sxm", Layout(shard=8, tensor=8, pipeline=8, context=2, virtual_stages=8),
              8192, 64, 292),
    _megatron(BRIDGE, "Llama 3 8B", "llama-3-8b", "b200-sxm", Layout(shard=8, micro_batch_size=2), 8192, 8, 30624),
)  # fmt: skip


def fit_constants() -> tuple[float, float, float]:
    """Return (contention, Hopper's share, Ampere's share) that least squares of log speed find on the calibration rows, on a grid."""
    rows = [run for run in PUBLISHED_RUNS if run.calibration]
    hopper = [run for run in rows if run.gpu.startswith("h100")]
    ampere = [run for run in rows if run.gpu.startswith("a100")]
    shares = [i / 100 for i in range(55, 101)]

    def misfit(runs: list[PublishedRun], contention: float, share: float) -> float:
        constants = replace(CONSTANTS, contention=contention)
        speeds = [run.predict(constants, replace(find_accelerator(run.gpu), sustained_share=share))[0] for run in runs]
        return sum(math.log(speed / run.published_tokens_per_s) ** 2 for speed, run in zip(speeds, runs))

    def best(runs: list[PublishedRun], contention: float) -> tuple[float, float]:
        return min((misfit(runs, contention, share), share) for share in shares)

    fits = [(best(hopper, i / 10), best(ampere, i / 10), i / 10) for i in range(11)]
    (_, hopper_share), (_, ampere_share), contention = min(fits, key=lambda fit: fit[0][0] + fit[1][0])
    return contention, hopper_share, ampere_share
