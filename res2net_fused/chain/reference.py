"""The mathematics of Res2Net, stated once, in plain PyTorch and in any floating dtype (float64 for the ground truth).

Res2Net: A New Multi-scale Backbone Architecture (Gao et al., arXiv:1904.01169), equation 1. The s groups x_1 ... x_s of a
feature map pass a chain of 3x3 convolutions K_i, each followed by BatchNorm and ReLU:

    y_1 = x_1,   y_2 = K_2(x_2),   y_i = K_i(x_i + y_{i-1})  for 2 < i <= s

The published code lets the last group pass instead of the first, which only renames the groups:

    y_i = K_i(x_i + y_{i-1})  for i < s,   y_s = x_s

and in the first block of a stage nothing is added, the convolutions stride and the passed group is average-pooled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .activations import activate, shows_slope
from .config import Chain1dConfig, ChainConfig


def hierarchical_chain(
    groups: Sequence[Tensor], convolution: Callable[[int, Tensor], Tensor], config: ChainConfig
) -> list[Tensor]:
    """The recurrence. `groups` are x_1 ... x_s; `convolution(k, u)` is the k-th convolution with all that follows it."""
    outputs, passed = list(groups), config.passed_group(len(groups))
    if passed is not None:
        outputs[passed] = pool_passthrough(groups[passed], config)
    for k, i, adds, *_ in config.convolutions(len(groups) - (passed is not None)):
        outputs[i] = convolution(k, groups[i] + outputs[i - 1] if adds else groups[i])
    return outputs


def pool_passthrough(x: Tensor, config: ChainConfig) -> Tensor:
    """What the group without a convolution goes through; (N, w, H, W) -> (N, w, H/stride, W/stride)."""
    if config.pool is None:
        return x
    if config.pool == "max3":
        return F.max_pool2d(x, 3, config.stride, padding=1)
    return F.avg_pool2d(x, 3, config.stride, padding=1, count_include_pad=config.pool == "avg3")


def pass_through(groups: Sequence[Tensor], slots: Sequence[Tensor], config: ChainConfig) -> None:
    """Writes the output of the passed group, if there is one, into its slot; both are all groups of x and of the output."""
    passed = config.passed_group(len(groups))
    if passed is not None:
        slots[passed].copy_(pool_passthrough(groups[passed], config))


def hierarchical_conv2d(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig) -> Tensor:
    """The chain with BatchNorm folded into weights (w, w/groups, 3, 3) and biases (w,); x is (N, s*w, H, W)."""

    def convolution(k: int, u: Tensor) -> Tensor:
        y = F.conv2d(u, weights[k], bias_of(biases, k, u), config.stride, config.dilation, config.dilation, config.groups)
        return activate(y, config.activation)

    return torch.cat(hierarchical_chain(x.split(weights[0].shape[0], 1), convolution, config), 1)


def hierarchical_conv_bn(
    x: Tensor,
    weights: Sequence[Tensor],
    gammas: Sequence[Tensor],
    betas: Sequence[Tensor],
    eps: Sequence[float],
    config: ChainConfig,
    kept: list[Tensor] | None = None,
) -> Tensor:
    """The chain with BatchNorm in training mode behind every convolution; gammas, betas (w,), x (N, s*w, H, W).

    kept: where each convolution's output (N, w, H', W') is appended, or None.
    """

    def convolution(k: int, u: Tensor) -> Tensor:
        z = F.conv2d(u, weights[k], None, config.stride, config.dilation, config.dilation, config.groups)
        if kept is not None:
            kept.append(z)
        return activate(F.batch_norm(z, None, None, gammas[k], betas[k], training=True, eps=eps[k]), config.activation)

    return torch.cat(hierarchical_chain(x.split(weights[0].shape[0], 1), convolution, config), 1)


def hierarchical_conv1d(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    affine_scale: Sequence[Tensor] | None,
    affine_shift: Sequence[Tensor] | None,
    config: Chain1dConfig,
    kept: list[Tensor] | None = None,
) -> Tensor:
    """The chain along rows, y_i = scale_i * act(K_i * u_i + b_i) + shift_i: BatchNorm's affine map comes after the activation.

    weights: (w, w, k); biases, affine_scale, affine_shift: (w,), or None; x: (N, s*w, L).
    kept: where for each convolution `kept_1d`, (N, w, L), is appended, or None.
    """

    def convolution(k: int, u: Tensor) -> Tensor:
        z = convolved_1d(u, weights[k], bias_of(biases, k, u), config)
        r = activate(z, config.activation)
        if kept is not None:
            kept.append(kept_1d(z, r, config))
        return affine_1d(r, affine_scale, affine_shift, k)

    return torch.cat(hierarchical_chain(x.split(weights[0].shape[0], 1), convolution, config.chain), 1)


def padded_1d(u: Tensor, weight: Tensor, config: Chain1dConfig) -> Tensor:
    """u (N, w, L) with what stands beyond its ends, (N, w, L + 2p), so that the convolution by `weight` is (N, w, L)."""
    padding = config.padding(weight.shape[2])
    return F.pad(u, (padding, padding), mode="constant" if config.padding_mode == "zeros" else "reflect")


def convolved_1d(u: Tensor, weight: Tensor, bias: Tensor | None, config: Chain1dConfig) -> Tensor:
    """K u + b of one convolution, (N, w, L)."""
    return F.conv1d(padded_1d(u, weight, config), weight, bias, dilation=config.dilation)


def kept_1d(z: Tensor, r: Tensor, config: Chain1dConfig) -> Tensor:
    """What the backward needs of z_i = K_i * u_i + b_i and r_i = act(z_i): r_i if that shows the derivative, else z_i."""
    return r if shows_slope(config.activation) else z


def bias_of(biases: Sequence[Tensor] | None, k: int, u: Tensor) -> Tensor | None:
    return None if biases is None else biases[k].to(u.dtype)


def affine_1d(r: Tensor, scale: Sequence[Tensor] | None, shift: Sequence[Tensor] | None, k: int) -> Tensor:
    """scale_k * r + shift_k for each channel of r (N, w, L), in the wider of their dtypes, then rounded to r's."""
    return r if scale is None or shift is None else (r * scale[k][:, None] + shift[k][:, None]).to(r.dtype)
