"""Random calls of the native CPU kernels against float64: odd sizes, every setting, layouts, threads, Inf and NaN.

`make sanitize` runs them, and many more, over kernels that check each access.
"""

import random

import pytest
import test_cpu_block
import torch
from cpu_kernel_cases import each_kernel
from helpers import BOUNDS, Chain, relative_error
from test_cpu_kernels import STATUS, call, in_float64, same_kind

from res2net_fused.backends import native_cpu

pytestmark = [
    pytest.mark.skipif(not STATUS.loaded, reason=STATUS.reason),
    pytest.mark.usefixtures("poisoned_memory", "poisoned_scratch"),
]
ORDINARY, ALL = 40, 240
SEEDS = [*range(ORDINARY), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(ORDINARY, ALL))]


def random_chain(draw: random.Random) -> Chain:
    groups = draw.choice([1, 1, 1, 2, 3])
    width = groups * draw.choice([1, 2, 3, 5, 8, 9, draw.randint(1, 40 // groups), draw.randint(1, 120 // groups)])
    stride = draw.choice([1, 1, 1, 2, 3])
    passthrough = draw.choice(["last", "last", "none", "first", "first_added"])
    hierarchical = stride == 1 and (passthrough == "first_added" or draw.random() < 0.7)
    if passthrough == "first_added" and not hierarchical:
        passthrough = "first"
    pools = [None] if passthrough == "none" else ["avg3", "avg3_nopad"] if stride > 1 else [None, None, "avg3", "avg3_nopad"]
    settings = {
        "stride": stride, "dilation": draw.choice([1, 1, 1, 2, 3]), "groups": groups, "hierarchical": hierarchical,
        "passthrough": passthrough, "pool": draw.choice(pools), "activation": draw.choice(["relu", "none", "hardtanh20"]),
    }  # fmt: skip
    return Chain(settings, steps=draw.randint(1, 4), width=width)


def in_some_layout(draw: random.Random, x: torch.Tensor) -> torch.Tensor:
    """The same values; an allocation of its own ends where x ends, so that a sanitizer sees a read behind it."""
    layout = draw.choice(["nhwc", "nhwc", "nchw", "slice"])
    if layout == "nchw":
        return x.contiguous()
    x = x.contiguous(memory_format=torch.channels_last)
    if layout == "nhwc":
        return x
    n, c, h, w = x.shape
    before = draw.choice([0, 3])
    wide = torch.full((n, h, w, before + c), torch.nan, dtype=x.dtype).permute(0, 3, 1, 2)
    wide[:, before:] = x
    return wide[:, before:]  # the last channel of the last pixel is the end of the allocation


def random_size(draw: random.Random) -> tuple[int, int]:
    height, width = (draw.choice([1, 2, 3, draw.randint(4, 23), draw.randint(4, 23)]) for _ in range(2))
    return height, width


def release_scratch() -> None:
    """So that scratch memory is not longer than the next call asks for."""
    torch.ops.res2net_fused_native.cpu_scratch_bytes(True)


@pytest.fixture
def set_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_chain(seed, set_threads):
    draw = random.Random(seed)
    chain = random_chain(draw)
    shape = (draw.choice([0, 1, 1, 2, 3, 5]), *random_size(draw))
    dtype = draw.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    x, weights, biases = chain.tensors(shape, dtype, seed=seed, bias=draw.random() < 0.8)
    finite = draw.random() < 0.7
    if not finite and x.numel():
        for _ in range(draw.randint(1, 3)):
            x.view(-1)[draw.randrange(x.numel())] = draw.choice([torch.nan, torch.inf, -torch.inf])
    expected = in_float64(chain, x, weights, biases)
    x = in_some_layout(draw, x)
    set_threads(draw.choice([1, 2]))
    for kernel in each_kernel():
        release_scratch()
        out = call(chain, x, weights, biases)
        assert out.shape == expected.shape and out.dtype == dtype, (kernel, chain, shape)
        if finite and x.numel():
            assert relative_error(out, expected) <= BOUNDS[dtype], (kernel, chain, shape)
        elif dtype == torch.float32:
            same_kind(out, expected)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_block(seed, set_threads, monkeypatch):
    right = native_cpu.block_forward

    def block_forward(*arguments):
        release_scratch()
        return right(*arguments)

    monkeypatch.setattr(native_cpu, "block_forward", block_forward)
    draw = random.Random(seed)
    chain, shape = random_chain(draw), (draw.choice([1, 1, 2, 3, 5]), *random_size(draw))
    set_threads(draw.choice([1, 2]))
    projection = draw.choice([0, 0, 1, 2])
    planes = draw.randint(2, 90), draw.randint(2, 90)  # x of one channel is contiguous in either layout
    test_cpu_block.check(
        chain, shape, dtype=draw.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
        arithmetics=["winograd", "direct"], shortcut=projection > 0 or draw.random() < 0.7, relu=draw.random() < 0.8,
        packed=draw.random() < 0.8, inplanes=planes[0], outplanes=planes[1], projection=projection,
    )  # fmt: skip
