"""Writes that PyTorch does not see (`.data`, a graph's replay), noticed on GPUs: late by one call, since no call waits.

    block 1 of a model     looks, then launches once for itself and all that have followed it in calls before
    block 2, 3, ...        look, and find themselves among those that block 1 has launched for

A launch compares elements of the blocks' tensors with what was there when they were folded, and writes the number of what it
finds changed into the host's memory, where the block's next call looks. Addresses are read only by launches for which the host
has just found the tensors alive and in the same place. Nothing is known of models here: blocks are watched together that are
called one after the other inside one outermost module, and whichever of them comes round again leads.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import logging
import sys
import threading
import warnings
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..backends.triton.availability import why_not_device
from ..backends.triton.samples import compare_samples, keep_samples, sample_table
from .made_on import MadeOn

WRITTEN = (
    "weights of fused blocks were written in a way that PyTorch does not see (`.data`, the replay of a CUDA graph), and calls "
    "since then may have computed with the old ones: call refresh(model) after such writes"
)
_SLOTS = 1024  # that the numbers of all tables share: of two in one slot the second is noticed later

_numbers = itertools.count(1)
_lock = threading.Lock()
_failed: set[torch.device] = set()
_log = logging.getLogger("res2net_fused")


class _Turns(threading.local):
    """The blocks that are being called one after the other on each device, and which of them was the last one."""

    def __init__(self) -> None:
        self.last: dict[torch.device, tuple[weakref.ref[_Together], int]] = {}


_turns = _Turns()


@functools.cache
def _noticed() -> tuple[Tensor, ctypes.Array[ctypes.c_int64]]:
    """The numbers of changed tables, where GPUs write them; never freed, since a launch under way may still write."""
    memory = torch.zeros(_SLOTS, dtype=torch.int64, device="cpu", pin_memory=True)
    return memory, (ctypes.c_int64 * _SLOTS).from_address(memory.data_ptr())


class _Table:
    """A table of samples on a GPU, made on the current stream."""

    def __init__(self, numbers: list[int], tensor: Tensor) -> None:
        self.numbers, self.tensor = numbers, tensor
        self.made = MadeOn(self, tensor.device)


class Watched:
    """Elements of a block's tensors on one GPU, as they are on the current stream at this point."""

    def __init__(self, tensors: Sequence[Tensor], device: torch.device) -> None:
        self.device, self.number = device, next(_numbers)
        self.tensors = list(tensors)
        self.pointers = list(map(Tensor.data_ptr, tensors))
        self.told = 0  # for so many calls to come, it is known already that something was written
        with _lock:
            memory, self.seen = _noticed()
        samples = sample_table(tensors, self.number).pin_memory().to(device, non_blocking=True)
        keep_samples(samples, memory)
        self.table = _Table([self.number], samples)

    def changed(self) -> bool:
        """Whether a launch has found other bits, as far as the host can tell by now."""
        return self.seen[self.number % _SLOTS] == self.number

    def readable(self) -> bool:
        """Whether all tensors are where they were."""
        return list(map(Tensor.data_ptr, self.tensors)) == self.pointers


def watch(tensors: Sequence[Tensor]) -> Watched | None:
    """Samples of a block's tensors, or None where no GPU can compare them.

    None too for tensors that are made anew for every call, such as those of DataParallel's replicas.
    """
    device = tensors[0].device
    if device.type != "cuda" or device in _failed or not any(type(tensor) is nn.Parameter for tensor in tensors):
        return None
    if why_not_device(device, torch.float32) is not None:
        return None
    try:
        with torch.inference_mode(False), torch.no_grad():
            return Watched([t for t in tensors if t.device == device and t.is_floating_point()], device)
    except Exception as error:
        _give_up(device, error)
        return None


def _give_up(device: torch.device, error: Exception) -> None:
    if not isinstance(error, torch.OutOfMemoryError):  # which may be another one's, and pass
        _failed.add(device)
        _log.warning("writes that PyTorch does not see are no longer noticed on %s: %r", device, error)


class Member:
    """A block among those that are watched together."""

    def __init__(self) -> None:
        self.number = next(_numbers)
        self.watched: Watched | None = None
        self.leads: _Together | None = None  # those that follow this one, if it ever came first

    def changed(self, watched: Watched) -> bool:
        """Whether a write was noticed, with a warning: one for all blocks that are watched together."""
        if not watched.changed():
            watched.told = max(0, watched.told - 1)
            return False
        if not watched.told:
            last = _turns.last.get(watched.device)
            for together in (self.leads, None if last is None else last[0]()):
                for member in () if together is None else together.members():
                    if member.watched is not None:
                        member.watched.told = 2  # some notice in the rest of this model's call, the others in its next
            warnings.warn(WRITTEN, stacklevel=2)
        return True

    def called(self, watched: Watched, fresh: bool) -> None:
        """Has the block's tensors compared, unless this model's call has done so. fresh: whether the samples are of now."""
        self.watched = watched
        if _failed and watched.device in _failed:
            return
        try:
            self._join_or_lead(watched.device, fresh)
        except Exception as error:
            _give_up(watched.device, error)

    def _join_or_lead(self, device: torch.device, fresh: bool) -> None:
        last = _turns.last.get(device)
        together = None if last is None else last[0]()
        if last is not None and together is not None:
            place = together.places.get(self.number, -1)
            if place < 0 and together.root is _outermost():
                place = together.join(self)
                if not fresh:
                    _Together(self).launch()
            if place > last[1]:
                _turns.last[device] = last[0], place
                return
        if self.leads is None:
            self.leads = _Together(self)
        self.leads.root = _outermost()
        _turns.last[device] = weakref.ref(self.leads), 0
        self.leads.launch(self if fresh else None)


class _Together:
    """Blocks in the order in which they are called, which one launch watches."""

    def __init__(self, first: Member) -> None:
        self.root: weakref.ref[nn.Module] | None = None  # of the call that the first one leads
        self.references = [weakref.ref(first)]
        self.places = {first.number: 0}
        self.table: _Table | None = None  # of those that the last launch was for

    def members(self) -> list[Member]:
        return [member for reference in self.references if (member := reference()) is not None]

    def join(self, member: Member) -> int:
        """Adds one behind the others, as far as they are still there, and returns its place."""
        with _lock:
            members = [*self.members(), member]
            self.references = list(map(weakref.ref, members))
            self.places = {m.number: place for place, m in enumerate(members)}
            return len(members) - 1

    def launch(self, fresh: Member | None = None) -> None:
        """Compares what can be read now on the current stream, but for a block whose samples are of now."""
        watched = [w for member in self.members() if member is not fresh and (w := member.watched) is not None]
        watched = [w for w in watched if not w.changed() and w.readable()]
        if not watched:
            return
        numbers, table = [w.number for w in watched], self.table
        if table is None or table.numbers != numbers:
            for w in watched:
                w.table.made.lend()
            with torch.inference_mode(False), torch.no_grad():
                self.table = table = _Table(numbers, torch.cat([w.table.tensor for w in watched]))
        table.made.lend()
        compare_samples(table.tensor, _noticed()[0])


def _outermost() -> weakref.ref[nn.Module] | None:
    """The outermost module that is being called in this thread; of one module always the same reference."""
    found, frame = None, sys._getframe()
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            found = frame
        frame = frame.f_back  # type: ignore[assignment]
    return None if found is None else weakref.ref(found.f_locals["self"])
