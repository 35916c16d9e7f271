"""Which arithmetic and instruction set run, and the numbers by which the native code knows settings.

Environment, read at every call:

* RES2NET_FUSED_CPU_ARITHMETIC: "auto" (default: as measured, else as planned), "winograd" (wherever it can run) or "direct"
  (its rounding everywhere).
* RES2NET_FUSED_CPU_ISA: "portable", "avx2", "avx512" or "neon" instead of the best instruction set of this processor.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch

from ..._native import library
from ...chain.activations import ACTIVATIONS, split_activation
from ...chain.config import PASSTHROUGHS, POOLS, ChainConfig
from ...chain.problem import ChainProblem
from .. import choices

operators = torch.ops.res2net_fused_native

ARITHMETIC_VARIABLE = "RES2NET_FUSED_CPU_ARITHMETIC"

ISA_VARIABLE = "RES2NET_FUSED_CPU_ISA"

# The codes are those of csrc/cpu/chain/plan.h and csrc/cpu/runtime/dispatch.h.
ARITHMETICS = {"auto": 0, "winograd": 1, "direct": 2}

INSTRUCTION_SETS = {"auto": -1, "portable": 0, "avx2": 1, "avx512": 2, "neon": 3}


def available_instruction_sets() -> list[str]:
    """Those that this build and this processor have, the best last; empty without the native library."""
    if not library.cpu_library().loaded:
        return []
    return [name for name, code in INSTRUCTION_SETS.items() if code >= 0 and operators.cpu_has_instruction_set(code)]


def chain_arguments(problem: ChainProblem) -> dict[str, Any]:
    """Return what the operators are told of a chain without its images: `R2N_CHAIN` in csrc/cpu/ops/op_arguments.h."""
    return {"channels": problem.width, "steps": problem.steps, **_config_arguments(problem.config)}


@functools.lru_cache
def _config_arguments(config: ChainConfig) -> dict[str, Any]:
    codes = {
        "passthrough": PASSTHROUGHS.index(config.passthrough),
        "pool": POOLS.index(config.pool),
        **activation_arguments(config),
    }
    return {**config.as_kwargs(), **codes}


def activation_arguments(config: ChainConfig) -> dict[str, float]:
    """Return how the operators are told of an activation."""
    kind, slope = split_activation(config.activation)
    return {"activation": ACTIVATIONS.index(kind), "slope": slope}


def arithmetic(measured: str = "") -> int:
    """The code of what the environment asks for, else of what was `measured`, else of the native plan's own choice."""
    code = _code(ARITHMETIC_VARIABLE, ARITHMETICS)
    return code if code or not measured else ARITHMETICS[measured]


def measured_arithmetic(problem: ChainProblem) -> str:
    """What was measured to be faster for the call, or is being measured; "" where nothing was."""
    found = choices.lookup("inference", problem)
    return found.fused.removeprefix("cpu").removeprefix(":") if found is not None and found.backend == "cpu" else ""


def instruction_set() -> int:
    """The code of the one that the environment asks for, or that of the best."""
    code = _code(ISA_VARIABLE, INSTRUCTION_SETS)
    if code >= 0 and not operators.cpu_has_instruction_set(code):
        name = os.environ[ISA_VARIABLE]
        available = ", ".join(map(repr, available_instruction_sets()))
        raise RuntimeError(f"{ISA_VARIABLE}={name!r}: this machine has no {name} kernels; it has {available}")
    return code


def _code(variable: str, codes: dict[str, int]) -> int:
    name = os.environ.get(variable) or "auto"
    if name not in codes:
        raise ValueError(f"{variable}={name!r}: allowed are {', '.join(map(repr, codes))}")
    return codes[name]
