"""The CUDA operator library for a machine without CUDA: its host code over a stand-in for the CUDA runtime (cuda_runtime/).

    path = build(folder)       # the library: torch.ops.load_library(path) registers cuda_chain, device_limits, ...
    cards = runtime(path)      # the runtime that it is linked with; before or after the library is loaded
    cards.set_cards([(9, 0, 132, 232448, 233472, 65536, 50 * 2**20)])  # once a process
    ...                        # calls of the operators
    cards.launches()           # what was launched, in order

All sources of the library are the real ones; the kernels are compiled against the emulator's hardware and run only
after `execute(True)`. The runtime refuses and remembers errors as CUDA's does; see `Runtime`. The current device and
stream are those of the c10 device guard for CUDA where one is registered (device.cpp registers one), else that of
`Runtime.set_device` and stream 0.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from res2net_fused._native import build_flags

HERE = Path(__file__).resolve().parent / "cuda_runtime"
ROOT = HERE.parents[3]
EMULATOR = ROOT / "tests/support/emulator"
# Kernels are sampled for speed at -O1, as in tests/support/emulator/harness.py. What is declared in registers holds patterns.
FLAGS = ("-O1", "-std=c++20", "-fPIC", "-w", "-ftrivial-auto-var-init=pattern")
LIMIT_NUMBERS = 7


class Launch(NamedTuple):
    """One launch as the runtime took it. Grids and blocks of the chain kernels have one dimension."""

    instance: str  # of csrc/cuda/plan/instances.h, such as "d2c4t4"; a symbol where it is another kernel
    dtype: str  # "fp16", "bf16" or "tf32"
    grid: int  # blocks
    block: int  # threads
    shared_bytes: int
    cluster: int  # blocks of a cluster; 1: an ordinary grid
    device: int
    overlaps: bool  # whether it may begin while the launch before it ends
    stream: int


class _Record(ctypes.Structure):  # as in runtime.cpp
    _fields_ = [("symbol", ctypes.c_char * 256)] + [
        (name, ctypes.c_int) for name in ("grid", "block", "shared_bytes", "cluster", "device", "overlaps")
    ] + [("stream", ctypes.c_int64)]  # fmt: skip


def build(folder: Path) -> Path:
    """Compiles the library and its runtime into `folder` unless they are there for these sources, flags and torch already.

    Half a minute on two cores. Returns the library's path. Several processes may build at once.
    """
    torch_root = Path(importlib.util.find_spec("torch").submodule_search_locations[0])  # type: ignore[union-attr,index]
    facts = build_flags.BuildFacts("stand-in", "13.0.88", build_flags.DEFAULT_CUDA_ARCHITECTURES)
    target = build_flags.cuda_target(ROOT, torch_root, facts)
    emulator = [EMULATOR / name for name in ("emulator.cpp", "memory.cpp", "products.cpp")]
    torch_include = ("-isystem", str(torch_root / "include"))
    common = (f"-I{ROOT / 'csrc'}", f"-I{HERE}", f"-I{EMULATOR}")
    units = [(unit.source, unit.object, (*_for_any_compiler(unit.flags), *common)) for unit in target.units]
    units.append((HERE / "by_hand.cpp", "by_hand.o", common))
    beside = [(source, source.stem + ".o", (*common, *torch_include)) for source in (HERE / "runtime.cpp", *emulator)]

    digest = hashlib.sha256((torch_root / "version.py").read_bytes())
    digest.update(repr((FLAGS, [f.replace(str(ROOT), "") for _, _, flags in units for f in flags])).encode())
    used = [*ROOT.glob("csrc/common/*"), *ROOT.glob("csrc/cuda/**/*.*"), *ROOT.glob("csrc/operators/*.h")]
    used += [ROOT / "csrc/cpu/chain/problem.h", ROOT / "csrc/cpu/kernels/kernels.h"]  # which those include
    for path in sorted({*used, *EMULATOR.glob("*.h"), *emulator, *HERE.glob("*"), Path(__file__)}):
        digest.update(path.name.encode() + path.read_bytes())
    name = digest.hexdigest()[:16]
    library, runtime_library = folder / f"cuda-{name}.so", folder / f"cudart-{name}.so"
    if library.exists() and runtime_library.exists():
        return library

    work = folder / f"{name}.{os.getpid()}"
    work.mkdir(parents=True, exist_ok=True)
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda unit: _compile(*unit, work), [*beside, *units]))
    runtime_objects, library_objects = ([work / made for _, made, _ in part] for part in (beside, units))
    shared = ROOT / "res2net_fused" / build_flags.OPS_LIBRARY  # the real one, as the CPU library's
    rpath = f"-Wl,-rpath,{folder}:{torch_root / 'lib'}:{shared.parent}"
    torch_library = f"-L{torch_root / 'lib'}"
    fresh = work / runtime_library.name
    _run("-shared", *runtime_objects, "-o", fresh, f"-Wl,-soname,{fresh.name}", torch_library, "-lc10", rpath)
    os.replace(fresh, runtime_library)
    fresh = work / library.name
    _run("-shared", *library_objects, runtime_library, shared, "-o", fresh, torch_library, "-ltorch_cpu", rpath)
    os.replace(fresh, library)
    shutil.rmtree(work)
    return library


def _for_any_compiler(flags: Sequence[str]) -> tuple[str, ...]:
    """Definitions and folders of headers, of nvcc's flags."""
    kept = [f for f in flags if f.startswith(("-D", "-I"))]
    return (*kept, *(f for i, word in enumerate(flags) if word == "-isystem" for f in flags[i : i + 2]))


def _compile(source: Path, made: str, flags: Sequence[str], folder: Path) -> None:
    (folder / made).parent.mkdir(parents=True, exist_ok=True)
    _run(*FLAGS, *flags, "-x", "c++", "-c", source, "-o", folder / made)


def _run(*arguments: str | Path) -> None:
    subprocess.run([os.environ.get("CXX", "g++"), *map(str, arguments)], check=True)


@functools.cache
def runtime(library: Path) -> Runtime:
    """The runtime of a library that `build` made: one for the whole process."""
    return Runtime(library)


class Runtime:
    """Cards, planted errors and the record of launches.

    As with CUDA: a call that fails returns its error and leaves it as the thread's last error, which successful calls keep and
    `take_last_error` clears; a launch fails where it has more shared memory than its kernel was allowed on this device, more
    than 1024 threads, no blocks, a cluster or an overlap on a card before compute capability 9 or with code for such cards, or
    where the library has no code for the card.
    """

    def __init__(self, library: Path) -> None:
        self.path = library
        self._c = ctypes.CDLL(str(library.with_name(library.name.replace("cuda-", "cudart-", 1))))
        self._c.cudaGetLastError.restype = ctypes.c_int

    def set_cards(self, limits: Sequence[Sequence[int]]) -> None:
        """One card for each: the first seven numbers of `native.DeviceLimits`; more are ignored.

        Once a process: the library remembers of each device what it has prepared there.
        """
        numbers = [number for card in limits for number in tuple(card)[:LIMIT_NUMBERS]]
        self._c.stand_in_set_cards((ctypes.c_int * len(numbers))(*numbers), len(limits))

    def set_device(self, device: int) -> None:
        """The current device, of this thread where no device guard is registered. Raises ValueError where there is none."""
        if self._c.cudaSetDevice(device):
            self.take_last_error()
            raise ValueError(f"device is {device}; there is no such card")

    def loaded_ptx(self, version: int, device: int = 0) -> None:
        """What the library's code for `device` was compiled from, such as 80, from before its first launch on.

        0: there is no code. Without a call that of a default build: 80, 90 and 100 on cards of these generations and later.
        """
        self._c.stand_in_load_code(device, version)

    def driver(self, version: int) -> None:
        """The driver's, such as 12020 for CUDA 12.2, until `clear`."""
        self._c.stand_in_driver(version)

    def launches(self) -> list[Launch]:
        """Since `clear`, in order; a launch that failed is not among them."""
        # Not at the top: the package may be half imported where this module is.
        from res2net_fused.backends.cuda import kernel_report

        found, record = [], _Record()
        for index in range(self._c.stand_in_launches()):
            self._c.stand_in_launch(index, ctypes.byref(record))
            symbol = record.symbol.decode()
            name = kernel_report.instance_of(symbol) or (symbol, "")
            numbers = (getattr(record, field) for field, _ in _Record._fields_[1:])
            found.append(Launch(*name, *numbers))
        return found

    def shared_limits_set(self) -> list[tuple[int, int]]:
        """(device, bytes) of every call that set how much shared memory a kernel may have, since `clear`."""
        count = self._c.stand_in_limits_set(None, 0)
        numbers = (ctypes.c_int64 * (2 * count))()
        self._c.stand_in_limits_set(numbers, count)
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def clear(self) -> None:
        """Forgets launches, planted errors, this thread's last error and the death of a context; cards and code stay."""
        self._c.stand_in_clear()

    def plant_stale_error(self, code: int) -> None:
        """Leaves a cudaError_t as this thread's last error, as if some call had failed before and nobody had asked."""
        self._c.stand_in_plant_stale_error(code)

    def fail_next_launch(self, code: int) -> None:
        """The next launch, of any thread, gives this cudaError_t; one that ends a context (700, 719, ...) until `clear`."""
        self._c.stand_in_fail_next_launch(code)

    def last_error(self) -> int:
        """This thread's last error, which stays."""
        return int(self._c.cudaPeekAtLastError())

    def take_last_error(self) -> int:
        """This thread's last error, which is cleared, as a caller of CUDA takes it."""
        return int(self._c.cudaGetLastError())

    def execute(self, on: bool) -> None:
        """Whether launches run the kernels, in the emulator: seconds for small sizes, right to the last bit."""
        self._c.stand_in_execute(on)
