"""The Triton kernel of one backward step: du_i of a convolution, and in its epilogue all that the step before it needs.

                   conv3x3_dgrad
      dz_i   -->  +----------------------------------------+
      (scratch)   | multiply_taps with K_i turned = du_i   | --> grad_x's slot i
                  +----------------------------------------+
      dout_{i-1}, |  dy_{i-1} = dout_{i-1} + du_i          |
      y_{i-1}     |  g_{i-1} = dy_{i-1} * act'(y_{i-1})    | --> scratch
      z_{i-1}     |  per channel, of this tile of pixels:  | --> tile_sums, which `reductions.add_rows` adds in a fixed order
                  |    sum g, sum g * (z - mean z)         |
      x_i         |  u_i = x_i + y_{i-1}                   | --> scratch, for the gradient of the weights
                  +----------------------------------------+

dz_{i-1} of BatchNorm with batch statistics needs these sums over the whole batch, so `bn_bwd` makes it of g_{i-1} in a
pass of its own, in place; with a folded BatchNorm g_{i-1} is dz_{i-1} already. `activation_bwd` is the same epilogue where no
convolution reads y: for the last group, and for every group of a block that adds nothing.
Scratch holds pixels of `PADDED` channels a convolution group, aligned, and exact zeros behind the group's own channels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ....chain.problem import ChainProblem
from ..launch import KernelCall
from ..step_plan import StepPlan
from .common import SIZES, GroupView, activation_arguments, locate, multiply_taps, rounded_factor, slot_pointers
from .conv3x3_bn_fwd import PASS_BLOCK_M, PASS_BLOCK_N, pass_programs

_AXES = ("image", "row", "pixel", "slot")
_INTEGERS = [*SIZES, *(f"{name}_{axis}" for name in ("grad_x", "grad", "out", "x") for axis in _AXES)]


@triton.jit
def _leave_gradient(
    dy, y, z, mean, target, tile_sums, number, exists, tile, group, columns,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dy and y (BLOCK_M, BLOCK_N), dy in fp32, into g and, with SUMS, its sums; as torch, NaN in y lets dy pass ReLU."""
    column_ok = columns < CHANNELS
    ok = exists[:, None] & column_ok[None, :]
    if ACTIVATION == "leaky_relu":
        dy = tl.where(y > 0.0, dy, dy * SLOPE)
    elif ACTIVATION != "none":
        dy = tl.where(y <= 0.0, 0.0, dy)
    if ACTIVATION == "hardtanh20":
        dy = tl.where(y >= 20.0, 0.0, dy)
    elif ACTIVATION == "relu6":
        dy = tl.where(y >= 6.0, 0.0, dy)
    # A padded channel is Inf * 0 = NaN where dz holds an Inf, so it is set rather than trusted to be zero.
    g = tl.where(ok, dy, 0.0).to(target.dtype.element_ty)
    target_base = target + (number.to(tl.int64) * GROUPS + group) * PADDED
    # Without NORM g is dz already, a factor of the next product; its sums are the gradient of the bias and lose no bits.
    kept = g if NORM else rounded_factor(g, PRECISION)
    tl.store(target_base[:, None] + columns[None, :], kept, mask=exists[:, None] & (columns < PADDED)[None, :])
    if SUMS:
        value = g.to(tl.float32)  # as it was rounded to its type
        channel = group * CHANNELS + columns
        row = tile_sums + tile.to(tl.int64) * ((1 + NORM) * GROUPS * CHANNELS) + channel
        tl.store(row, tl.sum(value, 0), mask=column_ok)
        if NORM:
            own = tl.load(z + number.to(tl.int64)[:, None] * (GROUPS * CHANNELS) + channel[None, :], mask=ok, other=0.0)
            centred = own.to(tl.float32) - tl.load(mean + channel, mask=column_ok, other=0.0)[None, :]
            tl.store(row + GROUPS * CHANNELS, tl.sum(tl.where(ok, value * centred, 0.0), 0), mask=column_ok)


@triton.jit(do_not_specialize=_INTEGERS)
def conv3x3_dgrad(
    dz, weights, grad_x, grad, out, x, u, z, mean, target, tile_sums,
    pixels, height, width,
    grad_x_image, grad_x_row, grad_x_pixel, grad_x_slot, grad_image, grad_row, grad_pixel, grad_slot,
    out_image, out_row, out_pixel, out_slot, x_image, x_row, x_pixel, x_slot,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, DILATION: tl.constexpr, PADDED: tl.constexpr, WEIGHT_PADDED: tl.constexpr,
    DZ_VEC: tl.constexpr, GRAD_X_VEC: tl.constexpr, GRAD_VEC: tl.constexpr, OUT_VEC: tl.constexpr, X_VEC: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, KEEPS: tl.constexpr, FEEDS: tl.constexpr, FORMS_U: tl.constexpr,
    NORM: tl.constexpr, SUMS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """KEEPS: du is written to grad_x. FEEDS: y_{i-1} is a convolution's. FORMS_U: u_i is written. NORM: of batch statistics.

    dz, target, u: (pixels, GROUPS * PADDED). The slot of grad and out is that of y_{i-1}, of x and grad_x that of x_i.
    """
    n_tiles: tl.constexpr = (CHANNELS + BLOCK_N - 1) // BLOCK_N
    m_tiles = (pixels + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    columns = program % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = program // n_tiles % m_tiles
    group = program // n_tiles // m_tiles
    number, exists, image, row, column = locate(tile, pixels, height, width, 1, BLOCK_M)
    dz_pixel: tl.constexpr = GROUPS * PADDED // DZ_VEC
    dz_base = dz + (image * height * width * dz_pixel) * DZ_VEC + group * PADDED
    weight_base = weights + group.to(tl.int64) * (9 * CHANNELS * WEIGHT_PADDED)
    total = multiply_taps(
        dz_base, weight_base, exists, row, column, columns, width.to(tl.int64) * dz_pixel, dz_pixel, height, width,
        CHANNELS, 1, DILATION, DZ_VEC, PADDED, WEIGHT_PADDED, False, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    ok = exists[:, None] & (columns < CHANNELS)[None, :]
    du = total.to(grad_x.dtype.element_ty)
    if KEEPS:
        grad_x_base = slot_pointers(
            grad_x, image, row, column, grad_x_image, grad_x_row, grad_x_pixel, grad_x_slot, group, CHANNELS, GRAD_X_VEC
        )
        tl.store(grad_x_base[:, None] + columns[None, :], du, mask=ok)
    if FEEDS or FORMS_U:
        out_base = slot_pointers(out, image, row, column, out_image, out_row, out_pixel, out_slot, group, CHANNELS, OUT_VEC)
        y = tl.load(out_base[:, None] + columns[None, :], mask=ok, other=0.0).to(tl.float32)
        if FORMS_U:
            x_base = slot_pointers(x, image, row, column, x_image, x_row, x_pixel, x_slot, group, CHANNELS, X_VEC)
            own = tl.load(x_base[:, None] + columns[None, :], mask=ok, other=0.0).to(tl.float32)
            u_base = u + (number.to(tl.int64) * GROUPS + group) * PADDED
            tl.store(u_base[:, None] + columns[None, :], (own + y).to(u.dtype.element_ty), mask=ok)
        if FEEDS:
            grad_base = slot_pointers(
                grad, image, row, column, grad_image, grad_row, grad_pixel, grad_slot, group, CHANNELS, GRAD_VEC
            )
            dout = tl.load(grad_base[:, None] + columns[None, :], mask=ok, other=0.0).to(tl.float32)
            _leave_gradient(
                dout + du.to(tl.float32), y, z, mean, target, tile_sums, number, exists, tile, group, columns,
                GROUPS, CHANNELS, PADDED, ACTIVATION, SLOPE, NORM, SUMS, PRECISION,
            )  # fmt: skip


@triton.jit(do_not_specialize=_INTEGERS)
def activation_bwd(
    grad, out, z, mean, target, tile_sums, pixels, height, width,
    grad_image, grad_row, grad_pixel, grad_slot, out_image, out_row, out_pixel, out_slot,
    GROUPS: tl.constexpr, CHANNELS: tl.constexpr, PADDED: tl.constexpr, GRAD_VEC: tl.constexpr, OUT_VEC: tl.constexpr,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, NORM: tl.constexpr, SUMS: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """g_i = dout_i * act'(y_i) into target, and its sums; height and width are the output's."""
    n_tiles: tl.constexpr = (PADDED + BLOCK_N - 1) // BLOCK_N
    m_tiles = (pixels + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    columns = program % n_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    tile = program // n_tiles % m_tiles
    group = program // n_tiles // m_tiles
    number, exists, image, row, column = locate(tile, pixels, height, width, 1, BLOCK_M)
    ok = exists[:, None] & (columns < CHANNELS)[None, :]
    out_base = slot_pointers(out, image, row, column, out_image, out_row, out_pixel, out_slot, group, CHANNELS, OUT_VEC)
    y = tl.load(out_base[:, None] + columns[None, :], mask=ok, other=0.0).to(tl.float32)
    grad_base = slot_pointers(grad, image, row, column, grad_image, grad_row, grad_pixel, grad_slot, group, CHANNELS, GRAD_VEC)
    dout = tl.load(grad_base[:, None] + columns[None, :], mask=ok, other=0.0).to(tl.float32)
    _leave_gradient(
        dout, y, z, mean, target, tile_sums, number, exists, tile, group, columns,
        GROUPS, CHANNELS, PADDED, ACTIVATION, SLOPE, NORM, SUMS, PRECISION,
    )  # fmt: skip


def conv3x3_dgrad_call(
    problem: ChainProblem,
    plan: StepPlan,
    group: int,  # i
    dz: Tensor,  # (N*H*W, groups*padded), as target and u
    weight: Tensor,  # one step of `pack_weights`, of turned weights, rounded for the plan's precision
    slots: dict[str, GroupView],  # grad_x, grad, out, x
    epilogue: dict[str, Tensor],  # z, mean, target, tile_sums, u: those that are used
    keeps: bool,
    feeds: bool,
    norm: bool,
    sums: bool,
) -> KernelCall:
    """The launch for group i; u_i is formed where `epilogue` has room for it."""
    config, tile = problem.config, plan.tile
    channels, pixels = problem.width // config.groups, problem.batch * problem.height * problem.width_pixels
    aligned = 16 // dz.element_size()
    padded = dz.shape[1] // config.groups
    pointers = {name: epilogue.get(name, dz) for name in ("u", "z", "mean", "target", "tile_sums")}  # dz: never followed
    arguments = {
        "dz": dz, "weights": weight, **pointers, "pixels": pixels, "height": problem.height, "width": problem.width_pixels,
        **_slot_arguments(slots, {"grad_x": group, "grad": group - 1, "out": group - 1, "x": group}),
        "GROUPS": config.groups, "CHANNELS": channels, "DILATION": config.dilation, "PADDED": padded,
        "WEIGHT_PADDED": weight.shape[-1], "DZ_VEC": aligned if padded % aligned == 0 else 1,
        **activation_arguments(config.activation), "KEEPS": keeps, "FEEDS": feeds, "FORMS_U": "u" in epilogue,
        "NORM": norm, "SUMS": sums, "PRECISION": plan.precision,
        "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
    }  # fmt: skip
    programs = triton.cdiv(pixels, tile.block_m) * triton.cdiv(channels, tile.block_n) * config.groups
    options = {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}
    return KernelCall(conv3x3_dgrad, programs, arguments, options)


def activation_bwd_call(
    problem: ChainProblem,
    plan: StepPlan,
    group: int,
    slots: dict[str, GroupView],  # grad, out
    epilogue: dict[str, Tensor],  # z, mean, target, tile_sums: those that are used
    norm: bool,
    sums: bool,
) -> KernelCall:
    """The launch that begins at group i."""
    config, target = problem.config, epilogue["target"]
    padded, pixels = target.shape[1] // config.groups, len(target)
    arguments = {
        **{name: epilogue.get(name, target) for name in ("z", "mean", "target", "tile_sums")},  # else never followed
        "pixels": pixels, "height": problem.output_height, "width": problem.output_width,
        **_slot_arguments({name: slots[name] for name in ("grad", "out")}, {"grad": group, "out": group}),
        "GROUPS": config.groups, "CHANNELS": problem.width // config.groups, "PADDED": padded,
        **activation_arguments(config.activation), "NORM": norm, "SUMS": sums, "PRECISION": plan.precision,
        "BLOCK_M": PASS_BLOCK_M, "BLOCK_N": PASS_BLOCK_N,
    }  # fmt: skip
    return KernelCall(activation_bwd, pass_programs(pixels, padded, config.groups), arguments, {"num_warps": 4})


def _slot_arguments(slots: dict[str, GroupView], groups: dict[str, int]) -> dict[str, object]:
    arguments: dict[str, object] = {}
    for name, own in slots.items():
        arguments |= {name: own.data, **own.arguments(name), f"{name}_slot": own.offset(max(0, groups[name]))}
        arguments[f"{name.upper()}_VEC"] = own.vec
    return arguments
