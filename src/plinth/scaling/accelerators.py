"""Accelerators as values: rates, memory, links and power, each with where the number comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from plinth.config import UserError, nearest

SHEETS = "data sheets of the makers, dense rates, memory as labelled in units of 10^9 bytes"
MEASURED = "measured maximum of a matrix product: ml-engineering (S. Bekman), compute/accelerator, table of maximum achievable FLOPS"
HOPPER_SHARE = 0.74
"""calibrated on three rows of `published.py`: what of the measured maximum large products sustain in training on an H100"""
AMPERE_SHARE = 0.85
"""calibrated on two rows of `published.py`: the same on an A100"""


@dataclass(frozen=True)
class Accelerator:
    """What one accelerator can do; rates are a second and links a direction."""

    name: str
    """what `--gpu` takes"""
    label: str
    """its maker's name"""
    peak_bf16: float
    """bf16 FLOP/s of the data sheet without sparsity; model FLOPs utilisation is a share of it"""
    matmul_bf16: float
    """bf16 FLOP/s that the fastest matrix product was measured to reach, or 0.8 of the peak where none was"""
    memory_bytes: float
    """memory as labelled; what the driver and the collectives library take is about what the label leaves out"""
    memory_bandwidth: float
    """bytes/s of its memory"""
    link_bandwidth: float
    """bytes/s to the other accelerators of a node"""
    network_bandwidth: float
    """bytes/s of its share of the node's network cards"""
    watts: float
    """power limit"""
    peak_fp8: float | None = None
    """fp8 FLOP/s of the data sheet; None where it has no such units"""
    matmul_fp8: float | None = None
    """fp8 FLOP/s that the fastest matrix product was measured to reach"""
    sustained_share: float = HOPPER_SHARE
    """share of matmul_bf16 and matmul_fp8 that the large products of a training step sustain"""
    calibrated: bool = False
    """whether sustained_share comes from published runs on it; else it is the H100's"""
    source: str = f"{SHEETS}; {MEASURED}"
    """where its numbers come from"""

    def matmul_rate(self, dtype: str) -> float:
        """Return the FLOP/s that matrix products sustain in training. Raises UserError for fp8 where it has no units for it."""
        if dtype == "bf16":
            return self.matmul_bf16 * self.sustained_share
        if self.matmul_fp8 is None:
            able = ", ".join(each.name for each in ACCELERATORS.values() if each.matmul_fp8 is not None)
            raise UserError(f"dtype={dtype!r}: {self.label} has no fp8 rate in the table. Use bf16, or one of {able}.")
        return self.matmul_fp8 * self.sustained_share


H100 = Accelerator(
    "h100-sxm", "NVIDIA H100 SXM 80 GB", 989e12, 794.5e12, 80e9, 3.35e12, 450e9, 50e9, 700, 1979e12, 1402.6e12, calibrated=True
)
A100 = Accelerator("a100-sxm", "NVIDIA A100 SXM 80 GB", 312e12, 271.2e12, 80e9, 2.0e12, 300e9, 25e9, 400,
                   sustained_share=AMPERE_SHARE, calibrated=True)  # fmt: skip
# Power of a chip rises with about the cube of its clock, so a limit of 500 of 700 W leaves (5/7)^(1/3) of the rate.
CAPPED = (500 / 700) ** (1 / 3)

ACCELERATORS: Mapping[str, Accelerator] = {
    each.name: each
    for each in (
        A100,
        Accelerator("a100-sxm-40gb", "NVIDIA A100 SXM 40 GB", 312e12, 271.2e12, 40e9, 1.555e12, 300e9, 25e9, 400,
                    sustained_share=AMPERE_SHARE, calibrated=True),
        H100,
        Accelerator("h100-sxm-500w", "NVIDIA H100 SXM 96 GB HBM2e at 500 W", 989e12, 794.5e12 * CAPPED, 96e9, 2.4e12, 450e9, 50e9, 500,
                    1979e12, 1402.6e12 * CAPPED, calibrated=True,
                    source="torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, describes it; rates scaled by (500/700)^(1/3)"),
        Accelerator("h200-sxm", "NVIDIA H200 SXM 141 GB", 989e12, 794.5e12, 141e9, 4.8e12, 450e9, 50e9, 700, 1979e12, 1453.4e12,
                    calibrated=True),
        Accelerator("b200-sxm", "NVIDIA B200 SXM 180 GB", 2250e12, 1745e12, 180e9, 8.0e12, 900e9, 50e9, 1000, 4500e12, 3432.5e12),
        Accelerator("mi300x", "AMD Instinct MI300X 192 GB", 1307e12, 668.4e12, 192e9, 5.3e12, 448e9, 50e9, 750),
        Accelerator("h100-pcie", "NVIDIA H100 PCIe 80 GB", 756e12, 0.8 * 756e12, 80e9, 2.0e12, 64e9, 25e9, 350, source=SHEETS),
        Accelerator("l40s", "NVIDIA L40S 48 GB", 362e12, 0.8 * 362e12, 48e9, 0.864e12, 32e9, 25e9, 350, source=SHEETS),
    )
}  # fmt: skip


def find_accelerator(name: str) -> Accelerator:
    """Return an accelerator of the table. Raises UserError that lists them."""
    if name not in ACCELERATORS:
        raise UserError(f"gpu={name!r} is not in the table.{nearest(name, ACCELERATORS)} Known: {', '.join(ACCELERATORS)}.")
    return ACCELERATORS[name]
