"""Environments that hold nothing but what the package declares, made of what is installed here."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tree import ROOT


def declared(extra: str = "") -> list[Requirement]:
    """What pyproject.toml declares, without its extras or of one of them."""
    # Not by tomllib, which Python 3.10 lacks.
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(rf"^{extra or 'dependencies'} = \[(.*?)\]$", project, re.M | re.S)[1]
    return [Requirement(text) for text in re.findall(r'"([^"]+)"', listed)]


def closure(requirements: Iterable[Requirement]) -> dict[str, importlib.metadata.Distribution]:
    """What pip would install for them, from what is installed here."""
    found: dict[str, importlib.metadata.Distribution] = {}
    left = list(requirements)
    while left:
        requirement = left.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        found[name] = importlib.metadata.distribution(name)
        left += map(Requirement, found[name].requires or ())
    return found


def expose(folder: Path, requirements: Iterable[Requirement]) -> None:
    """Links to these packages and what they require, and to nothing beside them: gigabytes are not copied."""
    folder.mkdir(exist_ok=True)
    for distribution in closure(requirements).values():
        tops = {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}
        assert tops, f"nothing is known of the files of {distribution.name}"
        for top in tops:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(distribution.locate_file(top)).resolve())


class Environment:
    """A virtual environment without pip and setuptools, which sees what `expose` is told."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.python = folder, folder / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        (self.site,) = folder.glob("lib/python*/site-packages")
        assert not list(self.site.iterdir()), "this Python brings packages"
        (self.site / "exposed.pth").write_text(f"{folder / 'exposed'}\n")
        self.expose(declared())
        # Nothing of the caller: neither the checkout, nor pip's and this package's settings.
        self.variables = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "RES2NET_FUSED_"))} | {
            "PIP_CONFIG_FILE": os.devnull,
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        }

    def expose(self, requirements: Iterable[Requirement]) -> None:
        expose(self.folder / "exposed", requirements)

    def pip(self, *arguments: object, **variables: str) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.python), "install", "--no-index", *map(str, arguments)]
        done = subprocess.run(pip, cwd=self.folder, env=self.variables | variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, *command: object, status: int = 0) -> subprocess.CompletedProcess[str]:
        words = [str(self.folder / "bin" / str(command[0])), *map(str, command[1:])]
        done = subprocess.run(words, cwd=self.folder, env=self.variables, capture_output=True, text=True)
        assert done.returncode == status, done.stdout + done.stderr
        return done
