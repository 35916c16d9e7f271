"""The operator `res2net_fused::bottle2neck`: the whole block, for inference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..backends.base import Backend, PreparedBlock, run_block
from ..backends.selection import choose, get_backend
from ..backends.verification import confirmed
from ..chain import reference
from ..chain.block_weights import BlockWeights
from ..chain.checks import check_weights, describe
from ..chain.config import ChainConfig
from ..chain.memory_format import as_suggested, memory_format
from ..chain.problem import ChainProblem
from ._library import (
    cached_config,
    check_devices,
    config_for,
    convolution_flops,
    fake_of,
    library,
    register_decomposition,
    register_kernel,
    register_transforms,
)

# The whole block, for inference -----------------------------------------------------------------------------------------


def fused_bottle2neck(
    x: Tensor, shortcut: Tensor | None, folded: BlockWeights, relu: bool, config: ChainConfig, backend: str
) -> Tensor:
    """Runs conv1 + ReLU, the chain, conv3, + shortcut, ReLU if `relu`; x (N, inplanes, H, W) -> (N, planes * 4, H', W').

    Where `folded` has a projection, `shortcut` is what that reads. config: of the chain. backend: as for `hierarchical_conv2d`.
    Raises ValueError or TypeError for tensors that do not fit, RuntimeError where an explicit backend cannot run.
    """
    f = folded
    return torch.ops.res2net_fused.bottle2neck.default(
        x, shortcut, f.conv1_weight, f.conv1_bias, f.weights, f.biases, f.conv3_weight, f.conv3_bias, f.projection_weight,
        f.projection_bias, f.projection_stride, f.packed, f.layout, relu, *config.as_kwargs().values(), backend,
    )  # fmt: skip


def prepared_bottle2neck(
    x: Tensor, folded: BlockWeights, relu: bool, config: ChainConfig, backend: str
) -> PreparedBlock | None:
    """What `fused_bottle2neck` has run for this x (N, inplanes, H, W), for others like it outside autograd.

    folded, relu, config, backend: as that was given them. Returns None where it has to be asked at each call.
    """
    problem = ChainProblem.from_tensor(x, folded.weights[0].shape[0], len(folded.weights), config, folded.around)
    name = choose(problem, backend, folded.layout).name
    return get_backend(name).prepared_block(problem, folded, relu) if name == folded.layout and problem.batch else None


def _problem(
    x: Tensor, shortcut: Tensor | None, folded: BlockWeights, packed: Sequence[Tensor] | None, config: ChainConfig
) -> ChainProblem:
    """Checks conv1 against x, the chain against conv1 and all devices, and describes the chain inside."""
    conv1_weight, weights = folded.conv1_weight, folded.weights
    if x.dim() != 4 or conv1_weight.dim() != 4 or x.shape[1] != conv1_weight.shape[1]:
        raise ValueError(
            f"x is {describe(x)} and conv1_weight is {describe(conv1_weight)}; (N, C, H, W) and (s*w, C, 1, 1) are needed"
        )
    width = check_weights(weights, folded.biases, config)
    if conv1_weight.shape[0] != config.scale(len(weights)) * width:
        raise ValueError(f"conv1_weight is {describe(conv1_weight)}; {len(weights)} weights of width {width} follow it")
    check_devices(
        x, shortcut=shortcut, conv1_weight=conv1_weight, conv1_bias=folded.conv1_bias, weights=weights[:1],
        conv3_weight=folded.conv3_weight, conv3_bias=folded.conv3_bias, projection_weight=folded.projection_weight,
        projection_bias=folded.projection_bias, packed=packed,
    )  # fmt: skip
    problem = ChainProblem.from_tensor(x, width, len(weights), config, folded.around)
    if shortcut is not None:
        _check_shortcut(shortcut, folded, (problem.batch, problem.output_height, problem.output_width))
    return problem


def _check_shortcut(shortcut: Tensor, folded: BlockWeights, out: tuple[int, int, int]) -> None:
    """out: N, H' and W'. The kernels add and project without broadcasting."""
    projection, stride = folded.projection_weight, folded.projection_stride
    channels = folded.conv3_weight.shape[0] if projection is None else projection.shape[1]
    if projection is None:
        stride = 1
    batch, found, *size = shortcut.shape if shortcut.dim() == 4 else (0, 0, 0, 0)
    if (batch, found, *((n - 1) // stride + 1 for n in size)) != (out[0], channels, *out[1:]):
        before = "" if projection is None else f" before a projection of stride {stride}"
        raise ValueError(f"shortcut is {describe(shortcut)}; {(out[0], channels, *out[1:])}{before} is needed")


def _chosen(x, shortcut, *rest) -> tuple[ChainProblem, str]:
    *tensors, packed, layout, relu = rest[:12]
    *chain, backend = rest[12:]
    problem = _problem(x, shortcut, BlockWeights(*tensors), packed, cached_config(*chain))

    def run(by: Backend, p: ChainProblem, x: Tensor, shortcut: Tensor | None, *given: Any) -> list[Tensor]:
        plain = BlockWeights(*given)
        plain.packed = by.pack_block(plain, p.config) if packed else None
        return [run_block(by, p, x, shortcut, plain, relu)]

    chosen = confirmed("block", partial(choose, problem, backend, layout), problem, [x, shortcut], tensors, run)
    return problem, chosen.name


def _run(problem: ChainProblem, backend: str, x, shortcut, *rest) -> Tensor:
    *tensors, packed, layout, relu = rest[:12]
    folded = BlockWeights(*tensors)
    if layout == backend:
        folded.packed, folded.layout = packed, layout
    return run_block(get_backend(backend), problem, x, shortcut, folded, relu)


register_kernel("bottle2neck", _chosen, _run, lambda *arguments: arguments[12] if arguments[11] else "")


@fake_of("bottle2neck")
def _fake(x, shortcut, *rest):
    *tensors, packed, _, _ = rest[:12]
    *chain, _ = rest[12:]
    folded = BlockWeights(*tensors)
    problem = _problem(x, shortcut, folded, packed, cached_config(*chain))
    shape = problem.batch, folded.conv3_weight.shape[0], problem.output_height, problem.output_width
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _differentiable(x, shortcut, *rest):
    *tensors, _, _, relu = rest[:12]
    *chain, _ = rest[12:]
    folded = BlockWeights(*tensors)
    u = F.conv2d(x, folded.conv1_weight, folded.conv1_bias.to(x.dtype)).relu()
    u = reference.hierarchical_conv2d(u, folded.weights, folded.biases, config_for(x, chain))
    out = F.conv2d(u, folded.conv3_weight, folded.conv3_bias.to(x.dtype))
    if shortcut is not None and folded.projection_weight is not None:
        bias = folded.projection_bias.to(x.dtype)
        shortcut = F.conv2d(shortcut, folded.projection_weight, bias, folded.projection_stride)
    if shortcut is not None:
        out = out + shortcut
    return out.relu() if relu else out


register_transforms("bottle2neck", _differentiable, folds=False)


def _no_backward(ctx, *grads):
    raise NotImplementedError("res2net_fused::bottle2neck is for inference; with gradients on, the block runs its parts")


torch.library.register_autograd("res2net_fused::bottle2neck", _no_backward, lib=library)


def _flops_of(x_shape, conv1, weight_shapes, conv3, projection, out_shape) -> int:
    batch, _, height, width = out_shape
    outer = conv3[0] * conv3[1] + (0 if projection is None else projection[0] * projection[1])
    pointwise = batch * (x_shape[2] * x_shape[3] * conv1[0] * conv1[1] + height * width * outer)
    return 2 * pointwise + convolution_flops(weight_shapes, out_shape)


@register_flop_formula(torch.ops.res2net_fused.bottle2neck)
def _flops(
    x_shape, shortcut, conv1, conv1_bias, weight_shapes, biases, conv3, conv3_bias, projection, *args, out_shape=None, **kwargs
) -> int:
    return _flops_of(x_shape, conv1, weight_shapes, conv3, projection, out_shape)


def _decomposed(x, shortcut, *rest):
    *tensors, _, _, relu = rest[:12]
    *chain, _ = rest[12:]
    f = BlockWeights(*tensors)
    u = F.conv2d(x, f.conv1_weight, f.conv1_bias.to(x.dtype)).relu()
    u = reference.hierarchical_conv2d(u, f.weights, f.biases, cached_config(*chain))
    out = F.conv2d(u, f.conv3_weight, f.conv3_bias.to(x.dtype))
    if shortcut is not None and f.projection_weight is not None:
        shortcut = F.conv2d(shortcut, f.projection_weight, f.projection_bias.to(shortcut.dtype), f.projection_stride)
    if shortcut is not None:
        out = (out + shortcut).to(out.dtype)
    return as_suggested(out.relu() if relu else out, x)


register_decomposition("bottle2neck", _decomposed, _fake)
