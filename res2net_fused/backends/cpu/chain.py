"""The chain on the CPU: whether it can run, packing, the plan, the call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..._native import library
from ...chain.config import ChainConfig
from ...chain.problem import ChainProblem
from .batch_norm import covers
from .convolution import chain_from_weights, convolves_faster, winograd_covers, winograd_pays
from .settings import (
    ARITHMETICS,
    arithmetic,
    chain_arguments,
    instruction_set,
    measured_arithmetic,
    operators,
)


def why_not_device(device: torch.device) -> str | None:
    return None if device.type == "cpu" else f"x is on {device}; this backend runs on cpu tensors"


def why_not(problem: ChainProblem) -> str | None:
    other_device = why_not_device(problem.device)
    if other_device is not None:
        return other_device
    status = library.cpu_library()
    if not status.loaded:
        return status.reason
    if problem.dtype == torch.float64:
        return "x is torch.float64; allowed are torch.float32, torch.float16 and torch.bfloat16"
    return None


def pack(weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig) -> list[Tensor]:
    """[Winograd weights (steps, 36 * w * w padded), direct weights (steps, 9 * w/groups * w padded), biases], in fp32.

    The first is empty where Winograd does not cover the configuration.
    """
    return _pack(weights, biases, config, winograd_covers(config))


def plan(problem: ChainProblem) -> str:
    """Describe a call with packed weights; one with plain weights and few pixels convolves directly."""
    return _plan(problem, arithmetic(measured_arithmetic(problem)))


def _plan(problem: ChainProblem, mode: int) -> str:
    return operators.cpu_plan(
        problem.batch, problem.height, problem.width_pixels, **chain_arguments(problem),
        arithmetic=mode, instruction_set=instruction_set(),
    )  # fmt: skip


def ways(problem: ChainProblem) -> tuple[str, ...]:
    """Return the plan's own arithmetic and those that make another plan."""
    if arithmetic():
        return ("cpu",)
    named = {f"cpu:{name}": _plan(problem, code) for name, code in ARITHMETICS.items() if code}
    own = _plan(problem, ARITHMETICS["auto"])
    return ("cpu", *(name for name, how in named.items() if how != own))


def forward(
    problem: ChainProblem,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    packed: Sequence[Tensor] | None,
) -> Tensor:
    mode, isa, from_weights = native_settings(problem)
    if not packed:
        if from_weights:
            out = chain_from_weights(problem, x, weights, biases)
            if out is not None:
                return out
        packed = _pack(weights, biases, problem.config, False)
    winograd, direct, bias = packed
    return operators.cpu_chain_forward.default(
        x, winograd, direct, bias, **chain_arguments(problem),
        channels_last=problem.channels_last, arithmetic=mode, instruction_set=isa,
    )  # fmt: skip


def native_settings(problem: ChainProblem) -> list[int]:
    """[arithmetic, instruction set, whether weights that are not packed are packed for Winograd in the call].

    What is measured is measured of packed weights.
    """
    mode = arithmetic()
    covered = winograd_covers(problem.config) and min(problem.height, problem.width_pixels) >= 2
    by_name = mode == ARITHMETICS["winograd"] and covered
    from_weights = by_name or (mode == ARITHMETICS["auto"] and winograd_pays(problem))
    return [arithmetic(measured_arithmetic(problem)), instruction_set(), from_weights]


def plan_training(problem: ChainProblem) -> str:
    passes = "native passes" if covers(problem) else "ATen's passes (the native ones are for float32 in channels-last)"
    return f"{passes}, convolutions and their gradients by {'Winograd' if convolves_faster(problem) else 'ATen'}"


def _pack(weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig, winograd: bool) -> list[Tensor]:
    with torch.no_grad():
        return operators.cpu_pack.default(list(weights), list(biases or ()), config.groups, winograd, instruction_set())
