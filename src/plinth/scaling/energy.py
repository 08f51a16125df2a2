"""Energy of a run: read from the processor's own counters where they are readable, else a labelled estimate."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
WATTS_PER_CORE = 10.0
JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True)
class Energy:
    """An amount of energy and how it is known."""

    joules: float
    """energy, joules"""
    measured: bool
    """True if read from a counter, False if estimated"""
    source: str
    """the counters read, or the assumption made"""


def estimate_energy(seconds: float, cores: int, watts_per_core: float = WATTS_PER_CORE) -> Energy:
    """Return the energy of `cores` busy cores for `seconds`, from an assumed power of a core with its share of memory."""
    source = f"estimate: {cores} cores x {watts_per_core:g} W, no counter read"
    return Energy(seconds * cores * watts_per_core, False, source)


class EnergyMeter:
    """Counts the energy between `start` and `read`; RAPL counters wrap around, so read at least once a minute.

    RAPL counts the whole package with every process on it, which the source says.
    """

    def __init__(self, cores: int, watts_per_core: float = WATTS_PER_CORE, powercap: Path = POWERCAP):
        self._cores = cores
        self._watts_per_core = watts_per_core
        self._domains = rapl_domains(powercap)
        self._last: dict[Path, int] = {}
        self._joules = 0.0
        self._started_s = 0.0

    def start(self) -> EnergyMeter:
        """Set the meter to zero and return it."""
        self._joules = 0.0
        self._started_s = time.perf_counter()
        self._last = {domain: _read_counter(domain / "energy_uj") for domain in self._domains}
        return self

    def read(self) -> Energy:
        """Return the energy since `start`."""
        if not self._domains:
            return estimate_energy(time.perf_counter() - self._started_s, self._cores, self._watts_per_core)
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


def _read_counter(path: Path) -> int:
    return int(path.read_text().strip())


def _read_name(domain: Path) -> str:
    return (domain / "name").read_text().strip()
