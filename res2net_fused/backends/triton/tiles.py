"""Tiles by shape, in the table that `res2net-fused tune` writes for this machine.

They lie in the file of `backends/choices_file.py`, in a list of their own; RES2NET_FUSED_TILES names another file, of that
kind or of the older one, {"rows": [...]}. A row holds a kernel ("step", "pointwise"), the GPU's compute capability ("9.0"), a
class of dtypes ("half", "tf32", "ieee"), the shape (width: output channels, inputs: input channels, pixels: of one launch,
times its independent convolutions) and the tile ([block_m, block_n, block_k, warps, stages]). The row nearest in shape
answers; where no row is near, the rule in `step_plan` or `pointwise` decides. No table ships, since none was measured.
Where RES2NET_FUSED_CHOICE asks for what is predicted, only a file that RES2NET_FUSED_TILES names is looked at.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import choices, choices_file

ENVIRONMENT_VARIABLE = "RES2NET_FUSED_TILES"
KERNELS = ("step", "pointwise")
DTYPE_CLASSES = ("half", "tf32", "ieee")
# Farther apart than these factors, two shapes say nothing about each other.
_NEAR = {"width": 1.3, "inputs": 2.0, "pixels": 4.0}
_BLOCKS = (16, 32, 64, 128, 256)
MIN_BLOCK = _BLOCKS[0]
_MOST = 2**63 - 1  # of a row's numbers: their ratios must be floats
_log = logging.getLogger("res2net_fused")


@dataclass(frozen=True)
class Tile:
    """One program computes block_m pixels x block_n output channels, block_k products of a tap at a time."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name in ("block_m", "block_n", "block_k", "warps", "stages"):
            if type(getattr(self, name)) is not int:  # 64.0 and True are in the lists below
                raise ValueError(f"{name} is {getattr(self, name)!r}; a whole number is needed")
        for name in ("block_m", "block_n", "block_k"):
            if getattr(self, name) not in _BLOCKS:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed are {', '.join(map(str, _BLOCKS))}")
        if self.warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"warps is {self.warps!r}; allowed are 1, 2, 4, 8, 16")
        if self.stages not in range(1, 9):
            raise ValueError(f"stages is {self.stages!r}; allowed are 1 to 8")


@dataclass(frozen=True)
class Shape:
    """What a tile is looked up by; see the top of this file."""

    kernel: str
    capability: tuple[int, int]
    dtype: str
    width: int
    inputs: int
    pixels: int

    def distance(self, other: Shape) -> float:
        """Sum of the logarithms of the ratios; infinite where the kinds differ or a ratio is too large."""
        if (self.kernel, self.capability, self.dtype) != (other.kernel, other.capability, other.dtype):
            return math.inf
        total = 0.0
        for name, near in _NEAR.items():
            ratio = abs(math.log(getattr(self, name) / getattr(other, name)))
            if ratio > math.log(near):
                return math.inf
            total += ratio
        return total


@dataclass(frozen=True)
class Row:
    shape: Shape
    tile: Tile


@dataclass(frozen=True, eq=False)
class Table:
    """Rows that were read at once; what was planned by one object holds as long as `table` returns it."""

    rows: tuple[Row, ...]


def dtype_class(itemsize: int, precision: str) -> str:
    """Name what tiles depend on: "half" for two bytes, else the precision of the products, as `tl.dot` names it."""
    return "half" if itemsize == 2 else precision


def lookup(shape: Shape) -> Tile | None:
    """Return the tile of the nearest row, or None where no row is near."""
    return _nearest(table(), shape)


@functools.lru_cache(maxsize=4096)
def _nearest(table: Table, shape: Shape) -> Tile | None:
    nearest = min(table.rows, key=lambda row: shape.distance(row.shape), default=None)
    return None if nearest is None or shape.distance(nearest.shape) == math.inf else nearest.tile


def user_path() -> Path:
    """The user's table: RES2NET_FUSED_TILES, else that of all measurements. RuntimeError where there is no folder for it."""
    return Path(os.environ.get(ENVIRONMENT_VARIABLE) or choices_file.user_path())


def read(path: Path) -> list[Row]:
    """Reads a table; ValueError naming the file, the row and the field where it is none, OSError where it cannot be read."""
    try:
        data = json.loads(path.read_text())
        if isinstance(data, dict) and "version" in data:
            return [_parse(row, i) for i, row in enumerate(choices_file.read(path).tiles)]
        if not isinstance(data, dict) or not isinstance(data.get("rows"), list):
            raise ValueError("an object with 'rows' (a list) is needed")
        return [_parse(row, i) for i, row in enumerate(data["rows"])]
    except (ValueError, RecursionError) as error:
        remedy = "delete it, or write it anew with `res2net-fused tune`"
        raise ValueError(f"{path} is no table of tiles: {error}; {remedy}") from None


def write(path: Path, rows: Sequence[Row]) -> None:
    """Writes a table in place of the tiles that the file has; a reader never sees half of it."""
    tiles = tuple(
        {
            "kernel": row.shape.kernel,
            "capability": "{}.{}".format(*row.shape.capability),
            "dtype": row.shape.dtype,
            "width": row.shape.width,
            "inputs": row.shape.inputs,
            "pixels": row.shape.pixels,
            "tile": [row.tile.block_m, row.tile.block_n, row.tile.block_k, row.tile.warps, row.tile.stages],
        }
        for row in rows
    )
    choices_file.update(path, lambda old: choices_file.Contents(old.choices, tiles))
    forget()


def forget() -> None:
    """Reads the user's table again at the next look-up."""
    _users_table.cache_clear()
    _nearest.cache_clear()


def merge(old: Sequence[Row], new: Sequence[Row]) -> list[Row]:
    """All rows, where both have a shape the new one."""
    return list({row.shape: row for row in (*old, *new)}.values())


def _parse(row: object, i: int) -> Row:
    if not isinstance(row, dict):
        raise ValueError(f"rows[{i}] is a {type(row).__name__}, not an object")
    numbers: list[Any] = [row.get(name) for name in ("width", "inputs", "pixels")]
    tile, capability = row.get("tile"), row.get("capability")
    for name, value in zip(("width", "inputs", "pixels"), numbers, strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MOST:
            raise ValueError(f"rows[{i}] has {name}={value!r:.99}; a whole number from 1 to {_MOST} is needed")
    if row.get("kernel") not in KERNELS or row.get("dtype") not in DTYPE_CLASSES:
        raise ValueError(f"rows[{i}] has kernel={row.get('kernel')!r}, dtype={row.get('dtype')!r}")
    parts = capability.split(".") if isinstance(capability, str) else []
    if len(parts) != 2 or not all(part.isdecimal() for part in parts):
        raise ValueError(f"rows[{i}] has capability={capability!r}; such as '9.0' is needed")
    if not isinstance(tile, list) or len(tile) != 5:
        raise ValueError(f"rows[{i}] has tile={tile!r}; [block_m, block_n, block_k, warps, stages] is needed")
    try:
        return Row(Shape(row["kernel"], (int(parts[0]), int(parts[1])), row["dtype"], *numbers), Tile(*tile))
    except ValueError as error:
        raise ValueError(f"rows[{i}]: {error}") from None


_NOTHING = Table(())


def table() -> Table:
    """What answers: the user's table, read once, or nothing; another object once it was read again."""
    predicted = choices.mode() == "predicted" and not os.environ.get(ENVIRONMENT_VARIABLE)
    return _NOTHING if predicted else _users_table()


@functools.cache
def _users_table() -> Table:
    try:
        return Table(tuple(read(user_path())))
    except FileNotFoundError:
        pass  # nothing was tuned
    except (OSError, RuntimeError, ValueError) as error:
        _log.warning("tuned tiles are not used: %s", error)
    return Table(())
