"""The chain's backward as launches, from the last group to the first; with batch statistics, or with BatchNorm folded.

A group's turn, where h is g, or dz once BatchNorm's own backward has been through it:

    activation_bwd           g_i and its sums, unless conv3x3_dgrad of group i+1 has left them
    add_rows                 the sums of all tiles
    bn_bwd                   dz_i in place of g_i                              (batch statistics only)
    conv3x3_dgrad            du_i = dx_i;  g_{i-1} and its sums;  u_i
    convolution_backward     the gradient of the weights, of u_i and dz_i; at a stride also du_i
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...chain.backward import pass_back
from ...chain.problem import ChainProblem
from ...chain.sync_batch_norm import combine_sums
from .kernels.bn_bwd import bn_bwd_call
from .kernels.common import GroupView, pack_weights, turned
from .kernels.conv3x3_bn_fwd import PASS_BLOCK_M
from .kernels.conv3x3_dgrad import activation_bwd_call, conv3x3_dgrad_call
from .kernels.reductions import sum_calls
from .launch import KernelCall
from .step_plan import StepPlan
from .tf32 import for_precision


@dataclass
class BatchNorms:
    """What forward left of each convolution's BatchNorm; mean, invstd (steps, w) in fp32, each gamma (w,) in fp32.

    convolve(k, u): z_k again, of u_k (N, w, H, W). z: every z_k (N, w, H', W'), channels-last, or empty.
    group: of processes that the statistics are of; "" for this one alone.
    """

    z: Sequence[Tensor]
    mean: Tensor
    invstd: Tensor
    gammas: Sequence[Tensor]
    convolve: Callable[[int, Tensor], Tensor]
    group: str = ""


class ChainGradients:
    """One backward pass: the launches are run as `calls` yields them, then x, weights and sums hold the gradients.

    x: (N, s*w, H, W), channels-last, or None. weights: each (w, w/groups, 3, 3). sums: (steps, 1 or 2, w) in fp32, of g and,
    with batch statistics, of g * (z - mean z).
    """

    def __init__(
        self,
        problem: ChainProblem,
        plan: StepPlan,
        grad: Tensor,  # (N, s*w, H', W'), as out with channels side by side
        x: Tensor,  # (N, s*w, H, W), likewise
        out: Tensor,
        weights: Sequence[Tensor],
        norms: BatchNorms | None,
        needed: tuple[bool, bool, bool],  # of x, of the weights, of the sums
    ) -> None:
        self.problem, self.plan, self.norms, self.kernels = problem, plan, norms, weights
        self.need_x, self.need_weights, need_sums = needed
        self.need_sums = need_sums or norms is not None
        config, width, steps = problem.config, problem.width, problem.steps
        channels = width // config.groups
        # A strided convolution's gradients are ATen's, which takes dz as it is; else scratch is padded, for loads of 16 bytes.
        self.padded_channels = channels if config.stride > 1 else plan.padded_channels
        self.groups, self.outputs, self.grads = (t.split(width, 1) for t in (x, out, grad))
        self.x = torch.empty_like(x, memory_format=torch.channels_last) if self.need_x else None
        grad_x = out if self.x is None else self.x  # never written where it is not wanted
        tensors = {"grad_x": grad_x, "grad": grad, "out": out, "x": x}
        self.slots = {name: GroupView(tensor, width, width) for name, tensor in tensors.items()}
        self.weights: list[Tensor | None] = [None] * steps
        self.sums = torch.empty((steps, 1 + (norms is not None), width), dtype=torch.float32, device=x.device)

    def calls(self) -> Iterator[KernelCall]:
        """Every launch in order; PyTorch's operators run in between, on what the launches so far have left."""
        problem, config, norms = self.problem, self.problem.config, self.norms
        packed: Any = None
        if config.stride == 1:
            packed = pack_weights(turned(self.kernels, config.groups), config.groups, self.plan.padded_channels)
            packed = for_precision(packed, self.plan.precision)
        behind: dict[str, Tensor] | None = None  # what conv3x3_dgrad of group i+1 has left of group i
        for k, i, added, feeds, _ in reversed(config.convolutions(problem.steps)):
            if behind is None:
                behind = self._room(k, PASS_BLOCK_M)
                yield activation_bwd_call(problem, self.plan, i, self.slots, behind, norms is not None, self.need_sums)
            if self.need_sums:
                yield from sum_calls(behind["tile_sums"], self.sums[k].view(-1))
            need_du = self.need_x or feeds
            dz = behind["target"]
            if norms is not None and (need_du or self.need_weights):
                sums = self.sums[k]
                if norms.group:
                    sums = combine_sums(sums, len(dz), norms.group) * len(dz)  # the kernel divides by the pixels that it has
                yield bn_bwd_call(
                    dz, behind["z"], norms.mean[k], norms.invstd[k], norms.gammas[k], sums, config.groups, self.plan.precision
                )
            u, behind = behind.get("own_u"), None
            if need_du and config.stride == 1:
                epilogue = self._room(k - 1, self.plan.tile.block_m) if feeds else {}
                behind = epilogue if feeds else None
                own = {}
                if self.need_weights and added and u is None:
                    u = own["u"] = torch.empty_like(dz)
                yield conv3x3_dgrad_call(
                    problem, self.plan, i, dz, packed[k], self.slots, epilogue | own,
                    self.need_x, feeds, norms is not None, self.need_sums,
                )  # fmt: skip
            if self.need_weights or (need_du and config.stride > 1):
                self._weight_gradient(i, k, dz, self._form_u(k) if u is None else u)
        if self.x is not None:
            pass_back(config, self.x.split(problem.width, 1), self.grads, self.groups)

    def _room(self, k: int, block_m: int) -> dict[str, Tensor]:
        """What an epilogue reads and writes for convolution k; convolved again, also u_k."""
        problem, norms = self.problem, self.norms
        pixels = problem.batch * problem.output_height * problem.output_width
        device = self.grads[0].device
        channels = problem.config.groups * self.padded_channels
        room = {"target": torch.empty((pixels, channels), dtype=problem.dtype, device=device)}
        if self.need_sums:
            shape = -(-pixels // block_m), self.sums[k].numel()
            room["tile_sums"] = torch.empty(shape, dtype=torch.float32, device=device)
        if norms is not None:
            room["mean"] = norms.mean[k]
            if norms.z:
                room["z"] = norms.z[k]
            else:
                room["own_u"] = self._form_u(k)
                u = _image(room["own_u"], problem.batch, problem.height, problem.width_pixels)
                room["z"] = norms.convolve(k, _real_channels(u, problem.config.groups, problem.width))
        return room

    def _form_u(self, k: int) -> Tensor:
        """u of convolution k in scratch's layout, (N*H*W, groups*padded_channels); its padding is never looked at."""
        problem, groups = self.problem, self.problem.config.groups
        channels = problem.width // groups
        _, i, adds, *_ = problem.config.convolutions(problem.steps)[k]
        x = self.groups[i].permute(0, 2, 3, 1).unflatten(3, (groups, channels))  # (N, H, W, groups, w/groups)
        u = x.new_empty((*x.shape[:4], self.padded_channels))
        if adds:
            y = self.outputs[i - 1].permute(0, 2, 3, 1).unflatten(3, (groups, channels))
            torch.add(x, y, out=u[..., :channels])
        else:
            u[..., :channels] = x
        return u.view(-1, groups * self.padded_channels)

    def _weight_gradient(self, i: int, k: int, dz: Tensor, u: Tensor) -> None:
        """The one place that chooses who computes the gradients of weights: cuDNN, by ATen. A Triton kernel for it, with a
        reduction over all pixels of two operands that are read nine times, was not written; neither has been measured.

        Padded channels, multiples of 8, are what cuDNN's tensor-core kernels take; those of the gradient are cut off.
        """
        problem, config, weight = self.problem, self.problem.config, self.kernels[k]
        strided = config.stride > 1
        dz = _image(dz, problem.batch, problem.output_height, problem.output_width)
        u = _image(u, problem.batch, problem.height, problem.width_pixels)
        if weight.shape[1] != self.padded_channels:
            weight = weight.new_empty((dz.shape[1], self.padded_channels, 3, 3))  # only its shape is looked at
        du, gradient, _ = torch.ops.aten.convolution_backward(
            dz, u, weight, None, [config.stride] * 2, [config.dilation] * 2, [config.dilation] * 2, False, [0, 0],
            config.groups, [strided and self.need_x, self.need_weights, False],
        )  # fmt: skip
        if strided and self.x is not None:
            self.x.split(problem.width, 1)[i].copy_(du)
        if self.need_weights:
            channels = problem.width // config.groups
            grouped = gradient.unflatten(0, (config.groups, self.padded_channels))[:, :channels, :channels]
            self.weights[k] = grouped.flatten(0, 1)


def _image(scratch: Tensor, batch: int, height: int, width: int) -> Tensor:
    """Scratch (N*H*W, C) as (N, C, H, W), channels-last."""
    return scratch.view(batch, height, width, -1).permute(0, 3, 1, 2)


def _real_channels(image: Tensor, groups: int, width: int) -> Tensor:
    """Cut the padding off (N, groups*padded, H, W): (N, w, H, W), channels-last."""
    real = image.unflatten(1, (groups, -1))[:, :, : width // groups].flatten(1, 2)
    return real.contiguous(memory_format=torch.channels_last)
