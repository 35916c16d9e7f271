"""Builds the native extension through ninja; everything else about the package is in pyproject.toml.

RES2NET_FUSED_BUILD: "auto" (default) builds what it can and says what is missing, "require" fails instead, "off" builds
nothing. RES2NET_FUSED_CUDA_ARCHS: architectures such as "80;90a", or "none" for no CUDA library. CXX and CUDA_HOME choose the
compilers (else they are looked for: res2net_fused/_native/cuda_toolkit.py), MAX_JOBS limits the parallel ones.
RES2NET_FUSED_PLATFORM: a wheel's platform to build for instead of this system's, such as manylinux_2_28_aarch64
(release/link.py; `make wheels` sets it), or "any" for the wheel without native code.
RES2NET_FUSED_COMMIT: what the build says it was made from, where git cannot say it.
"""

import concurrent.futures
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

try:
    from setuptools import Extension, setup
    from setuptools.command.bdist_wheel import bdist_wheel
    from setuptools.command.build_ext import build_ext
except ImportError:
    if __name__ == "__main__":
        raise
    bdist_wheel = build_ext = object  # who imports this file for `build_in_place` may have none

ROOT = Path(__file__).resolve().parent
PACKAGE = "res2net_fused"
REBUILD = "pip install --no-build-isolation ."
PURE = f"this is the wheel without native code, which pip takes where no other fits: on Linux run `{REBUILD}` in the sources"


def load(name, folder=f"{PACKAGE}/_native"):
    # By path: importing the package would import torch, which may not be there yet.
    spec = importlib.util.spec_from_file_location(f"res2net_fused_{name}", ROOT / folder / f"{name}.py")
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


class Toolchain:
    """What compiles and links for this machine, or for the platform that RES2NET_FUSED_PLATFORM names."""

    def __init__(self):
        self.platform = os.environ.get("RES2NET_FUSED_PLATFORM", "").strip()
        self.machine, self.folder, self.link = platform.machine(), ROOT / "build" / "native", None
        if self.platform and not self.pure:
            self.link = load("link", "release")
            try:
                self.machine = self.link.machine_of(self.platform)
            except ValueError as error:
                raise SystemExit(f"RES2NET_FUSED_PLATFORM: {error}") from None
        if self.crosses:  # else the objects are the same, and only the link is another
            self.folder /= self.machine

    @property
    def pure(self):
        return self.platform == "any"

    @property
    def crosses(self):
        return self.machine != platform.machine()

    def compiler(self):
        if self.crosses and not os.environ.get("CXX"):
            command = f"{self.machine}-linux-gnu-g++"
            if not shutil.which(command):
                raise Missing(f"{command} not found: install it (Debian: `apt-get install g++-{self.machine}-linux-gnu`)")
            return [command]
        return find_compiler()

    def linker(self):
        """The command that links, or None where the compiler does."""
        if self.link is None:
            return None
        if importlib.util.find_spec("ziglang") is None:
            raise Missing("zig not found, which links wheels: `pip install ziglang`")
        return [sys.executable, str(ROOT / "release" / "link.py"), self.platform, *self.compiler()]


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
    """Its path, or None."""
    try:
        import ninja

        path = shutil.which("ninja", path=ninja.BIN_DIR)
    except ImportError:
        path = None
    return path or shutil.which("ninja")


def output_of(*command):
    """Standard output, or None where the command cannot run or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def source_commit():
    if os.environ.get("RES2NET_FUSED_COMMIT"):
        return os.environ["RES2NET_FUSED_COMMIT"]
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


def write_ninja(target, folder, command, linker):
    """Writes folder/build.ninja for one target of build_flags."""
    compiler, linker = (shlex.join(words).replace("$", "$$") for words in (command, linker))
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {compiler} -MD -MF $out.d $flags -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "  description = compile $out",
        "rule link",
        f"  command = {linker} $in $flags -o $out",
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
    # A change of how wheels are linked links them again.
    ways = [] if linker == compiler else sorted(file for file in (ROOT / "release").iterdir() if file.is_file())
    lines += [
        f"build {output}: link {objects} | {' '.join(map(path, ways))}",
        f"  flags = {variable(target.link_flags)}",
        f"default {output}",
        "",
    ]
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


def compile_target(target, compiler, folder, ninja=None, linker=None):
    """Compiles what has changed since the last time in `folder`, by ninja where there is one, and links; returns the output.

    compiler: its command, as a list of words, and so `linker`, if not the same. Raises Missing with what the compiler said.
    """
    folder.mkdir(parents=True, exist_ok=True)
    linker = linker or compiler
    if ninja is not None:
        write_ninja(target, folder, compiler, linker)
        return run_ninja(target, folder, ninja)
    with concurrent.futures.ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", "").strip() or os.cpu_count() or 1)) as pool:
        print(f"res2net-fused: building the {target.name} part, {len(target.units)} files", flush=True)
        try:
            list(pool.map(lambda unit: compile_unit(unit, compiler, folder), target.units))
            output = folder / Path(target.output).name
            run_compiler([*linker, *(unit.object for unit in target.units), *target.link_flags, "-o", output.name], folder)
        except subprocess.CalledProcessError as error:
            said = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[:300])
            raise Missing(f"compiling the {target.name} part failed: {said}") from None
    return output


def run_compiler(command, folder):
    subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)


def compile_unit(unit, compiler, folder):
    """Compiles one file as ninja would: unless its output is newer than all that it was made from, by this very command."""
    made = folder / unit.object
    note, dependencies = (made.with_name(made.name + suffix) for suffix in (".command", ".d"))
    command = [*compiler, *unit.flags, "-MD", "-MF", f"{unit.object}.d", "-c", str(unit.source), "-o", unit.object]
    try:
        sources = dependencies.read_text().split(":", 1)[1].replace("\\\n", " ").split()
        if note.read_text() == "\0".join(command) and all(
            os.stat(source).st_mtime <= made.stat().st_mtime for source in sources
        ):
            return
    except (OSError, IndexError):
        pass  # never made, or not to the end
    made.parent.mkdir(parents=True, exist_ok=True)
    note.unlink(missing_ok=True)  # a compiler that is ended halfway leaves half an object
    run_compiler(command, folder)
    note.write_text("\0".join(command))


class NativeParts:
    """Builds each part that the machine has the tools for into a package, and records what was built, or why not."""

    def __init__(self, package_dir, mode, architectures, in_place, needs_ninja=True, commit=None):
        """architectures: those of CUDA, as RES2NET_FUSED_CUDA_ARCHS has them, or None."""
        self.package_dir, self.mode, self.in_place, self.needs_ninja = package_dir, mode, in_place, needs_ninja
        self.architectures, self.commit = architectures, commit or source_commit()
        self.tools, self.parts = Toolchain(), {}

    def build(self):
        """Returns by part whether it was built, as which file, and why not."""
        facts = {"commit": self.commit, "instruction_sets": flags.kernel_instruction_sets(ROOT, self.tools.machine)}
        self.build_part("ops", flags.OPS_LIBRARY, self.plan_ops, facts)  # the CPU and the CUDA library are linked with it
        # CUDA before what reports which CUDA version was built.
        facts |= self.build_part("cuda", flags.CUDA_LIBRARY, self.plan_cuda, facts) or {}
        self.build_part("cpu", flags.CPU_LIBRARY, self.plan_cpu, facts)
        module = flags.PYTHON_MODULE + sysconfig.get_config_var("EXT_SUFFIX")
        self.build_part("python", module, self.plan_python, facts)
        self.write_record(facts)
        return self.parts

    def build_part(self, name, output, plan, facts):
        """Builds one part and puts it into the package; returns the facts it adds, or None where it is left out."""
        destination = self.package_dir / output
        try:
            if self.mode == "off":
                raise NotWanted("RES2NET_FUSED_BUILD=off asked for no native extension")
            if self.tools.pure:
                raise NotWanted(PURE)
            if platform.system() != "Linux":
                raise Missing(f"the native extension is built on Linux only, not on {platform.system()}")
            target, added, nvcc = plan(facts)
            tools, ninja = self.tools, find_ninja()
            cxx, linker = tools.compiler(), tools.linker()
            if linker and nvcc:
                linker += nvcc.library_folders()
            if ninja is None and self.needs_ninja:
                raise Missing(f"ninja not found: `pip install ninja`, then run `{REBUILD}`")
            folder = tools.folder / name
            with locked(folder):
                built = compile_target(target, nvcc.command(cxx[-1]) if nvcc else cxx, folder, ninja, linker)
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

    def plan_ops(self, facts):
        return flags.ops_target(ROOT, find_torch()), {}, None

    def plan_cuda(self, facts):
        requested = self.architectures
        if requested and requested.strip().lower() == "none":
            raise NotWanted("RES2NET_FUSED_CUDA_ARCHS=none asked for no CUDA library")
        if self.tools.crosses:
            raise NotWanted(f"the CUDA library is not built for {self.tools.machine} on {platform.machine()}")
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
        return flags.cpu_target(ROOT, find_torch(), self.tools.machine, flags.BuildFacts(**facts)), {}, None

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
        version = output_of(*self.tools.compiler(), "--version") if built_cpu else None
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


def architecture(capability):
    """What nvcc calls a GPU of this compute capability; Hopper's own instructions exist in 90a only."""
    return "90a" if capability == (9, 0) else "{}{}".format(*capability)


def build_in_place(capability, commit=None):
    """Builds into the checkout, for a GPU of this compute capability or, where it is None, for the CPU alone.

    Needs neither setuptools nor ninja. Returns what was not built, one line for each part.
    """
    chosen = "none" if capability is None else architecture(capability)
    try:
        parts = NativeParts(ROOT / PACKAGE, "auto", chosen, in_place=True, needs_ninja=False, commit=commit).build()
    except SystemExit as error:  # an architecture that this nvcc does not know
        return [str(error)]
    return [f"{name}: NOT BUILT: {part['reason']}" for name, part in parts.items() if not part["built"]]


class NativeBuild(build_ext):
    """What pip and `setup.py build_ext` run."""

    def run(self):
        in_place = self.inplace or getattr(self, "editable_mode", False)
        package_dir = ROOT / PACKAGE if in_place else Path(self.build_lib).resolve() / PACKAGE
        architectures = os.environ.get("RES2NET_FUSED_CUDA_ARCHS")
        self.parts = NativeParts(package_dir, build_mode(), architectures, in_place).build()
        for name, part in self.parts.items():
            outcome = f"built {part['file']}" if part["built"] else f"NOT BUILT: {part['reason']}"
            print(f"res2net-fused, native extension, {name}: {outcome}", file=sys.stderr)

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
        # auditwheel says which manylinux it is.
        chosen = Toolchain()
        if chosen.pure:
            return "py3", "none", "any"
        return "py3", "none", f"linux_{chosen.machine}" if chosen.platform else super().get_tag()[2]


# The extension without sources tells setuptools that the wheel is not pure Python; NativeBuild names the real ones.
if __name__ == "__main__":
    setup(
        ext_modules=[Extension(f"{PACKAGE}.{flags.PYTHON_MODULE}", sources=[])],
        cmdclass={"build_ext": NativeBuild, "bdist_wheel": AnyPythonWheel},
    )
