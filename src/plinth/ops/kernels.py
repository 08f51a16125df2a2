"""Kernels in C for processors with AVX-512 and a bf16 matrix unit (AMX), built once with the system's compiler.

Calls run without Python's lock, so worker threads run side by side. Where there is no such processor or no C compiler, every
operation of this package runs on PyTorch's own kernels; results differ by rounding only.
PLINTH_KERNELS=torch in the environment asks for that everywhere.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from functools import lru_cache
from pathlib import Path

import torch

SOURCES = Path(__file__).parent / "native"
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-fvisibility=hidden", "-shared")
NO_COMPILER = "no C compiler (cc, gcc or clang) is on the PATH"
NEEDED = {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni", "avx512vbmi"} | {"amx_tile", "amx_bf16", "amx_int8"}

P, L, I, F = ctypes.c_void_p, ctypes.c_long, ctypes.c_int, ctypes.c_float
SIGNATURES = {
    "attention_forward": (P, P, P, P, P, I, I, I, I, I, I, F, F),
    "attention_backward": (P, P, P, P, P, P, P, I, I, I, I, I, I, F, F),
    "add_rms_norm_forward": (P, P, P, P, P, L, I, F),
    "add_rms_norm_backward": (P, P, P, P, P, L, I),
    "swiglu_forward": (P, P, L, I),
    "swiglu_backward": (P, P, P, L, I),
    "cross_entropy": (P, P, P, L, I),
    "peak_rows": (P, I, I, P, P, I),
    "choose_rows": (P, P, P, I, I, P, P, I),
    "top_rows": (P, I, I, I, P, I),
    "add_products": (P, P, L, I, I, P, I),
    "gather_sums": (P, I, P, I, I, I, I),
    "orthogonalise": (P, P, I, I, P, I),
    "nesterov": (P, P, P, L, F),
    "move_weights": (P, P, L, F, F),
    "round_sums": (P, P, I, I, I),
    "add_mask": (P, P, L, I, I),
    "decoder_bytes": (P, P),
    "decoder_forward": (P, P),
    "end_threads": (),
    "quantised_pack": (P, I, I, I, P, P),
    "quantised_multiply": (P, P, I, P, I, I),
    "read_memory": (P, ctypes.c_size_t, I),
}
RESULTS = {"decoder_bytes": ctypes.c_size_t, "decoder_forward": I, "read_memory": I}


def usable(*tensors: torch.Tensor | None) -> bool:
    """Return whether the kernels take these tensors: bf16 in the memory of a processor that has the units."""
    return all(t is None or _is_plain_bf16(t) for t in tensors) and library() is not None


def _is_plain_bf16(t: torch.Tensor) -> bool:
    return t.dtype is torch.bfloat16 and t.device.type == "cpu" and type(t) in (torch.Tensor, torch.nn.Parameter)


def call(name: str, *arguments: torch.Tensor | float | None) -> None:
    """Call a kernel; tensors, which must be contiguous, are passed by address."""
    values = []
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            assert argument.is_contiguous(), f"{name} takes contiguous tensors"
            argument = argument.data_ptr()
        values.append(argument)
    getattr(library(), name)(*values)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL | None:
    """Return the built kernels, or None; `why_not` gives the reason."""
    return None if why_not() else _load(_build())


@lru_cache(maxsize=1)
def why_not() -> str | None:
    """Return why PyTorch's own kernels are used, or None when ours are; builds them at the first call (seconds)."""
    if os.environ.get("PLINTH_KERNELS") == "torch":
        return "PLINTH_KERNELS=torch asks for PyTorch's own kernels"
    if not sys.platform.startswith("linux") or platform.machine() != "x86_64":
        return f"no kernels for {sys.platform} on {platform.machine()}"
    if missing := NEEDED - _processor_flags():
        return f"the processor lacks {', '.join(sorted(missing))}"
    if _compiler() is None:
        return NO_COMPILER
    try:
        if _load(_build()).request_tiles() != 0:
            return "the system does not let this process use the matrix unit"
    except (OSError, subprocess.SubprocessError) as error:
        detail = (getattr(error, "stderr", None) or str(error)).strip().splitlines()
        return f"the C compiler failed: {detail[0] if detail else error}"
    return None


def compiler_missing() -> bool:
    """Return whether a C compiler is all that our kernels lack here."""
    return why_not() == NO_COMPILER


def _processor_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def _compiler() -> str | None:
    return next((found for name in (os.environ.get("CC"), "cc", "gcc", "clang") if name and (found := shutil.which(name))), None)


@lru_cache(maxsize=1)
def _build() -> Path:
    """Return the shared library of this source on this processor, building it unless it lies in the cache."""
    sources = sorted(SOURCES.glob("*.c"))
    digest = hashlib.sha256("\0".join((*FLAGS, str(_compiler()), *sorted(_processor_flags()))).encode())
    for file in sorted(SOURCES.glob("*.[ch]")):
        digest.update(file.read_bytes())
    target = _cache_dir() / f"kernels-{digest.hexdigest()[:16]}.so"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            built = Path(folder) / target.name
            command = [_compiler(), *FLAGS, *map(str, sources), "-o", str(built), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            os.replace(built, target)
    return target


def _cache_dir() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "plinth"


@lru_cache(maxsize=1)
def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    loaded.request_tiles.restype = ctypes.c_long
    for name, arguments in SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, RESULTS.get(name)
    return loaded
