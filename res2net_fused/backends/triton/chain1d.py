"""The chain along rows on Triton: one launch per convolution, on NVIDIA GPUs from sm_80 on or in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...chain.block_weights import Chain1dWeights
from ...chain.problem import Chain1dProblem
from ...chain.reference import pass_through
from .availability import precision_of, why_not_device
from .step_plan import padded_channels
from .tf32 import for_precision

if TYPE_CHECKING:
    from .launch import KernelCall  # imports Triton, which may be missing

MAX_LENGTH = 2**30 - 2**10  # of a row and of its padding: positions are int32, mirrored ones twice as large on the way
MAX_WEIGHTS = 2**31 - 1  # of one convolution, padded


def why_not_1d(problem: Chain1dProblem) -> str | None:
    return why_not_device(problem.device, problem.dtype) or _why_not_size(problem)


def _why_not_size(problem: Chain1dProblem) -> str | None:
    if problem.length > MAX_LENGTH or problem.padding > MAX_LENGTH:
        found = f"{problem.length} values and {problem.padding} more at each end"
        return f"rows of x hold {found}; at most {MAX_LENGTH} are allowed"
    weights = problem.kernel_size * problem.width * padded_channels(problem.width)
    if weights > MAX_WEIGHTS:
        return f"a convolution has {weights} weights, padded; at most {MAX_WEIGHTS} are allowed"
    return None


def plan_1d(problem: Chain1dProblem) -> str:
    from .kernels.conv1d_fwd import tile_1d

    tile = "x".join(str(size) for size in tile_1d(problem).values())
    return f"one launch for each of {problem.steps} convolutions, tiles of {tile}"


def forward_1d(problem: Chain1dProblem, x: Tensor, weights: Chain1dWeights, keep: bool) -> tuple[Tensor, list[Tensor]]:
    from .kernels.conv1d_fwd import pack_weights_1d
    from .prepared import launch, launch_all

    if x.stride(2) != 1:
        x = x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    shape = problem.batch, problem.width, problem.length
    kept = [torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(problem.steps if keep else 0)]
    pass_through(x.split(problem.width, 1), out.split(problem.width, 1), problem.config.chain)
    if out.numel() == 0:
        return out, kept
    if weights.biases is None:
        bias = torch.zeros(problem.steps, problem.width, dtype=torch.float32, device=x.device)
    else:
        bias = _stacked(weights.biases)
    scale, shift = weights.scale, weights.shift
    affine = (None, None) if scale is None or shift is None else (_stacked(scale), _stacked(shift))
    precision = precision_of(problem)
    tensors = x, out, for_precision(pack_weights_1d(weights.weights), precision), bias, *affine, *kept
    if problem.config.chain.adds_passed:  # which PyTorch's operators do in between
        launch_all(_calls(tensors, problem, precision), x.device)
    else:
        launch(_calls, (problem, precision), tensors)
    return out, kept


def _calls(tensors: Sequence[Tensor | None], problem: Chain1dProblem, precision: str) -> Iterator[KernelCall]:
    from .kernels.conv1d_fwd import chain_calls_1d

    x, out, factors, bias, scale, shift, *kept = tensors
    affine = None if scale is None else (scale, shift)
    return chain_calls_1d(problem, x, out, factors, bias, affine, kept, precision)  # type: ignore[arg-type]


def _stacked(values: Sequence[Tensor]) -> Tensor:
    """One tensor (steps, w) in fp32."""
    return torch.stack([value.detach().float() for value in values])
