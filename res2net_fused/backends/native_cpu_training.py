"""The chain with BatchNorm in training mode on the CPU, fp32: every pass over memory between two convolutions is one kernel.

Per step forward reads z for its statistics, then z and x_{i+1}, and writes y_i to its slot and u_{i+1}. Backward reads dout_i,
du_{i+1}, y_i and z_i and writes the masked gradient (and du_{i+1} to its slot), then turns that into dz_i in place.
All of it is channels-last. The sums are the same for any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backward import convolution_backward, feeds_a_convolution, pool_backward
from ..chain import ACTIVATIONS, ChainConfig, ChainProblem
from ..reference import pool_passthrough
from ..training import Statistics, convolve
from .selection import Backend

_operators = torch.ops.res2net_fused_native


class CpuBackend(Backend, Protocol):
    """The backend that these kernels belong to."""

    def instruction_set(self) -> int:
        """The code of the one to use."""


def covers(problem: ChainProblem) -> bool:
    """Whether these kernels run a call; another memory format is better off with ATen's than converted here and back."""
    return problem.dtype == torch.float32 and problem.channels_last


def train_forward(
    backend: CpuBackend,
    problem: ChainProblem,
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    keep: bool,
) -> tuple[Tensor, Statistics, list[Tensor]] | None:
    """As `training.train_forward`; None for what these kernels do not have, or would have to convert."""
    if not covers(problem):
        return None
    isa = backend.instruction_set()
    config = problem.config
    x = _channels_last(x)
    out = torch.empty(
        (problem.batch, x.shape[1], problem.output_height, problem.output_width), memory_format=torch.channels_last
    )
    groups, outputs = x.split(problem.width, 1), out.split(problem.width, 1)
    statistics, kept, following = [], [], None
    for i, (group, slot) in enumerate(zip(groups, outputs, strict=True)):
        if i == config.passed_group(problem.scale):
            slot.copy_(pool_passthrough(group, config))
            continue
        k = i - config.first_convolved
        if following is None:
            following = _operators.cpu_sum.default(group, outputs[i - 1], isa) if config.adds(i) else group
        z = _channels_last(convolve(backend, following, weights[k], config))
        statistics.append(_operators.cpu_norm_statistics.default(z, eps[k], isa))
        mean, invstd, _ = statistics[-1]
        adds = k + 1 < problem.steps and config.adds(i + 1)
        following = torch.empty_like(z) if adds else None
        _operators.cpu_norm_forward.default(
            z, mean, gammas[k].float() * invstd, betas[k].float().contiguous(), _activation(config), slot,
            groups[i + 1] if adds else None, following, isa,
        )  # fmt: skip
        if keep:
            kept.append(z)
    return out, Statistics(*(torch.stack(values) for values in zip(*statistics, strict=True))), kept


def train_backward(
    backend: CpuBackend,
    problem: ChainProblem,
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    z: Sequence[Tensor],
    mean: Tensor,
    invstd: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor]] | None:
    """As `training.train_backward`, not flattened, the gradient of x channels-last; None as for `train_forward`."""
    if not covers(problem):
        return None
    isa = backend.instruction_set()
    need_x, need_weights = needed[:2]
    config, scale = problem.config, problem.scale
    grad, x, out = (_channels_last(t) for t in (grad, x, out))
    groups, outputs, grads = (t.split(problem.width, 1) for t in (x, out, grad))
    grad_x = torch.empty_like(x) if need_x else None
    slots: Any = [None] * scale if grad_x is None else grad_x.split(problem.width, 1)
    grad_weights: list[Tensor] = [grad] * problem.steps
    grad_affine: list[Tensor] = [grad] * problem.steps
    du: Tensor | None = None  # of group i+1, where that added y_i
    for i in reversed(range(scale)):
        if i == config.passed_group(scale):
            if not need_x:
                continue
            if du is not None:
                slots[i + 1].copy_(du)
            slots[i].copy_(pool_backward(grads[i] if du is None else grads[i] + du, groups[i], config))
            du = None
            continue
        k = i - config.first_convolved
        u = groups[i]
        if config.adds(i) and (need_weights or not z):
            u = _operators.cpu_sum.default(u, outputs[i - 1], isa)
        zk = _channels_last(z[k] if z else convolve(backend, u, weights[k], config))
        dz, grad_affine[k] = _operators.cpu_norm_backward.default(
            grads[i], du, slots[i + 1] if du is not None else None, outputs[i], zk, mean[k], invstd[k],
            gammas[k].float().contiguous(), _activation(config), isa,
        )  # fmt: skip
        need_u = need_x or feeds_a_convolution(config, i)
        du = None
        if not need_u and not need_weights:
            continue
        du, grad_weights[k], _ = convolution_backward(
            backend, dz, u, weights[k], config, (need_u, need_weights, False), torch.channels_last
        )
        du = _channels_last(du) if need_u else None
        if need_x and not config.adds(i):
            slots[i].copy_(du)
        if not config.adds(i):
            du = None
    grad_gammas, grad_betas = ([g[j].clone() for g in grad_affine] for j in (0, 1))  # no results that share memory
    return grad_x, grad_weights, grad_gammas, grad_betas


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _activation(config: ChainConfig) -> int:
    return ACTIVATIONS.index(config.activation)
