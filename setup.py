"""Builds the native extension through ninja; everything else about the package is in pyproject.toml.

RES2NET_FUSED_BUILD: "auto" (default) builds what it can and says what is missing, "require" fails instead, "off" builds
nothing. RES2NET_FUSED_CUDA_ARCHS: architectures such as "80;90a", or "none" for no CUDA library. CXX and CUDA_HOME choose the
compilers (else they are looked for: res2net_fused/_native/cuda_toolkit.py), MAX_JOBS limits the parallel ones.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGE = "res2net_fused"
REBUILD = "pip install --no-build-isolation ."


def load(name):
    # By path: importing the package would import torch, which may not be there yet.
    spec = importlib.util.spec_from_file_location(f"res2net_fused_{name}", ROOT / PACKAGE / "_native" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


flags, toolkit = load("build_flags"), load("cuda_toolkit")


class Missing(Exception):
    """A part of the extension cannot be built here; the message says what is missing and how to get it."""


class NotWanted(Missing):
    """A part that this machine or the user leaves out: no failure, even under RES2NET_FUSED_BUILD=require."""


def build_mode():
    mode = os.environ.get("RES2NET_FUSED_BUILD", "").strip().lower() or "auto"
    if mode not in ("auto", "require", "off"):
        raise SystemExit(f"RES2NET_FUSED_BUILD: expected 'auto', 'require' or 'off', got {mode!r}")
    return mode


def find_torch():
    """The folder of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    need = ".".join(map(str, flags.TORCH_TARGET))
    if spec is None or not spec.submodule_search_locations:
        raise Missing(f"torch is not installed in the build environment: install torch >= {need}, then run `{REBUILD}`")
    folder = Path(next(iter(spec.submodule_search_locations)))
    header = folder / "include" / "torch" / "headeronly" / "version.h"
    if not header.is_file():
        raise Missing(f"{folder} has no C++ headers: install torch >= {need} from its wheel, then run `{REBUILD}`")
    found = tuple(int(n) for n in re.findall(r"#define TORCH_VERSION_(?:MAJOR|MINOR) (\d+)", header.read_text()))
    if found < flags.TORCH_TARGET:
        raise Missing(f"torch {'.'.join(map(str, found))} is too old: install torch >= {need}, then run `{REBUILD}`")
    return folder


def find_compiler():
    """The C++ compiler as a list of words: $CXX, else the first of c++, g++, clang++ on PATH."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    looked = f"CXX={os.environ['CXX']}" if chosen else "c++, g++, clang++"
    raise Missing(
        f"no C++ compiler found (looked for {looked}): install one with C++20, such as GCC >= 11 "
        f"(Debian and Ubuntu: `apt-get install g++`; conda: `conda install gxx`), then run `{REBUILD}`"
    )


def find_nvcc(torch_folder):
    try:
        return toolkit.find_nvcc(toolkit.torch_cuda(torch_folder))
    except toolkit.NvccNotFound as error:
        raise NotWanted(f"{error}, then run `{REBUILD}`") from None
    except toolkit.NoNvcc as error:
        raise Missing(f"{error}, then run `{REBUILD}`") from None


def find_ninja():
    try:
        import ninja

        path = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        path = None
    path = path or shutil.which("ninja")
    if path is None:
        raise Missing(f"ninja not found: `pip install ninja`, then run `{REBUILD}`")
    return path


def output_of(*command):
    """Standard output, or None where the command cannot run or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def source_commit():
    # An unpacked sdist may lie inside somebody else's repository.
    if output_of("git", "rev-parse", "--show-toplevel") != str(ROOT):
        return "unknown"
    return output_of("git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*") or "unknown"


@contextmanager
def locked(folder):
    """Two installs from one checkout share the build folder."""
    import fcntl  # absent on Windows, where nothing is built

    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_ninja(target, folder, cxx, nvcc):
    """Writes folder/build.ninja for one target of build_flags."""
    words = nvcc.command(cxx[-1]) if target.compiler == "nvcc" else cxx
    compiler = shlex.join(words).replace("$", "$$")
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {compiler} -MD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {compiler} $in $flags -o $out",
        "  description = link $out",
    ]

    def path(name):
        return str(name).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")

    def variable(words):
        return shlex.join(words).replace("$", "$$")

    for unit in target.units:
        lines += [f"build {path(unit.object)}: compile {path(unit.source)}", f"  flags = {variable(unit.flags)}"]
    objects = " ".join(path(unit.object) for unit in target.units)
    output = path(Path(target.output).name)
    lines += [f"build {output}: link {objects}", f"  flags = {variable(target.link_flags)}", f"default {output}", ""]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines))


def run_ninja(target, folder, ninja):
    jobs = os.environ.get("MAX_JOBS", "").strip()
    command = [ninja, "-C", str(folder), *(["-j", jobs] if jobs else [])]
    stale = len(re.findall(r"^\S+ compile ", output_of(*command, "-n") or "", re.M))
    if stale:
        print(f"res2net-fused: compiling the {target.name} part, {stale} of {len(target.units)} files", flush=True)
    # On a terminal ninja shows how far it is; elsewhere it would print a line for each file.
    pipes = {} if sys.stdout.isatty() else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    done = subprocess.run(command, text=True, **pipes)
    if done.returncode:
        print(done.stdout or "", file=sys.stderr)
        raise Missing(
            f"compiling the {target.name} part failed (the compiler's output is above; with pip, add -v to see it): it "
            f"needs C++20, such as GCC >= 11; then run `{REBUILD}`"
        )
    return folder / Path(target.output).name


class NativeBuild(build_ext):
    """Builds each part that the machine has the tools for and records what was built, or why not."""

    def run(self):
        self.in_place = self.inplace or getattr(self, "editable_mode", False)
        self.package_dir = ROOT / PACKAGE if self.in_place else Path(self.build_lib).resolve() / PACKAGE
        self.mode = build_mode()
        self.parts = {}
        facts = {
            "commit": source_commit(),
            "instruction_sets": flags.kernel_instruction_sets(ROOT, platform.machine()),
        }
        # CUDA first: the other two report which CUDA version was built.
        facts |= self.build_part("cuda", flags.CUDA_LIBRARY, self.plan_cuda, facts) or {}
        self.build_part("cpu", flags.CPU_LIBRARY, self.plan_cpu, facts)
        module = flags.PYTHON_MODULE + sysconfig.get_config_var("EXT_SUFFIX")
        self.build_part("python", module, self.plan_python, facts)
        self.write_record(facts)
        for name, part in self.parts.items():
            outcome = f"built {part['file']}" if part["built"] else f"NOT BUILT: {part['reason']}"
            print(f"res2net-fused, native extension, {name}: {outcome}", file=sys.stderr)

    def build_part(self, name, output, plan, facts):
        """Builds one part and puts it into the package; returns the facts it adds, or None where it is left out."""
        destination = self.package_dir / output
        try:
            if self.mode == "off":
                raise NotWanted("RES2NET_FUSED_BUILD=off asked for no native extension")
            if platform.system() != "Linux":
                raise Missing(f"the native extension is built on Linux only, not on {platform.system()}")
            target, added, nvcc = plan(facts)
            folder = ROOT / "build" / "native" / name
            with locked(folder):
                write_ninja(target, folder, find_compiler(), nvcc)
                built = run_ninja(target, folder, find_ninja())
                destination.parent.mkdir(parents=True, exist_ok=True)
                fresh = destination.with_name(destination.name + ".new")
                shutil.copy2(built, fresh)
                os.replace(fresh, destination)  # a process that has the old file mapped keeps it
        except Missing as missing:
            if self.mode == "require" and not isinstance(missing, NotWanted):
                raise SystemExit(f"res2net-fused, RES2NET_FUSED_BUILD=require, {name}: {missing}") from None
            destination.unlink(missing_ok=True)  # of an earlier build: it would not fit the rest
            self.parts[name] = {"built": False, "file": output, "size": None, "reason": str(missing)}
            return None
        self.parts[name] = {"built": True, "file": output, "size": destination.stat().st_size, "reason": ""}
        return added

    def plan_cuda(self, facts):
        requested = os.environ.get("RES2NET_FUSED_CUDA_ARCHS")
        if requested and requested.strip().lower() == "none":
            raise NotWanted("RES2NET_FUSED_CUDA_ARCHS=none asked for no CUDA library")
        torch_folder = find_torch()
        nvcc = find_nvcc(torch_folder)
        supported = [int(n) for n in re.findall(r"compute_(\d+)", output_of(str(nvcc.path), "--list-gpu-arch") or "")]
        if not supported:
            raise Missing(f"{nvcc.path} is too old to list its architectures: install CUDA >= 12")
        try:
            architectures = flags.cuda_architectures(requested, supported)
        except ValueError as error:
            raise SystemExit(str(error)) from None
        added = {"cuda_version": nvcc.version, "cuda_architectures": architectures}
        return flags.cuda_target(ROOT, torch_folder, flags.BuildFacts(**facts, **added)), added, nvcc

    def plan_cpu(self, facts):
        return flags.cpu_target(ROOT, find_torch(), platform.machine(), flags.BuildFacts(**facts)), {}, None

    def plan_python(self, facts):
        if not self.in_place:
            raise NotWanted("wheels serve every Python, and this module one: build.json says the same")
        try:
            import pybind11
        except ImportError:
            raise Missing(f"pybind11 not found: `pip install 'pybind11>=2.13'`, then run `{REBUILD}`") from None
        python_include = sysconfig.get_path("include")
        if not Path(python_include, "Python.h").is_file():
            raise Missing(f"{python_include}/Python.h not found: install Python's headers (Debian: python3-dev)")
        includes = (python_include, pybind11.get_include())
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        return flags.python_target(ROOT, includes, suffix, flags.BuildFacts(**facts)), {}, None

    def write_record(self, facts):
        """lib/build.json: what res2net_fused/_native/library.py reads."""
        built_cpu = self.parts["cpu"]["built"]
        version = output_of(*find_compiler(), "--version") if built_cpu else None
        info = {
            "compiler": version.splitlines()[0] if version else None,
            "torch_target": ".".join(map(str, flags.TORCH_TARGET)),
            "commit": facts["commit"],
            "instruction_sets": facts["instruction_sets"] if built_cpu else [],
            "cuda_version": facts.get("cuda_version"),
            "cuda_architectures": facts.get("cuda_architectures", []),
        }
        record = self.package_dir / flags.BUILD_RECORD
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"info": info, "parts": self.parts}, indent=2) + "\n")

    # setuptools asks these of every build_ext; the files of an editable install lie in the source tree already.
    def get_source_files(self):
        return []

    def get_outputs(self):
        built = [part["file"] for part in getattr(self, "parts", {}).values() if part["built"]]
        return [str(Path(self.build_lib, PACKAGE, name)) for name in [*built, flags.BUILD_RECORD]]

    def get_output_mapping(self):
        return {}


class AnyPythonWheel(bdist_wheel):
    """The libraries know torch's stable ABI and nothing of Python: one wheel per platform."""

    def run(self):
        # What earlier builds left, modules that are gone or another Python's, would be packed too.
        left = Path(self.get_finalized_command("build").build_lib).resolve()
        if left.is_relative_to(ROOT / "build") and not self.skip_build:
            shutil.rmtree(left, ignore_errors=True)
        super().run()

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


# The extension without sources tells setuptools that the wheel is not pure Python; NativeBuild names the real ones.
setup(
    ext_modules=[Extension(f"{PACKAGE}.{flags.PYTHON_MODULE}", sources=[])],
    cmdclass={"build_ext": NativeBuild, "bdist_wheel": AnyPythonWheel},
)
