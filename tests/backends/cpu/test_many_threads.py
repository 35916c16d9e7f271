"""Chains, blocks and their gradients by 4 to 64 threads, more than there are cores: one thread's results.

tests/support/kernels/sharing_test.cpp counts into how many units the work is cut.
"""

import re

import pytest
import torch
from cpu_block_cases import converted, make_block, problem_of
from cpu_block_cases import in_float64 as block_in_float64
from helpers import BOUNDS, Chain, assert_close, masked_gradients, thread_count
from torch import Tensor

from res2net_fused import hierarchical_conv2d
from res2net_fused._native import library
from res2net_fused.backends import cpu as cpu_backend
from res2net_fused.chain import reference
from res2net_fused.chain.problem import ChainProblem

STATUS = library.cpu_library()
pytestmark = [
    pytest.mark.skipif(not STATUS.loaded, reason=STATUS.reason),
    pytest.mark.usefixtures("poisoned_memory", "poisoned_scratch"),
]
COUNTS = (1, 2, 4, 8, 16, 32, 64)
STRIDED = {"hierarchical": False, "pool": "avg3", "stride": 2}
# Settings, w and (N, H, W): tiles, few tiles, channels and rows over threads, images where there are enough of them.
CASES = [
    ({}, 14, (1, 29, 23)), ({}, 26, (1, 9, 13)), ({}, 56, (1, 14, 14)), ({}, 104, (1, 11, 14)), ({}, 112, (1, 7, 7)),
    ({}, 12, (5, 13, 10)), ({"passthrough": "first_added"}, 20, (17, 7, 5)), ({"pool": "avg3"}, 13, (1, 15, 21)),
    (STRIDED, 28, (1, 27, 29)), (STRIDED, 112, (1, 13, 13)), (STRIDED, 10, (3, 8, 5)),
]  # fmt: skip
cases = pytest.mark.parametrize("settings,width,shape", CASES, ids=[f"{w}-{shape}-{len(s)}" for s, w, shape in CASES])


def arithmetic_of(problem: ChainProblem) -> str:
    """Which products are formed: F(2x2) needs fewer weights, and is taken by how many images one thread has."""
    found = re.search(r"Winograd [^;]*|direct", cpu_backend.BACKEND.plan(problem))
    assert found
    return found[0]


def check(problem: ChainProblem, call, expected: Tensor) -> int:
    """One result for each arithmetic, bit for bit and right; how many arithmetics there were."""
    results: dict[str, Tensor] = {}
    for count in COUNTS:
        with thread_count(count):
            out = call()
            assert_close(out, expected)
            assert torch.equal(out, results.setdefault(arithmetic_of(problem), out)), f"{count} threads"
    return len(results)


@cases
@pytest.mark.parametrize("arithmetic", ["auto", "direct"])
def test_chains(settings, width, shape, arithmetic, monkeypatch):
    monkeypatch.setenv(cpu_backend.settings.ARITHMETIC_VARIABLE, arithmetic)
    chain = Chain(settings, steps=3, width=width)
    x, weights, biases = chain.tensors(shape, torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    problem = ChainProblem.from_tensor(x, width, 3, chain.config)
    packed = cpu_backend.BACKEND.pack(weights, biases, chain.config)
    expected = reference.hierarchical_conv2d(
        x.double(), [w.double() for w in weights], [b.double() for b in biases], chain.config
    )
    arithmetics = check(problem, lambda: cpu_backend.chain.forward(problem, x, weights, biases, packed), expected)
    assert arithmetics == 1 or (arithmetic == "auto" and shape[1] <= 14)


@cases
@pytest.mark.parametrize("projection", [0, 2])
def test_blocks(settings, width, shape, projection):
    chain = Chain(settings, steps=3, width=width)
    x, added, folded = make_block(chain, shape, inplanes=40, outplanes=72, projection=projection)
    expected = block_in_float64(chain, x, added, folded)
    x, added = (t.float().contiguous(memory_format=torch.channels_last) for t in (x, added))
    folded = converted(folded, Tensor.float, Tensor.float)
    folded.packed = cpu_backend.block.pack_block(folded, chain.config)
    problem = problem_of(chain, x)
    check(problem, lambda: cpu_backend.block.block_forward(problem, x, added, folded, True), expected)


@pytest.mark.parametrize(
    "width,shape", [(14, (1, 29, 23)), (26, (1, 9, 13)), (50, (1, 7, 7)), (12, (5, 13, 10)), (9, (17, 7, 5))]
)
def test_backward(width, shape):
    """The gradient of x has the same bits; those of weights are sums of as many totals as there are parts."""
    chain = Chain(steps=3, width=width)
    x, weights, biases = chain.tensors(shape, torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    problem = ChainProblem.from_tensor(x, width, 3, chain.config)
    out = hierarchical_conv2d(x, weights, biases, backend="cpu")
    grad = torch.randn_like(out)
    expected = masked_gradients(chain, x, weights, biases, out, grad)
    alone = None
    for count in COUNTS:
        with thread_count(count):
            grad_x, *others = cpu_backend.BACKEND.chain_backward(problem, grad, x, out, weights, (True, True, True))
        for found, ref in zip([grad_x, *others[0], *others[1]], expected, strict=True):
            assert_close(found, ref, BOUNDS[torch.float32])
        alone = grad_x if alone is None else alone
        assert torch.equal(grad_x, alone), f"{count} threads"
