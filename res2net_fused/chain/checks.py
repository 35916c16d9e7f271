"""Every check of a caller's arguments. Errors name the argument, what came and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .config import Chain1dConfig, ChainConfig
from .problem import Chain1dProblem, ChainProblem

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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
    """Raises TypeError, with the argument's `name`, where `tensor` is sparse, nested, quantized or without strides."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        raise TypeError(f"{name} is a tensor of the layout {kind}; a dense one is needed, such as {name}.to_dense()")
    if tensor.is_quantized:
        raise TypeError(f"{name} is {tensor.dtype}; a floating-point tensor is needed, such as {name}.dequantize()")


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
        raise ValueError(f"weights[0] is {describe(first)}; with groups={config.groups} the shape must be (w, w/groups, 3, 3)")
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


def check_arguments(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig) -> ChainProblem:
    """Describes the call of `hierarchical_conv2d` on x (N, s*w, H, W) with these weights, biases and settings (config).

    Raises ValueError or TypeError naming the argument, what came and what is allowed.
    """
    check_chain(x, weights, biases, config)
    return ChainProblem.from_tensor(x, weights[0].shape[0], len(weights), config)


def check_chain(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig) -> None:
    """Raises ValueError or TypeError as `check_arguments` does for the same x, weights, biases and config.

    It asks nothing that a tensor does not know inside vmap, such as its memory format.
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
    _check_channels(x, steps, width, config)
    if x.shape[2] < 1 or x.shape[3] < 1:
        raise ValueError(f"x is {describe(x)}; H and W must be at least 1")
    if config.stride > 1 and any(step.adds for step in config.convolutions(steps)):
        raise ValueError(
            f"stride is {config.stride} with hierarchical=True: y_(i-1) is smaller than x_i and cannot be added to it; "
            "use hierarchical=False"
        )


def _check_channels(x: Tensor, steps: int, width: int, config: ChainConfig) -> None:
    scale = config.scale(steps)
    if x.shape[1] != scale * width:
        raise ValueError(
            f"x has {x.shape[1]} channels; {steps} weights of width {width} with passthrough={config.passthrough!r} "
            f"need s*w = {scale}*{width} = {scale * width}"
        )


def check_vectors(name: str, values: Sequence[Tensor], steps: int, width: int, x: Tensor) -> None:
    """Raises ValueError or TypeError where `values`, the argument `name`, are not `steps` vectors (width,) that go with x."""
    if len(values) != steps:
        raise ValueError(f"{name} holds {len(values)} tensors; weights holds {steps}, and both must match")
    for i, value in enumerate(values):
        if tuple(value.shape) != (width,) or value.device != x.device:
            raise ValueError(f"{name}[{i}] is {describe(value)}; ({width},) on {x.device} is needed")
        if value.dtype not in (x.dtype, torch.float32):
            raise TypeError(f"{name}[{i}] is {value.dtype}; allowed are {x.dtype} (as x) and torch.float32")


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
    width, steps = first.shape[0], len(weights)
    if (affine_scale is None) != (affine_shift is None):
        raise ValueError("affine_scale and affine_shift must both be given, or neither")
    for name, values in (("biases", biases), ("affine_scale", affine_scale), ("affine_shift", affine_shift)):
        if values is not None:
            check_vectors(name, values, steps, width, x)
    if x.dim() != 3:
        raise ValueError(f"x is {describe(x)}; three dimensions (N, s*w, L) are needed")
    _check_channels(x, steps, width, config.chain)
    least = config.padding(first.shape[2]) + 1 if config.padding_mode == "reflect" else 1
    if x.shape[2] < least:
        raise ValueError(
            f"x is {describe(x)}; with dilation={config.dilation}, kernels of {first.shape[2]} and "
            f"padding_mode={config.padding_mode!r}, L must be at least {least}"
        )
    return Chain1dProblem.from_tensor(x, first, steps, config)
