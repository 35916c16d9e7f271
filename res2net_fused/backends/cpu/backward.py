"""The backward of a chain on the CPU, fp32: in one native call where Winograd covers it, else group by group.

Gradients of weights and biases repeat their bits for one number of threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...chain.backward import convolution_backward, pass_back
from ...chain.memory_format import memory_format
from ...chain.problem import ChainProblem
from .convolution import CONVOLVER, convolves_faster
from .settings import activation_arguments, chain_arguments, instruction_set, operators


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
    isa = instruction_set()
    grad, x, out = (channels_last(t) for t in (grad, x, out))
    if convolves_faster(problem):
        found = operators.cpu_chain_backward.default(
            grad, x, out, list(weights), **chain_arguments(problem), need_x=needed[0], need_weights=needed[1] or needed[2],
            channels_last_weights=memory_format(weights[0]) == torch.channels_last, instruction_set=isa,
        )  # fmt: skip
        if found:
            grad_x, *rest = found
            if needed[0]:
                pass_back(problem.config, *(t.split(problem.width, 1) for t in (grad_x, grad, x)))
            return grad_x if needed[0] else None, rest[: problem.steps], rest[problem.steps :]

    activation = activation_arguments(problem.config)

    def activation_backward(k: int, dy: DownstreamGradient, y: Tensor, u: Tensor) -> Tensor:
        return operators.cpu_activation_backward.default(*dy, y, **activation, instruction_set=isa)

    return walk_back(problem, grad, x, out, weights, activation_backward, False, needed)


# dout_i, du_{i+1} or None, and where in the gradient of x the latter is to be copied, or None.
DownstreamGradient = tuple[Tensor, Tensor | None, Tensor | None]


def walk_back(
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
    isa = instruction_set()
    need_x, need_weights, need_biases = needed
    config = problem.config
    grad, x, out = (channels_last(t) for t in (grad, x, out))
    groups, outputs, grads = (t.split(problem.width, 1) for t in (x, out, grad))
    grad_x = torch.empty_like(x) if need_x else None
    slots: Any = [None] * problem.scale if grad_x is None else grad_x.split(problem.width, 1)
    grad_weights: list[Tensor] = [grad] * problem.steps
    grad_biases: list[Tensor] = [grad] * problem.steps
    du: Tensor | None = None  # of group i+1, where that added y_i
    for k, i, adds, chained, _ in reversed(config.convolutions(problem.steps)):
        u = groups[i]
        if adds and (need_weights or needs_sums):
            u = operators.cpu_sum.default(u, outputs[i - 1], isa)
        dz = output_backward(k, (grads[i], du, slots[i + 1] if du is not None else None), outputs[i], u)
        need_u = need_x or chained
        du = None
        if not need_u and not need_weights and not need_biases:
            continue
        du, grad_weights[k], grad_biases[k] = convolution_backward(
            CONVOLVER, dz, u, weights[k], config, (need_u, need_weights, need_biases)
        )
        du = channels_last(du) if need_u else None
        if not chained:
            if need_x:
                slots[i].copy_(du)
            du = None
    if grad_x is not None:
        pass_back(config, slots, grads, groups)
    return grad_x, grad_weights, grad_biases


def channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)
