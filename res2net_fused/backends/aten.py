"""Backend `reference`: the chain by PyTorch's own operators, on any device and in any floating dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import reference
from ..chain import ChainConfig, ChainProblem


def why_not(problem: ChainProblem) -> str | None:
    return None


def why_not_training(problem: ChainProblem) -> str | None:
    return None


def plan_training(problem: ChainProblem) -> str:
    return "ATen"


def pack(weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig) -> list[Tensor]:
    return []


def plan(problem: ChainProblem) -> str:
    return f"ATen, one convolution at a time: {problem.steps} convolutions, then one concatenation"


def forward(
    problem: ChainProblem,
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    packed: Sequence[Tensor] | None,
) -> Tensor:
    out = reference.hierarchical_conv2d(x, weights, biases, problem.config)
    return out.contiguous(memory_format=torch.channels_last if problem.channels_last else torch.contiguous_format)
