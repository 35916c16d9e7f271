"""The whole block on the CPU: each image through conv1, the chain and conv3 in cache."""

from __future__ import annotations

import torch
from torch import Tensor

from ...chain.block_weights import BlockWeights
from ...chain.config import ChainConfig
from ...chain.gathered_weights import gathered_in, place_all, read_layout
from ...chain.problem import ChainProblem
from ..base import PreparedBlock
from .chain import pack
from .settings import arithmetic, chain_arguments, instruction_set, measured_arithmetic, operators


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


def gather_block(folded: BlockWeights) -> BlockWeights:
    """Return the packed weights in one tensor, which begins with what the native library has to know of them."""
    packed = folded.packed or []
    layout, total = place_all(folded, 8 * (6 + 2 * len(packed)))
    memory = operators.cpu_new_memory.default(total)
    gathered = gathered_in(memory, layout, folded)
    places = read_layout(layout).places[-len(packed) :]
    words = [
        1, total, len(folded.weights[0]), len(folded.weights), folded.out_channels, folded.projection_stride,
        *(place.start for place in places), *(tensor.numel() for tensor in packed),
    ]  # fmt: skip
    memory[: 8 * len(words)].view(torch.int64).copy_(memory.new_tensor(words, dtype=torch.int64))  # no default device's
    return gathered


def block_forward(problem: ChainProblem, x: Tensor, shortcut: Tensor | None, folded: BlockWeights, relu: bool) -> Tensor:
    """Run `Backend.block_forward` image by image, each through the whole block in cache."""
    return _call_with(problem, folded, folded.packed or pack_block(folded, problem.config), relu)(x, shortcut)


def prepared_block(problem: ChainProblem, folded: BlockWeights, relu: bool) -> PreparedBlock | None:
    """Return what needs nothing but the environment; of one pixel or channel the strides would have to say the format."""
    if not folded.packed or len(folded.conv3_weight) == 1 or problem.output_height * problem.output_width == 1:
        return None
    return _call_with(problem, folded, folded.packed, relu)


def _call_with(problem: ChainProblem, folded: BlockWeights, packed: list[Tensor], relu: bool) -> PreparedBlock:
    run = operators.cpu_block_forward.default
    named = chain_arguments(problem)
    chain = [named[a.name] for a in run._schema.arguments if a.name in named]  # by place, which takes half the time
    measured = measured_arithmetic(problem)
    arguments = packed, len(folded.conv3_weight), folded.projection_stride, relu, *chain, problem.channels_last

    def call(x: Tensor, shortcut: Tensor | None) -> Tensor:
        return run(x, shortcut, *arguments, arithmetic(measured), instruction_set())

    return call


def _pack_pointwise(weight: Tensor, bias: Tensor) -> list[Tensor]:
    return operators.cpu_pack_pointwise.default(weight, bias, instruction_set())
