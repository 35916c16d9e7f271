"""What the tiles of pixels leave per channel, combined in a fixed order: statistics in forward, sums in backward.

    tiles of pixels, one row of `width` channels each         128 rows a program            the last one
      +--------------------+
      | mean, squares of   |  ---- combine_moments ---->  +---------------+
      | tile 0 ... 127     |                              | one row each  |  -- finish_statistics -->  mean, invstd, ...
      | tile 128 ... 255   |  ---- combine_moments ---->  |               |
      | ...                |                              +---------------+
      +--------------------+         (as often as it takes to have at most 128 rows; none where that holds at once)

Nothing is added atomically, so that repeated runs give the same bits. A tile's squares are of deviations from its own mean, and
means are merged as parallel variances are, so that no digits cancel whatever the mean is.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import KernelCall

ROWS = 128  # that one program combines
_COLUMNS = 32
_OPTIONS = {"num_warps": 8}  # with four, ptxas for sm_80 spills
STATISTICS = ("mean", "invstd", "variance", "scale")


@triton.jit
def _merge(
    tile_means, tile_squares, first, columns, pixels, tile_pixels, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr
):  # fmt: skip
    """Count, mean (BLOCK_N,) and sum of squared deviations of the tiles first ... first + BLOCK_T - 1."""
    tile = first + tl.arange(0, BLOCK_T)
    start = tile.to(tl.int64) * tile_pixels  # beyond the last tile this may pass 2^31
    count = tl.maximum(tl.minimum(pixels - start, tile_pixels), 0).to(tl.float32)
    place = tile.to(tl.int64)[:, None] * WIDTH + columns[None, :]
    ok = (count > 0)[:, None] & (columns < WIDTH)[None, :]
    means = tl.load(tile_means + place, mask=ok, other=0.0)  # (BLOCK_T, BLOCK_N)
    total = tl.sum(count, 0)
    mean = tl.sum(count[:, None] * means, 0) / total
    off = means - mean[None, :]
    squares = tl.load(tile_squares + place, mask=ok, other=0.0) + tl.where(ok, count[:, None] * off * off, 0.0)
    return mean, tl.sum(squares, 0)


@triton.jit(do_not_specialize=["pixels", "tile_pixels"])
def combine_moments(
    tile_means, tile_squares, means, squares, pixels, tile_pixels,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_T tiles of tile_pixels (the last tile may have fewer) into one, for BLOCK_N channels."""
    n_tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    columns = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(0) // n_tiles
    mean, square = _merge(tile_means, tile_squares, row * BLOCK_T, columns, pixels, tile_pixels, WIDTH, BLOCK_T)
    place = row.to(tl.int64) * WIDTH + columns
    tl.store(means + place, mean, mask=columns < WIDTH)
    tl.store(squares + place, square, mask=columns < WIDTH)


@triton.jit(do_not_specialize=["pixels", "tile_pixels", "eps"])
def finish_statistics(
    tile_means, tile_squares, gamma, mean, invstd, variance, scale,
    pixels, tile_pixels, eps,
    WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Moments of at most BLOCK_T tiles into those of all pixels, each (WIDTH,) fp32; scale is gamma * invstd."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    column_ok = columns < WIDTH
    middle, squares = _merge(tile_means, tile_squares, 0, columns, pixels, tile_pixels, WIDTH, BLOCK_T)
    inverse = 1.0 / tl.sqrt(squares / pixels.to(tl.float32) + eps)
    weight = tl.load(gamma + columns, mask=column_ok, other=0.0)
    tl.store(mean + columns, middle, mask=column_ok)
    tl.store(invstd + columns, inverse, mask=column_ok)
    tl.store(variance + columns, squares / (pixels - 1).to(tl.float32), mask=column_ok)
    tl.store(scale + columns, weight * inverse, mask=column_ok)


@triton.jit(do_not_specialize=["rows"])
def add_rows(source, target, rows, WIDTH: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr):
    """Every BLOCK_T rows of source (rows, WIDTH) into one row of target."""
    n_tiles: tl.constexpr = (WIDTH + BLOCK_N - 1) // BLOCK_N
    columns = tl.program_id(0) % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.program_id(0) // n_tiles
    read = row * BLOCK_T + tl.arange(0, BLOCK_T)
    ok = (read < rows)[:, None] & (columns < WIDTH)[None, :]
    values = tl.load(source + read.to(tl.int64)[:, None] * WIDTH + columns[None, :], mask=ok, other=0.0)
    tl.store(target + row.to(tl.int64) * WIDTH + columns, tl.sum(values, 0), mask=columns < WIDTH)


def statistics_calls(
    moments: Tensor,  # (2, tiles, w) in fp32: means and squares
    gamma: Tensor,  # (w,) in fp32
    statistics: Tensor,  # (4, w) in fp32, written: see STATISTICS
    pixels: int,
    tile_pixels: int,
    eps: float,
) -> Iterator[KernelCall]:
    width = moments.shape[2]
    blocks = {"WIDTH": width, "BLOCK_T": ROWS, "BLOCK_N": _COLUMNS}
    columns = triton.cdiv(width, _COLUMNS)
    while (tiles := moments.shape[1]) > ROWS:
        combined = moments.new_empty(2, triton.cdiv(tiles, ROWS), width)
        arguments = {
            "tile_means": moments[0], "tile_squares": moments[1], "means": combined[0], "squares": combined[1],
            "pixels": pixels, "tile_pixels": tile_pixels, **blocks,
        }  # fmt: skip
        yield KernelCall(combine_moments, columns * combined.shape[1], arguments, _OPTIONS)
        moments, tile_pixels = combined, tile_pixels * ROWS
    arguments = {
        "tile_means": moments[0], "tile_squares": moments[1], "gamma": gamma,
        **dict(zip(STATISTICS, statistics, strict=True)), "pixels": pixels, "tile_pixels": tile_pixels, "eps": float(eps),
        **blocks,
    }  # fmt: skip
    yield KernelCall(finish_statistics, columns, arguments, _OPTIONS)


def sum_calls(sums: Tensor, result: Tensor) -> Iterator[KernelCall]:
    """The sum over tiles of `sums` (tiles, channels), in fp32, into `result` (channels,)."""
    channels = sums.shape[1]
    columns = triton.cdiv(channels, _COLUMNS)
    done = False
    while not done:
        rows = triton.cdiv(len(sums), ROWS)
        done = rows == 1
        target = result if done else torch.empty((rows, channels), dtype=torch.float32, device=sums.device)
        arguments = {
            "source": sums, "target": target, "rows": len(sums), "WIDTH": channels, "BLOCK_T": ROWS, "BLOCK_N": _COLUMNS,
        }  # fmt: skip
        yield KernelCall(add_rows, columns * rows, arguments, _OPTIONS)
        sums = target
