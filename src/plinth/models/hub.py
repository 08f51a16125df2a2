"""Models in Hugging Face's format: safetensors, config.json, the tokenizer; out and in, checked.

`FORMATS` lists the families. Weights are published under the names that transformers gives them, so that it, vLLM and llama.cpp read them.
`plinth.json` beside them records the SHA-256 of each file, and `load_model` refuses a folder that no longer matches it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from plinth import __version__
from plinth.config import UserError, read_json, save_json
from plinth.models.formats import clip, decoder, encoder, encoder_decoder, llava, recurrent, reward, text_classifier
from plinth.models.formats.layout import Format
from plinth.models.formats.tensors import fill, publish
from plinth.models.tensor_file import TensorFiles, save_tensors
from plinth.models.transformer import Transformer
from plinth.run import file_sha256, publish_dir

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
SIDECAR = "plinth.json"
GENERATION_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")  # of config.json, in generation_config.json too

FORMATS: dict[str, Format] = {  # the first that reads a config.json is the folder's
    "reward model": reward.FORMAT,
    "decoder": decoder.FORMAT,
    "encoder": encoder.FORMAT,
    "encoder-decoder": encoder_decoder.FORMAT,
    "awd-lstm": recurrent.AWD_LSTM,
    "recurrent seq2seq": recurrent.SEQ2SEQ,
    "clip": clip.FORMAT,
    "llava": llava.FORMAT,
    "text classifier": text_classifier.FORMAT,
}


class TokenizerFiles(Protocol):
    """What a model folder needs of a tokenizer; `plinth.tokenizer.encode.Tokenizer` has it."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def start_id(self) -> int | None: ...

    @property
    def end_ids(self) -> tuple[int, ...]: ...

    @property
    def pad_id(self) -> int | None: ...

    def save(self, path: Path) -> None: ...


def save_model(model: nn.Module, tokenizer: TokenizerFiles | None, out_dir: Path, dtype: torch.dtype = torch.float32) -> None:
    """Publish a model folder by one rename: safetensors in `dtype`, config.json, generation_config.json, tokenizer, plinth.json.

    A model folder already at `out_dir` is replaced. Raises UserError when something else is there, or when the tokenizer has more
    entries than the model.
    """
    out_dir = Path(out_dir)
    if out_dir.exists() and not (out_dir / "config.json").is_file() and any(out_dir.iterdir()):
        raise UserError(f"{out_dir} holds files, but no model. Name a new folder.")
    if tokenizer is not None and tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} entries, the model vocab_size={model.config.vocab_size}. "
            "Save the model with the tokenizer that it was trained with."
        )
    format = format_of(model.config)
    with publish_dir(out_dir) as folder:
        save_tensors(publish(format, model, dtype), folder / WEIGHTS, {"format": "pt"})
        special = _special_ids(tokenizer)
        values = format.write_config(model.config) | {"dtype": str(dtype).removeprefix("torch.")} | special
        save_json(folder / "config.json", values)
        if format.generates:
            own = {name: values[name] for name in GENERATION_IDS if name in values}
            save_json(folder / "generation_config.json", own | {"max_length": model.config.max_seq_len})
        if tokenizer is not None:
            tokenizer.save(folder)
        names = sorted(file.name for file in folder.iterdir())
        save_json(folder / SIDECAR, {"plinth": __version__, "sha256": {name: file_sha256(folder / name) for name in names}})


def _special_ids(tokenizer: TokenizerFiles | None) -> dict[str, Any]:
    """Return the ids that generation stops at, pads with and starts documents with: both ends, of a document and of a message."""
    if tokenizer is None:
        return {}
    ids = {"bos_token_id": tokenizer.start_id, "eos_token_id": list(tokenizer.end_ids) or None, "pad_token_id": tokenizer.pad_id}
    return {name: value for name, value in ids.items() if value is not None}


def load_model(path: Path, dtype: torch.dtype | None = torch.float32) -> nn.Module:
    """Read a model folder of any family that FORMATS lists, ours or another's, with its parameters in `dtype`, None = as they are stored.

    Raises UserError for another architecture, a file that is absent, truncated or differs from its recorded hash, and tensors that are
    missing, superfluous or of the wrong shape.
    """
    path = Path(path)
    format, config = read_config(path)
    _check_hashes(path)
    return fill(format, config, TensorFiles(weight_files(path)), dtype, where=str(path))


def load_decoder(path: Path, dtype: torch.dtype | None = torch.float32) -> Transformer:
    """Read a model folder that holds a decoder. Raises UserError for another family that says which verbs take it."""
    format, _ = read_config(Path(path))
    if format is not FORMATS["decoder"]:
        family = next(name for name, other in FORMATS.items() if other is format)
        raise UserError(f"{path} holds a model of the family {family}; this needs a decoder. It goes with {format.used_by}.")
    model = load_model(path, dtype)
    assert isinstance(model, Transformer)
    return model


def read_config(path: Path) -> tuple[Format, Any]:
    """Return the format and the configuration of a model folder. Raises UserError for one that we cannot compute."""
    file = path / "config.json"
    values = read_json(file)
    kind = values.get("model_type") if isinstance(values, dict) else None
    for format in FORMATS.values():
        if kind is not None and format.reads(values):
            try:
                return format, format.read_config(values)
            except UserError as error:
                raise UserError(f"{file}: {error}") from None
            except KeyError as error:
                raise UserError(f"{file} lacks {error}; a {kind} configuration needs it. Copy the model again.") from None
            except (TypeError, AttributeError) as error:
                raise UserError(f"{file} has a field of the wrong type: {error}. Copy the model again.") from None
    supported = ", ".join(sorted({name for format in FORMATS.values() for name in format.model_types}))
    raise UserError(f"{file}: model_type={kind!r} is not supported. Supported: {supported}.")


def format_of(config: Any) -> Format:
    """Return the format that a configuration of ours is published in."""
    return next(format for format in FORMATS.values() if type(config) is format.config)


def export_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights in fp32 under their published names: fused projections split, multipliers folded in."""
    return publish(format_of(model.config), model, torch.float32)


def _check_hashes(path: Path) -> None:
    """Compare each file that plinth.json names with its recorded hash; a folder without plinth.json (an import) passes."""
    if not (path / SIDECAR).is_file():
        return
    recorded = read_json(path / SIDECAR).get("sha256", {})
    for name, expected in recorded.items():
        if not (path / name).is_file():
            raise UserError(f"{path / name} is missing, and {SIDECAR} names it. Copy the model again.")
        found = file_sha256(path / name)
        if found != expected:
            raise UserError(
                f"{path / name} was damaged or changed: its SHA-256 is {found[:12]}..., {SIDECAR} recorded {expected[:12]}.... "
                f"Copy the model again; if you changed it on purpose, delete {path / SIDECAR}."
            )


def weight_files(path: Path) -> list[Path]:
    """Return model.safetensors, or the files that its index names. Raises UserError when there are none."""
    if (path / WEIGHTS).is_file() or not (path / INDEX).is_file():
        return [path / WEIGHTS]
    names = sorted(set(read_json(path / INDEX).get("weight_map", {}).values()))
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{path / INDEX} names no weight files beside it. Copy the model again.")
    return [path / name for name in names]
