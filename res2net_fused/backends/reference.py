"""Backend `reference`: the chain by PyTorch's own operators, on any device and in any floating dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..chain import reference
from ..chain.activations import activate
from ..chain.block_weights import Chain1dWeights
from ..chain.memory_format import with_format
from ..chain.problem import Chain1dProblem, ChainProblem
from .base import Backend


class ReferenceBackend(Backend):
    name = "reference"

    def why_not(self, problem: ChainProblem | Chain1dProblem) -> str | None:
        return None

    def plan(self, problem: ChainProblem | Chain1dProblem) -> str:
        return f"ATen, one convolution at a time: {problem.steps} convolutions, then one concatenation"

    def forward(
        self,
        problem: ChainProblem,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None,
        packed: Sequence[Tensor] | None,
    ) -> Tensor:
        return with_format(reference.hierarchical_conv2d(x, weights, biases, problem.config), problem.channels_last)

    why_not_1d = why_not
    plan_1d = plan

    def forward_1d(
        self, problem: Chain1dProblem, x: Tensor, weights: Chain1dWeights, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        return run_steps_1d(problem, x, Convolutions(problem, weights), weights, keep)

    def why_not_training(self, problem: ChainProblem) -> str | None:
        return None

    def plan_training(self, problem: ChainProblem) -> str:
        return "ATen"


class Convolutions:
    """The convolutions of a 1-D chain, by PyTorch's operators. reuses: whether calls share a result's memory."""

    reuses = False

    def __init__(self, problem: Chain1dProblem, chain: Chain1dWeights) -> None:
        self.problem, self.weights, self.biases = problem, chain.weights, chain.biases

    def __call__(self, k: int, x: Tensor, previous: Tensor | None) -> Tensor:
        """K u + b of convolution k, (N, w, L), where u = x + y_{i-1} if that is given; x (N, w, L)."""
        config, weight, bias = self.problem.config, self.weights[k], reference.bias_of(self.biases, k, x)
        u = x if previous is None else x + previous
        if config.padding_mode == "zeros":
            return F.conv1d(u, weight, bias, padding=self.problem.padding, dilation=config.dilation)
        return reference.convolved_1d(u, weight, bias, config)


def run_steps_1d(
    problem: Chain1dProblem, x: Tensor, convolve: Convolutions, weights: Chain1dWeights, keep: bool
) -> tuple[Tensor, list[Tensor]]:
    """What `Backend.forward_1d` returns, group by group: a convolution, then the affine map into the group's place."""
    scale, shift, activation = weights.scale, weights.shift, problem.config.activation
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    groups, outputs, chain = x.split(problem.width, 1), out.split(problem.width, 1), problem.config.chain
    reference.pass_through(groups, outputs, chain)
    kept: list[Tensor] = []
    for k, i, adds, *_ in chain.convolutions(problem.steps):
        z = convolve(k, groups[i], outputs[i - 1] if adds else None)  # (N, w, L)
        r = z.relu_() if activation == "relu" else activate(z, activation)
        if keep:
            found = reference.kept_1d(z, r, problem.config)
            kept.append(found.clone(memory_format=torch.contiguous_format) if convolve.reuses else found)
        if scale is None or shift is None:
            outputs[i].copy_(r)
        elif scale[k].dtype == shift[k].dtype == x.dtype:
            torch.addcmul(shift[k][:, None], r, scale[k][:, None], out=outputs[i])
        else:
            outputs[i].copy_(reference.affine_1d(r, scale, shift, k))
    return out, kept


BACKEND = ReferenceBackend()
