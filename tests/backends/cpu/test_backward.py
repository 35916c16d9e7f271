"""The native backward of a whole chain without batch statistics, and of one convolution from weights as they are."""

import random

import pytest
import torch
from helpers import Chain, assert_close, masked_gradients, relative_error, thread_count

from res2net_fused import hierarchical_conv2d
from res2net_fused.backends import cpu as cpu_backend
from res2net_fused.backends.selection import backend_of_gradients
from res2net_fused.chain import backward
from res2net_fused.chain.config import ChainConfig
from res2net_fused.chain.problem import ChainProblem
from res2net_fused.chain.tolerances import FORWARD

INSTRUCTION_SETS = cpu_backend.settings.available_instruction_sets()
pytestmark = [
    pytest.mark.skipif(not INSTRUCTION_SETS, reason="the native CPU kernels are not built"),
    pytest.mark.usefixtures("poisoned_memory", "poisoned_scratch"),
]
BOUND = FORWARD["float32"].limit
LAST = torch.channels_last
SETTINGS = [
    {},
    {"activation": "none"},
    {"activation": "hardtanh20"},
    {"activation": "relu6"},
    {"activation": "leaky_relu:0.3"},
    {"passthrough": "none"},
    {"passthrough": "first"},
    {"passthrough": "first_added"},
    {"pool": "avg3"},
    {"passthrough": "first_added", "pool": "avg3_nopad"},
    {"hierarchical": False, "pool": "avg3"},
]
AMPLITUDES = {"hardtanh20": 15, "relu6": 5}
# More pixels than weights: images over threads, several at a time where they are small. More weights: channels over threads.
SHAPES = {"images": (2, 13, 9, 14), "small_images": (6, 9, 7, 5), "channels": (2, 50, 7, 7), "blocks": (2, 200, 26, 26)}


@pytest.fixture(params=INSTRUCTION_SETS)
def isa(request, monkeypatch):
    monkeypatch.setenv(cpu_backend.settings.ISA_VARIABLE, request.param)
    return request.param


def operands(chain, shape, seed=0):
    """x, weights, the chain's own output for them, and a gradient, all channels-last."""
    batch, _, height, columns = shape
    x, weights, biases = chain.tensors((batch, height, columns), torch.float32, seed=seed)
    x = x.contiguous(memory_format=LAST)
    problem = ChainProblem.from_tensor(x, chain.width, chain.steps, chain.config)
    out = cpu_backend.chain.forward(problem, x, weights, biases, None)
    return problem, x, weights, biases, out, torch.randn_like(out)


def native(problem, grad, x, out, weights, need_x=True, need_weights=True):
    """What the operator returns: nothing where it leaves the problem to others."""
    torch.ops.res2net_fused_native.cpu_scratch_bytes(True)  # not longer than the call asks for
    channels_last = weights[0].is_contiguous(memory_format=LAST)
    return torch.ops.res2net_fused_native.cpu_chain_backward.default(
        grad,
        x,
        out,
        weights,
        **cpu_backend.settings.chain_arguments(problem),
        need_x=need_x,
        need_weights=need_weights,
        channels_last_weights=channels_last,
        instruction_set=cpu_backend.settings.instruction_set(),
    )


def check(chain, shape, seed=0):
    problem, x, weights, biases, out, grad = operands(chain, shape, seed)
    assert native(problem, grad, x, out, weights)
    grad_x, grad_weights, grad_biases = cpu_backend.BACKEND.chain_backward(problem, grad, x, out, weights, (True, True, True))
    expected = masked_gradients(chain, x, weights, biases, out, grad)
    for i, (got, ref) in enumerate(zip([grad_x, *grad_weights, *grad_biases], expected, strict=True)):
        assert got.shape == ref.shape and relative_error(got, ref) <= BOUND, (i, chain, shape)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_against_float64(settings, shape, threads):
    if shape == SHAPES["blocks"] and settings:
        pytest.skip("one of the large ones is enough")
    check(Chain(settings, steps=3, width=shape[1], amplitude=AMPLITUDES.get(settings.get("activation"), 1)), shape)


@pytest.mark.parametrize("width", [8, 11, 16, 24, 26, 57])
def test_widths_on_every_instruction_set(width, isa):
    check(Chain(steps=2, width=width), (2, width, 6, 9))
    check(Chain(steps=2, width=width), (2, width, 3, 2))


@pytest.mark.parametrize("seed", range(12))
def test_random(seed):
    draw = random.Random(seed)
    chain = Chain(draw.choice(SETTINGS), steps=draw.randint(1, 4), width=draw.randint(8, 70))
    check(chain, (2 * draw.randint(1, 3), chain.width, draw.randint(2, 19), draw.randint(2, 19)), seed)


NEEDED = [(True, False, False), (False, True, False), (False, False, True), (True, True, False)]


@pytest.mark.parametrize("needed", NEEDED, ids=str)
@pytest.mark.parametrize("shape", [SHAPES["images"], SHAPES["channels"]], ids=["images", "channels"])
def test_only_what_is_needed(needed, shape):
    chain = Chain(steps=3, width=shape[1])
    problem, x, weights, biases, out, grad = operands(chain, shape)
    found = cpu_backend.BACKEND.chain_backward(problem, grad, x, out, weights, needed)
    everything = cpu_backend.BACKEND.chain_backward(problem, grad, x, out, weights, (True, True, True))
    assert (found[0] is None) == (not needed[0])
    for need, some, same in zip(needed, found, everything, strict=True):
        if need:
            torch.testing.assert_close(some, same, rtol=0, atol=0)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
def test_gradients_of_weights_have_their_memory_format(memory_format):
    chain = Chain(steps=2, width=12)
    _, x, weights, biases, _, _ = operands(chain, (2, 12, 9, 14))
    leaves = [w.contiguous(memory_format=memory_format).requires_grad_() for w in weights]
    out = hierarchical_conv2d(x, leaves, biases)
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert gradient.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("width, groups", [(12, 1), (8, 8), (1, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
def test_fake_gradients_have_the_strides_of_real_ones(width, groups, layout):
    chain = Chain({"groups": groups}, steps=2, width=width)
    x, weights, biases = chain.tensors((2, 9, 14), torch.float32)
    weights = [w.to(memory_format=layout) for w in weights] + [weights[0].transpose(2, 3)]
    x = torch.cat([x, x[:, :width]], 1).contiguous(memory_format=LAST)
    settings = (1, 1, groups, True, "last", None, "relu", "auto", [True, True, True])
    biases = [*biases, biases[0]]
    operator = torch.ops.res2net_fused.hierarchical_conv2d_backward.default
    real = operator(x, x, x, weights, biases, *settings)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        given, *lists = mode.from_tensor(x), *[[mode.from_tensor(t) for t in ts] for ts in (weights, biases)]
        fake = operator(given, given, given, *lists, *settings)
    assert [(t.shape, t.stride()) for t in fake] == [(t.shape, t.stride()) for t in real]


def test_a_total_of_its_own_only_for_a_part_with_tiles_enough():
    """Else 64 threads would hold 64 totals of all weights for one small image each."""
    with thread_count(64):
        check(Chain(steps=2, width=72), (64, 72, 7, 7))
        assert torch.ops.res2net_fused_native.cpu_scratch_bytes(False) < 2**25


@pytest.mark.parametrize("batch,occupied", [(1, [1]), (3, [1, 3]), (7, [1, 2, 4, 7, 8])])
def test_images_that_do_not_occupy_the_threads_are_left_to_single_steps(batch, occupied):
    """These share out the tiles of an image, where one thread would have all of it, or two images of three."""
    chain = Chain(steps=2, width=12)
    problem, x, weights, _, out, grad = operands(chain, (batch, 12, 56, 56))
    found = []
    for count in (1, 2, 3, 4, 7, 8, 64):
        with thread_count(count):
            found += [count] * bool(native(problem, grad, x, out, weights))
    assert found == occupied


def test_biases_that_do_not_fit_are_refused():
    x, weights = torch.zeros(1, 12, 9, 14), [torch.zeros(12, 12, 3, 3)]
    arguments = cpu_backend.settings.chain_arguments(ChainProblem.from_tensor(x, 12, 1, ChainConfig(passthrough="none")))
    with pytest.raises(RuntimeError, match="one bias for each of 1 convolutions"):
        torch.ops.res2net_fused_native.cpu_chain_from_weights.default(
            x, weights, [torch.zeros(12)] * 40, False, **arguments, channels_last=False,
            instruction_set=cpu_backend.settings.instruction_set(),
        )  # fmt: skip


def test_operands_of_any_strides():
    """NCHW, slices of wider pixels, which must not be read beyond, and stride 0."""
    chain = Chain(steps=2, width=12)
    problem, x, weights, biases, out, grad = operands(chain, (2, 12, 9, 14))
    expected = cpu_backend.BACKEND.chain_backward(problem, grad, x, out, weights, (True, True, True))

    def inside(t):
        wide = torch.full((2, t.shape[1] + 5, 9, 14), torch.nan).contiguous(memory_format=LAST)
        wide[:, 3 : 3 + t.shape[1]] = t
        return wide[:, 3 : 3 + t.shape[1]]

    for form in (torch.Tensor.contiguous, inside):
        found = cpu_backend.BACKEND.chain_backward(problem, form(grad), form(x), form(out), weights, (True, True, True))
        for a, b in zip((found[0], *found[1], *found[2]), (expected[0], *expected[1], *expected[2]), strict=True):
            assert torch.equal(a, b)
    one = torch.ones(()).expand_as(grad)
    grad_x, *_ = cpu_backend.BACKEND.chain_backward(problem, one, x, out, weights, (True, False, False))
    assert_close(grad_x, masked_gradients(chain, x, weights, biases, out, one)[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3e37], ids=str)
@pytest.mark.parametrize("where", ["x", "grad"])
@pytest.mark.parametrize("shape", [SHAPES["images"], SHAPES["channels"]], ids=["images", "channels"])
def test_what_winograd_would_spoil_is_left_to_others(value, where, shape, monkeypatch):
    """3e37 overflows in the transforms alone."""
    chain = Chain(steps=3, width=shape[1])
    problem, x, weights, _, out, grad = operands(chain, shape)
    grad *= 1e-3
    (x if where == "x" else grad)[1, chain.width + 2, 3, 3] = value
    assert native(problem, grad, x, out, weights) == []
    found = cpu_backend.BACKEND.chain_backward(problem, grad, x, out, weights, (True, True, True))
    monkeypatch.setenv(cpu_backend.settings.ARITHMETIC_VARIABLE, "direct")
    expected = backward.chain_backward(grad, x, out, weights, chain.config, (True, True, True))  # by ATen
    for got, ref in zip([found[0], *found[1], *found[2]], [expected[0], *expected[1], *expected[2]], strict=True):
        assert torch.equal(got.isfinite(), ref.isfinite())
        assert relative_error(got.nan_to_num(0, 0, 0), ref.nan_to_num(0, 0, 0)) <= 2 * BOUND


@pytest.mark.parametrize("shape", [SHAPES["images"], SHAPES["channels"]], ids=["images", "channels"])
def test_repeatable_for_a_number_of_threads(threads, shape):
    chain = Chain(steps=3, width=shape[1])
    problem, x, weights, _, out, grad = operands(chain, (6, *shape[1:]))
    assert native(problem, grad, x, out, weights)
    first, second = (cpu_backend.BACKEND.chain_backward(problem, grad, x, out, weights, (True, True, True)) for _ in range(2))
    for a, b in zip((first[0], *first[1], *first[2]), (second[0], *second[1], *second[2]), strict=True):
        assert torch.equal(a, b)


def test_auto_takes_it_and_leaves_it():
    def chosen(**changes):
        x = torch.empty(2, 48, 9, 14, **changes).contiguous(memory_format=changes.pop("memory_format", LAST))
        return backend_of_gradients(ChainProblem.from_tensor(x, 12, 3, ChainConfig()))

    assert chosen() is cpu_backend.BACKEND and chosen(dtype=torch.float64) is None and chosen(dtype=torch.bfloat16) is None
    large = torch.empty(2, 48, 28, 28)  # NCHW
    assert backend_of_gradients(ChainProblem.from_tensor(large, 12, 3, ChainConfig())) is None


def test_a_strided_chain_goes_group_by_group():
    chain = Chain({"hierarchical": False, "stride": 2, "pool": "avg3"}, steps=3, width=12)
    problem, x, weights, biases, out, grad = operands(chain, (2, 12, 9, 14))
    assert native(problem, grad, x, out, weights) == []
    found = cpu_backend.BACKEND.chain_backward(problem, grad, x, out, weights, (True, True, True))
    expected = masked_gradients(chain, x, weights, biases, out, grad)
    for got, ref in zip([found[0], *found[1], *found[2]], expected, strict=True):
        assert_close(got, ref)


# One chain, and one convolution, from weights that are packed in the call -------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_plain_weights_of_either_memory_format(shape, memory_format, isa):
    chain = Chain({"passthrough": "first"}, steps=2, width=shape[1])
    x, weights, biases = chain.tensors((shape[0], *shape[2:]), torch.float32)
    weights = [w.contiguous(memory_format=memory_format) for w in weights]
    problem = ChainProblem.from_tensor(x, chain.width, chain.steps, chain.config)
    found = torch.ops.res2net_fused_native.cpu_chain_from_weights.default(
        x, weights, biases, False, **cpu_backend.settings.chain_arguments(problem), channels_last=False,
        instruction_set=cpu_backend.settings.instruction_set(),
    )  # fmt: skip
    doubles = [[t.double() for t in tensors] for tensors in (weights, biases)]
    assert_close(found[0], hierarchical_conv2d(x.double(), *doubles, passthrough="first"))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_input_gradient_by_turned_weights(shape, memory_format, isa, threads):
    batch, width, height, columns = shape
    dz = torch.randn(batch, width, height, columns).contiguous(memory_format=LAST)
    weight = torch.randn(width, width, 3, 3).contiguous(memory_format=memory_format)
    problem = ChainProblem.for_convolution(dz, weight, ChainConfig())
    found = cpu_backend.BACKEND.input_gradient(problem, dz, weight)
    assert_close(found, torch.nn.grad.conv2d_input(dz.shape, weight.double(), dz.double(), padding=1))


def test_a_chain_that_is_not_finite_is_convolved_directly():
    chain = Chain(steps=2, width=16)
    x, weights, biases = chain.tensors((2, 9, 14), torch.float32)
    x[1, 3, 4, 4] = 3e37
    found = torch.ops.res2net_fused_native.cpu_chain_from_weights.default(
        x, weights, biases, False, **cpu_backend.settings.chain_arguments(ChainProblem.from_tensor(x, 16, 2, chain.config)),
        channels_last=False, instruction_set=cpu_backend.settings.instruction_set(),
    )  # fmt: skip
    assert found == []
    doubles = [[t.double() for t in tensors] for tensors in (weights, biases)]
    assert_close(hierarchical_conv2d(x, weights, biases, backend="cpu"), hierarchical_conv2d(x.double(), *doubles))
