"""Instructions of the CUDA chain kernels, counted in their machine code: what a step's end, a copy and a product cost a warp.

    ... HMMA ... HMMA               the main loop: from its first instruction to the branch back, one turn
    ... LDGSTS (a copy) ... BRA     the loop around a copy into shared memory: that of 8 bytes, of which weights have none; the
                                    first one in the code is of weights, unless they are copied in bulk (UBLKCP)
    HMNMX2 ... HMNMX2               clamps: those of a half tile of 8 positions come together; from its first one to that of the
    STG ... LDS ... STS             next half tile lie the instructions of one

They are those that the compiler wrote, paths that are not taken included; none of it is a measurement.
"""

from __future__ import annotations

import re
import statistics
import subprocess
from dataclasses import dataclass
from pathlib import Path

_FUNCTION = re.compile(r"Function : (\S+)(.*?)(?=Function :|\Z)", re.S)
_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_PRODUCT, _CLAMP = re.compile(r"\bHG?MMA\."), re.compile(r"\b(FMNMX|HMNMX2)\b")
_COPY = re.compile(r"\bLDGSTS\.E\.64\b")  # of x: weights are copied by 16
_ANY_COPY, _BULK_COPY = re.compile(r"\bLDGSTS\b"), re.compile(r"\bUBLKCP\b")
_BRANCH = re.compile(r"\bBRA\b.*?0x([0-9a-f]+)")
_BYTES = 16  # of an instruction


@dataclass(frozen=True)
class Counts:
    """Instructions of one function.

    half_tile: of the end of a step for 8 positions and all columns of a warp, in the cluster kernel without what adds up sums.
    copy: of one copy of x, in the loop of a step; the loops of 4, 8 and 16 bytes differ in nothing else.
    weights: of one copy of 16 bytes of weights; 0 where one thread copies them in bulk.
    turn: of one turn of the main loop.
    """

    half_tile: int
    copy: int
    weights: int
    turn: int


def functions(file: Path, cuobjdump: str) -> dict[tuple[str, str], str]:
    """The machine code in a library or a fat binary, by architecture, such as "sm_90a", and mangled name of the function."""
    text = subprocess.run([cuobjdump, "-sass", str(file)], capture_output=True, text=True, check=True).stdout
    found = {}
    for part in re.split(r"^arch = ", text, flags=re.M)[1:]:
        architecture = part.split(maxsplit=1)[0]
        found.update({(architecture, symbol): code for symbol, code in _FUNCTION.findall(part)})
    return found


def counts(code: str, tiles: int) -> Counts:
    """code: of a chain kernel. tiles: that a warp finishes one behind the other, of two half tiles each."""
    instructions = [(int(address, 16), what) for address, what in _INSTRUCTION.findall(code)]
    products = [address for address, what in instructions if _PRODUCT.search(what)] or [0]
    copies = [address for address, what in instructions if _COPY.search(what)]
    bulk = any(_BULK_COPY.search(what) for _, what in instructions)
    weights = [] if bulk else [address for address, what in instructions if _ANY_COPY.search(what)][:1]
    clamps = [address for address, what in instructions if address > products[-1] and _CLAMP.search(what)]
    loops = []
    for address, what in instructions:
        branch = _BRANCH.search(what)
        if branch is not None and int(branch[1], 16) <= address:
            loops.append((int(branch[1], 16), address))
    firsts = clamps[:: max(1, len(clamps) // (2 * tiles))]
    half_tiles = [(b - a) // _BYTES for a, b in zip(firsts, firsts[1:], strict=False)]
    half_tile = round(statistics.median(half_tiles or [0]))
    return Counts(half_tile, *(_around(loops, addresses) for addresses in (copies, weights, products)))


def _around(loops: list[tuple[int, int]], addresses: list[int]) -> int:
    """Instructions of the innermost loop around the last of them; 0 where there is none."""
    sizes = [(last - first) // _BYTES + 1 for first, last in loops if addresses and first <= addresses[-1] <= last]
    return min(sizes, default=0)
