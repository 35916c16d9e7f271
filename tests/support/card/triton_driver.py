"""Triton's driver over the stand-in's devices: what it launches is the real `JITFunction.run`'s, down to the launcher.

compiles: kernels are compiled for the card's architecture as ever, and must fit its shared memory; else they are only looked up
and bound. launch: "nothing", or "interpreter", which runs the kernel on the tensors' memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .cards import Card
from .cuda_module import Device


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel. constants: its constexprs by name. warps, stages: of its options. overlaps: whether it may
    begin while the launch before it ends.

    arguments: what the launcher was given, a pointer as its address. aligned: those that the kernel relies on being multiples
    of 16.
    """

    kernel: str
    grid: tuple[int, int, int]
    constants: dict[str, Any]
    warps: int
    stages: int
    overlaps: bool
    card: int
    stream: int
    arguments: tuple[Any, ...]
    aligned: tuple[Any, ...]


class Launches:
    """What was launched, and what happens to launches to come."""

    def __init__(self) -> None:
        self.count = 0
        self.compiled = 0
        self.hook: Callable[[str], None] = lambda stage: None  # "compile" or "launch"; may raise in its place
        # The same of one kernel: its constexprs by name, and its options.
        self.planted: Callable[[str, dict[str, Any], int, int], None] = lambda stage, constants, warps, stages: None
        self._listeners: list[list[Launch]] = []

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Launch]]:
        """A list that grows with every launch."""
        found: list[Launch] = []
        self._listeners.append(found)
        try:
            yield found
        finally:
            self._listeners.remove(found)

    def note(self, launch: Callable[[], Launch]) -> None:
        """Counts one; `launch` describes it, for whoever listens: else a launch is to cost nothing."""
        self.count += 1
        for found in self._listeners:
            found.append(launch())


LAUNCHES = Launches()
_ALWAYS_RUN = ("compare_samples",)  # no operator's result, which outcomes.py would have an answer for
_interpreting = threading.RLock()


def insert(device: Device, card: Card, *, launch: str, compiles: bool) -> None:
    """Replaces the driver. Does nothing where Triton is missing or runs in its interpreter."""
    try:
        import triton
        from triton import knobs
        from triton.backends.driver import GPUDriver
        from triton.backends.nvidia.driver import CudaDriver
        from triton.runtime.driver import driver
    except ImportError:
        return
    if knobs.runtime.interpret:
        return

    class Utils:
        def load_binary(self, name: str, kernel: bytes, shared: int, index: int) -> tuple[int, int, int, int, int]:
            return 1, 1, 64, 0, 1024

        def unload_module(self, module: int) -> None:
            pass

        def get_device_properties(self, index: int) -> dict[str, int]:
            return {
                "max_shared_mem": card.shared_per_block, "max_num_regs": 65536, "multiprocessor_count": card.multiprocessors,
                "warpSize": 32, "sm_clock_rate": 1_700_000, "mem_clock_rate": 2_600_000, "mem_bus_width": 5120,
            }  # fmt: skip

        def set_printf_fifo_size(self, size: int) -> None:
            pass

    class Launcher:
        def __init__(self, src: Any, metadata: Any) -> None:
            self.function = src.fn
            self.constants = _constants(src)
            self.metadata = metadata
            self.signature = list(src.signature.values())
            self.aligned = [path[0] for path, promises in src.attrs.items() if ["tt.divisibility", 16] in promises]

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            LAUNCHES.hook("launch")
            LAUNCHES.planted("launch", self.constants, self.metadata.num_warps, self.metadata.num_stages)
            _, launch_metadata, enter, leave, *arguments = rest
            if enter is not None:
                enter(launch_metadata)
            LAUNCHES.note(
                lambda: Launch(
                    self.function.fn.__name__, (x, y, z), self.constants, self.metadata.num_warps,
                    getattr(self.metadata, "num_stages", 0), bool(self.metadata.launch_pdl), device.c.card_current(), stream,
                    tuple(map(_address, arguments)), tuple(_address(arguments[i]) for i in self.aligned),
                )
            )  # fmt: skip
            device.c.card_count(5)
            if launch == "interpreter" or (launch == "reference" and self.function.fn.__name__ in _ALWAYS_RUN):

                def work() -> None:
                    _interpret(self.function, (x, y, z), arguments, self.signature)

                device.capture(work)
                work()
            if leave is not None:
                leave(launch_metadata)

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = Utils(), Launcher
            GPUDriver.__init__(self)

    own_compile = triton.compiler.compile

    def compile_or_bind(src: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
        LAUNCHES.hook("compile")
        LAUNCHES.planted("compile", _constants(src), options["num_warps"], options["num_stages"])
        LAUNCHES.compiled += 1
        if compiles:
            return own_compile(src, target=target, options=options, **more)
        chosen = types.SimpleNamespace(shared=0, num_warps=options["num_warps"], num_stages=options["num_stages"],
                                       launch_pdl=options["launch_pdl"], name=src.fn.fn.__name__)  # fmt: skip
        return types.SimpleNamespace(
            src=src, metadata=chosen, packed_metadata=(), function=1, name=chosen.name, asm={}, n_regs=64, n_spills=0,
            launch_metadata=lambda *_: None, run=Launcher(src, chosen),
        )  # fmt: skip

    triton.compiler.compile = compile_or_bind
    driver._default = driver._active = Driver()  # type: ignore[attr-defined]


def _constants(src: Any) -> dict[str, Any]:
    """A kernel's constexprs by name."""
    return {src.fn.arg_names[path[0]]: value for path, value in src.constants.items()}


def _address(argument: Any) -> Any:
    return argument.data_ptr() if hasattr(argument, "data_ptr") else argument


def _interpret(function: Any, grid: tuple[int, int, int], arguments: list[Any], signature: list[Any]) -> None:
    """Runs a compiled kernel's source in the interpreter, and the functions that it calls.

    signature: the arguments' types. A pointer may be a tensor or an address, which is one of the host's memory.
    """
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    # It runs launches one by one, and knows no waits for others.
    arguments = [False if n == "OVERLAPS" else a for n, a in zip(function.arg_names, arguments, strict=True)]
    with _interpreting:
        own = JITFunction.__call__
        JITFunction.__call__ = lambda self, *a, **k: InterpretedFunction(self.fn)(*a, **k)  # type: ignore[method-assign]
        try:
            InterpretedFunction(function.fn)[grid](*map(_interpretable, arguments, signature))
        finally:
            JITFunction.__call__ = own  # type: ignore[method-assign]


def _interpretable(argument: Any, kind: Any) -> Any:
    """An address as a tensor of the type that the signature names."""
    if not isinstance(argument, int) or not str(kind).startswith("*"):
        return argument
    import torch

    types = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "i64": torch.int64}
    dtype = types[str(kind).removeprefix("*")]
    return torch.frombuffer((ctypes.c_char * dtype.itemsize).from_address(argument), dtype=dtype)
