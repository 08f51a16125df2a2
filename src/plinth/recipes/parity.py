"""A model's numbers beside another program's on the same files: the largest difference, KL, and the tokens of hard texts."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from plinth.config import UserError, read_json
from plinth.models.dual_encoder import LEGACY_END
from plinth.models.hub import FORMATS, format_of
from plinth.models.transformer import Transformer
from plinth.tokenizer.encode import Tokenizer

ORACLES = Path(__file__).with_name("export_oracles.py")
CHECK_TOKENS, CHECK_ROWS = 128, 2
PLACES = 16  # compared at a time: in float64, with a large vocabulary, all of them would take more memory than many a model
Inputs = Mapping[str, torch.Tensor]

# Texts on which programs that cut or merge otherwise disagree: clitics, digits, indentation, line ends, scripts, marks, half-known spaces.
CHECK_TEXTS = (
    "The cat doesn't know that I'LL be there at 12:45 on 2026-11-21; we'Ve 3 1415926535 reasons.",
    "def f(x):\n    if x >= 10_000:\n\t\treturn {'a': [1, 2, 3]}  # note\r\n\r\n   \n    return None\n\n\n",
    "naïve café Ångström ſ ǅ ʰ Ⅷ ½ ² ١٢٣ हिन्दी में ภาษาไทย עִבְרִית العَرَبِيَّة 東京へ行く 한국어 😀👩‍👩‍👧 e\u0301\u0308 \ufeff",
    "  two  three   \u00a0\u2003\u3000x\u0085y\u2028z\t\t\x0b\x0c tail   ",
    "x'Dx ''s '’t !!!\n???\r\n+= -> <<>> «q» _under_score__ $5.00 100% a/b\\c",
)


@dataclass(frozen=True)
class Probe:
    """What a family is asked, by us and by transformers."""

    inputs: Callable[[Any, Tokenizer | None], dict[str, torch.Tensor]]
    """configuration and tokenizer → inputs, named as transformers' forward has them"""
    ours: Callable[[nn.Module, Inputs], torch.Tensor]
    """our answer to them, shape (rows, ..., V)"""
    output: Callable[[Any], str]
    """configuration → the field of transformers' answer to compare with"""
    mask: str | None = None
    """the input that is 0 where the answer is not compared"""
    whole: bool = False
    """the answer is of all rows together, not a row at a time"""


def random_rows(vocab_size: int, max_seq_len: int) -> torch.Tensor:
    """Return rows of drawn ids, always the same, shape (CHECK_ROWS, T)."""
    shape = (CHECK_ROWS, min(CHECK_TOKENS, max_seq_len))
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(0))


def check_rows(tokenizer: Tokenizer, max_seq_len: int) -> list[list[int]]:
    """Return token rows of equal length to compare logits on."""
    ids = [i for text in CHECK_TEXTS for i in tokenizer.encode(text)]
    length = min(CHECK_TOKENS, max_seq_len, len(ids) // CHECK_ROWS)
    return [ids[row * length : (row + 1) * length] for row in range(CHECK_ROWS)]


def _decoder_inputs(config: Any, tokenizer: Tokenizer | None) -> dict[str, torch.Tensor]:
    if tokenizer is None or tokenizer.vocab_size > config.vocab_size:
        return {"input_ids": random_rows(config.vocab_size, config.max_seq_len)}
    return {"input_ids": torch.tensor(check_rows(tokenizer, config.max_seq_len))}


def _decoder_logits(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    return model.logits(model(inputs["input_ids"]))  # type: ignore[operator]


def _conversation(config: Any, tokenizer: Tokenizer | None) -> dict[str, torch.Tensor]:
    """Return one row, without padding: of several, transformers finds the ends by the padding's id, which a folder may lack."""
    return {name: rows[:1] for name, rows in _decoder_inputs(config, tokenizer).items()}


def _score(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    rows = inputs["input_ids"]
    return (model(rows, torch.full((len(rows),), rows.shape[1])) - model.config.bias)[:, None]  # type: ignore[union-attr]


def _encoder_inputs(config: Any, tokenizer: Tokenizer | None) -> dict[str, torch.Tensor]:
    rows = random_rows(config.vocab_size, config.max_seq_len)
    mask = torch.ones_like(rows)
    mask[1, rows.shape[1] // 2 :] = 0  # the second row is padded
    return {"input_ids": torch.where(mask == 0, config.pad_id, rows), "attention_mask": mask}


def _encoder_scores(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """Return the head's scores, or the hidden states without one, zeros where the text is padded."""
    mask = inputs["attention_mask"].bool()
    hidden = model(inputs["input_ids"], mask)
    answer = hidden if model.config.head == "none" else model.scores(hidden)  # type: ignore[operator, union-attr]
    return answer[..., 0] if model.config.head == "answer" else answer  # type: ignore[union-attr]


def _source_inputs(config: Any, tokenizer: Tokenizer | None) -> dict[str, torch.Tensor]:
    inputs = _encoder_inputs(config, tokenizer)
    targets = random_rows(config.output_size, config.max_seq_len // 2)
    return inputs | {"decoder_input_ids": targets}


def _target_logits(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    return model.logits(model(inputs["input_ids"], inputs["attention_mask"].bool(), inputs["decoder_input_ids"]))  # type: ignore[operator]


def _pairs(config: Any, tokenizer: Tokenizer | None) -> dict[str, torch.Tensor]:
    """Return captions that end, and images of noise."""
    rows = random_rows(config.text.vocab_size, config.text.max_seq_len)
    rows[:, -1] = config.text.vocab_size - 1 if config.text.end_id == LEGACY_END else config.text.end_id
    shape = (CHECK_ROWS, config.vision.num_channels, config.vision.image_size, config.vision.image_size)
    return {"input_ids": rows, "pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0))}


def _similarities(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    return model(inputs["input_ids"], inputs["pixel_values"])


def _image_and_text(config: Any, tokenizer: Tokenizer | None) -> dict[str, torch.Tensor]:
    """Return rows that begin with an image of noise."""
    text = random_rows(config.image_id or config.vocab_size, max(2, min(CHECK_TOKENS, config.max_seq_len) - config.image_tokens))
    image = torch.full((CHECK_ROWS, config.image_tokens), config.image_id)
    shape = (CHECK_ROWS, config.vision.num_channels, config.vision.image_size, config.vision.image_size)
    return {"input_ids": torch.cat((image, text), 1), "pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(0))}


def _image_and_text_logits(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    return model.logits(model(inputs["input_ids"], inputs["pixel_values"]))  # type: ignore[operator]


ENCODER_OUTPUTS = {"none": "last_hidden_state", "answer": "start_logits"}
PROBES: dict[str, Probe] = {
    "reward model": Probe(_conversation, _score, lambda config: "logits"),
    "decoder": Probe(_decoder_inputs, _decoder_logits, lambda config: "logits"),
    "encoder": Probe(_encoder_inputs, _encoder_scores, lambda config: ENCODER_OUTPUTS.get(config.head, "logits"), "attention_mask"),
    "encoder-decoder": Probe(_source_inputs, _target_logits, lambda config: "logits"),
    "clip": Probe(_pairs, _similarities, lambda config: "logits_per_image", whole=True),
    "llava": Probe(_image_and_text, _image_and_text_logits, lambda config: "logits"),
}


def compare(
    model: nn.Module, tokenizer: Tokenizer | None, path: Path, program: str = "transformers", python: Path | None = None
) -> dict[str, Any]:
    """Ask `program`, in a process of the interpreter `python` (None = this one), about the model at `path`, and compare with ours.

    Returns {"version", "other_texts", ...} with what `differences` gives, or {"skipped": why}. "other_texts" are those of CHECK_TEXTS
    that it cuts into other tokens. Raises UserError when the program fails on the model.
    """
    family = next(name for name, format in FORMATS.items() if format is format_of(model.config))
    if family not in PROBES:
        return {"skipped": f"nothing else reads the family {family} in this form"}
    if program == "transformers" and read_json(path / "config.json")["model_type"].startswith("plinth"):
        return {"skipped": "only Plinth reads this architecture"}
    probe = PROBES[family]
    inputs = probe.inputs(model.config, tokenizer)
    with tempfile.TemporaryDirectory(prefix="plinth-parity-") as scratch:
        given, found = Path(scratch) / "inputs.npz", Path(scratch) / "output.npy"
        np.savez(given, **{name: tensor.numpy() for name, tensor in inputs.items()})
        texts = CHECK_TEXTS if tokenizer is not None else ()
        question = {"path": str(path), "inputs": str(given), "output": probe.output(model.config), "texts": texts, "answer": str(found)}
        answer = ask(program, question, python)
        if "missing" in answer:
            return {"skipped": f"{program} is not installed ({answer['missing']})"}
        theirs = np.load(found, mmap_mode="r")
        other = [text for text, ids in zip(texts, answer["ids"]) if tokenizer is not None and ids != tokenizer.encode(text)]
        return {"version": answer["version"], "other_texts": other, **differences(model, probe, inputs, theirs)}


def ask(program: str, question: dict[str, Any], python: Path | None) -> dict[str, Any]:
    """Run the script of oracles in a process of the interpreter `python`, None = this one."""
    command = [str(python or sys.executable), str(ORACLES)]
    done = subprocess.run(command, input=json.dumps({"program": program, **question}), capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(f"{program} fails on the model: {reason}. Pass --no-check to write it all the same.")
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def differences(model: nn.Module, probe: Probe, inputs: Inputs, theirs: np.ndarray) -> dict[str, float]:
    """Compare answers (rows, ..., V) with the model's, a few places at a time, where the input is not padding.

    Returns the largest difference, the largest number of ours, KL(ours || theirs) in nats a place, its largest, the share of equal best
    entries, and the count of places.
    """
    parts = []
    mask = inputs[probe.mask] if probe.mask else None
    all_ours = probe.ours(model, inputs) if probe.whole else None
    for row in range(len(theirs)):
        one = probe.ours(model, {name: tensor[row : row + 1] for name, tensor in inputs.items()}) if all_ours is None else all_ours[row:]
        ours, other = one[0].reshape(-1, one.shape[-1]), theirs[row].reshape(-1, theirs.shape[-1])
        is_counted = torch.ones(len(ours), dtype=torch.bool) if mask is None or one.dim() < 3 else mask[row].bool()
        parts += [_places(ours[i : i + PLACES], other[i : i + PLACES], is_counted[i : i + PLACES]) for i in range(0, len(ours), PLACES)]
    worst, scale, kl, same = (torch.cat(columns) for columns in zip(*parts))
    return {
        "max_logit_difference": float(worst.max()),
        "scale": float(scale.max()),
        "kl_nats": float(kl.mean()),
        "kl_nats_max": float(kl.max()),
        "same_best_token": float(same.float().mean()),
        "tokens": int(kl.numel()),
    }


def _places(ours: torch.Tensor, theirs: np.ndarray, is_counted: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return, of each place (rows of both) that counts: the largest difference and number, the divergence, whether the best is the same."""
    mine, other = ours[is_counted].double(), torch.from_numpy(np.array(theirs, np.float64))[is_counted]
    log_mine, log_other = mine.log_softmax(-1), other.log_softmax(-1)
    kl = (log_mine.exp() * (log_mine - log_other)).sum(-1)
    return (mine - other).abs().amax(-1), mine.abs().amax(-1), kl, mine.argmax(-1) == other.argmax(-1)


def logit_differences(model: Transformer, rows: list[list[int]], theirs: np.ndarray) -> dict[str, float]:
    """Compare logits (rows, T, V) of token rows of equal length with a decoder's."""
    return differences(model, PROBES["decoder"], {"input_ids": torch.tensor(rows)}, theirs)


def describe_parity(check: Mapping[str, Any]) -> str:
    """Return one line: how far the numbers of {"program", ...} and ours lie apart, or why they were not compared."""
    if "skipped" in check:
        return f"not compared with {check['program']}: {check['skipped']}."
    return (
        f"compared with {check['program']} {check['version']} on {check['tokens']} tokens: logits at most "
        f"{check['max_logit_difference']:.2g} apart, KL {check['kl_nats']:.2g} nats a token, same best token "
        f"{check['same_best_token']:.1%}; "
        + (f"it cuts {len(check['other_texts'])} of {len(CHECK_TEXTS)} hard texts otherwise." if check["other_texts"] else "same tokens.")
    )
