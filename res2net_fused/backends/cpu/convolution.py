"""One 3x3 convolution and its gradients by Winograd, where that is faster than ATen."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...chain.config import ChainConfig
from ...chain.convolver import Convolver
from ...chain.problem import ChainProblem
from .. import policy
from .settings import ARITHMETICS, arithmetic, chain_arguments, instruction_set, operators


def chain_from_weights(
    problem: ChainProblem, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None = None, turned: bool = False
) -> Tensor | None:
    """The chain by Winograd from plain weights; None where it does not cover the problem or a result is not finite.

    turned: by the weights of the input gradient.
    """
    if not winograd_covers(problem.config) or min(problem.height, problem.width_pixels) < 2:
        return None
    with torch.no_grad():
        found = operators.cpu_chain_from_weights.default(
            x, list(weights), list(biases or ()), turned, **chain_arguments(problem),
            channels_last=problem.channels_last, instruction_set=instruction_set(),
        )  # fmt: skip
    return found[0] if found else None


def convolves_faster(problem: ChainProblem) -> bool:
    """Whether Winograd runs one convolution faster than ATen does."""
    return problem.dtype == torch.float32 and arithmetic() != ARITHMETICS["direct"] and winograd_pays(problem)


def winograd_pays(problem: ChainProblem) -> bool:
    """Whether weights that are packed, or whose gradient is unpacked, at every call are worth it."""
    pixels = problem.batch * problem.height * problem.width_pixels
    sizes = problem.width >= 8 and pixels >= policy.PIXELS_WORTH_PACKING and min(problem.height, problem.width_pixels) >= 2
    return sizes and winograd_covers(problem.config)


def winograd_covers(config: ChainConfig) -> bool:
    return config.stride == config.dilation == config.groups == 1


class WinogradConvolver(Convolver):
    """One 3x3 convolution and its gradients by Winograd where that is faster than ATen's; weights are packed in the call."""

    def convolution(self, problem: ChainProblem, u: Tensor, weight: Tensor) -> Tensor | None:
        """z (N, w, H, W) of one 3x3 convolution without bias or activation; None where ATen's is faster.

        problem: of that convolution. The weights are packed in the call.
        """
        return chain_from_weights(problem, u, [weight]) if convolves_faster(problem) else None

    def input_gradient(self, problem: ChainProblem, dz: Tensor, weight: Tensor) -> Tensor | None:
        """du of one 3x3 convolution, a convolution of dz (N, w, H, W) by the turned weight; None where ATen's is faster."""
        return chain_from_weights(problem, dz, [weight], turned=True) if convolves_faster(problem) else None

    def weight_gradient(
        self, problem: ChainProblem, dz: Tensor, u: Tensor, weight_format: torch.memory_format
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (dK (w, w, 3, 3), db (w,)) from dz and u, both (N, w, H, W); None where ATen's are to be taken.

        These are slower, or a gradient is not finite: Winograd overflows earlier and makes NaN of Inf.
        """
        if not convolves_faster(problem):
            return None, None
        found = operators.cpu_weight_gradient.default(dz, u, weight_format == torch.channels_last, instruction_set())
        return (found[0], found[1]) if found else (None, None)


CONVOLVER = WinogradConvolver()
