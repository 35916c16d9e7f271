"""Faults planted into a run on the stand-in card, each where a backend runs a chosen problem.

STAND_IN_FAULTS is JSON, a list of objects: `kind` (of KINDS), and what a call must be to meet it: `backend` ("triton", "cuda"),
`call` ("forward", "block_forward", "train_forward", ...), `width`, `batch`, `height`; `captured`: only inside a capture. With
`stage` ("compile" or "launch") it meets a kernel of Triton's instead, by its `constants`, `warps` and `stages`, such as a tile
of `tune`. The same fault meets every such call, in every child process.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

KINDS = {
    "compile_error": "Triton's compiler fails",
    "out_of_resources": "a tile does not fit the card",
    "out_of_memory": "no memory is left on the card",
    "cuda_error": "the CUDA runtime reports an illegal access; nothing on the card works from then on",
    "triton_cuda_error": "the same, as Triton's launcher words it",
    "wrong": "the result is half as large again",
    "empty_graph": "a capture holds nothing",
    "hang": "the call does not return",
    "kill": "SIGKILL ends the process",
}
_MATCHED = ("width", "batch", "height")
_ILLEGAL = "an illegal memory access was encountered"
_dead: list[str] = []  # why nothing on the card works any more


def read() -> Faults:
    """The faults that STAND_IN_FAULTS plants. ValueError for a kind that there is not."""
    planted = json.loads(os.environ.get("STAND_IN_FAULTS") or "[]")
    for fault in planted:
        if fault["kind"] not in KINDS:
            raise ValueError(f"kind is {fault['kind']!r}; allowed are {', '.join(KINDS)}")
    return Faults(planted)


def raise_if_dead() -> None:
    """What every later call meets once a fault has poisoned the context."""
    if _dead:
        raise _error(_dead[0])


class Faults:
    def __init__(self, planted: list[dict[str, Any]]) -> None:
        self.planted = planted

    @contextlib.contextmanager
    def around(self, backend: str, call: str, problem: Any) -> Iterator[bool]:
        """Around one call of a backend: whether its result is to be wrong."""
        raise_if_dead()
        fault = next((f for f in self.planted if _meets(f, backend, call, problem)), None)
        if fault is None:
            yield False
            return
        kind = fault["kind"]
        _tell(kind, f"{backend} {call}, width {problem.width}")
        if kind in ("compile_error", "out_of_resources"):
            with _at_the_launch(kind):
                yield False
            return
        _happen(kind)
        yield kind == "wrong"

    def at_kernel(self, stage: str, constants: dict[str, Any], warps: int, stages: int) -> None:
        """Where a kernel of Triton's is compiled or launched."""
        raise_if_dead()
        found = {**constants, "warps": warps, "stages": stages}
        for fault in self.planted:
            wanted = {**fault.get("constants", {}), **{name: fault[name] for name in ("warps", "stages") if name in fault}}
            if fault.get("stage") == stage and all(found.get(name) == value for name, value in wanted.items()):
                _tell(fault["kind"], f"a kernel's {stage}, {wanted}")
                _fail(fault["kind"])
                _happen(fault["kind"])


def _tell(kind: str, where: str) -> None:
    print(f"stand-in card: planted {kind} in {where}", file=sys.stderr, flush=True)


def _happen(kind: str) -> None:
    if kind == "hang":
        time.sleep(10_000)
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "out_of_memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
    if kind in ("cuda_error", "triton_cuda_error"):
        _dead.append(("CUDA error: " if kind == "cuda_error" else "Triton Error [CUDA]: ") + _ILLEGAL)
        raise _error(_dead[0])


def _meets(fault: dict[str, Any], backend: str, call: str, problem: Any) -> bool:
    import torch

    if "stage" in fault or (fault.get("captured") and not torch.cuda.is_current_stream_capturing()):
        return False
    named = {"backend": backend, "call": call, **{name: getattr(problem, name) for name in _MATCHED}}
    return fault["kind"] != "empty_graph" and all(fault.get(name, value) == value for name, value in named.items())


def _error(text: str) -> RuntimeError:
    from .cuda_module import accelerator_error

    return accelerator_error(text) if text.startswith("CUDA") else RuntimeError(text)


def _fail(kind: str) -> None:
    """As Triton itself would raise it."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources

    if kind == "out_of_resources":
        raise OutOfResources(300_000, 232_448, "shared memory")
    if kind == "compile_error":
        raise CompilationError("", None, "planted")


@contextlib.contextmanager
def _at_the_launch(kind: str) -> Iterator[None]:
    """The next launch raises, where Triton itself would, so that what the package makes of it is tried as well."""
    from .triton_driver import LAUNCHES

    LAUNCHES.hook = lambda stage: _fail(kind)
    try:
        yield
    finally:
        LAUNCHES.hook = lambda stage: None


def drops_captures() -> bool:
    """Whether a planted fault makes captures hold nothing."""
    return any(fault["kind"] == "empty_graph" for fault in json.loads(os.environ.get("STAND_IN_FAULTS") or "[]"))
