"""What the code of a class reads besides modules and tensors: flags and settings with which its result may change.

A class with a forward of its own is tried once; that holds for the settings that it had then, so they are read at every call.
"""

from __future__ import annotations

import dis
import functools
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})
_ABSENT = "<absent>"  # picklable, as all that `switches` returns
_NOT_CALLED = frozenset({"__init__", "__new__", "__repr__", "extra_repr", "reset_parameters"})
FUSED = "_res2net_fused_class"  # in the body of a generated class
_PYTORCHS = frozenset(vars(nn.Module()))


def switches(module: nn.Module) -> tuple[object, ...]:
    """The present settings that the module's class reads, of the module, its class and its globals; () for PyTorch's own."""
    cls: Any = type(module)
    if torch.compiler.is_compiling():
        names, others = _constants_of(cls)
    else:
        names, shared = _read_by(cls)
        others = _values_of(shared) if shared else ()
    if not names and not others:
        return ()
    own = module.__dict__
    values = [own[name] if name in own else getattr(cls, name, _ABSENT) for name in names]
    return *[value if type(value) in _PLAIN else _described(value) for value in values], *others


def _values_of(shared: tuple[tuple[dict[str, Any], str], ...]) -> tuple[object, ...]:
    values = [namespace.get(name, _ABSENT) for namespace, name in shared]
    return tuple([value if type(value) in _PLAIN else _described(value) for value in values])


def named_switches(module: nn.Module) -> dict[str, object]:
    """The same by name, for messages."""
    cls: Any = type(module)
    names, shared = _read_by(cls)
    return dict(zip((*names, *(name for _, name in shared)), switches(module), strict=False))


def may_read(cls: Any, name: str) -> bool:
    """Whether the code of a class reads an attribute of that name."""
    return all(map(_known, cls.__mro__)) or name in _read_by(cls)[0]


def _described(value: object) -> object:
    """The plain values inside a container or an object, else a name: comparable and picklable."""
    kind = type(value).__qualname__
    if isinstance(value, (Tensor, nn.Module, type, types.ModuleType)) or callable(value):
        return getattr(value, "__qualname__", kind)
    inside: Iterable[tuple[object, object]] = getattr(value, "__dict__", {}).items()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, (list, tuple)):
        inside = enumerate(value)
    return kind, *((str(key), v if type(v) in _PLAIN else type(v).__qualname__) for key, v in inside)


@torch.compiler.assume_constant_result
def _constants_of(cls: Any) -> tuple[tuple[str, ...], tuple[object, ...]]:
    """Of a class, for a trace, which guards what it reads of the module itself."""
    names, shared = _read_by(cls)
    return names, _values_of(shared)


@functools.cache
def _read_by(cls: Any) -> tuple[tuple[str, ...], tuple[tuple[dict[str, Any], str], ...]]:
    """Attributes that the code of a class reads, and (globals, name) of the settings among its globals.

    Nothing of PyTorch's classes and of this package's: what changes their results is compared elsewhere.
    """
    names: set[str] = set()
    shared: dict[tuple[int, str], tuple[dict[str, Any], str]] = {}
    pending = [value for c in cls.__mro__ if not _known(c) for name, value in vars(c).items() if name not in _NOT_CALLED]
    seen: set[int] = set()
    while pending:
        function = pending.pop()
        function = getattr(function, "fget", None) or getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType) or id(function) in seen:
            continue
        seen.add(id(function))
        names |= set(_reads(function.__code__, "attribute"))
        for name in _reads(function.__code__, "global"):
            value = function.__globals__.get(name, _ABSENT)
            if isinstance(value, types.FunctionType) and not _is_known(value.__module__):
                pending.append(value)
            elif type(value) in _PLAIN or isinstance(value, (dict, list, types.SimpleNamespace)):
                shared[id(function.__globals__), name] = function.__globals__, name
    forward = getattr(getattr(cls, "forward", None), "__code__", None)
    if forward is not None:  # what it writes itself is no setting: counters, the last shape
        names -= set(_reads(forward, "written"))
    methods = {name for name in names if callable(getattr(cls, name, None))}
    return tuple(sorted(names - methods - _PYTORCHS)), tuple(shared.values())


def _reads(code: types.CodeType, what: str) -> Iterator[str]:
    """The names that the code and its inner functions read as attributes, by `getattr` too, or as globals."""
    for step in dis.get_instructions(code):
        if isinstance(step.argval, types.CodeType):
            yield from _reads(step.argval, what)
        elif what == "global" and step.opname == "LOAD_GLOBAL":
            yield step.argval
        elif what == "written" and step.opname == "STORE_ATTR":
            yield step.argval
        elif what == "attribute" and (step.opname in ("LOAD_ATTR", "LOAD_METHOD") or step.opname == "LOAD_CONST"):
            if isinstance(step.argval, str) and step.argval.isidentifier():
                yield step.argval


def _known(cls: type) -> bool:
    return cls is object or "_res2net_fused_forward" in vars(cls) or FUSED in vars(cls) or _is_known(cls.__module__)


def _is_known(module: str | None) -> bool:
    return (module or "").partition(".")[0] in ("torch", "res2net_fused")
