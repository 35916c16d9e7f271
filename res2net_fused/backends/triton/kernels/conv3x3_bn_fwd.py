"""Triton kernels of the forward pass with BatchNorm in training mode: two large launches per convolution, and small ones.

                 conv3x3_bn_fwd                                         bn_apply
      u_k   --> +----------------+ --> z_k  ---------------------> +----------------------+ --> y_k, out's slot
                | multiply_taps  |                                 | (z - mean) * scale   |
                +----------------+ --> mean and squared            |  + beta, activation  |
                                       deviations of each tile     |  + x_{k+1}           | --> u_{k+1}, scratch
                                          |                        +----------------------+
                                          +--> finish_statistics --> mean, scale --^

BatchNorm needs the mean over the batch before the first y exists, so u_{k+1} cannot be formed behind convolution k as it is in
inference. It is formed in a pass of its own rather than where convolution k+1 reads it: the nine taps would load z and x nine
times each from slices that are not aligned, the pass reads them once and leaves u in aligned scratch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....chain.problem import ChainProblem
from ....chain.sync_batch_norm import combine_moments
from ..launch import KernelCall
from ..step_plan import StepPlan
from .common import (
    SIZES,
    GroupView,
    activate,
    activation_arguments,
    locate,
    multiply_taps,
    rounded_factor,
    slot_pointers,
    source_arguments,
)
from .conv3x3_fwd import step_call
from .reductions import STATISTICS, statistics_calls

_SOURCE = [f"source_{axis}" for axis in ("image", "row", "pixel", "slot")]
_SLOTS = [f"{name}_{axis}" for name in ("x", "out") for axis in ("image", "row", "pixel", "slot")]
PASS_BLOCK_M, PASS_BLOCK_N = 64, 32  # of the kernels that multiply nothing


@triton.jit(do_not_specialize=[*SIZES, *_SOURCE])
def conv3x3_bn_fwd(
    source, weights, z, tile_means, tile_squares,
    pixels, height, width,
    source_image, source_row, source_pixel, source_slot,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    SOURCE_VEC: tl.constexpr, SOURCE_PADDED: tl.constexpr, SOURCE_GROUP: tl.constexpr, WEIGHT_PADDED: tl.constexpr,
    ROUNDS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One convolution and the moments of what it leaves.

    z: pixels of w channels without a gap. tile_means, tile_squares: (pixel tiles, w) in fp32.
    """
    n_tiles: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    m_tiles = (pixels + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    columns = program % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = program // n_tiles % m_tiles
    group = program // n_tiles // m_tiles
    number, exists, image, row, column = locate(tile, pixels, height, width, STRIDE, BLOCK_M)
    source_base = source + (image * source_image + source_slot) * SOURCE_VEC + group * SOURCE_GROUP
    weight_base = weights + group.to(tl.int64) * (9 * CHANNELS * WEIGHT_PADDED)
    total = multiply_taps(
        source_base, weight_base, exists, row, column, columns, source_row, source_pixel, height, width,
        CHANNELS, STRIDE, DILATION, SOURCE_VEC, SOURCE_PADDED, WEIGHT_PADDED, ROUNDS, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    column_ok = columns < CHANNELS
    written = exists[:, None] & column_ok[None, :]
    channel = group * CHANNELS + columns
    rounded = total.to(z.dtype.element_ty)
    tl.store(z + number.to(tl.int64)[:, None] * (GROUPS * CHANNELS) + channel[None, :], rounded, mask=written)
    value = tl.where(written, rounded.to(tl.float32), 0.0)  # statistics are of what is kept
    tile_mean = tl.sum(value, 0) / tl.minimum(pixels - tile * BLOCK_M, BLOCK_M).to(tl.float32)
    deviation = tl.where(written, value - tile_mean[None, :], 0.0)
    moments = tile.to(tl.int64) * (GROUPS * CHANNELS) + channel
    tl.store(tile_means + moments, tile_mean, mask=column_ok)
    tl.store(tile_squares + moments, tl.sum(deviation * deviation, 0), mask=column_ok)


@triton.jit(do_not_specialize=[*SIZES, *_SLOTS])
def bn_apply(
    z, mean, scale, beta, x, out, scratch, pixels, height, width,
    x_image, x_row, x_pixel, x_slot, out_image, out_row, out_pixel, out_slot,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, SCRATCH_PADDED: tl.constexpr,
    X_VEC: tl.constexpr, OUT_VEC: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr,
    FORMS_NEXT: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out's slot = act((z - mean) * scale + beta), and with FORMS_NEXT scratch = x's slot + that; sizes are the output's."""
    n_tiles: tl.constexpr = (SCRATCH_PADDED + BLOCK_N - 1) // BLOCK_N
    m_tiles = (pixels + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    columns = program % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    group = program // n_tiles // m_tiles
    number, exists, image, row, column = locate(program // n_tiles % m_tiles, pixels, height, width, 1, BLOCK_M)
    column_ok = columns < CHANNELS
    written = exists[:, None] & column_ok[None, :]
    channel = group * CHANNELS + columns
    own = tl.load(z + number.to(tl.int64)[:, None] * (GROUPS * CHANNELS) + channel[None, :], mask=written, other=0.0)
    own_mean = tl.load(mean + channel, mask=column_ok, other=0.0)
    own_scale = tl.load(scale + channel, mask=column_ok, other=0.0)
    own_beta = tl.load(beta + channel, mask=column_ok, other=0.0)
    y = activate((own.to(tl.float32) - own_mean[None, :]) * own_scale[None, :] + own_beta[None, :], ACTIVATION, SLOPE)
    y = y.to(out.dtype.element_ty)
    out_base = slot_pointers(out, image, row, column, out_image, out_row, out_pixel, out_slot, group, CHANNELS, OUT_VEC)
    tl.store(out_base[:, None] + columns[None, :], y, mask=written)
    if FORMS_NEXT:
        x_base = slot_pointers(x, image, row, column, x_image, x_row, x_pixel, x_slot, group, CHANNELS, X_VEC)
        x_next = tl.load(x_base[:, None] + columns[None, :], mask=written, other=0.0)
        u = tl.where(written, y.to(tl.float32) + x_next.to(tl.float32), 0.0).to(scratch.dtype.element_ty)
        scratch_base = scratch + (number.to(tl.int64) * GROUPS + group) * SCRATCH_PADDED
        scratch_ok = exists[:, None] & (columns < SCRATCH_PADDED)[None, :]
        tl.store(scratch_base[:, None] + columns[None, :], rounded_factor(u, PRECISION), mask=scratch_ok)


def pass_programs(pixels: int, channels: int, groups: int) -> int:
    """The grid of a kernel that multiplies nothing."""
    return triton.cdiv(pixels, PASS_BLOCK_M) * triton.cdiv(channels, PASS_BLOCK_N) * groups


def train_calls(
    problem: ChainProblem,
    plan: StepPlan,
    x: GroupView,
    out: GroupView,
    z: Sequence[Tensor],  # each (N, w, H', W'), channels-last
    statistics: Tensor,  # (4, steps, w) in fp32, written: see STATISTICS
    weights: Tensor,  # from `pack_weights`, rounded for the plan's precision
    gammas: Sequence[Tensor],  # each (w,) in fp32, as betas
    betas: Sequence[Tensor],
    eps: Sequence[float],
    group: str = "",  # of processes over which statistics are taken
) -> Iterator[KernelCall]:
    """Every launch of the forward pass in order; the group that passes through is left out unless `plan` prepares u."""
    config, width, tile = problem.config, problem.width, plan.tile
    channels = width // config.groups
    pixels = problem.batch * problem.output_height * problem.output_width
    tiles = triton.cdiv(pixels, tile.block_m)
    moments = torch.empty((2, tiles, width), dtype=torch.float32, device=x.data.device)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    shape = problem.batch * problem.height * problem.width_pixels, config.groups * plan.padded_channels
    # One buffer: convolution k has read u_k before the pass behind it writes u_{k+1}.
    scratch = torch.empty(shape, dtype=problem.dtype, device=x.data.device) if plan.scratch_buffers else None
    u = None
    if plan.launches[0].steps == 0:
        u = scratch
        yield step_call(problem, plan, plan.launches[0], x, out, None, u, None, None)
    for k, slot, _, _, forms_next in config.convolutions(problem.steps):
        source = source_arguments(problem, plan, x, u, slot)
        del source["source_slot_step"]
        arguments = {
            **source, "weights": weights[k], "z": z[k], "tile_means": moments[0], "tile_squares": moments[1],
            "pixels": pixels, "height": problem.height, "width": problem.width_pixels, "GROUPS": config.groups,
            "CHANNELS": channels, "STRIDE": config.stride, "DILATION": config.dilation, "WEIGHT_PADDED": weights.shape[-1],
            "PRECISION": plan.precision, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        }  # fmt: skip
        yield KernelCall(conv3x3_bn_fwd, tiles * triton.cdiv(channels, tile.block_n) * config.groups, arguments, options)
        yield from statistics_calls(moments, gammas[k], statistics[:, k], pixels, tile.block_m, eps[k])
        if group:
            _synchronise(statistics[:, k], gammas[k], pixels, eps[k], group)
        own = dict(zip(STATISTICS, statistics[:, k], strict=True))
        u = scratch if forms_next else None
        arguments = {
            "z": z[k], "mean": own["mean"], "scale": own["scale"], "beta": betas[k], "x": x.data, "out": out.data,
            "scratch": u if forms_next else out.data,  # where nothing is formed, a pointer that is never followed
            "pixels": pixels, "height": problem.output_height, "width": problem.output_width,
            **x.arguments("x"), "x_slot": x.offset(slot + 1) if forms_next else 0,
            **out.arguments("out"), "out_slot": out.offset(slot), "GROUPS": config.groups, "CHANNELS": channels,
            "SCRATCH_PADDED": plan.padded_channels, "X_VEC": x.vec, "OUT_VEC": out.vec,
            **activation_arguments(config.activation), "FORMS_NEXT": forms_next, "PRECISION": plan.precision,
            "BLOCK_M": PASS_BLOCK_M, "BLOCK_N": PASS_BLOCK_N,
        }  # fmt: skip
        yield KernelCall(bn_apply, pass_programs(pixels, plan.padded_channels, config.groups), arguments, {"num_warps": 4})


def _synchronise(statistics: Tensor, gamma: Tensor, pixels: int, eps: float, group: str) -> None:
    """Statistics of this process (4, w) into those of all."""
    mean, _, variance, _ = statistics
    squares = variance * (pixels - 1) if pixels > 1 else torch.zeros_like(mean)
    mean, squares, total = combine_moments(mean, squares, pixels, group)
    invstd = (squares / total + eps).rsqrt()
    statistics.copy_(torch.stack([mean, invstd, squares / (total - 1), gamma * invstd]))
