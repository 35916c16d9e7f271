"""Networks in the shape of ResNet: Res2Net, Res2NeXt, their SE and v1b forms, for ImageNet and CIFAR, and ResNet itself.

The tables are those of arXiv:1904.01169, arXiv:1512.03385 and arXiv:1611.05431. A stem, then stages of bottlenecks, of which
each but the first halves its input. The first block of every stage is a 'stage' block. State_dict keys are those of the
published Res2Net checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from ..modules.bottle2neck import Bottle2neck
from .layers import drop_paths
from .network import Network, stage_geometry

PLANES = (64, 128, 256, 512)
CIFAR_PLANES = (64, 128, 256)
LAYERS_50 = (3, 4, 6, 3)
STEM_CHANNELS = 64
STEM_STRIDES = {"imagenet": 4, "deep": 4, "cifar": 1}  # of the first stage's input


class Res2Net(Network):
    """A network of Res2Net bottlenecks; (N, in_chans, H, W) -> logits (N, num_classes), or features (see `Network`).

    layers: blocks in each stage. base_width, scale: w for 64 planes, and s. cardinality: groups of the 3x3 convolutions.
    block: a class with the published signature, (inplanes, planes, stride, downsample, baseWidth, scale, stype), and an
        `expansion`; cardinality, dilation, attn_layer and drop_path are passed to it where they are not the default.
    planes: of each stage, whose output has planes * block.expansion channels.
    stem: "imagenet" (7x7 of stride 2 and max-pool), "deep" (three 3x3 convolutions instead of the 7x7) or "cifar" (one 3x3).
    pooled_shortcut: whether a strided shortcut is an average pool before its 1x1 convolution rather than a strided one.
    stage_passthrough: of the 'stage' blocks: "last", or "none", which convolves all s groups.
    attn_layer: called with a block's channels, makes the attention behind its bn3.
    drop_path_rate: stochastic depth of the last block; earlier ones drop proportionally less.
    output_stride: of the last stage, by dilation; the strides of the stages but the first are allowed, None for the last's.
    features_only: no classifier; forward returns the list of every stage's output. in_chans: channels of the images.
    Raises ValueError, naming the argument, for values that do not fit.
    """

    def __init__(
        self,
        layers: Sequence[int],
        base_width: int = 26,
        scale: int = 4,
        block: Any = Bottle2neck,
        num_classes: int = 1000,
        *,
        cardinality: int = 1,
        planes: Sequence[int] = PLANES,
        stem: str = "imagenet",
        pooled_shortcut: bool = False,
        stage_passthrough: str = "last",
        attn_layer: Callable[[int], nn.Module] | None = None,
        drop_path_rate: float = 0.0,
        output_stride: int | None = None,
        features_only: bool = False,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        if len(layers) != len(planes):
            raise ValueError(f"layers is {tuple(layers)}; one number of blocks for each of the {len(planes)} stages is needed")
        if stem not in STEM_STRIDES:
            raise ValueError(f"stem is {stem!r}; allowed are {', '.join(map(repr, STEM_STRIDES))}")
        self.conv1 = _stem(stem, in_chans)
        self.bn1 = nn.BatchNorm2d(STEM_CHANNELS)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.Identity() if stem == "cifar" else nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        strides = [STEM_STRIDES[stem] * 2**i for i in range(len(planes))]
        drops = iter(drop_paths(drop_path_rate, sum(layers)))
        channels = STEM_CHANNELS
        out_strides = [strides[0]]
        for i, (stride, first_dilation, dilation) in enumerate(stage_geometry(strides, output_stride)):
            out_channels = planes[i] * block.expansion
            blocks = []
            for j in range(layers[i]):
                grouped = {"cardinality": cardinality, "dilation": dilation if j else first_dilation}
                more: dict[str, object] = {name: value for name, value in grouped.items() if value != 1}
                more |= {k: v for k, v in (("attn_layer", attn_layer), ("drop_path", next(drops))) if v is not None}
                if not j and stage_passthrough != "last":
                    more["passthrough"] = stage_passthrough
                shortcut = None if j else projection(channels, out_channels, stride, pooled_shortcut, dilation > 1)
                stype = "normal" if j else "stage"
                first_stride = 1 if j else stride
                blocks.append(
                    block(channels, planes[i], first_stride, shortcut, baseWidth=base_width, scale=scale, stype=stype, **more)
                )
                channels = out_channels
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            if i:
                out_strides.append(out_strides[-1] * stride)
        self.feature_channels = tuple(p * block.expansion for p in planes)
        self.feature_strides = tuple(out_strides)
        self.features_only = features_only
        if not features_only:
            self.avgpool = nn.AdaptiveAvgPool2d(1)
            self.fc = nn.Linear(channels, num_classes)
        self.initialise()

    def stages(self, x: Tensor) -> list[Tensor]:
        """Returns the output of each stage for x (N, in_chans, H, W), as `Network.stages`."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        features: list[Tensor] = []
        for name, stage in self.named_children():
            if name.startswith("layer"):
                x = stage(x)
                features.append(x)
        return features

    def classify(self, features: Tensor) -> Tensor:
        """Logits (N, num_classes) of the last stage's features (N, C, H', W')."""
        return self.fc(self.avgpool(features).flatten(1))


def _stem(stem: str, in_chans: int) -> nn.Module:
    """(N, in_chans, H, W) -> (N, 64, H', W'), without the norm behind it."""
    if stem == "cifar":
        return nn.Conv2d(in_chans, STEM_CHANNELS, kernel_size=3, padding=1, bias=False)
    if stem == "imagenet":
        return nn.Conv2d(in_chans, STEM_CHANNELS, kernel_size=7, stride=2, padding=3, bias=False)
    inner = STEM_CHANNELS // 2
    layers: list[nn.Module] = []
    for channels, stride in ((in_chans, 2), (inner, 1)):
        layers.append(nn.Conv2d(channels, inner, kernel_size=3, stride=stride, padding=1, bias=False))
        layers += [nn.BatchNorm2d(inner), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(inner, STEM_CHANNELS, kernel_size=3, padding=1, bias=False))


def projection(in_channels: int, out_channels: int, stride: int, pooled: bool = False, dilated: bool = False) -> nn.Module:
    """The shortcut of a stage's first block, (N, in_channels, H, W) -> (N, out_channels, ceil(H/stride), ceil(W/stride)).

    pooled: whether an average pool strides, before the 1x1 convolution. dilated: whether the stage dilates instead of striding;
    a pool then reads the pixels that it would read on the strided input, two by two, as timm's networks do.
    """
    conv = nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=1 if pooled else stride, bias=False)
    norm = nn.BatchNorm2d(out_channels)
    if not pooled:
        return nn.Sequential(conv, norm)
    if dilated:
        pool: nn.Module = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.AvgPool2d(2, 1))  # timm, too, counts the zeros
    elif stride > 1:
        pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
    else:
        pool = nn.Identity()
    return nn.Sequential(pool, conv, norm)


def res2net50(
    base_width: int = 26, scale: int = 4, block: Callable[..., nn.Module] = Bottle2neck, num_classes: int = 1000
) -> Res2Net:
    """Res2Net-50 (arXiv:1904.01169) with random weights: 26w4s by default; 48w2s and 14w8s have the FLOPs of ResNet-50 too.

    base_width, scale: w for 64 planes, and s. block, num_classes: as for `Res2Net`. (N, 3, H, W) -> (N, num_classes).
    """
    return Res2Net(LAYERS_50, base_width, scale, block, num_classes)


def resnet50(block: Callable[..., nn.Module] = Bottle2neck, num_classes: int = 1000) -> Res2Net:
    """ResNet-50 as Res2Net with s = 1 and w = 64, the stride on the 3x3; keys are Res2Net's (`convs.0` for `conv2`).

    block, num_classes: as for `Res2Net`. (N, 3, H, W) -> (N, num_classes).
    """
    return Res2Net(LAYERS_50, 64, 1, block, num_classes)
