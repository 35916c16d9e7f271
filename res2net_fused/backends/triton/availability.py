"""Whether Triton can run here, and what the device and PyTorch's settings say to a plan."""

from __future__ import annotations

import functools
import os
import re

import torch

from ...chain.problem import Chain1dProblem, ChainProblem
from .step_plan import StepPlan, dot_precision, plan_steps, plan_training

MINIMUM_CAPABILITY = (8, 0)

# At "0" NVIDIA's libraries use TF32 nowhere, whatever a program sets; every other value is reserved and changes nothing.
OVERRIDE = "NVIDIA_TF32_OVERRIDE"


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; the oldest supported one stands for the interpreter on a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else MINIMUM_CAPABILITY


def convolution_precision() -> str:
    """What cuDNN's convolutions may do with float32: "tf32", "ieee" or "none"."""
    return torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]  # torch adds `conv` at run time


def tf32_is_overridden() -> bool:
    """Whether the environment forbids TF32. PyTorch's settings do not show it: cuDNN reads the variable itself."""
    return os.environ.get(OVERRIDE) == "0"


def convolutions_use_tf32() -> bool:
    """Whether cuDNN's convolutions may round float32 to TF32; reading `allow_tf32` can raise, this does not."""
    return convolution_precision() == "tf32" and not tf32_is_overridden()


def uses_tf32(problem: ChainProblem | Chain1dProblem) -> bool:
    """Whether this call's convolutions may round float32 to TF32; the interpreter has none."""
    return problem.device.type == "cuda" and convolutions_use_tf32()


def precision_of(problem: ChainProblem | Chain1dProblem) -> str:
    """Precision of this call's products, as `tl.dot` names it; PyTorch's settings are looked at where they count."""
    return dot_precision(problem.dtype, problem.dtype == torch.float32 and uses_tf32(problem))


def plan_for(
    problem: ChainProblem,
    compute_capability: tuple[int, int],
    *,
    precision: str | None = None,
    pitch: int | None = None,
    in_place: bool = False,
) -> StepPlan:
    """`plan_steps` at a precision, as `tl.dot` names it, or (None) under PyTorch's current settings."""
    tf32 = uses_tf32(problem) if precision is None else precision == "tf32"
    return plan_steps(problem, compute_capability, tf32=tf32, pitch=pitch, in_place=in_place)


def plan_training_for(problem: ChainProblem, compute_capability: tuple[int, int]) -> StepPlan:
    """`plan_training` under PyTorch's current settings."""
    return plan_training(problem, compute_capability, tf32=uses_tf32(problem))


MINIMUM_TRITON = (3, 6)


@functools.cache
def why_not_installed() -> str | None:
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


def interpreted() -> bool:
    from .kernels import conv3x3_fwd

    return conv3x3_fwd.interpreted()


def why_not_device(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why Triton cannot run on this machine or in this type, or None."""
    missing = why_not_installed()
    if missing is not None:
        return missing
    if dtype == torch.float64:
        return "x is torch.float64; allowed are torch.float32, torch.float16 and torch.bfloat16"
    if device.type == "cpu":
        if not interpreted():
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
