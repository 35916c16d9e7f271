"""What is checked and timed: the chains and blocks of Res2Net-50 at equal FLOPs, in its four stages, on random inputs."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..chain import reference
from ..chain.config import ChainConfig
from ..chain.problem import ChainProblem
from ..models.res2net import PLANES
from ..modules.block_parts import parts_of
from ..modules.folding import fold
from ..modules.reference_blocks import ReferenceBottle2neck
from ..ops.hierarchical_conv2d import hierarchical_conv2d
from ..ops.packed_weights import pack_weights
from ..patching.accelerate import Model, accelerate

SIZES = (56, 28, 14, 7)  # rows and columns of each stage's output for a 224x224 image
STAGES = (1, 2, 3, 4)
VARIANTS = ("normal", "stage")
TRAINED = {"train_chain": "chain", "train_block": "block"}  # workloads of training, and what is trained
TORCH_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}
_PUBLISHED_WIDTHS = {1: 64, 2: 48, 4: 26, 8: 14}  # s = 1 is the ResNet-50 block


def _macs_per_pixel(width: int, scale: int) -> int:
    """Multiply-adds of a normal block of the first stage at one pixel: two 1x1 convolutions and the 3x3 ones."""
    return 2 * 256 * width * scale + 9 * width * width * max(1, scale - 1)


@dataclass(frozen=True)
class WidthScale:
    """w of the first stage and s; prints as the paper writes it, such as 26w4s."""

    width: int
    scale: int

    def __str__(self) -> str:
        return f"{self.width}w{self.scale}s"

    @classmethod
    def parse(cls, text: str) -> WidthScale:
        match = re.fullmatch(r"(\d+)w_?(\d+)s", text.strip())
        if match is None or int(match[1]) < 1 or int(match[2]) < 1:
            raise ValueError(f"config is {text!r}; a width and a scale such as '26w4s' are needed")
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_scale(cls, scale: int) -> WidthScale:
        """The published config of that scale, else the width whose block has the FLOPs nearest to ResNet-50's."""
        if scale < 1:
            raise ValueError(f"scale is {scale}; it must be at least 1")
        target = _macs_per_pixel(64, 1)
        nearest = min(range(1, 65), key=lambda width: abs(_macs_per_pixel(width, scale) - target))
        return cls(_PUBLISHED_WIDTHS.get(scale, nearest), scale)


DEFAULT_CONFIGS = tuple(WidthScale.from_scale(scale) for scale in (1, 2, 4, 8))


class ReferenceChain(nn.Module):
    """The chain by PyTorch's own operators, BatchNorms folded; (N, s*w, H, W) -> (N, s*w, H/stride, W/stride)."""

    def __init__(self, weights: Iterable[Tensor], biases: Iterable[Tensor], config: ChainConfig) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(weights), nn.ParameterList(biases)
        self.config = config

    def forward(self, x: Tensor) -> Tensor:
        return reference.hierarchical_conv2d(x, list(self.weights), list(self.biases), self.config)


@dataclass(frozen=True)
class Case:
    """One chain or block: workload "chain", "block" or one of TRAINED; variant "stage" is a stage's first block, else "normal".

    dtype is a key of TORCH_DTYPES; "tf32" is fp32 tensors whose CUDA convolutions round to TF32.
    """

    workload: str
    config: WidthScale
    stage: int
    batch: int
    dtype: str
    device: str
    variant: str = "normal"

    def __str__(self) -> str:
        return f"{self.workload} {self.config} stage {self.stage} {self.variant} batch {self.batch} {self.dtype}"

    @property
    def input_size(self) -> int:
        """Rows and columns of x: twice the output's where the block strides."""
        return SIZES[self.stage - 1] * self._stride

    @property
    def _stride(self) -> int:
        return 2 if self.variant == "stage" and self.stage > 1 else 1

    def module(self) -> nn.Module:
        """The reference, in eval mode, with the same random parameters and statistics at every call."""
        planes = PLANES[self.stage - 1]
        downsample = None
        with torch.random.fork_rng(devices=[]):
            inplanes = replace(self, workload="block").channels
            torch.manual_seed(1000 * self.config.width + 10 * self.config.scale + self.stage)
            if self.variant == "stage":
                shortcut = nn.Conv2d(inplanes, planes * 4, 1, self._stride, bias=False)
                downsample = nn.Sequential(shortcut, nn.BatchNorm2d(planes * 4))
            width, scale = self.config.width, self.config.scale
            block = ReferenceBottle2neck(inplanes, planes, self._stride, downsample, width, scale, self.variant)
            randomise(block)
        module: nn.Module = block
        if self.workload == "chain":
            parts = parts_of(block)
            folded = [fold(conv, bn, torch.float32) for conv, bn in zip(parts.convs, parts.bns, strict=True)]
            weights, biases = zip(*folded, strict=True)
            module = ReferenceChain(weights, biases, block.chain_config)
        return module.eval().requires_grad_(False).to(self.device, TORCH_DTYPES[self.dtype])

    def problem(self, module: nn.Module) -> ChainProblem:
        """The chain in this case's module, as backends are asked about it."""
        if isinstance(module, ReferenceChain):
            config, convolutions = module.config, len(module.weights)
        elif isinstance(module, ReferenceBottle2neck):
            config, convolutions = module.chain_config, len(module.convs)
        else:
            raise TypeError(f"module is a {type(module).__name__}; a module of `Case.module` is needed")
        dtype, size = TORCH_DTYPES[self.dtype], self.input_size
        width = replace(self, workload="chain").channels // self.config.scale
        return ChainProblem(
            config, torch.device(self.device), dtype, self.batch, size, size, width, convolutions, channels_last=True
        )

    @property
    def channels(self) -> int:
        """Channels of x."""
        planes = PLANES[self.stage - 1]
        if self.workload == "chain":
            return planes * self.config.width // 64 * self.config.scale
        if self.variant == "normal":
            return 4 * planes
        return 2 * planes if self.stage > 1 else PLANES[0]

    def inputs(self, count: int = 1) -> list[Tensor]:
        """Random tensors (N, channels, H, W), contiguous; non-negative, as behind a ReLU."""
        generator = torch.Generator().manual_seed(self.stage)
        shape = (self.batch, self.channels, self.input_size, self.input_size)
        return [torch.randn(shape, generator=generator).relu_().to(self.device, TORCH_DTYPES[self.dtype]) for _ in range(count)]


def randomise(module: nn.Module) -> None:
    """Random convolutions that keep the signal's size, and BatchNorms whose statistics a wrong folding would not survive."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
        elif isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.2)
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 1.5)


def channels_last(module: Model) -> Model:
    """Convert a module to channels-last in place, and return it."""
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # which torch's types lack


def cases(
    workloads: Iterable[str],
    configs: Iterable[WidthScale],
    batches: Iterable[int],
    dtype: str,
    device: str,
    variants: Iterable[str] = ("normal",),
) -> list[Case]:
    """Every combination, in all four stages."""
    return [
        Case(workload, config, stage, batch, dtype, device, variant)
        for workload in workloads
        for batch in batches
        for config in configs
        for stage in STAGES
        for variant in variants
    ]


def fused(module: nn.Module, backend: str = "auto") -> Callable[[Tensor], Tensor]:
    """What this package runs in the place of a case's module, or of any model with Res2Net blocks; `module` is not changed."""
    if not isinstance(module, ReferenceChain):
        return accelerate(copy.deepcopy(module), backend)
    config = module.config
    packed = pack_weights(
        list(module.weights),
        list(module.biases),
        stride=config.stride,
        dilation=config.dilation,
        groups=config.groups,
        backend=backend,
    )

    def chain(x: Tensor) -> Tensor:
        return hierarchical_conv2d(
            x,
            packed,
            hierarchical=config.hierarchical,
            passthrough=config.passthrough,
            pool=config.pool,
            activation=config.activation,
            backend=backend,
        )

    return chain
