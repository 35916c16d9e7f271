"""What the device and PyTorch's settings say to a plan of the Triton path."""

from __future__ import annotations

import functools
import os

import torch

from ..chain import ChainProblem
from ..chain1d import Chain1dProblem
from ..kernels.step_plan import StepPlan, dot_precision, plan_steps, plan_training

MINIMUM_CAPABILITY = (8, 0)
# At "0" NVIDIA's libraries use TF32 nowhere, whatever a program sets; every other value is reserved and changes nothing.
OVERRIDE = "NVIDIA_TF32_OVERRIDE"


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a CUDA device; the oldest supported one stands for the interpreter on a CPU."""
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
    """Of this call's products, as `tl.dot` names it."""
    return dot_precision(problem.dtype, uses_tf32(problem))


def plan_for(
    problem: ChainProblem, compute_capability: tuple[int, int], *, pitch: int | None = None, in_place: bool = False
) -> StepPlan:
    """`plan_steps` under PyTorch's current settings."""
    return plan_steps(problem, compute_capability, tf32=uses_tf32(problem), pitch=pitch, in_place=in_place)


def plan_training_for(problem: ChainProblem, compute_capability: tuple[int, int]) -> StepPlan:
    """`plan_training` under PyTorch's current settings."""
    return plan_training(problem, compute_capability, tf32=uses_tf32(problem))
