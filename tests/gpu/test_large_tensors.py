"""Calls of more than 2^31 elements on a GPU that holds them; what needs none is in tests/robustness/test_large_tensors.py."""

import pytest
import torch
from helpers import Chain, randomize

from res2net_fused import Bottle2neck, accelerate, hierarchical_conv1d, hierarchical_conv2d
from res2net_fused.backends.selection import choose, get_backend
from res2net_fused.chain.config import ChainConfig
from res2net_fused.chain.problem import ChainProblem
from res2net_fused.testing.parity import convolution_precision

LIMIT = 2**31
backends = pytest.mark.parametrize("backend", ["cuda", "triton"])


def needs(gigabytes):
    """Skips where so much memory is not free."""
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * 2**30:
        pytest.skip(f"needs {gigabytes} GiB of free GPU memory; {free / 2**30:.0f} GiB are")


@pytest.fixture(autouse=True)
def gpu(request):
    """Skips where the test's backend cannot run in bf16."""
    backend = request.node.callspec.params.get("backend", "triton") if hasattr(request.node, "callspec") else "triton"
    problem = ChainProblem(ChainConfig(), torch.device("cuda"), torch.bfloat16, 1, 14, 14, 16, 3, True)
    if (why := get_backend(backend).why_not(problem)) is not None:
        pytest.skip(why)
    yield
    torch.cuda.empty_cache()


def same_images(out, first, where):
    """Every image of x is the same; so must those of out be."""
    return all(torch.equal(out[i], first) for i in where)


@backends
def test_chain(backend, poisoned_memory):
    needs(12)
    chain = Chain(width=16)
    x, weights, biases = chain.tensors((1, 256, 256), torch.bfloat16, "cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    images = LIMIT // x.numel() + 2
    first = hierarchical_conv2d(x, weights, biases, backend=backend)[0]
    many = x.repeat(images, 1, 1, 1).contiguous(memory_format=torch.channels_last)
    out = hierarchical_conv2d(many, weights, biases, backend=backend)
    assert out.numel() > LIMIT and same_images(out, first, (0, 1, images // 2, images - 2, images - 1))


@backends
def test_slices_whose_images_span_more_than_32_bits_count(backend):
    """A slice of a wider tensor of one image of 4.8 GB."""
    needs(8)
    chain = Chain(width=16)
    x, weights, biases = chain.tensors((1, 1024, 1024), torch.bfloat16, "cuda")
    x = x.contiguous(memory_format=torch.channels_last)
    wide = torch.full((1, 1024, 1024, 2304), torch.nan, dtype=x.dtype, device="cuda").permute(0, 3, 1, 2)
    wide[:, -64:] = x
    expected = hierarchical_conv2d(x, weights, biases, backend=backend)
    assert torch.equal(hierarchical_conv2d(wide[:, -64:], weights, biases, backend=backend), expected)


@backends
def test_block(backend, poisoned_memory):
    needs(24)
    block = randomize(Bottle2neck(64, 16)).cuda().bfloat16().to(memory_format=torch.channels_last).eval()
    accelerate(block, backend=backend)
    x = torch.randn(1, 64, 256, 256, device="cuda", dtype=torch.bfloat16)
    images = LIMIT // x.numel() + 2
    with torch.inference_mode():
        first = block(x.contiguous(memory_format=torch.channels_last))[0]
        out = block(x.expand(images, -1, -1, -1).contiguous(memory_format=torch.channels_last))
    assert out.numel() > LIMIT and same_images(out, first, (0, images // 2, images - 1))


def test_rows():
    needs(12)
    weights = [torch.randn(16, 16, 3, device="cuda", dtype=torch.bfloat16) / 7 for _ in range(3)]
    x = torch.randn(1, 64, 2**20, device="cuda", dtype=torch.bfloat16)
    images = LIMIT // x.numel() + 2
    first = hierarchical_conv1d(x, weights, backend="triton")[0]
    out = hierarchical_conv1d(x.repeat(images, 1, 1), weights, backend="triton")
    assert out.numel() > LIMIT and same_images(out, first, (0, images // 2, images - 1))


def test_backward():
    """The gradient of the sum over all images: that of one image, as often as there are images, for the weights."""
    needs(40)
    chain = Chain(width=16)
    x, weights, _ = chain.tensors((1, 256, 256), torch.bfloat16, "cuda", bias=False)
    images = LIMIT // x.numel() + 2

    def gradient_of_x(x):
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        with convolution_precision("float32", "cuda"):
            out = hierarchical_conv2d(x, weights, backend="triton")
        return torch.autograd.grad(out, x, torch.ones_like(out))[0]

    first = gradient_of_x(x)[0]
    grad = gradient_of_x(x.repeat(images, 1, 1, 1))
    assert grad.numel() > LIMIT and same_images(grad, first, (0, images // 2, images - 1))


def test_what_is_too_large_for_one_backend_runs_on_the_next(monkeypatch):
    """Auto, with the reason in the choice; nothing is allocated for it."""
    if get_backend("cuda").why_not(ChainProblem(ChainConfig(), torch.device("cuda"), torch.bfloat16, 1, 14, 14, 16, 3, True)):
        pytest.skip("needs the cuda backend, which refuses it")
    problem = ChainProblem(ChainConfig(), torch.device("cuda"), torch.bfloat16, 1, 2**15 + 1, 64, 16, 3, True)
    choice = choose(problem)
    assert choice.name == "triton" and "the height of x is 32769; at most 32768" in choice.reason
