"""Backend `cuda`: the place of the native CUDA kernels. This version ships none, so it always says why it cannot run."""

from __future__ import annotations

from .. import native
from ..chain import ChainProblem


def why_not(problem: ChainProblem) -> str | None:
    if problem.device.type != "cuda":
        return f"x is on {problem.device}; this backend runs on cuda tensors"
    status = native.cuda_library()
    return status.reason or "this version has no native CUDA kernel for the chain"
