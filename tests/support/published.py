"""The files that `make wheels` makes: those in dist/ where they are of this very commit, else built by the test."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from helpers import tool
from tree import ROOT

RECORD = "res2net_fused/lib/build.json"


def wheel_in(folder: Path, platform: str) -> Path | None:
    """The wheel for a platform, if there is one."""
    return next(folder.glob(f"res2net_fused-*-py3-none-{platform}.whl"), None)


def built_before(platform: str) -> Path | None:
    """dist/, if its wheels for a platform and for any were made of this commit and nothing is changed since."""
    return ROOT / "dist" if all(_is_of_here(wheel_in(ROOT / "dist", name)) for name in (platform, "any")) else None


def _is_of_here(wheel: Path | None) -> bool:
    if wheel is None:
        return False
    with zipfile.ZipFile(wheel) as archive:
        made_of = json.loads(archive.read(RECORD))["info"]["commit"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    here = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return made_of == here and not here.endswith("-dirty")


def published(platform: str, folder: Path) -> Path:
    """dist/, or `folder` with the sdist and the wheels for the platform (without the CUDA library) and for any system."""
    if before := built_before(platform):
        return before
    for name in ("auditwheel", "twine", "ziglang"):
        tool(find_spec(name), name, "pip install 'res2net-fused[release]'")
    if not any(map(shutil.which, ("c++", "g++"))):
        pytest.skip("needs GCC")
    command = [sys.executable, "release/artefacts.py", "--platform", platform, "--platform", "any"]
    command += ["--out", str(folder)]
    environment = os.environ | {"RES2NET_FUSED_CUDA_ARCHS": "none"}
    lock = ROOT / "build" / ".published"
    lock.parent.mkdir(exist_ok=True)
    with lock.open("w") as held:  # two processes of tests share the build folder
        fcntl.flock(held, fcntl.LOCK_EX)
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder
