"""What was measured to run a call fastest on this machine, and when it counts.

RES2NET_FUSED_CHOICE, read at every call, says what `backend="auto"` goes by:

* "tuned" (default): what was measured of the call, or of the nearest size of its kind; else the rules of `policy.py`.
* "predicted": the rules alone, the same bits from run to run whatever was measured.
* "measured": as "tuned", and a call of which nothing was measured is when it first comes.
* "own": a block runs its own forward unless that was measured to be slower.

While a graph is traced nothing measured is looked at: the graph would keep to it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.compiler import is_compiling

from .._native import library
from .._native.machine import device_name
from ..chain.problem import Chain1dProblem, ChainProblem
from .choices_file import OWN, Contents, Row, merged, read, update, user_path

MODE_VARIABLE = "RES2NET_FUSED_CHOICE"
MODES = ("tuned", "predicted", "measured", "own")

# Calls that one process measures unasked, where RES2NET_FUSED_CHOICE says so: of more sizes the nearest must do. Detection has
# hundreds.
MEASURED_UNASKED = 64

Problem = ChainProblem | Chain1dProblem

_log = logging.getLogger("res2net_fused")
_lock = threading.RLock()


class Found(NamedTuple):
    """What is known of a call. row: the measurement. exact: whether that was of this very size. pinned: of no measurement."""

    row: Row | None
    exact: bool
    pinned: str = ""

    @property
    def choice(self) -> str:
        return self.pinned if self.row is None else self.row.choice

    @property
    def runs_own(self) -> bool:
        return self.choice == OWN

    @property
    def fused(self) -> str:
        """The fastest that is not the block's own forward, with its way, such as "cpu:direct"; "" where there is none."""
        if self.row is None:
            return "" if self.runs_own else self.pinned
        return min((name for name in self.row.ms if name != OWN), key=self.row.ms.__getitem__, default="")

    @property
    def backend(self) -> str:
        return self.fused.partition(":")[0]

    def __str__(self) -> str:
        if self.row is None:
            return f"{self.pinned} is being measured"
        times = ", ".join(f"{name} {ms:.3g}" for name, ms in sorted(self.row.ms.items(), key=lambda item: item[1]))
        size = "x".join(map(str, self.row.size))
        return f"measured here in ms: {times}{'' if self.exact else f' (at {size}, the nearest)'}"


# Modes, and what is being measured -------------------------------------------------------------------------------------


def mode() -> str:
    """What the environment asks for. ValueError where it names no mode."""
    found = os.environ.get(MODE_VARIABLE) or MODES[0]
    if found not in MODES:
        raise ValueError(f"{MODE_VARIABLE}={found!r}: allowed are {', '.join(map(repr, MODES))}")
    return found


@contextmanager
def as_published() -> Iterator[None]:
    """Goes by what is predicted, as published figures do, where RES2NET_FUSED_CHOICE does not ask for anything else.

    Processes that are started inside do so too.
    """
    if os.environ.get(MODE_VARIABLE):
        yield
        return
    os.environ[MODE_VARIABLE] = "predicted"
    forget_native()
    try:
        yield
    finally:
        del os.environ[MODE_VARIABLE]
        forget_native()


class _Pinned(threading.local):
    choice: str | None = None


_pinned = _Pinned()


@contextmanager
def pinned(choice: str) -> Iterator[None]:
    """Makes every call of this thread take one choice, such as "own" or "cpu:direct"; "": what `policy.py` predicts.

    What native bodies remember would hide it from them, and it from other threads after.
    """
    before = _pinned.choice
    _pinned.choice = choice
    forget_native()
    try:
        yield
    finally:
        _pinned.choice = before
        forget_native()


def forget_native() -> None:
    """Makes the native bodies of the operators ask again who runs a call."""
    native = torch.ops.res2net_fused_native
    if hasattr(native, "known_decisions"):
        native.known_decisions(True)


def is_pinned() -> bool:
    return _pinned.choice is not None


def version() -> tuple[object, ...]:
    """What answers from here depend on beside the call: whoever keeps one compares this."""
    return _state.generation, os.environ.get(MODE_VARIABLE), _pinned.choice, torch.get_num_threads()


# The table ---------------------------------------------------------------------------------------------------------------


class _State:
    """The rows of this machine, by what they are looked up by. rows: None until the first call asks."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], list[Row]] | None = None
        self.own: list[Row] = []  # of the user's table, and measured since
        self.shipped: list[Row] = []  # of tables that `load_choices` has read
        self.generation = 0
        self.tried: set[tuple[str, Problem]] = set()  # unasked, whatever came of it


_state = _State()


def lookup(passes: str, problem: Problem) -> Found | None:
    """What was measured of a call, or of the nearest size of its kind; None where nothing was, or does not count.

    passes: "inference", "gradients" (forward and backward without batch statistics) or "training" (with them).
    """
    choice = _pinned.choice
    if choice is not None:
        return Found(None, True, choice) if choice else None
    if mode() == "predicted" or not _rows():
        return None
    return _nearest(passes, problem, torch.get_num_threads(), _state.generation)


@functools.lru_cache(4096)
def _nearest(passes: str, problem: Problem, threads: int, generation: int) -> Found | None:
    size = size_of(problem)
    row = min(
        _rows().get((machine(problem.device), kind_of(passes, problem)), ()),
        key=lambda row: _distance(row.size, size),
        default=None,
    )
    return None if row is None else Found(row, row.size == size)


def _distance(a: Sequence[int], b: Sequence[int]) -> float:
    """Sum of the logarithms of two ratios: of batches, and of the pixels of an image."""
    if len(a) != len(b):
        return math.inf
    return abs(math.log(a[0] / max(1, b[0]))) + abs(math.log(math.prod(a[1:]) / max(1, math.prod(b[1:]))))


def is_known(passes: str, problem: Problem) -> bool:
    """Whether the table has this very call."""
    return any(row.size == size_of(problem) for row in _rows().get((machine(problem.device), kind_of(passes, problem)), ()))


def is_to_be_measured(passes: str, problem: Problem) -> bool:
    """Whether this call is to be measured now, as the environment asks: one that the table has not."""
    return _may_measure() and (passes, problem) not in _state.tried and not is_known(passes, problem)


def _may_measure() -> bool:
    if _pinned.choice is not None or mode() != "measured" or torch.are_deterministic_algorithms_enabled():
        return False
    if is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return False
    return len(_state.tried) < MEASURED_UNASKED


def is_measured_now(passes: str, problem: Problem) -> None:
    """Notes that this call is about to be measured unasked, once in this process."""
    _state.tried.add((passes, problem))


def record(rows: Sequence[Row]) -> None:
    """Takes measurements into the table, and into the user's file where that can be written."""
    try:
        path = user_path()
        update(path, lambda old: Contents(merged(old.choices, rows), old.tiles))
    except (OSError, RuntimeError, TimeoutError) as error:
        _log.warning("what was measured is not kept for other processes: %s", error)
    with _lock:
        _rows()
        _state.own = list(merged(_state.own, rows))
        _take()


def load_choices(path: str | os.PathLike[str]) -> int:
    """Adds a table of choices, such as one that comes with a model, to what this process knows. Returns how many rows apply.

    path: a file as `tune` writes it. It is read as data. Rows of other machines or versions are left out. What the user's own
    table has stands, else the table loaded last. Raises ValueError where it is damaged, OSError where it cannot be read.
    """
    rows = read(Path(path)).choices
    with _lock:
        _rows()
        _state.shipped = list(merged(_state.shipped, rows))
        _take()
    return sum(row.machine in _machines() for row in rows)


def forget() -> None:
    """Reads the user's table again at the next call, without those of `load_choices`."""
    with _lock:
        _state.rows, _state.own, _state.shipped, _state.tried = None, [], [], set()
        _state.generation += 1
        _nearest.cache_clear()
        forget_native()


def _rows() -> dict[tuple[str, str], list[Row]]:
    if _state.rows is None:
        with _lock:
            if _state.rows is None:
                _state.own = list(_read_user())
                _take()
    return _state.rows or {}


def _read_user() -> Sequence[Row]:
    try:
        return read(user_path()).choices
    except FileNotFoundError:
        pass  # nothing was measured
    except (OSError, RuntimeError, ValueError) as error:
        _log.warning("what was measured is not used: %s", error)
    return ()


def _take() -> None:
    found: dict[tuple[str, str], list[Row]] = {}
    for row in merged(_state.shipped, _state.own):
        found.setdefault((row.machine, row.call), []).append(row)
    _state.rows = found
    _state.generation += 1
    _nearest.cache_clear()
    forget_native()


# What a call is looked up by -------------------------------------------------------------------------------------------


def size_of(problem: Problem) -> tuple[int, ...]:
    if isinstance(problem, Chain1dProblem):
        return problem.batch, problem.length
    return problem.batch, problem.height, problem.width_pixels


@functools.lru_cache(4096)
def kind_of(passes: str, problem: Problem) -> str:
    """The kind of a call, all but its size and device, as a line of text."""
    settings = " ".join(f"{f.name}={getattr(problem.config, f.name)}" for f in fields(problem.config))
    dtype = str(problem.dtype).removeprefix("torch.")
    if isinstance(problem, Chain1dProblem):
        return f"{passes} chain1d {problem.scale}x{problem.width} k={problem.kernel_size} {settings} {dtype}"
    around = "chain" if problem.around is None else "block {}->{}".format(*problem.around)
    layout = "channels_last" if problem.channels_last else "contiguous"
    return f"{passes} {around} {problem.scale}x{problem.width} {settings} {dtype} {layout}"


def machine(device: torch.device) -> str:
    """The processor or card, and the versions of all that computes on it."""
    return _machine(device, torch.get_num_threads(), os.environ.get("RES2NET_FUSED_CPU_ISA") or "auto")


@functools.cache
def _machine(device: torch.device, threads: int, instruction_set: str) -> str:
    if device.type == "cuda" and not torch.cuda.is_available():
        return "no such device"  # of fake tensors
    facts = [device_name(str(device)), f"torch {torch.__version__}", f"res2net_fused {_kernels()}"]
    if device.type == "cpu":
        return ", ".join([*facts, f"{threads} threads", *([] if instruction_set == "auto" else [instruction_set])])
    try:
        import triton

        facts.append(f"triton {triton.__version__}")
    except Exception:  # missing, or broken in whatever way
        pass
    if device.type == "cuda":
        facts.append(f"cuda {torch.version.cuda}, driver {_driver()}")
    return ", ".join(facts)


def _driver() -> object:
    ask: Callable[[], object] | None = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if ask is None else ask()


def _machines() -> set[str]:
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    return {machine(device) for device in devices}


@functools.cache
def _kernels() -> str:
    """The package's version, and what tells its native libraries from others of the same version."""
    built: dict[str, Any] = library.build_information()
    told = json.dumps([built.get("commit"), built.get("parts")], sort_keys=True, default=str)
    package = sys.modules[__name__.partition(".")[0]]
    return f"{package.__version__} ({hashlib.sha256(told.encode()).hexdigest()[:8]})"
