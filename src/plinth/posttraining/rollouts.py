"""Completions sampled by our engine from the weights that are being trained, with their log-probabilities as sampled.

Engine and trainer read the same weights with the same arithmetic: in float32 the two log-probabilities of a token differ by less than
1e-5. In bf16, and at a temperature other than 1, the trainer's own are taken instead, so that the first ratio of policy to sampler is 1.
A group's prompt is read once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from plinth.config import UserError
from plinth.inference.engine import Engine
from plinth.inference.native_runner import NativeRunner, why_not_native
from plinth.inference.sampling_params import SamplingParams
from plinth.inference.torch_runner import TorchRunner
from plinth.models.transformer import Transformer
from plinth.posttraining.completion_scores import completion_log_probs
from plinth.posttraining.rollout_config import SampleConfig
from plinth.training.device import move_batch
from plinth.training.step import InlineWorker, Workers, start_workers

Rows = dict[str, torch.Tensor]
SCORED_ROWS = 64


@dataclass(frozen=True)
class Rollouts:
    """Completions of prompts, `group_size` of each one after the other."""

    prompts: list[list[int]]
    """token ids of each prompt"""
    group_size: int
    """completions a prompt"""
    completions: list[list[int]]
    """token ids of each completion, with the token that ended it; completion i belongs to prompt i // group_size"""
    log_probs: list[list[float]]
    """log-probability in nats of each token, under the distribution that it was sampled from"""
    finished: list[bool]
    """whether the model ended it; else it was cut off at max_tokens"""
    engine_gap: float = 0.0
    """largest difference in nats between the engine's and the trainer's log-probability of a token, 0 where they were not compared"""
    engine_log_probs: list[list[float]] | None = None
    """the engine's own, where `log_probs` are the trainer's and both are at temperature 1"""

    def __len__(self) -> int:
        return len(self.completions)

    def prompt_of(self, i: int) -> list[int]:
        """Return the prompt of completion i."""
        return self.prompts[i // self.group_size]

    def answer_tokens(self, i: int) -> list[int]:
        """Return completion i without the token that ended it."""
        return self.completions[i][:-1] if self.finished[i] else self.completions[i]

    def rows(self, pad_id: int = 0) -> Rows:
        """Return tensors with a row a completion, padded on the right.

        prompts (N, S) and prompt_tokens (N,), its length; completions (N, C) and mask (N, C), which is true at its tokens;
        log_probs (N, C), as sampled, 0 behind the end; finished (N,).
        """
        prompts = pad([self.prompt_of(i) for i in range(len(self))], pad_id, torch.int32)
        lengths = torch.tensor([len(tokens) for tokens in self.completions])
        return {
            "prompts": prompts,
            "prompt_tokens": torch.tensor([len(self.prompt_of(i)) for i in range(len(self))]),
            "completions": pad(self.completions, pad_id, torch.int32),
            "mask": torch.arange(int(lengths.max())) < lengths[:, None],
            "log_probs": pad(self.log_probs, 0.0, torch.float32),
            "finished": torch.tensor(self.finished),
        }

    def joined(self, other: Rollouts) -> Rollouts:
        """Return both one after the other. Raises ValueError when their groups differ in size."""
        if other.group_size != self.group_size:
            raise ValueError(f"groups of {self.group_size} and of {other.group_size} do not join.")
        engine = self.engine_log_probs
        return Rollouts(
            self.prompts + other.prompts, self.group_size, self.completions + other.completions, self.log_probs + other.log_probs,
            self.finished + other.finished, max(self.engine_gap, other.engine_gap),
            None if engine is None or other.engine_log_probs is None else engine + other.engine_log_probs,
        )  # fmt: skip

    def of_groups(self, groups: Sequence[int]) -> Rollouts:
        """Return the completions of some prompts."""
        size = self.group_size
        chosen = [group * size + i for group in groups for i in range(size)]
        return replace(
            self,
            prompts=[self.prompts[group] for group in groups],
            completions=[self.completions[i] for i in chosen],
            log_probs=[self.log_probs[i] for i in chosen],
            finished=[self.finished[i] for i in chosen],
            engine_log_probs=None if self.engine_log_probs is None else [self.engine_log_probs[i] for i in chosen],
        )


def pad(rows: Sequence[Sequence[float]], filler: float, dtype: torch.dtype) -> torch.Tensor:
    """Return rows of unequal length as one tensor, filled up on the right."""
    whole = np.full((len(rows), max(map(len, rows))), filler)
    for i, row in enumerate(rows):
        whole[i, : len(row)] = row
    return torch.from_numpy(whole).to(dtype)


@dataclass
class Sampler:
    """Samples from a model as it is at each call; keeps its engines, one a thread, between calls.

    Threads share the weights and take groups of prompts in turn. What a completion is depends on the weights, its prompt and its seed
    alone, whatever the number of threads.
    """

    model: Transformer
    """the policy; what changes its weights changes the next call"""
    end_ids: tuple[int, ...]
    """tokens that end a completion"""
    config: SampleConfig = field(default_factory=SampleConfig)
    """how to sample"""
    num_threads: int = 1
    """threads on a CPU, one core each"""
    max_prompt_tokens: int | None = None
    """longest prompt (default: what the context leaves beside max_tokens)"""
    rescores: bool = True
    """whether log-probabilities are the trainer's own where the engine's are not exact; without, they cost nothing"""
    compares: bool = False
    """whether they are the trainer's own where the engine's are exact too, so that the two can be compared"""

    def __post_init__(self) -> None:
        limit = self.model.config.max_seq_len
        if self.config.max_tokens >= limit:
            raise UserError(f"max_tokens={self.config.max_tokens} leaves no room for a prompt in a context of {limit} tokens. Lower it.")
        self.max_prompt_tokens = self.max_prompt_tokens or limit - self.config.max_tokens
        self._engines: list[Engine] = []
        self._workers: Workers | InlineWorker | None = None

    def sample(self, prompts: Sequence[Sequence[int]], seed: Sequence[int]) -> Rollouts:
        """Return config.group_size completions of each prompt; the same for the same weights, prompts and seed (any numbers).

        Raises UserError for a prompt of more than max_prompt_tokens tokens, and where the weights give no numbers.
        """
        size = self.config.group_size
        rollouts = self._gather(prompts, seed, size, self.config.temperature)
        return self._rescored(rollouts) if self.compares or (self.rescores and not self.is_exact) else rollouts

    def greedy(self, prompts: Sequence[Sequence[int]]) -> Rollouts:
        """Return the completion of each prompt whose every token is the most probable, in groups of one."""
        return self._gather(prompts, [0], 1, 0.0)

    def _gather(self, prompts: Sequence[Sequence[int]], seed: Sequence[int], size: int, temperature: float) -> Rollouts:
        assert self.max_prompt_tokens is not None
        for prompt in prompts:
            if not 0 < len(prompt) <= self.max_prompt_tokens:
                raise UserError(
                    f"a prompt has {len(prompt)} tokens; beside max_tokens={self.config.max_tokens} there is room for "
                    f"{self.max_prompt_tokens}. Shorten it, or lower max_tokens."
                )
        workers, engines = self._ready()
        seeds = np.random.SeedSequence(list(seed)).generate_state(len(prompts) * size, np.uint64).tolist()
        shares = [range(i, len(prompts), len(engines)) for i in range(len(engines))]

        def draw(i: int) -> list[tuple[list[int], list[float], bool]]:
            each = [seed for p in shares[i] for seed in seeds[p * size : (p + 1) * size]]
            return self._draw(engines[i], [prompts[p] for p in shares[i]], each, temperature)

        found: list[tuple[list[int], list[float], bool]] = [([], [], False)] * (len(prompts) * size)
        for share, part in zip(shares, workers.map(draw, range(len(engines)))):
            for place, p in enumerate(share):
                found[p * size : (p + 1) * size] = part[place * size : (place + 1) * size]
        tokens, values, ended = (list(column) for column in zip(*found))
        return Rollouts([list(prompt) for prompt in prompts], size, tokens, values, ended)

    @property
    def is_exact(self) -> bool:
        """Whether the engine's own log-probabilities are the trainer's: in float32 at temperature 1."""
        return self.model.embed.weight.dtype == torch.float32 and self.config.temperature == 1.0

    def score(self, rows: Rows, model: Transformer | None = None) -> torch.Tensor:
        """Return the log-probabilities in nats of all completions under a model, by default the policy, without gradient, (N, C)."""
        size, temperature = self.config.group_size, self.config.temperature
        return score_rows(model or self.model, rows, self.workers, temperature=temperature, group_size=size)

    @property
    def workers(self) -> Workers | InlineWorker:
        """The threads that sample, for what else there is to do between updates."""
        if self._workers is None:
            self._workers = start_workers(self.num_threads, self.model.embed.weight.device)
        return self._workers

    def close(self) -> None:
        """End the threads and free the engines' memory."""
        if self._workers is not None:
            self._workers.close()
        self._workers, self._engines = None, []

    def _ready(self) -> tuple[Workers | InlineWorker, list[Engine]]:
        """Return the threads and their engines, which read the weights as they are now."""
        workers = self.workers
        for engine in self._engines:
            engine.reload(self.model)
        self._engines = self._engines or [self._new_engine() for _ in range(workers.num_threads)]
        return workers, self._engines

    def _new_engine(self) -> Engine:
        weight, config = self.model.embed.weight, self.model.config
        native = weight.dtype == torch.bfloat16 and weight.device.type == "cpu" and why_not_native(config) is None
        runner = NativeRunner(self.model, num_threads=1) if native else TorchRunner(self.model)
        longest = self.max_prompt_tokens + self.config.max_tokens
        return Engine(runner, max_batch=self.config.max_batch, max_seq_len=longest, eos_ids=self.end_ids)

    def _draw(
        self, engine: Engine, prompts: list[Sequence[int]], seeds: list[int], temperature: float
    ) -> list[tuple[list[int], list[float], bool]]:
        """Return tokens with the one that ends them, their log-probabilities, and whether the model ended them; a seed a completion."""
        max_tokens, size = self.config.max_tokens, len(seeds) // max(1, len(prompts))
        wanted = iter(seeds)
        found: dict[int, tuple[list[int], list[float]]] = {}
        for prompt in prompts:
            for _ in range(size):
                params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=next(wanted))
                found[engine.add(prompt, params)] = ([], [])
        ended: dict[int, bool] = {}
        try:
            while engine.num_active:
                for event in engine.step():
                    tokens, values = found[event.id]
                    tokens.append(event.token)
                    values.append(event.logprob)
                    if event.finish_reason:
                        ended[event.id] = event.finish_reason == "stop"
        finally:
            for request in found:
                engine.cancel(request)
        return [(tokens, values, ended[request]) for request, (tokens, values) in found.items()]

    def _rescored(self, rollouts: Rollouts) -> Rollouts:
        rows = rollouts.rows()
        scores = self.score(rows)
        comparable = self.config.temperature == 1.0  # the engine's are always of the model's own distribution
        gap = float((scores - rows["log_probs"]).abs()[rows["mask"]].max()) if comparable else 0.0
        log_probs = [row[: len(tokens)] for row, tokens in zip(scores.tolist(), rollouts.completions)]
        return replace(
            rollouts, log_probs=log_probs, engine_gap=gap, engine_log_probs=rollouts.log_probs if comparable else None
        )  # fmt: skip


@torch.no_grad()
def score_rows(
    model: Transformer,
    rows: Rows,
    workers: Workers | InlineWorker,
    *,
    temperature: float = 1.0,
    group_size: int = 1,
    micro_batch_size: int = SCORED_ROWS,
) -> torch.Tensor:
    """Return log-probabilities in nats of the completions under a model, without gradient, float32 (N, C), 0 behind the end."""
    count, width = rows["mask"].shape
    size = group_size if count % group_size == 0 else 1
    order = torch.argsort(rows["mask"].sum(1).view(-1, size).amax(1), stable=True)
    each = (order[:, None] * size + torch.arange(size)).split(max(1, micro_batch_size // size))
    device, result = model.embed.weight.device, torch.zeros(count, width)

    def score(groups: torch.Tensor) -> None:
        part = groups.flatten()
        with torch.no_grad():  # which each thread has for itself
            scores = completion_log_probs(model, move_batch(take_rows(rows, part), device), temperature, group_size=size)
        result[part, : scores.log_probs_BT.shape[1]] = scores.log_probs_BT.cpu()

    workers.map(score, each)
    return result


def take_rows(rows: Rows, index: torch.Tensor) -> Rows:
    """Return some rows, their prompts and completions as wide as the longest of them needs.

    A tensor of shape (N, C), C the width of `mask`, has a column a token of the completion; others are kept whole.
    """
    width, longest = rows["mask"].shape[1], int(rows["mask"][index].sum(1).max())
    prompt = int(rows["prompt_tokens"][index].max())
    taken = {}
    for name, tensor in rows.items():
        part = tensor[index]
        if name == "prompts":
            part = part[:, :prompt]
        elif part.dim() > 1 and part.shape[1] == width:
            part = part[:, :longest]
        taken[name] = part
    return taken
