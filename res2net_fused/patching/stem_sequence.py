"""Which modules a network's forward calls first, each with nothing but the one's output before it: its stem.

The forward is run without images, on a stand-in of the network: same class, same settings, but recorders in the modules' places
and nothing that it could write into. A recorder of the stem returns a tensor that refuses every question, so that whatever
looks at what lies between two of its modules, hands it on or keeps it is found. No hook and no module runs; nothing is patched,
so other threads may call the network meanwhile.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, Proxy
from torch.fx.proxy import GraphAppendingTracer
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from ..modules.eligibility import fused_activation
from ..modules.switches import unforeseeable
from .class_swap import own_class

_NORMS = (nn.modules.batchnorm._NormBase,)
_CONTENTS = ("_modules", "_parameters", "_buffers")
_PLAIN = (bool, int, float, str, type(None), tuple, torch.dtype, torch.device)


class _Unforeseen(Exception):
    """Something in a network's forward that the stem must not be taken over beside; the message is for `explain`."""


def kinds_of(module: nn.Module) -> list[str]:
    """What a module computes of a stem, in order: "conv", "norm", "act", "pool"; [] for anything else."""
    if type(module) is nn.Sequential:
        kinds = [kinds_of(child) for child in module]
        return [kind for inner in kinds for kind in inner] if all(kinds) else []
    if isinstance(module, nn.Conv2d):
        return ["conv"]
    if isinstance(module, _NORMS) or {"running_mean", "running_var"} <= module._buffers.keys():
        return ["norm"]
    if isinstance(module, nn.MaxPool2d):
        return ["pool"]
    return ["act"] if fused_activation(module) == "relu" else []


def _begins(kinds: list[str]) -> bool:
    """Whether a stem may begin so: convolutions, each with its norm and ReLU, and then a pooling."""
    *units, last = kinds
    return all(kind == ("conv", "norm", "act")[i % 3] for i, kind in enumerate(units)) and (
        last == ("conv", "norm", "act")[len(units) % 3] or (last == "pool" and len(units) % 3 == 0 and bool(units))
    )


def _is_whole(kinds: list[str]) -> bool:
    return bool(kinds) and kinds[-1] in ("act", "pool")


def stem_sequence(network: nn.Module) -> tuple[tuple[str, ...], str]:
    """The names of a network's children that are its stem, in order, and ""; or () and why it is left alone."""
    cls = own_class(network)
    doubt = unforeseeable(cls)
    if doubt is not None:
        return (), f"the network's own code {doubt}"
    other = next((name for name, value in vars(network).items() if callable(value) and hasattr(cls, name)), None)
    if other is not None:
        return (), f"its {other} was replaced"  # by what may be bound to the network itself
    try:
        with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
            names = _first_called(network, cls)
            _Run(network, names).call(cls)
    except _Unforeseen as unforeseen:
        return (), str(unforeseen)
    except Exception as error:  # the network's own code may fail in any way where it meets no images
        return (), f"its forward could not be followed: {type(error).__name__}: {error!s:.200}"
    return names, ""


def _first_called(network: nn.Module, cls: Any) -> tuple[str, ...]:
    run = _Run(network, ())
    run.call(cls)
    names: list[str] = []
    kinds: list[str] = []
    before: Any = None
    for path, args, kwargs, out in run.calls:
        more = kinds_of(network._modules[path]) if path in network._modules else []  # type: ignore[arg-type]
        follows = before is None or (len(args) == 1 and args[0] is before and not kwargs)
        if not more or not follows or not all(_begins(kinds + more[: i + 1]) for i in range(len(more))):
            break
        names.append(path)
        kinds += more
        before = out
    if _is_whole(kinds):
        return tuple(names)
    called = ", ".join(path for path, *_ in run.calls[: len(names) + 1]) or "none"
    raise _Unforeseen(f"what it calls first ({called}) is not a row of convolutions with BatchNorm and ReLU, called in turn")


class _Run:
    """One call of a network's own forward with recorders for its children. names: of the stem, as far as it is known."""

    def __init__(self, network: nn.Module, names: tuple[str, ...]) -> None:
        self.network, self.names = network, names
        self.graph = Graph()
        self.tracer = GraphAppendingTracer(self.graph)
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any], Any]] = []
        self.done = 0  # modules of the stem that have been called
        self.between: Any = None  # what the last of them returned, for the next one alone
        self.alive: list[weakref.ref[Any]] = []

    def call(self, cls: Any) -> None:
        """Raise _Unforeseen if somebody else than the stem's next module gets what one returned."""
        stand_in = stand_in_of(self.network, {name: _Recorder(self, child, name) for name, child in _children(self.network)})
        state = stand_in.__dict__
        for name, value in list(state.items()):
            if isinstance(value, Tensor):
                state[name] = self.value()
            elif isinstance(value, (list, dict, set)) and name != "_modules":
                state[name] = copy.copy(value)
        for kind in _CONTENTS[1:]:
            state[kind] = {name: None if tensor is None else self.value() for name, tensor in state[kind].items()}
        state["training"] = False
        before = [dict(held) for held in (state, *(state[kind] for kind in _CONTENTS))]
        result = cls.forward(stand_in, self.value())
        for held, then in zip((state, *(state[kind] for kind in _CONTENTS)), before, strict=True):
            written = [name for name in held.keys() | then.keys() if held.get(name, held) is not then.get(name, then)]
            if written:
                raise _Unforeseen(f"its forward writes {min(written)}, which would be lost")
        if self.done != len(self.names):
            raise _Unforeseen(f"its forward does not always call {self.names[self.done]}")
        if any(reference() is not None for reference in self.alive):
            raise _Unforeseen(f"its forward keeps or returns what lies between {', '.join(self.names)}")
        del result  # which may have been what holds it

    def value(self) -> Proxy:
        """Some tensor that nothing is known of."""
        return Proxy(self.graph.create_node("placeholder", "value"), self.tracer)

    def called(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if path in self.names:
            return self._stem(path, args, kwargs)
        if any(isinstance(leaf, _Between) for leaf in tree_leaves((args, kwargs))):
            raise _Unforeseen(f"{path} reads what lies between {', '.join(self.names)}")
        out = self.value()
        self.calls.append((path, args, kwargs, out))
        return out

    def _stem(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        before, self.between = self.between, None
        in_turn = self.done < len(self.names) and path == self.names[self.done] and len(args) == 1 and not kwargs
        if not in_turn or (self.done > 0 and args[0] is not before):
            raise _Unforeseen(f"its forward does not call {', '.join(self.names)} in turn, once each")
        self.done += 1
        if self.done == len(self.names):
            return self.value()
        self.between = torch.empty(0).as_subclass(_Between)
        self.alive.append(weakref.ref(self.between))
        return self.between


class _Between(Tensor):
    """A tensor between two modules of a stem, at which nobody else may look."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise _Unforeseen(f"its forward looks at what lies between the stem's modules ({getattr(func, '__name__', func)})")


class _Recorder:
    """A module of the network, of which the call is noted and nothing is run."""

    def __init__(self, run: _Run, module: nn.Module, path: str) -> None:
        vars(self).update(_run=run, _module=module, _path=path)

    __class__ = property(lambda self: type(vars(self)["_module"]))  # for isinstance

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._run.called(self._path, args, kwargs)

    def _child(self, name: str, value: Any) -> Any:
        return _Recorder(self._run, value, f"{self._path}.{name}") if isinstance(value, nn.Module) else value

    def __getattr__(self, name: str) -> Any:
        run, module, path = vars(self)["_run"], vars(self)["_module"], vars(self)["_path"]
        value = getattr(module, name)
        if path in run.names or not isinstance(value, (*_PLAIN, nn.Module, Tensor)):
            raise _Unforeseen(f"its forward reads {name} of {path}")
        return run.value() if isinstance(value, Tensor) else self._child(name, value)

    def __len__(self) -> int:
        return len(self._module)

    def __iter__(self) -> Iterator[Any]:
        return iter([self._child(str(i), child) for i, child in enumerate(self._module)])

    def __getitem__(self, key: Any) -> Any:
        return self._child(str(key), self._module[key])


def _children(network: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(name, child) for name, child in network._modules.items() if child is not None]


def stand_in_of(network: nn.Module, modules: dict[str, Any]) -> Any:
    """An object of the network's class with all that the network has, but others in the places of some modules."""
    cls: Any = type(network)
    stand_in = object.__new__(cls)
    stand_in.__dict__.update(network.__dict__)
    stand_in.__dict__["_modules"] = {**network._modules, **modules}
    return stand_in
