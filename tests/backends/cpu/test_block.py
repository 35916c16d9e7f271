"""The native CPU kernel of the whole block against float64: conv1, chain, conv3, shortcut and its projection."""

import pytest
import torch
from cpu_block_cases import check, converted, in_float64, make_block, problem_of
from cpu_kernel_cases import each_kernel
from helpers import BOUNDS, CHAINS, Chain, assert_close, chains, relative_error
from torch import Tensor

from res2net_fused._native import library
from res2net_fused.backends import cpu as cpu_backend
from res2net_fused.backends.base import Backend, run_block

STATUS = library.cpu_library()
pytestmark = [
    pytest.mark.skipif(not STATUS.loaded, reason=STATUS.reason),
    pytest.mark.usefixtures("poisoned_memory", "poisoned_scratch"),
]


@chains
@pytest.mark.parametrize("projection", [0, 1, 2])
def test_every_chain(chain, projection):
    check(chain, (2, 7, 9), projection=projection, arithmetics=("winograd", "direct"))


@pytest.mark.parametrize("inplanes,outplanes", [(1, 1), (3, 7), (8, 16), (17, 23), (520, 40), (1030, 9), (64, 100)])
def test_sizes_of_the_pointwise_convolutions(inplanes, outplanes):
    """Blocks of depth, panels, and tails of vectors."""
    for projection in (0, 1):
        check(Chain(width=7), (1, 5, 6), inplanes=inplanes, outplanes=outplanes, projection=projection)


@pytest.mark.parametrize("width,scale", [(1, 1), (2, 3), (13, 3), (26, 4), (24, 2), (150, 4)])
def test_widths_between(width, scale):
    """conv3's depth, and conv1's columns up to beyond one block of depth."""
    check(Chain(width=width, steps=scale), (1, 6, 5), outplanes=33)


@pytest.mark.parametrize("batch", [1, 2, 3, 5])
@pytest.mark.parametrize("width,size", [(10, 14), (104, 7), (6, 30)])
def test_batches_and_threads(batch, width, size, threads):
    for projection in (0, 2):
        check(Chain(width=width), (batch, size, size), outplanes=40, projection=projection)


def test_rows_beyond_one_block():
    check(Chain(width=5), (1, 23, 31), inplanes=9, outplanes=64)
    check(Chain(width=5), (2, 1, 97), inplanes=9, outplanes=64)


@pytest.mark.parametrize("shortcut,relu", [(False, True), (True, False), (False, False)])
def test_ends(shortcut, relu):
    check(Chain(width=9), (2, 8, 7), shortcut=shortcut, relu=relu)


def test_packs_in_the_call_what_nobody_packed():
    check(Chain(width=9), (2, 8, 7), packed=False, projection=1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_compute_in_fp32(dtype):
    check(Chain(width=12), (2, 8, 7), dtype, projection=1)


def test_agrees_with_the_block_around_the_chain_alone():
    chain = Chain(width=26)
    x, added, folded = make_block(chain, (2, 14, 14), inplanes=64, outplanes=64, projection=1)
    x, added, folded = x.float(), added.float(), converted(folded, Tensor.float, Tensor.float)

    class ChainOnly(Backend):
        forward = staticmethod(cpu_backend.chain.forward)

    out = run_block(cpu_backend.BACKEND, problem_of(chain, x), x, added, folded, True)
    assert_close(out, run_block(ChainOnly(), problem_of(chain, x), x, added, folded, True))


def test_layouts_and_untouched_arguments():
    chain = Chain(width=10)
    x, added, folded = make_block(chain, (2, 7, 9))
    folded = converted(folded, Tensor.float, Tensor.float)
    folded.packed = cpu_backend.block.pack_block(folded, chain.config)
    expected = in_float64(chain, x, added, folded)
    wide = torch.full((2, 9, 12, 30), torch.nan).permute(0, 3, 1, 2)
    views = [wide[:, 4:14, 1:8, 2:11], wide[:, 5:15, 2:9, :9]]
    for layout in (x.float(), x.float().contiguous(memory_format=torch.channels_last), *views):
        layout.copy_(x)
        before = layout.clone()
        for kernel in each_kernel(("auto",)):
            out = cpu_backend.block.block_forward(problem_of(chain, layout), layout, added.float(), folded, True)
            assert relative_error(out, expected) <= BOUNDS[torch.float32], kernel
            assert torch.equal(layout, before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_inputs_stay_in_their_pixels(value):
    """A ReLU behind conv1 keeps NaN; a wrong pixel or a padding channel would spread it."""
    chain = Chain({"passthrough": "last"}, steps=2, width=26)
    x, added, folded = make_block(chain, (2, 16, 13), inplanes=30, outplanes=50)
    x, added, folded = x.float(), added.float(), converted(folded, Tensor.float, Tensor.float)
    x[0, 3, 1, 2] = value
    added[1, 7, 15, 12] = value
    expected = in_float64(chain, x, added, folded)
    for kernel in each_kernel():
        out = cpu_backend.block.block_forward(problem_of(chain, x), x, added, folded, True)
        assert torch.equal(out.isfinite(), expected.isfinite()), kernel
        assert torch.equal(out.isnan(), expected.isnan()), kernel
        finite = expected.isfinite()
        assert_close(out[finite], expected[finite])


def test_operator_refuses_buffers_that_do_not_fit():
    chain = CHAINS["last"]
    x, added, folded = make_block(chain, (1, 5, 5), projection=1)
    x, added, folded = x.float(), added.float(), converted(folded, Tensor.float, Tensor.float)
    packed = cpu_backend.block.pack_block(folded, chain.config)
    forward = torch.ops.res2net_fused_native.cpu_block_forward
    settings = (18, 1, True, chain.width, chain.steps, 1, 1, 1, True, 0, 0, 0, 0.0, True, 0, -1)
    assert_close(forward(x, added, packed, *settings), in_float64(chain, x, added, folded))
    names = ("conv1", "conv1_bias", "conv3", "conv3_bias", "projection", "winograd", "direct", "bias")
    for i, name in enumerate(names):
        short = list(packed)
        short[i] = short[i].flatten()[:-1]
        with pytest.raises(RuntimeError, match=f"{name} must be"):
            forward(x, added, short, *settings)
    with pytest.raises(RuntimeError, match="shortcut must be given beside"):
        forward(x, None, packed, *settings)
    with pytest.raises(RuntimeError, match="shortcut must be"):
        forward(x, added[..., 1:], packed, *settings)
    with pytest.raises(RuntimeError, match="packed must be 8 tensors"):
        forward(x, added, packed[:-1], *settings)
