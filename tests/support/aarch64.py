"""An aarch64 Python with PyTorch on x86-64: Debian's Python under QEMU, PyPI's torch, and what stands for CUDA's libraries.

PyPI's torch is for CUDA on aarch64 too, and its import needs those libraries, two gigabytes of which nothing here runs: one
library defines their functions, which all return 0.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from clean_environment import expose
from packaging.requirements import Requirement

TOOLS = {"qemu-aarch64-static": "qemu-user-static", "aarch64-linux-gnu-gcc": "g++-aarch64-linux-gnu", "readelf": "binutils",
         "apt-get": "apt", "dpkg-deb": "dpkg"}  # fmt: skip
KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
PROCESSOR = """Features : fp asimd
CPU implementer : 0x41
CPU architecture: 8
CPU variant : 0x3
CPU part : 0xd0c
CPU revision : 1
"""  # a Neoverse N1, which the emulator is told to be
PACKAGES = ("python3-minimal", "libpython3-stdlib", "libstdc++6", "zlib1g")


class Emulated:
    """A folder with that Python; `run` starts it."""

    def __init__(self, folder: Path) -> None:
        missing = [f"{tool} ({package})" for tool, package in TOOLS.items() if shutil.which(tool) is None]
        if missing or sys.platform != "linux" or not os.path.exists(KEYRING):
            pytest.skip(f"needs Debian with {', '.join(missing) or KEYRING}")
        self.root, self.site = folder / "root", folder / "site"
        self._unpack_debian(folder / "apt")
        (self.python,) = (path for path in self.root.glob("usr/bin/python3.*") if re.fullmatch(r"python3\.\d+", path.name))
        # PyTorch's import reads what the processors are, and dies of this machine's; QEMU looks into its own folder first.
        (self.root / "proc").mkdir()
        (self.root / "proc" / "cpuinfo").write_text(
            "".join(f"processor : {k}\n{PROCESSOR}\n" for k in range(os.cpu_count() or 1))
        )
        self._unpack_torch(folder / "wheels")
        self._stand_in_for_cuda(folder / "stand_ins")

    def run(self, *arguments: object) -> str:
        """Output of the emulated Python; AssertionError with all of it where the status is not 0."""
        # Threads of one emulated process are slow to wait for each other.
        variables = {"PATH": os.environ["PATH"], "PYTHONPATH": str(self.site), "OMP_NUM_THREADS": "1"}
        command = [
            shutil.which("qemu-aarch64-static"),
            "-cpu",
            "neoverse-n1",
            "-L",
            str(self.root),
            str(self.python),
            *map(str, arguments),
        ]
        done = subprocess.run(command, cwd=self.root, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _unpack_debian(self, folder: Path) -> None:
        """Python and all that it needs; apt gets an empty machine of its own, so that nothing is installed here."""
        for name in ("lists/partial", "archives/partial"):
            (folder / name).mkdir(parents=True)
        (folder / "status").touch()
        release = platform.freedesktop_os_release()["VERSION_CODENAME"]
        (folder / "sources").write_text(f"deb [signed-by={KEYRING}] http://deb.debian.org/debian {release} main\n")
        settings = {
            "APT::Architecture": "arm64", "APT::Architectures": "arm64", "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "", "Debug::NoLocking": "true", "Dir::State::Lists": folder / "lists",
            "Dir::State::status": folder / "status", "Dir::Cache::archives": folder / "archives", "Dir::Cache::pkgcache": "",
            "Dir::Cache::srcpkgcache": "", "Dir::Etc::SourceList": folder / "sources", "Dir::Etc::SourceParts": os.devnull,
        }  # fmt: skip
        apt = ["apt-get", "-qq", *(f"-o{name}={value}" for name, value in settings.items())]
        _fetch(*apt, "update")
        _fetch(*apt, "-y", "--download-only", "install", *PACKAGES)
        for archive in (folder / "archives").glob("*.deb"):
            subprocess.run(["dpkg-deb", "-x", str(archive), str(self.root)], check=True)

    def _unpack_torch(self, folder: Path) -> None:
        """Torch as it runs here, and the packages in plain Python that it asks for, which are this machine's."""
        version = torch.__version__.partition("+")[0]
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
        _fetch(*pip, "--platform", "manylinux_2_28_aarch64", "--python-version", self.python.name[6:], f"torch=={version}")
        (wheel,) = folder.glob("*.whl")
        shutil.unpack_archive(wheel, self.site, "zip")
        expose(self.site, [Requirement("torch")])  # but for torch itself, which is there

    def _stand_in_for_cuda(self, folder: Path) -> None:
        """One library under the name of every library that is not there, with the versions and functions that torch wants."""
        folder.mkdir()
        libraries = sorted((self.site / "torch" / "lib").glob("*.so*"))
        there = {path.name for path in (*libraries, *self.root.rglob("*.so.*"))}
        absent, functions = set(), defaultdict(set)
        for library in libraries:
            absent |= set(re.findall(r"NEEDED.*\[(.*)\]", _readelf("-d", library))) - there
            file_of = {version: file for file, version in re.findall(r"File: (\S+) .*\n.*Name: (\S+)", _readelf("-V", library))}
            for name, version in re.findall(r" UND (\w+)(?:@(\S+))?", _readelf("--dyn-syms", library)):
                if file_of.get(version) in absent or (not version and re.match("cu[A-Z]|cusparse|nccl", name)):
                    functions[version].add(name)
        labels = sorted(set().union(*functions.values()))
        text = "".join(f".globl {name}\n.type {name}, %function\n{name}:\n" for name in labels)
        (folder / "functions.s").write_text(f"{text}mov x0, 0\nret\n")
        del functions[""]
        (folder / "versions").write_text("".join(f"{v} {{ {'; '.join(sorted(f))}; }};\n" for v, f in functions.items()))
        made = self.site / "torch" / "lib" / "stand_in.so"
        linked = ["-shared", "-nostdlib", "functions.s", "-Wl,--version-script=versions", "-o", str(made)]
        subprocess.run(["aarch64-linux-gnu-gcc", *linked], cwd=folder, check=True)
        for name in absent:
            (made.parent / name).symlink_to(made.name)


def _readelf(option: str, path: Path) -> str:
    return subprocess.run(["readelf", "-W", option, str(path)], capture_output=True, text=True, check=True).stdout


def _fetch(*command: str) -> None:
    """Runs what needs a network, and skips with what it said where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"{Path(command[0]).name} fetches nothing: {(done.stderr or done.stdout).strip()[-300:]}")
