"""A record that grows over several calls: rows merged by key, failures, who runs; written whole after every case."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..backends.choices_file import unused
from . import results
from .supervise import Mark

# What must not change within one record. Threads matter to a CPU only; `native` says which libraries were loaded.
_SAME = ("device", "torch", "triton", "cuda", "commit", "native", "quick", "choice")
_KEY = ("workload", "config", "stage", "variant", "batch", "dtype", "device", "provider", "graph")
_DEFAULTS = {"variant": "normal", "graph": False}  # of rows that `res2net-fused bench` wrote

Row = dict[str, Any]


def row_key(row: Row) -> tuple[object, ...]:
    """What a row is about; a later row with the same key replaces it."""
    return tuple(row.get(field, _DEFAULTS.get(field)) for field in _KEY)


def different_fields(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The fields, with both values, that forbid rows of both environments in one record."""
    fields = [*_SAME, *([] if old.get("cuda") else ["threads"])]
    return [f"{f} is {old.get(f)!r} there and {new.get(f)!r} here" for f in fields if old.get(f) != new.get(f)]


class Record:
    """The rows at `path` and those that are added, by one process at a time. `environment` is that of this call.

    failures: by name (`failure_name`), why something went wrong. absent: by name, why it cannot run here. What has a row or
    stands in one of the two is not run again. A mark that an earlier process left is a failure from here on.
    """

    def __init__(self, path: Path, environment: dict[str, Any], again: bool = False) -> None:
        """again: begin anew; the file that is there is kept as <name>.before. ValueError where the rows come from another
        environment, the file cannot be read, or another process measures into it."""
        self.path, self.environment = path, environment
        self._rows: dict[tuple[object, ...], Row] = {}
        self.failures: dict[str, str] = {}
        self.absent: dict[str, str] = {}
        self._cut_off: dict[str, float] = {}  # by name, seconds after which the time of a call was up
        self._runs: list[dict[str, Any]] = []
        if path.exists() and not again:
            self._take(results.read(path))
        self._mark = Mark(path)
        self._mark.lock()
        if again:
            self._mark.clear()
            if path.exists():
                os.replace(path, before := unused(path, "before"))
                print(f"{path}, of other code, another machine or other options, is kept as {before}", flush=True)
        self._absorb(self._mark.read())

    def _take(self, old: dict[str, Any]) -> None:
        environment = old["environment"]
        different = different_fields(environment, self.environment)
        if different:
            raise ValueError(
                f"{self.path} was measured elsewhere or with other code ({'; '.join(different)}): name another file with "
                "--out, or replace it with --again"
            )
        self._rows = {row_key(row): row for row in old["rows"]}
        self.failures, self.absent = dict(environment.get("failures", {})), dict(environment.get("absent", {}))
        self._cut_off, self._runs = dict(environment.get("cut_off", {})), list(environment.get("runs", []))

    def _absorb(self, mark: dict[str, Any]) -> None:
        names, cut = mark.get("names", []), mark.get("cut_s")
        for name in names:
            if self.settled(name):
                continue  # the process that ended knew why
            if cut is None:
                self.failures[name] = mark.get("reason", "its process ended while it ran")
            elif name in self._cut_off:
                self.failures[name] = f"took all the time that was left, twice ({self._cut_off[name]} s, {cut} s)"
            else:
                self._cut_off[name] = cut
        if names:
            self.save()
            self._mark.clear()

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    @property
    def run(self) -> int:
        """Number of this run, from 1 on; ratios are taken between rows of one run."""
        return len(self._runs)

    def begin_run(self) -> None:
        """Note a new run; called by a process that measures, before its first row."""
        self._runs.append({"command": self.environment["command"]})

    def describe_run(self, **facts: object) -> None:
        """Adds facts about this run to the environment."""
        self._runs[-1].update(facts)

    def mark(self, *names: str, limit_s: float) -> None:
        """Who is about to run, or nobody: a failure if the process does not get to the next mark within limit_s seconds."""
        if names:
            self._mark.set(names, limit_s)
        else:
            self._mark.clear()

    @property
    def running(self) -> list[str]:
        """Who is marked."""
        return self._mark.read().get("names", [])

    def unmark(self) -> None:
        self.mark(limit_s=0)

    def settled(self, name: str) -> bool:
        """Whether it is known why there is no row."""
        return name in self.failures or name in self.absent

    def missing(self, keys: list[tuple[object, ...]], case: object) -> list[tuple[object, ...]]:
        """The keys among these that have neither a row nor a recorded reason."""
        return [key for key in keys if key not in self._rows and not self.settled(failure_name(case, key[-2], key[-1]))]

    def add(self, rows: Sequence[Row] = (), failures: Mapping[str, str] = {}, absent: Mapping[str, str] = {}) -> None:
        """Merges and writes, so that whatever happens next loses nothing."""
        self._rows.update((row_key(row), row) for row in rows)
        self.failures.update(failures)
        self.absent.update(absent)
        self.save()

    def retry(self) -> None:
        """Forgets why there is no row of those that have none."""
        for reasons in (self.failures, self.absent, self._cut_off):
            reasons.clear()

    def save(self) -> None:
        commands = list(dict.fromkeys(run["command"] for run in self._runs)) or [self.environment["command"]]
        extra = {
            "command": "; ".join(commands), "runs": self._runs, "failures": self.failures, "absent": self.absent,
            "cut_off": self._cut_off,
        }  # fmt: skip
        results.write(self.path, self.environment | extra, self.rows)

    def close(self) -> None:
        """Lets another process open it."""
        self._mark.close()


def failure_name(case: object, provider: object, graph: object) -> str:
    return f"{case}, {provider}{' in a CUDA graph' if graph else ''}"
