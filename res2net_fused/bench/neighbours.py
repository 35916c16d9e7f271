"""Busy neighbours of what is timed: each keeps one processor busy, as data loaders do in most people's training runs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# Ends when its input does, so also where its parent was killed. Its first line says that it runs.
_SPIN = """import select, sys
print("busy", flush=True)
while not select.select([sys.stdin], [], [], 0)[0]:
    for _ in range(100_000):
        pass
"""


@contextmanager
def busy_neighbours(count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Keep `count` processes busy until the block ends."""
    started: list[subprocess.Popen[str]] = []
    try:
        for _ in range(count):
            command = [sys.executable, "-S", "-c", _SPIN]
            started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        for one in started:
            assert one.stdout is not None
            one.stdout.readline()  # until it runs
        yield started
    finally:
        for one in started:
            one.communicate()
