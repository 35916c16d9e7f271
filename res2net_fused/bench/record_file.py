"""A record that grows over several calls: rows merged by key, one environment, written whole after every case."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from . import results

# What must not change within one record. Threads matter to a CPU only; `native` says which libraries were loaded.
_SAME = ("device", "torch", "triton", "cuda", "commit", "native", "quick")
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


def folder_name(device_name: str) -> str:
    """Of a device under benchmarks/results: "NVIDIA H200" -> "nvidia-h200"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


class Record:
    """The rows at `path` and those that are added. `environment` is that of this call."""

    def __init__(self, path: Path, environment: dict[str, Any], again: bool = False) -> None:
        """again: forget the rows that are there. ValueError where they come from another environment."""
        self.path, self.environment = path, environment
        self._rows: dict[tuple[object, ...], Row] = {}
        self.failures: dict[str, str] = {}  # by unit and provider, the reason
        self._runs: list[dict[str, Any]] = []
        if path.exists() and not again:
            old = results.read(path)
            different = different_fields(old["environment"], environment)
            if different:
                raise ValueError(
                    f"{path} was measured elsewhere or with other code ({'; '.join(different)}): name another file with --out, "
                    "or replace it with --again"
                )
            self._rows = {row_key(row): row for row in old["rows"]}
            self.failures = dict(old["environment"].get("failures", {}))
            self._runs = list(old["environment"].get("runs", []))
        self._runs.append({"command": environment["command"]})

    @property
    def rows(self) -> list[Row]:
        return list(self._rows.values())

    @property
    def run(self) -> int:
        """Number of this call; ratios are taken between rows of one run."""
        return len(self._runs)

    def describe_run(self, **facts: object) -> None:
        """Adds facts about this call to the environment."""
        self._runs[-1].update(facts)

    def missing(self, keys: list[tuple[object, ...]], unit: object) -> list[tuple[object, ...]]:
        """Of these keys those that have neither a row nor a recorded failure."""
        return [key for key in keys if key not in self._rows and failure_name(unit, key[-2], key[-1]) not in self.failures]

    def add(self, rows: list[Row], failures: dict[str, str]) -> None:
        """Merges and writes, so that whatever happens next loses nothing."""
        self._rows.update((row_key(row), row) for row in rows)
        self.failures.update(failures)
        self.save()

    def save(self) -> None:
        commands = list(dict.fromkeys(run["command"] for run in self._runs))
        extra = {"command": "; ".join(commands), "runs": self._runs, "failures": self.failures}
        results.write(self.path, self.environment | extra, self.rows)


def failure_name(unit: object, provider: object, graph: object) -> str:
    return f"{unit}, {provider}{' in a CUDA graph' if graph else ''}"
