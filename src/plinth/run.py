"""The run directory: create, resume, provenance, metrics, and publishing by rename."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from plinth import __version__
from plinth.config import UserError, read_json, save_json, write_atomic

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

TRACKED_VERSIONS = ("torch", "triton", "numpy", "tokenizers", "safetensors", "daft", "pyarrow")
TEMPORARY_NAME = r"\..+\.[a-z0-9_]{8}"  # what publish_dir and write_atomic write before they rename it
MODEL_STAGES = ("dpo", "sft", "pretrain")  # the later the stage, the sooner it is served


class Run:
    """One stage's directory: config.json, provenance.json, metrics.jsonl, checkpoints/, model/, evals/, DONE."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._unwritten = b""  # logged lines that a full disk refused

    @classmethod
    def create(
        cls,
        path: Path,
        stage: str,
        config: dict[str, Any],
        parents: list[Path] | tuple[Path, ...] = (),
        argv: list[str] | None = None,
        seed: int | None = None,
    ) -> Run:
        """Make the directory and write config.json and provenance.json.

        `parents` are the artefacts this run is made from; each is recorded with its hash.
        Raises UserError when `path` already holds a run or any other files.
        """
        run = cls(path)
        run.check_free()
        run.path.mkdir(parents=True, exist_ok=True)
        save_json(run.path / "config.json", config)
        provenance = {
            "stage": stage,
            "argv": list(sys.argv if argv is None else argv),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": installed_versions(),
            "hardware": describe_hardware(),
            "seed": seed,
            "parents": [parent_record(parent) for parent in parents],
        }
        save_json(run.path / "provenance.json", provenance)
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open an existing run. Raises UserError when `path` holds none."""
        run = cls(path)
        if not (run.path / "config.json").exists():
            raise UserError(f"{path} holds no run (no config.json). Name a directory that a plinth verb wrote with --out.")
        return run

    def check_free(self) -> None:
        """Raise UserError unless the directory is absent or empty."""
        if self.path.is_file():
            raise UserError(f"{self.path} is a file. Pass --out with the name of a new directory.")
        if (self.path / "config.json").exists():
            state = "finished" if self.is_done else f"step {self.last_step}"
            raise UserError(f"{self.path} already holds a run ({state}). Pass --resume to continue it, or --out with a new name.")
        if self.path.exists() and any(self.path.iterdir()):
            raise UserError(f"{self.path} is not empty and holds no run. Pass --out with the name of a new directory.")

    @property
    def config(self) -> dict[str, Any]:
        return read_json(self.path / "config.json")

    @property
    def provenance(self) -> dict[str, Any]:
        return read_json(self.path / "provenance.json")

    @property
    def model_dir(self) -> Path:
        return self.path / "model"

    @property
    def checkpoints_dir(self) -> Path:
        return self.path / "checkpoints"

    @property
    def evals_dir(self) -> Path:
        return self.path / "evals"

    @property
    def is_done(self) -> bool:
        return (self.path / "DONE").exists()

    @property
    def summary(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None while the run is unfinished."""
        return read_json(self.path / "DONE") if self.is_done else None

    @property
    def duration_s(self) -> float:
        """Return the seconds that a finished run took."""
        return (self.summary or {}).get("time_s", 0.0)

    def checkpoint_path(self, step: int) -> Path:
        """Return where the checkpoint of a step is published."""
        return self.checkpoints_dir / f"step_{step:06d}"

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Return (step, folder) of the published checkpoints, oldest first; unfinished ones carry another name."""
        found = (path for path in self.checkpoints_dir.glob("step_*") if is_checkpoint(path))
        return sorted((int(path.name.removeprefix("step_")), path) for path in found)

    @property
    def last_step(self) -> int:
        """Return the newest checkpointed step, 0 when there is none."""
        return max((step for step, _ in self.checkpoints()), default=0)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes from writing this folder meanwhile; the system lifts the lock when a process dies.

        Raises UserError when another process holds it. Where the file system knows no locks there is none.
        """
        descriptor = os.open(self.path, os.O_RDONLY) if fcntl is not None else None
        try:
            with contextlib.suppress(OSError):
                try:
                    if descriptor is not None:
                        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise UserError(f"{self.path} is being written by another process. Wait until it ends, or stop it first.") from None
            yield
        finally:
            if descriptor is not None:
                os.close(descriptor)

    def remove_unfinished(self) -> None:
        """Remove the temporary files and folders that a killed process left beside what it was writing."""
        for folder in (self.path, self.checkpoints_dir):
            for path in folder.glob(".*"):
                if re.fullmatch(TEMPORARY_NAME, path.name):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def log(self, **fields: Any) -> None:
        """Append one JSON line to metrics.jsonl; lines that the system refuses are kept in memory and tried again."""
        self._unwritten += (json.dumps(fields) + "\n").encode()
        with contextlib.suppress(OSError):  # raised by flush_metrics, before each checkpoint and at the end
            self.flush_metrics()

    def flush_metrics(self) -> None:
        """Write the lines that are still in memory, all or none. Raises OSError when the system refuses them."""
        if not self._unwritten:
            return
        with (self.path / "metrics.jsonl").open("ab", buffering=0) as file:
            end, rest = file.seek(0, os.SEEK_END), self._unwritten
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError as error:
                file.truncate(end)
                raise OSError(error.errno, error.strerror, file.name) from None
        self._unwritten = b""

    def sync_metrics(self) -> None:
        """Bring metrics.jsonl from the system's memory to the disk."""
        if (self.path / "metrics.jsonl").exists():
            _sync(self.path / "metrics.jsonl")

    def metrics(self) -> list[dict[str, Any]]:
        """Read metrics.jsonl; a last line cut off by a crash is left out."""
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        records = []
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                record = json.loads(line)
                records += [record] if isinstance(record, dict) else []
        return records

    def truncate_metrics(self, step: int) -> int:
        """Drop logged steps after `step`, so that a resumed run logs each step once; return how many before it are lost."""
        kept = [record for record in self.metrics() if record.get("step", 0) <= step]
        write_atomic(self.path / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in kept))
        return step - len({record["step"] for record in kept if "step" in record})

    def finish(self, summary: dict[str, Any]) -> None:
        """Mark the run as done."""
        self.flush_metrics()
        (self.path / "FAILED.txt").unlink(missing_ok=True)
        save_json(self.path / "DONE", summary)

    def fail(self, text: str) -> None:
        """Say why the run stopped."""
        write_atomic(self.path / "FAILED.txt", text.rstrip() + "\n")


def is_checkpoint(path: Path) -> bool:
    """Return whether a folder has the name of a published checkpoint."""
    return re.fullmatch(r"step_\d{6,}", path.name) is not None


def installed_versions() -> dict[str, str]:
    """Return the versions of Python, Plinth and the libraries that numbers may depend on."""
    versions = {"python": platform.python_version(), "plinth": __version__}
    for name in TRACKED_VERSIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions


def describe_hardware() -> dict[str, Any]:
    """Return the processor's name, its usable cores, the memory in bytes, and the GPUs that PyTorch sees where it is loaded."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":", 1)[1].strip()
                break
    system = platform.platform()
    hardware: dict[str, Any] = {"cpu": cpu, "cores": usable_cores(), "memory_bytes": physical_memory_bytes(), "system": system}
    gpus = describe_gpus()
    return {**hardware, "gpus": gpus} if gpus else hardware


def physical_memory_bytes() -> int | None:
    """Return the size of the machine's memory, or None where the system does not say."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def describe_gpus() -> list[dict[str, Any]]:
    """Return name, memory in bytes, compute capability, driver and CUDA version of each GPU that PyTorch sees.

    Stages that have not loaded PyTorch use no GPU, and loading it takes seconds: for them the list is empty.
    """
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    driver = None
    with contextlib.suppress(OSError):
        found = re.search(r"Kernel Module.*?(\d+(?:\.\d+)+)", Path("/proc/driver/nvidia/version").read_text())
        driver = found[1] if found else None
    return [
        {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "driver": driver,
            "cuda": torch.version.cuda,
        }
        for properties in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    ]


def usable_cores() -> int:
    """Return how many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parent_record(path: Path) -> dict[str, Any]:
    """Return path, stage and content hash of an artefact that a run is made from."""
    path = Path(path)
    target = path / "model" if (path / "model").is_dir() else path
    stage = path.name
    if (path / "provenance.json").exists():
        stage = read_json(path / "provenance.json").get("stage", stage)
    digest = tree_sha256(target) if target.is_dir() else file_sha256(target)
    return {"path": str(path), "stage": stage, "sha256": digest}


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_sha256(path: Path) -> str:
    """Return one SHA-256 over the names and contents of all files under a directory."""
    digest = hashlib.sha256()
    for file in sorted(p for p in Path(path).rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


@contextlib.contextmanager
def publish_dir(final: Path) -> Iterator[Path]:
    """Give a temporary sibling directory that becomes `final` by one rename when the block ends well.

    On an error nothing is left behind. An existing `final` is replaced.
    """
    final = Path(final)
    final.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}."))
    temporary.chmod(0o755)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        _sync(temporary)
        if final.exists():
            _swap_away(final)
        os.replace(temporary, final)
        _sync(final.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _swap_away(final: Path) -> None:
    old = Path(tempfile.mkdtemp(dir=final.parent, prefix=f".{final.name}.old."))
    os.replace(final, old)
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_model(path: Path) -> Path:
    """Return the model folder that a run, a build, or a folder in Hugging Face's format stands for.

    Of a build's stages the latest finished one is taken: DPO, then SFT, then pretraining.
    Raises UserError when there is none.
    """
    path = Path(path)
    if (path / "model" / "config.json").exists():
        return path / "model"
    for stage in MODEL_STAGES:
        if (path / stage / "DONE").exists() and (path / stage / "model" / "config.json").exists():
            return path / stage / "model"
    if (path / "config.json").exists() and any(path.glob("*.safetensors")):
        return path
    if not path.exists():
        raise UserError(f"{path} does not exist. Name a run directory, a build directory or a model folder.")
    if (path / "adapter_config.json").exists():
        raise UserError(
            f"{path} holds an adapter and no model. Name the model that it belongs to: `plinth generate MODEL --adapter {path}`."
        )
    raise UserError(f"{path} holds no finished model. Finish it with --resume, or name another run.")


class Progress:
    """A progress bar with an estimate of the time left, on standard error; silent when that is no terminal."""

    def __init__(self, total: float, description: str, unit: str = "step", *, shown: bool = True):
        self.total, self.description, self.unit, self.shown = total, description, unit, shown
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed:.0f}/{task.total:.0f} " + self.unit),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=Console(stderr=True),
            )
            self._bar.start()
            self._task = self._bar.add_task(self.description, total=self.total, note="")
        return self

    def update(self, advance: float = 1, note: str = "") -> None:
        """Move on by `advance` units and show `note` behind the bar."""
        if self._bar is not None:
            self._bar.update(self._task, advance=advance, note=note)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
