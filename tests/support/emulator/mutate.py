"""Removes each barrier, wait and commit of the CUDA kernels in turn; every removal must be noticed by the emulator.

python tests/support/emulator/mutate.py               all of them, as `make mutate` does
python tests/support/emulator/mutate.py --rotate 17   five of them, which ones depends on the number: for CI, that of the run
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from emulator import breaks  # noqa: E402

FIVE = 5


def rotated(items: list, start: int, count: int = FIVE) -> list:
    """`count` items from number `start * count` on, around the end."""
    return [items[(start * count + i) % len(items)] for i in range(min(count, len(items)))]


def noticed(removal: breaks.Removal) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        kinds = {"cluster": ("parts", "shared"), "wgmma": ("wgmma", "wgmma_images")}
        cases = kinds.get(removal.file.stem.partition("_")[0], ("strips", "stream", "added"))
        return breaks.red_checks(breaks.remove(Path(folder), removal), cases, enough=1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="mutate.py"
    )
    parser.add_argument("--rotate", type=int, metavar="NUMBER", help=f"run {FIVE} of them, another five for every number")
    parser.add_argument("--list", action="store_true", help="only list what would be removed")
    options = parser.parse_args(arguments)
    chosen = breaks.removals()
    if not chosen:
        print("no barrier, wait or commit was found under csrc/cuda")
        return 1
    if options.rotate is not None:
        chosen = rotated(chosen, options.rotate)
    missed = 0
    for removal in chosen:
        if options.list:
            print(removal)
            continue
        red = noticed(removal)
        missed += not red
        print(f"{'ok    ' if red else 'MISSED'} {removal}", *(f"\n       {k}: {v}" for k, v in red.items()), flush=True)
    if not options.list:
        print(f"{len(chosen) - missed} of {len(chosen)} removals noticed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
