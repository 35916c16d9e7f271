"""Backend `cpu`: the place of the native CPU kernels. This version ships none, so it always says why it cannot run."""

from __future__ import annotations

from .. import native
from ..chain import ChainProblem


def why_not(problem: ChainProblem) -> str | None:
    if problem.device.type != "cpu":
        return f"x is on {problem.device}; this backend runs on cpu tensors"
    status = native.cpu_library()
    return status.reason or "this version has no native CPU kernel for the chain"
