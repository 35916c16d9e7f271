"""Weights in the order in which the tensor cores read them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...chain.config import ChainConfig
from ..triton.tf32 import round_to_tf32

_INSTANCE_DEPTHS_COLUMNS = ((1, 2), (2, 4), (3, 6), (4, 7), (0, 6), (0, 7), (0, 4))


def depth_channels(dtype: torch.dtype) -> int:
    """Input channels that one tensor-core instruction multiplies: 32 bytes."""
    return 32 // dtype.itemsize


def packed_columns(width: int, dtype: torch.dtype) -> int:
    """Output channels in units of 8, padded to whole warps of the width's instance (csrc/cuda/plan/launch_plan.cpp)."""
    columns, depths = -(-width // 8), -(-width // depth_channels(dtype))
    for instance_depths, instance_columns in _INSTANCE_DEPTHS_COLUMNS:
        if dtype != torch.float32 and instance_depths == depths and columns <= instance_columns:
            return instance_columns
    return min(-(-columns // c) * c for depths, c in _INSTANCE_DEPTHS_COLUMNS if depths == 0)


def pack(weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig) -> list[Tensor]:
    """[weights in blocks of 8 output channels, biases (steps, columns * 8) in fp32].

    (w, w, 3, 3) each -> (steps, 9 * depths, columns, 2, 8, 16 bytes) of the weights' dtype, float32 rounded to TF32: of a tap's
    32 bytes of input channels the first and the second half, each for 8 output channels. These are the matrices of 128 bytes
    that both ldmatrix and wgmma read, so all kernels share one packing. What pads input and output channels is zero.
    """
    width, dtype = weights[0].shape[0], weights[0].dtype
    half = depth_channels(dtype) // 2
    depths, columns, steps = -(-width // depth_channels(dtype)), packed_columns(width, dtype), len(weights)
    padded = weights[0].new_zeros(steps, 9, depths * depth_channels(dtype), columns * 8)
    for step, weight in enumerate(weights):
        padded[step, :, :width, :width] = weight.detach().permute(2, 3, 1, 0).reshape(9, width, width)
    split = padded.reshape(steps, 9 * depths, 2, half, columns, 8)
    packed = split.permute(0, 1, 4, 2, 5, 3).contiguous()
    if dtype == torch.float32:
        packed = round_to_tf32(packed)
    bias = torch.zeros(steps, columns * 8, dtype=torch.float32, device=packed.device)
    if biases is not None:
        bias[:, :width] = torch.stack([b.detach().float() for b in biases])
    return [packed, bias]
