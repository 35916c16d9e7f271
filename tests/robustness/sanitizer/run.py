"""Builds the CPU library with AddressSanitizer and UndefinedBehaviorSanitizer and runs its tests over it.

    python tests/robustness/sanitizer/run.py
    python tests/robustness/sanitizer/run.py -k "random_call and not slow"
    python tests/robustness/sanitizer/run.py --plant     # breaks a copy of the kernels first: this run must be red

Everything lies under build/sanitize: the objects, and a copy of the package whose library is the instrumented one. The tests
are those of tests/backends/cpu, the slow ones too, with every instruction set of this machine. Every finding ends the run.
Needs GCC. Other arguments are pytest's. Exit status: pytest's, or 2 where nothing could be built or loaded.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import setup  # noqa: E402
from res2net_fused._native import build_flags  # noqa: E402

FOLDER = ROOT / "build" / "sanitize"
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
# -O1 keeps the always_inline kernels compilable in a minute; -g1 gives lines in reports.
COMPILE_FLAGS = (*SANITIZERS, "-O1", "-g1", "-fno-omit-frame-pointer")
# What --plant breaks: one row too many of the pass-through group.
PLANTED = (
    "cpu/kernels/copy_and_pool.cpp",
    "for (int64_t row = first; row < last; row++)",
    "for (int64_t row = first; row <= last; row++)",
)
PROBE = "from res2net_fused._native import library; s = library.cpu_library(); print(s.path if s.loaded else s.reason)"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plant", action="store_true", help="make an error first, to see that it is found")
    options, for_pytest = parser.parse_known_args(arguments)
    compiler = next((name for name in (os.environ.get("CXX"), "c++", "g++") if name and shutil.which(name)), None)
    try:
        runtimes = preloaded(compiler)
        package = copied_package(library(compiler, options.plant))
    except RuntimeError as error:
        print(f"sanitize: {error}", file=sys.stderr)
        return 2
    environment = os.environ | {
        "LD_PRELOAD": runtimes,
        # Python and torch free little at exit; torch's own code allocates and frees by different functions.
        "ASAN_OPTIONS": "detect_leaks=0:alloc_dealloc_mismatch=0:strict_string_checks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": str(package.parent),
        "PYTHONMALLOC": "malloc",
    }
    # From the folder of the copy, which `python -m` puts in front of the checkout.
    found = subprocess.run([sys.executable, "-c", PROBE], cwd=package.parent, env=environment, capture_output=True, text=True)
    if found.stdout.strip() != str(package / build_flags.CPU_LIBRARY):
        print(f"sanitize: the instrumented library does not load: {found.stdout}{found.stderr[-3000:]}", file=sys.stderr)
        return 2
    tests = sorted(map(str, (ROOT / "tests/backends/cpu").glob("test_*.py")))
    # Uncaptured, since a finding ends the process; -x, since pytest would not see the end of it.
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-m", "", "-x", "-q"]
    command += ["-s", "-p", "no:cacheprovider", *tests, *for_pytest]
    return subprocess.run(command, cwd=package.parent, env=environment).returncode


def preloaded(compiler: str | None) -> str:
    """The runtimes that must be in the process before Python is; libstdc++ too, or exceptions would not be intercepted."""
    if compiler is None:
        raise RuntimeError("no C++ compiler found (looked for CXX, c++, g++): install GCC")
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        path = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        if not Path(path).is_file():
            raise RuntimeError(f"{compiler} has no {name}: install GCC, and name it in CXX where it is not the default")
        paths.append(path)
    return ":".join(paths)


def library(compiler: str, plant: bool) -> Path:
    """The instrumented library, compiled anew where a source or flag has changed."""
    root = FOLDER / "planted" if plant else ROOT
    if plant:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(ROOT / "csrc", root / "csrc")
        file, right, wrong = PLANTED
        text = (root / "csrc" / file).read_text()
        if right not in text:
            raise RuntimeError(f"csrc/{file} no longer has the line that --plant breaks: {right}")
        (root / "csrc" / file).write_text(text.replace(right, wrong))
    facts = build_flags.BuildFacts("sanitize", instruction_sets=build_flags.kernel_instruction_sets(ROOT, platform.machine()))
    target = build_flags.cpu_target(root, Path(torch.__file__).parent, platform.machine(), facts)
    shared = build_flags.ops_target(root, Path(torch.__file__).parent)  # what it is linked with
    setup.compile_target(shared, [compiler], root / "build" / "native" / "ops", setup.find_ninja())
    units = tuple(dataclasses.replace(unit, flags=(*unit.flags, *COMPILE_FLAGS)) for unit in target.units)
    target = dataclasses.replace(target, units=units, link_flags=(*target.link_flags, *SANITIZERS))
    digest = hashlib.sha256(repr((compiler, target)).encode())
    for path in sorted((root / "csrc").rglob("*")):
        digest.update(path.read_bytes() if path.is_file() else b"")
    output = FOLDER / f"libres2net_fused_cpu-{digest.hexdigest()[:16]}.so"
    if not output.exists():
        print(f"compiling {len(units)} files with {' '.join(SANITIZERS)}; the widest kernels take a minute each", flush=True)
        try:
            os.replace(setup.compile_target(target, [compiler], FOLDER / "objects", setup.find_ninja()), output)
        except setup.Missing as error:
            raise RuntimeError(f"the instrumented library was not built: {error}") from None
    return output


def copied_package(library: Path) -> Path:
    """The package beside the instrumented library."""
    package = FOLDER / "package" / "res2net_fused"
    shutil.rmtree(package, ignore_errors=True)
    shutil.copytree(ROOT / "res2net_fused", package, ignore=shutil.ignore_patterns("lib", "__pycache__", "*.so"))
    (package / build_flags.CPU_LIBRARY).parent.mkdir()
    shutil.copy2(library, package / build_flags.CPU_LIBRARY)
    part = {"built": True, "file": build_flags.CPU_LIBRARY, "size": library.stat().st_size, "reason": ""}
    shared = ROOT / "build" / "native" / "ops" / Path(build_flags.OPS_LIBRARY).name
    shutil.copy2(shared, package / build_flags.OPS_LIBRARY)
    ops = part | {"file": build_flags.OPS_LIBRARY, "size": shared.stat().st_size}
    (package / build_flags.BUILD_RECORD).write_text(json.dumps({"info": {}, "parts": {"cpu": part, "ops": ops}}))
    return package


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
