"""The operator `res2net_fused::hierarchical_conv_bn`, the chain with BatchNorm in training mode: its registration with PyTorch.

It mutates nothing: batch statistics are outputs, from which the caller updates running statistics (`modules/training.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.selection import choose_for_training, get_backend
from ..chain.activations import CLAMPS, shows_slope
from ..chain.batch_norm import Statistics, train_backward, train_forward, wide_dtype
from ..chain.checks import check_arguments, check_vectors
from ..chain.memory_format import memory_format, with_format
from ..chain.problem import ChainProblem
from ._library import SETTINGS, TAGS, cached_config, library, register_autocast, register_backward, register_flops

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
    out, mean, invstd, variance, *_ = torch.ops.res2net_fused.hierarchical_conv_bn.default(
        x, weights, gammas, betas, eps, *settings, not keep, backend, group
    )
    return ConvBnOutput(out, Statistics(mean, invstd, variance))


def _check(x, weights, gammas, betas, eps, chain, group) -> ChainProblem:
    problem = check_arguments(x, weights, None, cached_config(*chain))
    if not shows_slope(problem.config.activation):
        raise ValueError(
            f"activation is {problem.config.activation!r}; with batch statistics allowed are those whose output shows the "
            f"derivative: {', '.join(map(repr, CLAMPS))} and 'leaky_relu' with a slope of 0 or more"
        )
    for name, values in (("gammas", gammas), ("betas", betas)):
        check_vectors(name, values, problem.steps, problem.width, x)
    if len(eps) != problem.steps:
        raise ValueError(f"eps holds {len(eps)} values; weights holds {problem.steps}, and both must match")
    if not group and problem.batch * problem.output_height * problem.output_width <= 1:
        size = problem.batch, problem.width, problem.output_height, problem.output_width
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")  # as F.batch_norm
    return problem


# Kernels --------------------------------------------------------------------------------------------------------------


@functools.partial(library.impl, "hierarchical_conv_bn", dispatch_key="CompositeExplicitAutograd")
def _forward(x, weights, gammas, betas, eps, *settings) -> list[Tensor]:
    *chain, recompute, backend, group = settings
    problem = _check(x, weights, gammas, betas, eps, chain, group)
    chosen = get_backend(choose_for_training(problem, backend).name)
    out, statistics, z = train_forward(chosen, problem, x, weights, gammas, betas, eps, not recompute, group)
    out, *z = (with_format(t, problem.channels_last) for t in (out, *z))
    return [out, statistics.mean, statistics.invstd, statistics.variance, *z]


@torch.library.register_fake("res2net_fused::hierarchical_conv_bn", lib=library)
def _fake(x, weights, gammas, betas, eps, *settings) -> list[Tensor]:
    *chain, recompute, _, group = settings
    problem = _check(x, weights, gammas, betas, eps, chain, group)
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
    problem = ChainProblem.from_tensor(x, weights[0].shape[0], len(weights), cached_config(*chain))
    chosen = get_backend(choose_for_training(problem, backend).name)
    return train_backward(chosen, problem, grad, x, out, z, mean, invstd, weights, gammas, eps, needed, group)


def _kept(inputs: Sequence[Any], output: Sequence[Tensor]) -> tuple[Sequence[Any], Sequence[object]]:
    x, weights, gammas, _, eps, *settings = inputs
    out, mean, invstd, _, *z = output
    *chain, _, backend, group = settings
    return (x, out, z, mean, invstd, weights, gammas), (eps, *chain, backend, group)


register_backward("hierarchical_conv_bn", _gradients, like=(1, 6, 7, 7), kept=_kept)
register_autocast("hierarchical_conv_bn")
register_flops("hierarchical_conv_bn", weights=6, kept=3)
