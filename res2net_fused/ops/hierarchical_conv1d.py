"""The operator `res2net_fused::hierarchical_conv1d`, the chain along rows: its registration with PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..backends.base import BACKENDS
from ..backends.selection1d import choose_1d, forward_1d
from ..chain import reference
from ..chain.backward1d import chain_backward_1d
from ..chain.checks import check_arguments_1d, check_dense, sequence_types
from ..chain.config import Chain1dConfig, one_of
from ._library import TAGS, check_devices, library, refuse_second_derivative, refuse_tangents, register_autocast

_SETTINGS = "int dilation, str passthrough, str padding_mode"
# -> [out, *rectified]; what is rectified is left out unless `keep`.
library.define(
    "hierarchical_conv1d(Tensor x, Tensor[] weights, Tensor[]? biases, Tensor[]? affine_scale, Tensor[]? affine_shift, "
    f"Tensor[]? packed, {_SETTINGS}, bool keep, str backend) -> Tensor[]",
    tags=TAGS,
)
library.define(
    "hierarchical_conv1d_backward(Tensor grad, Tensor x, Tensor out, Tensor[] rectified, Tensor[] weights, Tensor[]? biases, "
    f"Tensor[]? affine_scale, Tensor[]? affine_shift, {_SETTINGS}, bool[] needed) -> Tensor[]",
    tags=TAGS,
)

_cached_config = functools.lru_cache(Chain1dConfig)


def hierarchical_conv1d(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    affine_scale: Sequence[Tensor] | None = None,
    affine_shift: Sequence[Tensor] | None = None,
    *,
    passthrough: str = "last",
    padding_mode: str = "zeros",
    dilation: int = 1,
    backend: str = "auto",
) -> Tensor:
    """The add-then-convolve chain along rows, as in ECAPA-TDNN: y_i = scale_i * relu(K_i (x_i + y_{i-1}) + b_i) + shift_i.

    x: (N, s*w, L), fp32, fp64, fp16 or bf16.
    weights: one tensor (w, w, k) with an odd k for each convolution, one for each group but the passed one.
    biases: None, or one tensor (w,) for each convolution, of x's dtype or fp32.
    affine_scale, affine_shift: both None, or as biases: the affine map of a BatchNorm that comes after ReLU.
    passthrough: the group without a convolution: "last", "none", "first", or "first_added" (added to the next as well).
    padding_mode: what stands beyond the ends of a row: "zeros", or "reflect" as in torch.nn.functional.pad.
    dilation: of the convolutions, whose padding is dilation * (k // 2).
    backend: "auto", "reference", "cpu" or "triton"; with "auto" the variable RES2NET_FUSED_BACKEND decides.

    Returns (N, s*w, L) in x's dtype, contiguous.
    Raises ValueError or TypeError for arguments that do not fit, RuntimeError where an explicit backend cannot run.
    """
    for name, values in (("biases", biases), ("affine_scale", affine_scale), ("affine_shift", affine_shift)):
        if values is not None:
            sequence_types(name, values)
    sequence_types("weights", weights)
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}; a Tensor of shape (N, s*w, L) is needed")
    check_dense("x", x)
    config = Chain1dConfig(dilation, passthrough, padding_mode)
    return call_1d(x, weights, biases, affine_scale, affine_shift, None, config, backend)


def call_1d(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    affine_scale: Sequence[Tensor] | None,
    affine_shift: Sequence[Tensor] | None,
    packed: Sequence[Tensor] | None,  # what `backends.chain1d.pack_1d` made of the weights, or None
    config: Chain1dConfig,
    backend: str,
) -> Tensor:
    """As `hierarchical_conv1d`, of arguments that are tensors, with weights that may be packed.

    x (N, s*w, L), weights (w, w, k), biases, affine_scale, affine_shift (w,) and backend: as there. config: its settings.
    """
    if torch.onnx.is_in_onnx_export():  # which knows PyTorch's own operators only
        return reference.hierarchical_conv1d(x, weights, biases, affine_scale, affine_shift, config)
    tensors = (x, *weights, *(biases or ()), *(affine_scale or ()), *(affine_shift or ()))
    if not torch.compiler.is_compiling():
        one_of("backend", backend, BACKENDS)
        if torch.autograd.forward_ad._current_level >= 0:
            refuse_tangents("hierarchical_conv1d", tensors)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return torch.ops.res2net_fused.hierarchical_conv1d.default(
        x, weights, biases, affine_scale, affine_shift, packed, *config.as_kwargs().values(), keep, backend
    )[0]


# Kernels --------------------------------------------------------------------------------------------------------------


@functools.partial(library.impl, "hierarchical_conv1d", dispatch_key="CompositeExplicitAutograd")
def _forward(x, weights, biases, affine_scale, affine_shift, packed, *settings) -> list[Tensor]:
    *chain, keep, backend = settings
    problem = check_arguments_1d(x, weights, biases, affine_scale, affine_shift, _cached_config(*chain))
    if packed:
        check_devices(x, packed=packed)
    name = choose_1d(problem, backend).name
    out, rectified = forward_1d(name, problem, x, weights, biases, affine_scale, affine_shift, packed, keep)
    return [out, *rectified]


@torch.library.register_fake("res2net_fused::hierarchical_conv1d", lib=library)
def _fake(x, weights, biases, affine_scale, affine_shift, packed, *settings) -> list[Tensor]:
    *chain, keep, _ = settings
    problem = check_arguments_1d(x, weights, biases, affine_scale, affine_shift, _cached_config(*chain))
    shape = problem.batch, problem.width, problem.length
    rectified = [x.new_empty(shape) for _ in weights] if keep else []
    return [x.new_empty(x.shape), *rectified]


@functools.partial(library.impl, "hierarchical_conv1d_backward", dispatch_key="CompositeExplicitAutograd")
def _backward_kernel(grad, x, out, rectified, weights, biases, affine_scale, affine_shift, *settings) -> list[Tensor]:
    *chain, needed = settings
    devices = dict(rectified=rectified, weights=weights, biases=biases, affine_scale=affine_scale, affine_shift=affine_shift)
    check_devices(x, grad=grad, out=out, **devices)
    config = _cached_config(*chain).clamped_to(x.shape[2])
    return chain_backward_1d(grad, x, out, rectified, weights, biases, affine_scale, affine_shift, config, needed)


@torch.library.register_fake("res2net_fused::hierarchical_conv1d_backward", lib=library)
def _backward_fake(grad, x, out, rectified, weights, biases, affine_scale, affine_shift, *settings) -> list[Tensor]:
    need_x, need_weights, *need_others = settings[-1]
    results = [x.new_empty(x.shape)] if need_x else []
    if need_weights:
        results += [weight.new_empty(weight.shape) for weight in weights]
    for needs, values in zip(need_others, (biases, affine_scale, affine_shift), strict=True):
        if needs and values is not None:
            results += [value.new_empty(value.shape) for value in values]
    return results


# Autograd -------------------------------------------------------------------------------------------------------------


def _save_for_backward(ctx, inputs, output) -> None:
    x, weights, biases, affine_scale, affine_shift, _, *settings = inputs
    out, *rectified = output
    lists = rectified, weights, biases, affine_scale, affine_shift
    ctx.settings = settings[:-2]
    ctx.counts = [None if values is None else len(values) for values in lists]
    ctx.mark_non_differentiable(*rectified)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, out, *(tensor for values in lists for tensor in values or ()))


def _backward(ctx, grads):
    counts = ctx.counts
    results: list[object] = [None, *(None if count is None else [None] * count for count in counts[1:])]
    if grads[0] is not None:
        x, out, *rest = ctx.saved_tensors
        tensors = iter(rest)
        lists = [None if count is None else [next(tensors) for _ in range(count)] for count in counts]
        needed = [needs if isinstance(needs, bool) else any(needs) for needs in ctx.needs_input_grad[:5]]
        needed[2:] = [needs and values is not None for needs, values in zip(needed[2:], lists[2:], strict=True)]
        gradients = iter(
            torch.ops.res2net_fused.hierarchical_conv1d_backward.default(grads[0], x, out, *lists, *ctx.settings, needed)
        )
        if needed[0]:
            results[0] = next(gradients)
        for i, needs in enumerate(needed[1:], start=1):
            if needs:
                results[i] = [next(gradients) for _ in range(counts[i])]
    return *results, None, *[None] * (len(ctx.settings) + 2)


torch.library.register_autograd("res2net_fused::hierarchical_conv1d", _backward, setup_context=_save_for_backward, lib=library)
refuse_second_derivative("hierarchical_conv1d")


# Autocast: x and the convolution weights only; biases and the affine map stay as they are ----------------------------------


def _cast(dtype: torch.dtype, x, weights, biases, affine_scale, affine_shift, packed, *settings) -> tuple[object, ...]:
    packed = packed if weights[0].dtype == dtype else None
    return x.to(dtype), [weight.to(dtype) for weight in weights], biases, affine_scale, affine_shift, packed, *settings


register_autocast("hierarchical_conv1d", _cast)


# FLOPs ----------------------------------------------------------------------------------------------------------------


def _flops(x_shape, weight_shapes) -> int:
    batch, _, length = x_shape
    out_channels, in_channels, taps = weight_shapes[0]
    return 2 * batch * length * len(weight_shapes) * out_channels * in_channels * taps


@register_flop_formula(torch.ops.res2net_fused.hierarchical_conv1d)
def _forward_flops(x_shape, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    return _flops(x_shape, weight_shapes)


@register_flop_formula(torch.ops.res2net_fused.hierarchical_conv1d_backward)
def _backward_flops(grad_shape, x_shape, out_shape_, rectified, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    need_x, need_weights, *_ = args[-1]
    return (need_x + need_weights) * _flops(x_shape, weight_shapes)
