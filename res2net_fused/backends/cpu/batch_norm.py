"""The chain with BatchNorm in training mode on the CPU, fp32: every pass over memory between two convolutions is one kernel.

Per step forward reads z for its statistics, then z and x_{i+1}, and writes y_i to its slot and u_{i+1}. Backward reads dout_i,
du_{i+1}, y_i and z_i and writes the masked gradient (and du_{i+1} to its slot), then turns that into dz_i in place.
All of it is channels-last. BatchNorm's sums are the same for any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...chain.batch_norm import Statistics, convolve
from ...chain.convolver import Convolver
from ...chain.problem import ChainProblem
from ...chain.reference import pass_through
from .backward import DownstreamGradient, channels_last, walk_back
from .settings import activation_arguments, instruction_set, operators


def covers(problem: ChainProblem) -> bool:
    """Whether these kernels run a call; another memory format is better off with ATen's than converted here and back."""
    return problem.dtype == torch.float32 and problem.channels_last


def train_forward(
    convolver: Convolver,
    problem: ChainProblem,
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    keep: bool,
    group: str = "",
) -> tuple[Tensor, Statistics, list[Tensor]] | None:
    """Return what `chain.batch_norm.train_forward` does, or None for what these kernels lack or would have to convert.

    group: of processes, whose statistics are left to ATen.
    """
    if group or not covers(problem):
        return None
    isa = instruction_set()
    config = problem.config
    x = channels_last(x)
    out = torch.empty(
        (problem.batch, x.shape[1], problem.output_height, problem.output_width), memory_format=torch.channels_last
    )
    groups, outputs = x.split(problem.width, 1), out.split(problem.width, 1)
    pass_through(groups, outputs, config)
    statistics, kept, following, activation = [], [], None, activation_arguments(config).values()
    for k, i, added, _, adds in config.convolutions(problem.steps):
        if following is None:
            following = operators.cpu_sum.default(groups[i], outputs[i - 1], isa) if added else groups[i]
        z = channels_last(convolve(convolver, following, weights[k], config))
        statistics.append(operators.cpu_norm_statistics.default(z, eps[k], isa))
        mean, invstd, _ = statistics[-1]
        following = torch.empty_like(z) if adds else None
        operators.cpu_norm_forward.default(
            z, mean, gammas[k].float() * invstd, betas[k].float().contiguous(), *activation, outputs[i],
            groups[i + 1] if adds else None, following, isa,
        )  # fmt: skip
        if keep:
            kept.append(z)
    return out, Statistics(*(torch.stack(values) for values in zip(*statistics, strict=True))), kept


def train_backward(
    convolver: Convolver,
    problem: ChainProblem,
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    z: Sequence[Tensor],
    mean: Tensor,
    invstd: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    needed: Sequence[bool],
    group: str = "",
) -> tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor]] | None:
    """Return what `chain.batch_norm.train_backward` does, not flattened, or None where `train_forward` would.

    The gradient of x is channels-last.
    """
    if group or not covers(problem):
        return None
    isa = instruction_set()
    grad_affine: list[Tensor] = [grad] * problem.steps
    activation = activation_arguments(problem.config).values()

    def norm_backward(k: int, dy: DownstreamGradient, y: Tensor, u: Tensor) -> Tensor:
        zk = channels_last(z[k] if z else convolve(convolver, u, weights[k], problem.config))
        dz, grad_affine[k] = operators.cpu_norm_backward.default(
            *dy, y, zk, mean[k], invstd[k], gammas[k].float().contiguous(), *activation, isa
        )
        return dz

    grad_x, grad_weights, _ = walk_back(problem, grad, x, out, weights, norm_backward, not z, (needed[0], needed[1], False))
    grad_gammas, grad_betas = ([g[j].clone() for g in grad_affine] for j in (0, 1))  # no results that share memory
    return grad_x, grad_weights, grad_gammas, grad_betas
