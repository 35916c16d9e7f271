"""The 1-D chain arranged for CPUs: products of padded rows, or convolutions of rows that are padded where they are summed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._native import library
from ...chain.block_weights import Chain1dWeights
from ...chain.problem import Chain1dProblem
from ...chain.reference import bias_of
from .. import policy
from ..reference import Convolutions, run_steps_1d
from .chain import why_not_device


def why_not_1d(problem: Chain1dProblem) -> str | None:
    why = why_not_device(problem.device)
    if why is None:
        library.cpu_library()  # whose body takes later calls, where it can be loaded
    return why


def plan_1d(problem: Chain1dProblem) -> str:
    return "one product for each tap" if multiplies(problem) else "convolutions of padded rows, written into their places"


def multiplies(problem: Chain1dProblem) -> bool:
    return 0 < problem.batch * problem.length <= policy.ROWS_FOR_PRODUCTS and problem.dtype in (torch.float32, torch.float64)


def native_settings(problem: Chain1dProblem) -> list[int] | None:
    """[whether it multiplies]; None for half types, whose kernels are PyTorch's."""
    native = library.cpu_library().loaded and problem.dtype in (torch.float32, torch.float64)
    return [multiplies(problem)] if native else None


def pack_1d(weights: Sequence[Tensor]) -> list[Tensor]:
    """Each weight as the right factor of a product, (k * w, w): one tap below the other."""
    return [weight.detach().permute(2, 1, 0).flatten(0, 1).contiguous() for weight in weights]


def forward_1d(problem: Chain1dProblem, x: Tensor, weights: Chain1dWeights, keep: bool) -> tuple[Tensor, list[Tensor]]:
    if multiplies(problem):
        convolve: Convolutions = Products(problem, weights)
    elif problem.config.padding_mode == "reflect":
        convolve = ReflectedConvolutions(problem, weights)
    else:
        convolve = Convolutions(problem, weights)
    return run_steps_1d(problem, x, convolve, weights, keep)


class ReflectedConvolutions(Convolutions):
    """PyTorch's convolutions of rows that are reflected where they are summed."""

    def __init__(self, problem: Chain1dProblem, chain: Chain1dWeights) -> None:
        super().__init__(problem, chain)
        self.rows = _PaddedRows(problem, chain.weights[0], last=True)

    def __call__(self, k: int, x: Tensor, previous: Tensor | None) -> Tensor:
        bias, dilation = bias_of(self.biases, k, x), self.problem.config.dilation
        return F.conv1d(self.rows.fill(x, previous), self.weights[k], bias, dilation=dilation)


class Products(Convolutions):
    """A convolution as the sum of one product for each tap, over the padded rows of all images at once."""

    reuses = True

    def __init__(self, problem: Chain1dProblem, chain: Chain1dWeights) -> None:
        super().__init__(problem, chain)
        steps = len(chain.weights)  # 0.1.0 packed every tap by itself
        self.packed = chain.packed if chain.packed and len(chain.packed) == steps else pack_1d(chain.weights)
        self.rows = _PaddedRows(problem, self.packed[0], last=False)
        rows = self.rows.padded.flatten(0, 1)  # (N * (L + 2p), w)
        count = rows.shape[0] - 2 * problem.padding  # those between images are computed too, and never read
        dilation = problem.config.dilation
        self.shifted = [rows[tap * dilation : tap * dilation + count] for tap in range(problem.kernel_size)]
        result = torch.empty_like(self.rows.padded)  # (N, L + 2p, w)
        self.z = result.flatten(0, 1)[:count]
        self.result = result[:, : problem.length].transpose(1, 2)  # (N, w, L)

    def __call__(self, k: int, x: Tensor, previous: Tensor | None) -> Tensor:
        self.rows.fill(x, previous)
        first, *others = self.packed[k].split(self.problem.width)
        bias = bias_of(self.biases, k, x)
        if bias is None:
            torch.mm(self.shifted[0], first, out=self.z)
        else:
            torch.addmm(bias, self.shifted[0], first, out=self.z)
        for shifted, factor in zip(self.shifted[1:], others, strict=True):
            self.z.addmm_(shifted, factor)
        return self.result


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
