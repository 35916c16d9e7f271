"""The backends of the 1-D chain: `reference`, `cpu` and `triton`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..chain.problem import Chain1dProblem
from ..chain.reference import affine_1d
from .cpu.chain1d import Convolutions, Products, multiplies, pack_1d
from .selection import Choice, requested
from .triton import chain1d


def choose_1d(problem: Chain1dProblem, backend: str) -> Choice:
    """The backend that a call runs on. Raises RuntimeError where an explicit choice cannot run it.

    On GPUs auto takes PyTorch's operators: the Triton kernel was never timed there.
    """
    name, source = requested(backend)
    if name == "auto":
        reason = _why_not_cpu(problem)
        return Choice("cpu") if reason is None else Choice("reference", (("cpu", reason),))
    why = _WHY_NOT[name](problem)
    if why is not None:
        raise RuntimeError(f"{source} cannot run {problem}: {why}")
    return Choice(name, requested_by=source)


def plan_1d(problem: Chain1dProblem, name: str) -> str:
    """One line for `explain`."""
    if name == "reference":
        return f"ATen, one convolution at a time: {problem.steps} convolutions, then one concatenation"
    if name == "triton":
        return chain1d.plan_1d(problem)
    return "one product for each tap" if multiplies(problem) else "convolutions of padded rows, written into their places"


def _why_not_cpu(problem: Chain1dProblem) -> str | None:
    if problem.device.type != "cpu":
        return f"x is on {problem.device}; this backend runs on cpu tensors"
    return None


_WHY_NOT = {
    "reference": lambda problem: None,
    "cpu": _why_not_cpu,
    "triton": chain1d.why_not_1d,
    "cuda": lambda problem: "it has no 1-D kernels",
}


def forward_1d(
    name: str,
    problem: Chain1dProblem,
    x: Tensor,  # (N, s*w, L)
    weights: Sequence[Tensor],  # each (w, w, k)
    biases: Sequence[Tensor] | None,  # each (w,), as the affine map
    affine_scale: Sequence[Tensor] | None,
    affine_shift: Sequence[Tensor] | None,
    packed: Sequence[Tensor] | None,  # what `pack_1d` returned, or None
    keep: bool,
) -> tuple[Tensor, list[Tensor]]:
    """out (N, s*w, L), contiguous, and with `keep` relu(K_i u_i + b_i) of every convolution, each (N, w, L)."""
    if name == "triton":
        return chain1d.forward_1d(problem, x, weights, biases, affine_scale, affine_shift, keep)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    chain, width = problem.config.chain, problem.width
    groups, outputs = x.split(width, 1), out.split(width, 1)
    products = name == "cpu" and multiplies(problem)
    step: Products | Convolutions
    if products:
        step = Products(problem, packed or pack_1d(weights), biases)
    else:
        step = Convolutions(problem, weights, biases, in_place=name == "cpu")
    kept: list[Tensor] = []
    for i, (group, slot) in enumerate(zip(groups, outputs, strict=True)):
        if i == chain.passed_group(problem.scale):
            slot.copy_(group)
            continue
        k = i - chain.first_convolved
        rectified = step(k, group, outputs[i - 1] if chain.adds(i) else None)  # (N, w, L)
        if keep:
            kept.append(rectified.clone(memory_format=torch.contiguous_format) if products else rectified)
        if affine_scale is None or affine_shift is None:
            slot.copy_(rectified)
        elif affine_scale[k].dtype == affine_shift[k].dtype == x.dtype:
            torch.addcmul(affine_shift[k][:, None], rectified, affine_scale[k][:, None], out=slot)
        else:
            slot.copy_(affine_1d(rectified, affine_scale, affine_shift, k))
    return out, kept
