"""Writes that PyTorch does not see (`.data`, NumPy): noticed by a few elements of each tensor, which are read again.

On CPUs a native operator compares them at each call. On GPUs one block in each call of a model gathers its own, without waiting
for them: what they tell is known at a later call. No address is kept, since a storage may be freed or resized at any time.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from .._native import library
from ..backends.cpu.settings import operators

WRITTEN_UNSEEN = (
    "weights of fused blocks were written in a way that PyTorch does not see, such as `.data` or the replay of a CUDA graph; "
    "calls between that and this one may have used the old weights. Call res2net_fused.refresh(model) after such a write"
)

_POINTS = 16  # of each tensor on a GPU, at most


class CpuSamples:
    """Elements of a block's tensors on the CPU, as they were."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.bytes: Tensor = operators.cpu_samples.default(tensors)

    def differ(self, tensors: list[Tensor]) -> bool:
        """Whether any of them is another now."""
        return operators.cpu_samples_differ.default(tensors, self.bytes)


class CudaSamples:
    """Elements of a block's floating-point tensors on a GPU, on their way to the host: one launch and one copy."""

    def __init__(self, tensors: list[Tensor]) -> None:
        with torch.no_grad():
            points = torch.cat([_points(t) for t in tensors if t.is_floating_point() and t.numel() > 0])
            self.values = points.to("cpu", non_blocking=True)
        self.event = torch.cuda.current_stream(points.device).record_event()

    def arrived(self) -> bool:
        return self.event.query()

    def differ(self, others: CudaSamples) -> bool:
        """Whether they are not the same, bit by bit; both have arrived."""
        return not torch.equal(self.values.view(torch.uint8), others.values.view(torch.uint8))


def _points(tensor: Tensor) -> Tensor:
    count, stride = _diagonal(tensor.shape, tensor.stride())
    return tensor.as_strided((count,), (stride,))


@functools.lru_cache
def _diagonal(shape: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """How many elements, and how far apart in memory, lead from the first through all dimensions of a tensor at once."""
    count = min(_POINTS, max(shape, default=1))
    return count, sum((size - 1) // max(count - 1, 1) * stride for size, stride in zip(shape, strides, strict=True))


def sample(tensors: list[Tensor]) -> CpuSamples | CudaSamples | None:
    """Elements of a block's tensors by which writes to them are noticed, or None where nothing reads them."""
    kinds = {tensor.device.type for tensor in tensors}
    with torch.inference_mode(False):
        if kinds == {"cuda"}:
            return CudaSamples(tensors)
        return CpuSamples(tensors) if "cpu" in kinds and library.cpu_library().loaded else None


class Turns:
    """Shared by the blocks of one model, of which one in each of its calls, by turns, looks at its tensors on a GPU.

    Copies begin anew, but are shared by the same blocks.
    """

    def __init__(self) -> None:
        self.members = 0
        self.looked: tuple[CudaSamples, CudaSamples] | None = None  # those that were kept, and those on their way

    def __reduce__(self) -> tuple[type[Turns], tuple[()]]:
        return Turns, ()

    def look(self, before: CudaSamples, tensors: list[Tensor]) -> None:
        if self.looked is None:
            self.looked = before, CudaSamples(tensors)

    def noticed(self) -> bool:
        """Whether the last look showed a change; told once, and nothing is waited for."""
        looked = self.looked
        if looked is None or not all(samples.arrived() for samples in looked):
            return False
        self.looked = None
        return looked[0].differ(looked[1])
