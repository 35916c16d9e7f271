"""Blocks in the style of detection and segmentation code, written from the table of published differences."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint

from .classifiers import convolutions, projection


class FrozenBatchNorm2d(nn.Module):
    """Detection libraries' norm: statistics and affine are buffers, and never learned. Some have an eps, some none."""

    def __init__(self, channels, eps=None):
        super().__init__()
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((channels,), float(value)))
        if eps is not None:
            self.eps = eps

    def forward(self, x):
        scale = self.weight * (self.running_var + getattr(self, "eps", 0)).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


class Conv2d(nn.Conv2d):
    """A convolution with its norm and activation inside."""

    def __init__(self, *arguments, norm=None, activation=None, **keywords):
        super().__init__(*arguments, bias=False, **keywords)
        self.norm = norm
        self.activation = activation

    def forward(self, x):
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


class MMDetectionBlock(nn.Module):
    """mmdetection, mmpretrain: norms are found by a name that their kind decides; `scales`; plugins; checkpointing.

    In mmdetection a stage block of stride 1 passes its last group as it is, in mmpretrain it pools.
    """

    def __init__(self, inplanes, planes, stride=1, first=False, pools_always=False, norm="bn", with_cp=False, plugin=None):
        super().__init__()
        self.scales, self.stride, self.with_cp = 4, stride, with_cp
        self.stage_type = "stage" if first else "normal"
        self.pools_always = pools_always
        width = int(math.floor(planes * (26 / 64)))
        norms = {"bn": nn.BatchNorm2d, "gn": lambda c: nn.GroupNorm(1, c)}
        self.norm1_name, self.norm3_name = f"{norm}1", f"{norm}3"
        self.conv1 = nn.Conv2d(inplanes, width * 4, 1, bias=False)
        self.add_module(self.norm1_name, norms[norm](width * 4))
        if first:
            self.pool = nn.AvgPool2d(3, stride, padding=1)
        self.convs = convolutions(3, width, stride)
        self.bns = nn.ModuleList(norms[norm](width) for _ in range(3))
        self.conv3 = nn.Conv2d(width * 4, planes * 4, 1, bias=False)
        self.add_module(self.norm3_name, norms[norm](planes * 4))
        self.relu = nn.ReLU(inplace=True)
        self.downsample = projection(inplanes, planes * 4, stride) if first else None
        self.width = width
        self.with_plugins = plugin is not None
        if self.with_plugins:
            self.after_conv3_plugin = plugin

    @property
    def norm1(self):
        return getattr(self, self.norm1_name)

    @property
    def norm3(self):
        return getattr(self, self.norm3_name)

    def forward(self, x):
        def inner_forward(x):
            spx = torch.split(self.relu(self.norm1(self.conv1(x))), self.width, 1)
            sp = self.relu(self.bns[0](self.convs[0](spx[0].contiguous())))
            out = sp
            for i in range(1, self.scales - 1):
                sp = spx[i] if self.stage_type == "stage" else sp + spx[i]
                sp = self.relu(self.bns[i](self.convs[i](sp.contiguous())))
                out = torch.cat((out, sp), 1)
            pooled = self.stage_type == "stage" and (self.stride != 1 or self.pools_always)
            out = torch.cat((out, self.pool(spx[-1]) if pooled else spx[-1]), 1)
            out = self.norm3(self.conv3(out))
            if self.with_plugins:
                out = self.after_conv3_plugin(out)
            out += x if self.downsample is None else self.downsample(x)
            return out

        if self.with_cp and x.requires_grad:
            return self.relu(checkpoint.checkpoint(inner_forward, x, use_reentrant=False))
        return self.relu(inner_forward(x))


class Detectron2Block(nn.Module):
    """Res2Net-detectron2: norms inside conv1 and conv3, a shortcut where the channels change, the stride in the 1x1."""

    def __init__(self, inplanes, planes, stride=1, norm=FrozenBatchNorm2d, stride_in_1x1=True, groups=1):
        super().__init__()
        width = int(math.floor(planes * (26 / 64)))
        outer, inner = (stride, 1) if stride_in_1x1 else (1, stride)
        self.in_channels, self.out_channels, self.width = inplanes, planes * 4, width
        self.shortcut = None
        if self.in_channels != self.out_channels:
            self.shortcut = Conv2d(inplanes, planes * 4, 1, stride=stride, norm=norm(planes * 4))
        self.conv1 = Conv2d(inplanes, width * 4, 1, stride=outer, norm=norm(width * 4))
        self.convs = nn.ModuleList(
            Conv2d(width, width, 3, stride=inner, padding=1, groups=groups) for _ in range(3)
        )  # whose norms are a list of their own
        self.bns = nn.ModuleList(norm(width) for _ in range(3))
        self.conv3 = Conv2d(width * 4, planes * 4, 1, norm=norm(planes * 4))
        if self.in_channels != self.out_channels and inner != 1:
            self.pool = nn.AvgPool2d(3, inner, padding=1)

    def forward(self, x):
        spx = torch.split(F.relu_(self.conv1(x)), self.width, 1)
        collected = []
        for i in range(3):
            adds = i > 0 and self.in_channels == self.out_channels
            sp = collected[-1] + spx[i] if adds else spx[i]
            collected.append(F.relu_(self.bns[i](self.convs[i](sp))))
        collected.append(self.pool(spx[3]) if hasattr(self, "pool") else spx[3])
        out = self.conv3(torch.cat(collected, 1))
        out += x if self.shortcut is None else self.shortcut(x)
        return F.relu_(out)


class MaskRCNNBlock(nn.Module):
    """Res2Net-maskrcnn: official names, frozen norms without an eps, functions for ReLU; the pool pads by the dilation."""

    def __init__(self, inplanes, planes, stride=1, first=False, dilation=1, norm=FrozenBatchNorm2d):
        super().__init__()
        width = int(math.floor(planes * (26 / 64)))
        self.stype, self.width = "stage" if first else "normal", width
        self.downsample = None
        if first:
            self.downsample = nn.Sequential(Conv2d(inplanes, planes * 4, 1, stride=stride), norm(planes * 4))
            self.pool = nn.AvgPool2d(3, stride, padding=dilation)
        self.conv1 = Conv2d(inplanes, width * 4, 1)
        self.bn1 = norm(width * 4)
        self.convs = convolutions(3, width, stride, dilation)
        self.bns = nn.ModuleList(norm(width) for _ in range(3))
        self.conv3 = Conv2d(width * 4, planes * 4, 1)
        self.bn3 = norm(planes * 4)

    def forward(self, x):
        spx = torch.split(F.relu_(self.bn1(self.conv1(x))), self.width, 1)
        collected = []
        for i in range(3):
            sp = spx[i] if i == 0 or self.stype == "stage" else collected[-1] + spx[i]
            collected.append(F.relu_(self.bns[i](self.convs[i](sp))))
        collected.append(spx[3] if self.stype == "normal" else self.pool(spx[3]))
        out = self.bn3(self.conv3(torch.cat(collected, 1)))
        out += x if self.downsample is None else self.downsample(x)
        return F.relu_(out)


class DeformableConv(nn.Module):
    """Stands for a deformable convolution: where it reads is learned."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, width, 3, 3) * 0.1)
        self.conv_offset = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, x):
        return F.conv2d(x + self.conv_offset(x).mean(1, keepdim=True), self.weight, padding=1)
