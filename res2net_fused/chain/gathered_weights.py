"""Where a block's weights lie in one tensor: a compiled graph has one input for all of them, and one guard."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .block_weights import BlockWeights, Gathered

_ALIGNMENT = 64  # bytes


@dataclass(frozen=True)
class Place:
    """Where one tensor lies: bytes from the first on, and what makes it of them."""

    start: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def view(self, memory: Tensor) -> Tensor:
        """The tensor in memory (bytes,), uint8."""
        return memory[self.start :].view(self.dtype).as_strided(self.size, self.stride)  # wherever memory begins

    def alone(self, memory: Tensor) -> Tensor:
        """The same with a storage of its own size: whoever saves a view's storage saves all of memory."""
        storage = memory.untyped_storage()[self.start : self.start + math.prod(self.size) * self.dtype.itemsize]
        return torch.empty(0, dtype=self.dtype, device=memory.device).set_(storage, 0, self.size, self.stride)


@dataclass(frozen=True)
class Layout:
    """Where all of a block's weights lie, in the order of BlockWeights, and what else it says of them."""

    steps: int
    projects: bool
    projection_stride: int
    packed_for: str
    places: tuple[Place, ...]

    def of(self, name: str) -> tuple[int, ...]:
        """The size of conv1_weight, weights (of each), conv3_weight or projection_weight."""
        ends = 2 + 2 * self.steps
        place = {"conv1_weight": 0, "weights": 2, "conv3_weight": ends, "projection_weight": ends + 2}
        return self.places[place[name]].size


def place_all(folded: BlockWeights, first: int) -> tuple[str, int]:
    """(the layout as the operator takes it, bytes in all) of memory whose first bytes, so many, are somebody's own."""
    places, end = [], first
    for tensor in _tensors(folded):
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + tensor.numel() * tensor.element_size()
        stride = torch.empty_like(tensor, device="meta").stride()  # dense, as close to its own as that goes
        name = str(tensor.dtype).removeprefix("torch.")
        places.append(f"{start} {name} {_text(tensor.shape)} {_text(stride)}")
    head = f"{len(folded.weights)} {int(folded.projects)} {folded.projection_stride} {folded.layout}"
    return ";".join((head, *places)), -(-end // _ALIGNMENT) * _ALIGNMENT


def gathered_in(memory: Tensor, layout: str, folded: BlockWeights) -> BlockWeights:
    """Copies the weights of `folded` into memory (bytes,), uint8, which is laid out for them, and returns them there."""
    known = read_layout(layout)
    tensors = [place.alone(memory) for place in known.places]
    for tensor, given in zip(tensors, _tensors(folded), strict=True):
        tensor.copy_(given)
    found = Gathered(memory, layout, folded.out_channels, folded.projects)
    return replace(_block_of(tensors, known), made=folded.made, overflowed=folded.overflowed, gathered=found)


def weights_in(memory: Tensor, layout: str) -> BlockWeights:
    """The weights in memory (bytes,), uint8, as views of it."""
    known = read_layout(layout)
    return _block_of([place.view(memory) for place in known.places], known)


def _block_of(found: list[Tensor], known: Layout) -> BlockWeights:
    """found: the tensors in the order of `known.places`."""
    steps, ends = known.steps, 2 + 2 * known.steps  # where conv3's begin
    weight, bias = (found[ends + 2], found[ends + 3]) if known.projects else (None, None)
    return BlockWeights(
        found[0], found[1], found[2 : 2 + steps], found[2 + steps : ends], found[ends], found[ends + 1], weight, bias,
        known.projection_stride, found[ends + 2 + 2 * known.projects :], known.packed_for,
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def read_layout(layout: str) -> Layout:
    """What `place_all` wrote."""
    head, *places = layout.split(";")
    steps, projects, stride, packed_for = head.split()
    return Layout(int(steps), projects == "1", int(stride), packed_for, tuple(map(_place, places)))


def _place(text: str) -> Place:
    start, dtype, size, stride = text.split(" ")
    return Place(int(start), getattr(torch, dtype), _numbers(size), _numbers(stride))


def _tensors(folded: BlockWeights) -> list[Tensor]:
    f = folded
    projection = [] if f.projection_weight is None or f.projection_bias is None else [f.projection_weight, f.projection_bias]
    outer = f.conv3_weight, f.conv3_bias
    return [f.conv1_weight, f.conv1_bias, *f.weights, *f.biases, *outer, *projection, *(f.packed or ())]


def _text(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))
