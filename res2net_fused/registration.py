"""What the operators register with PyTorch in the same way: their behaviour under autocast, and no second derivative."""

from __future__ import annotations

from collections.abc import Callable

import torch

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def register_autocast(
    library: torch.library.Library, name: str, cast: Callable[..., tuple[object, ...]], first_tensors: int = 2
) -> None:
    """Under autocast `name` runs with the arguments that `cast(dtype, *arguments)` returns.

    As for ATen's convolutions, nothing is cast where one of the first arguments, tensors or lists of them, is fp64 or no
    floating-point tensor.
    """
    operator = getattr(torch.ops.res2net_fused, name).default

    def kernel_for(device_type: str, key: str) -> Callable[..., object]:
        def kernel(*arguments):
            tensors = [t for a in arguments[:first_tensors] for t in (a if isinstance(a, (list, tuple)) else [a])]
            if not any(t.dtype == torch.float64 or not t.is_floating_point() for t in tensors):
                arguments = cast(torch.get_autocast_dtype(device_type), *arguments)
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return operator(*arguments)

        return kernel

    for device_type, key in _AUTOCAST_KEYS.items():
        library.impl(name, kernel_for(device_type, key), key)


def refuse_second_derivative(library: torch.library.Library, name: str) -> None:
    """For the backward operator of `name`, which has no backward of its own."""

    def refuse(ctx, *grads):
        raise NotImplementedError(f"{name} has no second derivative; compute it with res2net_fused.reference.{name}")

    torch.library.register_autograd(f"res2net_fused::{name}_backward", refuse, lib=library)
