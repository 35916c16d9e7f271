"""The virtual environments in build/ in which `make peers` runs other libraries, beside the packages of this interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_in(name: str, packages: Sequence[str], script: str, *arguments: str) -> int:
    """The exit status of a script in the environment of that name, made with these packages, or 2 where they cannot be had."""
    folder = ROOT / "build" / name
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        venv.create(folder, with_pip=True, clear=True)
        own = Path(sysconfig.get_paths(vars={"base": str(folder), "platbase": str(folder)})["purelib"])
        (own / "outer.pth").write_text(f"import site; site.addsitedir({sysconfig.get_paths()['purelib']!r})\n")
        # Without their dependencies, which name older versions of what is there.
        if subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *packages]).returncode:
            print(f"peers: {name} cannot be installed", file=sys.stderr)
            return 2
        (folder / "installed").touch()
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.run([python, script, *arguments], env={**os.environ, "PYTHONPATH": paths}).returncode
