"""The chain on Triton: whether it can run, packing, the plan, the launches."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...chain.config import ChainConfig
from ...chain.problem import ChainProblem
from .availability import capability, plan_for, plan_training_for, precision_of, why_not_device, why_not_installed
from .step_plan import padded_channels, why_not_size
from .tf32 import for_every_precision
from .training import describe, why_not_whole_batch

if TYPE_CHECKING:
    from .launch import KernelCall  # imports Triton, which may be missing


def why_not(problem: ChainProblem) -> str | None:
    return why_not_installed() or why_not_device(problem.device, problem.dtype) or why_not_size(problem)


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
    from .kernels.common import pack_weights

    width = weights[0].shape[0]
    packed = pack_weights(list(weights), config.groups, padded_channels(width // config.groups))
    packed = for_every_precision(packed, only)
    if biases is None:
        return [packed, torch.zeros(len(weights), width, dtype=torch.float32, device=packed.device)]
    return [packed, torch.stack([bias.detach().float() for bias in biases])]


def tiles(problem: ChainProblem) -> Hashable:
    """All that kernels of this chain are compiled for and that its plans choose."""
    own = capability(problem.device)
    plan = plan_for(problem, own)
    return plan.tile, plan.launches, plan.precision, plan_training_for(problem, own).tile


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
    from .prepared import launch

    # The kernels read and write channels side by side; every other stride may be what it is.
    if x.stride(1) != 1 and x.shape[1] > 1:
        x = x.contiguous(memory_format=torch.channels_last)
    direct = out if out.stride(1) == 1 or x.shape[1] == 1 else torch.empty_like(out, memory_format=torch.channels_last)
    precision = precision_of(problem)
    launch(_calls, (problem, precision), (x, direct, *(packed or pack(weights, biases, problem.config, precision))))
    return out if direct is out else out.copy_(direct)


def _calls(tensors: Sequence[Tensor], problem: ChainProblem, precision: str) -> Iterator[KernelCall]:
    from .kernels.common import GroupView
    from .kernels.conv3x3_fwd import chain_calls

    x, out, weights, bias = tensors
    chain = plan_for(problem, capability(problem.device), precision=precision)
    x_slots, out_slots = (GroupView(t, problem.width, problem.width) for t in (x, out))
    return chain_calls(problem, chain, x_slots, out_slots, weights, bias)
