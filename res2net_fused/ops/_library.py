"""What the operators share: the library, pieces of schemas, autocast, FLOPs, checks."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..chain.config import ChainConfig

SETTINGS = "int stride, int dilation, int groups, bool hierarchical, str passthrough, str? pool, str activation"
TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

library = torch.library.Library("res2net_fused", "DEF")  # of all operators
cached_config = functools.lru_cache(ChainConfig)

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def register_autocast(name: str, cast: Callable[..., tuple[object, ...]]) -> None:
    """Under autocast `name` runs with the arguments that `cast(dtype, *arguments)` returns.

    As for ATen's convolutions, nothing is cast where x or a weight, the first two arguments, is fp64 or no floating-point
    tensor.
    """
    operator = getattr(torch.ops.res2net_fused, name).default

    def kernel_for(device_type: str, key: str) -> Callable[..., object]:
        def kernel(*arguments):
            x, weights, *_ = arguments
            if not any(t.dtype == torch.float64 or not t.is_floating_point() for t in (x, *weights)):
                arguments = cast(torch.get_autocast_dtype(device_type), *arguments)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return operator(*arguments)

        return kernel

    for device_type, key in _AUTOCAST_KEYS.items():
        library.impl(name, kernel_for(device_type, key), key)


def refuse_second_derivative(name: str) -> None:
    """For the backward operator of `name`, which has no backward of its own."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{name} has no second derivative; compute it with res2net_fused.chain.reference.{name}")

    torch.library.register_autograd(f"res2net_fused::{name}_backward", refuse, lib=library)


def refuse_tangents(name: str, tensors: Sequence[Tensor]) -> None:
    """Raises NotImplementedError, naming the operator `name`, where one of the tensors has a tangent.

    torch.library has no forward-mode rules and would lose it in silence.
    """
    if any(torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        remedy = f"compute it with res2net_fused.chain.reference.{name}"
        raise NotImplementedError(f"{name} has no forward-mode derivative; {remedy}")


def check_devices(x: Tensor, **others: Tensor | Sequence[Tensor] | None) -> None:
    """Raises ValueError, with the argument's name, where one of the `others` is not on x's device."""
    allowed = {x.device}
    for name, value in others.items():
        if value is None:
            continue
        tensors = (value,) if isinstance(value, Tensor) else value
        if not allowed.issuperset(map(_device_of, tensors)):
            i = next(i for i, tensor in enumerate(tensors) if tensor.device != x.device)
            name = name if isinstance(value, Tensor) else f"{name}[{i}]"
            raise ValueError(f"{name} is on {tensors[i].device} but x is on {x.device}; both must be on one device")


_device_of = operator.attrgetter("device")


def convolution_flops(weight_shapes: Sequence[Sequence[int]], out_shape: Sequence[int]) -> int:
    """Multiplications and additions of convolutions by weight_shapes, all (w, w/groups, 3, 3), to out_shape (N, C, H', W')."""
    batch, _, height, width = out_shape
    out_channels, in_channels, rows, columns = weight_shapes[0]
    return 2 * batch * height * width * len(weight_shapes) * out_channels * in_channels * rows * columns
