"""The operator `res2net_fused::hierarchical_conv2d`: the one place where it is registered with PyTorch.

Schema, kernel (any device), fake, autograd with a backward operator of its own, autocast and flop formulas. The kernel's body
checks the arguments and asks `backends.selection` for a backend; nothing of that happens while a graph is traced.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends.base import BACKENDS, Backend
from ..backends.selection import Choice, backend_of_gradients, choose, get_backend
from ..backends.verification import confirmed
from ..chain import reference
from ..chain.backward import chain_backward
from ..chain.checks import check_arguments, check_chain, check_types
from ..chain.config import ChainConfig, one_of
from ..chain.convolver import ATEN, Convolver
from ..chain.memory_format import as_suggested, memory_format, with_format
from ..chain.problem import ChainProblem
from ._library import (
    SETTINGS,
    TAGS,
    cached_config,
    cast_convolution,
    check_devices,
    config_for,
    fake_of,
    forward_mode,
    library,
    needed_only,
    register_autocast,
    register_backward,
    register_decomposition,
    register_flops,
    register_kernel,
    register_transforms,
)
from .measured_chain import measure_if_asked
from .packed_weights import PackedWeights
from .recording import why_written

library.define(
    "hierarchical_conv2d_backward(Tensor grad, Tensor x, Tensor out, Tensor[] weights, Tensor[]? biases, "
    f"{SETTINGS}, str backend, bool[] needed) -> Tensor[]",
    tags=TAGS,
)


def hierarchical_conv2d(
    x: Tensor,
    weights: Sequence[Tensor] | PackedWeights,
    biases: Sequence[Tensor] | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    hierarchical: bool = True,
    passthrough: str = "last",
    pool: str | None = None,
    activation: str = "relu",
    backend: str = "auto",
) -> Tensor:
    """The add-then-convolve chain of Res2Net (arXiv:1904.01169, equation 1) in one operator.

    x: (N, s*w, H, W), fp32, fp64, fp16 or bf16; channels-last is the native memory format.
    weights: one tensor (w, w/groups, 3, 3) for each convolution, or what `pack_weights` returned (for inference; it
        carries biases, stride, dilation and groups with it). One for each group but the passed one.
    biases: None, or one tensor (w,) for each convolution, of x's dtype or fp32.
    stride, dilation, groups: of the 3x3 convolutions, whose padding is `dilation`.
    hierarchical: whether y_{i-1} is added to x_i; False in a 'stage' block, which alone may have a stride.
    passthrough: the group without a convolution: "last", "none", "first", or "first_added" (added to the next as well).
    pool: on the pass-through: None, "avg3" (AvgPool2d(3, stride, padding=1)), "avg3_nopad" (padding not counted) or
        "max3" (MaxPool2d(3, stride, padding=1)).
    activation: behind each convolution: "relu", "none", "hardtanh20" (clamp to 0 ... 20), "relu6", "leaky_relu" (of slope 0.01,
        or "leaky_relu:0.1" of another), "hardswish", "silu", "gelu", "gelu_tanh" (its approximation) or "mish".
    backend: "auto", "reference", "triton", "cpu" or "cuda"; with "auto" the variable RES2NET_FUSED_BACKEND decides.

    Returns (N, s*w, ceil(H/stride), ceil(W/stride)) in x's dtype and suggested memory format.
    Raises ValueError or TypeError for arguments that do not fit, RuntimeError where an explicit backend cannot run.
    """
    packed, layout = None, "plain"
    if isinstance(weights, PackedWeights):
        check_types(x, weights.weights, None)
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("weights is packed, which is for inference only, but x requires grad; pass a list of tensors")
        settings = weights.settings(biases=biases, stride=stride, dilation=dilation, groups=groups)
        stride, dilation, groups = settings
        packed, layout = weights.packed, weights.layout
        biases = weights.biases
        weights = weights.weights
    else:
        check_types(x, weights, biases)
    if why_written() is not None:
        config = ChainConfig(stride, dilation, groups, hierarchical, passthrough, pool, activation)
        return reference.hierarchical_conv2d(x, weights, biases, config)
    if not is_compiling():
        if backend != "auto":
            one_of("backend", backend, BACKENDS)
        _check_settings(stride, dilation, groups, hierarchical, passthrough, pool, activation)  # its errors, not the schema's
        if forward_mode():
            chain = stride, dilation, groups, hierarchical, passthrough, pool, activation
            return _differentiable(x, weights, biases, None, "plain", *chain, backend)
    return torch.ops.res2net_fused.hierarchical_conv2d.default(
        x, weights, biases, packed, layout, stride, dilation, groups, hierarchical, passthrough, pool, activation, backend
    )


_known_settings = functools.lru_cache(typed=True)(ChainConfig)  # typed: True is no 1


def _check_settings(*settings: Any) -> None:
    """Raises what `ChainConfig` does for such settings."""
    try:
        _known_settings(*settings)
    except TypeError:  # also of what has no hash
        ChainConfig(*settings)


def _output_shape(problem: ChainProblem) -> tuple[int, int, int, int]:
    return problem.batch, problem.scale * problem.width, problem.output_height, problem.output_width


def _chosen(x, weights, biases, packed, layout, *settings) -> tuple[ChainProblem, str]:
    *chain, backend = settings
    problem = check_arguments(x, weights, biases, cached_config(*chain))
    if packed:
        check_devices(x, packed=packed)
    measure_if_asked(problem, backend, weights, biases)

    def run(by: Backend, p: ChainProblem, x: Tensor, weights: list[Tensor], biases: list[Tensor] | None) -> list[Tensor]:
        return [by.forward(p, x, weights, biases, by.pack(weights, biases, p.config) if packed else None)]

    chosen = confirmed("forward", functools.partial(choose, problem, backend, layout), problem, [x], [weights, biases], run)
    return problem, chosen.name


def _run(problem: ChainProblem, backend: str, x, weights, biases, packed, layout, *settings) -> Tensor:
    if problem.batch == 0:
        return x.new_empty(_output_shape(problem))
    out = get_backend(backend).forward(problem, x, weights, biases, packed if layout == backend else None)
    return with_format(out, problem.channels_last)


register_kernel("hierarchical_conv2d", _chosen, _run, lambda *arguments: arguments[4] if arguments[3] else "")


@fake_of("hierarchical_conv2d")
def _fake(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, packed: object, layout: str, *settings):
    *chain, _ = settings
    problem = check_arguments(x, weights, biases, cached_config(*chain))
    return torch.empty(_output_shape(problem), dtype=x.dtype, device=x.device, memory_format=memory_format(x))


# Gradients, autocast and FLOPs ----------------------------------------------------------------------------------------


def _gradients(grad, x, out, weights, biases, *settings) -> Sequence[Any]:
    *chain, backend, needed = settings
    check_devices(x, grad=grad, out=out, weights=weights, biases=biases)
    problem = ChainProblem.from_tensor(x, weights[0].shape[0], len(weights), cached_config(*chain))

    def chosen(against: Mapping[str, str]) -> Choice:
        own = backend_of_gradients(problem, backend, against)
        return Choice("reference" if own is None else own.name)

    def run(by: Backend, p: ChainProblem, *tensors: Any) -> list[Tensor]:
        arguments: Any = (*tensors, p.config, needed) if by.name == "reference" else (p, *tensors, needed)
        return needed_only((chain_backward if by.name == "reference" else by.chain_backward)(*arguments), needed)

    own = confirmed("backward", chosen, problem, [grad, x, out], [weights], run, whole=True)
    if own.name != "reference":
        return own.chain_backward(problem, grad, x, out, weights, needed)
    convolver: Convolver = ATEN
    if problem.config.stride == 1:
        convolver = get_backend(choose(ChainProblem.for_convolution(out, weights[0], problem.config)).name)
    return chain_backward(grad, x, out, weights, problem.config, needed, convolver, biases)


def _differentiable(x, weights, biases, packed, layout, *settings) -> Tensor:
    *chain, _ = settings
    check_chain(x, weights, biases, cached_config(*chain))
    return reference.hierarchical_conv2d(x, weights, biases, config_for(x, chain))


def _differentiable_gradients(grad, x, out, weights, biases, *settings) -> Sequence[Any]:
    *chain, _, needed = settings
    return chain_backward(grad, x, out, weights, config_for(x, chain), needed, None, biases)


def _kept(inputs: Sequence[Any], out: Tensor) -> tuple[Sequence[Any], Sequence[object]]:
    x, weights, biases, _, _, *settings = inputs
    return (x, out, weights, biases), settings


def _cast(dtype: torch.dtype, x, weights, biases, packed, layout, *settings) -> tuple[object, ...]:
    if weights[0].dtype != dtype:
        packed, layout = None, "plain"
    return cast_convolution(dtype, x, weights, biases, packed, layout, *settings)


register_backward("hierarchical_conv2d", _gradients, _differentiable_gradients, like=(1, 3, 4), kept=_kept)
register_transforms("hierarchical_conv2d", _differentiable, folds=True)
register_autocast("hierarchical_conv2d", _cast)
register_flops("hierarchical_conv2d", weights=3)


def _decomposed(x, weights, biases, packed, layout, *settings) -> Tensor:
    *chain, _ = settings
    return as_suggested(reference.hierarchical_conv2d(x, weights, biases, cached_config(*chain)), x)


register_decomposition("hierarchical_conv2d", _decomposed, _fake)
