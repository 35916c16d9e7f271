"""A progress bar, and what a run took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress(title: str, total: int, of: str = "cases") -> Iterator[Any]:
    """A tqdm bar on stderr where that is a terminal, and lines on stdout before and after with the time it took."""
    from tqdm import tqdm

    start = time.perf_counter()
    print(f"{title} ({total} {of})", flush=True)
    with tqdm(total=total, desc=title, disable=None, leave=False) as bar:
        yield bar
    print(f"{title}: {time.perf_counter() - start:.0f} s", flush=True)
