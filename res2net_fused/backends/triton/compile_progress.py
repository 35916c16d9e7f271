"""What Triton is busy with while a first call compiles: seconds a kernel, half a minute a network, otherwise in silence."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

PATIENCE_S = 2.0  # of compiling, all kernels together, before anything is said
COMPILED_S = 0.05  # what took less was found in Triton's cache


@contextlib.contextmanager
def compile_progress(bar: Any = None) -> Iterator[None]:
    """While active, "compiling Triton kernels: 12 done, 18 s" in the postfix of `bar`, a tqdm, or else on stderr.

    A terminal has one line that is written over; a file one when patience ends and one at the end. Without Triton, or where its
    hooks are not those that are known here, nothing happens; hooks of others are called first, and put back.
    """
    runtime = _runtime()
    if runtime is None:
        yield
        return
    before, after = runtime.jit_cache_hook, runtime.jit_post_compile_hook
    progress = _Progress(bar)
    runtime.jit_cache_hook = _behind(before, progress.begin)
    runtime.jit_post_compile_hook = _behind(after, progress.end)
    try:
        yield
    finally:
        runtime.jit_cache_hook, runtime.jit_post_compile_hook = before, after
        progress.close()


def _runtime() -> Any:
    """Triton's settings that hold its hooks, or None."""
    try:
        from triton import knobs

        runtime = knobs.runtime
    except Exception:  # missing, older, or broken in whatever way
        return None
    return runtime if hasattr(runtime, "jit_cache_hook") and hasattr(runtime, "jit_post_compile_hook") else None


def _behind(first: Callable[..., Any] | None, own: Callable[[], None]) -> Callable[..., Any]:
    """A hook that answers what `first` does: a true answer keeps Triton from compiling."""

    def hook(*args: Any, **keywords: Any) -> Any:
        answer = None if first is None else first(*args, **keywords)
        with contextlib.suppress(Exception):  # a line of progress is not worth a call that fails
            own()
        return answer

    return hook


class _Progress:
    def __init__(self, bar: Any) -> None:
        self.bar = None if getattr(bar, "disable", False) else bar
        self.done, self.seconds, self.said = 0, 0.0, ""
        self.begun: dict[int, float] = {}  # by thread
        self.lock = threading.Lock()

    def begin(self) -> None:
        self.begun[threading.get_ident()] = time.monotonic()

    def end(self) -> None:
        now = time.monotonic()
        with self.lock:
            took = now - self.begun.pop(threading.get_ident(), now)
            if took < COMPILED_S:
                return
            self.done, self.seconds = self.done + 1, self.seconds + took
            if self.seconds >= PATIENCE_S:
                self._say()

    def close(self) -> None:
        with contextlib.suppress(Exception):
            if self.said and self.bar is not None:
                self.bar.set_postfix_str("")
            elif self.said:
                self._say(last=True)

    def _say(self, last: bool = False) -> None:
        line = f"compiling Triton kernels: {self.done} done, {self.seconds:.0f} s"
        if self.bar is not None:
            self.bar.set_postfix_str(line)
        elif sys.stderr.isatty():
            print(f"\r{line}", end="\n" if last else "", file=sys.stderr, flush=True)
        elif self.said and not last or line == self.said:
            return
        else:
            print(line, file=sys.stderr, flush=True)
        self.said = line
