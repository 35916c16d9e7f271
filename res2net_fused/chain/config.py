"""What a chain is: its settings and the shapes that follow from them. They come from the tables of published blocks."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypedDict

import torch

from .activations import check_activation

PASSTHROUGHS = ("last", "none", "first", "first_added")

POOLS = (None, "avg3", "avg3_nopad", "max3")  # the order is that of Pool in csrc/cpu/kernels/kernels.h

LARGEST = 2**31 - 1  # of stride, dilation and groups, which ATen's pools take as a C int


def one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    """Raises ValueError, naming the argument, where `value` is none of the `allowed`. name: of the argument."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(map(repr, allowed))}")


def at_least_one(name: str, value: object) -> None:
    """Raises TypeError where the argument `name` has a value that is no int, ValueError where it is below 1."""
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool):
        raise TypeError(f"{name} is {value!r} of type {type(value).__name__}; an int of at least 1 is needed")
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    if value > LARGEST:
        raise ValueError(f"{name} is {value}; it must be at most {LARGEST}")


class Convolution(NamedTuple):
    """One convolution of a chain and its neighbours. k: its place among them. group: the one that it reads and writes.

    adds: whether it reads x_i + y_{i-1} rather than x_i. chained: whether that y_{i-1} is the convolution's before it, else the
    passed group's. feeds_next: whether the next convolution adds its output.
    """

    k: int
    group: int
    adds: bool
    chained: bool
    feeds_next: bool


class ChainSettings(TypedDict):
    """A `ChainConfig` as keyword arguments."""

    stride: int
    dilation: int
    groups: int
    hierarchical: bool
    passthrough: str
    pool: str | None
    activation: str


@dataclass(frozen=True)
class ChainConfig:
    """Settings of `hierarchical_conv2d`, without the tensors.

    stride, dilation, groups: of every 3x3 convolution; padding is `dilation`.
    hierarchical: whether y_{i-1} is added to x_i (False in a 'stage' block).
    passthrough: which group skips its convolution: "last", "none", "first", or "first_added" (the first skips and is
        also added to the second).
    pool: what the pass-through applies: None, "avg3" (AvgPool2d(3, stride, 1)), "avg3_nopad" (padding not counted) or
        "max3" (MaxPool2d(3, stride, 1)).
    activation: behind each convolution: "relu", "none", "hardtanh20" (clamp to 0 ... 20), "relu6", "leaky_relu" (of slope 0.01,
        or "leaky_relu:0.1" of another), "hardswish", "silu", "gelu", "gelu_tanh" (its approximation) or "mish".

    The recurrence is equation 1 of arXiv:1904.01169. Raises ValueError or TypeError, naming the argument, for a value that
    there is not, and for two that do not go together.
    """

    stride: int = 1
    dilation: int = 1
    groups: int = 1
    hierarchical: bool = True
    passthrough: str = "last"
    pool: str | None = None
    activation: str = "relu"

    def __post_init__(self) -> None:
        at_least_one("stride", self.stride)
        at_least_one("dilation", self.dilation)
        at_least_one("groups", self.groups)
        if not isinstance(self.hierarchical, bool):
            kind = type(self.hierarchical).__name__
            raise TypeError(f"hierarchical is {self.hierarchical!r} of type {kind}; a bool is needed")
        one_of("passthrough", self.passthrough, PASSTHROUGHS)
        one_of("pool", self.pool, POOLS)
        check_activation(self.activation)
        if self.pool is not None and self.passthrough == "none":
            raise ValueError(f"pool is {self.pool!r} but passthrough is 'none': there is no group to pool")
        if self.passthrough == "first_added" and not self.hierarchical:
            raise ValueError("passthrough is 'first_added' but hierarchical is False, which adds nothing; use 'first'")
        if self.stride > 1 and self.pool is None and self.passthrough != "none":
            raise ValueError(
                f"stride is {self.stride} but pool is None: the passed-through group would keep its size; "
                "use pool='avg3', 'avg3_nopad' or 'max3', or passthrough='none'"
            )

    def as_kwargs(self) -> ChainSettings:
        """The keyword arguments of `hierarchical_conv2d`, in the order of the operator's schema."""
        return {
            "stride": self.stride,
            "dilation": self.dilation,
            "groups": self.groups,
            "hierarchical": self.hierarchical,
            "passthrough": self.passthrough,
            "pool": self.pool,
            "activation": self.activation,
        }

    def scale(self, convolutions: int) -> int:
        """s, the number of groups, for so many convolutions."""
        return convolutions + (self.passthrough != "none")

    @property
    def first_convolved(self) -> int:
        """The group that the first convolution reads: 1 where the first group passes through, else 0."""
        return int(self.passthrough in ("first", "first_added"))

    def passed_group(self, scale: int) -> int | None:
        """The group without a convolution, of `scale` groups, or None."""
        return None if self.passthrough == "none" else 0 if self.first_convolved else scale - 1

    @property
    def adds_passed(self) -> bool:
        """Whether the first convolution adds the group that passes."""
        return self.passthrough == "first_added"

    def convolutions(self, steps: int) -> list[Convolution]:
        """The one walk over a chain: its convolutions in the order of the recurrence. steps: how many there are.

        The passed group comes before all of them or after all; only where it `adds_passed` does one read it.
        """
        found = []
        for k in range(steps):
            chained, feeds_next = self.hierarchical and k > 0, self.hierarchical and k + 1 < steps
            adds = chained or (k == 0 and self.adds_passed)
            found.append(Convolution(k, self.first_convolved + k, adds, chained, feeds_next))
        return found

    def clamped_to(self, size: int) -> ChainConfig:
        """The same for images of at most `size` rows and columns, with no stride or dilation beyond them.

        Larger values give the same result, since the taps read only padding, but PyTorch's backward allocates memory in
        proportion to them.
        """
        if self.stride <= size and self.dilation <= size:
            return self
        return replace(self, stride=min(self.stride, size), dilation=min(self.dilation, size))

    def output_size(self, size: int) -> int:
        """Rows (or columns) of the output for `size` rows of x; the same for the convolutions and for the pool."""
        return (size - 1) // self.stride + 1


PADDING_MODES = ("zeros", "reflect")


@dataclass(frozen=True)
class Chain1dConfig:
    """Settings of `hierarchical_conv1d`, without the tensors.

    dilation: of every convolution. passthrough: the group that skips its convolution, as in `ChainConfig`.
    padding_mode: what stands beyond both ends of a row, "zeros" or "reflect". activation: as in `ChainConfig`.
    Raises ValueError or TypeError, naming the argument, for a value that there is not.
    """

    dilation: int = 1
    passthrough: str = "last"
    padding_mode: str = "zeros"
    activation: str = "relu"

    def __post_init__(self) -> None:
        at_least_one("dilation", self.dilation)
        one_of("passthrough", self.passthrough, PASSTHROUGHS)
        one_of("padding_mode", self.padding_mode, PADDING_MODES)
        check_activation(self.activation)

    @functools.cached_property
    def chain(self) -> ChainConfig:
        """The recurrence, which is that of the 2-D chain."""
        return ChainConfig(passthrough=self.passthrough)

    def padding(self, kernel_size: int) -> int:
        """Values added at each end, so that rows keep their length under kernels of kernel_size."""
        return self.dilation * (kernel_size // 2)

    def clamped_to(self, length: int) -> Chain1dConfig:
        """The same for rows of this length: as `ChainConfig.clamped_to`; a row is longer than what it reflects."""
        far = self.padding_mode == "zeros" and self.dilation > length
        return replace(self, dilation=length) if far else self

    def as_kwargs(self) -> dict[str, object]:
        """The keyword arguments of `hierarchical_conv1d`, in the order of its backward's schema."""
        return {
            "dilation": self.dilation,
            "passthrough": self.passthrough,
            "padding_mode": self.padding_mode,
            "activation": self.activation,
        }
