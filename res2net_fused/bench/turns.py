"""Contenders that take turns under the eyes of a record: each is marked before it runs, and fails alone."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from .._timing import Contender, Name, Timing, measure
from ..testing.cuda_errors import poisons_context
from .record_file import Record, Row


class Absent(Exception):
    """A candidate that cannot run here, with the reason: no fault of anybody."""


class Wrong(Exception):
    """A result missed its bound: its candidate may not be timed."""


class ContextLost(RuntimeError):
    """Nothing that this process does on its device can be trusted any more; the fault is in the record."""


@dataclass
class Outcome:
    """Rows, and by name in the record what went wrong and what cannot run here."""

    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)

    def explains(self, name: str) -> bool:
        return name in self.failures or name in self.absent


class Marking(Mapping[Name, Contender]):
    """Contenders for `measure`; each is marked as running when it is handed out, which is before its time is taken."""

    def __init__(self, contenders: Mapping[Name, Contender], names: Mapping[Name, str], record: Record, limit_s: float) -> None:
        """names: in the record."""
        self._contenders, self._names, self._record, self._limit_s = contenders, names, record, limit_s
        self.current = next(iter(contenders))

    def __getitem__(self, key: Name) -> Contender:
        self.current = key
        self._record.mark(self._names[key], limit_s=self._limit_s)
        return self._contenders[key]

    def __iter__(self) -> Iterator[Name]:
        return iter(self._contenders)

    def __len__(self) -> int:
        return len(self._contenders)


@contextmanager
def noted(record: Record, names: Sequence[str], outcome: Outcome, limit_s: float) -> Iterator[None]:
    """Marks them as running, in the place of who is; what is raised is why there are no rows of those that have no reason of
    their own yet. Raises ContextLost alone."""
    before = record.running
    record.mark(*names, limit_s=limit_s)
    try:
        yield
    except ContextLost:
        raise
    except Absent as error:
        outcome.absent |= dict.fromkeys(names, str(error))
    except Exception as error:  # a peer's compiler may raise anything
        text = str(error).strip()[:300]
        reason = text if isinstance(error, Wrong) else f"{type(error).__name__}: {text}"
        outcome.failures |= {name: reason for name in names if not outcome.explains(name)}
        record.add(failures=outcome.failures, absent=outcome.absent)
        if poisons_context(error):
            raise ContextLost(reason) from error
        traceback.clear_frames(error.__traceback__)  # which hold what did not fit into memory
        gc.collect()
    record.mark(*before, limit_s=limit_s)


def take_turns(
    contenders: Mapping[Name, Contender],
    names: Mapping[Name, str],
    record: Record,
    outcome: Outcome,
    device: str,
    limit_s: float,
    options: Mapping[str, Any],
) -> dict[Name, Timing]:
    """Times all of them together; who fails is left out, and the others begin anew. options: of `measure`."""
    left = dict(contenders)
    while left:
        marking = Marking(left, names, record, limit_s)
        error: Exception
        try:
            return measure(marking, device, **options)
        except Exception as caught:
            error = caught
        with noted(record, [names[marking.current]], outcome, limit_s):
            raise error
        del left[marking.current]
    return {}
