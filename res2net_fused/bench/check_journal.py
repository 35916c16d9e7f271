"""What a check found, in a file that outlives the process that compares: one JSON object a line, beside its mark."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..testing.parity import Compared, ParityReport, ParityRow, Watch, failed_row
from .supervise import Mark


class Journal(Watch):
    """Marks each comparison before it is made, and writes every row at once. A mark that is left is a failure of its row.

    report: all rows so far. finished: the cases and networks that are at their end.
    """

    def __init__(self, path: Path, limit_s: float) -> None:
        """limit_s: for one comparison, after which the process counts as hanging."""
        super().__init__()
        self.path, self._limit_s = path, limit_s
        self.report, self.finished = ParityReport(), set[str]()
        for line in path.read_text().splitlines() if path.exists() else []:
            self._take(json.loads(line))
        self._mark = Mark(path)
        self._mark.lock()
        left = self._mark.read()
        for name in left.get("names", []) if "cut_s" not in left else ():  # a Ctrl-C is no fault of whoever was marked
            workload, config, stage, batch, backend, dtype = json.loads(name)
            what = workload, config, stage, batch, backend, dtype
            if self.begins(what):  # else the process that ended knew why
                self.found([failed_row(what, left.get("reason", "its process ended while it ran"))])
        self._mark.clear()

    def _take(self, line: dict[str, Any]) -> None:
        if "row" in line:
            self.report.append(ParityRow(**line["row"]))
            return
        self.finished.add(line["done"])
        if line["unchecked"]:
            self.report.unchecked[line["done"]] = line["unchecked"]

    def _write(self, line: dict[str, Any]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._take(line)

    def begins(self, what: Compared) -> bool:
        if any(row.compared == what for row in self.report):
            return False
        self._mark.set([json.dumps(what)], self._limit_s)
        return True

    def found(self, rows: Sequence[ParityRow]) -> None:
        for row in rows:
            self._write({"row": asdict(row)})

    def done(self, what: str, unchecked: str = "") -> None:
        self._write({"done": what, "unchecked": unchecked})
        self._mark.clear()
        super().done(what, unchecked)

    def close(self) -> None:
        """Lets go of the mark, which goes where nobody is marked."""
        self._mark.close()
