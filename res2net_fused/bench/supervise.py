"""Measuring in a child process: what kills it, hangs it or poisons its CUDA context costs one contender, not the record.

The child marks in a small file beside the record who is about to run; the file outlives whatever ends the process. The parent
watches the mark, ends a child that takes too long over one, adds the reason to the mark, and starts the next child. A record
that is opened turns the mark it finds into a recorded failure (`record_file.Record`), so that nothing is tried twice.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REFUSED = 2  # exit status of a child that cannot do what it was asked for

FAILED = 76  # of one that did all of it, some of which failed

AGAIN = 75  # of one that has written down a fault and asks for a process with a fresh CUDA context

START_LIMIT_S = 600.0  # for what a child does while nobody is marked, such as importing torch

_POLL_S = 0.1


class Mark:
    """Who runs just now: `path`.running, one line that is written in place, in microseconds."""

    def __init__(self, path: Path) -> None:
        self.path = path.with_name(path.name + ".running")
        self._file: int | None = None
        self._count = self._length = 0

    def lock(self) -> None:
        """ValueError where another process that is alive measures into the same record."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            self._file = None
            raise ValueError(f"another process measures into it ({self.path} is locked)") from None
        except OSError:
            pass  # a file system without locks
        self._count, self._length = self.read().get("count", 0), os.fstat(self._file).st_size

    def read(self) -> dict[str, Any]:
        """count, which every change raises; while somebody runs also names and limit_s, and of a child that ended its end."""
        try:
            found = json.loads(self.path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def set(self, names: Sequence[str], limit_s: float) -> None:
        """limit_s: seconds until the next change of the mark, after which the process counts as hanging."""
        self._write({"names": list(names), "limit_s": limit_s})

    def clear(self) -> None:
        self._write({})

    def end(self, **how: object) -> None:
        """Written by the parent: how the child that left this mark ended."""
        found = self.read()
        if found.get("names"):
            self.path.write_text(json.dumps(found | how))

    def close(self) -> None:
        """Lets go of the lock; the file goes where nobody is marked."""
        if self._file is not None:
            if not self.read().get("names"):
                self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def _write(self, content: dict[str, Any]) -> None:
        if self._file is None:
            return  # of a record that is only read
        self._count += 1
        text = json.dumps({"count": self._count, **content})
        self._length = max(self._length, len(text))
        os.pwrite(self._file, text.ljust(self._length).encode(), 0)  # spaces over what a longer line leaves


def supervise(command: Sequence[str], path: Path, *, deadline: float = float("inf")) -> int:
    """Runs `command`, which measures into the record at `path`, again after every fault; returns an exit status.

    deadline: of time.time(), when a child that still runs is killed. 0: a child found nothing left to start, or time is up;
    failures are in the record, or in the mark that it absorbs when it is opened. FAILED, REFUSED: as the child said.
    1: two children in a row ended before they marked anything.
    """
    mark, fruitless = Mark(path), 0
    while True:
        before = _progress(mark, path)
        with _child(command, mark) as child:
            how = _watch(child, mark, deadline)
        mark.end(**how)
        left = mark.read()
        if "cut_s" in how or (how["status"] in (0, FAILED, REFUSED) and not left.get("names")):
            return how.get("status", 0)
        print(f"measuring goes on in a new process: {how['reason']}", flush=True)
        fruitless = 0 if _progress(mark, path) != before else fruitless + 1
        if fruitless == 2:
            return 1


def _progress(mark: Mark, path: Path) -> tuple[int, int]:
    """Changes with everything that a child marks or writes."""
    return mark.read().get("count", 0), path.stat().st_mtime_ns if path.exists() else 0


@contextmanager
def _child(command: Sequence[str], mark: Mark) -> Iterator[subprocess.Popen]:
    """A process group of its own, which is gone on leaving; a Ctrl-C or SIGTERM is no fault of whoever was marked."""
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminated) if in_main else None
    start = time.monotonic()
    child = subprocess.Popen(command, start_new_session=True)
    try:
        yield child
    except BaseException:
        _kill(child)
        mark.end(cut_s=round(time.monotonic() - start))
        raise
    finally:
        _kill(child)  # what the child started may outlive it
        if in_main:
            signal.signal(signal.SIGTERM, before)


def _watch(child: subprocess.Popen, mark: Mark, deadline: float) -> dict[str, Any]:
    """Waits for the end, or brings it about; what `Mark.end` writes."""
    seen, since = mark.read(), time.monotonic()
    limit_s = START_LIMIT_S  # what is there still is the last child's
    while True:
        try:
            status = child.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            pass
        else:
            return {"status": status, "reason": _reason(status)}
        now = mark.read()
        if now != seen:
            seen, since, limit_s = now, time.monotonic(), now.get("limit_s", START_LIMIT_S)
        waited = time.monotonic() - since
        if time.time() > deadline:
            _kill(child)
            return {"cut_s": round(waited)}
        if waited > limit_s:
            _kill(child)
            return {"status": child.returncode, "reason": f"hung for {waited:.0f} s; its process was killed"}


def _reason(status: int) -> str:
    if status >= 0:
        return "a fault in the CUDA context" if status == AGAIN else f"its process ended with exit status {status}"
    try:
        return f"its process was killed by signal {-status} ({signal.Signals(-status).name})"
    except ValueError:
        return f"its process was killed by signal {-status}"


def _kill(child: subprocess.Popen) -> None:
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass  # nobody of the group is left
    child.wait()


def _terminated(number: int, _: object) -> None:
    raise SystemExit(128 + number)
