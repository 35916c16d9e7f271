"""Offsets beyond 2^31 elements in the Triton kernels, in memory of which only a few pages exist; how long a launch may be."""

from __future__ import annotations

import pytest
import torch
from helpers import sparse_zeros, spread_out
from triton.runtime.interpreter import interpreter_builder
from triton_cases import error, make_case, poison_new_memory

from res2net_fused import hierarchical_conv1d
from res2net_fused.backends import triton as triton_backend
from res2net_fused.backends.selection import get_backend
from res2net_fused.backends.triton import step_plan
from res2net_fused.backends.triton.kernels.common import GroupView
from res2net_fused.backends.triton.kernels.conv3x3_fwd import chain_calls
from res2net_fused.backends.triton.kernels.pointwise import Pixels, pointwise_call
from res2net_fused.backends.triton.step_plan import plan_steps
from res2net_fused.backends.triton.tiles import Tile
from res2net_fused.chain.config import ChainConfig

STRIDES = {
    # of images, rows and pixels in elements; of 8 channels, so that they are counted in units of 4 or 8
    "images": (2**31 + 2**20, 2**10, 2**7),
    "rows": (2**16, 2**31 + 2**20, 2**11),
    "rows in units": (2**16, 2**30, 2**11),
    "pixels": (2**15, 2**12, 2**31 + 2**20),
}
strides = pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES.keys())
CONFIGS = {
    "added": ChainConfig(),
    "pooled": ChainConfig(pool="avg3"),
    "first_added": ChainConfig(passthrough="first_added", pool="avg3_nopad"),
    "stage": ChainConfig(stride=2, pool="avg3", hierarchical=False),
    "groups": ChainConfig(groups=2, dilation=2),
}


@strides
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_x(config, strides) -> None:
    case = make_case(config, width=8, scale=3, size=(4, 3))
    expected = case.run()
    case.x = spread_out(case.x, strides)
    assert torch.equal(case.run(), expected)


@strides
@pytest.mark.parametrize("config", [CONFIGS["first_added"], CONFIGS["stage"]], ids=["first_added", "stage"])
def test_out(config, strides, monkeypatch) -> None:
    case = make_case(config, width=8, scale=3, size=(4, 3))
    expected, problem = case.run(), case.problem
    out = spread_out(torch.full_like(expected, torch.nan), strides)
    poison_new_memory(monkeypatch)
    packed = triton_backend.chain.pack(case.weights, case.biases, config)
    for call in chain_calls(problem, plan_steps(problem, (9, 0)), GroupView(case.x, 8, 8), GroupView(out, 8, 8), *packed):
        call.run()
    assert torch.equal(out, expected)


@strides
@pytest.mark.parametrize("config", [CONFIGS["added"], CONFIGS["groups"]], ids=["added", "groups"])
def test_backward(config, strides) -> None:
    case = make_case(config, width=8, scale=3, size=(4, 3))
    out = case.run()
    grad = torch.randn_like(out)
    backend, needed = get_backend("triton"), (True, True, True)
    expected = backend.chain_backward(case.problem, grad, case.x, out, case.weights, needed)
    far = [spread_out(t, strides) for t in (grad, case.x, out)]
    found = backend.chain_backward(case.problem, *far, case.weights, needed)
    for a, b in zip((found[0], *found[1], *found[2]), (expected[0], *expected[1], *expected[2]), strict=True):
        assert torch.equal(a, b)


def test_pixels_of_a_whole_batch() -> None:
    """The first and the last program of a 1x1 convolution over 2^32 pixels of one image."""
    pixels, tile = 2**32, Tile(16, 16, 16, 1, 1)
    x, out = sparse_zeros(2 * pixels, torch.float16), sparse_zeros(2 * pixels, torch.float16)
    weight, bias = torch.eye(2, dtype=torch.float16), torch.ones(2)
    x[:2], x[-2:] = 2, 3
    call = pointwise_call(Pixels(x, 2, 2), weight, bias, None, Pixels(out, 2, 2), pixels, (2, 2), False, "ieee", tile)
    assert call.programs == 2**28
    # A grid of two, of which the second program is told that it is the last of all.
    builder, last = type(interpreter_builder), call.programs - 1
    own_index, own_size = builder.set_grid_idx, builder.set_grid_dim
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "set_grid_idx", lambda self, x, y, z: own_index(self, last * x, y, z))
        patch.setattr(builder, "set_grid_dim", lambda self, x, y, z: own_size(self, last + 1, y, z))
        call.kernel[(2,)](**call.arguments, **call.options)
    assert out[:2].eq(3).all() and out[-2:].eq(4).all()
    assert out[2**32 : 2**32 + 64].eq(0).all()


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
def test_rows(padding_mode) -> None:
    weights = [torch.randn(3, 3, 3) for _ in range(2)]
    x = torch.randn(2, 9, 13)
    expected = hierarchical_conv1d(x, weights, padding_mode=padding_mode, backend="triton")
    for strides in ((2**31 + 2**12, 13, 1), (2**10, 2**28 + 2**12, 1)):
        far = sparse_zeros(strides[0] + 8 * strides[1] + 13).as_strided(x.shape, strides).copy_(x)
        assert torch.equal(hierarchical_conv1d(far, weights, padding_mode=padding_mode, backend="triton"), expected)


def test_a_batch_is_cut_where_the_grid_ends(monkeypatch) -> None:
    case = make_case(ChainConfig(groups=2), width=34, scale=3, batch=5)
    expected = case.run()
    problem = case.problem
    # two convolutions and the pass-through, two groups, two tiles of 16 channels: 12 programs for 16 pixels
    monkeypatch.setattr(step_plan, "MAX_PROGRAMS", 12 * 3)
    plan = plan_steps(problem, (9, 0))
    assert plan.images == 2 and all(plan.programs(problem, launch, plan.images) <= 36 for launch in plan.launches)
    assert error(case.run(), expected.double()) <= 1e-6  # numpy may add in another order where there are fewer pixels
