"""A few elements of each of a block's tensors on a GPU, kept there, and compared again by one launch for many blocks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .launch import KernelCall  # imports Triton, which may be missing

_SAMPLES = 16  # of each tensor: the first element, the last, and others in between
_DIMS = 4
# Where sample k lies in a dimension, as a part of its size; the same places as in csrc/cpu/ops/sample_ops.cpp.
_STEPS = (0.6180339887, 0.7548776662, 0.8191725134, 0.5698402910)


@functools.cache
def _places() -> Tensor:
    return torch.tensor([[k * step % 1 for step in _STEPS] for k in range(_SAMPLES)], dtype=torch.float64, device="cpu")


def sample_table(tensors: Sequence[Tensor], number: int) -> Tensor:
    """The table (programs, 3, ROWS) of `compare_samples` on the CPU, for one block's tensors, not yet with their bits.

    Skipped are tensors that do not lie in their storages, such as freed ones. number: of the table; more than zero.
    """
    from .kernels.compare_samples import ROWS, SIZE_BITS, SIZES

    found = []
    for tensor in tensors:
        item, shape, strides = tensor.element_size(), tensor.shape, tensor.stride()
        pointer = tensor.data_ptr()
        if item not in SIZES or pointer == 0 or pointer % item or len(shape) > _DIMS or tensor.numel() == 0:
            continue
        last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if (int(tensor.storage_offset()) + last + 1) * item <= tensor.untyped_storage().nbytes():
            filling = _DIMS - len(shape)
            found.append((pointer, item, last, *shape, *(1,) * filling, *strides, *(0,) * filling))
    programs = max(1, -(-len(found) * _SAMPLES // ROWS))
    table = torch.zeros((programs, 3, ROWS), dtype=torch.int64, device="cpu")
    facts = torch.tensor(found, dtype=torch.int64, device="cpu").view(-1, 1, 3 + 2 * _DIMS)
    offsets = ((_places() * facts[..., 3 : 3 + _DIMS]).long() * facts[..., 3 + _DIMS :]).sum(-1)  # (tensors, samples)
    offsets[:, -1] = facts[:, 0, 2]
    items = facts[..., 1]
    for row, values in enumerate((facts[..., 0] + items * offsets, items.expand_as(offsets))):
        flat = torch.nn.functional.pad(values.reshape(-1), (0, programs * ROWS - values.numel()))
        table[:, row] = flat.view(programs, ROWS)
    table[:, 1] += number << SIZE_BITS
    return table


def keep_samples(table: Tensor, noticed: Tensor) -> None:
    """Writes the bits that are there now into the table, on the current stream."""
    _launch(table, noticed, True)


def compare_samples(table: Tensor, noticed: Tensor) -> None:
    """Writes the number of each table of which a bit differs to its place in `noticed`, on the current stream."""
    _launch(table, noticed, False)


def _launch(table: Tensor, noticed: Tensor, keeps: bool) -> None:
    from .prepared import launch

    launch(_calls, (keeps,), (table, noticed))


def _calls(tensors: Sequence[Tensor], keeps: bool) -> Iterator[KernelCall]:
    from .kernels.compare_samples import sample_calls

    table, noticed = tensors
    return sample_calls(table, noticed, keeps)
