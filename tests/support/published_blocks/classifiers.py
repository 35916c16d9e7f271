"""Blocks in the style of image classifiers' code, written from the table of published differences; nothing of it is shared
with the package, and names, attributes and semantics are each code's own.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def projection(inplanes, outplanes, stride):
    return nn.Sequential(nn.Conv2d(inplanes, outplanes, 1, stride, bias=False), nn.BatchNorm2d(outplanes))


def convolutions(count, width, stride=1, dilation=1, groups=1):
    return nn.ModuleList(
        nn.Conv2d(width, width, 3, stride, dilation, dilation, groups=groups, bias=False) for _ in range(count)
    )


class Res2NextBlock(nn.Module):
    """Official res2next: width = floor(planes * bw / 64) * C with C groups; every first block of a stage is a 'stage' block."""

    expansion = 4

    def __init__(self, inplanes, planes, stride=1, downsample=None, baseWidth=8, scale=4, stype="normal", cardinality=4):
        super().__init__()
        width = int(math.floor(planes * (baseWidth / 64.0))) * cardinality
        self.conv1 = nn.Conv2d(inplanes, width * scale, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width * scale)
        self.nums = max(1, scale - 1)
        if stype == "stage":
            self.pool = nn.AvgPool2d(3, stride, padding=1)
        self.convs = convolutions(self.nums, width, stride, groups=cardinality)
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(self.nums))
        self.conv3 = nn.Conv2d(width * scale, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = downsample
        self.stype, self.width, self.scale = stype, width, scale

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        pieces = torch.split(out, self.width, 1)
        sp, collected = None, []
        for i in range(self.nums):
            sp = pieces[i] if sp is None or self.stype == "stage" else sp + pieces[i]
            sp = self.relu(self.bns[i](self.convs[i](sp)))
            collected.append(sp)
        if self.scale != 1:
            collected.append(self.pool(pieces[-1]) if self.stype == "stage" else pieces[-1])
        out = self.after_bn3(self.bn3(self.conv3(torch.cat(collected, 1))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)

    def after_bn3(self, out):
        return out


class V1bBlock(Res2NextBlock):
    """v1b: the plain block, whose shortcut pools before it projects."""

    def __init__(self, inplanes, planes, stride, first):
        downsample = None
        if first:
            downsample = nn.Sequential(
                nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False), *projection(inplanes, planes * 4, 1)
            )
        stype = "stage" if first else "normal"
        super().__init__(inplanes, planes, stride, downsample, 26, 4, stype, cardinality=1)


class LinearGate(nn.Module):
    """Squeeze-and-excitation by two Linear layers."""

    def __init__(self, channels, reduction=8):
        super().__init__()
        inside = channels // reduction
        self.fc = nn.Sequential(nn.Linear(channels, inside), nn.ReLU(inplace=True), nn.Linear(inside, channels), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean((2, 3)))[:, :, None, None]


class AntiSpoofingBlock(Res2NextBlock):
    """The block of speech anti-spoofing: half as wide an output, widths down to 3, the gate after bn3 by Linear layers."""

    expansion = 2

    def __init__(self, inplanes, planes, stride, first, gated=True):
        downsample = projection(inplanes, planes * 2, stride) if first else None
        super().__init__(inplanes, planes, stride, downsample, 14, 4, "stage" if first else "normal", cardinality=1)
        if gated:
            self.se = LinearGate(planes * 2)

    def after_bn3(self, out):
        return self.se(out) if hasattr(self, "se") else out


class DlaBlock(nn.Module):
    """Official dla: no downsample, the shortcut is handed in as `residual`; a 'stage' block only where it strides."""

    def __init__(self, inplanes, planes, stride=1, dilation=1, scale=4, groups=1):
        super().__init__()
        width = planes * 8 // 32 if groups > 1 else int(math.floor(planes * (28 / 128.0)))
        self.nums, self.width, self.stride = max(1, scale - 1), width, stride
        self.conv1 = nn.Conv2d(inplanes, width * scale, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width * scale)
        self.convs = convolutions(self.nums, width, stride, dilation, groups)
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(self.nums))
        if stride != 1:
            self.pool = nn.AvgPool2d(3, stride, padding=1)
        self.conv3 = nn.Conv2d(width * scale, planes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x, residual=None):
        if residual is None:
            residual = x
        pieces = torch.split(self.relu(self.bn1(self.conv1(x))), self.width, 1)
        sp, collected = None, []
        for i in range(self.nums):
            sp = pieces[i] if sp is None or self.stride != 1 else sp + pieces[i]
            sp = self.relu(self.bns[i](self.convs[i](sp)))
            collected.append(sp)
        collected.append(pieces[-1] if self.stride == 1 else self.pool(pieces[-1]))
        out = self.bn3(self.conv3(torch.cat(collected, 1)))
        out += residual
        return self.relu(out)


class CifarBlock(nn.Module):
    """The block of the CIFAR code: conv2 and bn2 are lists, the first group passes, conv1 strides, every block adds."""

    expansion = 4

    def __init__(self, inplanes, planes, downsample=None, stride=1, scales=4, groups=2, se=True):
        super().__init__()
        width = planes * groups
        self.conv1 = nn.Conv2d(inplanes, width * scales, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width * scales)
        self.conv2 = convolutions(scales - 1, width, groups=groups)
        self.bn2 = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(scales - 1))
        self.conv3 = nn.Conv2d(width * scales, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        self.relu = nn.ReLU(inplace=True)
        self.se = LinearGate(planes * self.expansion) if se else None
        self.downsample, self.stride, self.scales = downsample, stride, scales

    def forward(self, x):
        pieces = torch.chunk(self.relu(self.bn1(self.conv1(x))), self.scales, 1)
        collected = []
        for i in range(self.scales):
            if i == 0:
                collected.append(pieces[i])
            elif i == 1:
                collected.append(self.relu(self.bn2[i - 1](self.conv2[i - 1](pieces[i]))))
            else:
                collected.append(self.relu(self.bn2[i - 1](self.conv2[i - 1](pieces[i] + collected[-1]))))
        out = self.bn3(self.conv3(torch.cat(collected, 1)))
        if self.se is not None:
            out = self.se(out)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ConvNormLayer(nn.Module):
    def __init__(self, in_channels, out_channels, kernel, stride=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)
        self.act = act

    def forward(self, x):
        out = self.norm(self.conv(x))
        return F.relu(out) if self.act else out


class PaddleBlock(nn.Module):
    """PaddleClas: branches 2a, 2b and 2c; a 'stage' block only at stride 2, whose pool leaves its padding uncounted."""

    def __init__(self, inplanes, planes, stride=1, shortcut=True, width=8, scales=4):
        super().__init__()
        self.stride, self.scales, self.shortcut = stride, scales, shortcut
        self.branch2a = ConvNormLayer(inplanes, width * scales, 1)
        self.branch2b = nn.ModuleList(ConvNormLayer(width, width, 3, stride) for _ in range(scales - 1))
        self.branch2c = ConvNormLayer(width * scales, planes * 4, 1, act=False)
        if not shortcut:
            pool = [nn.AvgPool2d(2, 2, ceil_mode=True)] if stride == 2 else []
            self.short = nn.Sequential(*pool, *projection(inplanes, planes * 4, 1))

    def forward(self, x):
        pieces = torch.chunk(self.branch2a(x), self.scales, 1)
        collected = []
        for i, branch in enumerate(self.branch2b):
            collected.append(branch(pieces[i] if i == 0 or self.stride == 2 else pieces[i] + collected[-1]))
        last = pieces[-1]
        collected.append(last if self.stride == 1 else F.avg_pool2d(last, 3, self.stride, 1, count_include_pad=False))
        out = self.branch2c(torch.cat(collected, 1))
        return F.relu(out + (x if self.shortcut else self.short(x)))
