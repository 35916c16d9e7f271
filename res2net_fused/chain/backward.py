"""The gradients of 2-D and 1-D chains from x, the output and the incoming gradient alone.

With u_i = x_i + y_{i-1} and y_i = act(K_i u_i + b_i), from the last group to the first:

    dy_i = dout_i + du_{i+1},   dz_i = dy_i * act'(y_i),   du_i = K_i^T dz_i = dx_i,   dK_i = u_i (*) dz_i,   db_i = sum dz_i

u_i is formed again from x and out, and act' is read off y_i, so nothing else has to be saved; of activations whose output does
not show it, z_i = K_i u_i + b_i is convolved again. The operators are PyTorch's own;
K_i^T dz_i, itself a 3x3 convolution, and dK_i are the convolver's that is handed in, where it has them. Where that is None,
all of it is PyTorch's and nothing is written in place, so that autograd differentiates these gradients again, through x, out,
the weights, the biases and the incoming gradient, and vmap follows them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .activations import activate, activation_backward, activation_backward_from_input, shows_slope
from .config import Chain1dConfig, ChainConfig
from .convolver import ATEN, Convolver
from .memory_format import memory_format
from .problem import ChainProblem
from .reference import bias_of, convolved_1d, padded_1d


def chain_backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    weights: Sequence[Tensor],
    config: ChainConfig,
    needed: Sequence[bool],
    convolver: Convolver | None = ATEN,
    biases: Sequence[Tensor] | None = None,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of (x, weights, biases), of these only what `needed` names.

    grad, out: (N, s*w, H/stride, W/stride), any strides; x: (N, s*w, H, W). convolver: who computes gradients of convolutions;
    None where these gradients are differentiated again, or vmapped. biases: looked at only where z_i is convolved again.
    """

    def output_backward(k: int, dy: Tensor, y: Tensor, u: Tensor) -> Tensor:
        if shows_slope(config.activation):
            dz = activation_backward(dy, y, config.activation)
        else:
            padding = config.dilation
            z = torch.conv2d(u, weights[k], bias_of(biases, k, u), config.stride, padding, config.dilation, config.groups)
            dz = activation_backward_from_input(dy, z, config.activation, again=convolver is None)
        return dz if convolver is None else dz.contiguous(memory_format=memory_format(out))

    by_convolver = functools.partial(convolution_backward, convolver, config=config)
    return walk_back(grad, x, out, weights, config, output_backward, by_convolver, needed, convolver is not None)


def chain_backward_1d(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    kept: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    affine_scale: Sequence[Tensor] | None,
    affine_shift: Sequence[Tensor] | None,
    config: Chain1dConfig,
    needed: Sequence[bool],
    in_place: bool = True,
) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """Gradients of (x, weights, biases, affine_scale, affine_shift), of these only what `needed` names.

    Here y_i = a_i r_i + c_i with r_i = act(z_i) and z_i = K_i * u_i + b_i, of which `reference.kept_1d` is kept, so that
    before the walk goes on

        da_i = sum dy_i r_i,   dc_i = sum dy_i,   dz_i = dy_i a_i act'(z_i)

    grad, out, x: (N, s*w, L), any strides; kept: for each convolution (N, w, L). in_place: False where these gradients are
    differentiated again, or vmapped; z_i is then convolved again.
    """
    need_x, need_weights, need_biases, need_scale, need_shift = needed
    grad_scale, grad_shift = ([grad] * len(weights) for _ in range(2))
    shows = shows_slope(config.activation)

    def z(k: int, u: Tensor) -> Tensor:
        return kept[k] if in_place and not shows else convolved_1d(u, weights[k], bias_of(biases, k, u), config)

    def output_backward(k: int, dy: Tensor, y: Tensor, u: Tensor) -> Tensor:
        if affine_scale is not None and affine_shift is not None:
            if need_scale:
                r = kept[k] if in_place and shows else activate(z(k, u), config.activation)
                grad_scale[k] = (dy.to(affine_scale[k].dtype) * r).sum((0, 2))
            if need_shift:
                grad_shift[k] = dy.sum((0, 2), dtype=affine_shift[k].dtype)
            dy = (dy * affine_scale[k][:, None]).to(dy.dtype)
        if shows:
            return activation_backward(dy, kept[k], config.activation).contiguous()
        return activation_backward_from_input(dy, z(k, u), config.activation, again=not in_place).contiguous()

    by_aten = functools.partial(convolution_backward_1d, config=config)
    needed = need_x, need_weights, need_biases and biases is not None
    found = walk_back(grad, x, out, weights, config.chain, output_backward, by_aten, needed, in_place)
    return *found, grad_scale, grad_shift


def walk_back(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    weights: Sequence[Tensor],
    config: ChainConfig,
    output_backward: Callable[[int, Tensor, Tensor, Tensor], Tensor],
    convolution_backward: Callable[..., tuple[Tensor, Tensor, Tensor]],
    needed: Sequence[bool],
    in_place: bool = True,
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """The walk from the last convolution to the first: gradients of (x, weights, biases), of these only what `needed` names.

    output_backward: (k, dy_k, y_k, u_k) -> dz_k, the backward of all that follows convolution k.
    convolution_backward: (dz_k, u_k, weight, needed=...) -> gradients of (u_k, weight, bias), in 1-D or 2-D.
    in_place: whether the gradient of x is written into one tensor, group by group.
    """
    need_x, need_weights, need_biases = needed
    width, steps = weights[0].shape[0], len(weights)
    groups, outputs, grads = (t.split(width, 1) for t in (x, out, grad))
    grad_x: Tensor | None = None
    slots = list(groups)  # of the gradient of x
    if need_x and in_place:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
        slots = list(grad_x.split(width, 1))
    grad_weights: list[Tensor] = [grad] * steps
    grad_biases: list[Tensor] = [grad] * steps
    into_previous: Tensor | None = None  # du_{i+1}, where group i+1 added y_i
    for k, i, adds, chained, _ in reversed(config.convolutions(steps)):
        dy = grads[i] if into_previous is None else grads[i] + into_previous
        u = groups[i] + outputs[i - 1] if adds else groups[i]
        dz = output_backward(k, dy, outputs[i], u)
        need_u = need_x or chained
        into_previous = None
        if not (need_u or need_weights or need_biases):
            continue
        du, grad_weights[k], grad_biases[k] = convolution_backward(
            dz, u, weights[k], needed=(need_u, need_weights, need_biases)
        )
        if grad_x is not None:
            slots[i].copy_(du)
        else:
            slots[i] = du
        if chained:
            into_previous = du
    if grad_x is not None:
        pass_back(config, slots, grads, groups)
    elif need_x:
        passed = config.passed_group(len(groups))
        if passed is not None:
            slots[passed] = passed_gradient(config, passed, slots, grads, groups)
        grad_x = torch.cat(slots, 1)
    return grad_x, grad_weights, grad_biases


def pass_back(config: ChainConfig, slots: Sequence[Tensor], grads: Sequence[Tensor], groups: Sequence[Tensor]) -> None:
    """Writes the gradient of the passed group, if there is one, into its slot; those of the other groups are in theirs."""
    passed = config.passed_group(len(grads))
    if passed is not None:
        slots[passed].copy_(passed_gradient(config, passed, slots, grads, groups))


def passed_gradient(
    config: ChainConfig, passed: int, slots: Sequence[Tensor], grads: Sequence[Tensor], groups: Sequence[Tensor]
) -> Tensor:
    dy = grads[passed] + slots[passed + 1] if config.adds_passed else grads[passed]
    return pool_backward(dy, groups[passed], config)


def convolution_backward(
    convolver: Convolver | None,
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
    du = dweight = dbias = None
    if convolver is not None:
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
    """Zeroes in place the taps that meet no pixel of u: oneDNN leaves there, in half types, whatever the memory held."""
    for axis in (2, 3):
        size = u.shape[axis]
        if config.dilation > (config.output_size(size) - 1) * config.stride:
            dweight.select(axis, 0).zero_()
        if config.dilation >= size:
            dweight.select(axis, 2).zero_()


def convolution_backward_1d(
    dz: Tensor, u: Tensor, weight: Tensor, config: Chain1dConfig, needed: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of (u, weight, bias) where `needed`; dz and u: (N, w, L)."""
    reflects = config.padding_mode == "reflect"
    padding = config.padding(weight.shape[2])
    du, dweight, dbias = torch.ops.aten.convolution_backward(
        dz,
        padded_1d(u, weight, config) if reflects else u,
        weight,
        [weight.shape[0]],
        [1],
        [0 if reflects else padding],
        [config.dilation],
        False,
        [0],
        1,
        list(needed),
    )
    if needed[0] and reflects and padding:
        du = torch.ops.aten.reflection_pad1d_backward(du, u, [padding, padding])
    return du, dweight, dbias


def pool_backward(dy: Tensor, x: Tensor, config: ChainConfig) -> Tensor:
    if config.pool is None:
        return dy
    if config.pool == "max3":
        window = [3, 3], [config.stride] * 2, [1, 1], [1, 1], False  # with the dilation, and not rounded up
        places = torch.ops.aten.max_pool2d_with_indices(x, *window)[1]
        return torch.ops.aten.max_pool2d_with_indices_backward(dy, x, *window, places)
    return torch.ops.aten.avg_pool2d_backward(dy, x, [3, 3], [config.stride] * 2, [1, 1], False, config.pool == "avg3", None)
