"""The Triton kernel of a 1x1 convolution with everything behind it in its epilogue, for the block's conv1 and conv3.

A 1x1 convolution of a channels-last map is a matrix product over its pixels:

      in_channels                 out_channels
      +----------+               +---------------+                 +---------------+
      | pixels   |   in_channels | weight        |  + bias         | pixels        |
      |          |      .        | (transposed)  |  + shortcut  -> |               |
      +----------+               +---------------+  ReLU           +---------------+

`block_m` pixels x `block_n` output channels a program. Programs that share pixels are neighbours in the grid, so that the
pixels, which are the larger operand, are read from memory once and from L2 after that. Where the output is cut into padded
slots (`OUT_PITCH` channels apart, `OUT_WIDTH` of them real), the padding is written as exact zeros: an Inf in the input would
leave NaN there, and the next convolution would spread it.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from ..launch import KernelCall
from ..step_plan import has_wide_products, multiprocessors
from ..tiles import Shape, Tile, dtype_class, lookup
from .common import await_predecessor, launch_options, rounded_factor

_INTEGERS = ["pixels", "in_pixel", "out_pixel", "shortcut_pixel"]


@triton.jit(do_not_specialize=_INTEGERS)
def pointwise(
    source, weight, bias, shortcut, out,
    pixels, in_pixel, out_pixel, shortcut_pixel,
    IN_VEC: tl.constexpr, OUT_VEC: tl.constexpr, SHORTCUT_VEC: tl.constexpr,
    IN_CHANNELS: tl.constexpr, OUT_CHANNELS: tl.constexpr, OUT_PITCH: tl.constexpr, OUT_WIDTH: tl.constexpr,
    ADDS: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, OVERLAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = relu(source @ weight^T + bias + shortcut); *_pixel: from one pixel to the next, in units of *_VEC elements."""
    await_predecessor(OVERLAPS)
    n_tiles: tl.constexpr = (OUT_CHANNELS + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    columns = program % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = (program // n_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)  # a whole batch may have more than 2^31
    exists = rows < pixels
    source_rows = source + (rows * in_pixel)[:, None] * IN_VEC
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, (IN_CHANNELS + BLOCK_K - 1) // BLOCK_K):
        channels = k * BLOCK_K + tl.arange(0, BLOCK_K)
        real = channels < IN_CHANNELS
        a = tl.load(source_rows + channels[None, :], mask=exists[:, None] & real[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
        w = tl.load(
            weight + columns[None, :] * IN_CHANNELS + channels[:, None],
            mask=(columns < OUT_CHANNELS)[None, :] & real[:, None],
            other=0.0,
        )  # (BLOCK_K, BLOCK_N)
        a = rounded_factor(a, PRECISION)
        total = tl.dot(a, w, total, input_precision=PRECISION)
    column_ok = columns < OUT_CHANNELS
    total += tl.load(bias + columns, mask=column_ok, other=0.0)[None, :]
    ok = exists[:, None] & column_ok[None, :]
    if ADDS:
        # conv3 alone is rounded before the addition, as it is where the two are separate operators.
        total = total.to(out.dtype.element_ty).to(tl.float32)
        pointers = shortcut + (rows * shortcut_pixel)[:, None] * SHORTCUT_VEC + columns[None, :]
        total += tl.load(pointers, mask=ok, other=0.0).to(tl.float32)
    if RELU:
        total = tl.maximum(total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if OUT_PITCH != OUT_WIDTH:
        total = tl.where((columns % OUT_PITCH < OUT_WIDTH)[None, :], total, 0.0)
    tl.store(out + (rows * out_pixel)[:, None] * OUT_VEC + columns[None, :], total.to(out.dtype.element_ty), mask=ok)


@dataclass(frozen=True)
class Pixels:
    """A matrix of pixels: `channels` of each, beginning `offset` elements behind `data`, `pitch` elements apart."""

    data: Tensor
    channels: int
    pitch: int
    offset: int = 0

    @property
    def vec(self) -> int:
        """Elements, 16 bytes at most, that divide the pitch."""
        limit = 16 // self.data.element_size()
        return next(v for v in (limit, limit // 2, limit // 4, 1) if v and self.pitch % v == 0)

    @property
    def start(self) -> Tensor:
        if not self.offset:
            return self.data
        # In memory order, whatever the order of the dimensions: a flattened view for the pointer alone.
        return self.data.as_strided((self.data.numel() - self.offset,), (1,), self.data.storage_offset() + self.offset)


def pointwise_tile(
    pixels: int, out_channels: int, in_channels: int, itemsize: int, precision: str, capability: tuple[int, int]
) -> Tile:
    """Return the tile of the tuned table, else that of the rule."""
    kind = dtype_class(itemsize, precision)
    found = lookup(Shape("pointwise", capability, kind, out_channels, in_channels, max(1, pixels)))
    return found or default_pointwise_tile(pixels, out_channels, in_channels, kind, capability)


def default_pointwise_tile(pixels: int, out_channels: int, in_channels: int, kind: str, capability: tuple[int, int]) -> Tile:
    """The rule: the largest tile of a list that still gives every multiprocessor a program."""
    narrow = max(16, 1 << (min(out_channels, 256) - 1).bit_length())
    if kind == "ieee":  # no tensor cores: both operands live in registers
        shapes = [(64, 64), (32, 64), (32, 32), (16, 16)]
        block_k, stages = 16, 2
    elif kind == "tf32":
        shapes = [(64, 128), (64, 64), (64, 32), (32, 32), (16, 16)]
        block_k, stages = 32, 3
    else:
        shapes = [(128, 256), (128, 128), (128, 64), (64, 64), (64, 32), (32, 32), (16, 16)]
        shapes = shapes if has_wide_products(capability) else shapes[1:]  # else 256 accumulators a thread spill
        block_k, stages = 64, 3
    block_k = min(block_k, max(16, 1 << (in_channels - 1).bit_length()))
    block_m, block_n = shapes[-1]
    for block_m, block_n in shapes:  # noqa: B007
        if block_n <= narrow and -(-pixels // block_m) * -(-out_channels // block_n) >= multiprocessors(capability):
            break
    warps = 8 if block_m * block_n >= 128 * 128 else 4 if block_m * block_n >= 64 * 32 else 1
    return Tile(block_m, block_n, block_k, warps, stages)


def pointwise_call(
    source: Pixels,
    weight: Tensor,  # (out.channels, source.channels), rounded for this precision
    bias: Tensor,  # (out.channels,), fp32
    shortcut: Pixels | None,
    out: Pixels,
    pixels: int,
    slots: tuple[int, int],  # channels from one slot of `out` to the next, and how many of them are real
    relu: bool,
    precision: str,
    tile: Tile,
    overlaps: bool = False,  # whether it is launched to begin while the launch before it ends
) -> KernelCall:
    """The launch that writes `out`; everything else is read. ValueError for more weights than int32 counts."""
    if weight.numel() >= 2**31:
        raise ValueError(f"a 1x1 convolution has {weight.numel()} weights; at most {2**31 - 1} are allowed")
    second = shortcut if shortcut is not None else out
    arguments = {
        "source": source.start,
        "weight": weight,
        "bias": bias,
        "shortcut": second.start,
        "out": out.start,
        "pixels": pixels,
        "in_pixel": source.pitch // source.vec,
        "out_pixel": out.pitch // out.vec,
        "shortcut_pixel": second.pitch // second.vec,
        "IN_VEC": source.vec,
        "OUT_VEC": out.vec,
        "SHORTCUT_VEC": second.vec,
        "IN_CHANNELS": source.channels,
        "OUT_CHANNELS": out.channels,
        "OUT_PITCH": slots[0],
        "OUT_WIDTH": slots[1],
        "ADDS": shortcut is not None,
        "RELU": relu,
        "PRECISION": precision,
        "OVERLAPS": overlaps,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    options = launch_options(tile, overlaps)
    programs = -(-pixels // tile.block_m) * -(-out.channels // tile.block_n)
    return KernelCall(pointwise, programs, arguments, options)
