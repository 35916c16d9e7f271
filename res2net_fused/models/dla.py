"""Deep layer aggregation (arXiv:1707.06484) with Res2Net bottlenecks, and with s = 1 DLA-60 itself.

Blocks are the leaves of binary trees; at the end of every pair of leaves a root, a 1x1 convolution, reads both of them, and the
ends of the subtrees before. Each of four levels is such a tree. State_dict keys are those of the published checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..modules.bottle2neck import DlaBottle2neck
from .layers import drop_paths
from .network import Network, stage_geometry
from .res2net import projection

STEM_CHANNELS = (16, 32)
LEVEL_CHANNELS = (128, 256, 512, 1024)
DEPTHS_60 = (1, 2, 3, 1)
STRIDES = (4, 8, 16, 32)

Build = Callable[..., nn.Module]  # (inplanes, outplanes, stride, dilation, stage=) -> a block called with (x, shortcut)


class Dla(Network):
    """(N, in_chans, H, W) -> logits (N, num_classes), or the features of the four levels of trees (see `Network`).

    depths: of the trees; one of depth d has 2 ** d blocks. base_width, scale, cardinality: of the blocks.
    block: a class with the signature of `DlaBottle2neck`, called with x and its shortcut.
    num_classes, drop_path_rate, output_stride, features_only, in_chans: as for `Res2Net`; output strides are 8, 16 and 32.
    Raises ValueError, naming the argument, for values that do not fit.
    """

    def __init__(
        self,
        depths: Sequence[int] = DEPTHS_60,
        base_width: int = 28,
        scale: int = 4,
        block: Callable[..., nn.Module] = DlaBottle2neck,
        num_classes: int = 1000,
        *,
        cardinality: int = 1,
        drop_path_rate: float = 0.0,
        output_stride: int | None = None,
        features_only: bool = False,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if len(depths) != len(LEVEL_CHANNELS):
            raise ValueError(f"layers is {tuple(depths)}; one depth for each of the {len(LEVEL_CHANNELS)} trees is needed")
        drops = iter(drop_paths(drop_path_rate, sum(2**depth for depth in depths)))

        def build(inplanes: int, outplanes: int, stride: int, dilation: int, stage: bool) -> nn.Module:
            drop = next(drops)
            more = {} if drop is None else {"drop_path": drop}
            settings = {"cardinality": cardinality, "base_width": base_width, "scale": scale, "stage": stage}
            return block(inplanes, outplanes, stride, dilation, **settings, **more)

        first, second = STEM_CHANNELS
        self.base_layer = _convolution(in_chans, first, 7, 1)
        self.level0 = _convolution(first, first, 3, 1)
        self.level1 = _convolution(first, second, 3, 2)
        channels = second
        out_strides: list[int] = []
        for i, (stride, first_dilation, dilation) in enumerate(stage_geometry(STRIDES, output_stride)):
            stride = stride if i else 2  # of the first tree's input
            tree = Tree(
                depths[i], build, channels, LEVEL_CHANNELS[i], stride, (first_dilation, dilation), stage=True, own_input=i > 0
            )
            setattr(self, f"level{i + 2}", tree)
            channels = LEVEL_CHANNELS[i]
            out_strides.append(stride * (out_strides[-1] if i else 2))
        self.feature_channels = LEVEL_CHANNELS
        self.feature_strides = tuple(out_strides)
        self.features_only = features_only
        if not features_only:
            self.global_pool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Conv2d(channels, num_classes, kernel_size=1)
        self.initialise()

    def stages(self, x: Tensor) -> list[Tensor]:
        """Returns the output of each level of trees for x (N, in_chans, H, W), as `Network.stages`."""
        x = self.level1(self.level0(self.base_layer(x)))
        features: list[Tensor] = []
        for name, level in self.named_children():
            if name.startswith("level") and name not in ("level0", "level1"):
                x = level(x)
                features.append(x)
        return features

    def classify(self, features: Tensor) -> Tensor:
        """Logits (N, num_classes) of the last level's features (N, 1024, H', W')."""
        return self.fc(self.global_pool(features)).flatten(1)


class Tree(nn.Module):
    """A tree of 2 ** depth blocks; (N, in_channels, H, W) -> (N, out_channels, H/stride, W/stride).

    dilations: of the first block, and of all others. stage: whether the first block is of the kind 'stage'.
    own_input: whether the last root also reads this tree's input, pooled to its stride.
    further_channels: of what the last root reads of the trees around this one.
    """

    def __init__(
        self,
        depth: int,
        build: Build,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilations: tuple[int, int] = (1, 1),
        *,
        stage: bool = False,
        own_input: bool = False,
        further_channels: int = 0,
    ) -> None:
        super().__init__()
        first, others = dilations
        self.own_input = own_input
        # Sizes are rounded up, as convolutions do: the published code takes multiples of 32 only, where that changes nothing.
        self.downsample = nn.MaxPool2d(stride, stride, ceil_mode=True) if stride > 1 else nn.Identity()
        self.project: nn.Module = nn.Identity()
        self.root: Root | None = None
        further_channels += in_channels if own_input else 0
        if depth > 1:
            self.tree1: nn.Module = Tree(depth - 1, build, in_channels, out_channels, stride, dilations, stage=stage)
            self.tree2: nn.Module = Tree(
                depth - 1, build, out_channels, out_channels, 1, (others, others),
                further_channels=further_channels + out_channels,
            )  # fmt: skip
            return
        self.tree1 = build(in_channels, out_channels, stride, first, stage)
        self.tree2 = build(out_channels, out_channels, 1, others, False)
        if in_channels != out_channels:
            self.project = projection(in_channels, out_channels, 1)
        self.root = Root(2 * out_channels + further_channels, out_channels)

    def forward(self, x: Tensor, further: list[Tensor] | None = None) -> Tensor:
        """further: what the last root reads of the trees around this one."""
        read: list[Tensor] = [] if further is None else further
        pooled = self.downsample(x) if self.own_input or self.root is not None else x
        if self.own_input:
            read = read + [pooled]
        if self.root is None:
            first = self.tree1(x)
            return self.tree2(first, read + [first])
        first = self.tree1(x, self.project(pooled))
        return self.root([self.tree2(first), first] + read)


class Root(nn.Module):
    """The end of a tree: all that it reads, concatenated to in_channels, through one 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, bias=False)
        self.bn = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, children: list[Tensor]) -> Tensor:
        return self.relu(self.bn(self.conv(torch.cat(children, 1))))


def _convolution(in_channels: int, out_channels: int, size: int, stride: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))
