"""The activations behind each convolution: their names, what they compute, and their gradients.

Of some the output shows the derivative; of the others the input z is needed, which the backward convolves again.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The order is that of Activation::Kind in csrc/cpu/kernels/kernels.h.
ACTIVATIONS = ("relu", "none", "hardtanh20", "relu6", "leaky_relu", "hardswish", "silu", "gelu", "gelu_tanh", "mish")

CLAMPS = {"relu": (0.0, math.inf), "none": (-math.inf, math.inf), "hardtanh20": (0.0, 20.0), "relu6": (0.0, 6.0)}  # of y

SLOPE = 0.01  # of "leaky_relu" without one, as of nn.LeakyReLU


def split_activation(activation: str) -> tuple[str, float]:
    """The kind, one of ACTIVATIONS, and the slope: ("leaky_relu", 0.1) for "leaky_relu:0.1"; the slope of others is 0."""
    kind, _, slope = activation.partition(":")
    return kind, float(slope or SLOPE) if kind == "leaky_relu" else 0.0


def leaky_relu(slope: float) -> str:
    """The name of a leaky ReLU with this slope below zero."""
    return f"leaky_relu:{slope!r}"


def check_activation(activation: object) -> None:
    """Raises ValueError where `activation` is no name of one."""
    if activation in ACTIVATIONS:
        return
    kind, separator, slope = activation.partition(":") if isinstance(activation, str) else ("", "", "")
    try:
        right = kind == "leaky_relu" and math.isfinite(float(slope))
    except ValueError:
        right = False
    if not right:
        allowed = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(
            f"activation is {activation!r}; allowed are {allowed}, and 'leaky_relu:0.1' for a finite slope other than {SLOPE}"
        )


def shows_slope(activation: str) -> bool:
    """Whether the derivative can be read off the output; where not, kernels of a backward do not know the activation."""
    if activation in CLAMPS:
        return True
    kind, slope = split_activation(activation)
    return kind == "leaky_relu" and slope >= 0


def activate(z: Tensor, activation: str) -> Tensor:
    if activation == "relu":
        return z.relu()
    kind, slope = split_activation(activation)
    if kind == "none":
        return z
    if kind == "leaky_relu":
        return F.leaky_relu(z, slope)
    if kind in ("gelu", "gelu_tanh"):
        return F.gelu(z, approximate="tanh" if kind == "gelu_tanh" else "none")
    if kind in CLAMPS:
        return F.hardtanh(z, *CLAMPS[kind])
    return {"hardswish": F.hardswish, "silu": F.silu, "mish": F.mish}[kind](z)


def activation_backward(dy: Tensor, y: Tensor, activation: str) -> Tensor:
    """dz of an activation that `shows_slope`, from its output y."""
    aten = torch.ops.aten
    if activation == "none":
        return dy
    if activation == "relu":
        return aten.threshold_backward(dy, y, 0)
    kind, slope = split_activation(activation)
    if kind == "leaky_relu":
        return aten.leaky_relu_backward(dy, y, slope, True)
    return aten.hardtanh_backward(dy, y, *CLAMPS[kind])


def activation_backward_from_input(dy: Tensor, z: Tensor, activation: str, again: bool = False) -> Tensor:
    """dz of an activation that does not show its slope, from its input z. again: whether it is differentiated again."""
    aten = torch.ops.aten
    kind, slope = split_activation(activation)
    if again and kind in ("silu", "mish"):  # ATen's backward of these has no derivative
        sigmoid = z.sigmoid()
        if kind == "silu":
            return dy * sigmoid * (1 + z * (1 - sigmoid))
        tanh = F.softplus(z).tanh()
        return dy * (tanh + z * sigmoid * (1 - tanh * tanh))
    if kind == "leaky_relu":
        return aten.leaky_relu_backward(dy, z, slope, False)
    if kind in ("gelu", "gelu_tanh"):
        return aten.gelu_backward(dy, z, approximate="tanh" if kind == "gelu_tanh" else "none")
    return {"hardswish": aten.hardswish_backward, "silu": aten.silu_backward, "mish": aten.mish_backward}[kind](dy, z)
