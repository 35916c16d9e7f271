"""Whoever records a model rather than runs it, and so needs PyTorch's own operators."""

from __future__ import annotations

from collections.abc import Iterator
from operator import attrgetter, itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.onnx import is_in_onnx_export
from torch.utils._device import DeviceContext

EXPORTED = "exported to ONNX, which knows PyTorch's own operators only"
TRACED = "torch.jit.trace records PyTorch's own operators, so that the trace loads anywhere"

# What counters and patches replace of PyTorch, as it was at the import.
_FUNCTIONS = "conv2d", "conv1d", "batch_norm", "relu"
_METHODS = "Conv2d._conv_forward", "Conv1d._conv_forward", "Conv2d.forward", "BatchNorm2d.forward", "ReLU.forward"
_functions, _methods = itemgetter(*_FUNCTIONS), attrgetter(*_METHODS)
_PRESENT = *_functions(vars(F)), *_methods(nn)


def replaced() -> bool:
    """Whether a function of PyTorch that blocks call is another one than at the import."""
    return (*_functions(vars(F)), *_methods(nn)) != _PRESENT


def overrides(tensor: Tensor) -> bool:
    """Whether the tensor's class has operators of its own, by `__torch_function__`."""
    own = getattr(type(tensor).__torch_function__, "__func__", None)  # None where that is switched off
    return own is not None and own is not Tensor.__torch_function__.__func__  # type: ignore[attr-defined]


def why_recorded() -> str | None:
    """Why a block must run PyTorch's own operators at this moment, or None; a fraction of a microsecond."""
    if is_compiling() or torch._C._is_tracing():
        return why_written()
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        mode = next(_watching_modes(), None)
        if mode is not None:
            return f"{type(mode).__name__} is active, and counts or changes PyTorch's own operators"
    if replaced():
        names = *(f"F.{name}" for name in _FUNCTIONS), *_METHODS
        now = *_functions(vars(F)), *_methods(nn)
        name = next(name for name, a, b in zip(names, now, _PRESENT, strict=True) if a is not b)
        return f"PyTorch's {name} is replaced, which counts or changes what blocks call"
    return None


def why_written() -> str | None:
    """Why what is recorded must hold PyTorch's own operators only, or None; torch.compile and torch.export keep others."""
    if is_compiling():
        return EXPORTED if is_in_onnx_export() else None
    if torch._C._is_tracing():
        return EXPORTED if is_in_onnx_export() else TRACED
    return None


def _watching_modes() -> Iterator[object]:
    """The modes that see each operator, but for PyTorch's own that trace, fake or place tensors."""
    for i in range(torch._C._len_torch_dispatch_stack()):
        mode = torch._C._get_dispatch_stack_at(i)
        if not mode.is_infra_mode():
            yield mode
    for i in range(torch._C._len_torch_function_stack()):
        mode = torch._C._get_function_stack_at(i)
        if type(mode) is not DeviceContext:
            yield mode
