"""What the kernels with a 3x3 convolution share: the convolution as an implicit matrix product, and how tensors are addressed.

One program computes a tile of `block_m` pixels, counted through the whole batch, x `block_n` output channels:

         K = 9 taps x channels                 block_n output channels
       <------- block_k ------>               <-------->
      +------------------------+             +----------+             +----------+
      | source of the pixels,  |           K | weights  |             | sums in  |
      | shifted by the tap     |     .       | of the   |     ->      | fp32     |
      | (zero outside)         |             | tap      |             |          |
      +------------------------+             +----------+             +----------+

Where alignment matters it travels as a constexpr (`*_VEC`: strides and offsets are counted in units of so many elements), so
no integer needs specialising, and a new H, W or batch compiles nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from ....chain.activations import split_activation
from ....chain.problem import ChainProblem
from ... import overlap
from ..step_plan import StepPlan
from ..tiles import Tile

SIZES = ["pixels", "height", "width"]


@triton.jit
def await_predecessor(OVERLAPS: tl.constexpr):
    """Wait for the launch before, ahead of everything that a kernel reads or writes: see `backends/overlap.py`."""
    if OVERLAPS:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _clamp(y, LOW: tl.constexpr, HIGH: tl.constexpr):
    """y between two bounds; NaN stays NaN."""
    y = tl.maximum(y, LOW, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(y, HIGH, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def activate(y, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr):
    """act(y) in fp32; of infinities what ATen's activations give."""
    if ACTIVATION == "relu":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "hardtanh20":
        y = _clamp(y, 0.0, 20.0)
    elif ACTIVATION == "relu6":
        y = _clamp(y, 0.0, 6.0)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(y > 0.0, y, y * SLOPE)
    elif ACTIVATION == "hardswish":
        y = y * (_clamp(y + 3.0, 0.0, 6.0) / 6.0)
    elif ACTIVATION == "silu":
        y = y / (1.0 + tl.exp(-y))
    elif ACTIVATION == "gelu":
        y = 0.5 * y * (1.0 + tl.erf(y * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(v)) / 2 = 1 / (1 + exp(-2 v))
        y = y * (1.0 / (1.0 + tl.exp(-1.5957691216057308 * (y + 0.044715 * y * y * y))))
    elif ACTIVATION == "mish":  # with n = e^y, tanh(log(1 + n)) = n (n + 2) / (n (n + 2) + 2); 1 from 20 on
        n = tl.exp(tl.minimum(y, 20.0, propagate_nan=tl.PropagateNan.ALL))
        y = y * (n * (n + 2.0) / (n * (n + 2.0) + 2.0))
    return y


def activation_arguments(activation: str) -> dict[str, object]:
    """What kernels are told of an activation."""
    kind, slope = split_activation(activation)
    return {"ACTIVATION": kind, "SLOPE": slope}


@triton.jit
def rounded_factor(value, PRECISION: tl.constexpr):
    """`value` as a factor of `tl.dot`: for "tf32" rounded to the nearest, since the product only cuts bits off. NaN stays."""
    if PRECISION == "tf32":
        bits = value.to(tl.int32, bitcast=True)
        bits = (bits + tl.where(value == value, 0x1000, 0)) & -0x2000  # half of the last bit kept; then without the others
        value = bits.to(tl.float32, bitcast=True)
    return value


@triton.jit
def locate(tile, pixels, height, width, STRIDE: tl.constexpr, BLOCK_M: tl.constexpr):
    """The output pixels of a tile: number in the batch, whether it exists, image (int64), row and column."""
    out_height = (height - 1) // STRIDE + 1
    out_width = (width - 1) // STRIDE + 1
    number = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    in_image = number % (out_height * out_width)
    image = (number // (out_height * out_width)).to(tl.int64)
    return number, number < pixels, image, in_image // out_width, in_image % out_width


@triton.jit
def slot_pointers(
    data, image, row, column, image_stride, row_stride, pixel_stride, slot, group,
    CHANNELS: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Where the channels of a convolution group begin, in a slot of `GroupView`, for each pixel: (BLOCK_M,)."""
    pixels = image * image_stride + row.to(tl.int64) * row_stride + column.to(tl.int64) * pixel_stride
    return data + (pixels + slot) * VEC + group * CHANNELS


@triton.jit
def multiply_taps(
    source_base, weight_base, exists, row, column, columns, source_row, source_pixel, height, width,
    CHANNELS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    SOURCE_VEC: tl.constexpr, SOURCE_PADDED: tl.constexpr, WEIGHT_PADDED: tl.constexpr, ROUNDS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The convolution at output pixels (row, column) of images, in fp32: (BLOCK_M, BLOCK_N).

    source_base: (BLOCK_M,) pointers to the images' first pixels. weight_base: (9, CHANNELS, WEIGHT_PADDED), as `pack_weights`
    lays them out. columns: output channels, of which those below CHANNELS exist. height, width: of the source.
    ROUNDS: whether the source is rounded here; weights, and what our kernels leave in scratch, are rounded already.
    """
    k_blocks: tl.constexpr = (SOURCE_PADDED + BLOCK_K - 1) // BLOCK_K
    first_row = row * STRIDE - DILATION
    first_column = column * STRIDE - DILATION
    first = first_row.to(tl.int64) * source_row + first_column.to(tl.int64) * source_pixel
    source_base += first * SOURCE_VEC
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, 9 * k_blocks):
        tap = k // k_blocks
        down = tap // 3 * DILATION
        right = tap % 3 * DILATION
        channels = k % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = exists & (first_row + down >= 0) & (first_row + down < height)
        inside = inside & (first_column + right >= 0) & (first_column + right < width)
        shift = (down.to(tl.int64) * source_row + right.to(tl.int64) * source_pixel) * SOURCE_VEC
        u = tl.load(
            (source_base + shift)[:, None] + channels[None, :],
            mask=inside[:, None] & (channels < SOURCE_PADDED)[None, :],
            other=0.0,
        )  # (BLOCK_M, BLOCK_K)
        weight = tl.load(
            weight_base + tap * (CHANNELS * WEIGHT_PADDED) + columns[None, :] * WEIGHT_PADDED + channels[:, None],
            mask=(columns < CHANNELS)[None, :] & (channels < WEIGHT_PADDED)[:, None],
            other=0.0,
        )  # (BLOCK_K, BLOCK_N)
        if ROUNDS:
            u = rounded_factor(u, PRECISION)
        total = tl.dot(u, weight, total, input_precision=PRECISION)
    return total


def overlaps(capability: tuple[int, int]) -> bool:
    """Whether a kernel with OVERLAPS is launched to overlap the one before it; the interpreter runs them one by one."""
    return overlap.allowed(capability) and not knobs.runtime.interpret


def launch_options(tile: Tile, overlaps: bool) -> dict[str, object]:
    """Give the options of a kernel with this tile. OVERLAPS must be the same: only then does the kernel wait."""
    options: dict[str, object] = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return options | {"launch_pdl": True} if overlaps else options


@dataclass(frozen=True)
class GroupView:
    """x or out as the kernels see it: s slots of channels, `pitch` apart.

    data: (N, >= s*pitch, H, W), channel stride 1, any other strides. padded_channels: of a slot, that are read or
    written: w, or more where the padding up to there holds, or is to hold, exact zeros (one convolution group only).
    first: the slot of group 0 where it is not slot 0; the other groups always lie in the slots of their numbers.
    """

    data: Tensor
    pitch: int
    padded_channels: int
    first: int = 0

    @functools.cached_property
    def vec(self) -> int:
        """Elements, 16 bytes at most, that divide every stride and offset."""
        return math.gcd(16 // self.data.element_size(), self.pitch, *self._strides())

    def _strides(self) -> tuple[int, int, int]:
        # A dimension of size 1 may carry any stride; it is never stepped along.
        return tuple(self.data.stride(d) if self.data.shape[d] > 1 else 0 for d in (0, 2, 3))  # type: ignore[return-value]

    def arguments(self, name: str) -> dict[str, int]:
        image, row, pixel = (stride // self.vec for stride in self._strides())
        return {f"{name}_image": image, f"{name}_row": row, f"{name}_pixel": pixel}

    @functools.cached_property
    def step(self) -> int:
        """Units of `vec` elements from one slot to the next."""
        return self.pitch // self.vec

    def offset(self, group: int) -> int:
        return (group or self.first) * self.step

    def images(self, start: int, count: int) -> GroupView:
        return replace(self, data=self.data[start : start + count])


def pack_weights(weights: Sequence[Tensor], groups: int, padded: int) -> Tensor:
    """(steps, groups, 9, w/groups, padded): input channels innermost, padded with exact zeros. Not rounded yet: see `tf32`."""
    stacked = torch.stack([weight.detach() for weight in weights])  # (steps, w, w/groups, 3, 3)
    steps, width, channels = stacked.shape[:3]
    taps = stacked.reshape(steps, groups, width // groups, channels, 9).permute(0, 1, 4, 2, 3)
    return torch.nn.functional.pad(taps, (0, padded - channels)).contiguous()


def turned(weights: Sequence[Tensor], groups: int) -> list[Tensor]:
    """The weights (w, w/groups, 3, 3) with which a convolution of dz, at stride 1, gives the gradient of what was convolved."""
    turned = []
    for weight in weights:
        grouped = weight.unflatten(0, (groups, -1))  # (groups, w/groups out, w/groups in, 3, 3)
        turned.append(grouped.transpose(1, 2).flip(3, 4).flatten(0, 1))
    return turned


def source_arguments(
    problem: ChainProblem, plan: StepPlan, x: GroupView, scratch: Tensor | None, slot: int
) -> dict[str, object]:
    """What the convolution reads: scratch (N*H*W, groups*padded), whose padding is exact zeros, or
    x's slot.
    """
    groups, padded = problem.config.groups, plan.padded_channels
    if scratch is None:
        return {
            "source": x.data,
            **x.arguments("source"),
            "source_slot": x.offset(slot),
            "source_slot_step": x.step,
            "SOURCE_VEC": x.vec,
            "SOURCE_PADDED": x.padded_channels if groups == 1 else problem.width // groups,
            "SOURCE_GROUP": problem.width // groups,
            "ROUNDS": plan.precision == "tf32",  # False in all others, so that they share kernels with those of scratch
        }
    vec = 16 // scratch.element_size() if padded % 8 == 0 else 1
    pixel = groups * padded // vec
    return {
        "source": scratch,
        "source_image": problem.height * problem.width_pixels * pixel,
        "source_row": problem.width_pixels * pixel,
        "source_pixel": pixel,
        "source_slot": 0,
        "source_slot_step": 0,
        "SOURCE_VEC": vec,
        "SOURCE_PADDED": padded,
        "SOURCE_GROUP": padded,
        "ROUNDS": False,
    }
