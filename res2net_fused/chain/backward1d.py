"""The 1-D chain's gradients from x, the output, the rectified convolutions and the incoming gradient.

With u_i = x_i + y_{i-1}, r_i = relu(K_i * u_i + b_i) and y_i = a_i r_i + c_i, from the last group to the first,

    dy_i = dout_i + du_{i+1},  da_i = sum dy_i r_i,  dc_i = sum dy_i,  dz_i = dy_i a_i [r_i > 0],
    du_i = K_i^T dz_i = dx_i,  dK_i = u_i (*) dz_i,  db_i = sum dz_i

u_i is formed again from x and out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .backward import feeds_a_convolution
from .config import Chain1dConfig
from .reference import padded_1d


def chain_backward_1d(
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    rectified: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    affine_scale: Sequence[Tensor] | None,
    affine_shift: Sequence[Tensor] | None,
    config: Chain1dConfig,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of (x, weights, biases, affine_scale, affine_shift), flat, and of these only what `needed` names.

    grad, out, x: (N, s*w, L), any strides; rectified: each (N, w, L).
    """
    need_x, need_weights, need_biases, need_scale, need_shift = needed
    width, steps, chain = weights[0].shape[0], len(weights), config.chain
    groups, outputs, grads = (list(t.split(width, 1)) for t in (x, out, grad))
    scale = chain.scale(steps)
    grad_x: list[Tensor] = [grad] * scale
    grad_weights, grad_biases, grad_scale, grad_shift = ([grad] * steps for _ in range(4))
    into_previous: Tensor | None = None  # du_{i+1}, where group i+1 added y_i
    for i in reversed(range(scale)):
        dy = grads[i] if into_previous is None else grads[i] + into_previous
        into_previous = None
        if i == chain.passed_group(scale):
            grad_x[i] = dy
            continue
        k = i - chain.first_convolved
        dr = dy
        if affine_scale is not None and affine_shift is not None:
            if need_scale:
                grad_scale[k] = (dy.to(affine_scale[k].dtype) * rectified[k]).sum((0, 2))
            if need_shift:
                grad_shift[k] = dy.sum((0, 2), dtype=affine_shift[k].dtype)
            dr = (dy * affine_scale[k][:, None]).to(dy.dtype)
        need_u = need_x or feeds_a_convolution(chain, i)
        if not (need_u or need_weights or need_biases):
            continue
        dz = torch.ops.aten.threshold_backward(dr, rectified[k], 0).contiguous()
        u = groups[i] + outputs[i - 1] if chain.adds(i) else groups[i]
        du, grad_weights[k], grad_biases[k] = _convolution_backward(
            dz, u, weights[k], config, (need_u, need_weights, need_biases and biases is not None)
        )
        grad_x[i] = du
        if chain.adds(i):
            into_previous = du
    results = [torch.cat(grad_x, 1)] if need_x else []
    if need_weights:
        results += [g.contiguous() for g in grad_weights]
    for needs, gradients, values in (
        (need_biases, grad_biases, biases),
        (need_scale, grad_scale, affine_scale),
        (need_shift, grad_shift, affine_shift),
    ):
        if needs and values is not None:
            results += [g.to(value.dtype) for g, value in zip(gradients, values, strict=True)]
    return results


def _convolution_backward(
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
