"""The chain's gradients from x, the output and the incoming gradient alone.

With u_i = x_i + y_{i-1} and y_i = act(K_i u_i + b_i), from the last group to the first:

    dy_i = dout_i + du_{i+1},   dz_i = dy_i * act'(y_i),   du_i = K_i^T dz_i = dx_i,   dK_i = u_i (*) dz_i,   db_i = sum dz_i

u_i is formed again from x and out, and act' is read off y_i, so nothing else has to be saved. The operators are PyTorch's own;
K_i^T dz_i, itself a 3x3 convolution, and dK_i are the convolver's that is handed in, where it has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .config import ChainConfig
from .convolver import ATEN, Convolver
from .memory_format import memory_format
from .problem import ChainProblem


def chain_backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    weights: Sequence[Tensor],
    config: ChainConfig,
    needed: Sequence[bool],
    convolver: Convolver = ATEN,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of (x, weights, biases), of these only what `needed` names.

    grad, out: (N, s*w, H/stride, W/stride), any strides; x: (N, s*w, H, W). convolver: who computes gradients of convolutions.
    """

    def output_backward(k: int, dy: Tensor, y: Tensor, u: Tensor) -> Tensor:
        return activation_backward(dy, y, config.activation).contiguous(memory_format=memory_format(out))

    return walk_back(convolver, grad, x, out, weights, config, output_backward, needed)


def walk_back(
    convolver: Convolver,
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    weights: Sequence[Tensor],
    config: ChainConfig,
    output_backward: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """As `chain_backward`; output_backward: (k, dy_k, y_k, u_k) -> dz_k, the backward of all that follows convolution k."""
    need_x, need_weights, need_biases = needed
    width, steps = weights[0].shape[0], len(weights)
    groups, outputs, grads = (list(t.split(width, 1)) for t in (x, out, grad))
    scale = config.scale(steps)
    grad_x: list[Tensor] = [grad] * scale
    grad_weights: list[Tensor] = [grad] * steps
    grad_biases: list[Tensor] = [grad] * steps
    into_previous: Tensor | None = None  # du_{i+1}, where group i+1 added y_i
    for i in reversed(range(scale)):
        dy = grads[i] if into_previous is None else grads[i] + into_previous
        into_previous = None
        if i == config.passed_group(scale):
            grad_x[i] = pool_backward(dy, groups[i], config)
            continue
        k = i - config.first_convolved
        u = groups[i] + outputs[i - 1] if config.adds(i) else groups[i]
        dz = output_backward(k, dy, outputs[i], u)
        need_u = need_x or feeds_a_convolution(config, i)
        grad_x[i], grad_weights[k], grad_biases[k] = convolution_backward(
            convolver, dz, u, weights[k], config, (need_u, need_weights, need_biases)
        )
        if config.adds(i):
            into_previous = grad_x[i]
    return torch.cat(grad_x, 1) if need_x else None, grad_weights, grad_biases


def convolution_backward(
    convolver: Convolver,
    dz: Tensor,
    u: Tensor,
    weight: Tensor,
    config: ChainConfig,
    needed: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (u, weight, bias) where `needed`; dz: (N, w, H', W'), u: (N, w, H, W).

    A backend's own gradient of the weight has the weight's memory format; ATen's has whichever it likes.
    """
    need_u, need_weight, need_bias = needed
    problem = ChainProblem.for_convolution(dz, weight, config)
    du = convolver.input_gradient(problem, dz, weight) if need_u else None
    dweight, dbias = convolver.weight_gradient(problem, dz, u, memory_format(weight)) if need_weight else (None, None)
    need_weight, need_bias = need_weight and dweight is None, need_bias and dbias is None
    if (du is not None or not need_u) and not need_weight and not need_bias:
        return dz if du is None else du, dz if dweight is None else dweight, dz if dbias is None else dbias
    gradients = torch.ops.aten.convolution_backward(
        dz,
        u,
        weight,
        [weight.shape[0]] if need_bias else None,
        [config.stride] * 2,
        [config.dilation] * 2,
        [config.dilation] * 2,
        False,
        [0, 0],
        config.groups,
        [need_u and du is None, need_weight, need_bias],
    )
    if need_weight and dz.device.type == "cpu" and dz.dtype in (torch.float16, torch.bfloat16):
        clear_idle_taps(gradients[1], u, config)
    return (
        gradients[0] if du is None else du,
        gradients[1] if dweight is None else dweight,
        gradients[2] if dbias is None else dbias,
    )


def clear_idle_taps(dweight: Tensor, u: Tensor, config: ChainConfig) -> None:
    """Zeros, in place, for taps that meet no pixel of u: oneDNN leaves there, in half types, whatever the memory held."""
    for axis in (2, 3):
        size = u.shape[axis]
        if config.dilation > (config.output_size(size) - 1) * config.stride:
            dweight.select(axis, 0).zero_()
        if config.dilation >= size:
            dweight.select(axis, 2).zero_()


def feeds_a_convolution(config: ChainConfig, group: int) -> bool:
    """Whether du of this group reaches an earlier convolution."""
    return config.adds(group) and group - 1 >= config.first_convolved


def activation_backward(dy: Tensor, y: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return dy
    if activation == "relu":
        return torch.ops.aten.threshold_backward(dy, y, 0)
    return torch.ops.aten.hardtanh_backward(dy, y, 0, 20)


def pool_backward(dy: Tensor, x: Tensor, config: ChainConfig) -> Tensor:
    if config.pool is None:
        return dy
    return torch.ops.aten.avg_pool2d_backward(dy, x, [3, 3], [config.stride] * 2, [1, 1], False, config.pool == "avg3", None)
