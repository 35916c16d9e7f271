"""The file in which this user's measurements are kept, for all of his machines: choices by call, and tiles of Triton's kernels.

JSON, {"version": 1, "choices": [...], "tiles": [...]}, read as data. Several processes may write at once: each merges under a
lock what it has measured into what is there, and replaces the file whole.

RES2NET_FUSED_CHOICES names another file than choices.json in the user's cache folder.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from filelock import FileLock  # which PyTorch depends on

PATH_VARIABLE = "RES2NET_FUSED_CHOICES"
VERSION = 1
OWN = "own"  # the block's own forward
_CHOICE = re.compile(r"own|reference|triton|cuda(:[1-9])?|cpu(:direct|:winograd)?")
_LONGEST = 2000  # characters of a text
_MOST = 2**63 - 1
_LOCK_S = 30.0  # for which another process may write


@dataclass(frozen=True)
class Row:
    """What was measured of one kind of call at one size.

    machine: on which, with the versions of all that computes. call: the kind of call, all but its size. size: (N, H, W), or
    (N, L). choice: the fastest of those whose results were right. ms: what each took. errors: against float64, in the norm.
    """

    machine: str
    call: str
    size: tuple[int, ...]
    choice: str
    ms: dict[str, float] = field(hash=False)
    errors: dict[str, float] = field(hash=False)

    @property
    def key(self) -> tuple[str, str, tuple[int, ...]]:
        return self.machine, self.call, self.size


@dataclass(frozen=True)
class Contents:
    """What a file holds. tiles: rows of backends/triton/tiles.py, not looked into here."""

    choices: tuple[Row, ...] = ()
    tiles: tuple[Any, ...] = ()


def user_path() -> Path:
    """The user's file: RES2NET_FUSED_CHOICES, else in the cache folder. RuntimeError where there is no such folder."""
    chosen = os.environ.get(PATH_VARIABLE)
    if chosen:
        return Path(chosen)
    cache: str | Path | None = os.environ.get("XDG_CACHE_HOME")
    if not cache:
        try:
            cache = Path.home() / ".cache"
        except RuntimeError as error:  # a user without an entry or HOME, as in containers
            raise RuntimeError(f"no folder for what is measured ({error}): set {PATH_VARIABLE} to a file") from None
    return Path(cache, "res2net_fused", "choices.json")


def read(path: Path) -> Contents:
    """Reads a file; ValueError naming the row and the field where it is damaged or of another version, OSError."""
    try:
        data = json.loads(path.read_text())
        if not isinstance(data, dict) or "version" not in data:
            raise ValueError("an object with 'version' is needed")
        if data["version"] != VERSION:
            raise ValueError(f"version is {data['version']!r:.99}; this package reads version {VERSION}")
        rows, tiles = data.get("choices", []), data.get("tiles", [])
        if not isinstance(rows, list) or not isinstance(tiles, list):
            raise ValueError("'choices' and 'tiles' must be lists")
        return Contents(tuple(_parse(row, i) for i, row in enumerate(rows)), tuple(tiles))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no table of choices: {error}; delete it, or write it anew with rf.tune") from None


def update(path: Path, change: Callable[[Contents], Contents]) -> Contents:
    """Replaces what the file holds by what `change` makes of it, under a lock; what cannot be read is kept beside it.

    An older table, of tiles alone, is replaced too: who changes it has read it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(path.name + ".lock"), timeout=_LOCK_S):
        try:
            before = read(path)
        except FileNotFoundError:
            before = Contents()
        except ValueError:
            if not _is_older(path):
                path.replace(unused(path, "unreadable"))
            before = Contents()
        after = change(before)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        lines = [json.dumps(_as_json(row)) for row in after.choices]
        tiles = [json.dumps(tile) for tile in after.tiles]
        partial.write_text(
            f'{{"version": {VERSION},\n"choices": [\n' + ",\n".join(lines) + '\n],\n"tiles": [\n' + ",\n".join(tiles) + "\n]}\n"
        )
        partial.replace(path)
        return after


def _is_older(path: Path) -> bool:
    try:
        data = json.loads(path.read_text())
    except (ValueError, RecursionError):
        return False
    return isinstance(data, dict) and "rows" in data and "version" not in data


def unused(path: Path, ending: str) -> Path:
    """A name beside the file, with this ending or a number more, that nothing has: what is put aside there loses nothing."""
    names = (path.with_name(f"{path.name}.{ending}{i or ''}") for i in itertools.count())
    return next(name for name in names if not name.exists())


def merged(old: Sequence[Row], new: Sequence[Row]) -> tuple[Row, ...]:
    """All rows, where both have a call of a size the new one."""
    return tuple({row.key: row for row in (*old, *new)}.values())


def _as_json(row: Row) -> dict[str, Any]:
    return {f.name: getattr(row, f.name) for f in fields(row)}  # a size becomes a list


def _parse(row: object, i: int) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"choices[{i}] is a {type(row).__name__}, not an object")
    for name in ("machine", "call", "choice"):
        if not isinstance(row.get(name), str) or len(row[name]) > _LONGEST:
            raise ValueError(f"choices[{i}] has {name}={row.get(name)!r:.99}; a text is needed")
    if _CHOICE.fullmatch(row["choice"]) is None:
        raise ValueError(f"choices[{i}] has choice={row['choice']!r:.99}; 'own' or a backend is needed")
    size = row.get("size")
    if not isinstance(size, list) or not 2 <= len(size) <= 3 or not all(type(n) is int and 1 <= n <= _MOST for n in size):
        raise ValueError(f"choices[{i}] has size={size!r:.99}; two or three whole numbers from 1 are needed")
    for name in ("ms", "errors"):
        values = row.get(name)
        if not isinstance(values, dict) or not all(map(_is_figure, values.values())) or not all(map(_CHOICE.fullmatch, values)):
            raise ValueError(f"choices[{i}] has {name}={values!r:.99}; numbers by the names of choices are needed")
    if row["choice"] not in row["ms"]:
        raise ValueError(f"choices[{i}] has no time of its choice, {row['choice']}")
    return Row(row["machine"], row["call"], tuple(size), row["choice"], dict(row["ms"]), dict(row["errors"]))


def _is_figure(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
