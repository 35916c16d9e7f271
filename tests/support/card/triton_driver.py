"""Triton's driver over the stand-in's devices: what it launches is the real `JITFunction.run`'s, down to the launcher.

compiles: kernels are compiled for the card's architecture as ever, and must fit its shared memory; else they are only looked up
and bound. launch: "nothing", or "interpreter", which runs the kernel on the tensors' memory.
"""

from __future__ import annotations

import contextlib
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .cards import Card
from .cuda_module import Device


@dataclass(frozen=True)
class Launch:
    """One launch of a Triton kernel. constants: its constexprs by name. warps, stages: of its options."""

    kernel: str
    grid: tuple[int, int, int]
    constants: dict[str, Any]
    warps: int
    stages: int
    card: int
    stream: int


class Launches:
    """What was launched, and what happens to launches to come."""

    def __init__(self) -> None:
        self.count = 0
        self.compiled = 0
        self.hook: Callable[[str], None] = lambda stage: None  # "compile" or "launch"; may raise in its place
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

    def note(self, launch: Launch) -> None:
        self.count += 1
        for found in self._listeners:
            found.append(launch)


LAUNCHES = Launches()
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
            names = src.fn.arg_names
            self.constants = {names[path[0]]: value for path, value in src.constants.items()}
            self.metadata = metadata

        def __call__(self, x: int, y: int, z: int, stream: int, function: int, *rest: Any) -> None:
            LAUNCHES.hook("launch")
            arguments = rest[4:]  # behind metadata, launch metadata and two hooks
            one = Launch(
                self.function.fn.__name__, (x, y, z), self.constants, self.metadata.num_warps,
                getattr(self.metadata, "num_stages", 0), device.c.card_current(), stream,
            )  # fmt: skip
            LAUNCHES.note(one)
            device.c.card_count(5)
            if launch == "interpreter":

                def work() -> None:
                    _interpret(self.function, (x, y, z), arguments)

                device.capture(work)
                work()

    class Driver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = Utils(), Launcher
            GPUDriver.__init__(self)

    own_compile = triton.compiler.compile

    def compile_or_bind(src: Any, target: Any = None, options: Any = None, **more: Any) -> Any:
        LAUNCHES.hook("compile")
        LAUNCHES.compiled += 1
        if compiles:
            return own_compile(src, target=target, options=options, **more)
        chosen = types.SimpleNamespace(shared=0, num_warps=options["num_warps"], num_stages=options["num_stages"],
                                       name=src.fn.fn.__name__)  # fmt: skip
        return types.SimpleNamespace(
            src=src, metadata=chosen, packed_metadata=(), function=1, name=chosen.name, asm={}, n_regs=64, n_spills=0,
            launch_metadata=lambda *_: None, run=Launcher(src, chosen),
        )  # fmt: skip

    triton.compiler.compile = compile_or_bind
    driver._default = driver._active = Driver()  # type: ignore[attr-defined]


def _interpret(function: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
    """Runs a compiled kernel's source in the interpreter, and the functions that it calls."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    own = JITFunction.__call__
    JITFunction.__call__ = lambda self, *a, **k: InterpretedFunction(self.fn)(*a, **k)  # type: ignore[method-assign]
    with _interpreting:
        try:
            InterpretedFunction(function.fn)[grid](*arguments)
        finally:
            JITFunction.__call__ = own  # type: ignore[method-assign]
