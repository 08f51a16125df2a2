"""A teacher's most probable tokens at every learnt position of some data, in a folder: so that teacher and student need not be in memory
together, and one teacher's work serves many students.

The folder holds teacher.json and four NumPy arrays of N positions, in the order of the data: ids.npy int32 (N, K), most probable first,
log_probs.npy float32 (N, K) at the temperature of teacher.json, rest.npy float32 (N,), the log-probability of all other tokens together,
and targets.npy float32 (N,), that of the data's own token at temperature 1. They are read where they lie, not loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from plinth.config import UserError, from_dict, read_json, to_dict
from plinth.data.buckets import like_lengths
from plinth.data.rejects import row_counts
from plinth.models.hub import load_decoder
from plinth.models.transformer import Transformer
from plinth.ops.softcap import softcap
from plinth.posttraining.batches import pad_rows
from plinth.posttraining.distill_config import TeacherFileConfig
from plinth.posttraining.learnt_texts import read_texts, render_texts
from plinth.posttraining.teacher_parts import MANIFEST, PROGRESS, Parts, begin_parts, check_free, read_begun
from plinth.run import Run, file_sha256, find_model, tree_sha256, usable_cores
from plinth.tokenizer.chat import Rendered
from plinth.tokenizer.encode import Tokenizer
from plinth.training.device import choose_device
from plinth.training.precision import DTYPES
from plinth.training.step import open_workers

ARRAYS = {"ids": np.int32, "log_probs": np.float32, "rest": np.float32, "targets": np.float32}
CHUNK_ELEMENTS = 1 << 21  # logits in flight, per thread


def write_teacher_file(
    out: Path,
    teacher_run: Path,
    data: Path,
    config: TeacherFileConfig,
    *,
    resume: bool = False,
    warn: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Write what a run's model says at every learnt token of `data`, and return the manifest.

    `data` is anything that is read as messages or text; its learnt tokens are those that `plinth inspect` shows. The file is whole with
    teacher.json, which is written last. `resume` goes on with what an interrupted call left, by the configuration saved there; the result
    has the same bits. Raises UserError when `out` exists and is not to be resumed, and for one that was made of other things.
    """
    out, source, tokenizer = Path(out), find_model(teacher_run), Tokenizer.load(find_model(teacher_run))
    begun = read_begun(out) if resume else None
    if not resume:
        check_free(out)
    made_of = {"teacher_sha256": tree_sha256(source), "data_sha256": file_sha256(data), "tokenizer_sha256": tokenizer.sha256}
    if begun is not None:
        check_same(out, begun, made_of)
        if (out / MANIFEST).is_file():
            return begun
        config = from_dict(TeacherFileConfig, begun["config"], f"{out}/{PROGRESS}: ")
    found = read_texts(data, tokenizer)
    if found.rejected:
        warn(f"{data}: {found.describe()}")
    teacher = Teacher.load(source, tokenizer, config)
    examples = render_texts(tokenizer, found, config.max_seq_len or teacher.model.config.max_seq_len)
    numbers = {"examples": len(examples), "positions": int(first_positions(examples)[-1]), "vocab_size": teacher.vocab_size}
    if begun is None:
        begin_parts(out, made_of | numbers | {"config": to_dict(replace(config, device=teacher.device))})
    else:
        check_same(out, begun, numbers)
    with Run(out).lock():
        parts = fill_arrays(out, teacher, examples, warn)
        manifest = {
            "version": 1, "teacher": str(teacher_run), **made_of, **numbers,
            "rest": float(np.exp(parts.arrays["rest"]).mean()), "cross_entropy_nats": -float(parts.arrays["targets"].mean()),
            **row_counts(len(found.rejected)), **{k: v for k, v in asdict(config).items() if k in ("top_k", "temperature", "dtype")},
        }  # fmt: skip
        parts.finish(manifest)
    return manifest


def check_same(out: Path, begun: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise UserError where a file was begun with other things than it is to be made of now."""
    for name, value in ours.items():
        if begun.get(name) != value:
            what, was, now = name.removesuffix("_sha256"), str(begun.get(name))[:8], str(value)[:8]
            raise UserError(
                f"{out} was begun with {what} {was}, and now it is {now}. Name the same as then, or another --out without --resume."
            )


def fill_arrays(out: Path, teacher: Teacher, examples: Sequence[Rendered], warn: Callable[[str], None]) -> Parts:
    """Compute the micro-batches that are not whole in the folder `out`, and return all."""
    config, starts = teacher.config, first_positions(examples)
    batches = like_lengths([len(example.tokens) for example in examples], config.micro_batch_size)
    count = int(starts[-1])
    shapes = {name: ((count, config.top_k) if name in ("ids", "log_probs") else (count,), dtype) for name, dtype in ARRAYS.items()}
    parts = Parts(out, shapes, [places_of(starts, batch) for batch in batches], warn)
    missing = [number for number in range(len(batches)) if number not in parts.whole]
    if parts.whole:
        warn(f"{out}: {len(parts.whole)} of {len(batches)} micro-batches are there; going on with the others.")
    with open_workers(config.num_threads or usable_cores(), teacher.device) as workers:
        workers.map(lambda number: parts.keep(number, top_tokens(teacher, [examples[i] for i in batches[number]])), missing)
    return parts


def places_of(starts: np.ndarray, examples: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return the rows of the arrays that belong to some examples, one example after the other."""
    return np.concatenate([np.arange(starts[i], starts[i + 1]) for i in examples])


@dataclass(frozen=True)
class Teacher:
    """A model that is asked, and how."""

    model: Transformer
    """on its device, in its dtype"""
    config: TeacherFileConfig
    """what is kept of it"""
    vocab_size: int
    """tokens that its distributions are over"""
    pad_id: int
    """what rows are filled with"""
    device: str
    """where it computes"""

    @classmethod
    def load(cls, source: Path, tokenizer: Tokenizer, config: TeacherFileConfig) -> Teacher:
        """Open a model folder. Raises UserError for a vocab_size or a top_k that its vocabulary does not allow."""
        device = choose_device(config.device)
        model = load_decoder(source).to(device, DTYPES[config.dtype]).eval().requires_grad_(False)
        vocab_size = min(config.vocab_size or len(model.output_weight), len(model.output_weight))
        if vocab_size < tokenizer.vocab_size:
            raise UserError(f"vocab_size={vocab_size} is below the tokenizer's {tokenizer.vocab_size}. Use that, or leave it out.")
        if config.top_k >= vocab_size:
            raise UserError(f"top_k={config.top_k} must be below the {vocab_size} tokens that there are. Lower it.")
        return cls(model, config, vocab_size, tokenizer.pad_id or 0, device)


def first_positions(examples: Sequence[Rendered]) -> np.ndarray:
    """Return where each example's learnt tokens begin among all, and behind the last how many there are, int64 (examples + 1,)."""
    return np.cumsum([0, *(sum(example.loss_mask[1:]) for example in examples)])


@torch.no_grad()
def top_tokens(teacher: Teacher, rows: Sequence[Rendered]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the columns of ARRAYS at the learnt tokens of some rows, one row after the other."""
    model, config, vocab_size = teacher.model, teacher.config, teacher.vocab_size
    padded = pad_rows([row.tokens for row in rows], [row.loss_mask for row in rows], teacher.pad_id)
    inputs_BT, targets_BT = (each.to(model.embed.weight.device) for each in padded)
    places = (targets_BT.flatten() >= 0).nonzero()[:, 0]
    hidden_ND, targets_N = model(inputs_BT).flatten(0, 1)[places], targets_BT.flatten()[places]
    found: list[tuple[torch.Tensor, ...]] = []
    for part in torch.arange(len(places)).split(max(1, CHUNK_ELEMENTS // vocab_size)):
        logits_NV = F.linear(hidden_ND[part], model.output_weight[:vocab_size]).float()
        logits_NV = logits_NV if model.config.logit_softcap is None else softcap(logits_NV, model.config.logit_softcap)
        target_N = logits_NV.log_softmax(-1).gather(1, targets_N[part][:, None])[:, 0]
        logs_NV = (logits_NV / config.temperature).log_softmax(-1)
        log_probs_NK, ids_NK = logs_NV.topk(config.top_k, -1)
        rest_N = logs_NV.scatter(1, ids_NK, -torch.inf).logsumexp(-1)
        found.append((ids_NK.int(), log_probs_NK, rest_N, target_N))
    ids, log_probs, rest, targets = (torch.cat(column).cpu().numpy() for column in zip(*found))
    return ids, log_probs, rest, targets


@dataclass(frozen=True)
class TeacherFile:
    """A teacher's folder, opened for the data that it is of."""

    arrays: dict[str, np.ndarray]
    """those of ARRAYS, mapped from the disk"""
    starts: np.ndarray
    """`first_positions` of the data's examples"""
    manifest: dict[str, Any]
    """teacher.json"""

    @classmethod
    def open(cls, path: Path, data: Path, tokenizer: Tokenizer, examples: Sequence[Rendered]) -> TeacherFile:
        """Open a folder for data that it was written of. Raises UserError where data, tokenizer or the learnt tokens are others."""
        manifest = read_json(Path(path) / MANIFEST)
        starts = first_positions(examples)
        for name, ours in (("data", file_sha256(data)), ("tokenizer", tokenizer.sha256)):
            if manifest[f"{name}_sha256"] != ours:
                raise UserError(
                    f"{path} was written for {name} {manifest[f'{name}_sha256'][:8]}, not {ours[:8]}. "
                    f"Write it anew with `plinth distill score {manifest['teacher']} --data {data}`."
                )
        if manifest["positions"] != starts[-1]:
            raise UserError(
                f"{path} has {manifest['positions']} learnt tokens and {data} has {starts[-1]} by this version. Write it anew."
            )  # fmt: skip
        return cls({name: np.load(Path(path) / f"{name}.npy", mmap_mode="r") for name in ARRAYS}, starts, manifest)

    @property
    def vocab_size(self) -> int:
        return self.manifest["vocab_size"]

    def check_temperature(self, temperature: float) -> None:
        """Raise UserError for a temperature other than the file's: the other tokens' share at it is not known."""
        if temperature != self.manifest["temperature"]:
            raise UserError(
                f"temperature={temperature}, but the teacher's file is of temperature {self.manifest['temperature']}. "
                "Use that one, or write the file anew."
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise UserError when the student has fewer tokens than the file's distributions."""
        if vocab_size < self.vocab_size:
            raise UserError(
                f"the teacher's file is over {self.vocab_size} tokens, and the student has {vocab_size}. "
                f"Write it anew with --vocab-size {vocab_size}."
            )

    def columns(self, part: Sequence[int], targets_BT: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return ids (B, T, K), log-probabilities (B, T, K), rest (B, T) and targets (B, T) at the counted targets of some examples."""
        places = (targets_BT >= 0).nonzero(as_tuple=True)
        rows = places_of(self.starts, part)
        found = []
        for name in ARRAYS:
            values = torch.from_numpy(self.arrays[name][rows])
            whole = values.new_zeros(*targets_BT.shape, *values.shape[1:])
            whole[places] = values
            found.append(whole)
        return tuple(found)
