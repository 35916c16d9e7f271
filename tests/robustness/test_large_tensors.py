"""Tensors of more than 2^31 elements: offsets beyond what 32 bits count, in memory of which only a few pages exist.

The kernels of Triton are tested in tests/backends/triton/interpreter/test_large_tensors.py, both GPU backends on one in
tests/gpu/test_large_tensors.py.
"""

import sys

import pytest
import torch
from emulator import harness
from emulator.harness import Case
from helpers import CHAINS, Chain, assert_close, randomize, relative_error, sparse_zeros, spread_out
from torch import nn

from res2net_fused import Bottle2neck, hierarchical_conv1d, hierarchical_conv2d
from res2net_fused._native import library
from res2net_fused.backends import cpu as cpu_backend
from res2net_fused.backends.cuda import chain as cuda_chain
from res2net_fused.backends.cuda import packing as cuda_packing
from res2net_fused.chain import reference

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory that is reserved nowhere is Linux's")
needs_library = pytest.mark.skipif(not library.cpu_library().loaded, reason=library.cpu_library().reason or "loaded")
LIMIT = 2**31
WIDE = Chain(width=16)  # which Winograd runs
STRIDES = {
    # of (N, H, W) in elements, channels side by side; the last element lies beyond 2^31
    "images": (2**30 + 2**20, 2**11, 2**7),
    "rows": (2**16, 2**29 + 2**20, 2**11),
    "pixels": (2**15, 2**12, 2**28 + 2**20),
}
strides = pytest.mark.parametrize("strides", STRIDES.values(), ids=STRIDES.keys())
SHAPE = (3, 6, 9)


# CPU --------------------------------------------------------------------------------------------------------------------


def far_apart(x, strides):
    out = spread_out(x, strides)
    assert out.storage_offset() == 0 and sum((n - 1) * s for n, s in zip(out.shape, out.stride(), strict=True)) > LIMIT
    return out


@needs_library
@strides
@pytest.mark.parametrize("arithmetic", ["winograd", "direct"])
@pytest.mark.parametrize(
    "chain",
    [WIDE, *(CHAINS[name] for name in ("first_added_pooled", "dilated3_groups", "stage_stride2", "stage_stride3_dilated"))],
    ids=["wide", "added", "groups", "stride2", "stride3"],
)
def test_cpu_chain(chain, arithmetic, strides, monkeypatch, poisoned_scratch):
    monkeypatch.setenv(cpu_backend.settings.ARITHMETIC_VARIABLE, arithmetic)
    x, weights, biases = chain.tensors(SHAPE, torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = hierarchical_conv2d(x, weights, biases, backend="cpu", **chain.settings)
    assert_close(expected, reference.hierarchical_conv2d(*(_double(t) for t in (x, weights, biases)), chain.config))
    out = hierarchical_conv2d(far_apart(x, strides), weights, biases, backend="cpu", **chain.settings)
    assert torch.equal(out, expected)


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) else [v.double() for v in value]


@needs_library
@strides
@pytest.mark.parametrize("threads", [1, 2], indirect=True, ids=["1thread", "2threads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cpu_block(dtype, strides, threads):
    block = randomize(Bottle2neck(32, 8)).to(dtype).eval()
    x = torch.randn(3, 32, 5, 9).to(dtype).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        assert torch.equal(block(far_apart(x, strides)), block(x))


@needs_library
@strides
def test_cpu_gradient_of_weights(strides):
    isa = cpu_backend.settings.instruction_set()
    dz, u = (torch.randn(3, 16, 6, 9).contiguous(memory_format=torch.channels_last) for _ in range(2))
    gradient = torch.ops.res2net_fused_native.cpu_weight_gradient.default
    expected = gradient(dz, u, True, isa)
    for found in (gradient(far_apart(dz, strides), u, True, isa), gradient(dz, far_apart(u, strides), True, isa)):
        assert all(map(torch.equal, found, expected))


@needs_library
def test_cpu_batch_norm():
    """Its tensors have pixels at one distance."""
    ops, isa = torch.ops.res2net_fused_native, cpu_backend.settings.instruction_set()
    pixel = 2**25 + 2**14
    strides = (54 * pixel, 9 * pixel, pixel)
    dense = [torch.randn(2, 13, 6, 9).contiguous(memory_format=torch.channels_last) for _ in range(4)]
    mean, scale, shift = torch.randn(3, 13)
    results = []
    for move in (lambda t: t, lambda t: far_apart(t, strides)):
        z, addend, du, dout = dense
        out, following, du_out = move(torch.full_like(z, torch.nan)), torch.empty_like(z), move(torch.full_like(z, torch.nan))
        ops.cpu_norm_forward.default(z, mean, scale, shift, 0, 0.0, out, move(addend), following, isa)
        dz, sums = ops.cpu_norm_backward.default(move(dout), du, du_out, out, z, mean, scale, shift, 0, 0.0, isa)
        total = ops.cpu_sum.default(move(addend), move(dout), isa)
        results.append((out.contiguous(), following, dz, sums, du_out.contiguous(), total))
    for found, expected in zip(*results, strict=True):
        assert not found.isnan().any() and torch.equal(found, expected)


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect"])
@pytest.mark.parametrize("length", [11, 700])
def test_chain_along_rows(length, padding_mode):
    weights = [torch.randn(4, 4, 3) for _ in range(3)]
    x = torch.randn(3, 16, length)
    far = sparse_zeros(2 * (2**30 + 2**12) + x[0].numel()).as_strided(x.shape, (2**30 + 2**12, length, 1)).copy_(x)
    for backend in ("cpu", "reference"):
        found, expected = (hierarchical_conv1d(t, weights, padding_mode=padding_mode, backend=backend) for t in (far, x))
        assert torch.equal(found, expected)


@needs_library
@pytest.mark.slow
def test_cpu_result_of_more_than_32_bits():
    """8.6 GB of output; x is one image for all, and takes nothing."""
    images = 2**31 // (8 * 512 * 512) + 1
    available = int(next(line for line in open("/proc/meminfo") if line.startswith("MemAvailable")).split()[1])
    if available < 14 << 20:
        pytest.skip("needs 14 GiB of free memory")
    chain = Chain(width=4, steps=1)
    x, weights, biases = chain.tensors((1, 512, 512), torch.float32)
    x = x.contiguous(memory_format=torch.channels_last)
    expected = hierarchical_conv2d(x, weights, biases, backend="cpu")[0]
    out = hierarchical_conv2d(x.expand(images, -1, -1, -1), weights, biases, backend="cpu")
    assert out.numel() > LIMIT
    for i in (0, 1, images // 2, images - 1):
        assert torch.equal(out[i], expected)


# CUDA's source in the emulator --------------------------------------------------------------------------------------------

EMULATED = [
    Case(26, images=4),
    Case(26, images=7, dtype=torch.float32, height=5),
    Case(52, images=4, tile={"rows": 4, "whole": 0}),
    Case(16, images=4, settings={"pool": "avg3", "hierarchical": False, "stride": 2}),
    Case(26, images=4, settings={"passthrough": "first_added", "pool": "avg3_nopad"}),
    Case(104, images=4, height=9, clusters=True),
    Case(96, scale=3, images=4, wgmma=True),
]


def far_slots(case, height, columns):
    """Slots of a sparse tensor (N, C, H, W) whose last image begins beyond 2^31 elements."""
    width = -(-case.width * case.dtype.itemsize // 16) * 16 // case.dtype.itemsize
    pixel = (LIMIT // ((case.images - 1) * height * columns) // 64 + 1) * 64
    assert height * columns * pixel * case.dtype.itemsize < LIMIT  # of which offsets within an image are below
    data = sparse_zeros(case.images * height * columns * pixel, case.dtype)
    shape, strides = (case.images, case.scale * width, height, columns), (height * columns * pixel, 1, columns * pixel, pixel)
    return cuda_chain.Slots(data.as_strided(shape, strides), pixel, width)


def groups_of(case, slots):
    """(N, H, W, s, w)"""
    return slots.data.permute(0, 2, 3, 1).unflatten(3, (case.scale, -1))[..., : case.width]


@pytest.mark.parametrize("case", EMULATED, ids=str)
def test_cuda_offsets_between_images(case):
    x, weights, biases = harness.make_tensors(case, True, 1)
    c = case.config
    far_x = far_slots(case, case.height, case.columns)
    far_out = far_slots(case, c.output_size(case.height), c.output_size(case.columns))
    groups_of(case, far_x).copy_(x.unflatten(3, (case.scale, case.width)))
    groups_of(case, far_out).fill_(torch.nan)
    plan = harness.plan_of(case)._replace(images=1, **case.tile)
    packed, passed = cuda_packing.pack(weights, biases, c), c.passed_group(case.scale)
    findings, _ = harness.launch(case, plan, far_x, far_out, packed, case.width, passed, 0)
    assert findings == {}
    found = groups_of(case, far_out).flatten(3)
    assert torch.equal(found.double(), harness.expected_of(case, x, weights, biases))


def test_cuda_images_too_large_to_count_in_are_not_launched():
    case = Case(26)
    slots = cuda_chain.Slots(torch.empty(0, dtype=case.dtype), 2**26, 32)
    packed = cuda_packing.pack(*harness.make_tensors(case, True, 1)[1:], case.config)
    with pytest.raises(AssertionError, match="does not fit together"):
        harness.launch(case, harness.plan_of(case), slots, slots, packed, case.width, case.scale - 1, 0)


def test_cuda_copies_slices_whose_images_are_too_large_to_count_in():
    storage = sparse_zeros(LIMIT, torch.bfloat16)

    def pitch(height, columns, channels):
        x = storage[: height * columns * channels].view(1, height, columns, channels)
        return cuda_chain.pixel_pitch(x.permute(0, 3, 1, 2))

    assert pitch(2**10, 2**10, 2**9) == 2**9
    assert pitch(2**11, 2**10, 2**9) is None
    assert pitch(7, 7, 2**15) is None  # of several small images in one CTA
    assert pitch(7, 7, 2**14) == 2**14


# Modules ------------------------------------------------------------------------------------------------------------------


@needs_library
@strides
def test_a_network_takes_large_strides(strides):
    model = nn.Sequential(*(randomize(Bottle2neck(16, 4), i) for i in range(2))).eval()
    x = torch.randn(3, 16, 5, 9).contiguous(memory_format=torch.channels_last)
    far = far_apart(x, strides)
    for call in (model, lambda t: torch.autograd.grad(model(t).sum(), t)[0]):
        found, expected = (call(t.requires_grad_()).detach() for t in (far, x))
        assert relative_error(found, expected) < 1e-6
