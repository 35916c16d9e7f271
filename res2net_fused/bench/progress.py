"""A progress bar, or lines where there is no terminal, and what a run took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from ..backends.triton.compile_progress import compile_progress

_SILENCE_S = 30.0  # after which a line says what is going on


@contextmanager
def progress(title: str, total: int, of: str = "cases") -> Iterator[Any]:
    """A tqdm bar on stderr where that is a terminal, else a line now and then; lines before and after with the time it took."""
    start = time.perf_counter()
    print(f"{title} ({total} {of})", flush=True)
    with _bar(title, total) as bar, compile_progress(bar):
        yield _Lines(total) if bar is None or bar.disable else bar
    print(f"{title}: {time.perf_counter() - start:.0f} s", flush=True)


def _bar(title: str, total: int) -> Any:
    """A tqdm as a context, or None as one where tqdm is not installed: only the extra 'bench' brings it."""
    try:
        from tqdm import tqdm
    except ImportError:
        return nullcontext()
    return tqdm(total=total, desc=title, disable=None, leave=False)


class _Lines:
    """Compiling takes minutes: what a bar shows, as lines on stdout."""

    def __init__(self, total: int) -> None:
        self._total, self._done, self._start = total, 0, time.monotonic()
        self._said = self._start

    def set_postfix_str(self, text: str) -> None:
        now = time.monotonic()
        if now - self._said >= _SILENCE_S:
            print(f"  {self._done} of {self._total} after {now - self._start:.0f} s; {text or 'next'}", flush=True)
            self._said = now

    def update(self) -> None:
        self._done += 1
        self.set_postfix_str("")
