"""Activations of the native kernels: each instruction set and arithmetic against float64, edges, threads, Inf and NaN."""

import itertools

import pytest
import torch
from cpu_kernel_cases import INSTRUCTION_SETS, each_kernel
from helpers import BOUNDS, HALVES, Chain, relative_error, run_together

from res2net_fused import hierarchical_conv2d
from res2net_fused._native import library
from res2net_fused.backends import cpu as cpu_backend
from res2net_fused.chain import reference
from res2net_fused.chain.activations import ACTIVATIONS, activate

STATUS = library.cpu_library()
pytestmark = [
    pytest.mark.skipif(not STATUS.loaded, reason=STATUS.reason),
    pytest.mark.usefixtures("poisoned_memory", "poisoned_scratch"),
]
NAMES = (*ACTIVATIONS, "leaky_relu:0.3", "leaky_relu:-0.2", "leaky_relu:1.5")
SETTINGS = (
    {},
    {"passthrough": "first_added"},
    {"hierarchical": False, "stride": 2, "pool": "avg3"},
    {"groups": 2, "dilation": 2},
)


def in_float64(chain, x, weights, biases):
    return reference.hierarchical_conv2d(x.double(), [w.double() for w in weights], [b.double() for b in biases], chain.config)


def check(chain, shape, dtype=torch.float32):
    x, weights, biases = chain.tensors(shape, dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = in_float64(chain, x, weights, biases)
    for kernel in each_kernel():
        error = relative_error(hierarchical_conv2d(x, weights, biases, backend="cpu", **chain.settings), expected)
        assert error <= BOUNDS[dtype], f"{kernel}, {shape}: relative error {error:.3g}"


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("activation", NAMES)
def test_against_float64(activation, settings):
    for width, shape in ((4, (2, 7, 9)), (18, (1, 13, 5)), (26, (3, 6, 7)), (58, (1, 9, 8))):
        check(Chain(settings | {"activation": activation}, steps=3, width=width, amplitude=3), shape)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("activation", NAMES)
def test_half_types_round_once(activation, dtype):
    check(Chain({"activation": activation}, width=13), (2, 7, 9), dtype)


@pytest.mark.parametrize("size", list(itertools.product((1, 2, 3, 5), (1, 4, 6))), ids=str)
@pytest.mark.parametrize("activation", ["silu", "leaky_relu:0.3"])
def test_odd_sizes(activation, size):
    check(Chain({"activation": activation}, steps=2, width=19), (1, *size))


def values_behind(activation, values):
    """activation(values) by the kernels, each value by itself: convolutions with one tap of one."""
    width = 8
    x = values.view(1, width, 1, -1).contiguous(memory_format=torch.channels_last)
    weight = torch.zeros(width, width, 3, 3)
    weight[range(width), range(width), 1, 1] = 1
    keywords = {"activation": activation, "passthrough": "none", "backend": "cpu"}
    return hierarchical_conv2d(x, [weight], **keywords).flatten()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("activation", NAMES)
def test_every_range_of_values(activation, isa, monkeypatch):
    """Relative to the value itself, but for what rounding 1 - tail of one number may cost."""
    monkeypatch.setenv(cpu_backend.settings.ISA_VARIABLE, isa)
    monkeypatch.setenv(cpu_backend.settings.ARITHMETIC_VARIABLE, "direct")
    values = torch.cat([torch.linspace(-130, 130, 8001), torch.linspace(-6, 6, 7999), torch.logspace(-40, 38, 1000)])
    values = torch.cat([values, -values])
    values = torch.nn.functional.pad(values, (0, -len(values) % 8))
    found, exact = values_behind(activation, values).double(), activate(values.double(), activation)
    scale = values.double().abs().clamp_max(1) * 2e-7 + exact.abs() * 1.2e-6
    assert ((found - exact).abs() <= scale + 1e-37).all()


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("activation", NAMES)
def test_what_is_not_finite(activation, isa, monkeypatch):
    monkeypatch.setenv(cpu_backend.settings.ISA_VARIABLE, isa)
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 0.0, -0.0, 1e-44])
    exact = activate(values.double(), activation).float()
    z = values.view(1, 8, 1, 1).expand(1, 8, 5, 6)  # in a bias: 0 * Inf in a convolution would be NaN
    keywords = {"activation": activation, "passthrough": "none", "backend": "cpu"}
    found = hierarchical_conv2d(torch.zeros(1, 8, 5, 6), [torch.zeros(8, 8, 3, 3)], [values], **keywords)
    expected = exact.view(1, 8, 1, 1).expand_as(z)
    assert torch.equal(found.isnan(), expected.isnan())
    torch.testing.assert_close(found, expected, atol=1e-37, rtol=1e-6, equal_nan=True)


@pytest.mark.parametrize("activation", ["silu", "leaky_relu", "relu6", "mish"])
def test_tiles_that_overlap_are_activated_once(activation, threads):
    """Threads share the tiles of one image, of which the last ones reach back over those before."""
    chain = Chain({"activation": activation}, steps=3, width=26)
    x, weights, biases = chain.tensors((1, 57, 58), torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    first = hierarchical_conv2d(x, weights, biases, backend="cpu", **chain.settings)
    assert relative_error(first, in_float64(chain, x, weights, biases)) <= BOUNDS[torch.float32]
    for _ in range(20):
        assert torch.equal(hierarchical_conv2d(x, weights, biases, backend="cpu", **chain.settings), first)


def test_threads_of_python():
    chain = Chain({"activation": "gelu"}, width=16)
    x, weights, biases = chain.tensors((2, 9, 9), torch.float32)
    call = lambda: hierarchical_conv2d(x, weights, biases, backend="cpu", **chain.settings)  # noqa: E731
    expected = call()
    assert all(torch.equal(out, expected) for out in run_together(*[call] * 4))
