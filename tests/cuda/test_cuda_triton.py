"""The Triton kernels at the sizes that are timed, in the tiles that these take, against float64: inference and training."""

import pytest
import torch
from gpu_cases import INFERENCE, TRAINING, affordable, kernel_calls

from res2net_fused.backends.selection import get_backend
from res2net_fused.bench.training import check_training_case
from res2net_fused.parity import check_case, convolution_precision

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
