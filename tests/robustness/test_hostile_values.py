"""Values at the ends of their types: NaN, Inf, denormals, near overflow, -0.0, and BatchNorms that hardly are any.

PyTorch's own operators in the same dtype ("eager") are the yardstick: what is finite there is finite here, and as near to
float64, up to a factor where only a few digits are left.
"""

import copy

import pytest
import torch
from fuzz.checks import check_kinds, each_path
from helpers import BOUNDS, CHAINS, HALVES, Chain, randomize
from training_cases import training_case

from res2net_fused import Bottle2neck, hierarchical_conv1d, hierarchical_conv2d
from res2net_fused.chain import reference
from res2net_fused.chain.config import Chain1dConfig
from res2net_fused.modules.reference_blocks import bottle2neck

pytestmark = pytest.mark.usefixtures("poisoned_memory", "poisoned_scratch")
VALUES = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
values = pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
PATHS = ("reference", "cpu")
OVER_EAGER = 16.0  # Winograd's part of the fp32 bound, where denormals leave a few digits only
SETTINGS = {
    "last": {},
    "first_added": {"passthrough": "first_added", "activation": "none"},
    "clamped": {"activation": "hardtanh20"},
    "leaky": {"activation": "leaky_relu:0.1"},
    "silu": {"activation": "silu"},
    "stage": {"hierarchical": False, "pool": "avg3"},
    "strided": {"hierarchical": False, "pool": "avg3_nopad", "stride": 2},
    "max_pooled": {"pool": "max3"},
    "dilated": {"dilation": 2, "groups": 2},
}
settings = pytest.mark.parametrize("name", SETTINGS)


def no_worse(out, eager, exact, where=""):
    """Finite where eager is, and there as near to float64 as eager or the bounds."""
    largest = torch.finfo(out.dtype).max * (1 - BOUNDS[out.dtype])  # beyond it the order of the sums decides
    finite = eager.isfinite() & (exact.abs() <= largest)
    assert finite.any(), "nothing is left to compare"
    lost = finite & ~out.isfinite()
    assert not lost.any(), f"{where}: {lost.sum()} of {lost.numel()} values overflow, and do not in eager"
    ours, theirs, exact = (t.detach()[finite].double() for t in (out, eager, exact))
    largest = exact.abs().max().clamp_min(1e-300)  # squares of these overflow even in float64's norm of many
    info = torch.finfo(out.dtype)
    smallest = info.smallest_normal * info.eps * exact.numel() ** 0.5 / largest
    error, eager_error = (((t - exact) / largest).norm() for t in (ours, theirs))
    allowed = torch.maximum(BOUNDS[out.dtype] * (exact / largest).norm(), OVER_EAGER * eager_error) + smallest
    assert error <= allowed, f"{where}: {error:.3g} of the largest value; eager is off by {eager_error:.3g}"


def run(chain, x, weights, biases, backend="reference"):
    return hierarchical_conv2d(x, weights, biases, backend=backend, **chain.settings)


def exact_chain(chain, x, weights, biases):
    wide = None if biases is None else [b.double() for b in biases]
    return reference.hierarchical_conv2d(x.double(), [w.double() for w in weights], wide, chain.config)


def chain_tensors(chain, shape=(2, 11, 9), dtype=torch.float32, **more):
    x, weights, biases = chain.tensors(shape, dtype, **more)
    return x.contiguous(memory_format=torch.channels_last), weights, biases


# NaN and Inf ----------------------------------------------------------------------------------------------------------------


@values
@settings
def test_chain_forward(name, value):
    chain = Chain(SETTINGS[name], steps=3, width=10)
    x, weights, biases = chain_tensors(chain)
    x[0, 3, 0, 0] = x[1, 25, 7, 4] = value
    expected = exact_chain(chain, x, weights, biases)
    assert name == "clamped" or not expected.isfinite().all()
    for backend, where in each_path(PATHS):
        check_kinds(run(chain, x, weights, biases, backend), expected, where)


@values
@pytest.mark.parametrize("place", ["x", "gradient"])
@settings
def test_chain_backward(name, place, value):
    """Winograd takes the gradient of 10 channels; what it would spoil is computed again."""
    chain = Chain(SETTINGS[name], steps=3, width=10)
    x, weights, biases = chain_tensors(chain)
    leaves = [t.requires_grad_() for t in (x, *weights, *biases)]
    grad = torch.randn_like(run(chain, x, weights, biases)) + 0.5
    if place == "gradient":
        grad[1, 3, 2, 3] = value
    else:
        x.data[1, 13, 6, 4] = value

    def gradients(out):
        return torch.autograd.grad(out, leaves, grad)

    expected = gradients(reference.hierarchical_conv2d(x, weights, biases, chain.config))
    assert not all(g.isfinite().all() for g in expected)
    for backend, where in each_path(PATHS):
        for i, (ours, theirs) in enumerate(zip(gradients(run(chain, x, weights, biases, backend)), expected, strict=True)):
            check_kinds(ours, theirs, f"{where}, gradient {i}")
            if name == "clamped" and value != value:
                continue  # whether ATen's hardtanh_backward passes on what meets NaN depends on the layout
            finite = theirs.isfinite()
            assert (ours - theirs)[finite].norm() <= 1e-5 * theirs[finite].norm(), f"{where}, gradient {i}"


@values
@pytest.mark.parametrize("place", ["x", "weight"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_block(training, place, value):
    block = randomize(Bottle2neck(40, 10, baseWidth=64)).train(training)
    x = torch.randn(2, 40, 9, 8).contiguous(memory_format=torch.channels_last)
    if place == "x":
        x[1, 7, 4, 5] = value
    else:
        block.convs[1].weight.data[3, 2, 1, 1] = value
    with torch.no_grad():
        expected = bottle2neck(copy.deepcopy(block), x, block.chain_config)
        assert training or place == "weight" or expected.isfinite().any()
        for backend, where in each_path(PATHS):
            twin = copy.deepcopy(block)
            twin._res2net_fused.backend = backend
            check_kinds(twin(x), expected, where)
            assert twin._res2net_fused.last_refusal is None


@values
@pytest.mark.parametrize("place", ["x", "gradient"])
def test_training_operator(place, value):
    """In training mode a NaN fills its channel, by way of the statistics."""
    case = training_case(Chain({"passthrough": "first"}, steps=2, width=10), (2, 8, 9), torch.float32)
    case.x = case.x.contiguous(memory_format=torch.channels_last)
    if place == "x":
        case.x[1, 13, 6, 4] = value
    case.require_grad()
    expected = case.reference()
    grad = torch.randn_like(expected)
    if place == "gradient":
        grad[1, 13, 2, 3] = value
    gradients = torch.autograd.grad(expected, case.leaves, grad)
    for backend, where in each_path(PATHS):
        out = case.run(backend=backend).out
        check_kinds(out, expected, where)
        for i, (ours, theirs) in enumerate(zip(torch.autograd.grad(out, case.leaves, grad), gradients, strict=True)):
            assert torch.equal(ours.isfinite(), theirs.isfinite()), f"{where}, gradient {i}"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 5, 1), (1, 1, 4)], ids=str)
def test_taps_that_meet_no_pixel_have_no_gradient(shape, dtype):
    """oneDNN leaves there what the memory held."""
    chain = Chain({"hierarchical": False, "passthrough": "none", "stride": 2}, steps=1, width=3)
    x, (weight,), biases = chain_tensors(chain, shape, dtype)
    weight.requires_grad_()
    for backend, where in each_path(PATHS):
        out = run(chain, x, [weight], biases, backend)
        (found,) = torch.autograd.grad(out, weight, torch.ones_like(out))
        idle = found[..., [0, 2]] if shape[2] == 1 else found[:, :, [0, 2]]
        assert torch.equal(idle, torch.zeros_like(idle)), where


# Denormals and overflow -------------------------------------------------------------------------------------------------------

# Factors of x and of the weights. The last ones multiply what is denormal by what is huge.
MAGNITUDES = [(1e-30, 1), (1e-38, 1), (1e-41, 1), (1, 1e-30), (1, 1e-40), (1e30, 1), (1e37, 1e-3), (8e37, 1e-3), (1e-3, 8e37)]
MAGNITUDES += [(1e-38, 1e30), (1e30, 1e-38), (1e36, 1e-39)]


@pytest.mark.parametrize("of_x, of_weights", MAGNITUDES, ids=str)
@pytest.mark.parametrize("name", ["none", "linear", "dilated"])
def test_magnitudes(name, of_x, of_weights):
    """One convolution a group, so that eager itself does not overflow."""
    chain = Chain({"hierarchical": False, "activation": "none", "dilation": 1 + (name == "dilated")}, steps=2, width=12)
    x, weights, _ = chain_tensors(chain)
    x, weights = x.clamp(-3, 3) * of_x, [w * of_weights for w in weights]
    eager = reference.hierarchical_conv2d(x, weights, None, chain.config)
    exact = exact_chain(chain, x, weights, None)
    for backend, where in each_path(PATHS):
        no_worse(run(chain, x, weights, None, backend), eager, exact, where)


# Of x, of the weights and of the gradient.
OF_GRADIENTS = [(1, 1, 1e37), (1e37, 1e-3, 1e-3), (1e30, 1e-30, 1e-30), (1, 1, 1e-38)]


@pytest.mark.parametrize("of_x, of_weights, of_gradient", OF_GRADIENTS)
def test_magnitudes_of_gradients(of_x, of_weights, of_gradient):
    chain = Chain({"hierarchical": False, "activation": "none"}, steps=2, width=12)
    x, weights, _ = chain_tensors(chain)
    x, weights = x * of_x, [w * of_weights for w in weights]
    grad = torch.randn(x.shape) * of_gradient

    def gradients(function, dtype):
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, *weights)]
        return torch.autograd.grad(function(leaves[0], leaves[1:]), leaves, grad.to(dtype))

    def eager_chain(x, weights):
        return reference.hierarchical_conv2d(x, weights, None, chain.config)

    exact, eager = (gradients(eager_chain, dtype) for dtype in (torch.float64, torch.float32))
    for backend, where in each_path(PATHS):
        ours = gradients(lambda x, weights, backend=backend: run(chain, x, weights, None, backend), torch.float32)
        for i, (mine, theirs, truth) in enumerate(zip(ours, eager, exact, strict=True)):
            no_worse(mine, theirs, truth, f"{where}, gradient {i}")


@pytest.mark.parametrize("of_x", [1e-38, 1e36, 2e38])
@pytest.mark.parametrize("backend", PATHS)
def test_magnitudes_of_rows(backend, of_x):
    chain = Chain({"passthrough": "none"}, steps=1, width=12)
    x, weights, _ = chain.tensors((2, 1, 40), torch.float32)
    x, weights = x[:, :, 0].clamp(-1, 1) * of_x, [weights[0][:, :, 0] * 1e-2]
    config = Chain1dConfig(passthrough="none")
    eager = reference.hierarchical_conv1d(x, weights, None, None, None, config)
    exact = reference.hierarchical_conv1d(x.double(), [weights[0].double()], None, None, None, config)
    no_worse(hierarchical_conv1d(x, weights, passthrough="none", backend=backend), eager, exact)


@pytest.mark.parametrize("factor", [1e3, 2e4, 6e4])
@settings
def test_fp16_overflows_no_earlier_than_eager(name, factor):
    chain = Chain(SETTINGS[name], steps=3, width=10)
    x, weights, biases = chain_tensors(chain, dtype=torch.float16)
    x = (x.clamp(-1, 1) * factor).half()
    eager, exact = reference.hierarchical_conv2d(x, weights, biases, chain.config), exact_chain(chain, x, weights, biases)
    for backend, where in each_path(PATHS):
        no_worse(run(chain, x, weights, biases, backend), eager, exact, where)


def test_fp16_becomes_infinite_where_the_result_is():
    """The native kernels compute in fp32: nothing but the result can overflow, and it is not cut off at the largest number."""
    chain = Chain({"activation": "none"}, steps=2, width=10)
    x, weights, biases = chain_tensors(chain, dtype=torch.float16)
    x = (x.clamp(-1, 1) * 4e4).half()
    exact = exact_chain(chain, x, weights, biases)
    sure = (exact.abs() - 65520).abs() > 200  # not where rounding decides
    assert (exact.abs() > 66000).any() and (exact.abs() < 65000).any()
    for _, where in each_path(["cpu"]):
        out = run(chain, x, weights, biases, "auto")
        check_kinds(torch.where(sure, out, 0), torch.where(sure, exact.half(), 0), where)


# -0.0 -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_the_passed_group_keeps_every_bit(dtype):
    """-0.0 too, and in backward its gradient's."""
    for passthrough in ("last", "first"):
        chain = Chain({"passthrough": passthrough}, steps=2, width=9)
        x, weights, _ = chain_tensors(chain, (2, 6, 5), dtype)
        x[:, ::2] = -0.0
        grad = x.neg().contiguous(memory_format=torch.channels_last)
        leaf = x.clone().requires_grad_()
        passed = slice(0, 9) if passthrough == "first" else slice(18, 27)
        bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
        for backend, where in each_path(PATHS if dtype != torch.float64 else ["reference"]):
            out = run(chain, leaf, weights, None, backend)
            assert torch.equal(out.detach()[:, passed].contiguous().view(bits), x[:, passed].contiguous().view(bits)), where
            (found,) = torch.autograd.grad(out, leaf, grad)
            assert torch.equal(found[:, passed].contiguous().view(bits), grad[:, passed].contiguous().view(bits)), where


def test_negative_zeros_everywhere():
    chain = CHAINS["first_added"]
    x, weights, _ = chain.tensors(dtype=torch.float32)
    for backend, where in each_path(PATHS):
        out = run(chain, torch.full_like(x, -0.0), weights, None, backend)
        assert torch.equal(out, torch.zeros_like(out)), where


# BatchNorms that hardly are any -----------------------------------------------------------------------------------------------


def zero_variance(norm):
    norm.running_var.zero_()
    norm.weight.mul_(0.01)


def some_zero_variances(norm):
    norm.running_var[::2] = 0
    norm.weight[::2] *= 0.01


def dead(norm):
    """Channels that were zero for all of training, as ReLU's are: nothing comes in, and there is no variance."""
    norm.running_var.zero_()
    norm.running_mean.zero_()


def zero_weight(norm):
    norm.weight.zero_()


def some_negative_weights(norm):
    norm.weight[::2] *= -1
    norm.weight[::3] = 0


def tiny_eps(norm):
    norm.eps = 1e-30
    norm.running_var.mul_(1e-12)
    norm.weight.mul_(1e-6)


def huge_variance(norm):
    norm.running_var.mul_(1e20)
    norm.weight.mul_(1e10)


NORMS = [zero_variance, some_zero_variances, zero_weight, some_negative_weights, tiny_eps, huge_variance]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES, torch.float64], ids=str)
@pytest.mark.parametrize("change", NORMS, ids=lambda f: f.__name__)
def test_folded_norms(change, dtype):
    block = randomize(Bottle2neck(32, 8, baseWidth=64)).eval()
    with torch.no_grad():
        for norm in (block.bn1, *block.bns, block.bn3):
            change(norm)
    if dtype == torch.float16 and change in (tiny_eps, huge_variance):
        pytest.skip("beyond float16's range, in eager too")
    check_folded(block, dtype)


@pytest.mark.parametrize("eps", [1e-5, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_folded_norms_of_dead_channels(dtype, eps):
    """1 / sqrt(eps) times a weight may be more than a half type holds, and Inf times the zeros that come in is NaN."""
    block = randomize(Bottle2neck(32, 8, baseWidth=64)).eval()
    with torch.no_grad():
        block.bn1.bias[:8] = -100  # the first group is dead behind ReLU
        dead(block.bns[0])
        block.bns[0].eps = eps
    check_folded(block, dtype, overflows=dtype == torch.float16 and eps < 1e-5)


def check_folded(block, dtype, overflows=False):
    block = block.to(dtype)
    x = torch.randn(2, 32, 7, 6).to(dtype)
    with torch.no_grad():
        exact = bottle2neck(copy.deepcopy(block).double(), x.double(), block.chain_config)
        eager = bottle2neck(block, x, block.chain_config)
    for backend, where in each_path(PATHS if dtype != torch.float64 else ["reference"]):
        for differentiates in (False, True):
            twin = copy.deepcopy(block)
            twin._res2net_fused.backend = backend
            with torch.set_grad_enabled(differentiates):
                no_worse(twin(x).detach(), eager, exact, f"{where}, {'differentiable' if differentiates else 'folded'}")
            assert (twin._res2net_fused.last_refusal is not None) == overflows, where


def flat(case):
    for weight in case.weights:
        weight[::2] = 0  # no variance


def no_weight(case):
    for gamma in case.gammas:
        gamma[::2] = 0


def smallest_eps(case):
    flat(case)
    case.eps = [1e-30] * len(case.eps)


def huge(case):
    case.x *= 1e25


def tiny(case):
    case.x *= 1e-25


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("change", [flat, no_weight, smallest_eps, huge, tiny], ids=lambda f: f.__name__)
def test_norms_in_training_mode(change, layout):
    case = training_case(Chain({"hierarchical": False}, steps=2, width=10), (3, 8, 9), torch.float32)
    change(case)
    case.x = case.x.contiguous(memory_format=layout)
    case.require_grad()
    eager = case.reference()
    grad = torch.randn_like(eager)
    gradients = torch.autograd.grad(eager, case.leaves, grad)
    for backend, where in each_path(PATHS):
        for recompute in (False, True):
            out = case.run(backend=backend, recompute=recompute).out
            exact, _, exact_gradients = case.exact(out, grad)
            no_worse(out, eager, exact, where)
            found = torch.autograd.grad(out, case.leaves, grad)
            for i, (ours, theirs, truth) in enumerate(zip(found, gradients, exact_gradients, strict=True)):
                no_worse(ours, theirs, truth, f"{where}, gradient {i}")


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["nhwc", "nchw"])
def test_neither_variance_nor_eps(layout):
    """ATen's operator gives a flat channel then its beta; F.batch_norm itself refuses an eps of 0 in newer versions."""
    case = training_case(Chain({"hierarchical": False, "activation": "none"}, steps=2, width=10), (3, 8, 9), torch.float32)
    flat(case)
    case.eps = [0.0] * len(case.eps)
    case.x = case.x.contiguous(memory_format=layout)
    for backend, where in each_path(PATHS):
        out = case.run(backend=backend).out
        expected = torch.cat(case.betas)[::2][:, None, None]
        assert torch.equal(out[:, :20:2], expected.expand(3, -1, 8, 9)), where
