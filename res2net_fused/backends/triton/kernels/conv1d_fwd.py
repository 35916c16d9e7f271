"""The Triton kernel of the chain along rows: one launch per convolution, rows innermost as x and out have them.

A program computes a tile of one convolution's output as a matrix product, channels by positions:

    out (block_c, block_l) = weights of a tap (block_c, block_k) . u (block_k, block_l), shifted by the tap; summed over taps

and its epilogue adds the bias, applies the activation and then the affine map, writes y_i into the slot of out and
u_{i+1} = y_i + x_{i+1}, where the next convolution reads it, into scratch. Neighbouring tiles read each other's ends of u, so
scratch has two turns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....chain.activations import shows_slope
from ....chain.problem import Chain1dProblem
from ..launch import KernelCall
from ..step_plan import padded_channels
from .common import activate, activation_arguments, rounded_factor

_INTEGERS = [
    "length", "source_image", "source_channel", "source_slot", "x_image", "x_channel", "x_slot", "out_image", "out_channel",
    "out_slot",
]  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def conv1d_fwd(
    source, x, out, scratch, kept, weights, bias, scale, shift,
    length, source_image, source_channel, source_slot, x_image, x_channel, x_slot, out_image, out_channel, out_slot,
    WIDTH: tl.constexpr, WEIGHT_PADDED: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, REFLECTS: tl.constexpr,
    AFFINE: tl.constexpr, FORMS_NEXT: tl.constexpr, KEEPS: tl.constexpr, KEEPS_INPUT: tl.constexpr, ROUNDS: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """scratch and kept: (N, w, L) without a gap; weights: (taps, w, padded) of this convolution; bias, scale, shift: (w,)
    in fp32; *_slot: where the group begins in its image, in elements. ROUNDS: as of `multiply_taps`. KEEPS: whether
    what the activation gives is kept, KEEPS_INPUT: whether its input is.
    """
    k_blocks: tl.constexpr = (WIDTH + BLOCK_K - 1) // BLOCK_K
    c_tiles: tl.constexpr = (WIDTH + BLOCK_C - 1) // BLOCK_C
    l_tiles = (length + BLOCK_L - 1) // BLOCK_L
    program = tl.program_id(0)
    columns = program % c_tiles * BLOCK_C + tl.arange(0, BLOCK_C)
    positions = program // c_tiles % l_tiles * BLOCK_L + tl.arange(0, BLOCK_L)
    image = (program // c_tiles // l_tiles).to(tl.int64)
    column_ok = columns < WIDTH
    exists = positions < length
    source_base = source + image * source_image + source_slot

    total = tl.zeros((BLOCK_C, BLOCK_L), tl.float32)
    for k in tl.range(0, TAPS * k_blocks):
        tap = k // k_blocks
        channels = k % k_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        at = positions + (tap - TAPS // 2) * DILATION
        inside = exists
        if REFLECTS:
            at = tl.where(at < 0, -at, at)
            at = tl.where(at >= length, 2 * (length - 1) - at, at)
        else:
            inside = exists & (at >= 0) & (at < length)
        u = tl.load(
            source_base + channels[:, None].to(tl.int64) * source_channel + at[None, :],
            mask=(channels < WIDTH)[:, None] & inside[None, :],
            other=0.0,
        )  # (BLOCK_K, BLOCK_L)
        weight = tl.load(
            weights + (tap * WIDTH + columns)[:, None] * WEIGHT_PADDED + channels[None, :],
            mask=column_ok[:, None] & (channels < WEIGHT_PADDED)[None, :],
            other=0.0,
        )  # (BLOCK_C, BLOCK_K)
        if ROUNDS:
            u = rounded_factor(u, PRECISION)
        total = tl.dot(weight, u, total, input_precision=PRECISION)

    written = column_ok[:, None] & exists[None, :]
    dense = (image * WIDTH + columns[:, None]) * length + positions[None, :]
    total += tl.load(bias + columns, mask=column_ok, other=0.0)[:, None]
    if KEEPS_INPUT:
        tl.store(kept + dense, total.to(kept.dtype.element_ty), mask=written)
    r = activate(total, ACTIVATION, SLOPE)
    if KEEPS:
        tl.store(kept + dense, r.to(kept.dtype.element_ty), mask=written)
    if AFFINE:
        own_scale = tl.load(scale + columns, mask=column_ok, other=0.0)
        own_shift = tl.load(shift + columns, mask=column_ok, other=0.0)
        r = r * own_scale[:, None] + own_shift[:, None]
    y = r.to(out.dtype.element_ty)
    lines = columns[:, None].to(tl.int64)
    tl.store(out + image * out_image + out_slot + lines * out_channel + positions[None, :], y, mask=written)
    if FORMS_NEXT:
        x_pointers = x + image * x_image + x_slot + lines * x_channel + positions[None, :]
        following = tl.load(x_pointers, mask=written, other=0.0)
        summed = (following.to(tl.float32) + y.to(tl.float32)).to(scratch.dtype.element_ty)
        tl.store(scratch + dense, rounded_factor(summed, PRECISION), mask=written)


def pack_weights_1d(weights: Sequence[Tensor]) -> Tensor:
    """(steps, taps, w, padded): input channels innermost, padded with exact zeros."""
    stacked = torch.stack([weight.detach() for weight in weights]).permute(0, 3, 1, 2)  # (steps, k, w, w)
    width = stacked.shape[-1]
    return torch.nn.functional.pad(stacked, (0, padded_channels(width) - width)).contiguous()


def tile_1d(problem: Chain1dProblem) -> dict[str, int]:
    """Small enough to leave no spill; none of it was timed on a GPU."""
    channels = max(16, triton.next_power_of_2(problem.width))
    if problem.dtype == torch.float32:
        return {"BLOCK_C": min(32, channels), "BLOCK_L": 32, "BLOCK_K": 16}
    return {"BLOCK_C": min(64, channels), "BLOCK_L": 64, "BLOCK_K": min(32, channels)}


def chain_calls_1d(
    problem: Chain1dProblem,
    x: Tensor,  # (N, s*w, L), rows without gaps
    out: Tensor,  # as x
    weights: Tensor,  # from `pack_weights_1d`, rounded for this precision
    bias: Tensor,  # (steps, w) in fp32, as the affine map
    affine: tuple[Tensor, Tensor] | None,
    kept: Sequence[Tensor],  # what is kept of each convolution (N, w, L), where that is asked for; else empty
    precision: str,
) -> Iterator[KernelCall]:
    """Every launch of the chain but for the group that passes through, in order."""
    width, convolutions = problem.width, problem.config.chain.convolutions(problem.steps)
    tile, shows = tile_1d(problem), shows_slope(problem.config.activation)
    programs = problem.batch * triton.cdiv(problem.length, tile["BLOCK_L"]) * triton.cdiv(width, tile["BLOCK_C"])
    shape = problem.batch, width, problem.length
    sums = sum(step.adds for step in convolutions)
    scratch = [torch.empty(shape, dtype=x.dtype, device=x.device) for _ in range(min(2, sums))]
    first = None
    if problem.config.chain.adds_passed:  # the group that passes is added to the first one convolved
        first = scratch[-1].copy_(x[:, :width]).add_(x[:, width : 2 * width])
    for k, group, _, chained, forms_next in convolutions:
        source = scratch[(k - 1) % 2] if chained else first
        arguments = {
            "source": x if source is None else source, "x": x, "out": out,
            # Where nothing is kept, formed or mapped, another tensor stands in for a pointer that is never followed.
            "scratch": scratch[k % 2] if forms_next else out, "kept": kept[k] if kept else out,
            "weights": weights[k], "bias": bias[k],
            "scale": bias[k] if affine is None else affine[0][k], "shift": bias[k] if affine is None else affine[1][k],
            "length": problem.length,
            "source_image": (x if source is None else source).stride(0),
            "source_channel": (x if source is None else source).stride(1),
            "source_slot": group * width * x.stride(1) if source is None else 0,
            "x_image": x.stride(0), "x_channel": x.stride(1), "x_slot": (group + 1) * width * x.stride(1),
            "out_image": out.stride(0), "out_channel": out.stride(1), "out_slot": group * width * out.stride(1),
            "WIDTH": width, "WEIGHT_PADDED": weights.shape[-1], "TAPS": problem.kernel_size,
            "DILATION": problem.config.dilation, "REFLECTS": problem.config.padding_mode == "reflect",
            "AFFINE": affine is not None, "FORMS_NEXT": forms_next, "KEEPS": bool(kept) and shows,
            "KEEPS_INPUT": bool(kept) and not shows, **activation_arguments(problem.config.activation),
            "ROUNDS": precision == "tf32" and (source is None or source is first), "PRECISION": precision, **tile,
        }  # fmt: skip
        yield KernelCall(conv1d_fwd, programs, arguments, {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True})
