"""Loads the native operator libraries, once and lazily, and says why where it cannot.

`cpu_library()` and `cuda_library()` never raise: a missing, broken or unfit file gives a `LibraryStatus` whose reason
names the remedy. Once loaded, the operators are under `torch.ops.res2net_fused_native`.
"""

from __future__ import annotations

import importlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import build_flags

REBUILD = "`pip install --no-build-isolation -e .` in a checkout, or `pip install --no-build-isolation .`"

# An operator that each library registers: tells whether a copy of it is in this process already.
_MARKER_OPERATORS = {"cpu": "build_info", "cuda": "cuda_build_info"}
_FILES = {"cpu": build_flags.CPU_LIBRARY, "cuda": build_flags.CUDA_LIBRARY}


@dataclass(frozen=True)
class LibraryStatus:
    """Whether a library's operators can be called; `reason` is empty exactly where `loaded` is true."""

    name: str
    loaded: bool
    reason: str
    path: Path


class DeviceLimits(NamedTuple):
    """What one CUDA device offers to a kernel; sizes in bytes."""

    capability_major: int
    capability_minor: int
    multiprocessors: int
    shared_per_block_optin: int
    shared_per_multiprocessor: int
    registers_per_multiprocessor: int
    l2_bytes: int
    wgmma: int  # 1 where the device is of the Hopper generation and the CUDA library holds sm_90a code, the only one with wgmma


class NativeLibraries:
    """The libraries of one installed package folder. Results, failures included, are cached for the process."""

    def __init__(self, package_dir: Path) -> None:
        self._package_dir = Path(package_dir)
        self._lock = threading.Lock()
        self._status: dict[str, LibraryStatus] = {}

    def status(self, name: str) -> LibraryStatus:
        """Loads library `name` ("cpu" or "cuda") at the first call."""
        # Reading a dict is atomic; the lock is for the first call only.
        found = self._status.get(name)
        if found is None:
            with self._lock:
                found = self._status.get(name)
                if found is None:
                    path = self._package_dir / _FILES[name]
                    reason = self._load(name, path)
                    found = self._status[name] = LibraryStatus(name, not reason, reason, path)
        return found

    def record(self) -> dict[str, Any]:
        """What setup.py wrote about its build: {"info": {...}, "parts": {...}}, or empty dicts."""
        try:
            found = json.loads((self._package_dir / build_flags.BUILD_RECORD).read_text())
            return {"info": dict(found["info"]), "parts": dict(found["parts"])}
        except (OSError, ValueError, KeyError, TypeError):
            return {"info": {}, "parts": {}}

    def _load(self, name: str, path: Path) -> str:
        """Loads the library; returns why it could not, or an empty string."""
        reason = self._unfit(name, path)
        if reason:
            return reason
        if str(path) in torch.ops.loaded_libraries:
            return ""
        # Registering an operator twice would end the process, so a second copy is never opened.
        if hasattr(torch.ops.res2net_fused_native, _MARKER_OPERATORS[name]):
            return f"another copy of the {name} library is loaded in this process; {path} was left alone"
        try:
            torch.ops.load_library(str(path))
        except Exception as error:  # whatever the loader or a registration raises, the package works without it
            return f"{path} does not load ({error}); rebuild it: {REBUILD}"
        return ""

    def _unfit(self, name: str, path: Path) -> str:
        """Why the library must not be opened, or an empty string."""
        parts, info = self.record()["parts"], self.record()["info"]
        part = parts.get(name)
        if not isinstance(part, dict):
            return f"the native extension is not built ({path.parent / 'build.json'} has no record of it): {REBUILD}"
        if not part.get("built"):
            return f"the {name} library was not built: {part.get('reason')}"
        try:
            size = path.stat().st_size
        except OSError as error:
            return f"{path} is missing ({error.strerror}); rebuild it: {REBUILD}"
        # Opening a truncated file can end the process with a bus error instead of raising.
        if size != part.get("size"):
            return f"{path} has {size} bytes where the build wrote {part.get('size')}; rebuild it: {REBUILD}"
        if _release(torch.__version__) < build_flags.TORCH_TARGET:
            need = ".".join(map(str, build_flags.TORCH_TARGET))
            return f"torch {torch.__version__} is older than {need}, which the libraries need: upgrade torch"
        if name == "cuda":
            return _unfit_for_cuda(info.get("cuda_version"))
        return ""


def _unfit_for_cuda(built_with: str | None) -> str:
    have = torch.version.cuda
    if have is None:
        return f"this torch ({torch.__version__}) has no CUDA: install a CUDA build of torch"
    if built_with is None or built_with.split(".")[0] != have.split(".")[0]:
        return (
            f"the CUDA library was built with CUDA {built_with} and torch with CUDA {have}; rebuild it with an nvcc of "
            f"torch's major version: {REBUILD}"
        )
    return ""


def _release(version: str) -> tuple[int, int]:
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


_installed = NativeLibraries(Path(__file__).resolve().parent)


def cpu_library() -> LibraryStatus:
    """Loads the CPU operators at the first call."""
    return _installed.status("cpu")


def cuda_library() -> LibraryStatus:
    """Loads the CUDA operators at the first call; never beside a torch without CUDA, where they cannot resolve."""
    return _installed.status("cuda")


def device_limits(device: int) -> DeviceLimits:
    """Limits of CUDA device `device`. Raises RuntimeError where there is no such device or no CUDA library."""
    status = cuda_library()
    if not status.loaded:
        raise RuntimeError(status.reason)
    return DeviceLimits(*torch.ops.res2net_fused_native.device_limits(device))


def build_information() -> dict[str, Any]:
    """How the native extension was compiled.

    Keys: compiler, torch_target, commit, instruction_sets, cuda_version, cuda_architectures (absent where nothing was
    built), cxx_standard where the pybind11 module is there; `source`, which says where these come from: "_build_info",
    "build.json" or "none"; `parts`, by part ("cuda", "cpu", "python") {"built", "file", "size", "reason"}.
    """
    record = _installed.record()
    try:
        # Asked of the record first: beside an editable install the import would find that one's module.
        if not record["parts"]["python"]["built"]:
            raise ImportError("the pybind11 module is not built")
        module = importlib.import_module("._build_info", __package__)
        info, source = dict(module.build_info()), "_build_info"
    except Exception:  # absent or broken: it is a convenience, and build.json says the same
        info, source = record["info"], "build.json" if record["info"] else "none"
    return {**info, "source": source, "parts": record["parts"]}
