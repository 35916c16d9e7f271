"""What a 1-D chain is, as in speaker networks such as ECAPA-TDNN: its settings, and every check of a caller's arguments.

There BatchNorm comes after ReLU: its affine map is a step of its own and is not folded into the convolution.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .chain import DTYPES, PASSTHROUGHS, ChainConfig, at_least_one, describe, one_of

PADDING_MODES = ("zeros", "reflect")


@dataclass(frozen=True)
class Chain1dConfig:
    """Settings of `hierarchical_conv1d`, without the tensors.

    dilation: of every convolution. passthrough: the group that skips its convolution, as in `ChainConfig`.
    padding_mode: what stands beyond both ends of a row, "zeros" or "reflect".
    Raises ValueError or TypeError, naming the argument, for a value that there is not.
    """

    dilation: int = 1
    passthrough: str = "last"
    padding_mode: str = "zeros"

    def __post_init__(self) -> None:
        at_least_one("dilation", self.dilation)
        one_of("passthrough", self.passthrough, PASSTHROUGHS)
        one_of("padding_mode", self.padding_mode, PADDING_MODES)

    @functools.cached_property
    def chain(self) -> ChainConfig:
        """The recurrence, which is that of the 2-D chain."""
        return ChainConfig(passthrough=self.passthrough)

    def padding(self, kernel_size: int) -> int:
        """Values added at each end, so that rows keep their length under kernels of kernel_size."""
        return self.dilation * (kernel_size // 2)

    def within(self, length: int) -> Chain1dConfig:
        """The same for rows of this length: as `ChainConfig.within`; a row is longer than what it reflects."""
        far = self.padding_mode == "zeros" and self.dilation > length
        return replace(self, dilation=length) if far else self

    def settings(self) -> dict[str, object]:
        """As keyword arguments of `hierarchical_conv1d`, in the order of the operator's schema."""
        return {"dilation": self.dilation, "passthrough": self.passthrough, "padding_mode": self.padding_mode}


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

    @property
    def padding(self) -> int:
        return self.config.padding(self.kernel_size)

    @property
    def scale(self) -> int:
        return self.config.chain.scale(self.steps)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"({self.batch}, {self.scale}x{self.width}, {self.length}) {kind} {self.device}"


def check_arguments_1d(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    affine_scale: Sequence[Tensor] | None,
    affine_shift: Sequence[Tensor] | None,
    config: Chain1dConfig,
) -> Chain1dProblem:
    """Describes the call of `hierarchical_conv1d` on x (N, s*w, L) with these tensors and settings (config).

    weights: each (w, w, k). biases, affine_scale, affine_shift: each (w,), or None.
    Raises ValueError or TypeError naming the argument, what came and what is allowed.
    """
    if len(weights) == 0:
        raise ValueError("weights is empty; one tensor of shape (w, w, k) per convolution is needed")
    first = weights[0]
    if first.dim() != 3 or first.shape[0] != first.shape[1] or first.shape[2] % 2 == 0 or first.shape[0] < 1:
        raise ValueError(f"weights[0] is {describe(first)}; the shape must be (w, w, k) with an odd k")
    for name, tensor in (("x", x), ("weights[0]", first)):
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} is {describe(tensor)}; allowed dtypes are {', '.join(map(str, DTYPES))}")
    for i, weight in enumerate(weights):
        if weight.shape != first.shape or weight.dtype != x.dtype or weight.device != x.device:
            needed = f"{tuple(first.shape)} {x.dtype} on {x.device}"
            raise ValueError(f"weights[{i}] is {describe(weight)}; {needed} is needed, as weights[0] and x are")
    width, steps, scale = first.shape[0], len(weights), config.chain.scale(len(weights))
    if (affine_scale is None) != (affine_shift is None):
        raise ValueError("affine_scale and affine_shift must both be given, or neither")
    for name, values in (("biases", biases), ("affine_scale", affine_scale), ("affine_shift", affine_shift)):
        if values is None:
            continue
        if len(values) != steps:
            raise ValueError(f"{name} holds {len(values)} tensors; weights holds {steps}, and both must match")
        for i, value in enumerate(values):
            if tuple(value.shape) != (width,) or value.device != x.device:
                raise ValueError(f"{name}[{i}] is {describe(value)}; ({width},) on {x.device} is needed")
            if value.dtype not in (x.dtype, torch.float32):
                raise TypeError(f"{name}[{i}] is {value.dtype}; allowed are {x.dtype} (as x) and torch.float32")
    if x.dim() != 3:
        raise ValueError(f"x is {describe(x)}; three dimensions (N, s*w, L) are needed")
    if x.shape[1] != scale * width:
        raise ValueError(
            f"x has {x.shape[1]} channels; {steps} weights of width {width} with passthrough={config.passthrough!r} "
            f"need s*w = {scale}*{width} = {scale * width}"
        )
    problem = Chain1dProblem(config, x.device, x.dtype, x.shape[0], x.shape[2], width, steps, first.shape[2])
    least = problem.padding + 1 if config.padding_mode == "reflect" else 1
    if problem.length < least:
        raise ValueError(
            f"x is {describe(x)}; with dilation={config.dilation}, kernels of {problem.kernel_size} and "
            f"padding_mode={config.padding_mode!r}, L must be at least {least}"
        )
    return replace(problem, config=config.within(problem.length)) if type(problem.length) is int else problem
