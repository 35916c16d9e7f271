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
        done = subprocess.run(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)  # it says what it compiles
        if done.returncode:
            return [f"{' '.join(command)} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}"]
        return [line for line in done.stderr.splitlines() if "NOT BUILT" in line]
    return _build_directly(chosen, commit or "unknown")


def _build_directly(chosen: str, commit: str) -> list[str]:
    """The same flags as setup.py's."""
    import torch

    from res2net_fused._native import build_flags, cuda_toolkit

    torch_root = Path(torch.__file__).parent
    facts = {"commit": commit, "instruction_sets": build_flags.kernel_instruction_sets(ROOT, platform.machine())}
    cxx = os.environ.get("CXX") or next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    parts, problems, cuda = {}, [], {}
    if cxx is None:
        return ["no C++ compiler found: no native library was built"]
    if chosen != "none":
        try:
            nvcc = cuda_toolkit.find_nvcc(torch.version.cuda)
            cuda = {"cuda_version": nvcc.version, "cuda_architectures": (chosen,)}
        except cuda_toolkit.NoNvcc as error:
            problems.append(f"the CUDA library was not built: {error}")
            parts["cuda"] = {"built": False, "file": build_flags.CUDA_LIBRARY, "size": None, "reason": str(error)}
    todo = [("cpu", build_flags.cpu_target(ROOT, torch_root, platform.machine(), build_flags.BuildFacts(**facts, **cuda)))]
    if cuda:
        todo.insert(0, ("cuda", build_flags.cuda_target(ROOT, torch_root, build_flags.BuildFacts(**facts, **cuda))))
    for name, target in todo:
        compiler = nvcc.command(cxx) if target.compiler == "nvcc" else [cxx]
        error = compile_target(target, compiler, ROOT / "build" / "direct" / name, PACKAGE / target.output)
        if error:
            problems.append(f"{name} library was not built: {error}")
        size = None if error else (PACKAGE / target.output).stat().st_size
        parts[name] = {"built": not error, "file": target.output, "size": size, "reason": error}
    info = {"compiler": cxx, "torch_target": ".".join(map(str, build_flags.TORCH_TARGET)), **facts, **cuda}
    (PACKAGE / build_flags.BUILD_RECORD).write_text(json.dumps({"info": info, "parts": parts}, indent=2) + "\n")
    return problems


def compile_target(target, compiler: list[str], folder: Path, output: Path) -> str:
    """Compiles and links one target; returns the compiler's complaint, or an empty string."""

    def run(command: list[str]) -> None:
        subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)

    def compile_unit(unit) -> None:
        made = Path(folder, unit.object)
        command = [*compiler, *unit.flags, "-MD", "-MF", f"{unit.object}.d", "-c", str(unit.source), "-o", unit.object]
        if not _up_to_date(made, command):
            made.parent.mkdir(parents=True, exist_ok=True)
            note = made.with_name(made.name + ".command")
            note.unlink(missing_ok=True)  # a compiler that is ended halfway leaves half an object
            run(command)
            note.write_text("\0".join(command))

    folder.mkdir(parents=True, exist_ok=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    title = f"building the {target.name} part, {len(target.units)} files"
    print(title, flush=True)
    try:
        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [pool.submit(compile_unit, unit) for unit in target.units]
            for count, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                job.result()
                if sys.stdout.isatty():
                    print(f"\r{title}: {count} done", end="\n" if count == len(jobs) else "", flush=True)
        fresh = output.with_name(output.name + ".new")
        run([*compiler, *(unit.object for unit in target.units), *target.link_flags, "-o", str(fresh)])
        os.replace(fresh, output)
    except subprocess.CalledProcessError as error:
        output.unlink(missing_ok=True)  # of an earlier build: it would not fit the rest
        return next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[:300])
    return ""


def _up_to_date(made: Path, command: list[str]) -> bool:
    """Whether a compiler's output is newer than all that it was made from, by this very command."""
    try:
        if made.with_name(made.name + ".command").read_text() != "\0".join(command):
            return False
        sources = made.with_name(made.name + ".d").read_text().split(":", 1)[1].replace("\\\n", " ").split()
        return all(os.stat(source).st_mtime <= made.stat().st_mtime for source in sources)
    except (OSError, IndexError):
        return False
