"""What stands in front of a network's blocks on the CPU: convolutions with BatchNorm folded in, ReLU, and max pooling."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._native import library
from ...chain.memory_format import memory_format
from ...chain.tolerances import first_use_bound
from .settings import instruction_set, operators

MOST_TAPS = 16  # rows of a kernel; kMaxTaps in csrc/cpu/chain/stem.h
_TRIED_ROWS = 40  # of images, when the kernels are compared with float64
_SEED = 20190402

Pair = tuple[int, int]  # of rows and of columns


@dataclass
class StemWeights:
    """A stem's convolutions with their BatchNorms folded in, fp32, plain and packed. pools: 3x3 with stride 2 and padding 1."""

    weights: list[Tensor]  # each (out, in, kh, kw)
    biases: list[Tensor]  # each (out,)
    strides: list[Pair]
    paddings: list[Pair]
    pools: bool
    packed: list[Tensor] = field(default_factory=list)
    made: Any = None  # a MadeOn of modules/made_on.py, which CPUs need none of

    @property
    def geometry(self) -> list[int]:
        """Seven numbers for each convolution, as the operator takes them."""
        settings = zip(self.weights, self.strides, self.paddings, strict=True)
        return [n for weight, stride, padding in settings for n in (len(weight), *weight.shape[2:], *stride, *padding)]

    def sizes(self, x: Tensor) -> list[tuple[int, ...]]:
        """The shapes of x (N, C, H, W), of each convolution's output and of the pooled one; sizes below 1 are of no image."""
        shapes = [tuple(x.shape)]
        for weight, strides, paddings in zip(self.weights, self.strides, self.paddings, strict=True):
            size = [
                (n + 2 * padding - kernel) // stride + 1
                for n, kernel, stride, padding in zip(shapes[-1][2:], weight.shape[2:], strides, paddings, strict=True)
            ]
            shapes.append((shapes[-1][0], len(weight), *size))
        if self.pools:
            shapes.append((*shapes[-1][:2], *((n - 1) // 2 + 1 for n in shapes[-1][2:])))
        return shapes

    def to(self, dtype: torch.dtype, device: torch.device) -> StemWeights:
        """The same: half types, too, are computed in fp32, and on CPUs alone."""
        return self


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None if the kernels run images of this kind, else the reason."""
    status = library.cpu_library()
    if not status.loaded:
        return status.reason
    if device.type != "cpu":
        return f"x is on {device}; the native stem runs on CPUs"
    allowed = (torch.float32, torch.float16, torch.bfloat16)
    return None if dtype in allowed else f"x is {dtype}; allowed are {', '.join(map(str, allowed))}"


def pack(weights: StemWeights) -> StemWeights:
    """The same, packed: each kernel's rows one after the other, with the channels side by side as in the images."""
    packed = []
    for weight, bias in zip(weights.weights, weights.biases, strict=True):
        runs = weight.permute(0, 2, 3, 1).reshape(len(weight), -1, 1, 1)
        packed += operators.cpu_pack_pointwise.default(runs, bias, instruction_set())
    return replace(weights, packed=packed)


def stem_forward(x: Tensor, weights: StemWeights, channels_last: bool) -> Tensor:
    """x (N, C, H, W) in any format, fp32, fp16 or bf16 -> (N, out, H', W') of x's dtype."""
    run = operators.cpu_stem_forward.default
    return run(x, weights.packed, weights.geometry, weights.pools, channels_last, instruction_set())


def plan(weights: StemWeights, x_shape: Sequence[int]) -> str:
    """How such images run, for people."""
    kernels = ", ".join(f"{kh}x{kw}" for _, _, kh, kw in (tuple(weight.shape) for weight in weights.weights))
    behind = " and max pooling" if weights.pools else ""
    return f"{tuple(x_shape)}: {kernels}{behind} by rows that stay in cache, over {torch.get_num_threads()} threads"


_compared: dict[Hashable, str | None] = {}


def why_not_confirmed(x: Tensor, weights: StemWeights) -> str | None:
    """None if the kernels agree with float64 for random images and weights of this kind, tried once a process, else why not."""
    kind = tuple(x.shape[1:]), x.dtype, memory_format(x), tuple(weights.geometry), weights.pools, instruction_set()
    if kind not in _compared:
        with torch.inference_mode(False), torch.no_grad():
            _compared[kind] = _compare(x, weights)
    return _compared[kind]


def _compare(x: Tensor, weights: StemWeights) -> str | None:
    generator = torch.Generator("cpu").manual_seed(_SEED)

    def random(shape: Sequence[int], scale: float = 1.0) -> Tensor:
        return torch.randn(tuple(shape), generator=generator, device="cpu").mul_(scale)

    kernels = [random(weight.shape, 1 / math.sqrt(weight[0].numel())) for weight in weights.weights]
    twin = pack(replace(weights, weights=kernels, biases=[random(bias.shape) for bias in weights.biases]))
    rows = max(min(x.shape[2], _TRIED_ROWS), *(weight.shape[2] for weight in weights.weights))
    images = random((1, x.shape[1], min(rows, x.shape[2]), x.shape[3])).to(x.dtype).contiguous(memory_format=memory_format(x))
    if any(n < 1 for shape in twin.sizes(images) for n in shape):
        images = random((1, *x.shape[1:])).to(x.dtype).contiguous(memory_format=memory_format(x))
    found, expected = stem_forward(images, twin, True).double(), in_float64(images, twin)
    error = float((found - expected).norm() / expected.norm()) if found.shape == expected.shape else math.nan
    limit = first_use_bound(x.dtype, False)
    why = f"its result differs from float64 by {error:.2g} in the norm; at most {limit:.2g} is allowed"
    return None if error <= limit else why


def in_float64(x: Tensor, weights: StemWeights) -> Tensor:
    """What the plain weights say, by PyTorch's operators in float64."""
    out = x.double()
    for weight, bias, stride, padding in zip(weights.weights, weights.biases, weights.strides, weights.paddings, strict=True):
        out = F.conv2d(out, weight.double(), bias.double(), stride, padding).relu()
    return F.max_pool2d(out, 3, 2, 1) if weights.pools else out
