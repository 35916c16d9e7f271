"""A GPU kernel has agreed with float64 before a caller sees its numbers, once for each kernel, dtype and device.

No table, no other machine and no earlier process is believed: a compiler, a driver or a card may be another one. The call is
tried on random tensors of the caller's dtype, strides and alignment, beside PyTorch's own operators in float64. A backend that
is wrong, or raises, is put aside for such calls for as long as the process lives; `explain` and a warning say so. That takes a
few milliseconds at the first call of a kind, and memory for a second one.

In a CUDA graph nothing can be tried: what has not been by then is left to the next backend, in the end to PyTorch's operators.
"""

from __future__ import annotations

import contextlib
import logging
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..chain.tolerances import first_use_bound
from .base import Backend
from .choices import version
from .selection import Choice, Problem, get_backend, put_aside
from .triton.availability import uses_tf32
from .triton.tiles import table

# Of one tensor of images in float64: what is compared of larger ones are the first images and the last.
COMPARED = 2**22
_SEED = 20190402
_MANY = 4096  # calls that are known by their shapes
_ALIGNED = 16  # bytes, at which kernels load at once

Run = Callable[..., Sequence[Tensor]]  # (backend, problem, *images, *weights)
Choose = Callable[[Mapping[str, str]], Choice]

_known: set[Hashable] = set()  # calls, in every detail: asked for first
_agreed: set[Hashable] = set()  # kernels
_lock = threading.RLock()
_log = logging.getLogger("res2net_fused")
_suspended = False


@contextlib.contextmanager
def suspended() -> Iterator[None]:
    """No kernel is tried meanwhile, for measurements and tests that compare what they run themselves, or count launches."""
    global _suspended
    before, _suspended = _suspended, True
    try:
        yield
    finally:
        _suspended = before


def is_suspended() -> bool:
    return _suspended


def confirmed(
    operator: str, choose: Choose, problem: Problem, images: list[Any], weights: list[Any], run: Run, whole: bool = False
) -> Backend:
    """The backend of a call whose kernels have agreed with float64.

    choose: given reasons against backends by name, the choice; it raises where an explicit one cannot run. images: tensors
    (N, ...) or None, or lists of them. weights: tensors, None, numbers, or lists of them. run: the call, which returns its
    results, images first; it packs for itself. whole: whether an image's result depends on the others, as in training.
    """
    against: dict[str, str] = {}
    while True:
        backend = get_backend(choose(against).name)
        if problem.device.type != "cuda" or backend.name == "reference" or problem.batch == 0 or _suspended:
            return backend
        precision = problem.dtype == torch.float32 and uses_tf32(problem)
        known = operator, backend.name, problem, precision, version(), table(), tuple(_place(t) for t in _tensors(images))
        if known in _known:
            return backend
        why = _why_not(operator, backend, problem, precision, images, weights, run, whole)
        if why is None:
            if len(_known) >= _MANY:
                _known.clear()
            _known.add(known)
            return backend
        against[backend.name] = why


def _why_not(
    operator: str, backend: Backend, problem: Any, precision: bool, images: list[Any], weights: list[Any], run: Run, whole: bool
) -> str | None:
    instance = backend.instance(problem)
    layouts = tuple(_layout(t) for t in _tensors(images))
    kernel = operator, backend.name, instance, precision, layouts, tuple(t.shape for t in _tensors(weights))
    if kernel in _agreed:
        return None
    if torch.cuda.is_current_stream_capturing():
        reason = "not yet compared with float64, which a CUDA graph leaves no room for: call the model once before the capture"
        _log.warning("%s, backend %s for %s: %s", operator, backend.name, problem, reason)
        return reason
    with _lock:
        if kernel in _agreed:
            return None
        found: str | None
        try:
            found = _trial(backend, problem, precision, images, weights, run, whole)
        except torch.OutOfMemoryError:
            return "no memory is left to compare it with float64"  # this time
        except Exception as error:  # a compiler's, a launcher's, the driver's
            found = f"it raises {type(error).__name__} ({error!s:.200})"
        if found is None:
            _agreed.add(kernel)
            return None
        why = put_aside(backend, problem, found)
        _log.warning("backend %s for %s: %s; please report it with `res2net-fused info`", backend.name, problem, why)
        return why


def _trial(
    backend: Backend, problem: Any, precision: bool, images: list[Any], weights: list[Any], run: Run, whole: bool
) -> str | None:
    """Why the results of such a call are wrong, or None."""
    per_image = max(t[0].numel() for t in _tensors(images))
    most = max(2, COMPARED // max(1, per_image))
    batch = problem.batch
    if whole and batch > most:  # the results of some images cannot be had without those of all
        batch = most
    generator = torch.Generator("cpu").manual_seed(_SEED)
    with torch.no_grad(), torch.autocast("cuda", enabled=False):
        twins = tree_map_only(Tensor, lambda t: _twin(t, batch, 1.0, generator), images)
        factors = tree_map_only(Tensor, lambda t: _twin(t, len(t), 1 / math.sqrt(max(1, t[0].numel())), generator), weights)
        for t in _tensors(twins):
            torch.full_like(t, math.nan)  # freed at once: memory that a kernel leaves unwritten is likely to hold it
        found = run(backend, replace(problem, batch=batch), *twins, *factors)
        some = sorted({*range(min(batch, (most + 1) // 2)), *range(max(0, batch - most // 2), batch)})
        exact = tree_map_only(Tensor, lambda t: t[some].double(), twins)
        wide = replace(problem, batch=len(some), dtype=torch.float64)
        expected = run(get_backend("reference"), wide, *exact, *tree_map_only(Tensor, Tensor.double, factors))
        limit = first_use_bound(problem.dtype, precision)
        for i, (a, b) in enumerate(zip(found, expected, strict=True)):
            a = a[some] if len(a) == batch != len(b) else a
            error = float((a.double() - b).norm() / b.norm()) if a.shape == b.shape else math.nan
            if not error <= limit:
                return f"its result {i} differs from float64 by {error:.2g} in the norm; at most {limit:.2g} is allowed"
    return None


def _tensors(arguments: Sequence[Any]) -> Iterator[Tensor]:
    for value in arguments:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _place(t: Tensor) -> Hashable:
    return t.dtype, t.stride(), t.data_ptr() % _ALIGNED


def _layout(t: Tensor) -> Hashable:
    """What of a tensor's place a kernel may have another path for: the order of its dimensions, and how it is aligned."""
    strides = [stride for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1]
    order = tuple(sorted(range(len(strides)), key=strides.__getitem__))
    steps = math.gcd(*(stride for stride in strides if stride > 1))
    return t.dtype, order, 0 in strides, math.gcd(steps * t.itemsize, _ALIGNED), t.data_ptr() % _ALIGNED


def _twin(t: Tensor, length: int, scale: float, generator: torch.Generator) -> Tensor:
    """Random values where t lies, with as many rows as `length`."""
    shape = length, *t.shape[1:]
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, t.stride(), strict=True))
    values = torch.randn(extent + _ALIGNED // t.itemsize, generator=generator).mul_(scale).to(t.device, t.dtype)
    offset = (t.data_ptr() - values.data_ptr()) % _ALIGNED // t.itemsize
    return values.as_strided(shape, t.stride(), offset)
