"""`torch.cuda` over the stand-in's devices: what torch's CUDA build has in C++, and its streams, events and graphs."""

from __future__ import annotations

import ctypes
import functools
import itertools
import time
import types
from collections.abc import Callable
from typing import Any

import torch

from . import faults
from .cards import Card

HOST_MEMORY = 4 * 2**30  # bytes that tests of large tensors may find free
TYPE = 1  # c10::DeviceType::CUDA
_CALLBACK = ctypes.CFUNCTYPE(None, ctypes.c_int64)
_work: dict[int, Callable[[], object]] = {}  # of captures, kept for their replays
_numbers = itertools.count()


@_CALLBACK
def _run(number: int) -> None:
    _work[number]()


class Device:
    """The library of device.cpp, through ctypes; see there."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self.c = library
        for name in ("card_stream", "card_allocated", "card_peak", "card_counter", "card_graph_size"):
            getattr(library, name).restype = ctypes.c_int64
        library.card_graph_new.restype = ctypes.c_void_p
        for name in ("card_graph_free", "card_graph_size", "card_capture_begin", "card_replay"):
            getattr(library, name).argtypes = [ctypes.c_void_p]
        library.card_set_stream.argtypes = [ctypes.c_int, ctypes.c_int64]

    def capture(self, work: Callable[[], object]) -> bool:
        """Whether a capture is under way on the current stream, at whose replays `work` is done."""
        number = next(_numbers)
        _work[number] = work
        if not self.c.card_capture_call(_run, ctypes.c_int64(number)):
            del _work[number]
            return False
        return True

    def host_waits(self, what: str) -> None:
        """What every call does that waits for the device; raises in a capture and on a dead card, as the real one."""
        from . import faults

        faults.raise_if_dead()
        if self.c.card_host_waits(1):
            raise accelerator_error(f"CUDA error: operation not permitted when stream is capturing ({what})")


def accelerator_error(text: str) -> RuntimeError:
    """What torch raises where the CUDA runtime returns this."""
    error = getattr(torch, "AcceleratorError", RuntimeError)
    return error(text)


def insert(device: Device, card: Card, count: int) -> None:
    """Makes torch see `count` cards. Not to be undone: the process keeps them."""
    c = device.c
    c.card_set_count(count)

    class Stream(torch.Stream):
        def __new__(cls, device: Any = None, priority: int = 0, **ids: int) -> Stream:
            if "stream_id" in ids:
                return super().__new__(cls, **ids)
            index = torch.cuda._utils._get_device_index(device, optional=True)
            return super().__new__(cls, device=torch.device("cuda", index), priority=priority)

        @property
        def cuda_stream(self) -> int:
            return self.stream_id

        def wait_stream(self, stream: torch.Stream) -> None:
            self.wait_event(stream.record_event())

        def wait_event(self, event: Event) -> None:
            event.wait(self)

        def record_event(self, event: Event | None = None) -> Event:
            event = Event() if event is None else event
            event.record(self)
            return event

        def __repr__(self) -> str:
            return f"<torch.cuda.Stream device={self.device} cuda_stream={self.stream_id:#x}>"

    class Event(torch.Event):
        def __new__(cls, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False, **_: bool) -> Event:
            return super().__new__(cls, device="cuda", enable_timing=enable_timing, blocking=blocking)

        def record(self, stream: torch.Stream | None = None) -> None:
            super().record(torch.cuda.current_stream() if stream is None else stream)
            self.when = time.perf_counter()

        def elapsed_time(self, end: Event) -> float:
            return 1e3 * (end.when - self.when)

        def wait(self, stream: torch.Stream | None = None) -> None:
            super().wait(torch.cuda.current_stream() if stream is None else stream)

    class CUDAGraph:
        """What is captured runs once at its capture, for its sizes, and again at every replay."""

        def __init__(self, keep_graph: bool = False) -> None:
            self._graph = ctypes.c_void_p(c.card_graph_new())

        def capture_begin(self, pool: object = None, capture_error_mode: str = "global", **_: object) -> None:
            if c.card_stream(c.card_current()) == 0:
                raise RuntimeError("CUDA graphs must be captured on a non-default stream. (However, after capture, it's ok to "
                                   "replay them on the default stream.)")  # fmt: skip
            c.card_capture_begin(self._graph)

        def capture_end(self) -> None:
            if c.card_capture_end():
                raise accelerator_error("CUDA error: operation failed due to a previous error during capture")
            if faults.drops_captures():
                self.reset()

        def replay(self) -> None:
            c.card_replay(self._graph)

        def reset(self) -> None:
            self._graph = ctypes.c_void_p(c.card_graph_new())

        def pool(self) -> tuple[int, int]:
            return (0, 1)

        def size(self) -> int:
            """Operators and launches in it."""
            return c.card_graph_size(self._graph)

    def checked(index: int) -> int:
        if not 0 <= index < count:
            raise accelerator_error("CUDA error: invalid device ordinal")
        return index

    def set_device(index: int) -> None:
        c.card_set_current(checked(index))

    def exchange_device(index: int) -> int:
        before = c.card_current()
        if index >= 0:
            set_device(index)
        return before

    def memory_stats(index: int) -> dict[str, Any]:
        figures = {"current": c.card_allocated(index), "peak": c.card_peak(index), "allocated": 0, "freed": 0}
        nested = {name: {"all": dict(figures)} for name in ("allocated_bytes", "reserved_bytes", "active_bytes")}
        return {**nested, "num_alloc_retries": 0, "num_ooms": 0}

    native = {
        "_has_cuda": True,
        "_cuda_init": lambda: None,
        "_cuda_getDeviceCount": lambda: count,
        "_cuda_getDevice": lambda: c.card_current(),  # a ctypes function has no hash, which Dynamo asks for
        "_cuda_setDevice": set_device,
        "_cuda_exchangeDevice": exchange_device,
        "_cuda_maybeExchangeDevice": lambda index: exchange_device(index),  # Dynamo wants another function
        "_cuda_getCurrentStream": lambda index: (c.card_stream(index), index, TYPE),
        "_cuda_getDefaultStream": lambda index: (0, index, TYPE),
        "_cuda_getCurrentRawStream": lambda index: c.card_stream(index),
        "_cuda_setStream": lambda stream_id, device_index, device_type: (
            set_device(device_index), c.card_set_stream(device_index, stream_id),
        ),
        "_cuda_synchronize": lambda: device.host_waits("synchronize the device"),
        "_cuda_emptyCache": lambda: None,
        "_host_emptyCache": lambda: None,
        "_cuda_memoryStats": memory_stats,
        "_cuda_resetPeakMemoryStats": lambda index: c.card_reset_peak(index),
        "_cuda_canDeviceAccessPeer": lambda a, b: True,
        "_cuda_sleep": lambda cycles: device.capture(lambda: None),
        "_cuda_isInBadFork": lambda: False,
        "_cuda_getArchFlags": lambda: "sm_80 sm_86 sm_90 sm_100 sm_120",
        "_cuda_hasPrimaryContext": lambda index: True,
        "_cuda_isCurrentStreamCapturing": lambda: bool(c.card_capturing()),
        "_cuda_get_sync_debug_mode": lambda: 0,
        "_cuda_set_sync_debug_mode": lambda mode: None,
    }  # fmt: skip
    for name, value in native.items():
        setattr(torch._C, name, value)
    for name in ("_cuda_CUDAAllocator_AllocatorState", "_set_cached_tensors_enabled"):
        if not hasattr(torch._C, name):  # which Inductor imports and does not come to use
            setattr(torch._C, name, type(name, (), {}))
    cuda: Any = torch.cuda
    properties = types.SimpleNamespace(
        name=card.name, major=card.capability[0], minor=card.capability[1], total_memory=card.memory,
        multi_processor_count=card.multiprocessors, L2_cache_size=card.l2, warp_size=32,
        shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=card.shared_per_block,
        shared_memory_per_multiprocessor=card.shared_per_multiprocessor,
        regs_per_multiprocessor=card.registers_per_multiprocessor,
        max_threads_per_multi_processor=card.threads_per_multiprocessor, max_threads_per_block=1024, is_integrated=0,
    )  # fmt: skip
    replaced = {
        "_lazy_init": lambda: None,
        "_initialized": True,
        "_is_in_bad_fork": lambda: False,
        "_get_device_properties": lambda index: (checked(index), properties)[1],
        "default_generators": (torch.default_generator,) * count,
        "_exchange_device": exchange_device,
        "_maybe_exchange_device": native["_cuda_maybeExchangeDevice"],
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": CUDAGraph,
        "is_current_stream_capturing": native["_cuda_isCurrentStreamCapturing"],
        "mem_get_info": lambda device=None: (min(card.memory, HOST_MEMORY) - c.card_allocated(c.card_current()), card.memory),
    }
    for name, value in replaced.items():
        setattr(cuda, name, value)
    cuda.streams.Stream, cuda.streams.Event = Stream, Event
    cuda.graphs.CUDAGraph, cuda.graphs.is_current_stream_capturing = CUDAGraph, replaced["is_current_stream_capturing"]
    torch.version.cuda = "13.0"
    own_clone = torch.UntypedStorage.clone

    def clone(storage: torch.UntypedStorage) -> torch.UntypedStorage:  # which knows no memory of a card in a CPU build
        if storage.device.type != "cuda":
            return own_clone(storage)
        return torch.empty(storage.nbytes(), dtype=torch.uint8, device=storage.device).untyped_storage().copy_(storage)

    torch.UntypedStorage.clone = clone  # type: ignore[method-assign]
    _insert_copies()
    _compile_by_tracing_alone()


def _insert_copies() -> None:
    """What DataParallel copies from card to card with, in C++ otherwise."""
    from torch.nn.parallel import comm

    def broadcast_coalesced(tensors: Any, devices: Any, buffer_size: int = 0) -> list[Any]:
        return [[t if t.device.index == i else t.to(f"cuda:{i}") for t in tensors] for i in map(_index, devices)]

    def scatter(tensor: Any, devices: Any = None, chunk_sizes: Any = None, dim: int = 0, streams: Any = None) -> Any:
        devices = list(map(_index, devices))
        parts = tensor.split(chunk_sizes, dim) if chunk_sizes else tensor.chunk(len(devices), dim)
        return tuple(part.to(f"cuda:{i}") for part, i in zip(parts, devices, strict=False))

    def gather(tensors: Any, dim: int = 0, destination: Any = None) -> Any:
        return torch.cat([t.to(f"cuda:{_index(destination)}") for t in tensors], dim)

    comm.broadcast_coalesced, comm.scatter, comm.gather = broadcast_coalesced, scatter, gather


def _index(device: Any) -> int:
    return device if isinstance(device, int) else torch.device(device).index or 0


def _compile_by_tracing_alone() -> None:
    """torch.compile traces as ever. What Inductor was to compile, which has no code for the stand-in, runs as it was traced."""
    own = torch.compile

    @functools.wraps(own)
    def traced(model: Any = None, *, backend: Any = "inductor", **options: Any) -> Any:
        if backend == "inductor":
            backend = "eager"
            for name in ("mode", "options"):
                options.pop(name, None)
        return own(model, backend=backend, **options)

    torch.compile = traced  # type: ignore[assignment]
