"""Energy of a run: read from counters of processor and GPUs where they are readable, else a labelled estimate."""

from __future__ import annotations

import contextlib
import importlib
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

POWERCAP = Path("/sys/class/powercap")
WATTS_PER_CORE = 10.0
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Energy:
    """An amount of energy and how it is known."""

    joules: float
    """energy, joules"""
    measured: bool
    """True if all of it was read from counters, False if a part is estimated or not counted"""
    source: str
    """the counters read, or the assumption made"""


def estimate_energy(seconds: float, cores: int, watts_per_core: float = WATTS_PER_CORE) -> Energy:
    """Return the energy of `cores` busy cores for `seconds`, from an assumed power of a core with its share of memory."""
    source = f"estimate: {cores} cores x {watts_per_core:g} W, no counter read"
    return Energy(seconds * cores * watts_per_core, False, source)


class GpuMeter(Protocol):
    """Counts the energy of some GPUs since it was made."""

    source: str

    def joules(self) -> float: ...

    def close(self) -> None: ...


class EnergyMeter:
    """Counts the energy between `start` and `read`; RAPL counters wrap around, so read at least once a minute.

    RAPL counts the whole package with every process on it, which the source says. `gpus` are the identifiers (UUIDs as CUDA and
    NVML write them) of the GPUs that the run uses; they are counted by NVML or nvidia-smi on top of the processor.
    """

    def __init__(self, cores: int, watts_per_core: float = WATTS_PER_CORE, powercap: Path = POWERCAP, gpus: Sequence[str] = ()):
        self._cores = cores
        self._watts_per_core = watts_per_core
        self._domains = rapl_domains(powercap)
        self._gpus = tuple(gpus)
        self._gpu_meter: GpuMeter | None = None
        self._last: dict[Path, int] = {}
        self._joules = 0.0
        self._started_s = 0.0

    def start(self) -> EnergyMeter:
        """Set the meter to zero and return it."""
        self._joules = 0.0
        self._started_s = time.perf_counter()
        self._last = {domain: _read_counter(domain / "energy_uj") for domain in self._domains}
        self.close()
        self._gpu_meter = open_gpu_meter(self._gpus) if self._gpus else None
        return self

    def read(self) -> Energy:
        """Return the energy since `start`."""
        energy = self._read_rapl() if self._domains else self._estimate()
        if not self._gpus:
            return energy
        if self._gpu_meter is None:
            left_out = f"{len(self._gpus)} GPUs not counted: neither NVML (pip install nvidia-ml-py) nor nvidia-smi answers"
            return Energy(energy.joules, False, f"{energy.source}; {left_out}")
        return Energy(energy.joules + self._gpu_meter.joules(), energy.measured, f"{energy.source}; {self._gpu_meter.source}")

    def close(self) -> None:
        """Let go of the GPUs' counters."""
        if self._gpu_meter is not None:
            self._gpu_meter.close()
            self._gpu_meter = None

    def _estimate(self) -> Energy:
        return estimate_energy(time.perf_counter() - self._started_s, self._cores, self._watts_per_core)

    def _read_rapl(self) -> Energy:
        for domain, before in self._last.items():
            now = _read_counter(domain / "energy_uj")
            if now < before:
                before -= _read_counter(domain / "max_energy_range_uj")
            self._joules += (now - before) * 1e-6
            self._last[domain] = now
        names = ", ".join(_read_name(domain) for domain in self._domains)
        return Energy(self._joules, True, f"measured: RAPL {names}, all processes of the machine")


def rapl_domains(powercap: Path = POWERCAP) -> list[Path]:
    """Return the readable RAPL domains that add up to processor and memory: packages, and DRAM beside them.

    Cores and graphics are parts of their package, and `psys` contains packages: those would be counted twice.
    """
    found = []
    for domain in sorted(powercap.glob("intel-rapl:*")):
        try:
            name = _read_name(domain)
            _read_counter(domain / "energy_uj")
            _read_counter(domain / "max_energy_range_uj")
        except (OSError, ValueError):
            continue
        if name.startswith("package") or name == "dram":
            found.append(domain)
    return found


def open_gpu_meter(uuids: Sequence[str]) -> GpuMeter | None:
    """Return a meter for these GPUs: NVML's counter, else nvidia-smi's power summed up, else None."""
    for meter in (NvmlMeter, NvidiaSmiMeter):
        with contextlib.suppress(MeterUnavailable):
            return meter(uuids)
    return None


class MeterUnavailable(Exception):
    """This way of reading a GPU's energy does not work here."""


class NvmlMeter:
    """The counter of total energy that NVIDIA's management library keeps for each device from Volta on."""

    def __init__(self, uuids: Sequence[str]):
        try:
            self._nvml = importlib.import_module("pynvml")
            self._nvml.nvmlInit()
            self._handles = [self._nvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
            self._start_j = self._total_j()
        except Exception as error:  # pynvml raises classes of its own for no driver, no device, no permission, no counter
            raise MeterUnavailable(str(error)) from error
        self.source = f"measured: NVML, {len(uuids)} GPUs"

    def joules(self) -> float:
        """Return the energy since the meter was made."""
        return self._total_j() - self._start_j

    def close(self) -> None:
        self._nvml.nvmlShutdown()

    def _total_j(self) -> float:
        return sum(self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle) for handle in self._handles) * 1e-3


class NvidiaSmiMeter:
    """Power that nvidia-smi prints once a second, summed up by a thread; between two lines power counts as constant."""

    def __init__(self, uuids: Sequence[str], interval_s: float = 1.0):
        program = shutil.which("nvidia-smi")
        if program is None:
            raise MeterUnavailable("nvidia-smi is not installed")
        self._joules = 0.0
        self._watts: dict[int, float] = {}
        self._num_gpus = len(uuids)
        command = [program, "-i", ",".join(uuids), "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
        self._process = subprocess.Popen(
            [*command, "-lms", str(int(1000 * interval_s))],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        assert self._process.stdout is not None
        self._last_s = time.perf_counter()
        try:
            self._add(0, float(self._process.stdout.readline()))
        except ValueError as error:  # no line, or [N/A]: the device does not tell its power
            self.close()
            raise MeterUnavailable("nvidia-smi tells no power") from error
        threading.Thread(target=self._follow, daemon=True).start()
        self.source = f"measured: nvidia-smi, power of {len(uuids)} GPUs every {interval_s:g} s"

    def joules(self) -> float:
        """Return the energy since the meter was made, up to the last line."""
        return self._joules

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        with contextlib.suppress(ValueError):  # the stream is closed under the thread when the meter is
            for count, line in enumerate(self._process.stdout, start=1):
                self._add(count % self._num_gpus, float(line))

    def _add(self, gpu: int, watts: float) -> None:
        """Take the power of one GPU; once all have told theirs, count the time since the round before."""
        self._watts[gpu] = watts
        if gpu == self._num_gpus - 1:
            now = time.perf_counter()
            self._joules += sum(self._watts.values()) * (now - self._last_s)
            self._last_s = now


def _read_counter(path: Path) -> int:
    return int(path.read_text().strip())


def _read_name(domain: Path) -> str:
    return (domain / "name").read_text().strip()
