"""The tables of docs/transfer.md, from their record."""

from __future__ import annotations

from typing import Any


def ulmfit_table(record: dict[str, Any]) -> str:
    """Return the low-shot curve and the ablations."""
    return ""
