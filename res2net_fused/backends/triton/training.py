"""Training by the Triton kernels: forward with batch statistics, and backward with them or with BatchNorm folded."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from ...chain.batch_norm import Gradients, Statistics, convolve
from ...chain.convolver import Convolver
from ...chain.problem import ChainProblem
from ...chain.reference import pass_through
from .availability import capability, plan_training_for
from .step_plan import most_pixels, padded_channels
from .tf32 import for_precision


def why_not_whole_batch(problem: ChainProblem) -> str | None:
    """Statistics are of the whole batch, which is therefore not cut into chunks."""
    pixels = problem.batch * problem.output_height * problem.output_width
    if pixels > (most := most_pixels(problem)):
        return f"the batch gives {pixels} output pixels; at most {most} are allowed in training mode"
    return None


def describe(problem: ChainProblem) -> str:
    """Say for `explain` who computes what."""
    theirs = "weights" if problem.config.stride == 1 else "weights and of the strided convolutions"
    return f"Triton forward and backward, gradients of {theirs} by ATen"


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
) -> tuple[Tensor, Statistics, list[Tensor]]:
    """Return what `chain.batch_norm.train_forward` does, channels-last."""
    from .kernels.common import GroupView, pack_weights
    from .kernels.conv3x3_bn_fwd import train_calls

    config, width = problem.config, problem.width
    x = _channels_together(x)

    def pixels_of(channels: int) -> Tensor:
        shape = problem.batch, channels, problem.output_height, problem.output_width
        return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)

    out = pixels_of(x.shape[1])
    # Where none is kept one buffer serves all: z_k is read for the last time before z_{k+1} is written.
    z = [pixels_of(width) for _ in range(problem.steps)] if keep else [pixels_of(width)] * problem.steps
    statistics = torch.empty((4, problem.steps, width), dtype=torch.float32, device=x.device)
    packed = pack_weights(weights, config.groups, padded_channels(width // config.groups))
    gammas, betas = (_single(tensors) for tensors in (gammas, betas))
    with _device_of(x):
        plan = plan_training_for(problem, capability(problem.device))
        packed = for_precision(packed, plan.precision)
        if plan.launches[0].steps > 0:
            pass_through(x.split(width, 1), out.split(width, 1), config)
        slots = GroupView(x, width, width), GroupView(out, width, width)
        for call in train_calls(problem, plan, *slots, z, statistics, packed, gammas, betas, eps, group):
            call.run()
    return out, Statistics(*(statistics[i].clone() for i in range(3))), z if keep else []


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
) -> Gradients:
    """Return what `chain.batch_norm.train_backward` does, not flattened, the gradient of x channels-last."""
    from .backward import BatchNorms

    def convolve_again(k: int, u: Tensor) -> Tensor:
        return _channels_together(convolve(convolver, u, weights[k], problem.config))

    z = [zk.contiguous(memory_format=torch.channels_last) for zk in z]
    norms = BatchNorms(z, mean, invstd, _single(gammas), convolve_again, group)
    gradients = _run(problem, grad, x, out, weights, norms, (needed[0], needed[1], True))
    sums = gradients.sums  # no results that share memory
    of_gammas = [product * r for product, r in zip(sums[:, 1], invstd, strict=True)]
    return gradients.x, gradients.weights, of_gammas, [t.clone() for t in sums[:, 0]]


def runs_chain_backward(problem: ChainProblem, by_name: bool) -> bool:
    """Whether `chain_backward` takes a call: not measured against ATen's operators, it must be asked for."""
    return by_name


def chain_backward(
    problem: ChainProblem,
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    weights: Sequence[Tensor],
    needed: Sequence[bool],
) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
    """Gradients of (x, weights, biases) of the chain without batch statistics, of these what `needed` names."""
    gradients = _run(problem, grad, x, out, weights, None, tuple(needed))
    return gradients.x, gradients.weights, [t.clone() for t in gradients.sums[:, 0]]


def _run(problem, grad, x, out, weights, norms, needed):
    from .backward import ChainGradients

    grad, x, out = (_channels_together(t) for t in (grad, x, out))
    with _device_of(x):
        plan = plan_training_for(problem, capability(problem.device))
        gradients = ChainGradients(problem, plan, grad, x, out, weights, norms, needed)
        for call in gradients.calls():
            call.run()
    return gradients


def _channels_together(t: Tensor) -> Tensor:
    """Lay the channels of a pixel side by side; every other stride may be what it is."""
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous(memory_format=torch.channels_last)


def _single(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().float().contiguous() for t in tensors]


def _device_of(x: Tensor) -> contextlib.AbstractContextManager:
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
