"""A Res2Net block whose chain has BatchNorm in training mode: when it may run fused, the call, and the running statistics.

The chain is one operator; conv1, bn1, conv3, bn3 and the shortcut stay the block's own modules and are called as such.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.batchnorm import _BatchNorm

from ..backends import policy
from ..backends.selection import choose_for_training, is_auto
from ..chain.activations import shows_slope
from ..chain.batch_norm import Statistics
from ..chain.config import ChainConfig
from ..chain.memory_format import memory_format
from ..chain.problem import ChainProblem
from ..ops.hierarchical_conv_bn import hierarchical_conv_bn
from .block_parts import BlockParts
from .choosing import NOT_TRAINING_FASTER, why_own
from .reference_blocks import Parts, apply_optional, finish_bottle2neck, normalized


def uses_batch_statistics(bn: nn.Module) -> bool:
    """Whether this norm layer normalises by its input, as in training; one without running statistics always does."""
    if not isinstance(bn, _BatchNorm):
        return False
    return bn.training or bn.running_mean is None and bn.running_var is None


def why_not_trained(block: BlockParts, x: Tensor, problem: ChainProblem, backend: str, recompute: bool) -> str | None:
    """None if the block's chain should run with batch statistics in one operator, else the reason."""
    for bn in block.bns:
        if type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
            return f"norm layer {type(bn).__name__} is not fused in training mode"
        if not uses_batch_statistics(bn):
            return "some BatchNorms of the chain are in training mode and some are not"
        if bn.momentum is not None and not isinstance(bn.momentum, (int, float)):
            return f"BatchNorm's momentum is a {type(bn.momentum).__name__}"
    if any(conv.bias is not None for conv in block.convs):
        return "a 3x3 convolution has a bias, which is not fused in training mode"
    if not shows_slope(problem.config.activation):
        return f"activation {problem.config.activation} is not fused in training mode: its output does not show its derivative"
    if any(map(synchronises, block.bns)):
        reason = _why_not_synchronised(block, backend, recompute)
        if reason is None and problem.batch == 0:
            raise ValueError("x is an empty batch, but SyncBatchNorm makes the other processes wait for its statistics")
        return reason
    if problem.batch == 0:
        return "the batch is empty"
    reason = None if recompute else why_own("training", problem, backend, (block.module, x))
    if reason is NOT_TRAINING_FASTER and not is_compiling():
        gains = x.device.type == "cpu" and policy.channels_last_pays(x.device, problem.dtype)
        return f"{reason}; {policy.NCHW_IN_TRAINING}" if gains and memory_format(x) != torch.channels_last else reason
    if reason is not None:
        return reason
    if is_compiling():
        return None  # the operator itself chooses, when the graph runs
    try:
        choose_for_training(problem, backend)
    except RuntimeError as error:
        return str(error)
    return None


def synchronises(bn: nn.Module) -> bool:
    """Whether this is a SyncBatchNorm that takes statistics over several processes; of one process it is a BatchNorm."""
    if not isinstance(bn, nn.SyncBatchNorm) or not bn.training:
        return False
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size(_group(bn)) > 1


def _group(bn: nn.Module) -> Any:
    """The ProcessGroup over which a SyncBatchNorm takes its statistics."""
    group = bn.process_group if isinstance(bn, nn.SyncBatchNorm) else None
    return group or torch.distributed.group.WORLD


def _why_not_synchronised(block: BlockParts, backend: str, recompute: bool) -> str | None:
    """Looks at nothing that may differ between processes, such as x: all must decide alike, or one would wait for ever."""
    if not all(map(synchronises, block.bns)) or len({_group(bn) for bn in block.bns}) > 1:
        return "the chain's SyncBatchNorms are not all of one process group"
    if not recompute and is_auto(backend):
        return "SyncBatchNorm over several processes: backend= or recompute=True asks for the operator, no speed is measured"
    if is_compiling():
        return "SyncBatchNorm over several processes is not fused while a graph is traced"
    return None


def run_trained(
    block: BlockParts, x: Tensor, shortcut: Tensor | None, config: ChainConfig, recompute: bool, backend: str
) -> Tensor:
    """Runs the block, (N, inplanes, H, W) -> (N, planes * 4, H', W'), and updates running statistics as its own forward does.

    shortcut: what is added instead of x or its downsample, or None.
    """
    inner = block.relu(normalized(block.conv1, block.bn1, x))  # (N, s*w, H, W)
    out = apply_optional(block, "drop_block", trained_chain(block, inner, config, recompute, backend))
    return finish_bottle2neck(block, normalized(block.conv3, block.bn3, out), x, shortcut)


def trained_chain(chain: Parts, x: Tensor, config: ChainConfig, recompute: bool, backend: str) -> Tensor:
    """The chain of convs and bns, (N, s*w, H, W) -> (N, s*w, H', W'); running statistics are updated."""
    parameters = [_affine(bn, x) for bn in chain.bns]
    trained = hierarchical_conv_bn(
        x,
        [conv.weight for conv in chain.convs],
        [gamma for gamma, _ in parameters],
        [beta for _, beta in parameters],
        [float(bn.eps) for bn in chain.bns],
        **config.as_kwargs(),
        recompute=recompute,
        backend=backend,
        group=_group(chain.bns[0]).group_name if synchronises(chain.bns[0]) else "",
    )
    update_running_statistics(chain.bns, trained.statistics)
    return trained.out


def _affine(bn: nn.BatchNorm2d, x: Tensor) -> tuple[Tensor, Tensor]:
    """BatchNorm's weight and bias, ones and zeros where it has none; both (w,)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    gamma = torch.ones(bn.num_features, dtype=dtype, device=x.device) if bn.weight is None else bn.weight
    beta = torch.zeros(bn.num_features, dtype=dtype, device=x.device) if bn.bias is None else bn.bias
    return gamma, beta


def update_running_statistics(bns: Sequence[nn.BatchNorm2d], statistics: Statistics) -> None:
    """Updates them in place as nn.BatchNorm2d.forward does: momentum None averages over all batches.

    Statistics are outside autograd as they come. torch.no_grad would be a region of an exported program, which does not load.
    """
    for bn, mean, variance in zip(bns, statistics.mean, statistics.variance, strict=True):
        if not bn.training or not bn.track_running_stats:
            continue
        factor: float | Tensor = 0.0 if bn.momentum is None else bn.momentum
        if bn.num_batches_tracked is not None:
            bn.num_batches_tracked.add_(1)
            if bn.momentum is None:
                factor = bn.num_batches_tracked.double().reciprocal()  # a Python float would end a graph
        if bn.running_mean is None or bn.running_var is None:
            continue
        for running, current in ((bn.running_mean, mean), (bn.running_var, variance)):
            running.copy_(running.to(current.dtype) * (1 - factor) + current * factor)
