"""The operator `res2net_fused::hierarchical_conv_bn`, the chain with BatchNorm in training mode: its registration with PyTorch.

It mutates nothing: batch statistics are outputs, from which the caller updates running statistics (`modules/training.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..backends.selection import choose_for_training, get_backend
from ..chain.batch_norm import Statistics, train_backward, train_forward, wide_dtype
from ..chain.checks import check_arguments, describe
from ..chain.memory_format import in_format_of, memory_format, with_format
from ..chain.problem import ChainProblem
from ._library import SETTINGS, TAGS, cached_config, convolution_flops, library, refuse_second_derivative, register_autocast

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
    for name, values in (("gammas", gammas), ("betas", betas), ("eps", eps)):
        if len(values) != problem.steps:
            raise ValueError(f"{name} holds {len(values)} values; weights holds {problem.steps}, and both must match")
    for name, values in (("gammas", gammas), ("betas", betas)):
        for i, value in enumerate(values):
            if tuple(value.shape) != (problem.width,) or value.device != x.device:
                raise ValueError(f"{name}[{i}] is {describe(value)}; ({problem.width},) on {x.device} is needed")
            if value.dtype not in (x.dtype, torch.float32):
                raise TypeError(f"{name}[{i}] is {value.dtype}; allowed are {x.dtype} (as x) and torch.float32")
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


@functools.partial(library.impl, "hierarchical_conv_bn_backward", dispatch_key="CompositeExplicitAutograd")
def _backward_kernel(grad, x, out, z, mean, invstd, weights, gammas, eps, *settings) -> list[Tensor]:
    *chain, backend, group, needed = settings
    problem = ChainProblem.from_tensor(x, weights[0].shape[0], len(weights), cached_config(*chain))
    chosen = get_backend(choose_for_training(problem, backend).name)
    return train_backward(chosen, problem, grad, x, out, z, mean, invstd, weights, gammas, eps, needed, group)


@torch.library.register_fake("res2net_fused::hierarchical_conv_bn_backward", lib=library)
def _backward_fake(grad, x, out, z, mean, invstd, weights, gammas, eps, *settings) -> list[Tensor]:
    need_x, need_weights, need_gammas, need_betas = settings[-1]
    results = []
    if need_x:
        results.append(torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x)))
    if need_weights:
        results += [in_format_of(weight.new_empty(weight.shape, dtype=x.dtype), weight) for weight in weights]
    for needs in (need_gammas, need_betas):
        if needs:
            results += [gamma.new_empty(gamma.shape) for gamma in gammas]
    return results


# Autograd -------------------------------------------------------------------------------------------------------------


def _save_for_backward(ctx, inputs, output) -> None:
    x, weights, gammas, _, eps, *settings = inputs
    out, mean, invstd, variance, *z = output
    *chain, _, backend, group = settings
    ctx.arguments = eps, chain, backend, group
    ctx.counts = len(weights), len(z)
    ctx.mark_non_differentiable(mean, invstd, variance, *z)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, out, mean, invstd, *weights, *gammas, *z)


def _backward(ctx, grads):
    eps, chain, backend, group = ctx.arguments
    steps, kept = ctx.counts
    nothing = [None] * steps
    results = [None, nothing, nothing, nothing]
    if grads[0] is not None:
        x, out, mean, invstd, *rest = ctx.saved_tensors
        weights, gammas, z = rest[:steps], rest[steps : 2 * steps], rest[2 * steps :]
        needed = [needs if isinstance(needs, bool) else any(needs) for needs in ctx.needs_input_grad[:4]]
        gradients = iter(
            torch.ops.res2net_fused.hierarchical_conv_bn_backward.default(
                grads[0], x, out, z, mean, invstd, weights, gammas, eps, *chain, backend, group, needed
            )
        )
        results[0] = next(gradients) if needed[0] else None
        for i in (1, 2, 3):
            if needed[i]:
                results[i] = [next(gradients) for _ in range(steps)]
    return *results, None, *[None] * (len(chain) + 3)


torch.library.register_autograd("res2net_fused::hierarchical_conv_bn", _backward, setup_context=_save_for_backward, lib=library)
refuse_second_derivative("hierarchical_conv_bn")


# Autocast: x and the convolution weights only; BatchNorm's parameters stay as they are -----------------------------------


def _cast(dtype: torch.dtype, x, weights, *rest) -> tuple[object, ...]:
    return x.to(dtype), [weight.to(dtype) for weight in weights], *rest


register_autocast("hierarchical_conv_bn", _cast)


# FLOPs ----------------------------------------------------------------------------------------------------------------


@register_flop_formula(torch.ops.res2net_fused.hierarchical_conv_bn)
def _forward_flops(x_shape, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    return convolution_flops(weight_shapes, out_shape[0])


@register_flop_formula(torch.ops.res2net_fused.hierarchical_conv_bn_backward)
def _backward_flops(grad_shape, x, out, z, mean, invstd, weight_shapes, *args, out_shape=None, **kwargs) -> int:
    need_x, need_weights, *_ = args[-1]
    convolved_again = not z
    return (need_x + need_weights + convolved_again) * convolution_flops(weight_shapes, grad_shape)
