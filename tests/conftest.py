"""Fixtures for all tests: reproducible numbers, no backend from the environment, memory poisoned on request."""

import pytest
import torch


@pytest.fixture(autouse=True)
def same_conditions(monkeypatch):
    monkeypatch.delenv("RES2NET_FUSED_BACKEND", raising=False)
    torch.manual_seed(0)
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.backends.cudnn.conv, "fp32_precision", "ieee")
        monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "ieee")


@pytest.fixture
def poisoned_memory():
    """torch.empty and its kin give NaN: what a kernel leaves unwritten shows."""
    from res2net_fused.parity import poisoned_allocations

    with poisoned_allocations():
        assert torch.empty(3).isnan().all()
        yield
