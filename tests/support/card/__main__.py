"""Runs a command on a stand-in card: `python -m card --card H100 --count 2 -- res2net-fused check --quick`."""

from __future__ import annotations

import argparse
import subprocess
import sys

from . import CARDS, LAUNCH, Settings, environment


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m card", description=__doc__)
    parser.add_argument("--card", choices=CARDS, default="H100")
    parser.add_argument("--count", type=int, default=1, help="how many of them (default: 1)")
    parser.add_argument("--launch", choices=LAUNCH, default="reference", help="what a launch does (default: reference)")
    parser.add_argument("--compile", action="store_true", help="compile Triton's kernels for the card")
    parser.add_argument("--no-cuda-library", action="store_true", help="without the CUDA operator library")
    parser.add_argument("--batch", type=int, default=1, help="by how much larger a batch plans see; above 1 work is cut")
    parser.add_argument("--faults", default="", help="see faults.py")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="behind --")
    o = parser.parse_args(arguments)
    settings = Settings(o.card, o.count, o.launch, o.compile, not o.no_cuda_library, o.batch)
    command = o.command[1:] if o.command[:1] == ["--"] else o.command
    return subprocess.run(command, env=environment(settings, o.faults)).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
