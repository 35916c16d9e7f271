"""What the native extension is made of: sources, flags and architectures, stated once.

setup.py loads this file by its path, before the package can be imported, and so may any build at run time: it needs the
standard library only and runs no compiler. Which compiler to run, and in which order, is the caller's business.

The pieces under `csrc/`:

* `operators/*.cpp`: the library that the other two need: what the operators are, and who decides about a call.
* `common/*.cpp`: in the CPU and the CUDA library.
* `cpu/ops/*.cpp`, `cpu/chain/*.cpp`, `cpu/runtime/*.cpp`: once, into the CPU library. `RES2NET_FUSED_HAVE_<SET>=1` tells the
  dispatcher which kernels exist.
* `cpu/kernels/*.cpp`: once per instruction set, into the CPU library. `RES2NET_FUSED_ISA` is the name of the set
  (`portable`, `avx2`, `avx512`, `neon`): put the code into `namespace res2net_fused::RES2NET_FUSED_ISA`.
* `cuda/plan/*.cpp`: launch plans of the CUDA kernels, into the CPU library, where they can be asked for without a GPU;
  those that register no operator (`*_ops.cpp`) into the CUDA library too.
* `cuda/*` and `cuda/chain/*`: the CUDA library, all through nvcc. Only `.cpp` files may include torch headers.
* `cuda/chain/instance.cu`: once per row of `cuda/plan/instances.h`, `RES2NET_FUSED_INSTANCE` being the row's name.
* `python/*.cpp`: the pybind11 module, with `common/build_info.cpp`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# The stable ABI's version: libraries load beside this release of torch and every later one.
TORCH_TARGET = (2, 11)

OPS_LIBRARY = "lib/libres2net_fused_ops.so"
CPU_LIBRARY = "lib/libres2net_fused_cpu.so"
CUDA_LIBRARY = "lib/libres2net_fused_cuda.so"
BUILD_RECORD = "lib/build.json"
PYTHON_MODULE = "_build_info"

CXX_FLAGS = ("-O3", "-std=c++20", "-fPIC", "-fvisibility=hidden", "-Wall")
NVCC_FLAGS = ("-O3", "-std=c++20", "-cudart", "static", "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall")
TORCH_DEFINES = (f"-DTORCH_TARGET_VERSION=0x{TORCH_TARGET[0]:02x}{TORCH_TARGET[1]:02x}000000000000",)
# A sixth of nvcc's default; older compilers do not know it.
NVCC_FLAGS_13 = ("-compress-mode=size",)
# Opens the stream and device-guard functions of torch's C interface.
CUDA_DEFINES = ("-DUSE_CUDA",)

# 90a: wgmma and TMA of Hopper exist in the architecture-specific target only.
DEFAULT_CUDA_ARCHITECTURES = ("80", "90a", "100")
# Instances of this name are compiled for this architecture alone.
WGMMA_PREFIX, WGMMA_ARCHITECTURE = "wgmma_", "90a"
INSTANCE_SOURCE, INSTANCE_ROWS = "cuda/chain/instance.cu", "cuda/plan/instances.h"
# The oldest PTX with the instructions of thread-block clusters, which kernels have from there on (csrc/cuda/chain/hardware.h).
CLUSTER_PTX = 90


@dataclass(frozen=True)
class InstructionSet:
    """One compilation of `csrc/cpu/kernels`: a name that is also its C++ namespace, and the flags it adds."""

    name: str
    flags: tuple[str, ...] = ()


PORTABLE = InstructionSet("portable")
# By processor. Lowest first: see cpu_target on the order in which objects are linked.
INSTRUCTION_SETS = {
    "x86_64": (
        PORTABLE,
        InstructionSet("avx2", ("-mavx2", "-mfma")),
        InstructionSet("avx512", ("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mfma")),
    ),
    "aarch64": (InstructionSet("neon"),),  # which every such processor has
}
_OTHER_NAMES = {"amd64": "x86_64", "arm64": "aarch64"}


@dataclass(frozen=True)
class BuildFacts:
    """What a binary says about its own build, beyond what its compiler predefines."""

    commit: str = "unknown"
    cuda_version: str = ""
    cuda_architectures: tuple[str, ...] = ()
    instruction_sets: tuple[str, ...] = ()

    def defines(self) -> tuple[str, ...]:
        return (
            f'-DRES2NET_FUSED_COMMIT="{self.commit}"',
            f'-DRES2NET_FUSED_TORCH_TARGET="{TORCH_TARGET[0]}.{TORCH_TARGET[1]}"',
            f'-DRES2NET_FUSED_CUDA_VERSION="{self.cuda_version}"',
            f'-DRES2NET_FUSED_CUDA_ARCHS="{";".join(self.cuda_architectures)}"',
            f'-DRES2NET_FUSED_INSTRUCTION_SETS="{";".join(self.instruction_sets)}"',
        )


@dataclass(frozen=True)
class Unit:
    """One compilation: `flags` come after the compiler; `object` is relative to the build folder."""

    source: Path
    object: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Target:
    """One shared object: `output` is relative to the package; `compiler` is "cxx" or "nvcc" and links as well."""

    name: str
    output: str
    compiler: str
    units: tuple[Unit, ...]
    link_flags: tuple[str, ...]


def instruction_sets(machine: str) -> tuple[InstructionSet, ...]:
    """The sets that CPU kernels are compiled for on `machine` (`platform.machine()`)."""
    name = machine.lower()
    return INSTRUCTION_SETS.get(_OTHER_NAMES.get(name, name), (PORTABLE,))


def kernel_instruction_sets(root: Path, machine: str) -> tuple[str, ...]:
    """Names of the sets that the CPU library will hold kernels for; empty while there is no kernel."""
    return tuple(s.name for s in instruction_sets(machine)) if _sources(root, "cpu/kernels/*.cpp") else ()


def ops_target(root: Path, torch_root: Path) -> Target:
    """The library of what both operator libraries share, which they find beside them."""
    flags = (
        *CXX_FLAGS,
        _short_paths(root),
        *TORCH_DEFINES,
        *_includes(root, torch_root),
        f"-I{root / 'res2net_fused' / 'ops'}",
    )
    units = tuple(_unit(root, source, flags, BuildFacts()) for source in _sources(root, "operators/*.cpp"))
    link = ("-shared", f"-Wl,-soname,{Path(OPS_LIBRARY).name}", f"-L{torch_root / 'lib'}", "-ltorch_cpu")
    return Target("ops", OPS_LIBRARY, "cxx", units, link)


def cpu_target(root: Path, torch_root: Path, machine: str, facts: BuildFacts) -> Target:
    """The CPU operator library, from the sources under `root`/csrc and torch's headers under `torch_root`/include."""
    shared = (*CXX_FLAGS, _short_paths(root), *TORCH_DEFINES, *_includes(root, torch_root))
    sets = instruction_sets(machine)
    have = tuple(f"-DRES2NET_FUSED_HAVE_{s.name.upper()}=1" for s in sets)
    once = _sources(root, "common/*.cpp", "cuda/plan/*.cpp", *(f"cpu/{part}/*.cpp" for part in ("ops", "chain", "runtime")))
    units = [_unit(root, source, (*shared, *have), facts) for source in once]
    # The linker keeps the first copy of an inline function. Objects that need no special instructions come first, so a
    # copy compiled for AVX-512 never serves portable code.
    for isa in sets:
        flags = (*shared, *isa.flags, f"-DRES2NET_FUSED_ISA={isa.name}")
        units += [_unit(root, s, flags, facts, variant=isa.name) for s in _sources(root, "cpu/kernels/*.cpp")]
    link = ("-shared", *_needs_ops(root, "-Wl,"), f"-L{torch_root / 'lib'}", "-ltorch_cpu")
    return Target("cpu", CPU_LIBRARY, "cxx", tuple(units), link)


def cuda_instances(root: Path) -> tuple[str, ...]:
    """Names of the compiled forms of the CUDA kernels, in the order of their table."""
    return tuple(re.findall(r"^ +X\((\w+),", (root / "csrc" / INSTANCE_ROWS).read_text(), re.M))


def instance_define(name: str) -> str:
    """What tells `cuda/chain/instance.cu` which row of the table it is compiled for."""
    return f"-DRES2NET_FUSED_INSTANCE={name}"


def cuda_target(root: Path, torch_root: Path, facts: BuildFacts) -> Target:
    """The CUDA operator library for `facts.cuda_architectures`. Needs nvcc, but neither a GPU nor a CUDA torch."""
    code, instance_source = gencode_flags(facts.cuda_architectures), root / "csrc" / INSTANCE_SOURCE
    newer = NVCC_FLAGS_13 if int(facts.cuda_version.partition(".")[0] or 0) >= 13 else ()
    flags = (*NVCC_FLAGS, *newer, "-Xcompiler", _short_paths(root), *CUDA_DEFINES, *TORCH_DEFINES, *_includes(root, torch_root))
    plans = [s for s in _sources(root, "cuda/plan/*.cpp") if not s.name.endswith("_ops.cpp")]
    own = ("cuda/*.cpp", "cuda/*.cu", "cuda/chain/*.cpp", "cuda/chain/*.cu")
    sources = [*_sources(root, "common/*.cpp"), *plans, *_sources(root, *own)]
    have_wgmma = WGMMA_ARCHITECTURE in facts.cuda_architectures
    if have_wgmma:
        flags = (*flags, "-DRES2NET_FUSED_HAVE_WGMMA=1")
    units = []
    for source in sources:
        if source != instance_source:
            units.append(_unit(root, source, (*flags, *code), facts))
            continue
        for name in cuda_instances(root):
            is_wgmma = name.startswith(WGMMA_PREFIX)
            if have_wgmma or not is_wgmma:
                target_code = (_machine_code(WGMMA_ARCHITECTURE),) if is_wgmma else code
                units.append(_unit(root, source, (*flags, *target_code, instance_define(name)), facts, variant=name))
    # libtorch.so pulls in libtorch_cuda.so where torch has CUDA; linking it by name would need such a torch here.
    # One -Xlinker list, since nvcc moves -l options.
    torch_libraries = (f"-L{torch_root / 'lib'}", "-Xlinker", "--no-as-needed,-ltorch,--as-needed", "-ltorch_cpu")
    link = ("-shared", "-cudart", "static", *code, *_needs_ops(root, "-Xlinker="), *torch_libraries)
    return Target("cuda", CUDA_LIBRARY, "nvcc", tuple(units), link)


def python_target(root: Path, include_dirs: Iterable[str], suffix: str, facts: BuildFacts) -> Target:
    """The pybind11 module; `suffix` is the interpreter's EXT_SUFFIX, `include_dirs` hold Python.h and pybind11."""
    flags = (*CXX_FLAGS, "-I" + str(root / "csrc"), *(f for d in include_dirs for f in ("-isystem", str(d))))
    sources = _sources(root, "common/build_info.cpp", "python/*.cpp")
    return Target("python", PYTHON_MODULE + suffix, "cxx", tuple(_unit(root, s, flags, facts) for s in sources), ("-shared",))


def cuda_architectures(requested: str | None, supported: Sequence[int]) -> tuple[str, ...]:
    """Architectures to compile for.

    `requested` is a list such as "80;90a" (RES2NET_FUSED_CUDA_ARCHS); every entry must be supported. None or an empty
    string stands for those of DEFAULT_CUDA_ARCHITECTURES that are. `supported` holds numbers such as 90, from nvcc.
    Raises ValueError for an entry that is malformed or that this nvcc does not know.
    """
    if not requested or not requested.strip():
        return tuple(a for a in DEFAULT_CUDA_ARCHITECTURES if _arch_number(a) in supported)
    chosen = tuple(dict.fromkeys(a for a in re.split(r"[;,\s]+", requested.strip()) if a))
    for arch in chosen:
        if _arch_number(arch) not in supported:
            known = ", ".join(map(str, supported))
            raise ValueError(
                f"RES2NET_FUSED_CUDA_ARCHS: {arch!r} is not an architecture of this nvcc; expected entries such as 80 "
                f"or 90a among {known}, separated by semicolons"
            )
    return chosen


def gencode_flags(architectures: Sequence[str]) -> tuple[str, ...]:
    """nvcc's flags for machine code of each architecture, and for devices to come PTX of the newest, never without clusters."""
    newest = max((CLUSTER_PTX, *(number for a in architectures if (number := _arch_number(a)))))
    return (*map(_machine_code, architectures), f"-gencode=arch=compute_{newest},code=compute_{newest}")


def _machine_code(architecture: str) -> str:
    return f"-gencode=arch=compute_{architecture},code=sm_{architecture}"


def _arch_number(arch: str) -> int | None:
    match = re.fullmatch(r"(\d+)[af]?", arch)
    return int(match.group(1)) if match else None


def _needs_ops(root: Path, to_linker: str) -> tuple[str, ...]:
    # setup.py builds it first.
    library = Path(OPS_LIBRARY)
    folder = root / "build" / "native" / "ops"
    name = library.stem.removeprefix("lib")
    return (f"-L{folder}", f"{to_linker}-rpath,$ORIGIN,--no-as-needed,-l{name},--as-needed")


def _short_paths(root: Path) -> str:
    # torch's checks print __FILE__: relative to the checkout, whatever machine compiled it.
    return f"-ffile-prefix-map={root}/="


def _includes(root: Path, torch_root: Path) -> tuple[str, ...]:
    return ("-I" + str(root / "csrc"), "-isystem", str(torch_root / "include"))


def _sources(root: Path, *patterns: str) -> list[Path]:
    return [path for pattern in patterns for path in sorted((root / "csrc").glob(pattern))]


def _unit(root: Path, source: Path, flags: tuple[str, ...], facts: BuildFacts, variant: str = "") -> Unit:
    relative = source.relative_to(root / "csrc")
    if relative.as_posix() == "common/build_info.cpp":
        # Only this file carries the facts: a new commit recompiles nothing else.
        flags = (*flags, *facts.defines())
    return Unit(source, str(Path("obj", variant, relative.parent, relative.name + ".o")), flags)
