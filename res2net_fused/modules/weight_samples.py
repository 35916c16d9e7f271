"""Writes that PyTorch does not see (`.data`, NumPy), noticed by a few elements of each tensor that are read again at each call.

No address is kept, since a storage may be freed or resized at any time. On GPUs `watched_weights.py` does it, a call later.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._native import library
from ..backends.cpu.settings import operators


class WeightSamples:
    """Elements of a block's tensors on the CPU, as they were."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.bytes: Tensor = operators.cpu_samples.default(tensors)

    def differ(self, tensors: list[Tensor]) -> bool:
        """Whether any of them is another now."""
        return operators.cpu_samples_differ.default(tensors, self.bytes)


def sample(tensors: list[Tensor]) -> WeightSamples | None:
    """Elements of a block's tensors by which writes are noticed, or None where none is on a CPU, or no library there."""
    if not library.cpu_library().loaded or all(tensor.device.type != "cpu" for tensor in tensors):
        return None
    with torch.inference_mode(False):
        return WeightSamples(tensors)
