"""A published model made usable here: its folder, or its name on the Hugging Face hub, checked, copied and compared with transformers."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plinth import __version__
from plinth.config import UserError, read_json, save_json
from plinth.models.formats.tensors import check
from plinth.models.hub import FORMATS, INDEX, SIDECAR, load_model, read_config, weight_files
from plinth.models.tensor_file import TensorFiles
from plinth.recipes.parity import compare
from plinth.run import Progress, publish_dir
from plinth.tokenizer.encode import Tokenizer
from plinth.tokenizer.published_files import build_tokenizer

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
# What a model folder needs; nothing else is downloaded or copied: no pickled weights, no code.
WANTED = (
    "config.json", "generation_config.json", "*.safetensors", INDEX, "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "preprocessor_config.json",
    "processor_config.json", "tokenizer.model", "spiece.model", "LICENSE*", "README.md",
)  # fmt: skip
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
COPY_BYTES = 8 << 20


@dataclass(frozen=True)
class Imported:
    """What an import wrote, and how far transformers' numbers lie from ours."""

    path: Path
    """folder"""
    source: str
    """folder or hub id that it comes from"""
    revision: str | None
    """commit on the hub, None for a folder"""
    family: str
    """one of plinth.models.hub.FORMATS"""
    model_type: str
    """as config.json names it"""
    parameters: int
    """how many numbers the weights hold"""
    size_bytes: int
    """size of the weights"""
    used_by: str
    """the verbs that take it"""
    notes: tuple[str, ...]
    """what a user should know"""
    check: dict[str, Any]
    """{"program", ...}: differences of logits and tokens, or "skipped" with the reason"""


def import_model(source: str, out: Path, *, revision: str | None = None, parity: bool = True, python: Path | None = None) -> Imported:
    """Check a published model, copy it to `out` by one rename, and compare its numbers with transformers' where that is installed.

    `source`: a folder, or an id on the hub such as org/name, which alone lets the network be used; `revision` is a branch, tag or commit
    there. The files stay as published; plinth.json records their hashes and where they come from. Only safetensors are read.
    Raises UserError when `out` holds anything, for an architecture or a value that we cannot compute, for pickled weights, and for
    tensors that are missing, superfluous or of the wrong shape.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already. Name a new folder with --out.")
    folder, commit = (Path(source), None) if Path(source).exists() else download(source, revision)
    refuse_pickles(folder)
    format, config = read_config(folder)
    files = TensorFiles(weight_files(folder))
    _, absent = check(format, config, files, str(folder))
    notes = [f"{name} is not in the published model: it starts as drawn" for name in absent]
    report: dict[str, Any] = {"skipped": "not asked for"}
    with publish_dir(out) as new:
        hashes = copy_files(folder, new)
        tokenizer = build_tokenizer(new)
        notes += tokenizer_notes(tokenizer, config)
        origin = {"source": source if commit else str(folder.resolve()), "revision": commit}
        hashes |= {path.name: _sha256(path) for path in new.iterdir() if path.name not in hashes}
        save_json(new / SIDECAR, {"plinth": __version__, "imported": origin, "sha256": dict(sorted(hashes.items()))})
        if parity:
            report = compare(load_model(new), tokenizer, new, python=python)
    family = next(name for name, other in FORMATS.items() if other is format)
    sizes = [torch.Size(shape).numel() for shape in files.shapes().values()]
    weights = sum(path.stat().st_size for path in weight_files(out))
    kind = read_json(out / "config.json")["model_type"]
    check_report = {"program": "transformers", **report}
    return Imported(out, source, commit, family, kind, sum(sizes), weights, format.used_by, tuple(notes), check_report)


def download(source: str, revision: str | None) -> tuple[Path, str]:
    """Fetch the files of a model from the hub into its cache; return the folder and the commit. Raises UserError."""
    if not HUB_ID.fullmatch(source):
        raise UserError(f"{source} is neither a folder nor an id on the Hugging Face hub, such as org/name.")
    try:
        import huggingface_hub
    except ImportError as error:
        raise UserError(
            f"{source} is no folder, and an id on the hub needs huggingface_hub ({error}). Install it: pip install 'plinth-fm[hub]'."
        ) from None
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        try:
            names = huggingface_hub.HfApi().list_repo_files(source, revision=revision)
        except (HfHubHTTPError, HFValidationError):
            raise
        except OSError:  # without a network what an earlier import fetched is still there
            names = []
        refuse_pickled_names(source, names)
        path = Path(huggingface_hub.snapshot_download(source, revision=revision, allow_patterns=list(WANTED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{source} cannot be fetched: {reason} It must be a folder or an id on the hub; for a gated model set HF_TOKEN."
        ) from None
    return path, path.name


def refuse_pickles(folder: Path) -> None:
    """Raise UserError for a folder whose weights are pickled only."""
    if not folder.is_dir():
        raise UserError(f"{folder} is a file. Name the folder that holds config.json and the weights.")
    refuse_pickled_names(str(folder), [path.name for path in folder.iterdir()])


def refuse_pickled_names(source: str, names: list[str]) -> None:
    """Raise UserError when the names of a model's files have weights, but none in safetensors."""
    pickled = sorted(name for name in names if "/" not in name and name.endswith(PICKLED) and name != "training_args.bin")
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise UserError(
            f"{source} has its weights as {pickled[0]}: loading a pickled file can run any code that is in it, so Plinth never does. "
            "Use a revision with safetensors (many models on the hub have one as refs/pr/N: --revision), or convert it where you trust "
            "it: transformers' AutoModel.from_pretrained(...).save_pretrained(folder)."
        )


def copy_files(folder: Path, new: Path) -> dict[str, str]:
    """Copy what a model needs of a folder; return the SHA-256 of each file. Each is read once, a piece at a time."""
    weights = {path.name for path in weight_files(folder)}
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and (p.name in weights or (p.suffix != ".safetensors" and _wanted(p.name)))]
    hashes = {}
    with Progress(sum(path.stat().st_size for path in files) / 1e6, "copying", "MB") as progress:
        for path in files:
            digest = hashlib.sha256()
            with path.open("rb") as old, (new / path.name).open("wb") as file:
                while piece := old.read(COPY_BYTES):
                    digest.update(piece)
                    file.write(piece)
                    progress.update(len(piece) / 1e6)
            hashes[path.name] = digest.hexdigest()
    return hashes


def _wanted(name: str) -> bool:
    return any(re.fullmatch(pattern.replace(".", r"\.").replace("*", ".*"), name) for pattern in WANTED)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tokenizer_notes(tokenizer: Tokenizer | None, config: Any) -> list[str]:
    """Return what is unusual about a model's tokenizer."""
    if tokenizer is None:
        return ["it has no tokenizer: token ids are all that it takes"]
    notes, size = [], getattr(config, "vocab_size", None)
    if size is not None and tokenizer.vocab_size > size:
        notes.append(f"its tokenizer has {tokenizer.vocab_size} entries, the model vocab_size={size}: a text may have ids beyond it")
    return notes
