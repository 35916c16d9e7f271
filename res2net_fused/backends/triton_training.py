"""The forward pass with BatchNorm in training mode by the Triton kernels; backward is PyTorch's operators (`training.py`)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ..chain import ChainProblem
from ..kernels.step_plan import MAX_PIXELS, padded_lanes
from ..reference import pool_passthrough
from ..training import Statistics
from .selection import Backend
from .triton_settings import capability, plan_for


def why_not_whole_batch(problem: ChainProblem) -> str | None:
    """Statistics are of the whole batch, which is therefore not cut into chunks."""
    pixels = problem.batch * problem.output_height * problem.output_width
    if pixels > MAX_PIXELS:
        return f"the batch has {pixels} output pixels; at most {MAX_PIXELS} are allowed in training mode"
    return None


def train_forward(
    backend: Backend,
    problem: ChainProblem,
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    keep: bool,
) -> tuple[Tensor, Statistics, list[Tensor]]:
    """As `training.train_forward`, channels-last."""
    from ..kernels.conv3x3_step import Slots, pack_weights
    from ..kernels.train_step import train_calls

    config, width = problem.config, problem.width
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous(memory_format=torch.channels_last)

    def pixels_of(channels: int) -> Tensor:
        shape = problem.batch, channels, problem.output_height, problem.output_width
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    out = pixels_of(x.shape[1])
    buffers = [pixels_of(width) for _ in range(problem.steps if keep else min(2, problem.steps))]
    z = [buffers[k % len(buffers)] for k in range(problem.steps)]  # only the last one is read again
    statistics = torch.empty((4, problem.steps, width), dtype=torch.float32, device=x.device)
    packed = pack_weights(list(weights), config.groups, padded_lanes(width // config.groups))
    gammas, betas = ([t.detach().float().contiguous() for t in tensors] for tensors in (gammas, betas))
    groups, outputs = x.split(width, 1), out.split(width, 1)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        passed, first_u = config.passed_group(problem.scale), None
        if passed is not None:
            outputs[passed].copy_(pool_passthrough(groups[passed], config))
        if config.adds(config.first_convolved):  # what passed is also added
            first_u = groups[1] + outputs[0]
            first_u = first_u.contiguous(memory_format=torch.channels_last)
        plan = plan_for(problem, capability(problem.device))
        slots = Slots(x, width, width), first_u, Slots(out, width, width)
        for call in train_calls(problem, plan, *slots, z, statistics, packed, gammas, betas, eps):
            call.run()
    return out, Statistics(*(statistics[i].clone() for i in range(3))), z if keep else []
