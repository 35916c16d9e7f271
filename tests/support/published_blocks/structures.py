"""Blocks of the Res2Net kind under nobody's names: wrappers, Sequentials, numbered attributes, no norms, no shortcut."""

import torch
import torch.nn.functional as F
from torch import nn

from .speakers1d import PaddedConv1d


class Conv(nn.Module):
    """A convolution with its norm and activation, as YOLO's code wraps them."""

    def __init__(self, c1, c2, k=1, s=1, d=1, g=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, d * (k // 2), d, g, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.ReLU(inplace=True) if act is True else act or nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))


class FoldableConv(Conv):
    """The same with YOLO's way to fold the norm: the norm is gone, and another method takes forward's place."""

    def fuse(self):
        norm, conv = self.bn, self.conv
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        folded = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation)
        folded.weight = nn.Parameter((conv.weight * scale[:, None, None, None]).detach())
        folded.bias = nn.Parameter((norm.bias - norm.running_mean * scale).detach())
        self.conv = folded
        delattr(self, "bn")
        self.forward = self.forward_fuse

    def forward_fuse(self, x):
        return self.act(self.conv(x))


class Foldable(nn.Module):
    def fuse(self):
        for module in self.modules():
            if isinstance(module, FoldableConv) and hasattr(module, "bn"):
                module.fuse()
        return self


class YoloBlock(Foldable):
    """cv1, cv2 and the list m, registered in that order; cv2 activates before the addition."""

    def __init__(self, c1=32, c2=32, width=8, scale=4, shortcut=True, act=True, unit=Conv):
        super().__init__()
        self.cv1 = unit(c1, width * scale, act=act)
        self.cv2 = unit(width * scale, c2, act=act)
        self.m = nn.ModuleList(unit(width, width, 3, act=act) for _ in range(scale - 1))
        self.add, self.scale = shortcut and c1 == c2, scale

    def forward(self, x):
        pieces, out = self.cv1(x).chunk(self.scale, 1), []
        for i, conv in enumerate(self.m):
            out.append(conv(pieces[i] if i == 0 else pieces[i] + out[-1]))
        out = self.cv2(torch.cat([*out, pieces[-1]], 1))
        return x + out if self.add else out


class YoloBottle2neck(Foldable):
    """The published names around wrappers: the last activation is the block's own, behind the addition."""

    def __init__(self, inplanes=32, planes=32, width=8, scale=4, shortcut=True, unit=Conv):
        super().__init__()
        self.conv1 = unit(inplanes, width * scale)
        self.convs = nn.ModuleList(unit(width, width, 3) for _ in range(scale - 1))
        self.conv3 = unit(width * scale, planes, act=False)
        self.last = nn.ReLU(inplace=True)
        self.width, self.shortcut = width, shortcut

    def forward(self, x):
        pieces, out = torch.split(self.conv1(x), self.width, 1), []
        for i, conv in enumerate(self.convs):
            out.append(conv(pieces[i] if i == 0 else pieces[i] + out[-1]))
        out = self.conv3(torch.cat([*out, pieces[-1]], 1))
        if self.shortcut:
            out += x
        return self.last(out)


class WithoutNorms(nn.Module):
    """Convolutions with a bias and functions for ReLU, no norm anywhere, as in super-resolution."""

    def __init__(self, channels=32, scale=4, adds=True):
        super().__init__()
        width = channels // scale
        self.head = nn.Conv2d(channels, channels, 1)
        self.steps = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(scale - 1))
        self.tail = nn.Conv2d(channels, channels, 1)
        self.scale, self.adds = scale, adds

    def forward(self, x):
        pieces = F.relu(self.head(x)).chunk(self.scale, 1)
        out = [pieces[0], F.relu(self.steps[0](pieces[1]))]
        for step, piece in zip(self.steps[1:], pieces[2:], strict=True):
            out.append(F.relu(step(piece + out[-1])))
        out = self.tail(torch.cat(out, 1))
        return x + out if self.adds else out


def unit(c1, c2, k, stride=1, act=True):
    return nn.Sequential(
        nn.Conv2d(c1, c2, k, stride, k // 2, bias=False), nn.BatchNorm2d(c2), *([nn.ReLU(inplace=True)] if act else [])
    )


class SequentialBlock(nn.Module):
    """Every part lies in a Sequential; the shortcut projects. nested: the chain's Sequentials lie in one."""

    def __init__(self, c1=24, c2=32, width=6, scale=4, stride=1):
        super().__init__()
        self.reduce = unit(c1, width * scale, 1, stride)
        self.body = nn.Sequential(*(unit(width, width, 3) for _ in range(scale)))
        self.expand = unit(width * scale, c2, 1, act=False)
        self.skip = unit(c1, c2, 1, stride, act=False)
        self.final = nn.ReLU()
        self.width = width

    def forward(self, x):
        out = []
        for step, piece in zip(self.body, self.reduce(x).split(self.width, 1), strict=True):
            out.append(step(piece if not out else piece + out[-1]))
        return self.final(self.expand(torch.cat(out, 1)) + self.skip(x))


def max_of_nine(x):
    return F.max_pool2d(x, 3, 1, 1)


class NumberedBlock(nn.Module):
    """Attributes with numbers in place of lists, norms registered beside their convolutions; the passed group may be pooled."""

    def __init__(self, channels=32, width=8, pool=None, adds=True):
        super().__init__()
        self.entry, self.entry_norm = nn.Conv2d(channels, width * 4, 1, bias=False), nn.BatchNorm2d(width * 4)
        for i in (1, 2, 3):
            self.add_module(f"conv3x3_{i}", nn.Conv2d(width, width, 3, padding=1, bias=False))
            self.add_module(f"norm_{i}", nn.BatchNorm2d(width))
        self.exit, self.exit_norm = nn.Conv2d(width * 4, channels, 1, bias=False), nn.BatchNorm2d(channels)
        self.nonlinear = nn.ReLU(inplace=True)
        self.pooling, self.adds = pool, adds

    def forward(self, x):
        a, b, c, d = self.nonlinear(self.entry_norm(self.entry(x))).chunk(4, 1)
        a = self.nonlinear(self.norm_1(self.conv3x3_1(a)))
        b = self.nonlinear(self.norm_2(self.conv3x3_2(a + b)))
        c = self.nonlinear(self.norm_3(self.conv3x3_3(b + c)))
        d = d if self.pooling is None else self.pooling(d)
        out = self.exit_norm(self.exit(torch.cat((a, b, c, d), 1)))
        return self.nonlinear(out + x if self.adds else out)


class StridedMaxPool(nn.Module):
    """The first block of a stage: nothing is added, the convolutions stride, and the passed group is pooled to their size."""

    def __init__(self, inplanes=24, planes=32, width=6, scale=4):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inplanes, width * scale, 1, bias=False), nn.BatchNorm2d(width * scale)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, 2, 1, bias=False) for _ in range(scale - 1))
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(scale - 1))
        self.conv3, self.bn3 = nn.Conv2d(width * scale, planes, 1, bias=False), nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = unit(inplanes, planes, 1, 2, act=False)

    def forward(self, x):
        *pieces, last = self.relu(self.bn1(self.conv1(x))).chunk(len(self.convs) + 1, 1)
        out = [self.relu(bn(conv(p))) for conv, bn, p in zip(self.convs, self.bns, pieces, strict=True)]
        out = self.bn3(self.conv3(torch.cat([*out, self.pool(last)], 1)))
        return self.relu(out + self.downsample(x))


class ChainInside(nn.Module):
    """The chain is a module of its own between the 1x1 convolutions, and an attention follows them."""

    class Chain(nn.Module):
        def __init__(self, width, steps):
            super().__init__()
            self.kernels = nn.ModuleList(unit(width, width, 3) for _ in range(steps))
            self.width = width

        def forward(self, x):
            pieces, out = x.split(self.width, 1), []
            for i, kernel in enumerate(self.kernels):
                out.append(kernel(pieces[i] if i == 0 else pieces[i] + out[-1]))
            return torch.cat([*out, *pieces[len(out) :]], 1)

    class Gate(nn.Module):
        def __init__(self, channels):
            super().__init__()
            self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)

        def forward(self, x):
            return x * torch.sigmoid(self.up(F.relu(self.down(x.mean((2, 3), keepdim=True)))))

    def __init__(self, channels=32, width=8, scale=4):
        super().__init__()
        self.inp = unit(channels, width * scale, 1)
        self.multi = self.Chain(width, scale - 1)
        self.out = unit(width * scale, channels, 1, act=False)
        self.gate = self.Gate(channels)

    def forward(self, x):
        return F.relu(x + self.gate(self.out(self.multi(self.inp(x)))))


# Along rows ------------------------------------------------------------------------------------------------------------


class CodecUnit(nn.Module):
    def __init__(self, channels, kernel_size, dilation):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel_size, dilation=dilation, padding="same", padding_mode="reflect")
        self.activation = nn.ReLU()

    def forward(self, hidden_states):
        return self.activation(self.conv(hidden_states))


class CodecChain(nn.Module):
    """The ECAPA part of a speech codec: no norms, a bias and ReLU; the first group passes."""

    def __init__(self, channels=32, scale=4, dilation=2, unit=CodecUnit):
        super().__init__()
        self.blocks = nn.ModuleList(unit(channels // scale, 3, dilation) for _ in range(scale - 1))
        self.scale = scale

    def forward(self, hidden_states):
        outputs = []
        for i, piece in enumerate(hidden_states.chunk(self.scale, 1)):
            if i > 0:
                piece = self.blocks[i - 1](piece if i == 1 else piece + outputs[-1])
            outputs.append(piece)
        return torch.cat(outputs, 1)


class PaddedUnit(nn.Module):
    """The same with the padding outside of the convolution."""

    def __init__(self, channels, kernel_size, dilation):
        super().__init__()
        self.padded = PaddedConv1d(channels, kernel_size, dilation)

    def forward(self, x):
        return F.relu(self.padded(x))


class Scaling(nn.Module):
    """Feature-map scaling of raw-waveform networks, behind the addition."""

    def __init__(self, channels):
        super().__init__()
        self.alpha, self.fc = nn.Parameter(torch.ones(channels, 1)), nn.Linear(channels, channels)

    def forward(self, x):
        return (x + self.alpha) * torch.sigmoid(self.fc(x.mean(2)))[:, :, None]


class RawNetBlock(nn.Module):
    """A bottleneck of raw waveforms: ReLU before each norm, a residual convolution, a pool and a scaling after the addition."""

    def __init__(self, inplanes=24, planes=32, kernel_size=3, dilation=2, scale=4, pool=3):
        super().__init__()
        width = planes // scale
        self.conv1, self.bn1 = nn.Conv1d(inplanes, width * scale, 1), nn.BatchNorm1d(width * scale)
        self.nums = scale - 1
        pad = dilation * (kernel_size // 2)
        self.convs = nn.ModuleList(
            nn.Conv1d(width, width, kernel_size, padding=pad, dilation=dilation) for _ in range(self.nums)
        )
        self.bns = nn.ModuleList(nn.BatchNorm1d(width) for _ in range(self.nums))
        self.conv3, self.bn3 = nn.Conv1d(width * scale, planes, 1), nn.BatchNorm1d(planes)
        self.relu = nn.ReLU()
        self.width = width
        self.mp = nn.MaxPool1d(pool) if pool else False
        self.afms = Scaling(planes)
        self.residual = nn.Sequential(nn.Conv1d(inplanes, planes, 1, bias=False)) if inplanes != planes else nn.Identity()

    def forward(self, x):
        residual = self.residual(x)
        pieces, out = torch.split(self.bn1(self.relu(self.conv1(x))), self.width, 1), []
        for i in range(self.nums):
            sp = pieces[i] if i == 0 else out[-1] + pieces[i]
            out.append(self.bns[i](self.relu(self.convs[i](sp))))
        out = self.bn3(self.relu(self.conv3(torch.cat([*out, pieces[-1]], 1))))
        out += residual
        if self.mp:
            out = self.mp(out)
        return self.afms(out)


class RowsInSequentials(nn.Module):
    """A bottleneck along rows with its parts in Sequentials of other names, and no shortcut."""

    def __init__(self, channels=32, width=8, adds=False):
        super().__init__()
        self.inp = nn.Sequential(nn.Conv1d(channels, width * 4, 1), nn.ReLU(), nn.BatchNorm1d(width * 4))
        self.steps = nn.ModuleList(
            nn.Sequential(nn.Conv1d(width, width, 3, padding=1), nn.ReLU(), nn.BatchNorm1d(width)) for _ in range(3)
        )
        self.out = nn.Sequential(nn.Conv1d(width * 4, channels, 1), nn.ReLU(), nn.BatchNorm1d(channels))
        self.adds = adds

    def forward(self, x):
        pieces, out = self.inp(x).chunk(4, 1), []
        for i, step in enumerate(self.steps):
            out.append(step(pieces[i] if i == 0 else pieces[i] + out[-1]))
        out = self.out(torch.cat([*out, pieces[-1]], 1))
        return x + out if self.adds else out


ROWS, IMAGES = (2, 32, 23), (2, 32, 7, 10)
BLOCKS = {
    # name: (a block, the shape of x, whether it is taken over)
    "yolo": (YoloBlock, IMAGES, True),
    "yolo_no_shortcut": (lambda: YoloBlock(32, 48), IMAGES, True),
    "yolo_5": (lambda: YoloBlock(32, 32, 6, 5), IMAGES, True),
    "yolo_bottle2neck": (YoloBottle2neck, IMAGES, True),
    "yolo_bottle2neck_no_shortcut": (lambda: YoloBottle2neck(shortcut=False), IMAGES, True),
    "without_norms": (WithoutNorms, IMAGES, True),
    "without_norms_8": (lambda: WithoutNorms(32, 8), IMAGES, True),
    "without_norms_no_shortcut": (lambda: WithoutNorms(adds=False), IMAGES, True),
    "sequential": (SequentialBlock, (2, 24, 7, 10), True),
    "sequential_strided": (lambda: SequentialBlock(stride=2), (2, 24, 7, 10), True),
    "numbered": (NumberedBlock, IMAGES, True),
    "numbered_no_shortcut": (lambda: NumberedBlock(adds=False), IMAGES, True),
    "numbered_max_pool": (lambda: NumberedBlock(pool=nn.MaxPool2d(3, 1, 1)), IMAGES, True),
    "numbered_max_pool_no_shortcut": (lambda: NumberedBlock(24, 6, nn.MaxPool2d(3, 1, 1), False), (2, 24, 7, 10), True),
    "max_pool_by_function": (lambda: NumberedBlock(pool=max_of_nine), IMAGES, True),
    "max_pool_strided": (StridedMaxPool, (2, 24, 7, 10), True),
    "max_pool_of_five": (lambda: NumberedBlock(pool=nn.MaxPool2d(5, 1, 2)), IMAGES, False),
    "yolo_folded": (lambda: YoloBlock(unit=FoldableConv).fuse(), IMAGES, True),
    "yolo_folded_5": (lambda: YoloBlock(32, 48, 6, 5, unit=FoldableConv).fuse(), IMAGES, True),
    "yolo_bottle2neck_folded": (lambda: YoloBottle2neck(unit=FoldableConv).fuse(), IMAGES, True),
    "chain_inside": (ChainInside, IMAGES, True),
    "codec": (CodecChain, ROWS, True),
    "codec_8": (lambda: CodecChain(32, 8, 3), ROWS, True),
    "codec_padded": (lambda: CodecChain(unit=PaddedUnit), ROWS, True),
    "rawnet": (RawNetBlock, (2, 24, 23), True),
    "rawnet_no_pool": (lambda: RawNetBlock(32, 32, pool=None), ROWS, True),
    "rawnet_8": (lambda: RawNetBlock(24, 32, 5, 3, 8, 2), (2, 24, 23), True),
    "rows_in_sequentials": (RowsInSequentials, ROWS, True),
    "rows_in_sequentials_added": (lambda: RowsInSequentials(adds=True), ROWS, True),
}
