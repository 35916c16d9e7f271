"""Every setting of a chain, on the Triton kernels themselves."""

from __future__ import annotations

import itertools

import pytest
import torch
from triton_cases import fix_tile, make_case, small_tiles

from res2net_fused.backends import triton as triton_backend
from res2net_fused.backends.triton import step_plan
from res2net_fused.backends.triton.kernels.conv3x3_fwd import interpreted
from res2net_fused.backends.triton.tiles import Tile
from res2net_fused.chain.activations import ACTIVATIONS
from res2net_fused.chain.config import PASSTHROUGHS, POOLS, ChainConfig

DTYPES = (torch.float32, torch.float16)


def _valid(passthrough: str, pool: str | None, hierarchical: bool) -> bool:
    return not (passthrough == "none" and pool) and not (passthrough == "first_added" and not hierarchical)


CHAINS = [combo for combo in itertools.product(PASSTHROUGHS, POOLS, (True, False)) if _valid(*combo)]


def test_kernels_are_interpreted() -> None:
    assert interpreted()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("passthrough, pool, hierarchical", CHAINS)
def test_passthrough_pool_and_adds(passthrough, pool, hierarchical, dtype) -> None:
    config = ChainConfig(passthrough=passthrough, pool=pool, hierarchical=hierarchical)
    make_case(config, dtype=dtype).check()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_activation_and_bias(activation, bias) -> None:
    case = make_case(ChainConfig(activation=activation), bias=bias)
    case.x *= 30  # so that the clamp at 20 matters
    case.x[:, :, 2:] /= 30
    out = case.check()
    convolved = out[:, :10]
    assert (convolved < 0).any() == (activation not in ("relu", "relu6", "hardtanh20"))
    assert (convolved > 20).any() == (activation not in ("relu6", "hardtanh20"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_activations_of_what_is_not_finite(activation, value) -> None:
    case = make_case(ChainConfig(activation=activation), size=(6, 7))
    case.x[0, 2, 3, 3] = value
    out, expected = case.run(), case.reference()
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isposinf(), expected.isposinf())


def test_slopes_of_leaky_relu() -> None:
    for slope in ("0.01", "0.3", "1.5", "-0.2", "0"):
        make_case(ChainConfig(activation=f"leaky_relu:{slope}")).check()


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (7, 1), (2, 3), (5, 9)])
@pytest.mark.parametrize("batch", [1, 3])
def test_sizes(size, batch) -> None:
    make_case(size=size, batch=batch, dtype=torch.float16).check()


@pytest.mark.parametrize("width", [1, 2, 3, 8, 16, 17, 26, 33])
def test_widths(width) -> None:
    make_case(width=width, size=(3, 4), batch=1).check()


@pytest.mark.parametrize("scale, passthrough", [(1, "none"), (2, "last"), (2, "none"), (2, "first"), (6, "last")])
def test_scales(scale, passthrough) -> None:
    make_case(ChainConfig(passthrough=passthrough), scale=scale).check()


@pytest.mark.parametrize("stride", [2, 3])
@pytest.mark.parametrize("pool, passthrough", [("avg3", "last"), ("avg3_nopad", "first"), (None, "none")])
@pytest.mark.parametrize("size", [(5, 6), (1, 4), (7, 7)])
def test_stride(stride, pool, passthrough, size) -> None:
    make_case(ChainConfig(stride=stride, pool=pool, passthrough=passthrough, hierarchical=False), size=size).check()


@pytest.mark.parametrize("dilation", [2, 4, 7])
def test_dilation(dilation) -> None:
    make_case(ChainConfig(dilation=dilation), size=(5, 6)).check()
    stage = ChainConfig(dilation=dilation, stride=2, pool="avg3", hierarchical=False)
    make_case(stage, size=(5, 6), dtype=torch.float16).check()


@pytest.mark.parametrize("width, groups", [(6, 2), (8, 2), pytest.param(8, 8, marks=pytest.mark.slow), (20, 2), (36, 2)])
def test_groups(width, groups) -> None:
    make_case(ChainConfig(groups=groups), width=width, size=(3, 4), batch=1).check()
    stage = ChainConfig(groups=groups, stride=2, pool="avg3", hierarchical=False)
    make_case(stage, width=width, size=(3, 4), batch=1, dtype=torch.float16).check()
    added = ChainConfig(groups=groups, passthrough="first_added", pool="avg3")
    make_case(added, width=width, size=(2, 2), batch=1).check()


@pytest.mark.parametrize("width, hierarchical", [(16, True), (16, False), (33, True), (40, False)])
def test_many_tiles(monkeypatch, width, hierarchical) -> None:
    small_tiles(monkeypatch)
    make_case(ChainConfig(hierarchical=hierarchical, pool="avg3"), width=width, batch=3, size=(3, 4)).check()


@pytest.mark.parametrize("block_m, block_n, block_k", [(64, 32, 32), (128, 16, 16), (32, 64, 64)])
def test_tiles_larger_than_the_problem(monkeypatch, block_m, block_n, block_k) -> None:
    fix_tile(monkeypatch, Tile(block_m, block_n, block_k, 4, 3))
    make_case(width=20, dtype=torch.float16).check()
    make_case(ChainConfig(stride=2, pool="avg3", hierarchical=False), width=9).check()


@pytest.mark.parametrize("passthrough", PASSTHROUGHS)
def test_first_group_aligned_beforehand(monkeypatch, passthrough) -> None:
    monkeypatch.setattr(step_plan, "ALIGN_FIRST_PIXELS", 0)
    case = make_case(ChainConfig(passthrough=passthrough), width=7)
    assert "4 launches" in triton_backend.chain.plan(make_case(width=7, scale=4).problem)
    case.check()


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("passthrough", PASSTHROUGHS)
def test_batch_in_chunks(monkeypatch, images, passthrough) -> None:
    case = make_case(ChainConfig(passthrough=passthrough), width=8, batch=5, size=(2, 3))
    monkeypatch.setattr(step_plan, "CHUNK_BYTES", images * 4 * 2 * 3 * 8 * 4)
    whole, chunks = case.problem.steps + (passthrough == "first_added"), -(-5 // images)
    assert f"{whole * chunks} launches ({chunks} chunks" in triton_backend.chain.plan(case.problem)
    case.check()


@pytest.mark.parametrize("hierarchical", [True, False])
def test_batch_split_for_the_pixel_counter(monkeypatch, hierarchical) -> None:
    monkeypatch.setattr(step_plan, "MAX_PIXELS", 2 * 4 * 5)
    make_case(ChainConfig(hierarchical=hierarchical), batch=5).check()


def test_packed_weights_give_the_same_bits() -> None:
    case = make_case(ChainConfig(groups=2), width=6, dtype=torch.float16)
    packed = triton_backend.chain.pack(case.weights, case.biases, case.config)
    assert packed[0].shape == (1, 2, 2, 9, 3, 8) and packed[0][..., 3:].count_nonzero() == 0
    assert packed[1].shape == (2, 6) and packed[1].dtype == torch.float32
    assert torch.equal(case.run(packed), case.run())


def test_half_biases() -> None:
    case = make_case(dtype=torch.float16)
    case.biases = [bias.half() for bias in case.biases]
    case.check()


def test_empty_batch() -> None:
    out = make_case(ChainConfig(stride=2, pool="avg3", hierarchical=False), batch=0, size=(5, 5)).run()
    assert out.shape == (0, 15, 3, 3)


def test_refuses_what_the_interpreter_gets_wrong() -> None:
    assert "bfloat16" in triton_backend.chain.why_not(make_case(dtype=torch.bfloat16).problem)
    assert "float64" in triton_backend.chain.why_not(make_case(dtype=torch.float64).problem)
    assert triton_backend.chain.why_not(make_case().problem) is None
