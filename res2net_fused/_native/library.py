"""Loads the native operator libraries, once and lazily, and says why where it cannot.

`cpu_library()` and `cuda_library()` never raise: a missing, broken or unfit file gives a `LibraryStatus` whose reason
names the remedy. Once loaded, the operators are under `torch.ops.res2net_fused_native`.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import struct
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import build_flags

REBUILD = "`pip install --no-build-isolation .` in the sources (-e . where it is editable)"
AGAIN = f"install the wheel again, or rebuild it by {REBUILD}"

# What csrc/ defines, with the number of arguments: a library of other sources is told by it, before anything is called.
_OPERATORS = {
    "cpu": {
        "build_info": 0, "cpu_activation_backward": 7, "cpu_block_forward": 19, "cpu_chain_backward": 18,
        "cpu_chain_forward": 17, "cpu_chain_from_weights": 16, "cpu_has_instruction_set": 1, "cpu_norm_backward": 11,
        "cpu_new_memory": 1, "cpu_norm_forward": 10, "cpu_norm_statistics": 3, "cpu_pack": 5, "cpu_pack_pointwise": 3,
        "cpu_plan": 15, "cpu_samples": 1, "cpu_samples_differ": 2, "cpu_stem_forward": 6,
        "cpu_scratch_bytes": 1, "cpu_sum": 3, "cpu_weight_gradient": 4, "cuda_chain_plan": 21, "cuda_chain_refusal": 21,
    },
    "cuda": {"cuda_build_info": 0, "cuda_chain": 34, "device_limits": 1},
    "ops": {"answer_by_python": 1, "known_decisions": 1, "say": 3},
}  # fmt: skip
_FILES = {"cpu": build_flags.CPU_LIBRARY, "cuda": build_flags.CUDA_LIBRARY, "ops": build_flags.OPS_LIBRARY}


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
    code: int  # version of the PTX, such as 90, that the CUDA library's code for it was compiled from; 0: there is none


class NativeLibraries:
    """The libraries of one installed package folder. Results, failures included, are cached for the process."""

    def __init__(self, package_dir: Path) -> None:
        self._package_dir = Path(package_dir)
        self._lock = threading.Lock()
        self._status: dict[str, LibraryStatus] = {}

    def status(self, name: str) -> LibraryStatus:
        """Loads library `name` ("cpu", "cuda" or "ops") at the first call."""
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
        """What setup.py wrote about its build: {"info": {...}, "parts": {...}}, or empty dicts.

        A part that is not as setup.py writes it counts as not recorded.
        """
        try:
            found = json.loads((self._package_dir / build_flags.BUILD_RECORD).read_text())
            info, parts = dict(found["info"]), dict(found["parts"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return {"info": {}, "parts": {}}
        return {"info": info, "parts": {name: part for name, part in parts.items() if _is_part(part)}}

    def _load(self, name: str, path: Path) -> str:
        """Loads the library; returns why it could not, or an empty string."""
        reason = self._unfit(name, path)
        if not reason and name != "ops" and None in map(_arguments, _OPERATORS["ops"]):  # it would be opened beside this one
            reason = self._unfit("ops", self._package_dir / _FILES["ops"])
        if reason:
            return reason
        if str(path) not in torch.ops.loaded_libraries:
            # Registering an operator twice would end the process, so a second copy is never opened.
            if any(_arguments(operator) is not None for operator in _OPERATORS[name]):
                if name == "ops":  # came with a library that needs it
                    return ""
                return f"another copy of the {name} library is loaded in this process; {path} was left alone"
            try:
                torch.ops.load_library(str(path))
            except Exception as error:  # whatever the loader or a registration raises, the package works without it
                return f"{path} does not load ({error}): {AGAIN}"
        others = [operator for operator, count in _OPERATORS[name].items() if _arguments(operator) != count]
        if others:
            return (
                f"{path} was built from other sources than this package: it lacks {', '.join(others)}, or they take other "
                f"arguments: {AGAIN}"
            )
        return ""

    def _unfit(self, name: str, path: Path) -> str:
        """Why the library must not be opened, or an empty string."""
        record = self.record()
        part = record["parts"].get(name)
        if part is None:
            if any(folder.is_file() for folder in path.parents):
                return f"{self._package_dir} lies in an archive, from which no library can be loaded: unpack it, as pip does"
            return f"the native extension is not built ({path.parent / 'build.json'} has no record of it): {AGAIN}"
        if not part["built"]:
            return f"the {name} library was not built: {part['reason']}"
        try:
            size = path.stat().st_size
        except OSError as error:
            return f"{path} is missing ({error.strerror}): {AGAIN}"
        # Opening a truncated file can end the process with a bus error instead of raising.
        if size != part["size"] and not _is_whole(path):
            return f"{path} has {size} bytes where the build wrote {part['size']}: {AGAIN}"
        if name == "cuda":
            return _unfit_for_cuda(record["info"].get("cuda_version"))
        return ""


# Of an ELF header: what it is; where the tables of segments and sections begin; the size and number of their entries.
_ELF = "<6s26xQQ6xHHHH2x"


def _is_whole(path: Path) -> bool:
    """Whether a library is as long as its ELF headers say. Tools that strip or relocate it have changed its size."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            identification, programs, sections, length, count, of_section, section_count = struct.unpack(_ELF, file.read(64))
            file.seek(programs)
            segments = [struct.unpack("<IIQQQQQQ", file.read(length)) for _ in range(count)]
    except (OSError, ValueError, struct.error):
        return False
    ends = [sections + of_section * section_count, *(segment[2] + segment[5] for segment in segments)]
    return identification == b"\x7fELF\x02\x01" and max(ends) <= size


def _is_part(part: object) -> bool:
    fields: dict[str, Any] = {"built": bool, "file": str, "size": (int, type(None)), "reason": str}
    return isinstance(part, dict) and all(isinstance(part.get(field), types) for field, types in fields.items())


def _arguments(operator: str) -> int | None:
    """How many arguments a loaded operator takes; None where there is none of that name."""
    packet = getattr(torch.ops.res2net_fused_native, operator, None)
    return None if packet is None else len(packet.default._schema.arguments)


def _unfit_for_cuda(built_with: object) -> str:
    """built_with: such as "13.0.88"; whatever else a record holds counts as unknown."""
    have = torch.version.cuda
    if have is None:
        return f"this torch ({torch.__version__}) has no CUDA: install a CUDA build of torch"
    if not isinstance(built_with, str) or built_with.split(".")[0] != have.split(".")[0]:
        return (
            f"the CUDA library was built with CUDA {built_with} and torch with CUDA {have}; rebuild it with an nvcc of "
            f"torch's major version: {REBUILD}"
        )
    return ""


def release(version: str) -> tuple[int, int]:
    """Major and minor number of a version of torch, comparable."""
    major, minor = re.findall(r"\d+", version)[:2]  # of "2.13.0+cpu", "2.14.0a0+git1a2b3c", "2.14rc1"
    return int(major), int(minor)


# Here, in the first module of the package that meets torch: others import from it what older ones lack.
if release(torch.__version__) < build_flags.TORCH_TARGET:
    raise ImportError(
        f"res2net_fused needs torch {'.'.join(map(str, build_flags.TORCH_TARGET))} or later, and torch is {torch.__version__}: "
        "upgrade torch"
    )


PACKAGE = Path(__file__).resolve().parents[1]  # the folder of res2net_fused
_installed = NativeLibraries(PACKAGE)


def ops_library() -> LibraryStatus:
    """Loads what the CPU and the CUDA library share: which operators there are, and what is decided about their calls."""
    return _installed.status("ops")


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
        info, source = dict(_python_module(record).build_info()), "_build_info"
    except Exception:  # absent or broken: it is a convenience, and build.json says the same
        info, source = record["info"], "build.json" if record["info"] else "none"
    return {**info, "source": source, "parts": record["parts"]}


def _python_module(record: dict[str, Any]) -> Any:
    """The pybind11 module. Raises ImportError where there is none; whatever else may happen while it is loaded."""
    # Asked of the record first: beside an editable install the import would find that one's module.
    part = record["parts"]["python"]
    if not part["built"] or (PACKAGE / part["file"]).stat().st_size != part["size"]:
        raise ImportError("the pybind11 module is not built, or not whole")
    return importlib.import_module("res2net_fused._build_info")


@functools.cache
def same_dicts() -> Any:
    """The class `SameDicts` of csrc/python/same_dicts.h, or None where the pybind11 module is not there or of other sources."""
    try:
        return getattr(_python_module(_installed.record()), "SameDicts", None)
    except Exception:  # absent or broken: Python compares
        return None
