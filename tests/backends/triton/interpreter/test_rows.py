"""The Triton kernel of the chain along rows against float64, in the interpreter."""

from __future__ import annotations

import pytest
import torch
from chain1d_cases import CHAINS, arguments, leaves, to_float64
from helpers import assert_close
from triton_cases import poison_new_memory

from res2net_fused import hierarchical_conv1d
from res2net_fused.chain import reference
from res2net_fused.chain.config import Chain1dConfig

BOUNDS = {torch.float32: 5e-6, torch.float16: 2e-3}


def check(settings, tensors, monkeypatch):
    with monkeypatch.context() as patch:
        poison_new_memory(patch)
        out = hierarchical_conv1d(*tensors, **settings, backend="triton")
    expected = reference.hierarchical_conv1d(*to_float64(tensors), Chain1dConfig(**settings))
    assert_close(out, expected, BOUNDS[out.dtype])


@pytest.mark.parametrize("extras", [True, False], ids=["", "bare"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize("name", CHAINS)
def test_settings(name, dtype, extras, monkeypatch):
    settings, tensors = arguments(name, (2, 13), dtype, extras)
    check(settings, tensors, monkeypatch)


@pytest.mark.parametrize("length", [33, 64, 131])
@pytest.mark.parametrize("name", ["speechbrain", "espnet"])
def test_many_tiles_of_a_row(name, length, monkeypatch):
    settings, tensors = arguments(name, (1, length), torch.float32)
    check(settings, tensors, monkeypatch)


@pytest.mark.parametrize("width", [1, 17, 40, 70])
def test_widths(width, monkeypatch):
    """Several tiles of channels, the last one not full."""
    weights = [torch.randn(width, width, 3) * (2 / (3 * width)) ** 0.5 for _ in range(2)]
    lists = [[torch.randn(width) for _ in range(2)] for _ in range(3)]
    x = torch.randn(2, 3 * width, 37)
    for dtype in BOUNDS:
        tensors = [x.to(dtype), [w.to(dtype) for w in weights], *lists]
        check({"padding_mode": "reflect", "dilation": 2}, tensors, monkeypatch)


@pytest.mark.parametrize("kind", ["channels_last", "slice"])
def test_layouts(kind, monkeypatch):
    settings, (x, *others) = arguments("speechbrain", (2, 13), torch.float32)
    if kind == "channels_last":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        x = torch.nn.functional.pad(x, (1, 2, 3, 1))[:, 3:-1, 1:-2]
    check(settings, [x, *others], monkeypatch)


@pytest.mark.parametrize("name", ["speechbrain", "first_added", "silu", "relu6"])
def test_gradients(name):
    settings, tensors = arguments(name, (2, 13), torch.float32)
    doubles = to_float64(tensors)
    results = []
    for given, backend in ((tensors, "triton"), (doubles, "reference")):
        parameters = [t.requires_grad_() for t in leaves(given)]
        out = hierarchical_conv1d(*given, **settings, backend=backend)
        results.append(torch.autograd.grad(out.square().sum(), parameters))
    for ours, expected in zip(*results, strict=True):
        assert_close(ours, expected, 1e-5)


def test_nan_stays_where_it_belongs():
    settings, (x, *others) = arguments("espnet", (2, 70), torch.float32)
    x[1, :4, 0] = torch.nan
    out = hierarchical_conv1d(x, *others, **settings, backend="triton").isnan()
    expected = reference.hierarchical_conv1d(x, *others, Chain1dConfig(**settings)).isnan()
    assert torch.equal(out, expected) and expected.any()
