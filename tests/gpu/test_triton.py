"""The Triton kernels at the sizes that are timed, in the tiles that these take, against float64: inference and training."""

import pytest
import torch
from gpu_cases import GRADIENTS, INFERENCE, TRAINING, affordable, kernel_calls, replace
from helpers import Chain, masked_gradients, relative_error

from res2net_fused import hierarchical_conv2d
from res2net_fused.backends.selection import get_backend
from res2net_fused.bench.training import check_training_case
from res2net_fused.chain.tolerances import FORWARD
from res2net_fused.testing.parity import check_case, convolution_precision

pytestmark = pytest.mark.usefixtures("compiled_kernels")


def launches(parameters, capability):
    return kernel_calls([parameters["case"]], capability)


@pytest.fixture(autouse=True)
def memory():
    yield
    torch.cuda.empty_cache()


def skip_without_memory(case):
    """Skips where one float64 copy of the block's widest tensors would not fit."""
    needed = 6 * 8 * case.batch * 256 * 56 * 56 / 2 ** (case.stage - 1)
    free = torch.cuda.mem_get_info()[0]
    if needed > free:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free GPU memory; {free / 2**30:.0f} GiB are")


@pytest.mark.parametrize("case", INFERENCE, ids=str)
def test_inference(case):
    case = affordable(case)
    skip_without_memory(case)
    why = get_backend("triton").why_not(case.problem(case.module()))
    if why is not None:
        pytest.skip(why)
    report = check_case(case, "triton")
    assert report.ok, str(report)


@pytest.mark.parametrize("case", TRAINING, ids=str)
def test_training(case):
    case = affordable(case)
    skip_without_memory(case)
    with convolution_precision(case.dtype, "cuda"):
        report = check_training_case(case, "triton", "triton")
    assert report.ok, str(report)


@pytest.mark.parametrize("case", GRADIENTS, ids=str)
def test_gradients_with_batchnorm_folded(case):
    case = replace(affordable(case), workload="chain")
    skip_without_memory(case)
    module = case.module()
    (x,) = case.inputs()
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weights, biases = ([t.requires_grad_() for t in own] for own in (module.weights, module.biases))
    with convolution_precision(case.dtype, "cuda"):
        out = hierarchical_conv2d(x, weights, biases, backend="triton")
        grad = torch.randn_like(out)
        found = torch.autograd.grad(out, [x, *weights, *biases], grad)
    chain = Chain(steps=len(weights), width=x.shape[1] // (len(weights) + 1))
    expected = masked_gradients(chain, x, weights, biases, out, grad)
    errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
    assert max(errors) <= FORWARD[case.dtype].limit and all(e == e for e in errors), errors
