"""Folded weights that are kept from call to call: when they still hold, and who may read them.

`CacheKey` and `KeepsWeights` say when they hold, `Frozen` keeps them until told otherwise, and `made_on.py` lends weights that
one CUDA stream made to calls on others: PyTorch orders nothing between streams. Whoever calls a block on a second stream has
ordered it behind the writes to the block's parameters, but knows nothing of the kernels that fold and pack them, nor of the
moment at which the result is freed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from operator import attrgetter, is_
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .made_on import MadeOn, tensors_of
from .watched_weights import Member, Watched, watch
from .weight_samples import WeightSamples, sample


class Made(Protocol):
    """A dataclass of tensors, lists of them and more."""

    made: MadeOn | None


Kept = TypeVar("Kept", bound=Made)


def mark_made(value: Kept, device: torch.device) -> Kept:
    """Notes on `value` the CUDA stream that is making its tensors, so that other streams can wait for them. Returns `value`."""
    if device.type == "cuda":
        value.made = MadeOn(value, device)
    return value


def lend_to_current_stream(value: Kept) -> Kept:
    """Makes `value` safe to read on the current stream. Returns `value`."""
    if value.made is not None and not is_compiling():
        value.made.lend()
    return value


_PLAIN_TYPES = (torch.Tensor, nn.Parameter, nn.Buffer)

# Another object after every optimizer step: fused optimizers write parameters without bumping `_version`. No counter, which
# steps in several threads could set back to a number that kept weights still have.
_epoch = object()


def _advance_epoch(*_: object) -> None:
    global _epoch
    _epoch = object()


@functools.cache
def _watch_optimizers() -> None:
    """Install the hook with the first weights that are kept: importing the package changes nothing in the process."""
    register_optimizer_step_post_hook(_advance_epoch)


def cacheable(tensors: Iterable[Tensor]) -> bool:
    """Whether folded tensors may outlive this call: not while something traces, captures or wraps tensors."""
    if is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if capturing():
        return False
    return all(type(tensor) in _PLAIN_TYPES and not tensor.is_inference() for tensor in tensors)


def capturing() -> bool:
    """Whether a CUDA graph is being captured: it holds the launches, and what they read has to outlive it."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class CacheKey:
    """Tells whether a block's tensors are the ones that were folded, unchanged as far as PyTorch or samples can tell."""

    def __init__(self, tensors: list[Tensor], settings: tuple[object, ...]) -> None:
        _watch_optimizers()
        self.settings = settings
        self.epoch = _epoch
        self.tensors = list(tensors)  # no weak references: torch.utils.swap_tensors refuses tensors that have any
        self.fingerprints = _fingerprints(tensors)
        self.samples: WeightSamples | None = sample(tensors)
        self.watched: Watched | None = watch(tensors)

    def matches(self, tensors: list[Tensor], settings: tuple[object, ...]) -> bool:
        if self.epoch is not _epoch or self.settings != settings or len(tensors) != len(self.tensors):
            return False
        if not all(map(is_, tensors, self.tensors)):
            return False
        return _fingerprints(tensors) == self.fingerprints and (self.samples is None or not self.samples.differ(tensors))


_version_of, _dtype_of, _device_of = attrgetter("_version"), attrgetter("dtype"), attrgetter("device")


def _fingerprints(tensors: list[Tensor]) -> list[object]:
    """All addresses, all versions, and so on: whatever is asked of many tensors is asked without a loop in Python."""
    return [*map(Tensor.data_ptr, tensors), *map(_version_of, tensors), *map(_dtype_of, tensors), *map(_device_of, tensors)]


class KeepsWeights:
    """Base of a block's state: what is kept from call to call, and when that is dropped.

    Any number of threads may call the block while others drop or freeze what is kept. The fields are each read and written at
    once, and `generation`, another object after every drop, tells weights that were read before it from later ones.
    """

    kept: tuple[CacheKey, Any] | None
    frozen: Frozen[Any] | None
    generation: object = None
    member: Member | None = None  # where there are GPUs

    def drop(self, frozen: bool = True) -> None:
        if not is_compiling():  # which would guard on it
            self.generation = object()  # first: what is being made now must not be kept
            if self.member is not None:
                self.member.watched = None
        self.kept = None
        if frozen:
            self.frozen = None

    def keep(self, tensors: list[Tensor], settings: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """What is kept if nothing changed, else what `make` returns, which is kept from now on."""
        settings = (self.generation, *settings)
        kept = self.kept
        fresh = kept is None or not kept[0].matches(tensors, settings) or self._changed(kept[0].watched)
        if kept is None or fresh:
            key = CacheKey(tensors, settings)  # before the work: a write meanwhile must show as a mismatch
            self.kept = kept = key, mark_made(make(), tensors[0].device)
        watched = kept[0].watched
        if watched is not None:
            if self.member is None:
                self.member = Member()
            self.member.called(watched, fresh)
        return lend_to_current_stream(kept[1])

    def _changed(self, watched: Watched | None) -> bool:
        return watched is not None and self.member is not None and self.member.changed(watched)

    def unchanged(self, tensors: list[Tensor], settings: tuple[object, ...]) -> Any | None:
        """What is kept if nothing changed, to be asked but not read, else None."""
        kept = self.kept
        return kept[1] if kept is not None and kept[0].matches(tensors, (self.generation, *settings)) else None

    def outdated(self, tensors: list[Tensor], settings: tuple[object, ...], make: Callable[[], Any]) -> bool:
        """Whether a call now would read what is kept although `make` returns something else: compares every element."""
        kept = self.unchanged(tensors, settings)
        return kept is not None and not all(map(_same, tensors_of(kept), tensors_of(make())))

    def freeze(self, make: Callable[[], Frozen[Any]]) -> None:
        """Keeps what `make` returns until it is dropped."""
        generation = self.generation
        self.frozen = make()
        if self.generation is not generation:
            self.frozen = None  # dropped meanwhile


def _same(a: Tensor, b: Tensor) -> bool:
    return a.is_meta or torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


class Freezable(Made, Protocol):
    """What `Frozen` keeps: weights that can be had in another dtype, on another device."""

    def to(self, dtype: torch.dtype, device: torch.device) -> Any: ...


Weights = TypeVar("Weights", bound=Freezable)


class Frozen(Generic[Weights]):
    """A block's weights as they were when it was frozen, in every dtype and on every device that its calls compute with.

    All of them come from one original, so that neither a later write to the parameters nor the replicas of DataParallel, which
    share the state of their model, make a difference between them. Each is made once, at the first call that needs it, ready on
    every stream, and kept: at most one for each dtype of a network (its own and autocast's two) on each device.
    """

    def __init__(self, original: Weights, device: torch.device, pack: Callable[[Weights], Weights], dtype: torch.dtype) -> None:
        """original: plain weights on `device`, which nobody else writes. pack: adds a backend's layout. dtype: of the first."""
        self.original = _ready(original, device)
        self.pack = pack
        self.held: dict[tuple[torch.dtype, torch.device], Weights] = {}
        self._make(dtype, device)

    def weights(self, dtype: torch.dtype, device: torch.device) -> Weights:
        """The weights for a call on the current stream."""
        held = self.held.get((dtype, device))
        return self._make(dtype, device) if held is None else lend_to_current_stream(held)

    def _make(self, dtype: torch.dtype, device: torch.device) -> Weights:
        if is_compiling():
            return self.original.to(dtype, device)
        with torch.inference_mode(False), torch.no_grad():
            weights = lend_to_current_stream(self.original).to(dtype, device)
            if not cacheable(()):  # a CUDA graph's, made again at every replay, or what some mode makes in place of tensors
                return self.pack(weights) if capturing() else weights
            self.held[dtype, device] = weights = _ready(self.pack(weights), device)
        return weights


def _ready(weights: Weights, device: torch.device) -> Weights:
    """The same, waited for: a CUDA graph may read them, which must not wait for what lies outside it."""
    made = mark_made(weights, device).made
    if made is not None:
        made.wait()
    return weights
