"""Launch plans of the CUDA kernels, from a C++ function of the CPU library: they need no GPU."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from ..._native import library
from ...chain.activations import CLAMPS
from ...chain.config import ChainConfig
from ...chain.problem import ChainProblem
from ..triton.block import slot_pitch

TYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}  # enum DataType in csrc/cuda/plan/data_type.h

STRIP_INSTANCES = ("d1c2t4", "d2c4t4", "d3c6t4", "d4c7t4", "d0c6t2", "d0c7t2", "d0c4t2")  # as in csrc/cuda/plan/instances.h

CLUSTER_INSTANCES = ("cluster_c2t2", "cluster_c4t2", "cluster_c7t2")

WGMMA_INSTANCES = ("wgmma_c6t2", "wgmma_c7t2", "wgmma_c12t2", "wgmma_c14t2")

INSTANCE_NAMES = STRIP_INSTANCES + CLUSTER_INSTANCES + WGMMA_INSTANCES

# What a plan needs to know of a device without having it, in the order of library.DeviceLimits.
LIMITS = {
    "sm_80": library.DeviceLimits(8, 0, 108, 166912, 167936, 65536, 40 * 2**20, 0, 80),
    "sm_86": library.DeviceLimits(8, 6, 84, 101376, 102400, 65536, 6 * 2**20, 0, 80),
    "sm_89": library.DeviceLimits(8, 9, 128, 101376, 102400, 65536, 72 * 2**20, 0, 80),
    "sm_90": library.DeviceLimits(9, 0, 132, 232448, 233472, 65536, 50 * 2**20, 1, 90),
    "sm_100": library.DeviceLimits(10, 0, 148, 232448, 233472, 65536, 126 * 2**20, 0, 100),
    "sm_120": library.DeviceLimits(12, 0, 170, 101376, 102400, 65536, 96 * 2**20, 0, 100),
}


class PlanRequest(NamedTuple):
    """What a plan is made for, besides the device; fields are arguments of `cuda_chain_plan` in csrc/cuda/plan/plan_ops.cpp."""

    images: int
    height: int
    width: int
    channels: int  # of a group
    steps: int
    stride: int
    dilation: int
    adds: bool
    passes: bool  # whether the launch copies or pools a group that has no convolution
    type: int  # of TYPES
    slot: int  # channels from one group of a pixel to the next


class Plan(NamedTuple):
    """How one call is launched, in the order in which `plan_as_numbers` in csrc/cuda/plan/launch_plan.cpp gives it."""

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
    issue_nanoseconds: int  # at the least: instructions of the busiest multiprocessor,
    tensor_nanoseconds: int  # its products,
    shared_nanoseconds: int  # its shared memory,
    memory_nanoseconds: int  # and the device's; all without start and launch

    def launch_arguments(self) -> dict[str, int]:
        """Return those fields, by name, that the kernel's launch is told."""
        return dict(zip(self._fields[: self._fields.index("ctas")], self, strict=False))

    def bounds(self) -> tuple[int, int, int, int]:
        """Return the nanoseconds that issue slots, tensor cores, shared memory and memory need at the least."""
        return self.issue_nanoseconds, self.tensor_nanoseconds, self.shared_nanoseconds, self.memory_nanoseconds


def unsupported(problem: ChainProblem) -> str | None:
    """Say what in this call no instance of the kernel does, on any device, or None."""
    config = problem.config
    if problem.dtype not in TYPES:
        return f"x is {problem.dtype}; this backend runs {', '.join(map(str, TYPES))}"
    if config.groups != 1:
        return f"groups is {config.groups}; this backend runs groups=1"
    if config.pool == "max3":
        return "pool is 'max3'; this backend averages, or passes the group as it is"
    if config.activation not in CLAMPS:
        return f"activation is {config.activation!r}; this backend runs {', '.join(map(repr, CLAMPS))}"
    return None


@functools.cache
def device_limits(device: torch.device) -> library.DeviceLimits:
    """What the CUDA device offers; needs the CUDA library."""
    index = torch.cuda.current_device() if device.index is None else device.index
    return library.DeviceLimits(*torch.ops.res2net_fused_native.device_limits(index))


def plan_chain(problem: ChainProblem, limits: library.DeviceLimits, rank: int = 0) -> Plan:
    """How this call would be launched on a device with these limits. Needs the CPU library, but no GPU.

    rank: how many plans that cut the images otherwise are predicted to be faster; beyond the last one the last.
    Raises RuntimeError where the library is not built, ValueError with the reason where no plan fits.
    """
    status = library.cpu_library()
    if not status.loaded:
        raise RuntimeError(status.reason)
    reason = unsupported(problem)
    found = None
    if reason is None:
        found, reason = planned(plan_request(problem), limits, rank)
    if found is None:
        raise ValueError(reason)
    return found


def slot_of(problem: ChainProblem) -> int:
    """Channels from one group of a pixel to the next: dense, but for a block, which lays them out itself."""
    return problem.width if problem.around is None else slot_pitch(problem.width, 1, problem.dtype.itemsize)


def passes_beside(config: ChainConfig) -> bool:
    """Whether a block's conv1 writes the group that passes straight to its place in y: where it is the last, as it is."""
    return config.passthrough == "last" and config.pool is None


def copied_group(problem: ChainProblem) -> int | None:
    """The group that the chain's launch passes on itself, or None."""
    if problem.around is not None and passes_beside(problem.config):
        return None
    return problem.config.passed_group(problem.scale)


def plan_request(problem: ChainProblem) -> PlanRequest:
    c = problem.config
    return PlanRequest(
        max(1, problem.batch), problem.height, problem.width_pixels, problem.width, problem.steps, c.stride, c.dilation,
        c.hierarchical, copied_group(problem) is not None, TYPES[problem.dtype], slot_of(problem),
    )  # fmt: skip


@functools.lru_cache(4096)
def planned(request: PlanRequest, limits: library.DeviceLimits, rank: int = 0) -> tuple[Plan | None, str]:
    ops, arguments = torch.ops.res2net_fused_native, request._asdict() | limits._asdict() | {"rank": rank}
    found = ops.cuda_chain_plan(**arguments)
    return (Plan(*found), "") if found else (None, ops.cuda_chain_refusal(**arguments))


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
