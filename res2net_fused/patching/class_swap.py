"""Generated subclasses that run fused: made, pickled and taken back."""

from __future__ import annotations

import abc
import functools
import inspect
import threading
import types
from typing import Any, cast

from torch import nn

from ..modules.block_state import forward_like
from ..modules.switches import FUSED

# Generated classes ----------------------------------------------------------------------------------------------------

originals: dict[type, type] = {}  # generated class -> the class it stands in front of

_generating = threading.Lock()  # functools.cache alone would let two threads generate a class each


def fused_class(original: type, mixin: type) -> type:
    """The subclass of `original` whose forward runs fused; the same one for every call, in any thread."""
    with _generating:
        return _generate(original, mixin)


@functools.cache
def _generate(original: Any, mixin: Any) -> Any:
    body = {
        "__module__": original.__module__, "__doc__": original.__doc__, "__reduce_ex__": _reduce, FUSED: original,
        "forward": forward_like(mixin.forward, original.forward),
    }  # fmt: skip
    generated = _derive(_metaclass(cast(Any, type(original))), f"Fused{original.__name__}", (mixin, original), body)
    originals[generated] = original
    return generated


def own_class(module: nn.Module) -> Any:
    """The module's class without the generated one."""
    return originals.get(type(module), type(module))


class _Unregistered:
    """The first base of a class while it is made: hides what others run for each new subclass."""

    def __init_subclass__(cls) -> None:
        pass


def _derive(metaclass: Any, name: str, bases: tuple[type, ...], body: dict[str, Any]) -> Any:
    """A class made without the code that users run for new subclasses, which has seen the class that stands behind it."""
    new = abc.ABCMeta.__new__ if issubclass(metaclass, abc.ABCMeta) else type.__new__
    made: Any = new(metaclass, name, (_Unregistered, *bases), body)
    made.__bases__ = bases
    return made


@functools.cache
def _metaclass(users: Any) -> Any:
    """The metaclass of generated classes: calling one makes a plain block, which nobody has recognised yet."""

    def call(cls: Any, *args: Any, **kwargs: Any) -> Any:
        original = originals.get(cls)
        return users.__call__(cls, *args, **kwargs) if original is None else original(*args, **kwargs)

    def signature(cls: Any) -> inspect.Signature:
        if cls not in originals:
            raise AttributeError("__signature__")
        return inspect.signature(originals[cls])

    return type.__new__(type, f"Fused{users.__name__}", (users,), {"__call__": call, "__signature__": property(signature)})


def _reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
    """Reduces as the original class would, but with a constructor that generates the class again."""
    generated: Any = next(c for c in type(self).__mro__ if c in originals)
    if type(self) is not generated:
        return super(generated, self).__reduce_ex__(protocol)  # a class that others put on top is theirs to rebuild
    reduced: Any = super(generated, self).__reduce_ex__(protocol)
    _, (_, *arguments), *state = reduced
    return _rebuild, (originals[generated], generated.__bases__[0], *arguments), *state


def _rebuild(original: type, mixin: type, *arguments: object) -> nn.Module:
    generated: Any = fused_class(original, mixin)
    return generated.__new__(generated, *arguments)


@functools.cache
def without(cls: Any, generated: Any) -> Any:
    """The class without the generated one: the original, or what others derived, derived anew from the original."""
    if cls is generated:
        return originals[generated]
    bases = tuple(without(base, generated) if issubclass(base, generated) else base for base in cls.__bases__)
    cell = types.CellType()  # what zero-argument super() reads in the methods
    body = {k: _with_class_cell(v, cell) for k, v in vars(cls).items() if k not in ("__dict__", "__weakref__")}
    metaclass = type(originals[generated]) if type(cls) is type(generated) else type(cls)
    cell.cell_contents = derived = _derive(metaclass, cls.__name__, bases, body)
    return derived


def _with_class_cell(value: object, cell: types.CellType) -> object:
    """A method whose `super()` starts from the class in `cell`; everything else as it is."""
    if not isinstance(value, types.FunctionType) or "__class__" not in value.__code__.co_freevars:
        return value
    names = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
    closure = tuple(cell if name == "__class__" else old for name, old in names)
    method = types.FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, closure)
    method.__kwdefaults__ = value.__kwdefaults__
    return functools.update_wrapper(method, value)
