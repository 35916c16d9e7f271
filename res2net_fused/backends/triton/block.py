"""The whole block on Triton: conv1, the chain and conv3 in s + 1 launches, in an inner layout that the block owns.

Slots of w = 26 channels begin at odd multiples of 52 bytes, which no GPU loads well. Between conv1 and conv3 the slots
therefore lie `pitch` channels apart, a multiple of 16 bytes, and the padding holds exact zeros. Where the chain adds and
the last group passes, x and y share one buffer, so that the passing group is never copied:

    slot        0     1     ...   s-2     s-1     s
    conv1       .    x_1    ...  x_{s-2} x_{s-1}  x_0      (slot 0 is free)
    chain      y_0   y_1    ...  y_{s-2} x_{s-1}  x_0      (y_i replaces x_i, which u_i has already taken in)
    conv3 reads slots 0 ... s-1
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...chain.block_weights import BlockWeights
from ...chain.config import ChainConfig
from ...chain.problem import ChainProblem
from .availability import capability, plan_for, precision_of
from .chain import pack
from .tf32 import for_every_precision, of_precision
from .tiles import Tile

if TYPE_CHECKING:
    from .launch import KernelCall  # imports Triton, which may be missing


def slot_pitch(width: int, groups: int, itemsize: int) -> int:
    """Channels from one slot to the next: a multiple of 16 bytes; grouped convolutions keep their channels dense."""
    per_load = 16 // itemsize
    return width if groups > 1 else -(-width // per_load) * per_load


def in_place(config: ChainConfig, scale: int) -> bool:
    """Whether y may replace x: not where the pass-through is pooled or first, nor where nothing is added."""
    return config.passthrough == "last" and config.pool is None and config.hierarchical and config.stride == 1 and scale > 1


def pack_block(folded: BlockWeights, config: ChainConfig, only: str | None = None) -> list[Tensor]:
    """[conv1 (s*pitch, inplanes), its bias, the chain's weights and biases, conv3 (planes * 4, s*pitch), its bias].

    Weights have one dimension more in front, as those of `pack` in `chain.py`.
    """
    weight = folded.weights[0]
    width, dtype = weight.shape[0], weight.dtype
    scale = config.scale(len(folded.weights))
    pitch = slot_pitch(width, config.groups, dtype.itemsize)

    def pad_slots(t: Tensor) -> Tensor:  # (s*w, ...) -> (s*pitch, ...)
        slots = t.detach().reshape(scale, width, -1)
        if in_place(config, scale):
            slots = slots.roll(-1, 0)  # x_1 ... x_{s-1}, x_0
        return torch.nn.functional.pad(slots, (0, 0, 0, pitch - width)).reshape(scale * pitch, -1)

    conv1 = pad_slots(folded.conv1_weight.flatten(1)).contiguous()
    conv1_bias = pad_slots(folded.conv1_bias.float()).reshape(-1)
    conv3 = folded.conv3_weight.detach().reshape(-1, scale, width)
    conv3 = torch.nn.functional.pad(conv3, (0, pitch - width)).reshape(-1, scale * pitch).contiguous()
    conv1, conv3 = (for_every_precision(weights, only) for weights in (conv1, conv3))
    chain = pack(folded.weights, folded.biases, config, only)
    return [conv1, conv1_bias, *chain, conv3, folded.conv3_bias.detach().float()]


def block_forward(problem: ChainProblem, x: Tensor, shortcut: Tensor | None, folded: BlockWeights, relu: bool) -> Tensor:
    from .prepared import launch

    precision = precision_of(problem)
    packed = folded.packed or pack_block(folded, problem.config, precision)
    x = x.contiguous(memory_format=torch.channels_last)
    if shortcut is not None:
        shortcut = shortcut.contiguous(memory_format=torch.channels_last)
    shape = problem.batch, packed[4].shape[1], problem.output_height, problem.output_width
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    launch(_calls, (problem, precision, relu), (x, shortcut, out, *packed))
    return out if problem.channels_last else out.contiguous()


def _calls(tensors: Sequence[Tensor], problem: ChainProblem, precision: str, relu: bool) -> Iterator[KernelCall]:
    x, shortcut, out, *packed = tensors
    return block_calls(problem, capability(problem.device), x, shortcut, packed, relu, out, precision)


def block_calls(
    problem: ChainProblem,
    compute_capability: tuple[int, int],
    x: Tensor,  # (N, inplanes, H, W), as all tensors here channels-last
    shortcut: Tensor | None,  # (N, planes * 4, H', W')
    packed: list[Tensor],  # from `pack_block`
    relu: bool,
    out: Tensor,  # (N, planes * 4, H', W')
    precision: str,  # of the products, as `precision_of` names it
) -> Iterator[KernelCall]:
    """Every launch of the block, in order."""
    from .kernels.common import GroupView, overlaps
    from .kernels.conv3x3_fwd import chain_calls
    from .kernels.pointwise import Pixels, pointwise_call, pointwise_tile

    conv1, conv1_bias, chain, biases, conv3, conv3_bias = packed
    conv1, conv3 = (of_precision(weights, precision) for weights in (conv1, conv3))
    config, scale, width = problem.config, problem.scale, problem.width
    pitch, planes = slot_pitch(width, config.groups, x.dtype.itemsize), conv3.shape[0]
    channels = scale * pitch
    inner = problem.batch * problem.height * problem.width_pixels  # pixels before the stride
    outer = problem.batch * problem.output_height * problem.output_width
    shared = in_place(config, scale)
    plan = plan_for(problem, compute_capability, precision=precision, pitch=pitch, in_place=shared)

    def buffer(slots: int, height: int, columns: int) -> Tensor:
        shape = problem.batch, slots * pitch, height, columns
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    def tile(pixels: int, out_channels: int, in_channels: int) -> Tile:
        return pointwise_tile(pixels, out_channels, in_channels, x.dtype.itemsize, precision, compute_capability)

    overlapping = overlaps(compute_capability)
    u = buffer(scale + shared, problem.height, problem.width_pixels)
    inplanes = x.shape[1]
    yield pointwise_call(
        Pixels(x, inplanes, inplanes), conv1, conv1_bias, None, Pixels(u, channels, u.shape[1], pitch * shared),
        inner, (pitch, width), True, precision, tile(inner, channels, inplanes), overlapping,
    )  # fmt: skip
    y = u if shared else buffer(scale, problem.output_height, problem.output_width)
    x_slots = GroupView(u, pitch, pitch, scale * shared)
    yield from chain_calls(problem, plan, x_slots, GroupView(y, pitch, pitch), chain, biases)
    yield pointwise_call(
        Pixels(y, channels, y.shape[1]), conv3, conv3_bias, Pixels(shortcut, planes, planes) if shortcut is not None else None,
        Pixels(out, planes, planes), outer, (planes, planes), relu, precision, tile(outer, planes, channels), overlapping,
    )  # fmt: skip
