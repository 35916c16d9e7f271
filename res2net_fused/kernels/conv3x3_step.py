"""The Triton kernels of the per-step path, and how a plan turns into calls of them.

One program of the step kernel computes a tile of one convolution as an implicit matrix product:

         K = 9 taps x channels                 block_n output channels
       <------- block_k ------>               <-------->
      +------------------------+             +----------+                   +----------+
      | u of block_m pixels,   |           K | weights  |                   | y        |  block_m pixels, counted
      | shifted by the tap     |     .       | of the   |  + bias, ReLU ->  | (fp32,   |  through the whole batch
      | (zero outside)         |             | tap      |                   | rounded) |
      +------------------------+             +----------+                   +----------+
        source: x's slot or scratch                                           |      |
                                                    out's slot of group i <---+      +---> + x_{i+1} -> scratch, u_{i+1}

x and out hold s slots of channels side by side, one per group of the scale; `groups` are those of the convolution,
inside a slot. The sum u_{i+1} is formed once, behind step i, since forming it in front of step i + 1 would load both its
terms nine times. Grid, fastest first: channel tile, pixel tile, convolution group, step; a last "step" copies or pools
the slot that passes through.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chain import ChainProblem
from .kernel_call import KernelCall
from .step_plan import Launch, StepPlan

# Where alignment matters it travels as a constexpr (`*_VEC`: strides and offsets are counted in units of so many
# elements), so no integer needs specialising, and a new H, W or batch compiles nothing.
_SIZES = ["pixels", "height", "width"]
_STRIDES = [f"{name}_{axis}" for name in ("source", "x", "out") for axis in ("image", "row", "pixel")]
_SLOTS = ["source_slot", "source_slot_step", "x_slot", "out_slot", "out_slot_step", "pass_slot_x", "pass_slot_out"]


@triton.jit
def activate(y, ACTIVATION: tl.constexpr):
    if ACTIVATION != "none":
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)  # as torch.relu: NaN stays NaN
    if ACTIVATION == "hardtanh20":
        y = tl.minimum(y, 20.0, propagate_nan=tl.PropagateNan.ALL)
    return y


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
def _pass_through(
    x_base, row_stride, pixel_stride, exists, row, column, columns, height, width,
    COUT: tl.constexpr, STRIDE: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """x of the group without a convolution, as it is or averaged over 3x3 pixels, in fp32: (BLOCK_M, BLOCK_N)."""
    lane_ok = (columns < COUT)[None, :]
    if POOL == "none":
        pointers = x_base + row.to(tl.int64) * row_stride + column.to(tl.int64) * pixel_stride
        value = tl.load(pointers[:, None] + columns[None, :], mask=exists[:, None] & lane_ok, other=0.0).to(tl.float32)
    else:
        value = tl.zeros((row.shape[0], columns.shape[0]), tl.float32)
        count = tl.zeros((row.shape[0],), tl.float32)
        for tap in tl.range(9, num_stages=1):  # unrolled, its loads would take all registers at once
            in_row = row * STRIDE + tap // 3 - 1
            in_column = column * STRIDE + tap % 3 - 1
            inside = exists & (in_row >= 0) & (in_row < height) & (in_column >= 0) & (in_column < width)
            pointers = x_base + in_row.to(tl.int64) * row_stride + in_column.to(tl.int64) * pixel_stride
            pixel = tl.load(pointers[:, None] + columns[None, :], mask=inside[:, None] & lane_ok, other=0.0)
            value += pixel.to(tl.float32)
            count += inside.to(tl.float32)
        if POOL == "avg3":
            value = value / 9.0
        else:
            value = value / tl.maximum(count, 1.0)[:, None]
    return value


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES, *_SLOTS])
def conv3x3_step(
    source, x, out, scratch, weights, bias,
    pixels, height, width,
    source_image, source_row, source_pixel, source_slot, source_slot_step,
    x_image, x_row, x_pixel, x_slot,
    out_image, out_row, out_pixel, out_slot, out_slot_step,
    pass_slot_x, pass_slot_out,
    STEPS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr, DILATION: tl.constexpr,
    SOURCE_VEC: tl.constexpr, SOURCE_LANES: tl.constexpr, SOURCE_GROUP: tl.constexpr,
    X_VEC: tl.constexpr, OUT_VEC: tl.constexpr, OUT_LANES: tl.constexpr,
    SCRATCH_LANES: tl.constexpr, WEIGHT_LANES: tl.constexpr,
    ACTIVATION: tl.constexpr, POOL: tl.constexpr, FORMS_NEXT: tl.constexpr, PASSES: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`steps` convolutions (one, unless nothing is added) and, with PASSES, the group that passes through.

    *_LANES: channels of a slot (scratch: of a convolution group) that are read or written; beyond CHANNELS they are exact
    zeros. SOURCE_GROUP: channels from one convolution group to the next. pixels: of the output, in all images.
    """
    n_tiles: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    m_tiles = (pixels + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    columns = program % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = program // n_tiles % m_tiles
    task = program // n_tiles // m_tiles
    group = task % GROUPS
    step = task // GROUPS
    number, exists, image, row, column = locate(tile, pixels, height, width, STRIDE, BLOCK_M)
    out_pixels = image * out_image + row.to(tl.int64) * out_row + column.to(tl.int64) * out_pixel
    out_ok = exists[:, None] & (columns < OUT_LANES)[None, :]

    if PASSES:
        passing = step == STEPS
        if passing:
            x_base = x + (image * x_image + pass_slot_x) * X_VEC + group * CHANNELS
            value = _pass_through(
                x_base, x_row * X_VEC, x_pixel * X_VEC, exists, row, column, columns, height, width,
                CHANNELS, STRIDE, POOL,
            )  # fmt: skip
            out_base = out + (out_pixels + pass_slot_out) * OUT_VEC + group * CHANNELS
            tl.store(out_base[:, None] + columns[None, :], value.to(out.dtype.element_ty), mask=out_ok)
            return

    k_blocks: tl.constexpr = (SOURCE_LANES + BLOCK_K - 1) // BLOCK_K
    first_row = row * STRIDE - DILATION
    first_column = column * STRIDE - DILATION
    source_offset = image * source_image + source_slot + step * source_slot_step
    source_offset += first_row.to(tl.int64) * source_row + first_column.to(tl.int64) * source_pixel
    source_base = source + source_offset * SOURCE_VEC + group * SOURCE_GROUP
    weight_base = weights + (step * GROUPS + group).to(tl.int64) * (9 * CHANNELS * WEIGHT_LANES)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, 9 * k_blocks):
        tap = k // k_blocks
        down = tap // 3 * DILATION
        right = tap % 3 * DILATION
        lanes = k % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        inside = exists & (first_row + down >= 0) & (first_row + down < height)
        inside = inside & (first_column + right >= 0) & (first_column + right < width)
        shift = (down.to(tl.int64) * source_row + right.to(tl.int64) * source_pixel) * SOURCE_VEC
        u = tl.load(
            (source_base + shift)[:, None] + lanes[None, :],
            mask=inside[:, None] & (lanes < SOURCE_LANES)[None, :],
            other=0.0,
        )  # (BLOCK_M, BLOCK_K)
        weight = tl.load(
            weight_base + tap * (CHANNELS * WEIGHT_LANES) + columns[None, :] * WEIGHT_LANES + lanes[:, None],
            mask=(columns < CHANNELS)[None, :] & (lanes < WEIGHT_LANES)[:, None],
            other=0.0,
        )  # (BLOCK_K, BLOCK_N)
        total = tl.dot(u, weight, total, input_precision=PRECISION)

    lane_ok = columns < CHANNELS
    total += tl.load(bias + (step * GROUPS + group) * CHANNELS + columns, mask=lane_ok, other=0.0)[None, :]
    # A padded lane is Inf * 0 = NaN where u holds an Inf, so it is set rather than trusted to be zero.
    y = tl.where(lane_ok[None, :], activate(total, ACTIVATION), 0.0).to(out.dtype.element_ty)
    out_base = out + (out_pixels + out_slot + step * out_slot_step) * OUT_VEC + group * CHANNELS
    tl.store(out_base[:, None] + columns[None, :], y, mask=out_ok)
    if FORMS_NEXT:
        x_pixels = image * x_image + row.to(tl.int64) * x_row + column.to(tl.int64) * x_pixel
        x_base = x + (x_pixels + x_slot) * X_VEC + group * CHANNELS
        x_next = tl.load(x_base[:, None] + columns[None, :], mask=exists[:, None] & lane_ok[None, :], other=0.0)
        u_next = (y.to(tl.float32) + x_next.to(tl.float32)).to(scratch.dtype.element_ty)
        scratch_base = scratch + (number.to(tl.int64) * GROUPS + group) * SCRATCH_LANES
        scratch_ok = exists[:, None] & (columns < SCRATCH_LANES)[None, :]
        tl.store(scratch_base[:, None] + columns[None, :], u_next, mask=scratch_ok)


@triton.jit(do_not_specialize=[*_SIZES, *_STRIDES, *_SLOTS])
def prepare_first_u(
    x, out, scratch,
    pixels, height, width,
    x_image, x_row, x_pixel, x_slot,
    out_image, out_row, out_pixel,
    pass_slot_x, pass_slot_out,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
    X_VEC: tl.constexpr, OUT_VEC: tl.constexpr, OUT_LANES: tl.constexpr, SCRATCH_LANES: tl.constexpr,
    POOL: tl.constexpr, PASSES: tl.constexpr, ADDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The u of the first convolution into scratch: its x alone (for alignment), or with ADDS the passed y added."""
    n_tiles: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    m_tiles = (pixels + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    columns = program % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = program // n_tiles % m_tiles
    group = program // n_tiles // m_tiles
    number, exists, image, row, column = locate(tile, pixels, height, width, 1, BLOCK_M)
    lane_ok = columns < CHANNELS
    x_pixels = image * x_image + row.to(tl.int64) * x_row + column.to(tl.int64) * x_pixel
    x_base = x + (x_pixels + x_slot) * X_VEC + group * CHANNELS
    u = tl.load(x_base[:, None] + columns[None, :], mask=exists[:, None] & lane_ok[None, :], other=0.0)
    if PASSES:
        pass_base = x + (image * x_image + pass_slot_x) * X_VEC + group * CHANNELS
        value = _pass_through(
            pass_base, x_row * X_VEC, x_pixel * X_VEC, exists, row, column, columns, height, width, CHANNELS, 1, POOL
        )
        y = value.to(out.dtype.element_ty)
        out_pixels = image * out_image + row.to(tl.int64) * out_row + column.to(tl.int64) * out_pixel
        out_base = out + (out_pixels + pass_slot_out) * OUT_VEC + group * CHANNELS
        tl.store(out_base[:, None] + columns[None, :], y, mask=exists[:, None] & (columns < OUT_LANES)[None, :])
        if ADDS:
            u = (u.to(tl.float32) + y.to(tl.float32)).to(scratch.dtype.element_ty)
    scratch_base = scratch + (number.to(tl.int64) * GROUPS + group) * SCRATCH_LANES
    tl.store(scratch_base[:, None] + columns[None, :], u, mask=exists[:, None] & (columns < SCRATCH_LANES)[None, :])


@dataclass(frozen=True)
class Slots:
    """x or out as the kernels see it: s slots of channels, `pitch` apart.

    data: (N, >= s*pitch, H, W), channel stride 1, any other strides. lanes: channels of a slot that are read or written:
    w, or more where the padding up to there holds, or is to hold, exact zeros (one convolution group only).
    first: the slot of group 0 where it is not slot 0; the other groups always lie in the slots of their numbers.
    """

    data: Tensor
    pitch: int
    lanes: int
    first: int = 0

    @property
    def vec(self) -> int:
        """Elements, 16 bytes at most, that divide every stride and offset."""
        return math.gcd(16 // self.data.element_size(), self.pitch, *self._strides())

    def _strides(self) -> tuple[int, int, int]:
        # A dimension of size 1 may carry any stride; it is never stepped along.
        return tuple(self.data.stride(d) if self.data.shape[d] > 1 else 0 for d in (0, 2, 3))  # type: ignore[return-value]

    def arguments(self, name: str) -> dict[str, int]:
        image, row, pixel = (stride // self.vec for stride in self._strides())
        return {f"{name}_image": image, f"{name}_row": row, f"{name}_pixel": pixel}

    @property
    def step(self) -> int:
        """From one slot to the next."""
        return self.pitch // self.vec

    def offset(self, group: int) -> int:
        return (group or self.first) * self.step

    def images(self, start: int, count: int) -> Slots:
        return replace(self, data=self.data[start : start + count])


def interpreted() -> bool:
    """Whether the kernels were defined under Triton's interpreter."""
    return not isinstance(conv3x3_step, triton.JITFunction)


def pack_weights(weights: list[Tensor], groups: int, lanes: int) -> Tensor:
    """(steps, groups, 9, w/groups, lanes): input channels innermost, padded with exact zeros."""
    stacked = torch.stack([weight.detach() for weight in weights])  # (steps, w, w/groups, 3, 3)
    steps, width, channels = stacked.shape[:3]
    taps = stacked.reshape(steps, groups, width // groups, channels, 9).permute(0, 1, 4, 2, 3)
    return torch.nn.functional.pad(taps, (0, lanes - channels)).contiguous()


def chain_calls(
    problem: ChainProblem, plan: StepPlan, x: Slots, out: Slots, weights: Tensor, bias: Tensor
) -> Iterator[KernelCall]:
    """Every launch of the chain, in order. weights from `pack_weights`; bias (steps, w) in fp32."""
    images = min(plan.images, problem.batch)
    pixels = images * problem.height * problem.width_pixels
    shape = (pixels, problem.config.groups * plan.lanes)
    buffers = [torch.empty(shape, dtype=problem.dtype, device=x.data.device) for _ in range(plan.scratch_buffers)]
    for start in range(0, problem.batch, images):
        x_chunk, out_chunk = x.images(start, images), out.images(start, images)
        turns, written = itertools.cycle(buffers), None
        for launch in plan.launches:
            source = written if launch.reads_u else None
            written = next(turns) if launch.forms_next else None
            yield _call(problem, plan, launch, x_chunk, out_chunk, source, written, weights, bias)


def _call(
    problem: ChainProblem,
    plan: StepPlan,
    launch: Launch,
    x: Slots,
    out: Slots,
    source: Tensor | None,
    target: Tensor | None,
    weights: Tensor,
    bias: Tensor,
) -> KernelCall:
    config, tile = problem.config, plan.tile
    images = x.data.shape[0]
    passed = config.passed_group(problem.scale)
    slot = config.first_convolved + launch.first_step
    arguments = {
        "x": x.data,
        "out": out.data,
        # Where nothing is written to scratch, x stands in for a pointer that is never followed.
        "scratch": x.data if target is None else target,
        "pixels": images * problem.output_height * problem.output_width,
        "height": problem.height,
        "width": problem.width_pixels,
        **x.arguments("x"),
        **out.arguments("out"),
        "pass_slot_x": x.offset(passed or 0),
        "pass_slot_out": out.offset(passed or 0),
        "GROUPS": config.groups,
        "CHANNELS": problem.width // config.groups,
        "X_VEC": x.vec,
        "OUT_VEC": out.vec,
        "OUT_LANES": out.lanes if config.groups == 1 else problem.width // config.groups,
        "SCRATCH_LANES": plan.lanes,
        "POOL": config.pool or "none",
        "PASSES": launch.passes,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    programs = plan.programs(problem, launch, images)
    if launch.steps == 0:
        arguments |= {"x_slot": x.offset(slot), "ADDS": config.adds(slot)}
        return KernelCall(prepare_first_u, programs, arguments, options)
    arguments |= {
        "weights": weights[launch.first_step : launch.first_step + launch.steps],
        "bias": bias[launch.first_step : launch.first_step + launch.steps],
        "x_slot": x.offset(slot + 1) if launch.forms_next else 0,
        "out_slot": out.offset(slot),
        "out_slot_step": out.step,
        "STEPS": launch.steps,
        "STRIDE": config.stride,
        "DILATION": config.dilation,
        "WEIGHT_LANES": weights.shape[-1],
        "ACTIVATION": config.activation,
        "FORMS_NEXT": launch.forms_next,
        "PRECISION": plan.precision,
        "BLOCK_K": tile.block_k,
        **_source(problem, plan, x, source, slot),
    }
    return KernelCall(conv3x3_step, programs, arguments, options)


def _source(problem: ChainProblem, plan: StepPlan, x: Slots, scratch: Tensor | None, slot: int) -> dict[str, object]:
    groups = problem.config.groups
    if scratch is None:
        lanes = x.lanes if groups == 1 else problem.width // groups
        return {
            "source": x.data,
            **x.arguments("source"),
            "source_slot": x.offset(slot),
            "source_slot_step": x.step,
            "SOURCE_VEC": x.vec,
            "SOURCE_LANES": lanes,
            "SOURCE_GROUP": problem.width // groups,
        }
    vec = 16 // scratch.element_size() if plan.lanes % 8 == 0 else 1
    pixel = groups * plan.lanes // vec
    return {
        "source": scratch,
        "source_image": problem.height * problem.width_pixels * pixel,
        "source_row": problem.width_pixels * pixel,
        "source_pixel": pixel,
        "source_slot": 0,
        "source_slot_step": 0,
        "SOURCE_VEC": vec,
        "SOURCE_LANES": plan.lanes,
        "SOURCE_GROUP": plan.lanes,
    }
