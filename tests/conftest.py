"""Fixtures that several folders share."""

import pytest

from plinth.ops import kernels


@pytest.fixture
def torch_kernels(monkeypatch):
    """Run every operation on PyTorch's own kernels, as on a processor or system that ours do not fit."""
    monkeypatch.setenv("PLINTH_KERNELS", "torch")
    for cached in (kernels.library, kernels.why_not):
        cached.cache_clear()
    yield
    monkeypatch.undo()
    for cached in (kernels.library, kernels.why_not):
        cached.cache_clear()
