"""Backend `cuda`: the whole chain in one launch of a native CUDA kernel, inference, from sm_80 on.

fp16, bf16, and float32 where cuDNN's convolutions may use TF32: the factors of every product are then rounded to TF32, to the
nearest, sums and results are float32.

Calls with few pixels are shared by thread-block clusters, from sm_90 on (csrc/cuda/chain/cluster_kernel.cuh). Wide groups in
half precision run on Hopper's wgmma where that is predicted to be faster (csrc/cuda/chain/wgmma_kernel.cuh); it is compiled for
sm_90a alone.

The launch plan comes from a C++ function of the CPU library (csrc/cuda/plan), so `plan_chain` works on machines with no GPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import native
from ..chain import ChainConfig, ChainProblem
from ..kernels.tf32 import round_to_tf32
from .native_cuda_block import block_forward, pack_block
from .triton_settings import OVERRIDE, convolution_precision, convolutions_use_tf32, tf32_is_overridden

__all__ = ["block_forward", "forward", "pack", "pack_block", "plan", "plan_chain", "why_not", "why_not_auto"]

# (lower, upper) bound of y
CLAMPS = {"relu": (0.0, math.inf), "none": (-math.inf, math.inf), "hardtanh20": (0.0, 20.0)}
TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # enum DataType in csrc/cuda/plan/data_type.h
POOLS = {None: 0, "avg3": 1, "avg3_nopad": 2}  # enum Pool in csrc/cuda/plan/arguments.h
STRIP_INSTANCES = ("d1c2t4", "d2c4t4", "d3c6t4", "d4c7t4", "d0c6t2", "d0c7t2", "d0c4t2")  # as in csrc/cuda/plan/instances.h
CLUSTER_INSTANCES = ("cluster_c2t2", "cluster_c4t2", "cluster_c7t2")
WGMMA_INSTANCES = ("wgmma_c6t2", "wgmma_c7t2", "wgmma_c12t2", "wgmma_c14t2")
MAX_POSITIONS = 2**15  # pixels of several whole images in one CTA: csrc/cuda/plan/time_model.h
INSTANCE_NAMES = STRIP_INSTANCES + CLUSTER_INSTANCES + WGMMA_INSTANCES
_INSTANCE_DEPTHS_COLUMNS = ((1, 2), (2, 4), (3, 6), (4, 7), (0, 6), (0, 7), (0, 4))

# What a plan needs to know of a device without having it, in the order of native.DeviceLimits.
LIMITS = {
    "sm_80": native.DeviceLimits(8, 0, 108, 166912, 167936, 65536, 40 * 2**20, 0, 80),
    "sm_86": native.DeviceLimits(8, 6, 84, 101376, 102400, 65536, 6 * 2**20, 0, 80),
    "sm_89": native.DeviceLimits(8, 9, 128, 101376, 102400, 65536, 72 * 2**20, 0, 80),
    "sm_90": native.DeviceLimits(9, 0, 132, 232448, 233472, 65536, 50 * 2**20, 1, 90),
    "sm_100": native.DeviceLimits(10, 0, 148, 232448, 233472, 65536, 126 * 2**20, 0, 100),
    "sm_120": native.DeviceLimits(12, 0, 170, 101376, 102400, 65536, 96 * 2**20, 0, 100),
}


class Plan(NamedTuple):
    """How one call is launched, in the order in which csrc/cuda/plan/launch_plan.h gives its numbers."""

    instance: int
    rows: int  # output pixels of a CTA
    columns: int
    images: int  # of a CTA
    whole: int  # 1: whole images, without a halo
    warps_m: int  # along the pixels
    warps_n: int  # along the output channels
    slices: int  # of 32 bytes of input channels of one tap, held by one stage of the weight pipeline
    stages: int
    row_parts: int  # CTAs that share an image or a strip of it, each with its rows; 1 x 1 parts unless it is the cluster kernel
    channel_parts: int  # and each with its output channels
    warps_k: int  # along the input channels and taps
    ctas: int
    threads: int
    shared_bytes: int
    ctas_per_multiprocessor: int
    packed_columns: int  # output channels in units of 8, padded
    dram_bytes: int  # x, weights and out once
    loaded_bytes: int  # by all CTAs, halos and repeated weights included
    flops: int
    mma_flops: int  # with halos and padding
    nanoseconds: int  # predicted
    steps_nanoseconds: int  # predicted for one launch per convolution
    capability: int  # of the device, such as 90
    rates: int  # the capability whose rates the two times are counted with


def why_not(problem: ChainProblem) -> str | None:
    device = problem.device
    if device.type != "cuda":
        return f"x is on {device}; this backend runs on cuda tensors"
    for status in (native.cuda_library(), native.cpu_library()):  # the plan comes from the latter
        if not status.loaded:
            return status.reason
    if torch.version.hip is not None:
        return "x is on an AMD GPU; an NVIDIA GPU is needed"
    why = unsupported(problem) or precision_refusal(problem)
    return why or _planned(_problem_numbers(problem), device_limits(device))[1] or None


def unsupported(problem: ChainProblem) -> str | None:
    """What of this call no instance of the kernel does, on any device, or None."""
    config = problem.config
    if problem.dtype not in TYPES:
        return f"x is {problem.dtype}; this backend runs {', '.join(map(str, TYPES))}"
    if config.groups != 1:
        return f"groups is {config.groups}; this backend runs groups=1"
    return None


def precision_refusal(problem: ChainProblem) -> str | None:
    """Why PyTorch's current settings forbid this call, or None."""
    if problem.dtype != torch.float32 or convolutions_use_tf32():
        return None
    if tf32_is_overridden():
        return f"x is torch.float32 and {OVERRIDE}=0 in the environment forbids TF32, in which this backend multiplies it"
    return (
        f"x is torch.float32 and torch.backends.cudnn.conv.fp32_precision is {convolution_precision()!r}; "
        "this backend multiplies torch.float32 in TF32, which 'tf32' (or torch.backends.cudnn.allow_tf32 = True) allows"
    )


def why_not_auto(problem: ChainProblem) -> str | None:
    """Why `auto` should rather try the next backend, for a call that could run here."""
    plan = plan_chain(problem, device_limits(problem.device))
    if plan.nanoseconds <= plan.steps_nanoseconds:
        return None
    return (
        f"one launch is predicted to take {plan.nanoseconds / 1000:.0f} us, "
        f"one per convolution {plan.steps_nanoseconds / 1000:.0f} us"
    )


@functools.cache
def device_limits(device: torch.device) -> native.DeviceLimits:
    """What the CUDA device offers; needs the CUDA library."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return native.DeviceLimits(*torch.ops.res2net_fused_native.device_limits(index))


def plan_chain(problem: ChainProblem, limits: native.DeviceLimits) -> Plan:
    """How this call would be launched on a device with these limits. Needs the CPU library, but no GPU.

    Raises RuntimeError where the library is not built, ValueError with the reason where no plan fits.
    """
    status = native.cpu_library()
    if not status.loaded:
        raise RuntimeError(status.reason)
    reason = unsupported(problem)
    found = None
    if reason is None:
        found, reason = _planned(_problem_numbers(problem), limits)
    if found is None:
        raise ValueError(reason)
    return found


def _problem_numbers(problem: ChainProblem) -> tuple[int, ...]:
    c = problem.config
    return (
        max(1, problem.batch), problem.height, problem.width_pixels, problem.width, problem.steps, c.stride, c.dilation,
        int(c.hierarchical), int(c.passthrough != "none"),
        TYPES[problem.dtype],
    )  # fmt: skip


@functools.lru_cache(4096)
def _planned(numbers: tuple[int, ...], limits: native.DeviceLimits) -> tuple[Plan | None, str]:
    ops = torch.ops.res2net_fused_native
    found = ops.cuda_chain_plan(list(numbers), list(limits))
    return (Plan(*found), "") if found else (None, ops.cuda_chain_refusal(list(numbers), list(limits)))


def describe(plan: Plan, dtype: torch.dtype) -> str:
    """One line: how the work is cut and what the model predicts. The predicted time is no measurement."""
    if plan.whole:
        part = f"{plan.images} whole image{'s' * (plan.images > 1)}"
    else:
        part = f"{plan.rows}x{plan.columns} pixels"
    instance = INSTANCE_NAMES[plan.instance] + ", tf32" * (dtype == torch.float32)
    parts = ""
    if INSTANCE_NAMES[plan.instance] in CLUSTER_INSTANCES:
        parts = f" in {plan.row_parts} row x {plan.channel_parts} channel parts"
    rates = "" if plan.rates == plan.capability else f" (rates of sm_{plan.rates}, the nearest known to sm_{plan.capability})"
    return (
        f"CUDA, 1 launch, {instance}, {plan.ctas} CTAs of {part}{parts}, {warps(plan)} warps, "
        f"{plan.shared_bytes / 1024:.0f} KiB shared, {plan.ctas_per_multiprocessor} per SM; predicted "
        f"{plan.nanoseconds / 1000:.0f} us, per step {plan.steps_nanoseconds / 1000:.0f} us{rates}"
    )


def warps(plan: Plan) -> str:
    """Along the pixels, the output channels and, where several share those, the slices of a sum."""
    return f"{plan.warps_m}x{plan.warps_n}" + f"x{plan.warps_k}" * (plan.warps_k > 1)


def plan(problem: ChainProblem) -> str:
    return describe(plan_chain(problem, device_limits(problem.device)), problem.dtype)


def forward(
    problem: ChainProblem,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    packed: Sequence[Tensor] | None,
) -> Tensor:
    shape = (problem.batch, x.shape[1], problem.output_height, problem.output_width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if problem.batch:
        pitch = pixel_pitch(x)
        if pitch is None:
            x = x.clone(memory_format=torch.channels_last)
            pitch = x.shape[1]
        packed = packed or pack(weights, biases, problem.config)
        launch_chain(problem, Slots(x, pitch, problem.width), Slots(out, x.shape[1], problem.width), packed, problem.width)
    return out if problem.channels_last else out.contiguous()


class Slots(NamedTuple):
    """Groups of a channels-last tensor (N, C, H, W): elements from one pixel to the next, and from one group to the next."""

    data: Tensor
    pixel: int
    slot: int


def launch_chain(problem: ChainProblem, x: Slots, out: Slots, packed: Sequence[Tensor], fill: int) -> None:
    """The one launch, on the current stream of x's device. packed: from `pack`.

    fill: channels of each slot of `out` that are written; beyond the group's they become zero, provided they are zero in x.
    """
    c = problem.config
    passed = c.passed_group(problem.scale)
    settings = [
        problem.width, problem.steps, c.stride, c.dilation, int(c.hierarchical), c.first_convolved,
        -1 if passed is None else passed, POOLS[c.pool], x.pixel, x.slot, out.pixel, out.slot, fill,
        int(c.passthrough == "first_added"),
    ]  # fmt: skip
    launch = plan_chain(problem, device_limits(x.data.device))
    torch.ops.res2net_fused_native.cuda_chain(x.data, *packed, out.data, list(launch[:12]), settings, *CLAMPS[c.activation])


def pixel_pitch(x: Tensor) -> int | None:
    """Elements from one pixel of x (N, C, H, W) to the next, where the kernel can read x as it lies, else None.

    It needs channels side by side, pixels aligned to 4 bytes, and pixels in order; a slice of a wider channels-last tensor will
    do, unless an image then spans more bytes than the kernel counts.
    """
    batch, channels, height, columns = x.shape
    strides = (x.stride(3), x.stride(2), x.stride(0))
    sizes = (columns, height, batch)
    # The stride of a dimension of size 1 says nothing.
    pitch = next((stride for stride, size in zip(strides, sizes, strict=True) if size > 1), channels)
    expected = (pitch, pitch * columns, pitch * columns * height)
    dense = all(size == 1 or stride == want for size, stride, want in zip(sizes, strides, expected, strict=True))
    if x.stride(1) != 1 or not dense or pitch < channels or pitch * x.itemsize % 4 or x.data_ptr() % 4:
        return None
    if max(height * columns, MAX_POSITIONS) * pitch * x.itemsize >= 2**31:
        return None
    return pitch


def depth_channels(dtype: torch.dtype) -> int:
    """Input channels that one tensor-core instruction multiplies: 32 bytes."""
    return 32 // dtype.itemsize


def packed_columns(width: int, dtype: torch.dtype) -> int:
    """Output channels in units of 8, padded to whole warps of the width's instance (csrc/cuda/plan/launch_plan.cpp)."""
    columns, depths = -(-width // 8), -(-width // depth_channels(dtype))
    for instance_depths, instance_columns in _INSTANCE_DEPTHS_COLUMNS:
        if dtype != torch.float32 and instance_depths == depths and columns <= instance_columns:
            return instance_columns
    return min(-(-columns // c) * c for depths, c in _INSTANCE_DEPTHS_COLUMNS if depths == 0)


def pack(weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig) -> list[Tensor]:
    """[weights in blocks of 8 output channels, biases (steps, columns * 8) in fp32].

    (w, w, 3, 3) each -> (steps, 9 * depths, columns, 2, 8, 16 bytes) of the weights' dtype, float32 rounded to TF32: of a tap's
    32 bytes of input channels the first and the second half, each for 8 output channels. These are the matrices of 128 bytes
    that both ldmatrix and wgmma read, so all kernels share one packing. What pads input and output channels is zero.
    """
    width, dtype = weights[0].shape[0], weights[0].dtype
    half = depth_channels(dtype) // 2
    depths, columns, steps = -(-width // depth_channels(dtype)), packed_columns(width, dtype), len(weights)
    padded = weights[0].new_zeros(steps, 9, depths * depth_channels(dtype), columns * 8)
    for step, weight in enumerate(weights):
        padded[step, :, :width, :width] = weight.detach().permute(2, 3, 1, 0).reshape(9, width, width)
    split = padded.reshape(steps, 9 * depths, 2, half, columns, 8)
    packed = split.permute(0, 1, 4, 2, 5, 3).contiguous()
    if dtype == torch.float32:
        packed = round_to_tf32(packed)
    bias = torch.zeros(steps, columns * 8, dtype=torch.float32, device=packed.device)
    if biases is not None:
        bias[:, :width] = torch.stack([b.detach().float() for b in biases])
    return [packed, bias]
