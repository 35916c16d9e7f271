"""The Res2Net bottlenecks in plain PyTorch, by a block's own submodules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..chain.config import LARGEST, ChainConfig, at_least_one
from ..chain.reference import hierarchical_chain
from .block_parts import BlockParts

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
    split = out.split(block.convs[0].in_channels, 1)
    groups = [split[i] for i in range(config.scale(len(block.convs)))]  # FX cannot tell how many there are
    out = torch.cat(hierarchical_chain(groups, convolution, config), 1)
    out = apply_optional(block, "drop_block", out)
    return finish_bottle2neck(block, normalized(block.conv3, block.bn3, out), x, shortcut)


def normalized(conv: nn.Module, bn: nn.Module, x: Tensor) -> Tensor:
    """bn(conv(x)); some convolutions have their norm inside."""
    out = conv(x)
    return out if conv._modules.get("norm") is bn else bn(out)


def finish_bottle2neck(block: Parts, out: Tensor, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
    """What follows bn3: attention, stochastic depth, the shortcut (from x, unless given), and the last activation."""
    out = apply_optional(block, "drop_path", apply_optional(block, "se", out))
    ending = block.ending if isinstance(block, BlockParts) else "add_act"
    if ending == "act_add":
        out = block.relu(out)
    if "add" in ending:
        if shortcut is None:
            downsample = getattr(block, "downsample", None)
            shortcut = x if downsample is None else downsample(x)
        if ending == "act_add":
            return out + shortcut  # ReLU's backward needs what it returned
        out += shortcut  # in place: under autocast the result keeps out's dtype
    return block.relu(out) if ending in ("add_act", "act") else out


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
            nn.Conv2d(width, width, 3, stride, dilation, dilation, groups=cardinality, bias=False) for _ in range(self.nums)
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
        self.passthrough = passthrough

    def forward(self, x: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return self._scripted(x, None)
        return bottle2neck(self, x, self.chain_config)

    def _scripted(self, x: Tensor, shortcut: Tensor | None) -> Tensor:
        """`bottle2neck` in the Python that torch.jit.script compiles."""
        groups = self.relu(self.bn1(self.conv1(x))).split(self.width, 1)  # (N, s*w, H, W) in groups of w channels
        first = 1 if self.passthrough in ("first", "first_added") else 0  # group of the first convolution
        outs: list[Tensor] = []
        y = groups[0]
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns)):  # noqa: B905 - TorchScript's has no strict
            added = self.stype == "normal" and (i > 0 or self.passthrough == "first_added")
            u = groups[first + i]
            y = self.relu(bn(conv(u + y if added else u)))
            outs.append(y)
        if self.passthrough != "none":
            passed = groups[0] if first else groups[-1]
            if hasattr(self, "pool"):
                passed = self.pool(passed)
            outs = [passed] + outs if first else outs + [passed]
        out = self.bn3(self.conv3(torch.cat(outs, 1)))
        if hasattr(self, "se"):
            out = self.se(out)
        if hasattr(self, "drop_path"):
            out = self.drop_path(out)
        if shortcut is None:
            shortcut = x if self.downsample is None else self.downsample(x)
        return self.relu(out + shortcut)


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
        if torch.jit.is_scripting():
            return self._scripted(x, shortcut)
        return bottle2neck(self, x, self.chain_config, shortcut)
