"""The chain with BatchNorm in training mode: forward and backward by PyTorch's operators and a backend's convolutions.

With u_i = x_i + y_{i-1}, z_i = K_i u_i and zhat_i = (z_i - mean z_i) * invstd_i over batch and pixels,

    y_i = act(gamma_i * zhat_i + beta_i)

and from the last group to the first, over n = N * H' * W' values of a channel,

    dy_i = dout_i + du_{i+1},  g_i = dy_i * act'(y_i),  dbeta_i = sum g_i,  dgamma_i = sum g_i * zhat_i,
    dz_i = gamma_i * invstd_i * (g_i - dbeta_i / n - zhat_i * dgamma_i / n),  du_i = K_i^T dz_i = dx_i,  dK_i = u_i (*) dz_i

u_i is formed again from x and out, and act' is read off y_i. z_i is kept, or convolved again where asked to.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activate, activation_backward
from .backward import convolution_backward, walk_back
from .config import ChainConfig
from .convolver import Convolver
from .memory_format import memory_format
from .problem import ChainProblem
from .reference import hierarchical_chain, pass_through
from .sync_batch_norm import combine_moments, combine_sums


@dataclass
class Statistics:
    """Moments of every convolution's output over batch and pixels, each (steps, w), fp32 (fp64 for an fp64 chain).

    invstd: 1 / sqrt(biased variance + eps). variance: unbiased, as running statistics take it.
    """

    mean: Tensor
    invstd: Tensor
    variance: Tensor


Gradients = tuple[Tensor | None, list[Tensor], list[Tensor], list[Tensor]]  # of (x, weights, gammas, betas)


class BatchNormPasses(Convolver):
    """A convolver that may also compute what lies between the convolutions, which is ATen's where it returns None."""

    def train_forward(
        self,
        problem: ChainProblem,
        x: Tensor,
        weights: Sequence[Tensor],
        gammas: Sequence[Tensor],
        betas: Sequence[Tensor],
        eps: Sequence[float],
        keep: bool,
        group: str,
    ) -> tuple[Tensor, Statistics, list[Tensor]] | None:
        """Return what `train_forward` of this file does, from the same arguments."""
        return None

    def train_backward(
        self,
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
        group: str,
    ) -> Gradients | None:
        """Return what `train_backward` of this file does, from the same arguments."""
        return None


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and of BatchNorm's arithmetic."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def train_forward(
    backend: BatchNormPasses,
    problem: ChainProblem,
    x: Tensor,  # (N, s*w, H, W)
    weights: Sequence[Tensor],  # each (w, w/groups, 3, 3)
    gammas: Sequence[Tensor],  # each (w,), as betas
    betas: Sequence[Tensor],
    eps: Sequence[float],
    keep: bool,
    group: str = "",  # of processes over which statistics are taken; "" for this one alone
) -> tuple[Tensor, Statistics, list[Tensor]]:
    """Returns out (N, s*w, H', W') in x's memory format, the statistics, and with `keep` every z_i (N, w, H', W')."""
    results = backend.train_forward(problem, x, weights, gammas, betas, eps, keep, group)
    if results is not None:
        return results
    config, width, wide = problem.config, problem.width, wide_dtype(x.dtype)
    shape = problem.batch, x.shape[1], problem.output_height, problem.output_width
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    groups, outputs = x.split(width, 1), out.split(width, 1)
    # ATen updates running statistics that are 0 with momentum 1: what it leaves are those of this batch.
    mean, variance = (torch.zeros(problem.steps, width, dtype=wide, device=x.device) for _ in range(2))
    kept, invstds = [], []
    pass_through(groups, outputs, config)
    for k, i, adds, *_ in config.convolutions(problem.steps):
        z = convolve(backend, groups[i] + outputs[i - 1] if adds else groups[i], weights[k], config)
        if group:
            mean[k], invstd, variance[k], biased = synchronised_statistics(z, eps[k], group)
            y, *_ = torch.native_batch_norm(z, gammas[k].to(wide), betas[k].to(wide), mean[k], biased, False, 0.0, eps[k])
        else:
            y, _, invstd = torch.native_batch_norm(
                z, gammas[k].to(wide), betas[k].to(wide), mean[k], variance[k], True, 1.0, eps[k]
            )
        activate_into(y, config.activation, outputs[i])
        invstds.append(invstd)
        if keep:
            kept.append(z)
    return out, Statistics(mean, torch.stack(invstds).to(wide), variance), kept


def train_differentiable(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    config: ChainConfig,
) -> tuple[Tensor, Statistics]:
    """`train_forward` by PyTorch's operators with nothing written in place, for autograd, forward mode and vmap to follow."""
    found: list[tuple[Tensor, ...]] = []

    def convolution(k: int, u: Tensor) -> Tensor:
        z = convolve(None, u, weights[k], config)
        wide, count = z.detach().to(wide_dtype(z.dtype)), z.numel() // z.shape[1]
        biased, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
        found.append((mean, (biased + eps[k]).rsqrt(), biased * (count / (count - 1))))
        return activate(F.batch_norm(z, None, None, gammas[k], betas[k], training=True, eps=eps[k]), config.activation)

    out = torch.cat(hierarchical_chain(x.split(weights[0].shape[0], 1), convolution, config), 1)
    return out, Statistics(*(torch.stack(values) for values in zip(*found, strict=True)))


def synchronised_statistics(z: Tensor, eps: float, group: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns mean, invstd, unbiased and biased variance (w,) of z (N, w, H, W) of all processes."""
    count = z.numel() // z.shape[1]
    biased, mean = torch.var_mean(z.to(wide_dtype(z.dtype)), (0, 2, 3), correction=0)
    mean, squares, total = combine_moments(mean, biased * count, count, group)
    biased = squares / total
    return mean, (biased + eps).rsqrt(), squares / (total - 1), biased


def _synchronised_norm_backward(
    g: Tensor, z: Tensor, gamma: Tensor, mean: Tensor, invstd: Tensor, group: str
) -> tuple[Tensor, Tensor, Tensor]:
    """aten.native_batch_norm_backward with the statistics of all processes.

    Gradients of gamma and beta are of this one alone, as nn.SyncBatchNorm leaves them to be averaged with all others.
    """
    deviation, wide_g = z.to(mean.dtype) - mean.view(-1, 1, 1), g.to(mean.dtype)
    sums = torch.stack([wide_g.sum((0, 2, 3)), (wide_g * deviation).sum((0, 2, 3))])
    shift, slope = combine_sums(sums, z.numel() // z.shape[1], group)[:, :, None, None]
    scale = (gamma * invstd).view(-1, 1, 1)
    dz = scale * (wide_g - shift - deviation * slope * invstd.square().view(-1, 1, 1))
    return dz.to(g.dtype), sums[1] * invstd, sums[0]


def activate_into(y: Tensor, activation: str, slot: Tensor) -> None:
    if activation == "relu":
        torch.clamp_min(y, 0, out=slot)
    else:
        slot.copy_(activate(y, activation))


def convolve(convolver: Convolver | None, u: Tensor, weight: Tensor, config: ChainConfig) -> Tensor:
    """z of one 3x3 convolution, (N, w, H, W) -> (N, w, H', W'): the convolver's, or ATen's."""
    z = None if convolver is None else convolver.convolution(ChainProblem.for_convolution(u, weight, config), u, weight)
    if z is None:
        z = torch.conv2d(u, weight, None, config.stride, config.dilation, config.dilation, config.groups)
    return z


def train_backward(
    backend: BatchNormPasses,
    problem: ChainProblem,
    grad: Tensor,  # as out, any strides
    x: Tensor,
    out: Tensor,
    z: Sequence[Tensor],  # of every convolution, or empty
    mean: Tensor,  # (steps, w), as invstd
    invstd: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    eps: Sequence[float],
    needed: Sequence[bool],
    group: str = "",  # as in forward
) -> Gradients:
    """Gradients of (x, weights, gammas, betas), of these only what `needed` names."""
    gradients = backend.train_backward(problem, grad, x, out, z, mean, invstd, weights, gammas, needed, group)
    if gradients is not None:
        return gradients
    return train_backward_by_aten(backend, problem.config, grad, x, out, z, mean, invstd, weights, gammas, eps, needed, group)


def train_backward_by_aten(
    convolver: Convolver | None,
    config: ChainConfig,
    grad: Tensor,
    x: Tensor,
    out: Tensor,
    z: Sequence[Tensor],
    mean: Tensor,
    invstd: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    eps: Sequence[float],
    needed: Sequence[bool],
    group: str = "",
) -> Gradients:
    """The same by PyTorch's operators and a convolver, or None where these gradients are differentiated again, or vmapped.

    Then z is empty, so that it is convolved again from u and the weights; mean and invstd may be constants, since the second
    derivative of PyTorch's BatchNorm knows that they are z's.
    """
    need_x, need_weights, need_gammas, need_betas = needed
    grad_gammas, grad_betas = ([grad] * len(weights) for _ in range(2))

    def output_backward(k: int, dy: Tensor, y: Tensor, u: Tensor) -> Tensor:
        zk = z[k] if z else convolve(convolver, u, weights[k], config)
        masked = activation_backward(dy, y, config.activation)
        if convolver is not None:
            masked = masked.contiguous(memory_format=memory_format(zk))
        gamma, affine = gammas[k].to(mean.dtype), need_gammas or need_betas
        if group:
            gradients = _synchronised_norm_backward(masked, zk, gamma, mean[k], invstd[k], group)
        else:
            gradients = torch.ops.aten.native_batch_norm_backward(
                masked, zk, gamma, None, None, mean[k], invstd[k], True, eps[k], [True, affine, affine]
            )
        dz, grad_gammas[k], grad_betas[k] = gradients
        return dz

    by_convolver = functools.partial(convolution_backward, convolver, config=config)
    grad_x, grad_weights, _ = walk_back(
        grad, x, out, weights, config, output_backward, by_convolver, (need_x, need_weights, False), convolver is not None
    )
    return grad_x, grad_weights, grad_gammas, grad_betas
