"""A Res2Net in the style of the published code, written by hand from the table of published differences.

It shares nothing with the package: conv1 1x1 -> bn1 -> ReLU -> split; convs[i] 3x3 -> bns[i] -> ReLU; concat; conv3 1x1 ->
bn3; + shortcut; ReLU. The first block of every stage is of stype 'stage': no adds, and an average pool on the last group.
"""

import math

import torch
from torch import nn


class Bottle2neck(nn.Module):
    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None, baseWidth=26, scale=4, stype="normal"):
        super().__init__()
        width = int(math.floor(planes * (baseWidth / 64.0)))
        self.conv1 = nn.Conv2d(inplanes, width * scale, kernel_size=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width * scale)
        self.nums = 1 if scale == 1 else scale - 1
        if stype == "stage":
            self.pool = nn.AvgPool2d(kernel_size=3, stride=stride, padding=1)
        convs, bns = [], []
        for _ in range(self.nums):
            convs.append(nn.Conv2d(width, width, kernel_size=3, stride=stride, padding=1, bias=False))
            bns.append(nn.BatchNorm2d(width))
        self.convs = nn.ModuleList(convs)
        self.bns = nn.ModuleList(bns)
        self.conv3 = nn.Conv2d(width * scale, planes * self.expansion, kernel_size=1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stype = stype
        self.scale = scale
        self.width = width

    def forward(self, x):
        residual = x
        features = self.relu(self.bn1(self.conv1(x)))
        pieces = torch.split(features, self.width, 1)
        previous, collected = None, []
        for i in range(self.nums):
            piece = pieces[i] if i == 0 or self.stype == "stage" else previous + pieces[i]
            previous = self.relu(self.bns[i](self.convs[i](piece)))
            collected.append(previous)
        if self.scale != 1:
            collected.append(self.pass_through(pieces[self.nums]))
        out = self.bn3(self.conv3(torch.cat(collected, 1)))
        if self.downsample is not None:
            residual = self.downsample(x)
        out += residual
        return self.relu(out)

    def pass_through(self, piece):
        return self.pool(piece) if self.stype == "stage" else piece


class IdentityPassBottle2neck(Bottle2neck):
    """mmdetection's: a stage block pools only where it strides, so that layer1.0 passes the last group as it is."""

    def pass_through(self, piece):
        return self.pool(piece) if self.convs[0].stride[0] > 1 else piece


class UncountedPadBottle2neck(Bottle2neck):
    """PaddleClas's: the pool does not count the padding, and stride 1 passes the last group as it is."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.stype == "stage":
            self.pool = nn.AvgPool2d(3, self.convs[0].stride[0], padding=1, count_include_pad=False)


class FirstPassesBottle2neck(Bottle2neck):
    """The CIFAR code's: the first group passes, and the second is convolved without an add."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.stype = "normal"

    def forward(self, x):
        pieces = torch.split(self.relu(self.bn1(self.conv1(x))), self.width, 1)
        collected = [pieces[0]]
        for i in range(self.nums):
            piece = pieces[i + 1] if i == 0 else collected[-1] + pieces[i + 1]
            collected.append(self.relu(self.bns[i](self.convs[i](piece))))
        out = self.bn3(self.conv3(torch.cat(collected, 1)))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Res2Net(nn.Module):
    """A small network: one 3x3 stem, three stages of such blocks, a classifier. x is (N, 3, H, W)."""

    def __init__(self, block=Bottle2neck, layers=(2, 2, 1), baseWidth=26, scale=4, num_classes=5):
        super().__init__()
        self.inplanes = 16
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        sizes = {"baseWidth": baseWidth, "scale": scale}
        self.layer1 = self.make_layer(block, 8, layers[0], 1, sizes)
        self.layer2 = self.make_layer(block, 12, layers[1], 2, sizes)
        self.layer3 = self.make_layer(block, 16, layers[2], 2, sizes)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(16 * block.expansion, num_classes)

    def make_layer(self, block, planes, count, stride, sizes):
        downsample = nn.Sequential(
            nn.Conv2d(self.inplanes, planes * block.expansion, kernel_size=1, stride=stride, bias=False),
            nn.BatchNorm2d(planes * block.expansion),
        )
        blocks = [block(self.inplanes, planes, stride, downsample, stype="stage", **sizes)]
        self.inplanes = planes * block.expansion
        blocks += [block(self.inplanes, planes, **sizes) for _ in range(count - 1)]
        return nn.Sequential(*blocks)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.avgpool(x), 1))
