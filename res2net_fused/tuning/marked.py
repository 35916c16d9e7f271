"""What is measured on a GPU, marked beside the user's table: what hangs, kills or poisons its process is measured once alone.

`res2net-fused tune --model` runs under `supervise`, which watches the marks; after `rf.tune` in anybody's process the next one
finds the mark that it left.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..backends.triton.tiles import user_path, write
from ..bench.record_file import Record
from ..bench.tune import open_record
from ..bench.turns import Outcome, noted
from .report import Settled


def record_beside_table(device: str) -> Record:
    """The record of what went wrong, beside the user's table. ValueError where another process measures into it."""
    table = user_path()
    if not table.exists():
        write(table, ())
    return open_record(table, device, "rf.tune")


@contextmanager
def marked(what: str, device: torch.device, limit_s: float) -> Iterator[Record]:
    """Marks `what`, and waits for the device at the end.

    Raises Settled where it failed, now or in an earlier process, or where another process measures; `turns.ContextLost` where
    nothing works on the device any more.
    """
    try:
        record = record_beside_table(str(device))
    except (OSError, ValueError) as error:
        raise Settled(f"not measured: {error}") from None
    try:
        if record.settled(what):
            raise Settled(f"{record.failures[what]}; {record.path} says so, and without it this is tried again")
        with noted(record, [what], Outcome(), limit_s):
            yield record
            torch.cuda.synchronize(device)
        if record.settled(what):
            raise Settled(record.failures[what])
    finally:
        record.unmark()
        record.close()
