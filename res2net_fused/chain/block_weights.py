"""The weights that operators take in eval mode: a whole bottleneck's, with BatchNorms folded in, and those of a 1-D chain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor


@dataclass(frozen=True)
class Gathered:
    """A block's weights, packed ones too, in one tensor: a compiled graph has one input for them, and one guard.

    memory: (bytes,), uint8. layout: where each tensor lies in it, as `place_all` of gathered_weights.py writes it. channels:
    that come out of the block. projects: whether a projection of the shortcut is among them.
    """

    memory: Tensor
    layout: str
    channels: int
    projects: bool


@dataclass
class BlockWeights:
    """A block's convolutions with their BatchNorms folded in, and, where kept for many calls, one backend's layout of them."""

    conv1_weight: Tensor  # (s*w, inplanes, 1, 1)
    conv1_bias: Tensor  # (s*w,), fp32 (fp64 for an fp64 block), as all biases here
    weights: list[Tensor]  # each (w, w/groups, 3, 3)
    biases: list[Tensor]  # each (w,)
    conv3_weight: Tensor  # (planes * 4, s*w, 1, 1)
    conv3_bias: Tensor  # (planes * 4,)
    # Of the shortcut, where it is a 1x1 convolution and BatchNorm behind at most a pool; None where there is none to fold.
    projection_weight: Tensor | None = None  # (planes * 4, inplanes, 1, 1)
    projection_bias: Tensor | None = None  # (planes * 4,)
    projection_stride: int = 1
    packed: list[Tensor] | None = None
    layout: str = "plain"
    made: Any = None  # a MadeOn of modules/made_on.py, where it is kept
    gathered: Gathered | None = None  # where the tensors above are views of one
    overflowed: bool = False  # of one that is kept, if float16 may be asked of it: what `overflows` said

    # The same in the layouts of other backends, by their names, as `packed_for` makes them.
    others: dict[str, BlockWeights] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def around(self) -> tuple[int, int]:
        """Channels that go into the block and come out of it."""
        return self.conv1_weight.shape[1], self.conv3_weight.shape[0]

    @property
    def out_channels(self) -> int:
        """Channels that come out of the block."""
        return len(self.conv3_weight) if self.gathered is None else self.gathered.channels  # a graph guards what it looks at

    @property
    def projects(self) -> bool:
        """Whether there is a projection of the shortcut."""
        return self.projection_weight is not None if self.gathered is None else self.gathered.projects

    def to(self, dtype: torch.dtype, device: torch.device) -> BlockWeights:
        """The plain weights in `dtype`, all on `device`; biases keep their dtype."""
        projection, bias = self.projection_weight, self.projection_bias
        return BlockWeights(
            self.conv1_weight.to(device, dtype), self.conv1_bias.to(device),
            [weight.to(device, dtype) for weight in self.weights], [bias.to(device) for bias in self.biases],
            self.conv3_weight.to(device, dtype), self.conv3_bias.to(device),
            None if projection is None else projection.to(device, dtype), None if bias is None else bias.to(device),
            self.projection_stride, overflowed=self.overflowed,
        )  # fmt: skip

    def overflow(self) -> Tensor:
        """NaN if a folded weight is beyond float16's range, for 1 / sqrt(eps) may be a large factor, else zero; shape ()."""
        weights = (self.conv1_weight, *self.weights, self.conv3_weight, self.projection_weight)
        halves = [weight.detach().half() for weight in weights if weight is not None]
        return torch.stack([(half - half).sum(dtype=torch.float32) for half in halves]).sum()

    def overflows(self) -> bool:
        """Whether that is so; a device is waited for, which no CUDA graph may while it is captured."""
        valueless = self.conv1_weight.is_meta or isinstance(self.conv1_weight, FakeTensor)
        return not valueless and bool(self.overflow().isnan())


@dataclass
class Chain1dWeights:
    """A chain's tensors as the operator takes them; for many calls also packed."""

    weights: Sequence[Tensor]  # each (w, w, k)
    biases: Sequence[Tensor] | None = None  # each (w,), as the affine map y = scale * r + shift behind ReLU
    scale: Sequence[Tensor] | None = None
    shift: Sequence[Tensor] | None = None
    packed: Sequence[Tensor] | None = None  # what `pack_1d` of backends/cpu/chain1d.py made of the weights
    made: Any = None  # a MadeOn of modules/made_on.py, where it is kept

    def to(self, dtype: torch.dtype, device: torch.device) -> Chain1dWeights:
        """The plain weights in `dtype`, all on `device`; what is added and scaled keeps its dtype."""
        vectors = (self.biases, self.scale, self.shift)
        moved = (None if values is None else [value.to(device) for value in values] for values in vectors)
        return Chain1dWeights([weight.to(device, dtype) for weight in self.weights], *moved)

    def detached(self, copy: bool = False) -> Chain1dWeights:
        """The same outside autograd; copy: with weights and biases that are not the block's own."""

        def detached(tensors: Sequence[Tensor]) -> list[Tensor]:
            return [tensor.detach().clone() if copy else tensor.detach() for tensor in tensors]

        return replace(self, weights=detached(self.weights), biases=None if self.biases is None else detached(self.biases))
