"""The native gradient of a 3x3 convolution's weights and bias, by itself and in the backward of chains."""

import random

import pytest
import torch
from helpers import Chain, assert_close, relative_error

from res2net_fused import hierarchical_conv2d
from res2net_fused.backends import cpu as cpu_backend
from res2net_fused.chain.backward import convolution_backward
from res2net_fused.chain.config import ChainConfig
from res2net_fused.chain.problem import ChainProblem
from res2net_fused.chain.tolerances import FORWARD

INSTRUCTION_SETS = cpu_backend.settings.available_instruction_sets()
pytestmark = pytest.mark.skipif(not INSTRUCTION_SETS, reason="the native CPU kernels are not built")

BOUND = FORWARD["float32"].limit
SHAPES = [(2, 26, 9, 14), (1, 3, 2, 2), (3, 1, 2, 7), (3, 8, 5, 3), (1, 20, 6, 11), (1, 104, 14, 14), (8, 56, 7, 7)]
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def gradients(dz, u):
    """(dK, db) by PyTorch, in the dtype of dz."""
    width = u.shape[1]
    weight = torch.empty(width, width, 3, 3, dtype=dz.dtype)
    ones, needed = [1, 1], [False, True, True]
    return torch.ops.aten.convolution_backward(dz, u, weight, [width], ones, ones, ones, False, [0, 0], 1, needed)[1:]


def operands(batch, width, height, columns, seed=0):
    torch.manual_seed(seed)
    u = torch.randn(batch, width, height, columns).relu_()
    dz = torch.randn(batch, width, height, columns).add_(0.25)  # a bias's gradient does not cancel
    return dz.contiguous(memory_format=torch.channels_last), u.contiguous(memory_format=torch.channels_last)


def native(dz, u, isa, weight_format=torch.channels_last):
    torch.ops.res2net_fused_native.cpu_scratch_bytes(True)  # not longer than the call asks for
    code = cpu_backend.settings.INSTRUCTION_SETS[isa]
    return torch.ops.res2net_fused_native.cpu_weight_gradient.default(dz, u, weight_format == torch.channels_last, code)


def check(dz, u):
    expected = gradients(dz.double(), u.double())
    for isa in INSTRUCTION_SETS:
        for got, ref in zip(native(dz, u, isa), expected, strict=True):
            assert got.shape == ref.shape and relative_error(got, ref) <= BOUND, (isa, tuple(dz.shape))


@pytest.mark.usefixtures("poisoned_scratch")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_float64(shape, threads):
    """Tiles of four, three and two; whole and half panels; widths that fill no vector; tiles and channels over threads."""
    check(*operands(*shape))


@pytest.mark.parametrize("seed", range(12))
def test_random(seed):
    draw = random.Random(seed)
    check(*operands(draw.randint(1, 4), draw.randint(1, 70), draw.randint(2, 21), draw.randint(2, 21), seed))


@pytest.mark.parametrize("name", FORMATS)
def test_memory_format(name):
    dz, u = operands(2, 13, 6, 5)
    found, _ = native(dz, u, INSTRUCTION_SETS[-1], FORMATS[name])
    assert found.is_contiguous(memory_format=FORMATS[name]) and not found.is_contiguous(
        memory_format=FORMATS["contiguous" if name == "channels_last" else "channels_last"]
    )
    assert_close(found, gradients(dz.double(), u.double())[0])


def test_operands_of_any_strides():
    """NCHW, slices of wider pixels, which must not be read beyond, and stride 0."""
    dz, u = operands(2, 10, 7, 6)
    expected = gradients(dz.double(), u.double())
    wide = torch.full((2, 31, 7, 6), torch.nan).contiguous(memory_format=torch.channels_last)
    wide[:, 3:13], wide[:, 17:27] = dz, u
    for a, b in ((dz.contiguous(), u.contiguous()), (wide[:, 3:13], wide[:, 17:27]), (dz, wide[:, 17:27])):
        for isa in INSTRUCTION_SETS:
            for got, ref in zip(native(a, b, isa), expected, strict=True):
                assert_close(got, ref)
    one = torch.ones(()).expand(2, 10, 7, 6)
    assert_close(native(one, u, INSTRUCTION_SETS[-1])[0], gradients(one.double(), u.double())[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e37], ids=str)
def test_what_winograd_would_spoil_is_left_to_aten(value):
    """3e37 overflows in the transforms alone."""
    dz, u = operands(2, 16, 9, 8)
    u[1, 5, 4, 4] = value
    dz *= 1e-3
    weight = torch.randn(16, 16, 3, 3)
    problem = ChainProblem.for_convolution(dz, weight, ChainConfig())
    assert cpu_backend.BACKEND.weight_gradient(problem, dz, u, torch.channels_last) == (None, None)
    _, *found = convolution_backward(cpu_backend.BACKEND, dz, u, weight, ChainConfig(), (True, True, True))
    for got, expected in zip(found, gradients(dz, u), strict=True):
        assert torch.equal(got.isfinite(), expected.isfinite())
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=1e-4, atol=1e-4)


def test_repeatable_for_a_number_of_threads(threads):
    dz, u = operands(4, 26, 14, 14)
    first, second = (native(dz, u, INSTRUCTION_SETS[-1]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_chain_takes_it(monkeypatch):
    taken = []
    convolver = cpu_backend.convolution.WinogradConvolver
    own = convolver.weight_gradient
    monkeypatch.setattr(convolver, "weight_gradient", lambda *args: (taken.append(own(*args)), taken[-1])[1])
    chain = Chain({}, steps=3, width=16)
    x, weights, biases = chain.tensors((2, 9, 24), torch.float32)  # NCHW: convolution after convolution
    tensors = [*weights, *biases]
    for tensor in tensors:
        tensor.requires_grad_()
    hierarchical_conv2d(x, weights, biases).sum().backward()
    assert len(taken) == 3 and all(weight is not None for weight, _ in taken)


@pytest.mark.parametrize(
    "dz, u", [((2, 8, 4, 4), (2, 8, 4, 5)), ((2, 8, 1, 4), (2, 8, 1, 4)), ((2, 8, 4), (2, 8, 4)), ((0, 8, 4, 4), (0, 8, 4, 4))]
)
def test_shapes_that_do_not_fit_are_refused(dz, u):
    with pytest.raises(RuntimeError, match="dz and u must be"):
        native(torch.zeros(dz), torch.zeros(u), INSTRUCTION_SETS[0])
