"""The forward kernels with BatchNorm in training mode against float64."""

from __future__ import annotations

import pytest
import torch
from helpers import CHAINS, Chain
from training_cases import training_case
from triton_cases import error, poison_new_memory

BOUNDS = {torch.float32: 5e-6, torch.float16: 2e-3}


def run(case, monkeypatch, **keywords):
    with monkeypatch.context() as patch:
        poison_new_memory(patch)
        return case.run(backend="triton", **keywords)


def check(case, monkeypatch, dtype=torch.float32):
    result = run(case, monkeypatch)
    exact, zs, _ = case.exact(result.out)
    assert error(result.out, exact) <= BOUNDS[dtype]
    s = result.statistics
    for k, z in enumerate(zs):
        assert (s.mean[k] - z.mean((0, 2, 3))).norm() <= max(1e-5, BOUNDS[dtype]) * z.std((0, 2, 3)).norm()
        assert error(s.variance[k], z.var((0, 2, 3))) <= max(1e-5, BOUNDS[dtype])
        assert error(s.invstd[k], (z.var((0, 2, 3), correction=0) + case.eps[k]).rsqrt()) <= max(1e-5, BOUNDS[dtype])
    return result


@pytest.mark.parametrize("name", CHAINS)
def test_settings(name, monkeypatch):
    case = training_case(CHAINS[name], (2, 5, 6), torch.float32)
    if name != "depthwise":  # both formats
        case.x = case.x.contiguous(memory_format=torch.channels_last)
    check(case, monkeypatch)


@pytest.mark.parametrize("width", [1, 17, 40])
@pytest.mark.parametrize("settings", [{}, {"hierarchical": False, "pool": "avg3", "stride": 2}], ids=str)
def test_widths_in_half(width, settings, monkeypatch):
    case = training_case(Chain(settings, 3, width), (2, 6, 5), torch.float16)
    check(case, monkeypatch, torch.float16)


def test_many_tiles_of_pixels(monkeypatch):
    """More tiles than one round of the merge reads, the last one not full."""
    from res2net_fused.backends.triton.kernels import reductions

    monkeypatch.setattr(reductions, "ROWS", 2)
    check(training_case(Chain({}, 2, 4), (5, 13, 11), torch.float32), monkeypatch)


def test_means_far_from_zero(monkeypatch):
    case = training_case(Chain({"passthrough": "none"}, 1, 4), (4, 9, 8), torch.float32)
    case.x = case.x + 1e3
    result = run(case, monkeypatch)
    z = case.exact(result.out)[1][0]
    assert error(result.statistics.variance[0], z.var((0, 2, 3))) <= 1e-5


def test_repeated_calls_give_the_same_bits():
    case = training_case(Chain({}, 3, 5), (3, 9, 8), torch.float32)
    first, again = (case.run(backend="triton") for _ in range(2))
    assert torch.equal(first.out, again.out)
    assert all(torch.equal(a, b) for a, b in zip(vars(first.statistics).values(), vars(again.statistics).values(), strict=True))


def test_x_is_any_slice(monkeypatch):
    case = training_case(Chain({}, 3, 5), (2, 5, 6), torch.float32)
    wide = torch.full((2, case.x.shape[1] + 5, 7, 9), float("nan")).contiguous(memory_format=torch.channels_last)
    wide[:, 2:-3, 1:-1, 2:-1] = case.x
    case.x = wide[:, 2:-3, 1:-1, 2:-1]
    check(case, monkeypatch)
