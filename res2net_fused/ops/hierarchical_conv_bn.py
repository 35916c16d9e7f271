"""The operator `res2net_fused::hierarchical_conv_bn`, the chain with BatchNorm in training mode: its registration with PyTorch.

It mutates nothing: batch statistics are outputs, from which the caller updates running statistics (`modules/training.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..backends.base import Backend
from ..backends.selection import choose_for_training
from ..backends.verification import confirmed
from ..chain import reference
from ..chain.activations import CLAMPS, shows_slope
from ..chain.batch_norm import (
    Statistics,
    train_backward,
    train_backward_by_aten,
    train_differentiable,
    train_forward,
    wide_dtype,
)
from ..chain.checks import check_chain, check_vectors
from ..chain.memory_format import as_suggested, memory_format, with_format
from ..chain.problem import ChainProblem
from ._library import (
    SETTINGS,
    SEVERAL_PROCESSES,
    TAGS,
    cached_config,
    config_for,
    fake_of,
    forward_mode,
    kernel_of,
    library,
    needed_only,
    no_derivative,
    refuse_tangents,
    register_autocast,
    register_backward,
    register_decomposition,
    register_flops,
    register_transforms,
)

# -> [out, mean, invstd, variance, *z]; z is left out where `recompute` says so.
library.define(
    "hierarchical_conv_bn(Tensor x, Tensor[] weights, Tensor[] gammas, Tensor[] betas, float[] eps, "
    f"{SETTINGS}, bool recompute, str backend, str group) -> Tensor[]",
    tags=TAGS,
)
library.define(
    "hierarchical_conv_bn_backward(Tensor grad, Tensor x, Tensor out, Tensor[] z, Tensor mean, Tensor invstd, "
    f"Tensor[] weights, Tensor[] gammas, float[] eps, {SETTINGS}, str backend, str group, bool[] needed) -> Tensor[]",
    tags=TAGS,
)


@dataclass
class ConvBnOutput:
    """What `hierarchical_conv_bn` returns. out: (N, s*w, H', W'). statistics: of the batch, without gradients."""

    out: Tensor
    statistics: Statistics


def hierarchical_conv_bn(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    hierarchical: bool = True,
    passthrough: str = "last",
    pool: str | None = None,
    activation: str = "relu",
    recompute: bool = False,
    backend: str = "auto",
    group: str = "",
) -> ConvBnOutput:
    """The chain of `hierarchical_conv2d` with BatchNorm in training mode between each convolution and its activation.

    x, weights and the settings: as for `hierarchical_conv2d`. gammas, betas: of BatchNorm, each (w,), of x's dtype or fp32.
    eps: of BatchNorm, one for each convolution. recompute: whether backward convolves again rather than keep the outputs.
    group: name of the process group of torch.distributed over which statistics are taken, as nn.SyncBatchNorm does; "" for this
        process alone. All processes of the group must make the same calls; gradients of gammas and betas are of this process.

    Kept for backward are x, the output, the statistics and, unless `recompute`, the convolutions' outputs.
    Raises ValueError or TypeError for arguments that do not fit, also for a single value per channel, RuntimeError where an
    explicit backend cannot run.
    """
    keep = not recompute and torch.is_grad_enabled()
    settings = (stride, dilation, groups, hierarchical, passthrough, pool, activation)
    arguments = x, weights, gammas, betas, eps, *settings, not keep, backend, group
    differentiable = not is_compiling() and forward_mode()
    operator = _differentiable if differentiable else torch.ops.res2net_fused.hierarchical_conv_bn.default
    out, mean, invstd, variance, *_ = operator(*arguments)
    return ConvBnOutput(out, Statistics(mean, invstd, variance))


def _check(x, weights, gammas, betas, eps, chain, group) -> None:
    config = cached_config(*chain)
    check_chain(x, weights, None, config)
    if not shows_slope(config.activation):
        raise ValueError(
            f"activation is {config.activation!r}; with batch statistics allowed are those whose output shows the "
            f"derivative: {', '.join(map(repr, CLAMPS))} and 'leaky_relu' with a slope of 0 or more"
        )
    steps, width, pixels = len(weights), weights[0].shape[0], tuple(map(config.output_size, x.shape[2:]))
    for name, values in (("gammas", gammas), ("betas", betas)):
        check_vectors(name, values, steps, width, x)
    if len(eps) != steps:
        raise ValueError(f"eps holds {len(eps)} values; weights holds {steps}, and both must match")
    if not group and x.shape[0] * pixels[0] * pixels[1] <= 1:
        size = x.shape[0], width, *pixels
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")  # as F.batch_norm


def _problem(x, weights, chain) -> ChainProblem:
    return ChainProblem.from_tensor(x, weights[0].shape[0], len(weights), cached_config(*chain))


# Kernels --------------------------------------------------------------------------------------------------------------


@kernel_of("hierarchical_conv_bn")
def _forward(x, weights, gammas, betas, eps, *settings) -> list[Tensor]:
    refuse_tangents("hierarchical_conv_bn", x, weights, gammas, betas)
    *chain, recompute, backend, group = settings
    _check(x, weights, gammas, betas, eps, chain, group)
    problem = _problem(x, weights, chain)

    def run(by: Backend, p: ChainProblem, x: Any, weights: Any, gammas: Any, betas: Any) -> list[Tensor]:
        out, found, z = train_forward(by, p, x, weights, gammas, betas, eps, not recompute)
        return [out, found.mean * found.invstd + 1, found.invstd, found.variance, *z]  # a mean may be 0, but for rounding

    choose = partial(choose_for_training, problem, backend)
    chosen = confirmed("train_forward", choose, problem, [x], [weights, gammas, betas], run, whole=True)
    out, statistics, z = train_forward(chosen, problem, x, weights, gammas, betas, eps, not recompute, group)
    out, *z = (with_format(t, problem.channels_last) for t in (out, *z))
    return [out, statistics.mean, statistics.invstd, statistics.variance, *z]


@fake_of("hierarchical_conv_bn")
def _fake(x, weights, gammas, betas, eps, *settings) -> list[Tensor]:
    *chain, recompute, _, group = settings
    _check(x, weights, gammas, betas, eps, chain, group)
    problem = _problem(x, weights, chain)
    pixels = problem.output_height, problem.output_width

    def like_x(channels: int) -> Tensor:
        shape = problem.batch, channels, *pixels
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))

    def statistic() -> Tensor:
        return torch.empty(problem.steps, problem.width, dtype=wide_dtype(x.dtype), device=x.device)

    z = [] if recompute else [like_x(problem.width) for _ in range(problem.steps)]
    return [like_x(x.shape[1]), statistic(), statistic(), statistic(), *z]


# Gradients, autocast and FLOPs ----------------------------------------------------------------------------------------


def _gradients(grad, x, out, z, mean, invstd, weights, gammas, eps, *settings) -> Sequence[Any]:
    *chain, backend, group, needed = settings
    problem = _problem(x, weights, chain)

    def run(by: Backend, p: ChainProblem, *tensors: Any) -> list[Tensor]:
        arguments: Any = (by, p, *tensors, eps, needed)
        return needed_only(train_backward(*arguments), needed)

    choose = partial(choose_for_training, problem, backend)
    given: list[Any] = [mean, invstd, weights, gammas]
    chosen = confirmed("train_backward", choose, problem, [grad, x, out, z], given, run, whole=True)
    return train_backward(chosen, problem, grad, x, out, z, mean, invstd, weights, gammas, eps, needed, group)


def _differentiable(x, weights, gammas, betas, eps, *settings) -> list[Tensor]:
    *chain, _, _, group = settings
    if group:
        raise no_derivative("hierarchical_conv_bn", SEVERAL_PROCESSES)
    _check(x, weights, gammas, betas, eps, chain, group)
    out, statistics = train_differentiable(x, weights, gammas, betas, eps, config_for(x, chain))
    return [out, statistics.mean, statistics.invstd, statistics.variance]


def _differentiable_gradients(grad, x, out, z, mean, invstd, weights, gammas, eps, *settings) -> Sequence[Any] | None:
    *chain, _, group, needed = settings
    if group:
        return None
    return train_backward_by_aten(None, config_for(x, chain), grad, x, out, [], mean, invstd, weights, gammas, eps, needed)


def _kept(inputs: Sequence[Any], output: Sequence[Tensor]) -> tuple[Sequence[Any], Sequence[object]]:
    x, weights, gammas, _, eps, *settings = inputs
    out, mean, invstd, _, *z = output
    *chain, _, backend, group = settings
    return (x, out, z, mean, invstd, weights, gammas), (eps, *chain, backend, group)


register_backward("hierarchical_conv_bn", _gradients, _differentiable_gradients, like=(1, 6, 7, 7), kept=_kept)
register_transforms("hierarchical_conv_bn", _differentiable, folds=False)
register_autocast("hierarchical_conv_bn")
register_flops("hierarchical_conv_bn", weights=6, kept=3)


def _decomposed(x, weights, gammas, betas, eps, *settings) -> list[Tensor]:
    *chain, recompute, _, _ = settings  # no graph has a group: see `_why_not_synchronised`
    z: list[Tensor] = []
    out = reference.hierarchical_conv_bn(x, weights, gammas, betas, eps, cached_config(*chain), z)
    moments = [torch.var_mean(t.to(wide_dtype(x.dtype)), (0, 2, 3)) for t in z]
    variance, mean = (torch.stack(values) for values in zip(*moments, strict=True))  # (steps, w)
    count = z[0].numel() // z[0].shape[1]
    invstd = torch.stack([(v * ((count - 1) / count) + e).rsqrt() for v, e in zip(variance, eps, strict=True)])
    return [as_suggested(out, x), mean, invstd, variance, *([] if recompute else (as_suggested(t, x) for t in z))]


register_decomposition("hierarchical_conv_bn", _decomposed, _fake)
