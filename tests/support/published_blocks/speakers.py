"""Blocks in the style of speaker-verification code, written from the table of published differences."""

import torch
from torch import nn

from .classifiers import convolutions, projection


class ReLU(nn.Hardtanh):
    """ReLU as that code means it: clamped to 0 ... 20."""

    def __init__(self, inplace=False):
        super().__init__(0, 20, inplace)


class BasicBlockRes2Net(nn.Module):
    """WeSpeaker, 3D-Speaker: the stride on conv1, clamped activations, the last group passes, an empty shortcut is identity."""

    expansion = 2

    def __init__(self, in_planes, planes, stride=1, baseWidth=32, scale=2):
        super().__init__()
        width = planes * baseWidth // 64
        self.conv1 = nn.Conv2d(in_planes, width * scale, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width * scale)
        self.nums = self.convolved(scale)
        self.convs = convolutions(self.nums, width)
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(self.nums))
        self.relu = ReLU(inplace=True)
        self.conv3 = nn.Conv2d(width * scale, planes * self.expansion, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(planes * self.expansion)
        changes = stride != 1 or in_planes != planes * self.expansion
        self.shortcut = projection(in_planes, planes * self.expansion, stride) if changes else nn.Sequential()
        self.stride, self.width, self.scale = stride, width, scale

    @staticmethod
    def convolved(scale):
        return scale - 1

    def join(self, sp, piece, i):
        return sp + piece

    def forward(self, x):
        pieces = torch.split(self.relu(self.bn1(self.conv1(x))), self.width, 1)
        sp, out = pieces[0], []
        for i in range(self.nums):
            sp = sp if i == 0 else self.join(sp, pieces[i], i)
            sp = self.relu(self.bns[i](self.convs[i](sp)))
            out.append(sp)
        out = torch.cat([*out, *pieces[self.nums :]], 1)
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return self.relu(out)


class ERes2NetBlock(BasicBlockRes2Net):
    """ERes2Net: every group is convolved."""

    @staticmethod
    def convolved(scale):
        return scale


class AttentionFusion(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.local_att = nn.Conv2d(channels * 2, channels, 1)

    def forward(self, x, y):
        weight = 1 + torch.tanh(self.local_att(torch.cat((x, y), 1)))
        return x * weight + y * (2 - weight)


class FusedERes2NetBlock(ERes2NetBlock):
    """ERes2Net's later stages: the groups are joined by attention, not by an addition."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.fuse_models = nn.ModuleList(AttentionFusion(self.width) for _ in range(self.nums - 1))

    def join(self, sp, piece, i):
        return self.fuse_models[i - 1](sp, piece)


class GatedBlock(BasicBlockRes2Net):
    """Channel-wise gated Res2Net: what goes to the next group passes a gate."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.gates = nn.ModuleList(nn.Linear(self.width * 2, self.width) for _ in range(self.nums - 1))

    def join(self, sp, piece, i):
        both = torch.cat((sp, piece), 1).mean((2, 3))
        return piece + sp * torch.sigmoid(self.gates[i - 1](both))[:, :, None, None]


class SpeakerNet(nn.Module):
    """The residual part of a speaker network for features (N, 1, 80, T): four stages, the stride on the first conv1."""

    def __init__(self, layers, scale=2, channels=32):
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, 1, 1, bias=False)
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU()
        blocks, inplanes = [], channels
        for stage, count in enumerate(layers):
            for k in range(count):
                stride = 2 if stage > 0 and k == 0 else 1
                blocks.append(BasicBlockRes2Net(inplanes, channels << stage, stride, scale=scale))
                inplanes = blocks[-1].conv3.out_channels
        self.layers = nn.Sequential(*blocks)

    def forward(self, x):
        return self.layers(self.relu(self.bn1(self.conv1(x))))
