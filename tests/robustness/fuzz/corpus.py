"""The cases that fuzzing found, a JSON file beside this one: data, read as such, and run by every test run."""

from __future__ import annotations

import json
from pathlib import Path

from fuzz.cases import Case, from_json, to_json

FILE = Path(__file__).with_name("corpus.json")


def load() -> list[tuple[str, Case]]:
    """(why it is there, the case) of every record."""
    return [(record["why"], from_json(record)) for record in json.loads(FILE.read_text())]


def add(case: Case, why: str) -> bool:
    """Appends a case; False where it is there already."""
    records = json.loads(FILE.read_text())
    if any(from_json(record) == case for record in records):
        return False
    records.append({"why": why, **to_json(case)})
    FILE.write_text("[\n" + ",\n".join(f"  {json.dumps(record)}" for record in records) + "\n]\n")
    return True
