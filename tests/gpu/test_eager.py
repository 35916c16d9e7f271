"""The plain use: an accelerated Res2Net-50 called as it is, beside eager PyTorch, at batch 1, 8 and 32."""

import copy

import pytest
import torch
from gpu_cases import EAGER, STAND_IN, kernel_calls, network_blocks
from helpers import relative_error

from res2net_fused import accelerate, explain
from res2net_fused.bench.networks import random_network
from res2net_fused.bench.sample_images import calibrate, sample_images
from res2net_fused.chain.tolerances import network_bound
from res2net_fused.testing.cases import TORCH_DTYPES

pytestmark = pytest.mark.usefixtures("compiled_kernels")


def launches(parameters, capability):
    return kernel_calls(network_blocks(parameters["dtype"], parameters["batch"]), capability)


@pytest.fixture(scope="module")
def network():
    images = sample_images()
    return calibrate(random_network("res2net50_26w4s"), images).requires_grad_(False).cuda(), images.cuda()


@pytest.mark.parametrize("dtype, batch", EAGER)
def test_eager_use_is_as_right_as_pytorch(network, dtype, batch):
    plain, images = network
    if STAND_IN and batch > 1:
        pytest.skip("a stand-in card computes on the CPU")
    x = images.repeat(-(-batch // 2), 1, 1, 1)[:batch].to(TORCH_DTYPES[dtype])
    plain = copy.deepcopy(plain).to(x.dtype)
    model = accelerate(copy.deepcopy(plain))
    with torch.inference_mode():
        expected = copy.deepcopy(plain).double()(x[:2].double())
        bound = network_bound(relative_error(plain(x)[:2], expected))
        for _ in range(2):  # folded, then kept
            assert relative_error(model(x)[:2], expected) <= bound
    assert all(report.fused for report in explain(model))
