"""The whole block on the CPU: each image through conv1, the chain and conv3 in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ...chain.block_weights import BlockWeights
from ...chain.config import ChainConfig
from ...chain.problem import ChainProblem
from .chain import pack
from .settings import arithmetic, chain_arguments, instruction_set, operators


def pack_block(folded: BlockWeights, config: ChainConfig) -> list[Tensor]:
    """[conv1 (panels of 16 output channels), its biases, conv3, its biases, projection, then what `pack` returns], in fp32.

    The projection of the shortcut is empty where there is none; its biases are added to conv3's.
    """
    projection, bias = folded.conv1_weight.new_empty(0), folded.conv3_bias
    with torch.no_grad():
        if folded.projection_weight is not None and folded.projection_bias is not None:
            projection, _ = _pack_pointwise(folded.projection_weight, folded.projection_bias)
            bias = bias + folded.projection_bias
        conv1, conv3 = _pack_pointwise(folded.conv1_weight, folded.conv1_bias), _pack_pointwise(folded.conv3_weight, bias)
    return [*conv1, *conv3, projection, *pack(folded.weights, folded.biases, config)]


def block_forward(problem: ChainProblem, x: Tensor, shortcut: Tensor | None, folded: BlockWeights, relu: bool) -> Tensor:
    """Run `Backend.block_forward` image by image, each through the whole block in cache."""
    packed = folded.packed or pack_block(folded, problem.config)
    return operators.cpu_block_forward.default(
        x, shortcut, packed, folded.conv3_weight.shape[0], folded.projection_stride, relu, **chain_arguments(problem),
        channels_last=problem.channels_last, arithmetic=arithmetic(), instruction_set=instruction_set(),
    )  # fmt: skip


def _pack_pointwise(weight: Tensor, bias: Tensor) -> list[Tensor]:
    return operators.cpu_pack_pointwise.default(weight, bias, instruction_set())
