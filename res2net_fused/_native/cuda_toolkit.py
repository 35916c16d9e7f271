"""Which nvcc compiles the CUDA library: where it lies, whether it is whole, and whether its CUDA is torch's.

torch.utils.cpp_extension is no help: its CUDA_HOME is None beside a CPU-only torch, and it knows nothing of PyPI's nvcc.

setup.py loads this file by its path, as it does build_flags.py, and the Makefile runs it: the standard library only. Run, it
prints "[nvcc]" where the extra of that name should be installed before the build.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

# What a link of the CUDA library reads of PyPI's compiler, and which package holds it: the extra `nvcc` of pyproject.toml.
PYPI_PARTS = {
    "bin/ptxas": "nvidia-cuda-nvcc",
    "nvvm/bin/cicc": "nvidia-nvvm",
    "include/crt/host_config.h": "nvidia-cuda-crt",
    "include/cuda_runtime.h": "nvidia-cuda-runtime",
    "lib/libcudart_static.a": "nvidia-cuda-runtime",
    "include/nv/target": "nvidia-cuda-cccl",
}
PYPI_VERSION = "13.0"  # CUDA 12's packages hold no nvcc
PYPI_REMEDY = "pip install " + " ".join(f"'{name}=={PYPI_VERSION}.*'" for name in dict.fromkeys(PYPI_PARTS.values()))
HOMES = ("CUDA_HOME", "CUDA_PATH")


class NoNvcc(LookupError):
    """No nvcc here can compile the CUDA library; the message names the remedy."""


class NvccNotFound(NoNvcc):
    """There is none at all."""


class Nvcc(NamedTuple):
    """A compiler; version: such as "13.0.88"."""

    path: Path
    version: str

    @property
    def major(self) -> str:
        return self.version.split(".")[0]

    def command(self, host_compiler: str) -> list[str]:
        """The first words of every call."""
        # PyPI's libraries lie in lib, but its nvcc.profile names lib64: cudart would not be found.
        libraries = [f"-L{self.path.parent.parent / 'lib'}"] if _from_pypi(self.path) else []
        return [str(self.path), "-ccbin", host_compiler, *libraries]

    def library_folders(self) -> list[str]:
        """Options by which another linker finds the CUDA runtime; nvcc itself says where, which may be a script for another."""
        command = self.command("c++")
        said = subprocess.run([*command, "-dryrun", "-shared", "none.o"], capture_output=True, text=True).stderr
        return [*command[3:], *(word for line in re.findall(r"^#\$ LIBRARIES=(.*)$", said, re.M) for word in shlex.split(line))]


def find_nvcc(
    torch_cuda: str | None = None,
    environ: Mapping[str, str] | None = None,
    root: Path = Path("/"),
    packages: Iterable[str] | None = None,
) -> Nvcc:
    """The nvcc of CUDA_HOME or CUDA_PATH; else of PATH, /usr/local/cuda or PyPI's packages the first that fits torch.

    torch_cuda: the version of torch's CUDA; any nvcc fits None, a torch without. root, packages: for tests, the folder that
    stands for /, and those of the package `nvidia`. Raises NoNvcc.
    """
    environ = os.environ if environ is None else environ
    wanted = torch_cuda.split(".")[0] if torch_cuda else None
    problems = []
    for path in _candidates(environ, root, packages):
        found = Nvcc(path, _version(path))
        if not found.version:
            problems.append(f"{path} does not run: {_remedy(wanted)}")
        elif wanted is not None and found.major != wanted:
            problems.append(
                f"{path} is of CUDA {found.version}, and torch of CUDA {torch_cuda}; the CUDA library needs an nvcc of torch's "
                f"major version: {_remedy(wanted)}"
            )
        elif missing := [name for name in PYPI_PARTS if _from_pypi(path) and not (path.parent.parent / name).exists()]:
            problems.append(f"{path} is not whole, {', '.join(missing)} is missing: `{PYPI_REMEDY}`")
        else:
            return found
    if problems:
        raise NoNvcc(problems[0])
    raise NvccNotFound(f"nvcc not found in CUDA_HOME, on PATH, in /usr/local/cuda or among PyPI's packages: {_remedy(wanted)}")


def torch_cuda(torch_folder: Path) -> str | None:
    """The CUDA version that an installed torch was built for, or None; torch is not imported."""
    try:
        match = re.search(r"^cuda(?::[^=\n]*)?\s*=\s*(.+)$", (torch_folder / "version.py").read_text(), re.M)
        found = ast.literal_eval(match[1]) if match else None
    except (OSError, ValueError, SyntaxError):
        return None
    return found if isinstance(found, str) else None


def extra_wanted(torch_cuda: str | None, environ: Mapping[str, str] | None = None) -> bool:
    """Whether PyPI's nvcc should be installed: no other one fits torch, and it would."""
    environ = os.environ if environ is None else environ
    fits = torch_cuda is None or torch_cuda.split(".")[0] == PYPI_VERSION.split(".")[0]
    if sys.platform != "linux" or not fits or any(environ.get(name) for name in HOMES):
        return False
    try:
        return _from_pypi(find_nvcc(torch_cuda, environ).path)
    except NoNvcc:
        return True


def _candidates(environ: Mapping[str, str], root: Path, packages: Iterable[str] | None) -> list[Path]:
    for name in HOMES:
        if environ.get(name):
            path = Path(environ[name], "bin", "nvcc")
            if not path.is_file():
                raise NoNvcc(f"{name}={environ[name]} holds no bin/nvcc: correct or unset it")
            return [path]
    if packages is None:
        spec = importlib.util.find_spec("nvidia")
        packages = (spec.submodule_search_locations if spec else None) or ()
    on_path = shutil.which("nvcc", path=environ.get("PATH", os.defpath))
    found = [Path(on_path)] if on_path else []
    found += sorted((root / "usr" / "local").glob("cuda*/bin/nvcc"))  # "cuda" itself first
    return found + [path for folder in packages for path in sorted(Path(folder).glob("*/bin/nvcc"))]


def _from_pypi(nvcc: Path) -> bool:
    """Such as site-packages/nvidia/cu13/bin/nvcc; a toolkit below a folder of that name has lib64."""
    home = nvcc.parent.parent
    return home.parent.name == "nvidia" and not (home / "lib64").exists()


def _version(nvcc: Path) -> str:
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    match = re.search(r"V(\d+\.\d+\.\d+)", text)
    return match[1] if match else ""


def _remedy(major: str | None) -> str:
    if major is None or major == PYPI_VERSION.split(".")[0]:
        return f"install the CUDA toolkit, or `{PYPI_REMEDY}`"
    return f"install the toolkit of CUDA {major} (PyPI has none of it) and set CUDA_HOME to its folder"


if __name__ == "__main__":
    torch = importlib.util.find_spec("torch")
    folder = Path(torch.origin).parent if torch is not None and torch.origin else Path()
    print("[nvcc]" if extra_wanted(torch_cuda(folder)) else "")
