"""One call of an operator without its data: what a backend is chosen and a launch is planned by."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config import Chain1dConfig, ChainConfig
from .memory_format import CHANNELS_LAST, memory_format


@functools.lru_cache
def one_convolution(config: ChainConfig) -> ChainConfig:
    return ChainConfig(config.stride, config.dilation, config.groups, hierarchical=False, passthrough="none", activation="none")


@dataclass(frozen=True)
class ChainProblem:
    """One call of the operator, without its data: what a backend is chosen and a launch is planned by.

    config: the settings. device, dtype: of x (N, s*w, H, W). batch, height, width_pixels: N, H, W. width: w, the channels of a
    group. steps: the number of convolutions. channels_last: whether x has that memory format, else it is contiguous. around:
    where a whole block is called, the channels that go into it and come out of it.
    """

    config: ChainConfig
    device: torch.device
    dtype: torch.dtype
    batch: int
    height: int
    width_pixels: int
    width: int
    steps: int
    channels_last: bool
    around: tuple[int, int] | None = None

    @classmethod
    def from_tensor(
        cls, x: Tensor, width: int, steps: int, config: ChainConfig, around: tuple[int, int] | None = None
    ) -> ChainProblem:
        """A call on a tensor with x's batch, size, dtype, device and memory format; its channels are not looked at.

        width: channels of a group. steps: convolutions. config: the settings. around: a whole block's channels, in and out.
        """
        batch, _, height, width_pixels = x.shape
        last = memory_format(x) == CHANNELS_LAST
        if type(height) is int and type(width_pixels) is int:  # a traced size would be compared, and the graph kept to it
            config = config.clamped_to(max(height, width_pixels))
        return cls(config, x.device, x.dtype, batch, height, width_pixels, width, steps, last, around)

    @classmethod
    def for_convolution(cls, u: Tensor, weight: Tensor, config: ChainConfig) -> ChainProblem:
        """One of the chain's convolutions and nothing behind it, on u (N, w, H, W) with a weight (w, w/groups, 3, 3).

        config: of the chain.
        """
        alone = one_convolution(config)
        return replace(cls.from_tensor(u, weight.shape[0], 1, alone), config=alone)  # u may be the gradient of a smaller output

    @property
    def scale(self) -> int:
        return self.config.scale(self.steps)

    @property
    def output_height(self) -> int:
        return self.config.output_size(self.height)

    @property
    def output_width(self) -> int:
        return self.config.output_size(self.width_pixels)

    @property
    def flops(self) -> int:
        """Multiplications and additions of all convolutions."""
        pixels = self.batch * self.output_height * self.output_width
        return 2 * 9 * pixels * self.steps * self.width * self.width // self.config.groups

    def __str__(self) -> str:
        layout = "channels_last" if self.channels_last else "contiguous"
        return (
            f"({self.batch}, {self.scale}x{self.width}, {self.height}, {self.width_pixels}) "
            f"{str(self.dtype).removeprefix('torch.')} {layout} {self.device}"
        )


@dataclass(frozen=True)
class Chain1dProblem:
    """One call of the operator, without its data.

    config: the settings. device, dtype: of x (N, s*w, L). batch, length: N and L. width: w, the channels of a group.
    steps: the number of convolutions. kernel_size: k of their weights (w, w, k).
    """

    config: Chain1dConfig
    device: torch.device
    dtype: torch.dtype
    batch: int
    length: int
    width: int
    steps: int
    kernel_size: int

    @classmethod
    def from_tensor(cls, x: Tensor, weight: Tensor, steps: int, config: Chain1dConfig) -> Chain1dProblem:
        """A call on a tensor with x's batch, length, dtype and device; its channels are not looked at.

        weight: of one convolution, (w, w, k). steps: convolutions. config: the settings.
        """
        batch, _, length = x.shape
        if type(length) is int:
            config = config.clamped_to(length)
        return cls(config, x.device, x.dtype, batch, length, weight.shape[0], steps, weight.shape[2])

    @property
    def padding(self) -> int:
        return self.config.padding(self.kernel_size)

    @property
    def scale(self) -> int:
        return self.config.chain.scale(self.steps)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"({self.batch}, {self.scale}x{self.width}, {self.length}) {kind} {self.device}"
