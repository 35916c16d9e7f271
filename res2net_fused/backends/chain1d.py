"""Backends of the 1-D chain: `reference`, PyTorch's operators as the mathematics says; `cpu`, arranged for CPUs; `triton`.

All save nothing on the way but what `keep` asks for: relu(K_i u_i + b_i) of every convolution, which backward needs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chain1d import Chain1dProblem
from ..reference import affine_1d, bias_of, padded_1d
from . import triton_chain1d
from .selection import Choice, requested

# Up to so many rows of all images together, a product for each tap is faster than a convolution by oneDNN, whose weights are
# reordered at every call.
ROWS_FOR_PRODUCTS = 512
# Where the operator pays: up to so many values of a group, by padding mode, and again from so many reflected rows on.
PAYING_VALUES = {"reflect": 400 * 64, "zeros": 300 * 64}
PAYING_REFLECTED_ROWS = 800


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


def chain_pays_1d(problem: Chain1dProblem) -> bool:
    """Whether the operator is measured to be faster than PyTorch's own operators, in inference.

    `benchmarks/cpu_chain1d.py` on one AVX-512 core, s = 8: 1.1 to 1.85 times as fast where there are few rows; for many
    reflected rows 1.0 to 1.15; elsewhere 0.9 to 1.0. Nothing is measured on GPUs, nor against compilers.
    """
    if torch.compiler.is_compiling() or problem.device.type != "cpu" or problem.dtype != torch.float32:
        return False
    rows = problem.batch * problem.length
    if rows * problem.width <= PAYING_VALUES[problem.config.padding_mode]:
        return True
    return problem.config.padding_mode == "reflect" and rows >= PAYING_REFLECTED_ROWS


def plan_1d(problem: Chain1dProblem, name: str) -> str:
    """One line for `explain`."""
    if name == "reference":
        return f"ATen, one convolution at a time: {problem.steps} convolutions, then one concatenation"
    if name == "triton":
        return triton_chain1d.plan_1d(problem)
    return "one product for each tap" if multiplies(problem) else "convolutions of padded rows, written into their places"


def _why_not_cpu(problem: Chain1dProblem) -> str | None:
    if problem.device.type != "cpu":
        return f"x is on {problem.device}; this backend runs on cpu tensors"
    return None


_WHY_NOT = {
    "reference": lambda problem: None,
    "cpu": _why_not_cpu,
    "triton": triton_chain1d.why_not_1d,
    "cuda": lambda problem: "it has no 1-D kernels",
}


def multiplies(problem: Chain1dProblem) -> bool:
    return 0 < problem.batch * problem.length <= ROWS_FOR_PRODUCTS and problem.dtype in (torch.float32, torch.float64)


def pack_1d(weights: Sequence[Tensor]) -> list[Tensor]:
    """The weights of every tap as the right factor of a product, each (w, w), those of the first convolution first."""
    return [tap.contiguous() for weight in weights for tap in weight.detach().permute(2, 1, 0)]


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
        return triton_chain1d.forward_1d(problem, x, weights, biases, affine_scale, affine_shift, keep)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    chain, width = problem.config.chain, problem.width
    groups, outputs = x.split(width, 1), out.split(width, 1)
    products = name == "cpu" and multiplies(problem)
    step: _Products | _Convolutions
    if products:
        step = _Products(problem, packed or pack_1d(weights), biases)
    else:
        step = _Convolutions(problem, weights, biases, in_place=name == "cpu")
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


class _Convolutions:
    """relu of a convolution by PyTorch's operator; `in_place`: of rows that are padded where they are summed."""

    def __init__(self, problem: Chain1dProblem, weights, biases, in_place: bool) -> None:
        self.problem, self.weights, self.biases = problem, weights, biases
        self.rows = None
        if in_place and problem.config.padding_mode == "reflect":
            self.rows = _PaddedRows(problem, weights[0], last=True)

    def __call__(self, k: int, x: Tensor, previous: Tensor | None) -> Tensor:
        problem, dilation = self.problem, self.problem.config.dilation
        weight, bias = self.weights[k], bias_of(self.biases, k, x)
        if self.rows is not None:
            return F.conv1d(self.rows.fill(x, previous), weight, bias, dilation=dilation).relu_()
        u = x if previous is None else x + previous
        if problem.config.padding_mode == "zeros":
            return F.conv1d(u, weight, bias, padding=problem.padding, dilation=dilation).relu_()
        return F.conv1d(padded_1d(u, weight, problem.config), weight, bias, dilation=dilation).relu_()


class _Products:
    """relu of a convolution as the sum of one product for each tap, over the padded rows of all images at once."""

    def __init__(self, problem: Chain1dProblem, packed: Sequence[Tensor], biases) -> None:
        self.packed, self.biases, self.taps = packed, biases, problem.kernel_size
        self.rows = _PaddedRows(problem, packed[0], last=False)
        rows = self.rows.padded.flatten(0, 1)  # (N * (L + 2p), w)
        count = rows.shape[0] - 2 * problem.padding  # those between images are computed too, and never read
        dilation = problem.config.dilation
        self.shifted = [rows[tap * dilation : tap * dilation + count] for tap in range(self.taps)]
        result = torch.empty_like(self.rows.padded)  # (N, L + 2p, w)
        self.z = result.flatten(0, 1)[:count]
        self.rectified = result[:, : problem.length].transpose(1, 2)  # (N, w, L)

    def __call__(self, k: int, x: Tensor, previous: Tensor | None) -> Tensor:
        self.rows.fill(x, previous)
        first, *others = self.packed[k * self.taps : (k + 1) * self.taps]
        bias = bias_of(self.biases, k, x)
        if bias is None:
            torch.mm(self.shifted[0], first, out=self.z)
        else:
            torch.addmm(bias, self.shifted[0], first, out=self.z)
        for shifted, factor in zip(self.shifted[1:], others, strict=True):
            self.z.addmm_(shifted, factor)
        return self.rectified.relu_()


class _PaddedRows:
    """Rows with what stands beyond their ends: `padded`, (N, w, L + 2p) if they are `last`, else (N, L + 2p, w)."""

    def __init__(self, problem: Chain1dProblem, like: Tensor, last: bool) -> None:
        padding, length = problem.padding, problem.length
        size = length + 2 * padding
        shape = (problem.batch, problem.width, size) if last else (problem.batch, size, problem.width)
        self.padded = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.axis = 2 if last else 1
        inside = self.padded.narrow(self.axis, padding, length)
        self.inside = inside if last else inside.transpose(1, 2)  # (N, w, L)
        self.borders = None
        if problem.config.padding_mode == "reflect" and padding:
            ends = [*range(padding), *range(padding + length, size)]
            mirrors = [2 * padding - i if i < padding else 2 * (padding + length - 1) - i for i in ends]
            self.borders, self.mirrors = torch.tensor([ends, mirrors], device=like.device)

    def fill(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """x (N, w, L), plus y_{i-1} where there is one; returns `padded`."""
        if previous is None:
            self.inside.copy_(x)
        else:
            torch.add(x, previous, out=self.inside)
        if self.borders is not None:
            self.padded.index_copy_(self.axis, self.borders, self.padded.index_select(self.axis, self.mirrors))
        return self.padded
