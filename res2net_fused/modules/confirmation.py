"""What a convolution or norm of an unknown class computes: tried in float64 on a copy, never guessed from names.

It is tried when it is met, which may be long after `accelerate`, and once for each class with the settings that it has then.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.compiler import is_compiling
from torch.utils._python_dispatch import _disable_current_modes

from .switches import switches, unforeseeable

Tried = TypeVar("Tried")

_AGREEMENT = 1e-9  # relative, in float64: rounding stays below 1e-13, another recurrence differs in the first digit
_AGREEMENT_IN_FLOAT = 1e-3
SEED = 20190402
PLAIN_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.BatchNorm1d)
_OF_A_NORM = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
_OF_A_CONVOLUTION = {"weight", "bias", "norm", "activation"}  # what libraries' own Conv2d classes hold


def agree(ours: Tensor, own: Tensor) -> bool:
    return ours.shape == own.shape and bool((ours - own).norm() <= _AGREEMENT * own.norm())


def agrees_in_float(module: nn.Module, expected: Callable[[Tensor], Tensor], channels: int, forward: Any = None) -> bool:
    """Whether a float64 module computes the same elsewhere: float32, another size, large numbers, gradients on.

    expected: in float64, of images (1, channels, 18, 6). forward: the module's, by default its own.
    """
    x = 100 * torch.randn(1, channels, 18, 6, dtype=torch.float64, device="cpu")
    narrow: Any = copy.deepcopy(module, _process_groups(module)).float()
    with torch.enable_grad(), torch.autocast("cpu", enabled=False):
        own = narrow(x.float()) if forward is None else forward(narrow, x.float())
    ours = expected(x)
    if not ours.float().isfinite().all():
        return True  # beyond float32: no evidence
    return own.shape == ours.shape and bool((ours - own.double()).norm() <= _AGREEMENT_IN_FLOAT * ours.norm())


@contextlib.contextmanager
def seeded() -> Iterator[None]:
    """Switches gradients, inference mode and tracing off and seeds random numbers; the caller's are given back."""
    internals: Any = torch._C  # whose stubs lack the second one
    tracing = internals._get_tracing_state()
    internals._set_tracing_state(None)
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
            torch.default_generator.manual_seed(SEED)  # of the CPU alone: GPUs' generators are the caller's
            yield
    finally:
        internals._set_tracing_state(tracing)


def eps_of(norm: nn.Module) -> float | None:
    """The eps of a norm that is, in the mode it is in, y = (x - mean) * weight / sqrt(var + eps) + bias; None of any other."""
    if type(norm) in PLAIN_NORMS or type(norm) is _OneProcessNorm:
        eps: float = norm.eps  # type: ignore[assignment]
        return eps
    if not isinstance(norm, nn.Module) or norm._modules:
        return None
    names = set(_tensors(norm))
    if not {"running_mean", "running_var"} <= names <= _OF_A_NORM:
        return None
    return _once(norm, (getattr(norm, "eps", None), getattr(norm, "track_running_stats", None)), _measured_eps)


def equal_settings(conv: Any) -> tuple[object, ...]:
    """What equal convolutions of a chain share, hashable also where it was set to lists."""
    settings = conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups
    return tuple([tuple(value) if isinstance(value, list) else value for value in settings])


def own_parts(conv: nn.Conv2d) -> bool:
    """Whether a convolution has parts that none of the known classes has."""
    return not set(conv._modules) | set(_tensors(conv)) <= _OF_A_CONVOLUTION


def is_convolution(conv: nn.Conv2d) -> bool:
    """Whether a convolution of any class computes what its weight and bias say, and the norm inside it, if it has one."""
    if type(conv) is nn.Conv2d:
        return True
    if own_parts(conv):
        return False
    inside = tuple((name, type(m), m.training, switches(m)) for name, m in conv.named_modules() if name)
    return bool(_once(conv, (equal_settings(conv), inside), _convolves))


NOTE = "_res2net_fused_found"  # on a part: what was found, for traces
_found: dict[tuple[object, ...], Any] = {}


def _once(part: nn.Module, settings: tuple[object, ...], trial: Callable[[Any], Tried]) -> Tried | None:
    """What the trial on a copy of the part finds, or None where the part's code fails; once for each class and settings."""
    now = part.training, switches(part), settings
    if is_compiling():  # nothing is tried in a trace: the part carries what was found before
        then, noted = vars(part).get(NOTE, (None, None))
        return noted if then == now else None
    cls: Any = type(part)
    if unforeseeable(cls) is not None:
        return None
    key = cls, tuple(_tensors(part)), now
    if key not in _found:
        try:
            with _disable_current_modes(), seeded(), torch.autocast("cpu", enabled=False):
                found = trial(random_twin(part, least=1e-4))
        except Exception as error:  # somebody else's code may fail in any way; the block then runs its own forward
            if of_memory(error):
                return None
            found = None
        if torch._C._get_tracing_state() is not None:
            return found
        _found[key] = found
    vars(part)[NOTE] = now, _found[key]
    return _found[key]


def of_memory(error: Exception) -> bool:
    """Whether an error says nothing of the code that raised it."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """All tensors of a module by name; some are ordinary attributes, as in DataParallel's replicas."""
    own = itertools.chain(module._parameters.items(), module._buffers.items(), vars(module).items())
    return {name: value for name, value in own if isinstance(value, Tensor)}


def _process_groups(module: nn.Module) -> dict[int, Any]:
    """What deepcopy is told to share, by id, since it cannot be copied."""
    return {id(m.process_group): m.process_group for m in module.modules() if isinstance(m, nn.SyncBatchNorm)}


def random_twin(part: nn.Module, least: float = 0.5) -> nn.Module:
    """A float64 copy on the CPU, without hooks, of which no tensor is the part's: that may be large, on a GPU, meta or fake.

    Its parameters are random, since zeros would hide a difference. least: the smallest variance.
    """
    fresh = _process_groups(part)
    for module in part.modules():
        for name, tensor in _tensors(module).items():
            shape = tuple(tensor.shape)
            value = torch.zeros(shape, dtype=tensor.dtype, device="cpu")
            if tensor.is_floating_point():
                value = torch.randn(shape, dtype=torch.float64, device="cpu")
                value *= 1 / max(1, value[0].numel()) ** 0.5 if value.dim() > 1 else 1
                if name == "running_var":
                    value = 2 * least ** torch.rand_like(value)
            elif not (tensor.is_meta or isinstance(tensor, FakeTensor)):
                value = tensor.detach().cpu().clone()
            fresh[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    twin = copy.deepcopy(part, fresh)
    for module in twin.modules():
        if type(module) is nn.SyncBatchNorm:
            module.__class__ = _OneProcessNorm
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
            hooks.clear()
    return twin


class _OneProcessNorm(nn.SyncBatchNorm):
    """SyncBatchNorm as it is in one process: its own forward would wait for the others, and refuses tensors on the CPU."""

    forward = nn.BatchNorm2d.forward


def _measured_eps(norm: Any) -> float | None:
    """The eps by which a norm comes nearest, if it agrees with that for variances of any size."""
    u = torch.randn(3, len(norm.running_mean), 4, 5, dtype=torch.float64, device="cpu")
    tensors = {name: tensor.clone() for name, tensor in _tensors(norm).items() if name != "num_batches_tracked"}
    mean, var = tensors["running_mean"], tensors["running_var"]
    weight, bias = tensors.get("weight", torch.ones_like(var)), tensors.get("bias", torch.zeros_like(var))
    column = (-1, 1, 1)
    own = norm(u.clone())
    # y - bias = (u - mean) * weight / sqrt(var + eps), solved where eps counts most.
    k = int(var.argmin())
    scale = ((own[:, k] - bias[k]) / (u[:, k] - mean[k])).mean() / weight[k]
    eps = float(scale.pow(-2) - var[k])
    written = getattr(norm, "eps", None)
    for candidate in (written, round(eps, 15), eps):
        if isinstance(candidate, int | float) and candidate >= 0:
            scale = (var + candidate).rsqrt() * weight

            def expected(x: Tensor, scale: Tensor = scale) -> Tensor:
                return (x - mean.reshape(column)) * scale.reshape(column) + bias.reshape(column)

            if agree(expected(u), own) and (norm.training or agrees_in_float(norm, expected, len(mean))):
                return float(candidate)
    return None


def _convolves(conv: nn.Conv2d) -> bool:
    """Whether a copy computes the convolution, and its own norm behind it."""
    u = torch.randn(2, conv.in_channels, 7, 6, dtype=torch.float64, device="cpu")
    norm: Any = conv._modules.get("norm")

    def expected(x: Tensor) -> Tensor:
        y = nn.functional.conv2d(x, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        return y if norm is None else norm(y)

    trained = norm is not None and norm.training  # whose statistics are of the images: in float32 of others, by rounding
    return agree(expected(u), conv(u.clone())) and (trained or agrees_in_float(conv, expected, conv.in_channels))
