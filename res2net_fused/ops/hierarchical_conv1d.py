"""The operator `res2net_fused::hierarchical_conv1d`, the chain along rows: its registration with PyTorch."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends.base import BACKENDS, Backend
from ..backends.selection import choose, get_backend
from ..backends.verification import confirmed
from ..chain import reference
from ..chain.backward import chain_backward_1d
from ..chain.block_weights import Chain1dWeights
from ..chain.checks import check_arguments_1d, check_dense, sequence_types
from ..chain.config import Chain1dConfig, one_of
from ..chain.problem import Chain1dProblem
from ._library import (
    TAGS,
    cast_convolution,
    check_devices,
    fake_of,
    forward_mode,
    library,
    register_autocast,
    register_backward,
    register_decomposition,
    register_flops,
    register_kernel,
    register_transforms,
)
from .recording import why_written

_CHAIN = "int dilation, str passthrough, str padding_mode, str activation"
library.define(
    "hierarchical_conv1d_backward(Tensor grad, Tensor x, Tensor out, Tensor[] kept, Tensor[] weights, Tensor[]? biases, "
    f"Tensor[]? affine_scale, Tensor[]? affine_shift, {_CHAIN}, bool[] needed) -> Tensor[]",
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
    activation: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """The add-then-convolve chain along rows, as in ECAPA-TDNN: y_i = scale_i * act(K_i (x_i + y_{i-1}) + b_i) + shift_i.

    x: (N, s*w, L), fp32, fp64, fp16 or bf16.
    weights: one tensor (w, w, k) with an odd k for each convolution, one for each group but the passed one.
    biases: None, or one tensor (w,) for each convolution, of x's dtype or fp32.
    affine_scale, affine_shift: both None, or as biases: the affine map of a BatchNorm that comes after the activation.
    passthrough: the group without a convolution: "last", "none", "first", or "first_added" (added to the next as well).
    padding_mode: what stands beyond the ends of a row: "zeros", or "reflect" as in torch.nn.functional.pad.
    dilation: of the convolutions, whose padding is dilation * (k // 2).
    activation: behind each convolution, as in `hierarchical_conv2d`.
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
    config = Chain1dConfig(dilation, passthrough, padding_mode, activation)
    return call_1d(x, Chain1dWeights(weights, biases, affine_scale, affine_shift), config, backend)


def call_1d(x: Tensor, chain: Chain1dWeights, config: Chain1dConfig, backend: str) -> Tensor:
    """Calls the operator on x (N, s*w, L), with arguments that are tensors and weights that may be packed.

    chain: the tensors. config: the settings. backend: as for `hierarchical_conv1d`, which says what is raised.
    """
    lists = chain.weights, chain.biases, chain.scale, chain.shift
    if why_written() is not None:
        return reference.hierarchical_conv1d(x, *lists, config)
    tensors = (x, *(tensor for values in lists for tensor in values or ()))
    if not is_compiling():
        one_of("backend", backend, BACKENDS)
        if forward_mode():
            return _differentiable(x, *lists, None, *_last_arguments(config, False, backend))[0]
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return torch.ops.res2net_fused.hierarchical_conv1d.default(
        x, *lists, chain.packed, *_last_arguments(config, keep, backend)
    )[0]


def _last_arguments(config: Chain1dConfig, keep: bool, backend: str) -> tuple[object, ...]:
    """The operator's last arguments, in their order."""
    return config.dilation, config.passthrough, config.padding_mode, keep, backend, config.activation


def _config_of(settings: Sequence[Any]) -> tuple[Chain1dConfig, bool, str]:
    """What `_last_arguments` was given: config, keep, backend."""
    dilation, passthrough, padding_mode, keep, backend, *activation = settings  # none from programs of 0.1.0
    return _cached_config(dilation, passthrough, padding_mode, *activation), keep, backend


# Kernels --------------------------------------------------------------------------------------------------------------


def _chosen(x, weights, biases, affine_scale, affine_shift, packed, *settings) -> tuple[Chain1dProblem, str]:
    config, keep, backend = _config_of(settings)
    problem = check_arguments_1d(x, weights, biases, affine_scale, affine_shift, config)
    if packed:
        check_devices(x, packed=packed)
    tensors = weights, biases, affine_scale, affine_shift

    def run(by: Backend, p: Chain1dProblem, x: Tensor, *given: Any) -> list[Tensor]:
        out, kept = by.forward_1d(p, x, Chain1dWeights(*given), keep)
        return [out, *kept]

    chosen = confirmed("forward_1d", partial(choose, problem, backend, "plain"), problem, [x], list(tensors), run)
    return problem, chosen.name


def _run(problem: Chain1dProblem, backend: str, x, weights, biases, affine_scale, affine_shift, packed, *settings):
    _, keep, _ = _config_of(settings)
    chain = Chain1dWeights(weights, biases, affine_scale, affine_shift, packed)
    out, kept = get_backend(backend).forward_1d(problem, x, chain, keep)
    return [out, *kept]


register_kernel("hierarchical_conv1d", _chosen, _run)


@fake_of("hierarchical_conv1d")
def _fake(x, weights, biases, affine_scale, affine_shift, packed, *settings) -> list[Tensor]:
    config, keep, _ = _config_of(settings)
    problem = check_arguments_1d(x, weights, biases, affine_scale, affine_shift, config)
    shape = problem.batch, problem.width, problem.length
    kept = [x.new_empty(shape) for _ in weights] if keep else []
    return [x.new_empty(x.shape), *kept]


# Gradients, autocast and FLOPs ----------------------------------------------------------------------------------------


def _gradients(grad, x, out, kept, weights, biases, affine_scale, affine_shift, *settings) -> Sequence[Any]:
    devices = dict(kept=kept, weights=weights, biases=biases, affine_scale=affine_scale, affine_shift=affine_shift)
    check_devices(x, grad=grad, out=out, **devices)
    return _differentiable_gradients(grad, x, out, kept, weights, biases, affine_scale, affine_shift, *settings, in_place=True)


def _differentiable(x, weights, biases, affine_scale, affine_shift, packed, *settings) -> list[Tensor]:
    problem = check_arguments_1d(x, weights, biases, affine_scale, affine_shift, _config_of(settings)[0])
    return [reference.hierarchical_conv1d(x, weights, biases, affine_scale, affine_shift, problem.config)]


def _differentiable_gradients(
    grad, x, out, kept, weights, biases, affine_scale, affine_shift, *settings, in_place=False
) -> Sequence[Any]:
    *chain, needed = settings
    config = _cached_config(*chain).clamped_to(x.shape[2])
    return chain_backward_1d(grad, x, out, kept, weights, biases, affine_scale, affine_shift, config, needed, in_place)


def _kept(inputs: Sequence[Any], output: Sequence[Tensor]) -> tuple[Sequence[Any], Sequence[object]]:
    x, weights, biases, affine_scale, affine_shift, _, *settings = inputs
    out, *kept = output
    return (x, out, kept, weights, biases, affine_scale, affine_shift), tuple(_config_of(settings)[0].as_kwargs().values())


def _cast(dtype: torch.dtype, x, weights, biases, affine_scale, affine_shift, packed, *settings) -> tuple[object, ...]:
    packed = packed if weights[0].dtype == dtype else None
    return cast_convolution(dtype, x, weights, biases, affine_scale, affine_shift, packed, *settings)


register_backward("hierarchical_conv1d", _gradients, _differentiable_gradients, like=(1, 4, 5, 6, 7), kept=_kept)
register_transforms("hierarchical_conv1d", _differentiable, folds=True)
register_autocast("hierarchical_conv1d", _cast)
register_flops("hierarchical_conv1d", weights=4)


def _decomposed(x, weights, biases, affine_scale, affine_shift, packed, *settings) -> list[Tensor]:
    config, keep, _ = _config_of(settings)
    kept: list[Tensor] = []
    out = reference.hierarchical_conv1d(x, weights, biases, affine_scale, affine_shift, config, kept)
    return [out.contiguous(), *(kept if keep else ())]


register_decomposition("hierarchical_conv1d", _decomposed, _fake)
