"""What a chain is: its settings, the shapes that follow from them, and every check of a caller's arguments.

The settings come from the tables of published blocks; the recurrence itself stands in `reference.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format  # the Python twin of ATen's, used by torch's own fakes

PASSTHROUGHS = ("last", "none", "first", "first_added")
POOLS = (None, "avg3", "avg3_nopad")
ACTIVATIONS = ("relu", "none", "hardtanh20")
BACKENDS = ("auto", "reference", "triton", "cpu", "cuda")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
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
    pool: what the pass-through applies: None, "avg3" (AvgPool2d(3, stride, 1)) or "avg3_nopad" (padding not counted).
    activation: behind each convolution: "relu", "none" or "hardtanh20" (clamp to 0 ... 20).

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
        one_of("activation", self.activation, ACTIVATIONS)
        if self.pool is not None and self.passthrough == "none":
            raise ValueError(f"pool is {self.pool!r} but passthrough is 'none': there is no group to pool")
        if self.passthrough == "first_added" and not self.hierarchical:
            raise ValueError("passthrough is 'first_added' but hierarchical is False, which adds nothing; use 'first'")
        if self.stride > 1 and self.pool is None and self.passthrough != "none":
            raise ValueError(
                f"stride is {self.stride} but pool is None: the passed-through group would keep its size; "
                "use pool='avg3' or 'avg3_nopad', or passthrough='none'"
            )

    def settings(self) -> ChainSettings:
        """As keyword arguments of `hierarchical_conv2d`, in the order of the operator's schema."""
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

    def adds(self, group: int) -> bool:
        """Whether the convolved `group` reads x_i + y_{i-1} rather than x_i."""
        first = self.first_convolved
        return self.hierarchical and (group > first or (group == 1 and self.passthrough == "first_added"))

    def within(self, size: int) -> ChainConfig:
        """The same for images of at most `size` rows and columns, with no stride or dilation beyond them.

        Farther taps meet zeros and farther pixels are not there, but kernels take memory for the way, PyTorch's backward
        above all.
        """
        if self.stride <= size and self.dilation <= size:
            return self
        return replace(self, stride=min(self.stride, size), dilation=min(self.dilation, size))

    def output_size(self, size: int) -> int:
        """Rows (or columns) of the output for `size` rows of x; the same for the convolutions and for the pool."""
        return (size - 1) // self.stride + 1


@functools.lru_cache
def _one_convolution(config: ChainConfig) -> ChainConfig:
    return ChainConfig(config.stride, config.dilation, config.groups, hierarchical=False, passthrough="none", activation="none")


@dataclass(frozen=True)
class ChainProblem:
    """One call of the operator, without its data: what a backend is chosen and a launch is planned by.

    config: the settings. device, dtype: of x (N, s*w, H, W). batch, height, width_pixels: N, H, W. width: w, the channels of a
    group. steps: the number of convolutions. channels_last: whether x has that memory format, else it is contiguous.
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

    @classmethod
    def of(cls, x: Tensor, width: int, steps: int, config: ChainConfig) -> ChainProblem:
        """A call on a tensor with x's batch, size, dtype, device and memory format; its channels are not looked at.

        width: channels of a group. steps: convolutions. config: the settings.
        """
        batch, _, height, width_pixels = x.shape
        last = memory_format(x) == torch.channels_last
        if type(height) is int and type(width_pixels) is int:  # a traced size would be compared, and the graph kept to it
            config = config.within(max(height, width_pixels))
        return cls(config, x.device, x.dtype, batch, height, width_pixels, width, steps, last)

    @classmethod
    def of_one_convolution(cls, u: Tensor, weight: Tensor, config: ChainConfig) -> ChainProblem:
        """One of the chain's convolutions and nothing behind it, on u (N, w, H, W) with a weight (w, w/groups, 3, 3).

        config: of the chain.
        """
        alone = _one_convolution(config)
        return replace(cls.of(u, weight.shape[0], 1, alone), config=alone)  # u may be the gradient of a smaller output

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


def memory_format(x: Tensor) -> torch.memory_format:
    """The memory format that x suggests and that the output keeps: channels-last or contiguous, as ATen decides it."""
    if type(x) in (Tensor, torch.nn.Parameter) and x.dim() == 4:  # ten times as fast; traced tensors would be guarded
        last = x.is_contiguous(memory_format=torch.channels_last)
        if last != x.is_contiguous():
            return torch.channels_last if last else torch.contiguous_format
    return suggest_memory_format(x)


def with_format(out: Tensor, channels_last: bool) -> Tensor:
    """`out` (N, C, H, W) in channels_last or contiguous; of one pixel or channel it is both, and its strides say which."""
    out = out.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    _, channels, height, width = out.shape
    if channels == 1 or height == width == 1:
        image = channels * height * width
        strides = (image, 1, width * channels, channels) if channels_last else (image, height * width, width, 1)
        out = out.as_strided(out.shape, strides)
    return out


def in_format_of(gradient: Tensor, weight: Tensor) -> Tensor:
    """A weight's `gradient` in the memory format of `weight`, both (w, w/groups, 3, 3): it is accumulated without a copy."""
    return with_format(gradient, memory_format(weight) == torch.channels_last)


def describe(tensor: object) -> str:
    """Shape, dtype and device of a tensor, or the type of what is none; for messages."""
    if isinstance(tensor, Tensor):
        return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
    return type(tensor).__name__


def check_types(x: object, weights: object, biases: object) -> None:
    """Raises TypeError where x is no tensor, or weights, or biases if given, no list of tensors.

    Shapes and dtypes are checked inside the operator.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {describe(x)}; a Tensor of shape (N, s*w, H, W) is needed")
    check_dense("x", x)
    for name, values in (("weights", weights), ("biases", biases)):
        if name == "weights" or values is not None:
            sequence_types(name, values)


def sequence_types(name: str, values: object) -> None:
    """Raises TypeError where `values`, the argument `name`, is no list of tensors."""
    if isinstance(values, Tensor) or not isinstance(values, Sequence):
        raise TypeError(f"{name} is a {describe(values)}; a list of Tensors, one per convolution, is needed")
    for i, value in enumerate(values):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}[{i}] is a {describe(value)}; a Tensor is needed")
        check_dense(f"{name}[{i}]", value)


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises TypeError, with the argument's `name`, where `tensor` is sparse, nested or of another layout without strides."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} is a tensor of the layout {kind}; a dense one is needed, such as {name}.to_dense()")


def check_weights(weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig) -> int:
    """Checks weights and biases among themselves; returns w, the channels of a group.

    weights: each (w, w/groups, 3, 3). biases: each (w,), or None. config: whose groups they are for.
    Raises ValueError for shapes and devices, TypeError for dtypes, naming the argument.
    """
    if len(weights) == 0:
        raise ValueError("weights is empty; one tensor of shape (w, w/groups, 3, 3) per convolution is needed")
    first = weights[0]
    if first.dim() != 4 or tuple(first.shape[2:]) != (3, 3):
        raise ValueError(f"weights[0] is {describe(first)}; the shape must be (w, w/groups, 3, 3)")
    width = first.shape[0]
    if width < 1 or width % config.groups or first.shape[1] * config.groups != width:
        raise ValueError(
            f"weights[0] is {describe(first)}; with groups={config.groups} the shape must be (w, w/groups, 3, 3)"
        )
    if first.dtype not in DTYPES:
        raise TypeError(f"weights[0] is {describe(first)}; allowed dtypes are {', '.join(map(str, DTYPES))}")
    for i, weight in enumerate(weights):
        if weight.shape != first.shape:
            raise ValueError(f"weights[{i}] is {describe(weight)}; it must match weights[0], {describe(first)}")
        if weight.dtype != first.dtype or weight.device != first.device:
            raise ValueError(f"weights[{i}] is {describe(weight)}; dtype and device must match weights[0], {describe(first)}")
    if biases is not None:
        if len(biases) != len(weights):
            raise ValueError(f"biases holds {len(biases)} tensors; weights holds {len(weights)}, and both must match")
        for i, bias in enumerate(biases):
            if tuple(bias.shape) != (width,):
                raise ValueError(f"biases[{i}] is {describe(bias)}; the shape must be ({width},)")
            if bias.device != first.device:
                raise ValueError(f"biases[{i}] is on {bias.device}; weights are on {first.device}")
            if bias.dtype not in (first.dtype, torch.float32):
                raise TypeError(f"biases[{i}] is {bias.dtype}; allowed are {first.dtype} (as weights) and torch.float32")
    return width


def check_arguments(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig
) -> ChainProblem:
    """Describes the call of `hierarchical_conv2d` on x (N, s*w, H, W) with these weights, biases and settings (config).

    Raises ValueError or TypeError naming the argument, what came and what is allowed.
    """
    width = check_weights(weights, biases, config)
    if x.dim() != 4:
        raise ValueError(f"x is {describe(x)}; four dimensions (N, s*w, H, W) are needed")
    if x.dtype not in DTYPES:
        raise TypeError(f"x is {x.dtype}; allowed dtypes are {', '.join(map(str, DTYPES))}")
    if x.device != weights[0].device:
        raise ValueError(f"x is on {x.device} but weights[0] is on {weights[0].device}; both must be on one device")
    if x.dtype != weights[0].dtype:
        raise TypeError(f"x is {x.dtype} but weights[0] is {weights[0].dtype}; both must have one dtype")
    steps = len(weights)
    scale = config.scale(steps)
    if x.shape[1] != scale * width:
        raise ValueError(
            f"x has {x.shape[1]} channels; {steps} weights of width {width} with passthrough={config.passthrough!r} "
            f"need s*w = {scale}*{width} = {scale * width}"
        )
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x is {describe(x)}; H and W must be at least 1")
    if config.stride > 1 and any(config.adds(config.first_convolved + i) for i in range(steps)):
        raise ValueError(
            f"stride is {config.stride} with hierarchical=True: y_(i-1) is smaller than x_i and cannot be added to it; "
            "use hierarchical=False"
        )
    return ChainProblem.of(x, width, steps, config)
