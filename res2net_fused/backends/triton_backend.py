"""Backend `triton`: one launch per convolution on GPUs from sm_80 on, or the same kernels in Triton's interpreter."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Sequence

import torch
from torch import Tensor

from ..chain import ChainConfig, ChainProblem
from ..kernels.step_plan import padded_lanes, why_not_size
from ..kernels.tf32 import for_every_precision
from .triton_block import block_forward, pack_block
from .triton_settings import MINIMUM_CAPABILITY, capability, plan_for
from .triton_training import chain_backward, describe, runs_chain_backward, train_backward, train_forward, why_not_whole_batch

__all__ = [
    "block_forward", "chain_backward", "forward", "pack", "pack_block", "plan", "plan_training", "runs_chain_backward",
    "train_backward", "train_forward", "why_not", "why_not_training",
]  # fmt: skip

SYNCHRONISES = True  # statistics over several processes, between its launches
MINIMUM_TRITON = (3, 6)


@functools.cache
def _missing() -> str | None:
    """Why Triton cannot be used at all, or None."""
    try:
        import triton

        version = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2]))
    except Exception as error:  # missing, or broken in whatever way, such as a folder left empty
        return f"Triton cannot be imported ({error!r:.200}): `pip install triton`"
    if version < MINIMUM_TRITON:
        return f"Triton is {triton.__version__}; at least {'.'.join(map(str, MINIMUM_TRITON))} is needed"
    return None


@functools.cache
def _driver_refusal() -> str | None:
    """Why Triton cannot launch anything on the GPU that is there, or None.

    Its driver compiles a helper, which includes Python.h, with the C compiler once, and keeps it in the cache folder.
    """
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:
        compiler = "it needs a C compiler (gcc or clang on PATH, or CC), Python's headers (Debian: python3-dev)"
        remedy = f"{compiler} and a cache folder that can be written (TRITON_CACHE_DIR)"
        return f"Triton's driver does not start ({error!r:.200}): {remedy}"
    return None


def _interpreted() -> bool:
    from ..kernels import conv3x3_step

    return conv3x3_step.interpreted()


def why_not_device(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot run on this machine or in this type, or None."""
    missing = _missing()
    if missing is not None:
        return missing
    if dtype == torch.float64:
        return "x is torch.float64; allowed are torch.float32, torch.float16 and torch.bfloat16"
    if device.type == "cpu":
        if not _interpreted():
            return "x is on the CPU, which needs TRITON_INTERPRET=1 set before Triton is imported; else a CUDA device"
        if dtype == torch.bfloat16:
            return "x is torch.bfloat16, in which Triton's interpreter multiplies wrongly; use torch.float16"
    elif device.type != "cuda":
        return f"x is on {device}; it must be on a CUDA device"
    elif torch.version.hip is not None:
        return "x is on an AMD GPU; an NVIDIA GPU is needed"
    elif capability(device) < MINIMUM_CAPABILITY:
        found = "{}.{}".format(*capability(device))
        return f"{device} has compute capability {found}; at least 8.0 is needed"
    elif torch.cuda.is_available():
        return _driver_refusal()
    return None


def why_not(problem: ChainProblem) -> str | None:
    return _missing() or why_not_device(problem.device, problem.dtype) or why_not_size(problem)


def why_not_training(problem: ChainProblem) -> str | None:
    return why_not(problem) or why_not_whole_batch(problem)


def plan_training(problem: ChainProblem) -> str:
    return describe(problem)


def pack(
    weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig, only: str | None = None
) -> list[Tensor]:
    """[(precisions, steps, groups, 9, w/groups, w/groups padded), biases (steps, w) in fp32].

    precisions: those of `for_every_precision`, or only this one.
    """
    from ..kernels.implicit_gemm import pack_weights

    width = weights[0].shape[0]
    packed = pack_weights(list(weights), config.groups, padded_lanes(width // config.groups))
    packed = for_every_precision(packed, only)
    if biases is None:
        return [packed, torch.zeros(len(weights), width, dtype=torch.float32, device=packed.device)]
    return [packed, torch.stack([bias.detach().float() for bias in biases])]


def plan(problem: ChainProblem) -> str:
    return plan_for(problem, capability(problem.device)).describe(problem)


def forward(
    problem: ChainProblem,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    packed: Sequence[Tensor] | None,
) -> Tensor:
    shape = (problem.batch, x.shape[1], problem.output_height, problem.output_width)
    wanted = torch.channels_last if problem.channels_last else torch.contiguous_format
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=wanted)
    if problem.batch == 0:
        return out
    from ..kernels.conv3x3_step import chain_calls
    from ..kernels.implicit_gemm import Slots

    # The kernels read and write channels side by side; every other stride may be what it is.
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous(memory_format=torch.channels_last)
    direct = out if out.stride(1) == 1 or x.shape[1] == 1 else torch.empty_like(out, memory_format=torch.channels_last)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        x_slots = Slots(x, problem.width, problem.width)
        out_slots = Slots(direct, problem.width, problem.width)
        chain = plan_for(problem, capability(problem.device))
        packed_weights, bias = packed if packed else pack(weights, biases, problem.config, chain.precision)
        for call in chain_calls(problem, chain, x_slots, out_slots, packed_weights, bias):
            call.run()
    return out if direct is out else out.copy_(direct)
