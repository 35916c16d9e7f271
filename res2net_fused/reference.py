"""The mathematics of Res2Net, stated once, in plain PyTorch and in any floating dtype (float64 for the ground truth).

Res2Net: A New Multi-scale Backbone Architecture (Gao et al., arXiv:1904.01169), equation 1. The s groups x_1 ... x_s of a
feature map pass a chain of 3x3 convolutions K_i, each followed by BatchNorm and ReLU:

    y_1 = x_1,   y_2 = K_2(x_2),   y_i = K_i(x_i + y_{i-1})  for 2 < i <= s

The published code lets the last group pass instead of the first, which only renames the groups:

    y_i = K_i(x_i + y_{i-1})  for i < s,   y_s = x_s

and in the first block of a stage nothing is added, the convolutions stride and the passed group is average-pooled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .chain import LARGEST, ChainConfig, at_least_one
from .chain1d import Chain1dConfig
from .layouts import BlockParts


def hierarchical_chain(
    groups: Sequence[Tensor], convolution: Callable[[int, Tensor], Tensor], config: ChainConfig
) -> list[Tensor]:
    """The recurrence. `groups` are x_1 ... x_s; `convolution(k, u)` is the k-th convolution with all that follows it."""
    scale = len(groups)
    passed = config.passed_group(scale)
    outputs: list[Tensor] = []
    for i, x in enumerate(groups):
        if i == passed:
            outputs.append(pool_passthrough(x, config))
        else:
            u = x + outputs[i - 1] if config.adds(i) else x
            outputs.append(convolution(i - config.first_convolved, u))
    return outputs


def pool_passthrough(x: Tensor, config: ChainConfig) -> Tensor:
    """What the group without a convolution goes through; (N, w, H, W) -> (N, w, H/stride, W/stride)."""
    if config.pool is None:
        return x
    return F.avg_pool2d(x, 3, config.stride, padding=1, count_include_pad=config.pool == "avg3")


def activate(y: Tensor, activation: str) -> Tensor:
    if activation == "none":
        return y
    return y.relu() if activation == "relu" else F.hardtanh(y, 0, 20)


def hierarchical_conv2d(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig
) -> Tensor:
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
) -> Tensor:
    """The chain with BatchNorm in training mode behind every convolution; gammas, betas (w,), x (N, s*w, H, W)."""

    def convolution(k: int, u: Tensor) -> Tensor:
        z = F.conv2d(u, weights[k], None, config.stride, config.dilation, config.dilation, config.groups)
        return activate(F.batch_norm(z, None, None, gammas[k], betas[k], training=True, eps=eps[k]), config.activation)

    return torch.cat(hierarchical_chain(x.split(weights[0].shape[0], 1), convolution, config), 1)


def hierarchical_conv1d(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    affine_scale: Sequence[Tensor] | None,
    affine_shift: Sequence[Tensor] | None,
    config: Chain1dConfig,
) -> Tensor:
    """The chain along rows, y_i = scale_i * relu(K_i * u_i + b_i) + shift_i: BatchNorm's affine map comes after ReLU.

    weights: (w, w, k); biases, affine_scale, affine_shift: (w,), or None; x: (N, s*w, L).
    """

    def convolution(k: int, u: Tensor) -> Tensor:
        z = F.conv1d(padded_1d(u, weights[k], config), weights[k], bias_of(biases, k, u), dilation=config.dilation)
        return affine_1d(z.relu(), affine_scale, affine_shift, k)

    return torch.cat(hierarchical_chain(x.split(weights[0].shape[0], 1), convolution, config.chain), 1)


def padded_1d(u: Tensor, weight: Tensor, config: Chain1dConfig) -> Tensor:
    """u (N, w, L) with what stands beyond its ends, (N, w, L + 2p), so that the convolution by `weight` is (N, w, L)."""
    padding = config.padding(weight.shape[2])
    return F.pad(u, (padding, padding), mode="constant" if config.padding_mode == "zeros" else "reflect")


def bias_of(biases: Sequence[Tensor] | None, k: int, u: Tensor) -> Tensor | None:
    return None if biases is None else biases[k].to(u.dtype)


def affine_1d(r: Tensor, scale: Sequence[Tensor] | None, shift: Sequence[Tensor] | None, k: int) -> Tensor:
    """scale_k * r + shift_k for each channel of r (N, w, L), in the wider of their dtypes, then rounded to r's."""
    return r if scale is None or shift is None else (r * scale[k][:, None] + shift[k][:, None]).to(r.dtype)


# A block's modules: `BlockParts`, or a module with attributes of those names, of which nn.Module's types know nothing.
Parts: TypeAlias = BlockParts | Any


def bottle2neck(block: Parts, x: Tensor, config: ChainConfig, shortcut: Tensor | None = None) -> Tensor:
    """The whole bottleneck by the block's own submodules: conv1, the chain, conv3, attention, shortcut.

    `block` has conv1, bn1, convs, bns, conv3, bn3 and relu, and may have drop_block, se, drop_path and downsample.
    shortcut: what is added instead of x or its downsample, as in the blocks of DLA.
    """

    def convolution(k: int, u: Tensor) -> Tensor:
        return block.relu(normalized(block.convs[k], block.bns[k], u))

    out = block.relu(normalized(block.conv1, block.bn1, x))  # (N, s*w, H, W)
    out = torch.cat(hierarchical_chain(out.split(block.convs[0].in_channels, 1), convolution, config), 1)
    out = apply_optional(block, "drop_block", out)
    return finish_bottle2neck(block, normalized(block.conv3, block.bn3, out), x, shortcut)


def normalized(conv: nn.Module, bn: nn.Module, x: Tensor) -> Tensor:
    """bn(conv(x)); some convolutions have their norm inside."""
    out = conv(x)
    return out if conv._modules.get("norm") is bn else bn(out)


def finish_bottle2neck(block: Parts, out: Tensor, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """What follows bn3: attention, stochastic depth, the shortcut (from x, unless given), and the last activation."""
    out = apply_optional(block, "drop_path", apply_optional(block, "se", out))
    if shortcut is None:
        downsample = getattr(block, "downsample", None)
        shortcut = x if downsample is None else downsample(x)
    out += shortcut  # in place: under autocast the result keeps out's dtype
    return block.relu(out)


def apply_optional(block: Parts, name: str, out: Tensor) -> Tensor:
    module = getattr(block, name, None)
    return out if module is None else module(out)


class ReferenceBottle2neck(nn.Module):
    """The Res2Net bottleneck in plain PyTorch, with the attribute names and state_dict keys of the published code.

    inplanes: channels of x. planes: the stage's base; the output has planes * 4 channels.
    stride: of the 3x3 convolutions of a 'stage' block. downsample: the module of the shortcut, or None.
    baseWidth, scale: w = floor(planes * baseWidth / 64) * cardinality channels in each of `scale` groups.
    stype: 'normal', or 'stage' (no adds, pooled pass-through).
    cardinality, dilation: groups and dilation of the 3x3 convolutions. passthrough: as in `ChainConfig`.
    attn_layer: called with the output's channels, makes what stands between bn3 and the addition, such as an SE module.
    drop_path: a module behind it, such as stochastic depth.
    forward: (N, inplanes, H, W) -> (N, planes * 4, H/stride, W/stride).
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        baseWidth: int = 26,
        scale: int = 4,
        stype: str = "normal",
        *,
        cardinality: int = 1,
        dilation: int = 1,
        passthrough: str = "last",
        act_layer: Callable[..., nn.Module] = nn.ReLU,
        norm_layer: Callable[..., nn.Module] = nn.BatchNorm2d,
        attn_layer: Callable[..., nn.Module] | None = None,
        drop_path: nn.Module | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("inplanes", inplanes), ("planes", planes), ("scale", scale), ("cardinality", cardinality)):
            at_least_one(name, value)
        if not isinstance(baseWidth, (int, float)) or isinstance(baseWidth, bool):
            raise TypeError(f"baseWidth is {baseWidth!r} of type {type(baseWidth).__name__}; a number is needed")
        if not 0 < baseWidth <= LARGEST:
            raise ValueError(f"baseWidth is {baseWidth}; it must be above 0 and at most {LARGEST}")
        if stype not in ("normal", "stage"):
            raise ValueError(f"stype is {stype!r}; allowed are 'normal', 'stage'")
        if stype == "normal" and stride != 1:
            raise ValueError(f"stride is {stride} in a 'normal' block, which adds groups of one size; use stype='stage'")
        width = math.floor(planes * (baseWidth / 64.0)) * cardinality
        if width < 1:
            raise ValueError(f"baseWidth is {baseWidth}; with planes={planes} a group would have no channel")
        stage = stype == "stage"
        if scale == 1:
            passthrough = "none"
        if stage and passthrough == "first_added":
            passthrough = "first"  # a 'stage' block adds nothing
        self.chain_config = ChainConfig(
            stride=stride,
            dilation=dilation,
            groups=cardinality,
            hierarchical=not stage,
            passthrough=passthrough,
            pool="avg3" if stage and passthrough != "none" else None,
        )
        self.nums = max(1, scale - (passthrough != "none"))
        self.stype, self.scale, self.width = stype, scale, width
        self.conv1 = nn.Conv2d(inplanes, width * scale, kernel_size=1, bias=False)
        self.bn1 = norm_layer(width * scale)
        if stage:
            self.pool = nn.AvgPool2d(kernel_size=3, stride=stride, padding=1)
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, stride, dilation, dilation, groups=cardinality, bias=False)
            for _ in range(self.nums)
        )
        self.bns = nn.ModuleList(norm_layer(width) for _ in range(self.nums))
        self.conv3 = nn.Conv2d(width * scale, planes * self.expansion, kernel_size=1, bias=False)
        self.bn3 = norm_layer(planes * self.expansion)
        if attn_layer is not None:
            self.se = attn_layer(planes * self.expansion)
        if drop_path is not None:
            self.drop_path = drop_path
        self.relu = act_layer(inplace=True)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        return bottle2neck(self, x, self.chain_config)


class ReferenceDlaBottle2neck(ReferenceBottle2neck):
    """The bottleneck of DLA with the Res2Net chain, in plain PyTorch: half as wide inside, its shortcut given by the caller.

    inplanes, outplanes: channels of x and of the output. base_width, scale, cardinality: w, s and groups, where
    w = floor(outplanes / 2 * base_width / 64) * cardinality. stage: whether the block is of the kind 'stage', by default if it
    strides; a network that dilates instead of striding has such blocks without a stride. Otherwise as `ReferenceBottle2neck`.
    forward: (N, inplanes, H, W) and the shortcut (N, outplanes, H/stride, W/stride), x itself by default.
    """

    expansion = 2

    def __init__(
        self,
        inplanes: int,
        outplanes: int,
        stride: int = 1,
        dilation: int = 1,
        cardinality: int = 1,
        base_width: int = 28,
        scale: int = 4,
        *,
        stage: bool | None = None,
        **layers: Any,
    ) -> None:
        if outplanes % self.expansion:
            raise ValueError(f"outplanes is {outplanes}; an even number is needed")
        stype = "stage" if (stride > 1 if stage is None else stage) else "normal"
        super().__init__(
            inplanes, outplanes // self.expansion, stride, None, base_width, scale, stype,
            cardinality=cardinality, dilation=dilation, **layers,
        )  # fmt: skip

    def forward(self, x: Tensor, shortcut: Tensor | None = None, children: None = None) -> Tensor:
        """children: not used; timm's trees know blocks and trees by one signature."""
        return bottle2neck(self, x, self.chain_config, shortcut)
