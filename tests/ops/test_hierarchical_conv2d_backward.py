"""`hierarchical_conv2d`, backward: finite differences, float64 with the tested path's own masks, unusual gradients."""

import pytest
import torch
from helpers import (
    CHAINS,
    DEVICES,
    HALVES,
    Chain,
    assert_close,
    chains,
    masked_gradients,
    relative_error,
    runnable_backends,
)

from res2net_fused import hierarchical_conv2d
from res2net_fused.backends import cpu as cpu_backend
from res2net_fused.chain import reference

devices = pytest.mark.parametrize("device", DEVICES)


def leaves(chain, *args, **kwargs):
    x, weights, biases = chain.tensors(*args, **kwargs)
    for tensor in (x, *weights, *(biases or ())):
        tensor.requires_grad_()
    return x, weights, biases


@pytest.mark.parametrize("name", [n for n, c in CHAINS.items() if c.width <= 4 and c.steps <= 3])
def test_gradcheck(name):
    """With the seed fixed no pre-activation lies within the finite difference of a kink."""
    chain = CHAINS[name]
    small = Chain(chain.settings, chain.steps, width=chain.settings.get("groups", 1) * (chain.width > 1) or 1)
    x, weights, biases = leaves(small, (1, 3, 4))
    steps = len(weights)

    def call(x, *rest):
        return hierarchical_conv2d(x, rest[:steps], rest[steps:], **small.settings)

    assert torch.autograd.gradcheck(call, (x, *weights, *biases), eps=1e-6, atol=1e-7, rtol=1e-5)


def test_gradcheck_at_both_ends_of_hardtanh():
    chain = Chain({"activation": "hardtanh20"}, steps=2, width=2, amplitude=15)
    x, weights, biases = leaves(chain, (1, 3, 4))
    out = hierarchical_conv2d(x, weights, biases, **chain.settings)[:, :4]
    assert (out == 0).any() and (out == 20).any()

    def call(x, *rest):
        return hierarchical_conv2d(x, rest[:2], rest[2:], **chain.settings)

    assert torch.autograd.gradcheck(call, (x, *weights, *biases), eps=1e-6, atol=1e-6, rtol=1e-5)


@chains
def test_equals_autograd_of_the_reference(chain):
    x, weights, biases = leaves(chain, (2, 7, 9))
    grad = torch.randn_like(hierarchical_conv2d(x, weights, biases, **chain.settings))
    tensors = [x, *weights, *biases]
    got = torch.autograd.grad(hierarchical_conv2d(x, weights, biases, **chain.settings), tensors, grad)
    expected = torch.autograd.grad(reference.hierarchical_conv2d(x, weights, biases, chain.config), tensors, grad)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 1e-12)


def chain_gradients(chain, backend, dtype, device):
    tensors = leaves(chain, (2, 7, 9), dtype, device)
    out = hierarchical_conv2d(*tensors, backend=backend, **chain.settings)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).add(0.5).to(out)  # sums do not cancel
    x, weights, biases = tensors
    got = torch.autograd.grad(out, [x, *weights, *biases], grad)
    expected = masked_gradients(chain, x, weights, biases, out, grad)
    return tensors, grad, got, expected


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@devices
@chains
def test_against_float64_with_own_masks(chain, device, dtype):
    for backend in runnable_backends(device, dtype, chain):
        (x, weights, biases), grad, got, expected = chain_gradients(chain, backend, dtype, device)
        out = reference.hierarchical_conv2d(x, weights, biases, chain.config)
        eager = torch.autograd.grad(out, [x, *weights, *biases], grad)
        eager_expected = masked_gradients(chain, x, weights, biases, out, grad)
        for i, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert_close(a, b)
            if dtype in HALVES:  # of four numbers, eager's may all have been rounded the right way: one rounding is no error
                eager_error = relative_error(eager[i], eager_expected[i])
                assert relative_error(a, b) <= max(2 * eager_error, torch.finfo(dtype).eps / 2)


@pytest.mark.skipif("cpu" not in runnable_backends("cpu"), reason="the native CPU kernels are not built")
@pytest.mark.parametrize("settings", [{}, {"passthrough": "first_added"}, {"hierarchical": False, "pool": "avg3"}], ids=str)
@pytest.mark.parametrize("width", [8, 13, 26])
def test_input_gradients_by_the_native_kernels(settings, width, monkeypatch):
    taken = []
    convolver = cpu_backend.convolution.WinogradConvolver
    own = convolver.input_gradient
    monkeypatch.setattr(convolver, "input_gradient", lambda *args: (taken.append(own(*args)), taken[-1])[1])
    chain = Chain(settings, steps=3, width=width)
    x, weights, biases = leaves(chain, (2, 9, 24), torch.float32)  # NCHW: convolution after convolution
    tensors = [x, *weights, *biases]
    out = hierarchical_conv2d(x, weights, biases, **settings)
    grad = torch.randn(out.shape[0], out.shape[2], out.shape[3], out.shape[1]).permute(0, 3, 1, 2)
    expected = masked_gradients(chain, x, weights, biases, out, grad)
    for a, b in zip(torch.autograd.grad(out, tensors, grad, retain_graph=True), expected, strict=True):
        assert_close(a, b)
    assert len(taken) == 3 and all(t is not None for t in taken)
    assert_close(torch.autograd.grad(out, x, grad)[0], expected[0])  # without gradients of weights and biases


@pytest.mark.parametrize("name", ["last", "first_added", "stage_stride2", "none", "s1"])
@devices
def test_incoming_gradient_of_any_strides(name, device):
    """Slices of a wider tensor, as from cat, and stride 0, as from sum: gradcheck feeds neither."""
    chain = CHAINS[name]
    for backend in runnable_backends(device):
        x, weights, biases = leaves(chain, dtype=torch.float32, device=device)
        tensors = [x, *weights, *biases]
        out = hierarchical_conv2d(x, weights, biases, backend=backend, **chain.settings)
        wide = torch.randn(out.shape[0], out.shape[1] + 5, *out.shape[2:], device=device)
        for grad in (
            wide[:, 2 : 2 + out.shape[1]],
            wide.contiguous(memory_format=torch.channels_last)[:, 3 : 3 + out.shape[1]],
            torch.ones((), device=device).expand(out.shape),
            wide[:1, :1].expand(out.shape),
            torch.randn(*out.shape, 2, device=device)[..., 0],
        ):
            got = torch.autograd.grad(out, tensors, grad, retain_graph=True)
            expected = torch.autograd.grad(out, tensors, grad.contiguous(), retain_graph=True)
            exact = masked_gradients(chain, x, weights, biases, out, grad)
            for a, b, c in zip(got, expected, exact, strict=True):
                assert_close(a, b)
                assert_close(a, c)


VIEWS = {
    "slice": lambda x: torch.cat([x, x], 1)[:, x.shape[1] :],
    "slice_nhwc": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, x.shape[1] :],
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "one_image_for_all": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("name", ["last", "stage_stride2"])
@devices
def test_x_of_any_strides(name, view, device):
    chain = CHAINS[name]
    for backend in runnable_backends(device):
        x, weights, biases = chain.tensors(dtype=torch.float32, device=device)
        tensors = [t.requires_grad_() for t in (view(x), *weights, *biases)]
        out = hierarchical_conv2d(tensors[0], weights, biases, backend=backend, **chain.settings)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out)
        exact = masked_gradients(chain, tensors[0], weights, biases, out, grad)
        for a, b in zip(torch.autograd.grad(out, tensors, grad), exact, strict=True):
            assert_close(a, b)


def test_backward_through_cat_and_sum():
    chain = CHAINS["last"]
    x, weights, biases = leaves(chain)
    tensors = [x, *weights, *biases]

    def total(function):
        out = function()
        return torch.cat([x, out, out * 2], 1).square().sum() + out.sum()

    got = torch.autograd.grad(total(lambda: hierarchical_conv2d(x, weights, biases)), tensors)
    expected = torch.autograd.grad(total(lambda: reference.hierarchical_conv2d(x, weights, biases, chain.config)), tensors)
    for a, b in zip(got, expected, strict=True):
        assert_close(a, b, 1e-12)


@pytest.mark.parametrize("who", ["x", "weight0", "weight2", "bias1", "weights", "biases", "x_and_bias0"])
@pytest.mark.parametrize("name", ["last", "first", "stage_stride2"])
def test_partial_requires_grad(name, who):
    chain = CHAINS[name]
    x, weights, biases = chain.tensors(dtype=torch.float32)
    chosen = {
        "x": [x], "weight0": weights[:1], "weight2": weights[2:], "bias1": biases[1:2], "weights": weights,
        "biases": biases, "x_and_bias0": [x, biases[0]],
    }[who]  # fmt: skip
    for tensor in chosen:
        tensor.requires_grad_()
    for backend in runnable_backends("cpu"):
        out = hierarchical_conv2d(x, weights, biases, backend=backend, **chain.settings)
        gradients = torch.autograd.grad(out.square().sum(), chosen)
        expected = zip((x, *weights, *biases), masked_gradients(chain, x, weights, biases, out, 2 * out.detach()), strict=True)
        for gradient, exact in zip(gradients, [exact for t, exact in expected if t.requires_grad], strict=True):
            assert_close(gradient, exact)
    hierarchical_conv2d(x, weights, biases, **chain.settings).sum().backward()
    assert all(t.grad is not None for t in chosen)
    untouched = [t for t in (x, *weights, *biases) if not any(t is c for c in chosen)]
    assert all(t.grad is None for t in untouched)


def test_one_weight_for_every_step():
    """Gradients of a shared tensor add up."""
    chain = CHAINS["last"]
    x, (weight, *_), _ = leaves(chain, bias=False)
    got = torch.autograd.grad(hierarchical_conv2d(x, [weight] * 3).square().sum(), weight)[0]
    expected = torch.autograd.grad(reference.hierarchical_conv2d(x, [weight] * 3, None, chain.config).square().sum(), weight)
    assert_close(got, expected[0], 1e-12)


def test_gradients_have_the_inputs_dtype_and_format():
    chain = CHAINS["last"]
    x, weights, biases = chain.tensors(dtype=torch.float16)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    biases = [b.float().requires_grad_() for b in biases]
    hierarchical_conv2d(x, weights, biases).sum().backward()
    assert x.grad.dtype == torch.float16 and x.grad.is_contiguous(memory_format=torch.channels_last)
    assert all(b.grad.dtype == torch.float32 for b in biases)


def test_inputs_changed_in_place_before_backward_are_an_error():
    x, weights, biases = leaves(CHAINS["last"])
    out = hierarchical_conv2d(x, weights, biases)
    with torch.no_grad():
        weights[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_the_operator_of_gradients_itself_says_that_it_has_none():
    """Autograd never differentiates it, but a graph that was traced of a gradient may hold it."""
    chain = CHAINS["last"]
    x, weights, biases = leaves(chain)
    out, settings = hierarchical_conv2d(x, weights, biases), chain.config.as_kwargs().values()
    operator = torch.ops.res2net_fused.hierarchical_conv2d_backward
    gradient = operator(torch.ones_like(out), x, out, weights, biases, *settings, "auto", [True, False, False])[0]
    with pytest.raises(NotImplementedError, match="second derivative.*reference"):
        torch.autograd.grad(gradient.square().sum(), x)


def test_reference_has_the_second_derivative():
    chain = Chain({"activation": "none"}, steps=2, width=2)
    x, weights, biases = leaves(chain, (1, 3, 3))

    def call(x, *rest):
        return reference.hierarchical_conv2d(x, rest[:2], rest[2:], chain.config)

    assert torch.autograd.gradgradcheck(call, (x, *weights, *biases))


@devices
def test_repeated_backward_gives_the_same_bits(device):
    for backend in runnable_backends(device):
        x, weights, biases = leaves(CHAINS["last"], (2, 14, 14), torch.float32, device)
        out = hierarchical_conv2d(x, weights, biases, backend=backend)
        grad = torch.randn_like(out)
        runs = [torch.autograd.grad(out, [x, *weights, *biases], grad, retain_graph=True) for _ in range(3)]
        for again in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))
