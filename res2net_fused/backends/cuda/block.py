"""The whole block around the native CUDA chain: conv1, the chain and conv3, in three launches.

Between conv1 and conv3 the groups lie a multiple of 16 bytes apart, so that the chain moves 16 bytes at once where dense groups
of 26 channels would allow 4; the padding holds exact zeros. The 1x1 convolutions are the Triton block's, or ATen's where Triton
cannot be used.

A group that passes as it is is never copied: a pixel has the groups of x beside those of y, and the one that is both lies
between them. With s = 4:

    slot      0    1    2    3    4    5    6
    conv1                   x_3  x_0  x_1  x_2     writes slots 3 to 6: its output channels are packed in this order
    chain    y_0  y_1  y_2                         reads slots 4 to 6
    conv3    y_0  y_1  y_2  y_3                    reads slots 0 to 3

Where a group is pooled, is the first, or is added to another, x and y are tensors of their own, and the chain passes it on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ...chain.block_weights import BlockWeights
from ...chain.config import ChainConfig
from ...chain.problem import ChainProblem
from ..triton import chain as triton_chain
from ..triton.availability import capability, precision_of
from ..triton.block import slot_pitch
from ..triton.tf32 import round_to_tf32
from .chain import Slots, launch_chain
from .packing import pack
from .plan import passes_beside

if TYPE_CHECKING:
    from ..triton.launch import KernelCall  # imports Triton, which may be missing


def pack_block(folded: BlockWeights, config: ChainConfig) -> list[Tensor]:
    """[conv1 (s*pitch, inplanes), its bias, conv3 (planes * 4, s*pitch), its bias, the chain's weights and biases].

    Where conv1 writes the group that passes beside y, it is the first of conv1's.
    """
    weight = folded.weights[0]
    width = weight.shape[0]
    scale = config.scale(len(folded.weights))
    pitch = slot_pitch(width, 1, weight.dtype.itemsize)

    def pad_slots(t: Tensor) -> Tensor:  # (s*w, ...) -> (s*pitch, ...)
        return F.pad(t.detach().reshape(scale, width, -1), (0, 0, 0, pitch - width)).reshape(scale * pitch, -1)

    first = pitch * passes_beside(config)
    conv1 = pad_slots(folded.conv1_weight.flatten(1)).roll(first, 0).contiguous()
    conv1_bias = pad_slots(folded.conv1_bias.float()).reshape(-1).roll(first)
    conv3 = pad_slots(folded.conv3_weight.flatten(1).t()).t().contiguous()
    if weight.dtype == torch.float32:  # which this backend multiplies in TF32 alone
        conv1, conv3 = round_to_tf32(conv1), round_to_tf32(conv3)
    chain = pack(folded.weights, folded.biases, config)
    return [conv1, conv1_bias, conv3, folded.conv3_bias.detach().float(), *chain]


def block_forward(problem: ChainProblem, x: Tensor, shortcut: Tensor | None, folded: BlockWeights, relu: bool) -> Tensor:
    """Run `Backend.block_forward` in three launches."""
    conv1, conv1_bias, conv3, conv3_bias, *chain = folded.packed or pack_block(folded, problem.config)
    pitch = slot_pitch(problem.width, 1, x.dtype.itemsize)
    channels = problem.scale * pitch
    x = x.contiguous(memory_format=torch.channels_last)

    def buffer(channels: int, height: int, columns: int) -> Tensor:
        shape = problem.batch, channels, height, columns
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    if passes_beside(problem.config):
        both = buffer(2 * channels - pitch, problem.height, problem.width_pixels)
        u, y = both[:, channels - pitch :], both[:, :channels]
        source = Slots(both[:, channels:], both.shape[1], pitch)
    else:
        u = buffer(channels, problem.height, problem.width_pixels)
        y = buffer(channels, problem.output_height, problem.output_width)
        source = Slots(u, channels, pitch)
    out = buffer(conv3.shape[0], problem.output_height, problem.output_width)
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        _pointwise(problem, x, conv1, conv1_bias, None, u, (pitch, problem.width), True)
        launch_chain(problem, source, Slots(y, _pitch(y), pitch), chain, pitch)
        _pointwise(problem, y, conv3, conv3_bias, shortcut, out, (out.shape[1], out.shape[1]), relu)
    return out if problem.channels_last else out.contiguous()


def _pointwise(
    problem: ChainProblem,
    x: Tensor,  # (N, C, H, W), as all images here channels-last
    weight: Tensor,  # (out channels, C)
    bias: Tensor,  # (out channels,), fp32
    shortcut: Tensor | None,
    out: Tensor,
    slots: tuple[int, int],  # channels from one slot of `out` to the next, and how many of them are real; the rest become zero
    relu: bool,
) -> None:
    """out = relu(conv1x1(x) + bias + shortcut)"""
    if triton_chain.why_not(problem) is None:
        from ..triton.prepared import launch

        launch(_pointwise_calls, (problem, precision_of(problem), slots, relu), (x, weight, bias, shortcut, out))
        return
    y = F.conv2d(x, weight[:, :, None, None], bias.to(x.dtype))
    if shortcut is not None:
        y += shortcut
    out.copy_(y.relu_() if relu else y)
    out.unflatten(1, (-1, slots[0]))[:, :, slots[1] :] = 0


def _pitch(images: Tensor) -> int:
    """Elements from one pixel of channels-last images to the next."""
    # The stride of a dimension of size 1 says nothing.
    return next((images.stride(d) for d in (3, 2, 0) if images.shape[d] > 1), images.shape[1])


def _pointwise_calls(
    tensors: Sequence[Tensor], problem: ChainProblem, precision: str, slots: tuple[int, int], relu: bool
) -> Iterator[KernelCall]:
    from ..triton.kernels.common import overlaps
    from ..triton.kernels.pointwise import Pixels, pointwise_call, pointwise_tile

    x, weight, bias, shortcut, out = tensors
    channels, pixels = out.shape[1], x.numel() // x.shape[1]
    own = capability(problem.device)
    tile = pointwise_tile(pixels, channels, x.shape[1], x.dtype.itemsize, precision, own)
    added = None if shortcut is None else Pixels(shortcut, channels, channels)
    source, target = (Pixels(t, t.shape[1], _pitch(t)) for t in (x, out))
    yield pointwise_call(source, weight, bias, added, target, pixels, slots, relu, precision, tile, overlaps(own))
