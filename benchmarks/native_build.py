"""Builds the native libraries into the checkout for one GPU architecture, also where setuptools or ninja are missing."""

from __future__ import annotations

import concurrent.futures
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "res2net_fused"


def architecture(capability: tuple[int, int]) -> str:
    """What nvcc calls a GPU of this compute capability; Hopper's own instructions exist in 90a only."""
    return "90a" if capability == (9, 0) else "{}{}".format(*capability)


def build(capability: tuple[int, int] | None, commit: str | None) -> list[str]:
    """Builds for a GPU of this compute capability, or for the CPU alone; returns what went wrong, one line each."""
    chosen = "none" if capability is None else architecture(capability)
    if importlib.util.find_spec("setuptools") and (importlib.util.find_spec("ninja") or shutil.which("ninja")):
        environment = os.environ | {"RES2NET_FUSED_CUDA_ARCHS": chosen, "RES2NET_FUSED_BUILD": "auto"}
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            return [f"{' '.join(command)} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"]
        return [line for line in done.stderr.splitlines() if "NOT BUILT" in line]
    return _build_directly(chosen, commit or "unknown")


def _build_directly(chosen: str, commit: str) -> list[str]:
    """The same flags as setup.py's, every source compiled anew."""
    import torch

    from res2net_fused import build_flags as flags

    torch_root = Path(torch.__file__).parent
    facts = {"commit": commit, "instruction_sets": flags.kernel_instruction_sets(ROOT, platform.machine())}
    cxx = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    nvcc = shutil.which("nvcc", path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"]))
    parts, problems, cuda = {}, [], {}
    if cxx is None:
        return ["no C++ compiler found: no native library was built"]
    if chosen != "none" and nvcc is not None:
        cuda = {"cuda_version": torch.version.cuda or "", "cuda_architectures": (chosen,)}
    todo = [("cpu", flags.cpu_target(ROOT, torch_root, platform.machine(), flags.BuildFacts(**facts, **cuda)))]
    if cuda:
        todo.insert(0, ("cuda", flags.cuda_target(ROOT, torch_root, flags.BuildFacts(**facts, **cuda))))
    elif chosen != "none":
        problems.append("nvcc not found: the CUDA library was not built")
    for name, target in todo:
        compiler = [nvcc, "-ccbin", cxx] if target.compiler == "nvcc" else [cxx]
        error = compile_target(target, compiler, ROOT / "build" / "direct" / name, PACKAGE / target.output)
        if error:
            problems.append(f"{name} library was not built: {error}")
        size = None if error else (PACKAGE / target.output).stat().st_size
        parts[name] = {"built": not error, "file": target.output, "size": size, "reason": error}
    info = {"compiler": cxx, "torch_target": ".".join(map(str, flags.TORCH_TARGET)), **facts, **cuda}
    (PACKAGE / flags.BUILD_RECORD).write_text(json.dumps({"info": info, "parts": parts}, indent=2) + "\n")
    return problems


def compile_target(target, compiler: list[str], folder: Path, output: Path) -> str:
    """Compiles and links one target; returns the compiler's complaint, or an empty string."""

    def run(command: list[str]) -> None:
        subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)

    def compile_unit(unit) -> None:
        Path(folder, unit.object).parent.mkdir(parents=True, exist_ok=True)
        run([*compiler, *unit.flags, "-c", str(unit.source), "-o", unit.object])

    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(compile_unit, target.units))
        fresh = output.with_name(output.name + ".new")
        run([*compiler, *(unit.object for unit in target.units), *target.link_flags, "-o", str(fresh)])
        os.replace(fresh, output)
    except subprocess.CalledProcessError as error:
        output.unlink(missing_ok=True)  # of an earlier build: it would not fit the rest
        return next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[:300])
    return ""
