"""1-D blocks in the style of speaker-verification code (ECAPA-TDNN), written from the table of published differences."""

import torch
import torch.nn.functional as F
from torch import nn


class PaddedConv1d(nn.Module):
    """Pads as "same" does, outside of its convolution."""

    def __init__(self, channels, kernel_size, dilation, padding_mode="reflect"):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel_size, dilation=dilation)
        self.reach, self.padding_mode = dilation * (kernel_size // 2), padding_mode

    def forward(self, x):
        return self.conv(F.pad(x, (self.reach, self.reach), mode=self.padding_mode))


class WrappedNorm(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.norm = nn.BatchNorm1d(channels)

    def forward(self, x):
        return self.norm(x)


class TDNNUnit(nn.Module):
    """Convolution, activation, norm, dropout."""

    def __init__(self, channels, kernel_size, dilation, activation, dropout):
        super().__init__()
        self.conv = PaddedConv1d(channels, kernel_size, dilation)
        self.activation = activation()
        self.norm = WrappedNorm(channels)
        self.dropout = nn.Dropout1d(dropout)

    def forward(self, x):
        return self.dropout(self.norm(self.activation(self.conv(x))))


class SpeechBrainChain(nn.Module):
    """The chain alone: the first group passes, the second is convolved without an add, rows are reflected."""

    def __init__(self, channels=32, scale=8, kernel_size=3, dilation=2, activation=nn.ReLU, dropout=0.0):
        super().__init__()
        self.blocks = nn.ModuleList(
            TDNNUnit(channels // scale, kernel_size, dilation, activation, dropout) for _ in range(scale - 1)
        )
        self.scale = scale

    def forward(self, x):
        pieces = torch.chunk(x, self.scale, dim=1)
        y = [pieces[0], self.blocks[0](pieces[1])]
        for block, piece in zip(self.blocks[1:], pieces[2:], strict=True):
            y.append(block(piece + y[-1]))
        return torch.cat(y, 1)


class WeSpeakerChain(nn.Module):
    """The chain alone: convs, bns, a function for ReLU; the last group passes, zeros beyond the ends."""

    def __init__(self, channels=32, dilation=2, scale=8, bias=True):
        super().__init__()
        self.width, self.nums = channels // scale, max(1, scale - 1)
        self.convs = nn.ModuleList(
            nn.Conv1d(self.width, self.width, 3, padding=dilation, dilation=dilation, bias=bias) for _ in range(self.nums)
        )
        self.bns = nn.ModuleList(nn.BatchNorm1d(self.width) for _ in range(self.nums))

    def forward(self, x):
        pieces = torch.split(x, self.width, 1)
        out, sp = [], pieces[0]
        for i, (conv, bn) in enumerate(zip(self.convs, self.bns, strict=True)):
            sp = sp if i == 0 else sp + pieces[i]
            sp = bn(F.relu(conv(sp)))
            out.append(sp)
        return torch.cat([*out, *pieces[self.nums :]], 1)


class ChannelGate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        inside = [nn.Conv1d(channels, 8, 1), nn.ReLU(), nn.Conv1d(8, channels, 1)]
        self.se = nn.Sequential(nn.AdaptiveAvgPool1d(1), *inside, nn.Sigmoid())

    def forward(self, x):
        return x * self.se(x)


class ESPnetBlock(nn.Module):
    """A whole bottleneck: conv1 -> ReLU -> bn1, the chain, conv3 -> ReLU -> bn3, the gate, and the addition of x."""

    def __init__(self, channels=32, dilation=3, scale=8):
        super().__init__()
        width = channels // scale
        self.conv1 = nn.Conv1d(channels, width * scale, 1)
        self.bn1 = nn.BatchNorm1d(width * scale)
        self.nums = scale - 1
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, dilation=dilation, padding=dilation) for _ in range(self.nums))
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(self.nums))
        self.conv3 = nn.Conv1d(width * scale, channels, 1)
        self.bn3 = nn.BatchNorm1d(channels)
        self.relu = nn.ReLU()
        self.width = width
        self.se = ChannelGate(channels)

    def forward(self, x):
        out = self.bn1(self.relu(self.conv1(x)))
        pieces = torch.split(out, self.width, 1)
        for i in range(self.nums):
            sp = pieces[i] if i == 0 else sp + pieces[i]  # noqa: F821
            sp = self.bns[i](self.relu(self.convs[i](sp)))
            out = sp if i == 0 else torch.cat((out, sp), 1)
        out = torch.cat((out, pieces[self.nums]), 1)
        out = self.se(self.bn3(self.relu(self.conv3(out))))
        out += x
        return out
