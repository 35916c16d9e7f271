"""The chain in one launch: whether it can run, the call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..._native import library
from ...chain.activations import CLAMPS
from ...chain.problem import ChainProblem
from .. import choices, overlap
from ..triton import chain as triton_chain
from ..triton.availability import OVERRIDE, convolution_precision, convolutions_use_tf32, tf32_is_overridden
from ..triton.block import slot_pitch
from ..verification import is_suspended
from .packing import pack
from .plan import Plan, copied_group, describe, device_limits, plan_chain, plan_request, planned, unsupported

POOLS = {None: 0, "avg3": 1, "avg3_nopad": 2}  # enum Pool in csrc/cuda/plan/arguments.h

MAX_POSITIONS = 2**15  # pixels of several whole images in one CTA: csrc/cuda/plan/time_model.h


def why_not(problem: ChainProblem) -> str | None:
    device = problem.device
    if device.type != "cuda":
        return f"x is on {device}; this backend runs on cuda tensors"
    for status in (library.cuda_library(), library.cpu_library()):  # the plan comes from the latter
        if not status.loaded:
            return status.reason
    if torch.version.hip is not None:
        return "x is on an AMD GPU; an NVIDIA GPU is needed"
    why = unsupported(problem) or precision_refusal(problem)
    return why or planned(plan_request(problem), device_limits(device))[1] or None


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


_TRIED = 6  # plans that a measurement tries,
_SLOWER = 1.5  # of those predicted to take up to so many times the fastest one's time


def ways(problem: ChainProblem) -> tuple[str, ...]:
    """The predicted plan, "cuda", and the next ones, "cuda:1" the one behind it."""
    limits = device_limits(problem.device)
    plans = [plan_chain(problem, limits, rank) for rank in range(_TRIED)]
    others = [rank for rank in range(1, _TRIED) if plans[rank].nanoseconds <= _SLOWER * plans[0].nanoseconds]
    return "cuda", *(f"cuda:{rank}" for rank in others if plans[rank] not in plans[:rank])


def chosen_plan(problem: ChainProblem) -> Plan:
    """The plan of a call on its device: the predicted one, or what was measured of this very size to be faster."""
    found = choices.lookup("inference", problem)
    rank = found.fused.removeprefix("cuda:") if found is not None and found.exact and found.backend == "cuda" else ""
    return plan_chain(problem, device_limits(problem.device), int(rank) if rank.isdecimal() else 0)


def why_not_auto(problem: ChainProblem) -> str | None:
    """Why `auto` should rather try the next backend, for a call that could run here."""
    plan = plan_chain(problem, device_limits(problem.device))
    if plan.nanoseconds <= plan.steps_nanoseconds:
        return None
    return (
        f"one launch is predicted to take {plan.nanoseconds / 1000:.0f} us, "
        f"one per convolution {plan.steps_nanoseconds / 1000:.0f} us"
    )


def plan(problem: ChainProblem) -> str:
    return describe(chosen_plan(problem), problem.dtype)


def native_settings(problem: ChainProblem, x: Tensor, packed: bool) -> list[int] | None:
    """[elements from one pixel of x to the next or 0 for a copy, of a block from one group to the next, *the launch, overlaps].

    The native body launches what has been compared with float64 and packs nothing. PyTorch's settings decide about float32 at
    each call, and blocks around whose chain Triton computes are Python's.
    """
    if not packed or problem.dtype == torch.float32 or is_suspended():
        return None
    if problem.around is None:
        pitch = pixel_pitch(x) or 0
    elif triton_chain.why_not(problem) is None:
        return None
    else:
        pitch = slot_pitch(problem.width, 1, x.dtype.itemsize)
    return [pitch, *chosen_plan(problem).launch_arguments().values(), int(overlaps(problem))]


def overlaps(problem: ChainProblem) -> bool:
    """Whether the launch may begin while the one before it ends."""
    return overlap.allowed(device_limits(problem.device)[:2])


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
    A block launches conv1 between whoever packs weights and the chain, which may then read them before its predecessor ends.
    """
    c = problem.config
    passed = copied_group(problem)
    lower, upper = CLAMPS[c.activation]
    torch.ops.res2net_fused_native.cuda_chain(
        x.data, *packed, out.data, **chosen_plan(problem).launch_arguments(),
        channels=problem.width, steps=problem.steps, stride=c.stride, dilation=c.dilation, adds=c.hierarchical,
        first_group=c.first_convolved, passed_group=-1 if passed is None else passed, pool=POOLS[c.pool],
        x_pixel=x.pixel, x_slot=x.slot, out_pixel=out.pixel, out_slot=out.slot, fill_channels=fill,
        add_passed=c.adds_passed, overlaps=overlaps(problem), weights_stand=problem.around is not None,
        lower=lower, upper=upper,
    )  # fmt: skip


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
