"""What a fused block knows about itself, and when it forgets it."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from types import FunctionType
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from torch import Tensor, nn
from torch.compiler import is_compiling

from ..chain.config import ChainConfig
from .block_parts import PUBLISHED, BlockPaths
from .switches import constant_in_a_trace, settled
from .weight_cache import CacheKey, Frozen, KeepsWeights

if TYPE_CHECKING:
    from typing_extensions import Self

_LONGEST_PAUSE = 63  # in calls
STATE = "_res2net_fused"  # the attribute that holds a block's FusedState


@dataclass
class FusedState(KeepsWeights):
    """What a fused block, 2-D or 1-D, knows about itself; of this only what its constructor takes is copied and pickled."""

    config: Any
    backend: str
    geometry: Any  # of its modules when they were recognised: what changes the result beyond their tensors
    # One tuple, read and written at once: DataParallel's replicas share it among threads.
    kept: tuple[CacheKey, Any] | None = field(default=None, init=False, repr=False)
    frozen: Frozen[Any] | None = field(default=None, init=False, repr=False)
    last_problem: Any = field(default=None, init=False)  # of the last fused call
    last_trained: bool = field(default=False, init=False)  # whether that call had batch statistics
    last_refusal: str | None = field(default=None, init=False)  # why the last call ran the class's own forward
    known: Any = field(default=None, init=False, repr=False)  # what was found at the last call, and a snapshot to go with it
    pause: int = field(default=1, init=False)  # so many calls that could be known go by before a snapshot is taken
    paused: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.geometry = settled(self.geometry)[0]  # of settings that are lists, copies

    def is_due(self) -> bool:
        """Whether a call that asks for everything should take a snapshot: not where those before were of no use."""
        return self.known is None and self.paused >= self.pause

    def asked(self, usable: bool) -> bool:
        """Notes whether what such a call has found out is of use to later ones, and returns it."""
        self.paused = self.paused + 1 if usable else 0
        self.pause = self.pause if usable else max(self.pause, 1)
        return usable

    def forget(self, was_used: bool) -> None:
        """Drops what is known, since the block has changed; where that happens at every call, snapshots become rare."""
        self.known, self.paused = None, 0
        self.pause = 0 if was_used else min(2 * self.pause + 1, _LONGEST_PAUSE)

    def drop(self, frozen: bool = True) -> None:
        super().drop(frozen)
        self.known = None

    def __getstate__(self) -> dict[str, object]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.init}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class Geometry:
    """A block's geometry; blocks of one have one of these, which a compiled graph knows by its name."""

    def __init__(self, value: object) -> None:
        self.value, self.name = value, f"geometry {next(_numbers)}"


_numbers = itertools.count()
_geometries: WeakValueDictionary[str, Geometry] = WeakValueDictionary()


def _shared(value: object) -> Geometry:
    found = next((known for known in list(_geometries.values()) if known.value == value), None) or Geometry(value)
    return _geometries.setdefault(found.name, found)


@constant_in_a_trace
def geometry_named(name: str) -> object:
    """The value of a block's `shared` geometry of that name, which a graph guards in place of some fifty values."""
    return _geometries[name].value


@dataclass
class BlockState(FusedState):
    """What a fused 2-D block knows about itself."""

    config: ChainConfig
    recompute: bool = False  # in training: whether backward convolves again rather than keep the convolutions' outputs
    shortcut: str | None = None  # forward's second parameter, if what is given for it is known to be added in x's place
    layout: BlockPaths = PUBLISHED  # where the block keeps its parts
    frozen_norms: Any = field(default=None, init=False, repr=False)  # their classes when the block was frozen
    surroundings: Any = None  # what its own code reads besides the parts, when it was recognised
    hands_on: bool = False  # whether fused calls give channels-last whatever they are given, as with weights in that format
    shared: Any = field(default=None, init=False, repr=False)  # the geometry again, with a name

    def __post_init__(self) -> None:
        super().__post_init__()
        self.shared = _shared(self.geometry)


def _drop(module: nn.Module, frozen: bool = True) -> None:
    state = module.__dict__.get(STATE)
    if state is not None:
        state.drop(frozen)


def forward_like(fused: Any, own: Any) -> Any:
    """`fused` with the signature, source and globals of `own`: what torch.jit.script compiles and FX makes its inputs of."""
    try:
        first = list(inspect.signature(own).parameters.values())[1]
        x_name = first.name if first.kind is first.POSITIONAL_OR_KEYWORD else None
    except (IndexError, TypeError, ValueError):  # not to be read
        x_name = None

    def forward(self, *args, **kwargs):
        if args:
            return fused(self, *args, **kwargs)
        if x_name not in kwargs:
            return own(self, **kwargs)  # which says what is missing
        return fused(self, kwargs.pop(x_name), **kwargs)

    if isinstance(own, FunctionType):
        forward = FunctionType(forward.__code__, own.__globals__, closure=forward.__closure__)
    return functools.update_wrapper(forward, own)


# The mixins come before a class of modules; by themselves they are none.
if TYPE_CHECKING:
    _Mixin = nn.Module
else:
    _Mixin = object


class FusedCall(_Mixin):
    """Mixin of all modules that are taken over, with a FusedState that drops what it keeps where their tensors change."""

    def _res2net_fused_forward(self, state: Any, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        """Return the output, or the reason, a str, why the class's own forward has to run."""
        raise NotImplementedError

    def forward(self, x: Tensor, /, *args: object, **kwargs: object) -> Any:
        state: FusedState | None = self.__dict__.get(STATE)
        if state is None:  # of a class derived from a fused one, or given back meanwhile
            return super().forward(x, *args, **kwargs)
        notes = not is_compiling()
        if notes:
            state.last_refusal = None
        out = self._res2net_fused_forward(state, x, args, kwargs)
        if not isinstance(out, str):
            return out
        if notes:
            state.last_refusal = out
        return super().forward(x, *args, **kwargs)

    def train(self, mode: bool = True) -> Self:
        _drop(self, mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        _drop(self)
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        _drop(self)
        return super()._load_from_state_dict(*args, **kwargs)


class FusedModule(FusedCall):
    """Mixin of all blocks that run fused."""
