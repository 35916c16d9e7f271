"""The CPU kernels in a program without PyTorch, under emulated processors: no illegal instruction, and float64's results.

tests/support/kernels/kernel_test.cpp is the program. Without QEMU the test of this machine's own processor is left.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tree import ROOT, TESTS

from res2net_fused._native import build_flags

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="it is compiled on x86-64 Linux, for that and for aarch64"
)

SOURCES = TESTS / "support" / "kernels"
CSRC = ROOT / "csrc"
INCLUDES = (f"-I{SOURCES / 'stubs'}", f"-I{SOURCES}", f"-I{CSRC}")
# Processors of QEMU, below x86-64-v2, of v2 and of v3, with the set that is to be taken.
PROCESSORS = {"Opteron_G1": "portable", "qemu64": "portable", "Nehalem": "portable", "Haswell": "avx2"}


def compiled(compiler: str, machine: str, folder: Path, optimization: str) -> Path:
    """The program with the kernels of every instruction set of a machine; the objects of a build here serve again."""
    sets = build_flags.instruction_sets(machine)
    have = [f"-DRES2NET_FUSED_HAVE_{s.name.upper()}=1" for s in sets]
    parts = ("chain/block", "chain/forward", "chain/plan", "chain/stem", "runtime/dispatch", "runtime/scratch")
    jobs = [(SOURCES / f"{name}.cpp", ("-O1",)) for name in ("kernel_test", "sharing_test")]
    jobs += [(CSRC / f"cpu/{name}.cpp", ("-O1", *have)) for name in parts]
    # Where setup.py leaves those of this machine and, for wheels, of another.
    here = machine == platform.machine()
    objects, built = [], ROOT / "build" / "native" / ("" if here else machine) / "cpu" / "obj"
    for isa in sets:
        for source in sorted(CSRC.glob("cpu/kernels/*.cpp")):
            ready = built / isa.name / "cpu" / "kernels" / f"{source.name}.o"
            if optimization == "-O3" and ready.is_file() and ready.stat().st_mtime > newest_source():
                objects.append(str(ready))
            else:
                jobs.append((source, (optimization, *isa.flags, f"-DRES2NET_FUSED_ISA={isa.name}")))

    def compile_one(job):
        source, flags = job
        output = folder / f"{len(flags)}{flags[-1].rpartition('=')[2]}-{source.stem}.o"
        subprocess.run([compiler, "-std=c++20", *flags, *INCLUDES, "-c", str(source), "-o", str(output)], check=True)
        return str(output)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects += pool.map(compile_one, jobs)
    program = folder / f"kernel_test_{machine}"
    subprocess.run([compiler, *objects, "-o", str(program)], check=True)
    return program


def newest_source() -> float:
    return max(path.stat().st_mtime for path in (CSRC / "cpu" / "kernels").iterdir())


def run(*command: object) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr[-2000:]}"
    return done.stdout


def need(*names: str) -> list[str]:
    missing = [name for name in names if shutil.which(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found (Debian: qemu-user-static, g++-aarch64-linux-gnu)")
    return list(names)


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    need("g++")
    return compiled("g++", "x86_64", tmp_path_factory.mktemp("x86_64"), "-O3")


def test_this_processor(program):
    assert "portable: " in run(program)
    assert subprocess.run([program, "neon"], capture_output=True).returncode == 1, "x86-64 has none"


@pytest.mark.parametrize("processor", [pytest.param(p, marks=() if p != "qemu64" else pytest.mark.slow) for p in PROCESSORS])
def test_processors_of_every_level(program, processor):
    (qemu,) = need("qemu-x86_64-static")
    run(qemu, "-cpu", processor, program, PROCESSORS[processor])


@pytest.mark.parametrize(
    "optimization", ["-O0", pytest.param("-O3", marks=pytest.mark.slow)]
)  # -O3 is shipped, and takes minutes
def test_neon(optimization, tmp_path):
    qemu, compiler = need("qemu-aarch64-static", "aarch64-linux-gnu-g++")
    program = compiled(compiler, "aarch64", tmp_path, optimization)
    said = run(qemu, "-L", "/usr/aarch64-linux-gnu", program, "neon")
    assert "neon: " in said and "portable" not in said
