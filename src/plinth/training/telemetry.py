"""What a run tells of itself: a line a step in metrics.jsonl with speed, MFU, energy, cost and CO2, and to the trackers."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from plinth.config import UserError
from plinth.energy import JOULES_PER_KWH, WATTS_PER_CORE, Energy, EnergyMeter
from plinth.run import Run
from plinth.training.trackers import Trackers, check_trackers

if TYPE_CHECKING:  # the command line reads TelemetryConfig before torch is needed
    from plinth.training.spikes import Incident
    from plinth.training.step import StepResult

ENERGY_EVERY_S = 1.0


@dataclass(frozen=True)
class TelemetryConfig:
    """Where metrics go, and what energy costs."""

    trackers: tuple[str, ...] = ()
    """where metrics go beside metrics.jsonl: tensorboard, wandb (extra `trackers`)"""
    watts_per_core: float = WATTS_PER_CORE
    """power of a busy core with its share of memory and supply, watts, where no counter is readable"""
    price_per_kwh: float | None = None
    """price of electricity, a currency unit a kWh (default: none, and no cost of energy is stated)"""
    price_per_hour: float | None = None
    """price of the machine, a currency unit an hour; adds to the price of electricity (default: none)"""
    co2_g_per_kwh: float | None = None
    """grams of CO2 equivalent a kWh of your grid (default: none, and no CO2 is stated)"""

    def __post_init__(self) -> None:
        for name in ("watts_per_core", "price_per_kwh", "price_per_hour", "co2_g_per_kwh"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UserError(f"{name}={value} must be a number from 0 up.")

    def check(self) -> None:
        """Raise UserError when a tracker cannot be had here."""
        check_trackers(self.trackers)

    def spending(self, energy_kwh: float, time_s: float) -> dict[str, float]:
        """Return `cost` and `co2_g` of so much energy and time, each only where its price or factor is given."""
        spent = {}
        if self.price_per_kwh is not None or self.price_per_hour is not None:
            spent["cost"] = energy_kwh * (self.price_per_kwh or 0.0) + time_s / 3600.0 * (self.price_per_hour or 0.0)
        if self.co2_g_per_kwh is not None:
            spent["co2_g"] = energy_kwh * self.co2_g_per_kwh
        return spent


class Telemetry:
    """Logs the steps of one run, and counts its energy on over resumes, steps that a crash undid included.

    Build it before the metrics are cut to the step of a resume, and call `begin` after that.
    """

    def __init__(
        self,
        run: Run,
        config: TelemetryConfig,
        *,
        cores: int,
        gpus: Sequence[str] = (),
        flops_per_token: float | None = None,
        matmul_flops_per_s: float | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ):
        config.check()
        self.run, self.config, self._warn = run, config, warn
        self._mfu_factor = flops_per_token / matmul_flops_per_s if flops_per_token and matmul_flops_per_s else None
        self._earlier_kwh = next((record["energy_kwh"] for record in reversed(run.metrics()) if record.get("energy_kwh")), 0.0)
        self._meter = EnergyMeter(cores, config.watts_per_core, gpus=gpus).start()
        self._energy: Energy | None = None
        self._read_at = -math.inf
        self._trackers: Trackers | None = None
        self._source_logged = False

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *_: object) -> None:
        self._meter.close()
        if self._trackers is not None:
            self._trackers.close()

    def begin(self, step: int) -> None:
        """Open the trackers; `step` updates are done already. Raises UserError when one cannot be had."""
        self._trackers = Trackers(self.config.trackers, self.run, step + 1, self._warn)

    def log(
        self,
        step: int,
        result: StepResult,
        *,
        lr: float,
        step_s: float,
        time_s: float,
        tokens: int,
        incident: Incident | None = None,
        more: dict[str, float] | None = None,
    ) -> str:
        """Write the line of a step (counted from 1) and return a note for the progress bar.

        `tokens` and `time_s` are totals of the run, `more` fields of the stage. A loss or norm that is not finite is
        written as null.
        """
        tokens_per_s = result.count / step_s
        mfu = tokens_per_s * self._mfu_factor if self._mfu_factor else None
        record = {
            "step": step, "time_s": round(time_s, 3), "loss_nats": _finite(result.loss_nats), "lr": lr,
            "grad_norm": _finite(result.grad_norm), "tokens_per_s": round(tokens_per_s, 1), "mfu": mfu, "tokens": tokens,
            **self._energy_fields(time_s), **(more or {}), **{name: _finite(value) for name, value in result.metrics.items()},
        }  # fmt: skip
        if incident is not None:
            record |= incident.fields | ({"skipped": True} if incident.action == "skip" else {})
        self.run.log(**record)
        assert self._trackers is not None, "begin() comes first"
        self._trackers.log(step, record)
        return f"loss {result.loss_nats:.3f}  {tokens_per_s:,.0f} tokens/s" + (f"  MFU {mfu:.0%}" if mfu else "")

    def log_stop(self, incident: Incident) -> None:
        """Write down the update that training stopped before."""
        self.run.log(step=incident.step, **incident.fields)

    def summary(self, time_s: float) -> dict[str, Any]:
        """Return energy, how it is known, and cost and CO2 where prices are given, of the whole run so far."""
        self._read_at = -math.inf
        fields = self._energy_fields(time_s)
        assert self._energy is not None
        return fields | {"energy_source": self._energy.source, "energy_measured": self._energy.measured}

    def _energy_fields(self, time_s: float) -> dict[str, Any]:
        """Return the cumulative energy, read at most once a second; its source is told the first time."""
        now = time.monotonic()
        if self._energy is None or now - self._read_at >= ENERGY_EVERY_S:
            self._energy, self._read_at = self._meter.read(), now
        kwh = self._earlier_kwh + self._energy.joules / JOULES_PER_KWH
        fields: dict[str, Any] = {"energy_kwh": float(f"{kwh:.6g}")}
        fields |= {name: float(f"{value:.6g}") for name, value in self.config.spending(kwh, time_s).items()}
        if not self._source_logged:
            fields["energy_source"] = self._energy.source
            self._source_logged = True
        return fields


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def gpu_ids(device: str) -> tuple[str, ...]:
    """Return the identifiers, as NVML writes them, of the GPUs of this machine that the run uses: none on a CPU.

    Of several processes that torchrun started here, each gets the GPUs of all; only one of them logs.
    """
    import torch

    if torch.device(device).type != "cuda":
        return ()
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    own = torch.device(device).index
    indices = range(min(local, torch.cuda.device_count())) if local > 1 else [torch.cuda.current_device() if own is None else own]
    return tuple(f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in indices)
