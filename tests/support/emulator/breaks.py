"""Breaks the chain kernel in one place and says which checks turn red."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from . import harness
from .harness import Case

# Statements that order memory accesses. Each stands on a line of its own in the kernel.
_NAMES = r"sync_cta|sync_warp|cluster_arrive|cluster_wait|copy_async_wait|copy_async_commit|proxy_fence|products_\w+"
_NAMES += r"|predecessor_wait|successor_begin|arrival_signal|arrival_init|arrival_expect|arrival_wait(?:_remote|_together)?"
ORDERING = re.compile(rf"^\s*({_NAMES})\(.*\);")
FLAGS = (*harness.KERNEL_FLAGS, "-w")
_STRIP = {"whole": 0, "images": 1}
_WHOLE = {"whole": 1, "slices": 9, "stages": 2}
_CLUSTER = {"instance": harness.INSTANCES.index("cluster_c2t2"), "images": 1, "warps_n": 1}
# Weights that stay and weights that stream; one CTA for a part of an image, and for several images.
CASES = {
    "strips": Case(26, 4, 2, 9, 7, tile=_STRIP | {"rows": 4, "columns": 7, "warps_m": 3, "slices": 18, "stages": 2}),
    "stream": Case(26, 4, 1, 7, 11, tile=_STRIP | {"rows": 3, "columns": 4, "warps_m": 2, "slices": 6, "stages": 3}),
    "images": Case(26, 4, 3, 5, 6, tile=_WHOLE | {"images": 2, "rows": 5, "columns": 6, "warps_m": 2}),
    "padded": Case(26, 4, 1, 5, 6, pad=6),
    "stage": Case(26, 4, 1, 7, 9, settings={"hierarchical": False, "pool": "avg3", "stride": 2}),
    # 8 bytes a copy: the thread that adds is not the one that copied
    "added": Case(28, 4, 1, 9, 7, settings={"passthrough": "first_added"}, tile=_STRIP | {"rows": 4, "columns": 7}),
    "odd": Case(27, 3, 1, 5, 6, torch.float32),
    # As on devices without bulk copies.
    "older": Case(26, 4, 1, 7, 11, tile=_STRIP | {"rows": 3, "columns": 4, "warps_m": 2, "slices": 6, "stages": 3}),
    # The wgmma kernel: weights that stream through two warpgroups, and weights that stay, for several images.
    "wgmma": Case(52, 3, 1, 9, 13, wgmma=True, tile=_STRIP | {
        "instance": harness.INSTANCES.index("wgmma_c7t2"), "rows": 8, "columns": 13, "warps_m": 8, "warps_n": 1, "slices": 12,
        "stages": 2,
    }),
    "wgmma_images": Case(50, 4, 3, 5, 6, wgmma=True, tile=_WHOLE | {
        "instance": harness.INSTANCES.index("wgmma_c7t2"), "images": 2, "rows": 5, "columns": 6, "warps_m": 4, "warps_n": 1,
        "slices": 36,
    }),
    "w14": Case(14, 8, 1, 5, 17, tile=_STRIP | {"rows": 2, "columns": 9, "warps_m": 4, "slices": 3, "stages": 4}),
    # The cluster kernel: rows and channels shared, and several passes of warps that share their sums; then weights that
    # stream, and whole images whose channels are shared.
    "parts": Case(26, 4, 1, 9, 11, clusters=True, tile=_CLUSTER | {
        "whole": 0, "rows": 5, "columns": 11, "row_parts": 2, "channel_parts": 2, "warps_m": 1, "warps_k": 2,
        "slices": 18, "stages": 2,
    }),
    "shared": Case(26, 4, 1, 5, 6, clusters=True, tile=_CLUSTER | _WHOLE | {
        "rows": 5, "columns": 6, "row_parts": 1, "channel_parts": 2, "warps_m": 2, "warps_k": 3, "stages": 3,
    }),
}  # fmt: skip


@dataclass(frozen=True)
class Removal:
    """One ordering statement that is to be removed. line: counted from 1."""

    file: Path  # under csrc/
    line: int
    statement: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.statement}"


def removals(csrc: Path = harness.ROOT / "csrc") -> list[Removal]:
    """Every barrier, wait and commit of the kernels under csrc/cuda; their definitions in hardware.h are none."""
    found = []
    for path in sorted((csrc / "cuda").rglob("*.cuh")):
        for number, text in enumerate(path.read_text().splitlines(), 1):
            if ORDERING.match(text):
                found.append(Removal(path.relative_to(csrc), number, text.strip().partition("//")[0].strip()))
    return found


def broken_copy(folder: Path, file: Path, edit) -> Path:
    """A copy of csrc/ in `folder` with `edit` applied to the text of one file."""
    csrc = folder / "csrc"
    for part in ("cuda/plan", "cuda/chain"):
        shutil.copytree(harness.ROOT / "csrc" / part, csrc / part)
    path = csrc / file
    path.write_text(edit(path.read_text()))
    return csrc


def remove(folder: Path, removal: Removal) -> Path:
    def edit(text: str) -> str:
        lines = text.splitlines()
        assert removal.statement in lines[removal.line - 1]
        lines[removal.line - 1] = ""  # an empty line keeps the numbers of the others
        return "\n".join(lines) + "\n"

    return broken_copy(folder, removal.file, edit)


def red_checks(csrc: Path, cases: tuple[str, ...], seeds: int = 6, enough: int = 10**6) -> dict[str, str]:
    """What turns red with the kernel under `csrc`, and the first finding of each kind; stops at `enough` kinds.

    "varies": different orders of the threads give different results.
    """
    red: dict[str, str] = {}
    for name in cases:
        outputs, flags = set(), (*harness.OLDER_CODE, "-w") if name == "older" else FLAGS
        for seed in range(seeds):
            for kind, first in harness.check(CASES[name], seed=seed, csrc=csrc, flags=flags, outputs=outputs).items():
                red.setdefault(kind, f"{name}: {first}")
            if len(red) >= enough:
                return red
        if len(outputs) > 1:
            red.setdefault("varies", f"{name}: {len(outputs)} different results from {seeds} orders")
    return red
