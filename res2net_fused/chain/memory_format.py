"""Memory formats: which one a tensor suggests, and tensors brought into one."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.nn import Parameter

# By these names, not as attributes of torch: a compiled graph compares every module that it meets in two files.
CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format that x suggests and that the output keeps: channels-last or contiguous, as ATen decides it."""
    if type(x) in (Tensor, Parameter) and x.dim() == 4:  # ten times as fast; traced tensors would be guarded
        last = x.is_contiguous(memory_format=CHANNELS_LAST)
        if last != x.is_contiguous():
            return CHANNELS_LAST if last else CONTIGUOUS
    return suggest_memory_format(x)


def with_format(out: Tensor, channels_last: bool) -> Tensor:
    """`out` (N, C, H, W) in channels_last or contiguous; of one pixel or channel it is both, and its strides say which."""
    out = out.contiguous(memory_format=CHANNELS_LAST if channels_last else CONTIGUOUS)
    _, channels, height, width = out.shape
    if channels == 1 or height == width == 1:
        out = out.as_strided(out.shape, strides_of(out, channels_last))
    return out


def strides_of(x: Tensor, channels_last: bool) -> tuple[int, int, int, int]:
    """The strides that a dense tensor of x's shape (N, C, H, W) has in channels_last or contiguous, unambiguous at any size."""
    _, channels, height, width = x.shape
    image = channels * height * width
    return (image, 1, width * channels, channels) if channels_last else (image, height * width, width, 1)


def hands_on(weight: Tensor) -> bool:
    """Whether a convolution with this weight gives channels-last whatever it is given, as PyTorch's do."""
    return memory_format(weight) == CHANNELS_LAST


def in_format_of(gradient: Tensor, weight: Tensor) -> Tensor:
    """The `gradient` of a tensor in the memory format of that `weight`, of any shape: it is accumulated without a copy."""
    if weight.dim() != 4:
        return gradient.contiguous()
    return with_format(gradient, memory_format(weight) == CHANNELS_LAST)


def as_suggested(out: Tensor, x: Tensor) -> Tensor:
    """`out` (N, C, H, W) in the memory format of x, whatever its sizes: for graphs, where a question for them fixes them."""
    return out.contiguous(memory_format=memory_format(x))
