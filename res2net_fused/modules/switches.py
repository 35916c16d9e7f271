"""What the code of a class reads besides modules and tensors: flags and settings with which its result may change.

A class with a forward of its own is tried once; that holds for the settings that it had then, so they are read at every call.
"""

from __future__ import annotations

import contextvars
import dis
import functools
import itertools
import sys
import threading
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

_PLAIN = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})
_ABSENT = "<absent>"  # picklable, as all that `switches` returns
_UNWATCHED = "<not watched by a compiled graph>"  # equal to no setting: the block then runs its own forward
_ENTRIES = ("forward", "__call__", "__getattr__", "_conv_forward", "_check_input_dim")  # what a call of a module begins with
FUSED = "_res2net_fused_class"  # in the body of a generated class: the class that it stands in front of
MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))  # what every module has
_STATISTICS = frozenset({"running_mean", "running_var", "num_batches_tracked"})  # that a norm writes in training
_DEPTH = 3  # of objects in objects, such as a configuration in sections
_FEW = 64  # items of a container that is compared at every call
_OURS = frozenset({"torch", "res2net_fused"})
# Of packages whose code has no settings of a model; their caches would look like some.
_LIBRARIES = _OURS | {"torchvision", "numpy"} | sys.stdlib_module_names
_HOLDERS = frozenset({"builtins", "types", "argparse", "collections", "enum"})  # standard, with values of their users

Shared = tuple[tuple[Any, str], ...]  # (namespace or cell, name) of settings outside of instances
Names = tuple[str, ...]


def constant_in_a_trace(function: Any) -> Any:
    """What `torch.compiler.assume_constant_result` does, without importing the compiler, which takes seconds."""
    function._dynamo_marked_constant = True
    return function


def switches(module: nn.Module) -> tuple[object, ...]:
    """The present settings that the module's class reads: of the module, its class and outside; () for PyTorch's own."""
    cls: Any = type(module)
    compiling = is_compiling()
    names, methods, shared = _constants_of(cls) if compiling else _read_by(cls)[:3]
    if names is None:
        return ()
    own = module.__dict__
    replaced = [name for name in methods if name in own]
    standing = stand_in(module) if "forward" in own else None
    if standing is not None:
        replaced.append(standing)
    parts = own["_modules"]  # looked at by themselves; on the class they would be searched for in vain
    values: list[Any] = [
        own[name] if name in own else _ABSENT if name in parts else _of_class(module, cls, name) for name in names
    ]
    if compiling:
        plain = [value if type(value) in _PLAIN else _in_a_trace(value) for value in values]
        return (*plain, _UNWATCHED) if shared else (*plain, _code_in_a_trace(cls), *replaced)
    values += [_read(*place) for place in shared]
    return *[value if type(value) in _PLAIN else _described(value) for value in values], _code(cls, methods), *replaced


def stand_in(module: nn.Module) -> str | None:
    """The name of a method of the module's own class that is put in its forward's place, as YOLO's `fuse` does; else None.

    None too of one that reads what forward does not: changes of that would go unnoticed.
    """
    forward = module.__dict__.get("forward")
    if not isinstance(forward, types.MethodType) or forward.__self__ is not module:
        return None
    name = forward.__func__.__name__
    return name if getattr(type(module), name, None) is forward.__func__ and _reads_no_more(type(module), name) else None


@constant_in_a_trace
def _reads_no_more(cls: Any, name: str) -> bool:
    code, own = (getattr(getattr(cls, method, None), "__code__", None) for method in (name, "forward"))
    if _read_by(cls)[0] is None or code is None or own is None:
        return False
    if code.co_freevars or any(isinstance(constant, types.CodeType) for constant in code.co_consts):
        return False
    return set(code.co_names) <= set(own.co_names)


def _of_class(module: nn.Module, cls: Any, name: str) -> object:
    value = getattr(cls, name, _ABSENT)
    return getattr(module, name, _ABSENT) if type(value) is types.MemberDescriptorType else value  # of __slots__


def named_switches(module: nn.Module) -> dict[str, object]:
    """The same by name, for messages."""
    cls: Any = type(module)
    names, _, shared, _ = _read_by(cls)
    return dict(zip((*(names or ()), *(name for _, name in shared), "forward"), switches(module), strict=False))


def may_read(cls: Any, name: str) -> bool:
    """Whether the code of a class reads an attribute of that name."""
    names, methods, *_ = _read_by(cls)
    return names is None or name in names or name in methods


def _read(place: Any, name: str) -> object:
    if isinstance(place, type):
        return getattr(place, name, _ABSENT)
    if not isinstance(place, types.CellType):
        return place.get(name, _ABSENT)
    try:
        return place.cell_contents
    except ValueError:  # empty
        return _ABSENT


def _code(cls: Any, methods: Names) -> str:
    """What tells the forward of a class, and the methods that it calls, from others that are put in their places."""
    own = getattr(cls, FUSED, cls)
    codes = [getattr(getattr(own, name, None), "__code__", None) for name in ("forward", *methods)]
    return " ".join([_names_in(code) for code in codes if code is not None])


@functools.cache
def _names_in(code: types.CodeType) -> str:
    return " ".join((code.co_name, *code.co_names))


def _described(value: Any, depth: int = _DEPTH) -> object:
    """The plain values inside a container or an object, else a name: comparable and picklable."""
    kind = type(value).__qualname__
    if isinstance(value, Tensor):
        flag = value.numel() == 1 and value.device.type == "cpu" and not value.is_floating_point()
        return (kind, value.item()) if flag else kind
    if isinstance(value, type):
        inside: Iterable[tuple[object, object]] = [(k, v) for k, v in vars(value).items() if type(v) in _PLAIN]
    elif isinstance(value, dict):
        inside = list(value.items())
    elif isinstance(value, (list, tuple)):
        inside = enumerate(value)
    elif isinstance(value, (nn.Module, types.ModuleType)) or callable(value):
        return getattr(value, "__qualname__", kind)
    elif hasattr(value, "__dict__"):
        inside = list(vars(value).items())
    else:
        text = repr(value)  # of numbers, sets
        return kind if " at 0x" in text else (kind, text)
    deeper = depth > 0
    return kind, *((str(k), v if type(v) in _PLAIN else _described(v, depth - 1) if deeper else "") for k, v in inside)


def _in_a_trace(value: object) -> object:
    """What `_described` gives, for what cannot change in place; a graph does not watch the rest."""
    if isinstance(value, (nn.Module, Tensor)) or callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return _UNWATCHED


@constant_in_a_trace
def _constants_of(cls: Any) -> tuple[Names | None, Names, bool]:
    """The names that a class reads, which a trace guards as it reads them; whether there are settings that it cannot guard."""
    names, methods, shared, _ = _read_by(cls)
    return names, methods, bool(shared)


@constant_in_a_trace
def _code_in_a_trace(cls: Any) -> object:
    return _code(cls, _read_by(cls)[1])


@functools.cache
def unforeseeable(cls: Any) -> str | None:
    """What the own code of a class does that no setting tells: state that its calls change, and what lies outside of it."""
    for function in _read_by(cls)[3]:
        written = set(_reads(function.__code__, "written")) - _STATISTICS
        if written:
            return f"writes {min(written)} at each call"
        attributes = set(_reads(function.__code__, "attribute"))
        if attributes & {"environ", "getenv"}:
            return "reads the environment"
        for place, name in _outside(function, attributes):
            if isinstance(_read(place, name), (contextvars.ContextVar, threading.local)):
                return f"reads {name}, which each thread has for itself"
    return None


@functools.cache
def _read_by(cls: Any) -> tuple[Names | None, Names, Shared, tuple[types.FunctionType, ...]]:
    """Attributes that a call of a class reads, its methods, and settings among globals, closures and modules; None if known.

    Last its functions. Nothing of PyTorch's classes and of this package's: what changes their results is compared elsewhere.
    """
    if all(map(_known, cls.__mro__)):
        return None, (), (), ()
    names: set[str] = set()
    functions: list[types.FunctionType] = []
    shared: dict[tuple[int, str], tuple[Any, str]] = {}
    bodies = [vars(c) for c in cls.__mro__ if not _known(c)]
    pending = [body[name] for body in bodies for name in _ENTRIES if name in body]
    seen: set[int] = set()
    while pending:
        function = pending.pop()
        function = getattr(function, "fget", None) or getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType) or id(function) in seen or _of_library(function.__module__):
            continue
        seen.add(id(function))
        functions.append(function)
        attributes = set(_reads(function.__code__, "attribute"))
        names |= attributes
        pending += [body[name] for body in bodies for name in attributes & body.keys()]
        for place, name in _outside(function, attributes):
            value = _read(place, name)
            if isinstance(value, types.FunctionType):
                pending.append(value)
            elif _may_hold_settings(value):
                shared[id(place), name] = place, name
    called = {name for name in names if callable(getattr(cls, name, None))}
    methods = sorted(name for name in called if any(name in body for body in bodies))
    return tuple(sorted(names - called - MODULE_ATTRIBUTES)), tuple(methods), tuple(shared.values()), tuple(functions)


def _outside(function: types.FunctionType, attributes: set[str]) -> Iterator[tuple[Any, str]]:
    """Places outside of instances that a function reads: its globals, its closure, and what it reads of modules."""
    cells = zip(function.__closure__ or (), function.__code__.co_freevars, strict=True)
    read = [(function.__globals__, name) for name in _reads(function.__code__, "global") if name in function.__globals__]
    for place, name in itertools.chain(cells, read):
        value = _read(place, name)
        if not isinstance(value, types.ModuleType):
            yield place, name
        elif not _of_library(value.__name__):
            yield from ((vars(value), attribute) for attribute in attributes & vars(value).keys())


def _may_hold_settings(value: object) -> bool:
    if type(value) in _PLAIN or isinstance(value, Tensor):
        return True
    is_class = isinstance(value, type)
    holder: Any = value if is_class else type(value)
    if issubclass(holder, nn.Module) or (callable(value) and not is_class):
        return False
    return holder.__module__ in _HOLDERS - ({"builtins"} if is_class else set()) or not _of_library(holder.__module__)


def _reads(code: types.CodeType, what: str) -> Iterator[str]:
    """The names that the code and its inner functions read as attributes, by `getattr` too, or as globals."""
    for step in dis.get_instructions(code):
        if isinstance(step.argval, types.CodeType):
            yield from _reads(step.argval, what)
        elif what == "global" and step.opname == "LOAD_GLOBAL":
            yield step.argval
        elif what == "written" and step.opname in ("STORE_ATTR", "STORE_GLOBAL"):
            yield step.argval
        elif what == "attribute" and (step.opname in ("LOAD_ATTR", "LOAD_METHOD") or step.opname == "LOAD_CONST"):
            if isinstance(step.argval, str) and step.argval.isidentifier():
                yield step.argval


# Compared rather than read anew ------------------------------------------------------------------------------------------


def has_code(module: nn.Module) -> bool:
    """Whether the module's class has code that is neither PyTorch's nor this package's."""
    cls: Any = type(module)
    return _read_by(cls)[0] is not None


def settled(value: Any, depth: int = _DEPTH) -> tuple[object, bool]:
    """What equals `value` as long as nothing in it changes, and whether that is so; of objects, `_described` has to tell."""
    kind = type(value)
    if kind in _PLAIN or kind is torch.Size:
        return value, True
    if kind in (list, tuple, set, frozenset, dict) and depth > 0 and len(value) <= _FEW:
        found = [settled(item, depth - 1) for item in (value.values() if kind is dict else value)]
        items = [item for item, _ in found]
        return kind(zip(value, items, strict=True) if kind is dict else items), all(sure for _, sure in found)
    return value, isinstance(value, (nn.Module, types.ModuleType)) or (callable(value) and not isinstance(value, type))


def is_fixed(value: object) -> bool:
    """Whether nothing in the value can change, so that it is what it was if it is the same object."""
    return type(value) in _PLAIN or (isinstance(value, tuple) and all(map(is_fixed, value)))


class Elsewhere:
    """What modules' classes read besides the modules' dictionaries, as it is now: `alike` tells whether it still is.

    That is the bodies of classes, whatever `switches` reads outside of them, and what lies in objects. Of PyTorch's own classes
    it is their `forward`.
    """

    def __init__(self, block: nn.Module, modules: Iterable[nn.Module]) -> None:
        self.kinds = list({type(module): None for module in modules})
        self.forwards = [kind.forward for kind in self.kinds]
        bodies: dict[type, Names] = {}
        absent: dict[type, set[str]] = {}
        codes: dict[Any, None] = {}
        self.places: list[tuple[Any, str]] = []
        for module in (block, *modules):
            cls: Any = type(module)
            names, methods, shared, _ = _read_by(cls)
            if names is None:
                continue
            own = getattr(cls, FUSED, cls)
            called = [getattr(own, name, None) for name in ("forward", *methods)]
            codes.update((function, None) for function in called if hasattr(function, "__code__"))
            for c in cls.__mro__:
                if not _known(c) or not vars(c).keys().isdisjoint(names):
                    bodies[c] = names
                elif c is not object:
                    absent.setdefault(c, set()).update(names)
            for name in names:
                inside = name in module.__dict__
                if not settled(module.__dict__[name] if inside else getattr(cls, name, None))[1]:
                    self.places.append((None if module is block else module.__dict__, name) if inside else (cls, name))
            self.places += shared
        self.bodies = [vars(c) for c in bodies]
        self.copies = [{k: settled(v)[0] if k in names else v for k, v in vars(c).items()} for c, names in bodies.items()]
        self.absent = [(vars(c).keys(), names) for c, names in absent.items()]
        self.functions = list(codes)
        self.codes = [function.__code__ for function in codes]
        self.values = self._values(block)

    def _values(self, block: nn.Module) -> list[object]:
        found = [_read(block.__dict__ if place is None else place, name) for place, name in self.places]
        return [value if type(value) in _PLAIN else _described(value) for value in found]

    def alike(self, block: nn.Module) -> bool:
        """Whether all is as it was."""
        return (
            [kind.forward for kind in self.kinds] == self.forwards
            and self.bodies == self.copies
            and all([keys.isdisjoint(names) for keys, names in self.absent])
            and [function.__code__ for function in self.functions] == self.codes
            and (not self.places or self._values(block) == self.values)
        )


def _known(cls: type) -> bool:
    return cls is object or "_res2net_fused_forward" in vars(cls) or FUSED in vars(cls) or _top(cls.__module__) in _OURS


def _of_library(module: str | None) -> bool:
    return _top(module) in _LIBRARIES


def _top(module: str | None) -> str:
    return (module or "").partition(".")[0]
