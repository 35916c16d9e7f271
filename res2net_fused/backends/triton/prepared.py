"""Launches that are worked out once: a later call of the same kind only puts its own pointers in, and launches.

    first call    plan, tiles, views -> KernelCalls -> `JITFunction.run`: binds, specialises, compiles -> kernels   > kept
                  the same KernelCalls of tensors without memory: what is a pointer into what, and what is constant
    later calls   pointers of the tensors given, and of one new buffer -> the launchers of the kernels that were kept

Whatever a launch depends on is part of the key under which it is kept (settings, the table of tiles, each tensor's type, shape,
strides and alignment) or is asked for at each call: the device, the stream, whether Triton still has the kernel, and its hooks
and debug settings, under which `JITFunction.run` launches as ever. No tensor is kept.
"""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from .launch import KernelCall
from .tiles import table

# Whose launchers are called as `JITFunction.run` calls them: run(x, y, z, stream, function, metadata, ..., *arguments).
_KNOWN = (3, 6) <= tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) <= (3, 9)
_RUN = JITFunction.run  # a profiler may replace it
_MOST_KINDS = 512  # of calls that are kept
_MOST_LAUNCHES = 64  # of one call: where there are more, the device is busy for much longer than the host
_ALIGNMENT = 512  # bytes, of PyTorch's allocations on a device; Triton tells 16 apart

# calls(tensors, *settings): launches that depend on nothing else, and that come from descriptions of the tensors alone.
Calls = Callable[..., Iterator[KernelCall]]


_Made = tuple[KernelCall, Any]  # a launch, and its compiled kernel


class _Launch(NamedTuple):
    run: Callable[..., object]
    programs: int
    function: object
    metadata: object
    pointers: tuple[tuple[int, int], ...]  # which tensor, and how many bytes behind its first element
    constants: tuple[object, ...]  # the arguments behind the pointers


class _Prepared(NamedTuple):
    """Launches of one kind of call, on buffers of so many elements of a type; kernels: by their keys in Triton's caches."""

    launches: tuple[_Launch, ...]
    elements: int
    dtype: torch.dtype
    kernels: tuple[tuple[JITFunction, str, object], ...]

    def stands(self, index: int) -> bool:
        """Whether `JITFunction.run` would launch just these kernels on the device, and call nobody else."""
        for kernel, key, compiled in self.kernels:
            if kernel.pre_run_hooks or kernel.device_caches[index][0].get(key) is not compiled:
                return False
        return True


class _Kind:
    """One kind of call. refused: it cannot be prepared."""

    __slots__ = ("ready", "refused")

    def __init__(self) -> None:
        self.ready: _Prepared | None = None
        self.refused = False


@functools.lru_cache(_MOST_KINDS)
def _kind(*key: object) -> _Kind:
    return _Kind()


def launch(calls: Calls, settings: tuple[object, ...], tensors: Sequence[Tensor | None]) -> None:
    """Makes every launch of `calls(tensors, *settings)`, a function of a module, on the device of the first tensor."""
    device = tensors[0].device  # type: ignore[union-attr]
    if device.type != "cuda" or not _KNOWN or _watched():
        launch_all(calls(tensors, *settings), device)
        return
    pointers = [0 if t is None else t.data_ptr() for t in tensors]
    layouts = [
        None if t is None else (t.dtype, t.shape, t.stride(), pointer & 15)
        for t, pointer in zip(tensors, pointers, strict=True)
    ]
    kind, index = _kind(calls, settings, device, table(), *layouts), device.index
    ready = kind.ready
    if ready is not None and ready.stands(index):
        if ready.elements:
            buffer = torch.empty(ready.elements, dtype=ready.dtype, device=device)
            pointers.append(buffer.data_ptr())
        if not (ready.elements and pointers[-1] & 15) and _launched(ready, pointers, index):
            return
    made = launch_all(calls(tensors, *settings), device)
    if not kind.refused and all(kernel is not None for _, kernel in made):  # a hook may keep Triton from compiling
        kind.ready = _prepared(calls, settings, tensors, made, index)
        kind.refused = kind.ready is None


def _watched() -> bool:
    """Whether `JITFunction.run` has more to do than to launch: hooks of profilers, debugging, instrumented kernels."""
    runtime, enter, leave = knobs.runtime, knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(
        getattr(enter, "calls", enter) or getattr(leave, "calls", leave)  # a chain of hooks, or one
        or runtime.debug or runtime.add_stages_inspection_hook or knobs.compilation.instrumentation_mode
        or JITFunction.run is not _RUN
    )  # fmt: skip


def _launched(ready: _Prepared, pointers: list[int], index: int) -> bool:
    """Launches; False where that failed as it can only at a first launch, so that the usual way finds the words for it."""
    active = driver.active
    if active.get_current_device() != index:
        with torch.cuda.device(index):
            return _launched(ready, pointers, index)
    stream = active.get_current_stream(index)
    try:
        for run, programs, function, metadata, places, constants in ready.launches:
            given = [pointers[which] + offset for which, offset in places]
            run(programs, 1, 1, stream, function, metadata, None, None, None, *given, *constants)
    except (OSError, OutOfResources):
        return False
    return True


def launch_all(calls: Iterable[KernelCall], device: torch.device) -> list[_Made]:
    """Launches as Triton does; the kernel of each launch, as far as they are worth keeping."""
    made: list[_Made] = []
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        for call in calls:
            kernel = call.run()
            if len(made) <= _MOST_LAUNCHES:
                made.append((call, kernel))
    return made


def _prepared(
    calls: Calls, settings: tuple[object, ...], tensors: Sequence[Tensor | None], made: Sequence[_Made], index: int
) -> _Prepared | None:
    """What calls like the one that made these launches need; None where that is not known."""
    if not 0 < len(made) <= _MOST_LAUNCHES:
        return None
    bare = [None if t is None else torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") for t in tensors]
    try:
        return _worked_out(made, list(calls(bare, *settings)), bare, tensors, index)
    except (AttributeError, LookupError, StopIteration, TypeError, ValueError):
        return None  # Triton's insides are others than those that are known here


def _worked_out(
    made: Sequence[_Made],
    described: Sequence[KernelCall],
    bare: Sequence[Tensor | None],
    tensors: Sequence[Tensor | None],
    index: int,
) -> _Prepared:
    """`made` as launches of pointers. described: the same of `bare`, laid out as `tensors` but each with its own storage."""
    places = {_storage(t): (which, 0) for which, t in enumerate(bare) if t is not None}
    size, dtype, launches, kernels = 0, torch.uint8, [], {}
    for (call, compiled), twin in zip(made, described, strict=True):
        if call.kernel.used_global_vals:
            raise ValueError("globals that JITFunction.run compares at each launch")
        pointers: list[tuple[int, int]] = []
        constants: list[object] = []
        for name in call.kernel.arg_names:
            given, value = call.arguments[name], twin.arguments[name]
            if not isinstance(value, Tensor):
                constants.append(value)
                same = given == value
            elif constants:
                raise ValueError(f"{name} is a pointer behind other arguments")
            else:
                if _storage(value) not in places:
                    places[_storage(value)] = len(bare), size
                    size += -(-value.untyped_storage().nbytes() // _ALIGNMENT) * _ALIGNMENT
                    dtype = value.dtype
                which, start = places[_storage(value)]
                offset = start + int(value.storage_offset()) * value.itemsize
                pointers.append((which, offset))
                base = tensors[which].data_ptr() if which < len(tensors) else None  # type: ignore[union-attr]
                same = given.data_ptr() == base + offset if base is not None else (given.data_ptr() - offset) % 16 == 0
            if not same:
                raise ValueError(f"{name} of two equal calls differs")
        if (call.kernel, call.programs, call.options) != (twin.kernel, twin.programs, twin.options):
            raise ValueError("two equal calls differ")
        cache = call.kernel.device_caches[index][0]
        kernels[id(compiled)] = call.kernel, next(key for key, kept in list(cache.items()) if kept is compiled), compiled
        run, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        launches.append(_Launch(run, call.programs, function, metadata, tuple(pointers), tuple(constants)))
    return _Prepared(tuple(launches), size // dtype.itemsize, dtype, tuple(kernels.values()))


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata
