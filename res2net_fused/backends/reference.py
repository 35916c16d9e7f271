"""Backend `reference`: the chain by PyTorch's own operators, on any device and in any floating dtype."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..chain import reference
from ..chain.memory_format import with_format
from ..chain.problem import ChainProblem
from .base import Backend


class ReferenceBackend(Backend):
    name = "reference"

    def why_not(self, problem: ChainProblem) -> str | None:
        return None

    def plan(self, problem: ChainProblem) -> str:
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

    def why_not_training(self, problem: ChainProblem) -> str | None:
        return None

    def plan_training(self, problem: ChainProblem) -> str:
        return "ATen"


BACKEND = ReferenceBackend()
