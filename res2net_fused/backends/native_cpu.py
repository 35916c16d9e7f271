"""Backend `cpu`: the native CPU kernels of `csrc/cpu`, a fused Winograd chain with direct convolution beside it.

Environment, read at every call:

* RES2NET_FUSED_CPU_ARITHMETIC: "auto" (default), "winograd" (wherever it can run) or "direct" (its rounding everywhere).
* RES2NET_FUSED_CPU_ISA: "portable", "avx2" or "avx512" instead of the best instruction set of this processor.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from ..chain import ACTIVATIONS, PASSTHROUGHS, POOLS, ChainConfig, ChainProblem
from ..folding import FoldedBlock
from .native_cpu_training import chain_backward, covers, runs_chain_backward, train_backward, train_forward

__all__ = [
    "available_instruction_sets", "block_forward", "chain_backward", "convolution", "convolves_faster", "forward",
    "input_gradient", "instruction_set", "pack", "pack_block", "plan", "plan_training", "runs_chain_backward", "settings",
    "train_backward", "train_forward", "weight_gradient", "why_not", "why_not_training",
]  # fmt: skip

ARITHMETIC_VARIABLE = "RES2NET_FUSED_CPU_ARITHMETIC"
ISA_VARIABLE = "RES2NET_FUSED_CPU_ISA"

# The codes are those of csrc/cpu/chain/plan.h and csrc/cpu/dispatch.h.
ARITHMETICS = {"auto": 0, "winograd": 1, "direct": 2}
INSTRUCTION_SETS = {"auto": -1, "portable": 0, "avx2": 1, "avx512": 2}

# Winograd's weights cost more to pack than they save in one call with fewer output pixels than this. One convolution and its
# gradients are measured 0.5 times as fast as ATen's with 49 pixels, 0.9 to 1.4 times with 98, 1.0 to 2 times from 392 on.
PIXELS_WORTH_PACKING = 96

PROJECTS = True  # the shortcut's projection is part of `block_forward`

_operators = torch.ops.res2net_fused_native


def why_not(problem: ChainProblem) -> str | None:
    if problem.device.type != "cpu":
        return f"x is on {problem.device}; this backend runs on cpu tensors"
    status = native.cpu_library()
    if not status.loaded:
        return status.reason
    if problem.dtype == torch.float64:
        return "x is torch.float64; allowed are torch.float32, torch.float16 and torch.bfloat16"
    return None


def available_instruction_sets() -> list[str]:
    """Those that this build and this processor have, the best last; empty without the native library."""
    if not native.cpu_library().loaded:
        return []
    return [name for name, code in INSTRUCTION_SETS.items() if code >= 0 and _operators.cpu_has_instruction_set(code)]


def pack(weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig) -> list[Tensor]:
    """[Winograd weights (steps, 36 * w * w padded), direct weights (steps, 9 * w/groups * w padded), biases], in fp32.

    The first is empty where Winograd does not cover the configuration.
    """
    return _pack(weights, biases, config, _winograd_covers(config))


def plan(problem: ChainProblem) -> str:
    """Of a call with packed weights; one with plain weights and few pixels convolves directly."""
    sizes = (problem.batch, problem.height, problem.width_pixels)
    return _operators.cpu_plan(*sizes, settings(problem), _arithmetic(), instruction_set())


def forward(
    problem: ChainProblem,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    packed: Sequence[Tensor] | None,
) -> Tensor:
    arithmetic, isa = _arithmetic(), instruction_set()
    if not packed:
        if arithmetic == ARITHMETICS["winograd"] or arithmetic == ARITHMETICS["auto"] and _winograd_pays(problem):
            out = _from_weights(problem, x, weights, biases)
            if out is not None:
                return out
        packed = _pack(weights, biases, problem.config, False)
    winograd, direct, bias = packed
    return _operators.cpu_chain_forward.default(
        x, winograd, direct, bias, settings(problem), problem.channels_last, arithmetic, isa
    )


def pack_block(folded: FoldedBlock, config: ChainConfig) -> list[Tensor]:
    """[conv1 (panels of 16 output channels), its biases, conv3, its biases, projection, then what `pack` returns], in fp32.

    The projection of the shortcut is empty where there is none; its biases are added to conv3's.
    """
    projection, bias = folded.conv1_weight.new_empty(0), folded.conv3_bias
    with torch.no_grad():
        if folded.projection_weight is not None and folded.projection_bias is not None:
            projection, _ = _pack_pointwise(folded.projection_weight, folded.projection_bias)
            bias = bias + folded.projection_bias
        conv1, conv3 = _pack_pointwise(folded.conv1_weight, folded.conv1_bias), _pack_pointwise(folded.conv3_weight, bias)
    return [*conv1, *conv3, projection, *pack(folded.weights, folded.biases, config)]


def block_forward(problem: ChainProblem, x: Tensor, shortcut: Tensor | None, folded: FoldedBlock, relu: bool) -> Tensor:
    """As `block.run_block`, of which this is the `cpu` backend's own form: each image through the whole block in cache."""
    packed = folded.packed or pack_block(folded, problem.config)
    return _operators.cpu_block_forward.default(
        x, shortcut, packed, folded.conv3_weight.shape[0], folded.projection_stride, relu, settings(problem),
        problem.channels_last, _arithmetic(), instruction_set(),
    )  # fmt: skip


def _pack_pointwise(weight: Tensor, bias: Tensor) -> list[Tensor]:
    return _operators.cpu_pack_pointwise.default(weight, bias, instruction_set())


def why_not_training(problem: ChainProblem) -> str | None:
    return why_not(problem)


def plan_training(problem: ChainProblem) -> str:
    passes = "native passes" if covers(problem) else "ATen's passes (the native ones are for float32 in channels-last)"
    return f"{passes}, convolutions and their gradients by {'Winograd' if convolves_faster(problem) else 'ATen'}"


def convolution(problem: ChainProblem, u: Tensor, weight: Tensor) -> Tensor | None:
    """z (N, w, H, W) of one 3x3 convolution without bias or activation; None where ATen's is faster.

    problem: of that convolution. The weights are packed in the call.
    """
    return _from_weights(problem, u, [weight]) if convolves_faster(problem) else None


def input_gradient(problem: ChainProblem, dz: Tensor, weight: Tensor) -> Tensor | None:
    """du of one 3x3 convolution, a convolution of dz (N, w, H, W) by the turned weight; None where ATen's is faster."""
    return _from_weights(problem, dz, [weight], turned=True) if convolves_faster(problem) else None


def weight_gradient(
    problem: ChainProblem, dz: Tensor, u: Tensor, weight_format: torch.memory_format
) -> tuple[Tensor | None, Tensor | None]:
    """(dK (w, w, 3, 3), db (w,)) of one 3x3 convolution from dz and u, both (N, w, H, W); None where ATen's are to be taken.

    These are slower, or a gradient is not finite: Winograd overflows earlier and makes NaN of Inf.
    """
    if not convolves_faster(problem):
        return None, None
    found = _operators.cpu_weight_gradient.default(dz, u, weight_format == torch.channels_last, instruction_set())
    return (found[0], found[1]) if found else (None, None)


def _from_weights(
    problem: ChainProblem, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None, turned: bool = False
) -> Tensor | None:
    """The chain by Winograd from plain weights; None where it does not cover the problem or a result is not finite.

    turned: by the weights of the input gradient.
    """
    if not _winograd_covers(problem.config) or min(problem.height, problem.width_pixels) < 2:
        return None
    with torch.no_grad():
        found = _operators.cpu_chain_from_weights.default(
            x, list(weights), list(biases or ()), turned, settings(problem), problem.channels_last, instruction_set()
        )
    return found[0] if found else None


def convolves_faster(problem: ChainProblem) -> bool:
    """Whether Winograd runs one convolution faster than ATen does."""
    return problem.dtype == torch.float32 and _arithmetic() != ARITHMETICS["direct"] and _winograd_pays(problem)


def _winograd_pays(problem: ChainProblem) -> bool:
    """Whether weights that are packed, or whose gradient is unpacked, at every call are worth it."""
    pixels = problem.batch * problem.height * problem.width_pixels
    sizes = problem.width >= 8 and pixels >= PIXELS_WORTH_PACKING and min(problem.height, problem.width_pixels) >= 2
    return sizes and _winograd_covers(problem.config)


def _winograd_covers(config: ChainConfig) -> bool:
    return config.stride == config.dilation == config.groups == 1


def _pack(weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig, winograd: bool) -> list[Tensor]:
    with torch.no_grad():
        return _operators.cpu_pack.default(list(weights), list(biases or ()), config.groups, winograd, instruction_set())


def settings(problem: ChainProblem) -> list[int]:
    """As `problem_of` in csrc/cpu/ops/op_arguments.h takes it: enumerations by their place in the tables of `chain`."""
    return [problem.width, problem.steps, *_config_codes(problem.config)]


@functools.lru_cache
def _config_codes(config: ChainConfig) -> tuple[int, ...]:
    return (
        config.stride,
        config.dilation,
        config.groups,
        int(config.hierarchical),
        PASSTHROUGHS.index(config.passthrough),
        POOLS.index(config.pool),
        ACTIVATIONS.index(config.activation),
    )


def _arithmetic() -> int:
    return _code(ARITHMETIC_VARIABLE, ARITHMETICS)


def instruction_set() -> int:
    """The code of the one that the environment asks for, or that of the best."""
    code = _code(ISA_VARIABLE, INSTRUCTION_SETS)
    if code > 0 and not _operators.cpu_has_instruction_set(code):
        name = os.environ[ISA_VARIABLE]
        available = ", ".join(map(repr, available_instruction_sets()))
        raise RuntimeError(f"{ISA_VARIABLE}={name!r}: this machine has no {name} kernels; it has {available}")
    return code


def _code(variable: str, codes: dict[str, int]) -> int:
    name = os.environ.get(variable) or "auto"
    if name not in codes:
        raise ValueError(f"{variable}={name!r}: allowed are {', '.join(map(repr, codes))}")
    return codes[name]
