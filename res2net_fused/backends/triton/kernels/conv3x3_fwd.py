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
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....chain.problem import ChainProblem
from ..launch import KernelCall
from ..step_plan import Launch, StepPlan
from ..tf32 import of_precision
from .common import (
    SIZES,
    GroupView,
    activate,
    activation_arguments,
    await_predecessor,
    launch_options,
    locate,
    multiply_taps,
    overlaps,
    rounded_factor,
    slot_pointers,
    source_arguments,
)

_STRIDES = [f"{name}_{axis}" for name in ("source", "x", "out") for axis in ("image", "row", "pixel")]
_SLOTS = ["source_slot", "source_slot_step", "x_slot", "out_slot", "out_slot_step", "pass_slot_x", "pass_slot_out"]


@triton.jit
def _pass_through(
    x_base, row_stride, pixel_stride, exists, row, column, columns, height, width,
    COUT: tl.constexpr, STRIDE: tl.constexpr, POOL: tl.constexpr,
):  # fmt: skip
    """x of the group without a convolution, as it is or pooled over 3x3 pixels, in fp32: (BLOCK_M, BLOCK_N)."""
    channel_ok = (columns < COUT)[None, :]
    if POOL == "none":
        pointers = x_base + row.to(tl.int64) * row_stride + column.to(tl.int64) * pixel_stride
        value = tl.load(pointers[:, None] + columns[None, :], mask=exists[:, None] & channel_ok, other=0.0).to(tl.float32)
    elif POOL == "max3":
        value = tl.full((row.shape[0], columns.shape[0]), float("-inf"), tl.float32)
        for tap in tl.range(9, num_stages=1):  # as below
            in_row = row * STRIDE + tap // 3 - 1
            in_column = column * STRIDE + tap % 3 - 1
            inside = exists & (in_row >= 0) & (in_row < height) & (in_column >= 0) & (in_column < width)
            pointers = x_base + in_row.to(tl.int64) * row_stride + in_column.to(tl.int64) * pixel_stride
            pixel = tl.load(pointers[:, None] + columns[None, :], mask=inside[:, None] & channel_ok, other=float("-inf"))
            value = tl.maximum(value, pixel.to(tl.float32), propagate_nan=tl.PropagateNan.ALL)
        value = tl.where(channel_ok, value, 0.0)  # what pads the channels is stored too
    else:
        value = tl.zeros((row.shape[0], columns.shape[0]), tl.float32)
        count = tl.zeros((row.shape[0],), tl.float32)
        for tap in tl.range(9, num_stages=1):  # unrolled, its loads would take all registers at once
            in_row = row * STRIDE + tap // 3 - 1
            in_column = column * STRIDE + tap % 3 - 1
            inside = exists & (in_row >= 0) & (in_row < height) & (in_column >= 0) & (in_column < width)
            pointers = x_base + in_row.to(tl.int64) * row_stride + in_column.to(tl.int64) * pixel_stride
            pixel = tl.load(pointers[:, None] + columns[None, :], mask=inside[:, None] & channel_ok, other=0.0)
            value += pixel.to(tl.float32)
            count += inside.to(tl.float32)
        if POOL == "avg3":
            value = value / 9.0
        else:
            value = value / tl.maximum(count, 1.0)[:, None]
    return value


@triton.jit(do_not_specialize=[*SIZES, *_STRIDES, *_SLOTS])
def conv3x3_fwd(
    source, x, out, scratch, weights, bias,
    pixels, height, width,
    source_image, source_row, source_pixel, source_slot, source_slot_step,
    x_image, x_row, x_pixel, x_slot,
    out_image, out_row, out_pixel, out_slot, out_slot_step,
    pass_slot_x, pass_slot_out,
    STEPS: tl.constexpr, GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
    STRIDE: tl.constexpr, DILATION: tl.constexpr,
    SOURCE_VEC: tl.constexpr, SOURCE_PADDED: tl.constexpr, SOURCE_GROUP: tl.constexpr,
    X_VEC: tl.constexpr, OUT_VEC: tl.constexpr, OUT_PADDED: tl.constexpr,
    SCRATCH_PADDED: tl.constexpr, WEIGHT_PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, POOL: tl.constexpr,
    FORMS_NEXT: tl.constexpr, PASSES: tl.constexpr, ROUNDS: tl.constexpr, PRECISION: tl.constexpr,
    OVERLAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`steps` convolutions (one, unless nothing is added) and, with PASSES, the group that passes through.

    *_PADDED: channels of a slot (scratch: of a convolution group) that are read or written; beyond CHANNELS they are exact
    zeros. SOURCE_GROUP: channels from one convolution group to the next. pixels: of the output, in all images.
    """
    await_predecessor(OVERLAPS)
    n_tiles: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    m_tiles = (pixels + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    columns = program % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = program // n_tiles % m_tiles
    task = program // n_tiles // m_tiles
    group = task % GROUPS
    step = task // GROUPS
    number, exists, image, row, column = locate(tile, pixels, height, width, STRIDE, BLOCK_M)
    out_ok = exists[:, None] & (columns < OUT_PADDED)[None, :]

    if PASSES:
        passing = step == STEPS
        if passing:
            x_base = x + (image * x_image + pass_slot_x) * X_VEC + group * CHANNELS
            value = _pass_through(
                x_base, x_row.to(tl.int64) * X_VEC, x_pixel.to(tl.int64) * X_VEC, exists, row, column, columns, height, width,
                CHANNELS, STRIDE, POOL,
            )  # fmt: skip
            out_base = slot_pointers(
                out, image, row, column, out_image, out_row, out_pixel, pass_slot_out, group, CHANNELS, OUT_VEC
            )
            tl.store(out_base[:, None] + columns[None, :], value.to(out.dtype.element_ty), mask=out_ok)
            return

    source_base = source + (image * source_image + source_slot + step * source_slot_step) * SOURCE_VEC + group * SOURCE_GROUP
    weight_base = weights + (step * GROUPS + group).to(tl.int64) * (9 * CHANNELS * WEIGHT_PADDED)
    total = multiply_taps(
        source_base, weight_base, exists, row, column, columns, source_row, source_pixel, height, width,
        CHANNELS, STRIDE, DILATION, SOURCE_VEC, SOURCE_PADDED, WEIGHT_PADDED, ROUNDS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    channel_ok = columns < CHANNELS
    total += tl.load(bias + (step * GROUPS + group) * CHANNELS + columns, mask=channel_ok, other=0.0)[None, :]
    # A padded channel is Inf * 0 = NaN where u holds an Inf, so it is set rather than trusted to be zero.
    y = tl.where(channel_ok[None, :], activate(total, ACTIVATION, SLOPE), 0.0).to(out.dtype.element_ty)
    slot = out_slot + step * out_slot_step
    out_base = slot_pointers(out, image, row, column, out_image, out_row, out_pixel, slot, group, CHANNELS, OUT_VEC)
    tl.store(out_base[:, None] + columns[None, :], y, mask=out_ok)
    if FORMS_NEXT:
        x_base = slot_pointers(x, image, row, column, x_image, x_row, x_pixel, x_slot, group, CHANNELS, X_VEC)
        x_next = tl.load(x_base[:, None] + columns[None, :], mask=exists[:, None] & channel_ok[None, :], other=0.0)
        u_next = (y.to(tl.float32) + x_next.to(tl.float32)).to(scratch.dtype.element_ty)
        scratch_base = scratch + (number.to(tl.int64) * GROUPS + group) * SCRATCH_PADDED
        scratch_ok = exists[:, None] & (columns < SCRATCH_PADDED)[None, :]
        tl.store(scratch_base[:, None] + columns[None, :], rounded_factor(u_next, PRECISION), mask=scratch_ok)


@triton.jit(do_not_specialize=[*SIZES, *_STRIDES, *_SLOTS])
def prepare_first_u(
    x, out, scratch,
    pixels, height, width,
    x_image, x_row, x_pixel, x_slot,
    out_image, out_row, out_pixel,
    pass_slot_x, pass_slot_out,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr,
    X_VEC: tl.constexpr, OUT_VEC: tl.constexpr, OUT_PADDED: tl.constexpr, SCRATCH_PADDED: tl.constexpr,
    POOL: tl.constexpr, PASSES: tl.constexpr, ADDS: tl.constexpr,
    PRECISION: tl.constexpr, OVERLAPS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The u of the first convolution into scratch: its x alone (for alignment), or with ADDS the passed y added."""
    await_predecessor(OVERLAPS)
    n_tiles: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    m_tiles = (pixels + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    columns = program % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = program // n_tiles % m_tiles
    group = program // n_tiles // m_tiles
    number, exists, image, row, column = locate(tile, pixels, height, width, 1, BLOCK_M)
    channel_ok = columns < CHANNELS
    x_base = slot_pointers(x, image, row, column, x_image, x_row, x_pixel, x_slot, group, CHANNELS, X_VEC)
    u = tl.load(x_base[:, None] + columns[None, :], mask=exists[:, None] & channel_ok[None, :], other=0.0)
    if PASSES:
        pass_base = x + (image * x_image + pass_slot_x) * X_VEC + group * CHANNELS
        value = _pass_through(
            pass_base, x_row.to(tl.int64) * X_VEC, x_pixel.to(tl.int64) * X_VEC, exists, row, column, columns, height, width,
            CHANNELS, 1, POOL,
        )  # fmt: skip
        y = value.to(out.dtype.element_ty)
        out_base = slot_pointers(
            out, image, row, column, out_image, out_row, out_pixel, pass_slot_out, group, CHANNELS, OUT_VEC
        )
        tl.store(out_base[:, None] + columns[None, :], y, mask=exists[:, None] & (columns < OUT_PADDED)[None, :])
        if ADDS:
            u = (u.to(tl.float32) + y.to(tl.float32)).to(scratch.dtype.element_ty)
    scratch_base = scratch + (number.to(tl.int64) * GROUPS + group) * SCRATCH_PADDED
    scratch_ok = exists[:, None] & (columns < SCRATCH_PADDED)[None, :]
    tl.store(scratch_base[:, None] + columns[None, :], rounded_factor(u, PRECISION), mask=scratch_ok)


def interpreted() -> bool:
    """Whether the kernels were defined under Triton's interpreter."""
    return not isinstance(conv3x3_fwd, triton.JITFunction)


def chain_calls(
    problem: ChainProblem, plan: StepPlan, x: GroupView, out: GroupView, weights: Tensor, bias: Tensor
) -> Iterator[KernelCall]:
    """Every launch of the chain, in order. weights: from `pack` of `backends/triton/chain.py`; bias (steps, w) in fp32."""
    weights = of_precision(weights, plan.precision)
    images = min(plan.images, problem.batch)
    pixels = images * problem.height * problem.width_pixels
    shape = (pixels, problem.config.groups * plan.padded_channels)
    buffers = [torch.empty(shape, dtype=problem.dtype, device=x.data.device) for _ in range(plan.scratch_buffers)]
    for start in range(0, problem.batch, images):
        x_chunk, out_chunk = x.images(start, images), out.images(start, images)
        turns = itertools.cycle(buffers)
        written: Tensor | None = None
        for launch in plan.launches:
            source = written if launch.reads_u else None
            written = next(turns) if launch.forms_next else None
            yield step_call(problem, plan, launch, x_chunk, out_chunk, source, written, weights, bias)


def step_call(
    problem: ChainProblem,
    plan: StepPlan,
    launch: Launch,
    x: GroupView,
    out: GroupView,
    source: Tensor | None,
    target: Tensor | None,
    weights: Tensor | None,  # None where the launch only prepares u, as bias
    bias: Tensor | None,
) -> KernelCall:
    """One launch; `source` and `target` are the scratch buffers that it reads and writes, each (N*H*W, groups*padded)."""
    config, tile = problem.config, plan.tile
    images, overlapping = x.data.shape[0], overlaps(plan.capability)
    passed = config.passed_group(problem.scale)
    slot = config.first_convolved + launch.first_step
    arguments: dict[str, Any] = {
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
        "OUT_PADDED": out.padded_channels if config.groups == 1 else problem.width // config.groups,
        "SCRATCH_PADDED": plan.padded_channels,
        "POOL": config.pool or "none",
        "PASSES": launch.passes,
        "PRECISION": plan.precision,
        "OVERLAPS": overlapping,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    options = launch_options(tile, overlapping)
    programs = plan.programs(problem, launch, images)
    if launch.steps == 0:
        arguments |= {"x_slot": x.offset(slot), "ADDS": config.adds_passed}
        return KernelCall(prepare_first_u, programs, arguments, options)
    assert weights is not None and bias is not None
    arguments |= {
        "weights": weights[launch.first_step : launch.first_step + launch.steps],
        "bias": bias[launch.first_step : launch.first_step + launch.steps],
        "x_slot": x.offset(slot + 1) if launch.forms_next else 0,
        "out_slot": out.offset(slot),
        "out_slot_step": out.step,
        "STEPS": launch.steps,
        "STRIDE": config.stride,
        "DILATION": config.dilation,
        "WEIGHT_PADDED": weights.shape[-1],
        **activation_arguments(config.activation),
        "FORMS_NEXT": launch.forms_next,
        "BLOCK_K": tile.block_k,
        **source_arguments(problem, plan, x, source, slot),
    }
    return KernelCall(conv3x3_fwd, programs, arguments, options)
