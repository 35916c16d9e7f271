"""Triton kernels of the forward pass with BatchNorm in training mode: two launches per convolution.

    train_step        u_k = x + act((z_{k-1} - mean) * scale + beta), formed where it is read and never stored;
                      z_k = K_k u_k;  y_{k-1} into its slot;  per tile of pixels, mean and squared deviations of z_k
    finish_statistics the tiles' moments, merged in a fixed order: mean, invstd, variance, scale = gamma * invstd
    finish_output     y of a convolution that no other one reads

A tile's deviations are taken from its own mean and merged as parallel variances are, so that no digits cancel whatever the
mean; nothing is added atomically, so that repeated runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..chain import ChainProblem
from .conv3x3_step import Slots, activate, locate
from .kernel_call import KernelCall
from .step_plan import StepPlan
from .tile_table import Tile

_INTEGERS = ["pixels", "height", "width"]
_STRIDES = [f"{name}_{axis}" for name in ("x", "out") for axis in ("image", "row", "pixel", "slot")]


@triton.jit
def _normalise(z, mean, scale, beta, ACTIVATION: tl.constexpr):
    return activate((z.to(tl.float32) - mean[None, :]) * scale[None, :] + beta[None, :], ACTIVATION)


@triton.jit(do_not_specialize=[*_INTEGERS, *_STRIDES])
def train_step(
    x, previous, mean, scale, beta, out, weights, z, tile_means, tile_squares,
    pixels, height, width,
    x_image, x_row, x_pixel, x_slot, out_image, out_row, out_pixel, out_slot,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, STRIDE: tl.constexpr, DILATION: tl.constexpr,
    X_VEC: tl.constexpr, OUT_VEC: tl.constexpr, WEIGHT_LANES: tl.constexpr,
    ACTIVATION: tl.constexpr, ADDS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One convolution. With ADDS, `previous` is z_{k-1}; mean, scale and beta (w,) make y_{k-1} of it, for u and for out's
    slot. z and previous hold pixels of w channels without a gap; tile_means and tile_squares are (pixel tiles, w) in fp32.
    """
    n_tiles: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    k_blocks: tl.constexpr = (CHANNELS + BLOCK_K - 1) // BLOCK_K
    m_tiles = (pixels + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    columns = program % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = program // n_tiles % m_tiles
    group = program // n_tiles // m_tiles
    number, exists, image, row, column = locate(tile, pixels, height, width, STRIDE, BLOCK_M)

    first_row = row * STRIDE - DILATION
    first_column = column * STRIDE - DILATION
    x_offset = image * x_image + x_slot + first_row.to(tl.int64) * x_row + first_column.to(tl.int64) * x_pixel
    x_base = x + x_offset * X_VEC + group * CHANNELS
    first_pixel = (image * height + first_row) * width + first_column
    previous_base = previous + first_pixel * (GROUPS * CHANNELS) + group * CHANNELS
    weight_base = weights + group.to(tl.int64) * (9 * CHANNELS * WEIGHT_LANES)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.range(0, 9 * k_blocks):
        tap = k // k_blocks
        down = tap // 3 * DILATION
        right = tap % 3 * DILATION
        lanes = k % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        lane_ok = lanes < CHANNELS
        inside = exists & (first_row + down >= 0) & (first_row + down < height)
        inside = inside & (first_column + right >= 0) & (first_column + right < width)
        loaded = inside[:, None] & lane_ok[None, :]
        shift = (down.to(tl.int64) * x_row + right.to(tl.int64) * x_pixel) * X_VEC
        u = tl.load((x_base + shift)[:, None] + lanes[None, :], mask=loaded, other=0.0)  # (BLOCK_M, BLOCK_K)
        if ADDS:
            step = (down * width + right).to(tl.int64) * (GROUPS * CHANNELS)
            z_read = tl.load((previous_base + step)[:, None] + lanes[None, :], mask=loaded, other=0.0)
            lane_mean = tl.load(mean + group * CHANNELS + lanes, mask=lane_ok, other=0.0)
            lane_scale = tl.load(scale + group * CHANNELS + lanes, mask=lane_ok, other=0.0)
            lane_beta = tl.load(beta + group * CHANNELS + lanes, mask=lane_ok, other=0.0)
            y = _normalise(z_read, lane_mean, lane_scale, lane_beta, ACTIVATION).to(x.dtype.element_ty)
            summed = (u.to(tl.float32) + y.to(tl.float32)).to(x.dtype.element_ty)
            u = tl.where(loaded, summed, 0.0)  # the padding around the image is of u, not of z
        weight = tl.load(
            weight_base + tap * (CHANNELS * WEIGHT_LANES) + columns[None, :] * WEIGHT_LANES + lanes[:, None],
            mask=(columns < CHANNELS)[None, :] & (lanes < WEIGHT_LANES)[:, None],
            other=0.0,
        )  # (BLOCK_K, BLOCK_N)
        total = tl.dot(u, weight, total, input_precision=PRECISION)

    column_ok = columns < CHANNELS
    written = exists[:, None] & column_ok[None, :]
    channel = group * CHANNELS + columns
    dense = number.to(tl.int64)[:, None] * (GROUPS * CHANNELS) + channel[None, :]
    rounded = total.to(z.dtype.element_ty)
    tl.store(z + dense, rounded, mask=written)
    value = tl.where(written, rounded.to(tl.float32), 0.0)  # statistics are of what is kept
    count = tl.minimum(pixels - tile * BLOCK_M, BLOCK_M).to(tl.float32)
    tile_mean = tl.sum(value, 0) / count
    deviation = tl.where(written, value - tile_mean[None, :], 0.0)
    moments = tile.to(tl.int64) * (GROUPS * CHANNELS) + channel
    tl.store(tile_means + moments, tile_mean, mask=column_ok)
    tl.store(tile_squares + moments, tl.sum(deviation * deviation, 0), mask=column_ok)
    if ADDS:
        own_mean = tl.load(mean + channel, mask=column_ok, other=0.0)
        own_scale = tl.load(scale + channel, mask=column_ok, other=0.0)
        own_beta = tl.load(beta + channel, mask=column_ok, other=0.0)
        own = tl.load(previous + dense, mask=written, other=0.0)
        y = _normalise(own, own_mean, own_scale, own_beta, ACTIVATION).to(out.dtype.element_ty)
        out_pixels = image * out_image + row.to(tl.int64) * out_row + column.to(tl.int64) * out_pixel
        out_base = out + (out_pixels + out_slot) * OUT_VEC + group * CHANNELS
        tl.store(out_base[:, None] + columns[None, :], y, mask=written)


@triton.jit(do_not_specialize=["pixels", "tile_pixels", "eps"])
def finish_statistics(
    tile_means, tile_squares, gamma, mean, invstd, variance, scale,
    pixels, tile_pixels, eps,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Moments of tiles (pixel tiles, WIDTH) into those of all pixels, each (WIDTH,) fp32. One program per BLOCK_N channels."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = columns < WIDTH
    tiles = (pixels + tile_pixels - 1) // tile_pixels
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for first in tl.range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        count = tl.maximum(tl.minimum(pixels - tile * tile_pixels, tile_pixels), 0).to(tl.float32)
        place = tile.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        ok = (tile < tiles)[:, None] & column_ok[None, :]
        total += count[:, None] * tl.load(tile_means + place, mask=ok, other=0.0)
    middle = tl.sum(total, 0) / pixels.to(tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    for first in tl.range(0, tiles, BLOCK_T):
        tile = first + tl.arange(0, BLOCK_T)
        count = tl.maximum(tl.minimum(pixels - tile * tile_pixels, tile_pixels), 0).to(tl.float32)
        place = tile.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        ok = (tile < tiles)[:, None] & column_ok[None, :]
        off = tl.load(tile_means + place, mask=ok, other=0.0) - middle[None, :]
        squares += tl.load(tile_squares + place, mask=ok, other=0.0) + tl.where(ok, count[:, None] * off * off, 0.0)
    summed = tl.sum(squares, 0)
    inverse = 1.0 / tl.sqrt(summed / pixels.to(tl.float32) + eps)
    weight = tl.load(gamma + columns, mask=column_ok, other=0.0)
    tl.store(mean + columns, middle, mask=column_ok)
    tl.store(invstd + columns, inverse, mask=column_ok)
    tl.store(variance + columns, summed / (pixels - 1).to(tl.float32), mask=column_ok)
    tl.store(scale + columns, weight * inverse, mask=column_ok)


@triton.jit(do_not_specialize=[*_INTEGERS, *_STRIDES[4:]])
def finish_output(
    z, mean, scale, beta, out, pixels, height, width, out_image, out_row, out_pixel, out_slot,
    WIDTH: tl.constexpr, OUT_VEC: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out's slot = act((z - mean) * scale + beta); height and width are the output's."""
    n_tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    program = tl.program_id(0)
    columns = program % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    number, exists, image, row, column = locate(program // n_tiles, pixels, height, width, 1, BLOCK_M)
    column_ok = columns < WIDTH
    written = exists[:, None] & column_ok[None, :]
    own = tl.load(z + number.to(tl.int64)[:, None] * WIDTH + columns[None, :], mask=written, other=0.0)
    own_mean = tl.load(mean + columns, mask=column_ok, other=0.0)
    own_scale = tl.load(scale + columns, mask=column_ok, other=0.0)
    own_beta = tl.load(beta + columns, mask=column_ok, other=0.0)
    y = _normalise(own, own_mean, own_scale, own_beta, ACTIVATION).to(out.dtype.element_ty)
    out_pixels = image * out_image + row.to(tl.int64) * out_row + column.to(tl.int64) * out_pixel
    out_base = out + (out_pixels + out_slot) * OUT_VEC
    tl.store(out_base[:, None] + columns[None, :], y, mask=written)


def training_tile(tile: Tile, dtype: torch.dtype) -> Tile:
    """The tile of the inference kernel, cut down to what leaves no spill beside the second operand and the moments."""
    if dtype == torch.float32:
        return replace(tile, block_m=32, block_n=min(tile.block_n, 32), block_k=16, warps=4, stages=2)
    block_n = min(tile.block_n, 64)
    block_m = min(tile.block_m, 64 if block_n <= 32 else 32)  # ptxas for sm_80 spills a register in tiles of 64x64
    return replace(tile, block_m=block_m, block_n=block_n, block_k=min(tile.block_k, 32), warps=4, stages=min(tile.stages, 3))


STATISTICS = ("mean", "invstd", "variance", "scale")
_FINISH_TILES = 32  # tiles of pixels whose moments one round of `finish_statistics` reads


def train_calls(
    problem: ChainProblem,
    plan: StepPlan,
    x: Slots,
    first_u: Tensor | None,  # (N, w, H, W), channels-last, where the first convolution reads a sum
    out: Slots,
    z: Sequence[Tensor],  # each (N, w, H', W'), channels-last
    statistics: Tensor,  # (4, steps, w) in fp32, written: see STATISTICS
    weights: Tensor,  # from `pack_weights`
    gammas: Sequence[Tensor],  # each (w,) in fp32, as betas
    betas: Sequence[Tensor],
    eps: Sequence[float],
) -> Iterator[KernelCall]:
    """Every launch of the forward pass but for the group that passes through, in order."""
    config, width, tile = problem.config, problem.width, training_tile(plan.tile, problem.dtype)
    channels = width // config.groups
    pixels = problem.batch * problem.output_height * problem.output_width
    tiles = triton.cdiv(pixels, tile.block_m)
    means, squares = torch.empty((2, tiles, width), dtype=torch.float32, device=x.data.device)
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    sizes = {"pixels": pixels, "height": problem.height, "width": problem.width_pixels}
    outer = {"pixels": pixels, "height": problem.output_height, "width": problem.output_width}
    common = {"OUT_VEC": out.vec, "ACTIVATION": config.activation}
    for k in range(problem.steps):
        slot = config.first_convolved + k
        adds = k > 0 and config.adds(slot)
        source = Slots(first_u, width, width) if k == 0 and first_u is not None else x
        last = max(0, k - 1)
        arguments = {
            # Where nothing is added, x stands in for a pointer that is never followed.
            "x": source.data, "previous": z[last] if adds else source.data, "mean": statistics[0, last],
            "scale": statistics[3, last], "beta": betas[last], "out": out.data, "weights": weights[k], "z": z[k],
            "tile_means": means, "tile_squares": squares, **sizes,
            **source.arguments("x"), "x_slot": 0 if source is not x else x.offset(slot),
            **out.arguments("out"), "out_slot": out.offset(slot - 1) if adds else 0,
            "GROUPS": config.groups, "CHANNELS": channels, "STRIDE": config.stride, "DILATION": config.dilation,
            "X_VEC": source.vec, "WEIGHT_LANES": weights.shape[-1], "ADDS": adds, **common,
            "PRECISION": plan.precision, "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
        }  # fmt: skip
        yield KernelCall(train_step, tiles * triton.cdiv(channels, tile.block_n) * config.groups, arguments, options)
        own = dict(zip(STATISTICS, statistics[:, k], strict=True))
        arguments = {
            "tile_means": means, "tile_squares": squares, "gamma": gammas[k], **own, "pixels": pixels,
            "tile_pixels": tile.block_m, "eps": float(eps[k]), "WIDTH": width, "BLOCK_T": _FINISH_TILES, "BLOCK_N": 32,
        }  # fmt: skip
        yield KernelCall(finish_statistics, triton.cdiv(width, 32), arguments, {"num_warps": 4})
        if k + 1 < problem.steps and config.adds(slot + 1):
            continue  # the next convolution writes y into its slot
        arguments = {
            "z": z[k], "mean": own["mean"], "scale": own["scale"], "beta": betas[k], "out": out.data, **outer,
            **out.arguments("out"), "out_slot": out.offset(slot), "WIDTH": width, **common, "BLOCK_M": 64, "BLOCK_N": 32,
        }  # fmt: skip
        yield KernelCall(finish_output, triton.cdiv(pixels, 64) * triton.cdiv(width, 32), arguments, {"num_warps": 4})
