"""Named tensors in safetensors files: written with the system's own error when the disk is full, read without a second copy in memory."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from plinth.config import UserError

REMAP_BYTES = 64 << 20  # what stays mapped, and so counts as this process's memory, beyond what it reads
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def save_tensors(tensors: Mapping[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises OSError, with the file's name, when the system refuses."""
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from None


class TensorFiles:
    """The tensors of several safetensors files, read one at a time; what they are is known from the headers alone.

    A file is mapped into memory anew after every `REMAP_BYTES` read, so that what was read does not stay there.
    """

    def __init__(self, files: Sequence[Path]):
        """Read the headers. Raises UserError for a file that is absent, truncated or no safetensors file, and a tensor in two files."""
        self._places: dict[str, Path] = {}
        self._kinds: dict[str, tuple[tuple[int, ...], str]] = {}
        self._mapped: tuple[Path, Any] | None = None
        self._read_bytes = 0
        for path in files:
            if not path.is_file():
                raise UserError(f"{path} does not exist. Name a model folder with safetensors weights.")
            with _opened(path) as file:
                for name in file.keys():
                    if name in self._places:
                        raise UserError(f"{path} and {self._places[name]} both hold {name}. Copy the model again.")
                    part = file.get_slice(name)
                    self._places[name], self._kinds[name] = path, (tuple(part.get_shape()), part.get_dtype())

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Return the shape of every tensor by name."""
        return {name: shape for name, (shape, _) in self._kinds.items()}

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type; one that is no floating-point type of PyTorch's own is reported as uint8."""
        return DTYPES.get(self._kinds[name][1], torch.uint8)

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor, a view into the mapped file."""
        path, tensor = self._places[name], None
        if self._mapped is None or self._mapped[0] != path or self._read_bytes > REMAP_BYTES:
            self.close()
            self._mapped = (path, _opened(path))
        tensor = self._mapped[1].get_tensor(name)
        self._read_bytes += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Let go of the mapped file."""
        self._mapped, self._read_bytes = None, 0


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is truncated or not a safetensors file: {error}. Copy the model again.") from None
