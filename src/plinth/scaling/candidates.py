"""The runs that a plan chooses among: shapes, vocabularies, batches, each with its predicted loss."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from plinth.config import UserError
from plinth.models import cost
from plinth.models.config import DecoderConfig
from plinth.ops.kernels import library
from plinth.scaling.corpus import CorpusStats
from plinth.scaling.laws import STEP_LAW, ChinchillaLaw, data_constrained_bits_per_byte
from plinth.scaling.plan_config import PlanConfig
from plinth.scaling.probe import Probe
from plinth.scaling.timing import body_params, step_cost

WIDTHS = (64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512, 640, 768, 896, 1024, 1280, 1536)
VOCAB_SIZES = (1024, 1536, 2048, 3072, 4096, 6144, 8192)
MIN_ASPECT, MAX_ASPECT = 20, 48  # width / layers; deeper trains slowly, shallower learns worse at the same parameters
MIN_LAYERS = 2
SMALL_HEAD_WIDTH = 256  # up to here heads of 32, so that there are several
GROUPED_WIDTH = 768  # from here two query heads share a key and value head
SEQUENCE_GROUP = 4
MIN_SEQUENCES = 8
PREFERRED_STEPS = 1000
MUON_STEPS = 400  # fewer updates than this are not worth a batch large enough for Muon
PROCESS_BYTES = 400_000_000  # the interpreter with PyTorch loaded, before any tensor


@dataclass(frozen=True)
class Candidate:
    """One run that fits the budget."""

    config: DecoderConfig
    """the model"""
    seq_len: int
    """tokens a sequence"""
    tokens_per_step: int
    """tokens an update"""
    micro_batch_size: int
    """sequences a forward pass"""
    optimizer: str
    """adamw or muon"""
    steps: int
    """updates within the budget"""
    step_s: float
    """predicted seconds an update"""
    memory_bytes: int
    """predicted peak memory of training, bytes"""
    bpb: float
    """predicted bits per byte"""

    @property
    def tokens(self) -> int:
        """Tokens of the whole run."""
        return self.steps * self.tokens_per_step

    @property
    def seconds(self) -> float:
        """Predicted time of the whole run."""
        return self.steps * self.step_s

    @property
    def flops(self) -> float:
        """Training FLOPs of the whole run."""
        return step_cost(self.config, self.tokens_per_step, self.seq_len, self.optimizer).flops * self.steps


@dataclass(frozen=True)
class Allowance:
    """What pretraining may spend; None where there is no limit."""

    seconds: float | None
    """seconds"""
    flops: float | None
    """FLOPs"""
    tokens: float | None
    """tokens"""

    def steps(self, step_s: float, step_flops: float, tokens_per_step: int) -> int:
        """Return how many such steps fit."""
        limits = []
        if self.seconds is not None:
            limits.append(self.seconds / step_s)
        if self.flops is not None:
            limits.append(self.flops / step_flops)
        if self.tokens is not None:
            limits.append(self.tokens / tokens_per_step)
        return int(min(limits))


def shapes(options: PlanConfig) -> Iterator[tuple[int, int]]:
    """Yield (num_layers, hidden_size) from some 0.1 M to some hundred M parameters, or only those that were asked for."""
    widths = WIDTHS if options.hidden_size is None else (options.hidden_size,)
    for width in widths:
        if options.num_layers is not None:
            yield options.num_layers, width
            continue
        low = max(MIN_LAYERS, math.ceil(width / MAX_ASPECT))
        for layers in range(low, max(low, width // MIN_ASPECT) + 1):
            if layers <= 8 or layers % 4 == 0:  # beyond eight, every depth would only lengthen the table
                yield layers, width


def decoder_config(num_layers: int, hidden_size: int, vocab_size: int, max_seq_len: int, tie: bool | None) -> DecoderConfig:
    """Return the decoder of a shape: heads of 32 or 64, SwiGLU of 8/3 the width, embeddings tied where they would dominate.

    Raises UserError when the width is not a multiple of 32.
    """
    if hidden_size % 32:
        down = max(32, hidden_size // 32 * 32)
        raise UserError(f"hidden_size={hidden_size} is not a multiple of 32, the smallest head. Use {down} or {down + 32}.")
    head_dim = 32 if hidden_size <= SMALL_HEAD_WIDTH or hidden_size % 64 else 64
    heads = hidden_size // head_dim
    intermediate = math.ceil(hidden_size * 8 / 3 / 64) * 64
    blocks = num_layers * (4 * hidden_size**2 + 3 * hidden_size * intermediate)
    return DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=heads,
        num_kv_heads=heads // 2 if hidden_size >= GROUPED_WIDTH and heads % 2 == 0 else heads,
        head_dim=head_dim,
        intermediate_size=intermediate,
        max_seq_len=max_seq_len,
        tie_embeddings=vocab_size * hidden_size > 0.2 * blocks if tie is None else tie,
    )


def choose_seq_len(params: int) -> int:
    """Return the context for a model of `params` parameters in its blocks: longer as models can make use of it."""
    return 256 if params < 20_000_000 else 512 if params < 100_000_000 else 1024


def enumerate_candidates(
    allowance: Allowance, corpus: CorpusStats, probe: Probe, law: ChinchillaLaw, memory_bytes: int, options: PlanConfig
) -> list[Candidate]:
    """Return the best run of every shape and vocabulary that fits budget and memory, by rising predicted loss."""
    found = []
    for config, seq_len in configs(corpus, options):
        candidate = fit_run(config, seq_len, allowance, corpus, probe, law, memory_bytes, options)
        if candidate is not None:
            found.append(candidate)
    return sorted(found, key=lambda candidate: (round(candidate.bpb, 4), candidate.seconds))


def configs(corpus: CorpusStats, options: PlanConfig) -> Iterator[tuple[DecoderConfig, int]]:
    """Yield (model, seq_len) to compare: every shape with every vocabulary that the text can fill.

    A model is built for twice the training context: chats may be longer than a row, and rotary positions cost nothing.
    """
    largest = corpus.vocabularies[-1].vocab_size
    sizes = [size for size in VOCAB_SIZES if size <= largest] or [largest]
    for vocab_size in sizes if options.vocab_size is None else [options.vocab_size]:
        for layers, width in shapes(options):
            config = decoder_config(layers, width, vocab_size, 256, options.tie_embeddings)
            if body_params(config) < (options.min_body_params or 0):
                continue
            seq_len = options.seq_len or choose_seq_len(body_params(config))
            yield replace(config, max_seq_len=2 * seq_len), seq_len


def fit_run(
    config: DecoderConfig,
    seq_len: int,
    allowance: Allowance,
    corpus: CorpusStats,
    probe: Probe,
    law: ChinchillaLaw,
    memory_bytes: int,
    options: PlanConfig,
) -> Candidate | None:
    """Return the run of one model that spends the allowance, or None when it leaves too few steps or too little memory."""
    bytes_per_token = corpus.bytes_per_token(config.vocab_size)
    most_tokens = options.max_epochs * corpus.text_bytes / bytes_per_token
    tokens_per_step = options.tokens_per_step or MIN_SEQUENCES * seq_len
    for _ in range(4):  # the batch depends on the run's length and the length on the batch: two or three rounds settle it
        optimizer = choose_optimizer(config, tokens_per_step, options)
        work = step_cost(config, tokens_per_step, seq_len, optimizer)
        step_s = probe.time_model.step_s(work)
        steps = min(allowance.steps(step_s, work.flops, tokens_per_step), int(most_tokens / tokens_per_step))
        batch = (optimizer, tokens_per_step, step_s, steps)
        tokens_per_step = options.tokens_per_step or choose_tokens_per_step(steps * tokens_per_step, seq_len, config.hidden_size, options)
        if tokens_per_step == batch[1]:
            break
    optimizer, tokens_per_step, step_s, steps = batch
    if steps < options.min_steps:
        return None
    micro_batch_size, needed = choose_micro_batch(config, tokens_per_step, seq_len, optimizer, probe, memory_bytes)
    if micro_batch_size is None:
        return None
    bpb = predict_bpb(law, config, optimizer, corpus, steps * tokens_per_step * bytes_per_token, options)
    return Candidate(config, seq_len, tokens_per_step, micro_batch_size, optimizer, steps, step_s, needed, bpb)


def predict_bpb(
    law: ChinchillaLaw,
    config: DecoderConfig,
    optimizer: str,
    corpus: CorpusStats,
    text_bytes: float,
    options: PlanConfig,
    *,
    limit_params: bool = False,
) -> float:
    """Return the bits per byte that a law predicts after `text_bytes` of training, repeats included.

    The law's N is the parameters of the blocks: a larger vocabulary must pay for its head in bytes a token. Where run
    and law differ in optimizer, a token under Muon counts as `muon_gain` tokens under AdamW.
    """
    gain = options.muon_gain ** ((optimizer == "muon") - (law.optimizer == "muon"))
    return data_constrained_bits_per_byte(law, body_params(config), corpus.text_bytes, text_bytes, gain=gain, limit_params=limit_params)


def choose_tokens_per_step(tokens: float, seq_len: int, hidden_size: int, options: PlanConfig) -> int:
    """Return the batch of a run of `tokens` tokens: Step Law's, less where that would leave fewer than a thousand updates.

    A batch somewhat too small for Muon is raised until Muon is cheap, if that leaves enough updates.
    """
    wanted = min(STEP_LAW.tokens_per_step(max(tokens, 1.0)), tokens / PREFERRED_STEPS)
    if options.optimizer is None:
        for_muon = cost.least_tokens_for_muon(hidden_size)
        if wanted < for_muon <= tokens / MUON_STEPS:
            wanted = math.ceil(for_muon / seq_len / SEQUENCE_GROUP) * SEQUENCE_GROUP * seq_len
    sequences = max(MIN_SEQUENCES, round(wanted / seq_len / SEQUENCE_GROUP) * SEQUENCE_GROUP)
    return sequences * seq_len


def choose_optimizer(config: DecoderConfig, tokens_per_step: int, options: PlanConfig) -> str:
    """Return the named optimizer, or the one that `plinth pretrain` takes where none is named."""
    return options.optimizer or cost.optimizer_by_cost(config.hidden_size, tokens_per_step)


def choose_micro_batch(
    config: DecoderConfig, tokens_per_step: int, seq_len: int, optimizer: str, probe: Probe, memory_bytes: int
) -> tuple[int | None, int]:
    """Return the sequences a forward pass, and the bytes that a step then needs.

    Every core works on its own part of the step, so on a CPU the step is split in at least as many parts as there are cores,
    and further until it fits in memory. None when even single sequences do not fit.
    """
    sequences = tokens_per_step // seq_len
    needed = 0
    for micro_batch_size in range(max(1, sequences // probe.workers), 0, -1):
        if sequences % micro_batch_size:
            continue
        workers = min(probe.workers, sequences // micro_batch_size)
        needed = training_memory_bytes(config, micro_batch_size, seq_len, optimizer, probe.dtype, workers)
        if needed <= memory_bytes:
            return micro_batch_size, needed
    return None, needed


def training_memory_bytes(config: DecoderConfig, micro_batch_size: int, seq_len: int, optimizer: str, dtype: str, workers: int) -> int:
    """Return the bytes of a training step: one set of weights and optimizer state, activations and gradients for each worker."""
    compute_bytes = 2 if dtype == "bfloat16" else 4
    memory = cost.train_memory_bytes(
        config, micro_batch_size, seq_len, compute_bytes=compute_bytes, muon=optimizer == "muon",
        own_kernels=dtype == "bfloat16" and library() is not None,
    )  # fmt: skip
    summed_gradients = 4 * cost.count_params(config)["total"]
    each = summed_gradients + memory.gradients + memory.activations + memory.head
    return PROCESS_BYTES + memory.weights + memory.optimizer + workers * each
