"""The Triton kernel of BatchNorm's own backward, in place: from the gradient behind BatchNorm to that in front of it.

g  (scratch, padded)  -->  +---------------------------------------------------------+
z  (dense)                 | gamma * invstd * (g - sum g / n                         | --> dz, in g's place
sums over n = N*H*W  --->  |     - (z - mean) * invstd^2 * sum g (z - mean) / n)     |
                           +---------------------------------------------------------+
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import KernelCall
from .common import rounded_factor
from .conv3x3_bn_fwd import PASS_BLOCK_M, PASS_BLOCK_N, pass_programs


@triton.jit(do_not_specialize=["pixels"])
def bn_bwd(
    g, z, mean, invstd, gamma, sums, pixels,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """g: (pixels, GROUPS * PADDED). z: (pixels, w). sums: (2, w) in fp32, of g and of g * (z - mean)."""
    n_tiles: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    m_tiles = (pixels + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    columns = program % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    group = program // n_tiles // m_tiles
    number = (program // n_tiles % m_tiles * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    column_ok = columns < CHANNELS
    ok = (number < pixels)[:, None] & column_ok[None, :]
    channel = group * CHANNELS + columns
    own_mean = tl.load(mean + channel, mask=column_ok, other=0.0)
    own_invstd = tl.load(invstd + channel, mask=column_ok, other=0.0)
    scale = own_invstd * tl.load(gamma + channel, mask=column_ok, other=0.0)
    count = pixels.to(tl.float32)
    shift = tl.load(sums + channel, mask=column_ok, other=0.0) / count
    slope = own_invstd * own_invstd * tl.load(sums + GROUPS * CHANNELS + channel, mask=column_ok, other=0.0) / count
    place = g + (number * GROUPS + group)[:, None] * PADDED + columns[None, :]
    value = tl.load(place, mask=ok, other=0.0).to(tl.float32)
    own = tl.load(z + number[:, None] * (GROUPS * CHANNELS) + channel[None, :], mask=ok, other=0.0).to(tl.float32)
    dz = scale[None, :] * ((value - shift[None, :]) - (own - own_mean[None, :]) * slope[None, :])
    tl.store(place, rounded_factor(dz.to(g.dtype.element_ty), PRECISION), mask=ok)


def bn_bwd_call(
    g: Tensor,  # (pixels, groups*padded), overwritten
    z: Tensor,  # (N, w, H, W), channels-last
    mean: Tensor,  # (w,) in fp32, as invstd and gamma
    invstd: Tensor,
    gamma: Tensor,
    sums: Tensor,  # (2, w) in fp32
    groups: int,
    precision: str,
) -> KernelCall:
    pixels, channels = len(g), z.shape[1] // groups
    arguments = {
        "g": g, "z": z, "mean": mean, "invstd": invstd, "gamma": gamma, "sums": sums, "pixels": pixels, "GROUPS": groups,
        "CHANNELS": channels, "PADDED": g.shape[1] // groups, "PRECISION": precision,
        "BLOCK_M": PASS_BLOCK_M, "BLOCK_N": PASS_BLOCK_N,
    }  # fmt: skip
    return KernelCall(bn_bwd, pass_programs(pixels, channels, groups), arguments, {"num_warps": 4})
