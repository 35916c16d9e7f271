"""Res2Net-50 and its yardstick ResNet-50, from the tables of arXiv:1904.01169 and arXiv:1512.03385.

A 7x7 stem and a max-pool, then four stages of bottlenecks with planes 64, 128, 256 and 512 at strides 4, 8, 16 and 32 of the
image. The first block of every stage is a 'stage' block. State_dict keys are those of the published Res2Net checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from ..bottle2neck import Bottle2neck

PLANES = (64, 128, 256, 512)
LAYERS_50 = (3, 4, 6, 3)


class Res2Net(nn.Module):
    """A network of Res2Net bottlenecks; (N, 3, H, W) -> logits (N, num_classes).

    block: a class with the published signature, (inplanes, planes, stride, downsample, baseWidth, scale, stype), and an
        `expansion`. layers: blocks in each of the four stages. base_width, scale: w of the first stage and s.
    """

    def __init__(
        self,
        layers: Sequence[int],
        base_width: int = 26,
        scale: int = 4,
        block: Callable[..., nn.Module] = Bottle2neck,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        if len(layers) != len(PLANES):
            raise ValueError(f"layers is {tuple(layers)}; one number of blocks for each of the {len(PLANES)} stages is needed")
        self.conv1 = nn.Conv2d(3, PLANES[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(PLANES[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        channels = PLANES[0]
        for stage, (planes, depth) in enumerate(zip(PLANES, layers, strict=True), start=1):
            out_channels = planes * block.expansion
            first_stride = 1 if stage == 1 else 2  # the max-pool has already halved the first stage's input
            blocks = []
            for i in range(depth):
                stride = first_stride if i == 0 else 1
                shortcut = _projection(channels, out_channels, stride) if i == 0 else None
                stype = "stage" if i == 0 else "normal"
                blocks.append(block(channels, planes, stride, shortcut, baseWidth=base_width, scale=scale, stype=stype))
                channels = out_channels
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def stages(self, x: Tensor) -> list[Tensor]:
        """The output of each of the four stages, (N, 4 * planes, H / stride, W / stride) with strides 4, 8, 16, 32."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        features = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = layer(x)
            features.append(x)
        return features

    def classify(self, features: Tensor) -> Tensor:
        """Logits (N, num_classes) of the last stage's output."""
        return self.fc(self.avgpool(features).flatten(1))

    def forward(self, x: Tensor) -> Tensor:
        return self.classify(self.stages(x)[-1])


def _projection(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """The shortcut of a stage's first block."""
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel_size=1, stride=stride, bias=False), nn.BatchNorm2d(out_channels)
    )


def res2net50(
    base_width: int = 26, scale: int = 4, block: Callable[..., nn.Module] = Bottle2neck, num_classes: int = 1000
) -> Res2Net:
    """Res2Net-50 with random weights: 26w4s by default; 48w2s and 14w8s have the FLOPs of ResNet-50 too."""
    return Res2Net(LAYERS_50, base_width, scale, block, num_classes)


def resnet50(block: Callable[..., nn.Module] = Bottle2neck, num_classes: int = 1000) -> Res2Net:
    """ResNet-50 as Res2Net with s = 1 and w = 64, the stride on the 3x3; keys are Res2Net's (`convs.0` for `conv2`)."""
    return Res2Net(LAYERS_50, 64, 1, block, num_classes)
