"""Nothing grows from call to call: neither this process, nor Python's objects, nor the scratch memory of the kernels."""

import gc
import itertools
import random
import sys
import tracemalloc

import pytest
import torch
from helpers import Chain, randomize
from torch import nn

from res2net_fused import Bottle2neck, freeze, hierarchical_conv1d, hierarchical_conv2d, refresh
from res2net_fused._native import library
from res2net_fused.backends import selection
from res2net_fused.chain.config import ChainConfig
from res2net_fused.chain.problem import ChainProblem

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc is Linux's")
counts = pytest.mark.parametrize("calls", [400, pytest.param(10_000, marks=pytest.mark.slow)])
# A result of x's size that is kept at every call would be 28 MB after 400 calls; what malloc keeps differs by a few.
MEGABYTES = 20
PYTHON_BYTES, OBJECTS = 128 * 1024, 400


def resident_megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def growth(call, calls):
    """(megabytes of the process, bytes of Python, Python's objects) that `calls` calls add, once others have warmed up."""
    for i in range(calls // 5):
        call(i)
    gc.collect()
    objects, resident = len(gc.get_objects()), resident_megabytes()
    for i in range(calls):
        call(i)
    gc.collect()
    resident, objects = resident_megabytes() - resident, len(gc.get_objects()) - objects
    tracemalloc.start()
    try:
        call(0)
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for i in range(100):
            call(i)
        gc.collect()
        python = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    return resident, python, objects


def assert_flat(call, calls):
    resident, python, objects = growth(call, calls)
    assert resident < MEGABYTES, f"{resident:.1f} MB more after {calls} calls"
    assert python < PYTHON_BYTES, f"{python} bytes of Python's more after 100 calls"
    assert objects < OBJECTS, f"{objects} objects more after {calls} calls"
    if library.cpu_library().loaded:
        assert torch.ops.res2net_fused_native.cpu_scratch_bytes(False) <= 128 << 20


def shapes(count, largest):
    """(N, H, W), other ones at every call, in an order that is always the same."""
    drawn = random.Random(3)
    return itertools.cycle([tuple(drawn.randint(1, most) for most in (3, largest, largest)) for _ in range(count)])


BLOCK = (2, 32, 17, 16)  # 70 KB


@counts
@pytest.mark.parametrize("keep", ["kept", "frozen", "folded"])
def test_inference_of_a_block(keep, calls):
    block = randomize(Bottle2neck(32, 8)).eval()
    x = torch.randn(BLOCK).contiguous(memory_format=torch.channels_last)
    if keep == "frozen":
        freeze(block)

    def call(i):
        if keep == "folded":
            refresh(block)
        with torch.inference_mode():
            block(x)

    assert_flat(call, calls)


@counts
def test_changing_shapes(calls):
    """More shapes than any of the caches of plans and settings holds."""
    block, sizes = randomize(Bottle2neck(32, 8)).eval(), shapes(5000, 40)
    _, weights, biases = Chain(width=8).tensors((1, 1, 1), torch.float32)
    rows = [torch.randn(4, 4, 3) for _ in range(3)]

    def call(i):
        batch, height, width = next(sizes)
        with torch.inference_mode():
            block(torch.zeros(batch, 32, height, width))
            hierarchical_conv2d(torch.zeros(batch, 32, height, width), weights, biases)
            # of few lengths: PyTorch's own convolutions keep a thousand kernels of oneDNN's, one for each shape
            hierarchical_conv1d(torch.zeros(batch, 16, height + 4), rows, dilation=1 + i % 3)

    assert_flat(call, calls)


@counts
def test_training(calls):
    model = nn.Sequential(randomize(Bottle2neck(32, 8)), randomize(Bottle2neck(32, 8))).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    x = torch.randn(2, 32, 9, 8).contiguous(memory_format=torch.channels_last)

    def call(i):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        if i % 4 == 0:  # evaluated between steps, of ever new weights
            with torch.inference_mode():
                model.eval()(x)
            model.train()

    assert_flat(call, calls // 5)


def test_reasons_of_ever_new_sizes_are_not_kept_for_ever():
    """What auto says of a backend it left out holds sizes; as many are remembered as are enough to say each once."""
    selection._log_once.cache_clear()
    for i in range(3000):
        selection._log_once("cuda", f"one launch is predicted to take {i} us")
    assert selection._log_once.cache_info().currsize <= 1024
    selection._log_once.cache_clear()


def test_plans_of_ever_new_sizes_are_not_kept_for_ever():
    if not library.cpu_library().loaded:
        pytest.skip(library.cpu_library().reason)
    from res2net_fused.backends.cuda import plan as launch_plan

    launch_plan.planned.cache_clear()
    for i in range(30):
        problem = ChainProblem(ChainConfig(), torch.device("cuda"), torch.bfloat16, 1 + i, 7, 7, 208, 3, True)
        launch_plan.plan_chain(problem, launch_plan.LIMITS["sm_90"])
    info = launch_plan.planned.cache_info()
    assert info.currsize == 30 and info.maxsize is not None


@pytest.mark.parametrize("leak", ["results", "objects"])
def test_growth_would_be_seen(leak):
    kept, x = [], torch.randn(BLOCK)

    def call(i):
        kept.append(x.clone() if leak == "results" else [i])

    with pytest.raises(AssertionError, match="more after"):
        assert_flat(call, 1000)
