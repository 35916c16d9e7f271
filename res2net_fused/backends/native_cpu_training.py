"""Training of the chain on the CPU, fp32: its backward without batch statistics, and both passes with them.

Without statistics the backward of a whole chain is one operator where Winograd covers it. With them, and elsewhere, the chain
goes group by group, and every pass over memory between two convolutions is one kernel.

Per step forward reads z for its statistics, then z and x_{i+1}, and writes y_i to its slot and u_{i+1}. Backward reads dout_i,
du_{i+1}, y_i and z_i and writes the masked gradient (and du_{i+1} to its slot), then turns that into dz_i in place.
All of it is channels-last. BatchNorm's sums are the same for any number of threads; gradients of weights and biases repeat
their bits for one number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from ..backward import convolution_backward, feeds_a_convolution, pool_backward
from ..chain import ACTIVATIONS, ChainConfig, ChainProblem, memory_format
from ..reference import pool_passthrough
from ..training import Statistics, convolve
from .selection import Backend, get_backend

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
    grad_affine: list[Tensor] = [grad] * problem.steps

    def norm_backward(k: int, dy: DownstreamGradient, y: Tensor, u: Tensor) -> Tensor:
        zk = _channels_last(z[k] if z else convolve(backend, u, weights[k], problem.config))
        dz, grad_affine[k] = _operators.cpu_norm_backward.default(
            *dy, y, zk, mean[k], invstd[k], gammas[k].float().contiguous(), _activation(problem.config), isa
        )
        return dz

    grad_x, grad_weights, _ = _walk_back(
        backend, problem, grad, x, out, weights, norm_backward, not z, (needed[0], needed[1], False)
    )
    grad_gammas, grad_betas = ([g[j].clone() for g in grad_affine] for j in (0, 1))  # no results that share memory
    return grad_x, grad_weights, grad_gammas, grad_betas


def runs_chain_backward(problem: ChainProblem, by_name: bool) -> bool:
    """Whether `chain_backward` takes a call: wherever it is measured to be faster than ATen's operators.

    In NCHW the conversions cost more than they save from 28x28 pixels on.
    """
    small = problem.height * problem.width_pixels <= 14 * 14
    return problem.dtype == torch.float32 and (problem.channels_last or small)


def chain_backward(
    problem: ChainProblem,
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    weights: Sequence[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of (x, weights, biases) of the chain without batch statistics, of these what `needed` names.

    The gradient of x is channels-last.
    """
    backend = get_backend("cpu")
    isa = backend.instruction_set()
    grad, x, out = (_channels_last(t) for t in (grad, x, out))
    if backend.convolves_faster(problem):
        found = _operators.cpu_chain_backward.default(
            grad, x, out, list(weights), backend.settings(problem), needed[0], needed[1] or needed[2],
            memory_format(weights[0]) == torch.channels_last, isa,
        )  # fmt: skip
        if found:
            grad_x, *rest = found
            if needed[0]:
                _pass_back(problem, grad_x, grad, x)
            return grad_x if needed[0] else None, rest[: problem.steps], rest[problem.steps :]

    def activation_backward(k: int, dy: DownstreamGradient, y: Tensor, u: Tensor) -> Tensor:
        return _operators.cpu_activation_backward.default(*dy, y, _activation(problem.config), isa)

    return _walk_back(backend, problem, grad, x, out, weights, activation_backward, False, needed)


def _pass_back(problem: ChainProblem, grad_x: Tensor, grad: Tensor, x: Tensor) -> None:
    """Writes the gradient of the group that passes the chain by; those of the others are in grad_x."""
    config, passed = problem.config, problem.config.passed_group(problem.scale)
    if passed is None:
        return
    slots, grads, groups = (t.split(problem.width, 1) for t in (grad_x, grad, x))
    added = passed + 1 < problem.scale and config.adds(passed + 1)
    dy = grads[passed] + slots[passed + 1] if added else grads[passed]
    slots[passed].copy_(pool_backward(dy, groups[passed], config))


# dout_i, du_{i+1} or None, and where in the gradient of x the latter is to be copied, or None.
DownstreamGradient = tuple[Tensor, Tensor | None, Tensor | None]


def _walk_back(
    backend: CpuBackend,
    problem: ChainProblem,
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    weights: Sequence[Tensor],
    output_backward: Callable[[int, DownstreamGradient, Tensor, Tensor], Tensor],
    needs_sums: bool,
    needed: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of (x, weights, biases), of these what `needed` names, from the last group to the first.

    output_backward: (k, dy, y_k, u_k) -> dz_k, the backward of all that follows the k-th convolution. needs_sums: it reads u_k.
    """
    isa = backend.instruction_set()
    need_x, need_weights, need_biases = needed
    config, scale = problem.config, problem.scale
    grad, x, out = (_channels_last(t) for t in (grad, x, out))
    groups, outputs, grads = (t.split(problem.width, 1) for t in (x, out, grad))
    grad_x = torch.empty_like(x) if need_x else None
    slots: Any = [None] * scale if grad_x is None else grad_x.split(problem.width, 1)
    grad_weights: list[Tensor] = [grad] * problem.steps
    grad_biases: list[Tensor] = [grad] * problem.steps
    du: Tensor | None = None  # of group i+1, where that added y_i
    for i in reversed(range(scale)):
        if i == config.passed_group(scale):
            if need_x and du is not None:
                slots[i + 1].copy_(du)
            du = None
            continue
        k = i - config.first_convolved
        u = groups[i]
        if config.adds(i) and (need_weights or needs_sums):
            u = _operators.cpu_sum.default(u, outputs[i - 1], isa)
        dz = output_backward(k, (grads[i], du, slots[i + 1] if du is not None else None), outputs[i], u)
        need_u = need_x or feeds_a_convolution(config, i)
        du = None
        if not need_u and not need_weights and not need_biases:
            continue
        du, grad_weights[k], grad_biases[k] = convolution_backward(
            backend, dz, u, weights[k], config, (need_u, need_weights, need_biases)
        )
        du = _channels_last(du) if need_u else None
        if need_x and not config.adds(i):
            slots[i].copy_(du)
        if not config.adds(i):
            du = None
    if grad_x is not None:
        _pass_back(problem, grad_x, grad, x)
    return grad_x, grad_weights, grad_biases


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _activation(config: ChainConfig) -> int:
    return ACTIVATIONS.index(config.activation)
