"""The operator `res2net_fused::frozen_bottle2neck`: as `bottle2neck`, from weights that lie in one tensor.

Graphs of torch.compile call it for frozen blocks: of twenty tensors each would be an input, compared before every call. An
exported program keeps `bottle2neck`, whose weights anybody can read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_exporting
from torch.utils.flop_counter import register_flop_formula

from ..chain.block_weights import BlockWeights
from ..chain.config import ChainConfig
from ..chain.gathered_weights import read_layout, weights_in
from ..chain.memory_format import memory_format
from ..chain.problem import ChainProblem
from . import bottle2neck
from ._library import (
    cached_config,
    fake_of,
    library,
    register_decomposition,
    register_kernel,
    register_transforms,
)

_operator = torch.ops.res2net_fused.frozen_bottle2neck.default  # read as four attributes, each would be compared at each call


def call_bottle2neck(
    x: Tensor, shortcut: Tensor | None, folded: BlockWeights, relu: bool, config: ChainConfig, backend: str
) -> Tensor:
    """`fused_bottle2neck`, by this operator in a graph that stays in this process."""
    gathered = folded.gathered
    if gathered is None or not is_compiling() or is_exporting():
        return bottle2neck.fused_bottle2neck(x, shortcut, folded, relu, config, backend)
    return _operator(x, shortcut, gathered.memory, gathered.layout, relu, *config.as_kwargs().values(), backend)


def _unpacked(x: Tensor, shortcut: Tensor | None, memory: Tensor, layout: str, relu: bool, *settings: Any) -> tuple[Any, ...]:
    """The arguments of `bottle2neck`."""
    f = weights_in(memory, layout)
    return (
        x, shortcut, f.conv1_weight, f.conv1_bias, f.weights, f.biases, f.conv3_weight, f.conv3_bias, f.projection_weight,
        f.projection_bias, f.projection_stride, f.packed, f.layout, relu, *settings,
    )  # fmt: skip


def _chosen(*arguments: Any) -> tuple[ChainProblem, str]:
    return bottle2neck._chosen(*_unpacked(*arguments))


def _run(problem: ChainProblem, backend: str, *arguments: Any) -> Tensor:
    return bottle2neck._run(problem, backend, *_unpacked(*arguments))


def _packed_for(x: Tensor, shortcut: Tensor | None, memory: Tensor, layout: str, *rest: Any) -> str:
    return read_layout(layout).packed_for


register_kernel("frozen_bottle2neck", _chosen, _run, _packed_for)


@fake_of("frozen_bottle2neck")
def _fake(x, shortcut, memory, layout, relu, *settings):
    *chain, _ = settings
    known = read_layout(layout)
    problem = ChainProblem.from_tensor(x, known.of("weights")[0], known.steps, cached_config(*chain))
    shape = problem.batch, known.of("conv3_weight")[0], problem.output_height, problem.output_width
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))


def _differentiable(*arguments: Any) -> Tensor:
    return bottle2neck._differentiable(*_unpacked(*arguments))


register_transforms("frozen_bottle2neck", _differentiable, folds=False)
torch.library.register_autograd("res2net_fused::frozen_bottle2neck", bottle2neck._no_backward, lib=library)


@register_flop_formula(torch.ops.res2net_fused.frozen_bottle2neck)
def _flops(x_shape, shortcut, memory, layout, *args, out_shape=None, **kwargs) -> int:
    known = read_layout(layout)
    conv1, conv3, weights = (known.of(name) for name in ("conv1_weight", "conv3_weight", "weights"))
    projection = known.of("projection_weight") if known.projects else None
    return bottle2neck._flops_of(x_shape, conv1, [weights] * known.steps, conv3, projection, out_shape)


def _decomposed(*arguments: Any) -> Tensor:
    return bottle2neck._decomposed(*_unpacked(*arguments))


register_decomposition("frozen_bottle2neck", _decomposed, _fake)
