"""The operators with every activation: gradients against float64, tracing, autocast, and what each backend says."""

import pytest
import torch
from helpers import BOUNDS, HALVES, Chain, assert_close, masked_gradients, relative_error, runnable_backends
from training_cases import training_case

from res2net_fused import hierarchical_conv2d, pack_weights
from res2net_fused.backends.cuda import plan as cuda_plan
from res2net_fused.backends.selection import backend_of_gradients
from res2net_fused.chain import reference
from res2net_fused.chain.activations import ACTIVATIONS, CLAMPS
from res2net_fused.chain.problem import ChainProblem

NEW = ("relu6", "leaky_relu", "leaky_relu:0.3", "leaky_relu:-0.2", "hardswish", "silu", "gelu", "gelu_tanh", "mish")
every = pytest.mark.parametrize("activation", NEW)
SETTINGS = (
    {},
    {"passthrough": "first_added"},
    {"hierarchical": False, "stride": 2, "pool": "avg3"},
    {"dilation": 2, "groups": 2},
)


def leaves(chain, shape, dtype=torch.float64, layout=torch.contiguous_format):
    x, weights, biases = chain.tensors(shape, dtype)
    x = x.contiguous(memory_format=layout)
    return [t.requires_grad_() for t in (x, *weights, *biases)]


def call(chain, tensors, **keywords):
    x, *rest = tensors
    return hierarchical_conv2d(x, rest[: chain.steps], rest[chain.steps :], **chain.settings, **keywords)


def exact(chain, tensors):
    x, *rest = tensors
    return reference.hierarchical_conv2d(x, rest[: chain.steps], rest[chain.steps :], chain.config)


@every
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_equals_autograd_of_the_reference(settings, activation):
    chain = Chain(settings | {"activation": activation}, amplitude=4)
    tensors = leaves(chain, (2, 7, 9))
    out = call(chain, tensors)
    grad = torch.randn_like(out)
    assert_close(out, exact(chain, tensors), 1e-14)
    for a, b in zip(
        torch.autograd.grad(out, tensors, grad), torch.autograd.grad(exact(chain, tensors), tensors, grad), strict=True
    ):
        assert_close(a, b, 1e-12)


@every
def test_gradcheck(activation):
    chain = Chain({"activation": activation}, steps=2, width=2, amplitude=3)
    assert torch.autograd.gradcheck(lambda *t: call(chain, t), leaves(chain, (1, 3, 4)), eps=1e-6, atol=1e-6, rtol=1e-5)


@every
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_gradients_of_every_backend(dtype, layout, activation):
    chain = Chain({"activation": activation}, width=13, amplitude=3)
    for backend in ["auto", *runnable_backends("cpu", dtype, chain)]:
        tensors = leaves(chain, (2, 11, 9), dtype, layout)
        out = call(chain, tensors, backend=backend)
        assert out.dtype == dtype and out.is_contiguous(memory_format=layout)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).add(0.5).to(out)
        got = torch.autograd.grad(out, tensors, grad)
        x, *rest = tensors
        expected = masked_gradients(chain, x, rest[:3], rest[3:], out, grad)
        eager = torch.autograd.grad(exact(chain, tensors), tensors, grad)
        # In half types z may round to either side of a kink, in which of the gradients that shows is chance.
        kinked = dtype in HALVES and (activation == "hardswish" or "-" in activation)
        worst = max(relative_error(own, b) for own, b in zip(eager, expected, strict=True)) if kinked else 0.0
        for a, b in zip(got, expected, strict=True):
            assert_close(a, b, max(BOUNDS[dtype], 2 * worst))


@every
def test_only_what_requires_a_gradient(activation):
    chain = Chain({"activation": activation})
    everything = leaves(chain, (2, 6, 5))
    out = call(chain, everything)
    grad = torch.randn_like(out)
    expected = torch.autograd.grad(out, everything, grad)
    for chosen in ((0,), (1, 2, 3), (4, 5, 6)):
        tensors = [t.detach().requires_grad_(i in chosen) for i, t in enumerate(everything)]
        call(chain, tensors).backward(grad)
        for i, t in enumerate(tensors):
            assert torch.equal(t.grad, expected[i]) if i in chosen else t.grad is None
    x, *rest = everything
    without_biases = hierarchical_conv2d(x, rest[:3], **chain.settings)
    found = torch.autograd.grad(without_biases, everything[:4], grad)
    plain = torch.autograd.grad(reference.hierarchical_conv2d(x, rest[:3], None, chain.config), everything[:4], grad)
    for a, b in zip(found, plain, strict=True):
        assert_close(a, b, 1e-12)


@every
def test_batches_without_images_and_packed_weights(activation):
    chain = Chain({"activation": activation}, width=9)
    x, weights, biases = chain.tensors((2, 8, 7), torch.float32)
    packed = pack_weights(weights, biases)
    expected = exact(chain, [t.double() for t in (x, *weights, *biases)])
    assert_close(hierarchical_conv2d(x, packed, **chain.settings), expected)
    empty = x[:0].requires_grad_()
    hierarchical_conv2d(empty, weights, biases, **chain.settings).sum().backward()
    assert empty.grad.shape == empty.shape


@every
def test_traced(activation):
    chain = Chain({"activation": activation})
    tensors = leaves(chain, (2, 6, 5), torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *t: call(chain, t), fullgraph=True, backend="aot_eager")
    out, own = compiled(*tensors), call(chain, tensors)
    assert torch.equal(out, own)
    grad = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, tensors, grad), torch.autograd.grad(own, tensors, grad), strict=True):
        assert_close(a, b, 1e-6)


@every
def test_autocast(activation):
    chain = Chain({"activation": activation})
    tensors = leaves(chain, (2, 6, 5), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = call(chain, tensors)
    assert out.dtype == torch.bfloat16 and relative_error(out, exact(chain, tensors)) < 2 * BOUNDS[torch.bfloat16]
    out.float().sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in tensors)


def problem(activation, dtype=torch.float32):
    chain = Chain({"activation": activation}, width=16)
    return ChainProblem.from_tensor(
        chain.tensors((4, 14, 14), dtype)[0].contiguous(memory_format=torch.channels_last), 16, 3, chain.config
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_cuda_clamps_only(activation):
    reason = cuda_plan.unsupported(problem(activation))
    assert (reason is None) == (activation in CLAMPS)
    assert reason is None or f"activation is {activation!r}" in reason and "'relu6'" in reason


@pytest.mark.skipif("cpu" not in runnable_backends("cpu"), reason="the native CPU kernels are not built")
def test_backends_of_gradients_know_what_the_output_shows():
    for activation in ("relu6", "leaky_relu:0.3", "none"):
        assert backend_of_gradients(problem(activation)).name == "cpu"
    for activation in ("silu", "leaky_relu:-0.3", "hardswish"):
        assert backend_of_gradients(problem(activation)) is None and backend_of_gradients(problem(activation), "triton") is None


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "leaky_relu:-0.1"])
def test_batch_statistics_need_the_slope(activation):
    with pytest.raises(ValueError, match=f"activation is '{activation}'; with batch statistics allowed are .*'relu6'"):
        training_case(Chain({"activation": activation})).run()


@pytest.mark.parametrize("activation", ["relu6", "leaky_relu:0.3", "leaky_relu:0"])
@pytest.mark.parametrize("recompute", [False, True])
def test_batch_statistics(recompute, activation):
    case = training_case(Chain({"activation": activation})).require_grad()
    out = case.run(recompute=recompute).out
    grad = torch.randn_like(out)
    assert_close(out, case.reference(), 1e-13)
    expected = torch.autograd.grad(case.reference(), case.leaves, grad)
    for a, b in zip(torch.autograd.grad(out, case.leaves, grad), expected, strict=True):
        assert_close(a, b, 1e-11)
