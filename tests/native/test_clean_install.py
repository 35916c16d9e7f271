"""The package in an environment that holds nothing but what it declares: installed from source without make, and as a wheel."""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import published
import pytest
from clean_environment import Environment, declared
from packaging.requirements import Requirement
from pages import PREAMBLE, ROOT, fenced

from res2net_fused.backends.cpu.settings import available_instruction_sets

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the native extension is built on Linux only")

PLATFORM = "manylinux_2_28_x86_64"
# The first block of the README, with this package's own network in the place of timm's.
WITHOUT_TIMM = """
import sys, types
from res2net_fused.models import create_model
sys.modules["timm"] = types.ModuleType("timm")
sys.modules["timm"].create_model = lambda name, pretrained: create_model(name, fused=False, layers=(1, 1, 1, 1))
"""


def build_tools() -> list[Requirement]:
    """What the README has a user install before the package, besides torch."""
    commands = re.findall(r"^ +pip install (torch [^#\n]+)", (ROOT / "README.md").read_text(), re.M)
    assert commands, "the README names no build tools"
    return [Requirement(word.strip("'\"")) for word in commands[0].split() if word != "torch"]


def sources(folder: Path) -> Path:
    """A copy of what an install from source reads, with nothing built."""
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        shutil.copy2(ROOT / name, folder)
    ignored = shutil.ignore_patterns("*.so", "build.json", "__pycache__")
    for name in ("csrc", "res2net_fused"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    return folder


def try_commands(environment: Environment, *, short: bool, cpu_library: bool) -> None:
    """info, check and the README's first block without the extra, bench without and with it.

    short: the smallest check, and no measurement: that bench gets past its extra is seen from what it says of a backend.
    """
    device = ("--device", "cpu")
    shapes = ("--configs", "64w1s", "--batch", "1", "--dtype", "float32", "--threads", "1") if short else ()
    environment.run("python", "-c", "import tqdm", status=1)
    info = environment.run("res2net-fused", "info", *device).stdout
    assert re.search(r"cpu library +loaded" if cpu_library else r"cpu library +not loaded: ", info), info
    check = environment.run("res2net-fused", "check", "--quick", *device, *shapes).stdout
    assert re.search(r"^[1-9]\d* comparisons, 0 misses$", check, re.M), check
    assert re.search("^not checked, network ", check, re.M) and "pip install 'res2net-fused[bench]'" in check
    (block, *_) = fenced(ROOT / "README.md", "python")
    shown = environment.run("python", "-c", f"{WITHOUT_TIMM}{PREAMBLE}{block.text}").stdout
    assert "4 of 4 blocks fused" in shown, shown
    (line,) = environment.run("res2net-fused", "bench", "--quick", status=2).stderr.splitlines()
    assert line.endswith("are not installed: pip install 'res2net-fused[bench]'"), line
    environment.expose(declared("bench"))
    bench = ("bench", "--quick", *device, "--out", environment.folder / "results")
    if short:
        assert "backend" in environment.run("res2net-fused", *bench, *shapes, "--backend", "cuda", status=2).stderr
        return
    environment.run("res2net-fused", *bench)
    assert (environment.folder / "results" / "bench-cpu.png").read_bytes().startswith(b"\x89PNG")


def test_the_readme_names_what_a_build_needs():
    """pip does not fetch it with --no-build-isolation; pybind11 is for builds in place, and wheel is part of setuptools."""
    project = (ROOT / "pyproject.toml").read_text()
    (texts,) = re.findall(r"^requires = \[(.*)\]$", project, re.M)
    required = {requirement.name: requirement for requirement in map(Requirement, re.findall(r'"([^"]+)"', texts))}
    named = {requirement.name: requirement for requirement in build_tools()}
    assert set(required) - {"pybind11", "wheel"} <= set(named)
    assert named["setuptools"].specifier == required["setuptools"].specifier


def test_the_page_recommends_what_the_readme_says():
    """The first indented block of each, without comments."""
    first = [re.search(r"(?:^ {4}.+\n)+", (ROOT / page).read_text(), re.M)[0] for page in ("README.md", "docs/install.md")]
    commands = [[line.partition("  #")[0].strip() for line in block.splitlines()] for block in first]
    assert commands[0] == commands[1] and len(commands[0]) == 2


@pytest.mark.slow  # builds everything once more, which `make setup` does too
def test_from_source_without_make(tmp_path):
    """Pure Python, which compiles nothing; the whole way is a slow test."""
    environment = Environment(tmp_path / "venv")
    environment.expose(build_tools())
    environment.pip("--no-build-isolation", sources(tmp_path / "sources"), RES2NET_FUSED_BUILD="off")
    try_commands(environment, short=True, cpu_library=False)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["source", "wheel"])
def test_the_whole_way(way, tmp_path):
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")
    builder = environment = Environment(tmp_path / "venv")
    if way == "wheel":
        builder = Environment(tmp_path / "builder")
    builder.expose(build_tools())
    settings = {"RES2NET_FUSED_BUILD": "require", "RES2NET_FUSED_CUDA_ARCHS": "none"}
    if way == "source":
        environment.pip("--no-build-isolation", sources(tmp_path / "sources"), **settings)
    else:
        pip = [sys.executable, "-m", "pip", "--python", str(builder.python), "wheel", "--no-index", "--no-build-isolation"]
        command = [*pip, "--no-deps", "-w", str(tmp_path), str(sources(tmp_path / "sources"))]
        done = subprocess.run(command, env=builder.variables | settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        (wheel,) = tmp_path.glob("*.whl")
        environment.pip(wheel)
    try_commands(environment, short=False, cpu_library=True)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """What `make wheels` makes for this processor."""
    if platform.machine() != "x86_64":
        pytest.skip("the wheel of x86-64 is tried")
    return published.published(PLATFORM, tmp_path_factory.mktemp("published"))


def installed_wheel(files: Path, folder: Path, platform: str = PLATFORM) -> Environment:
    """An environment with nothing but the wheel and what it requires, and no compiler on PATH."""
    wheel = published.wheel_in(files, platform)
    assert wheel.stat().st_size < 30 << 20
    environment = Environment(folder)
    environment.variables["PATH"] = str(environment.folder / "bin")
    environment.pip(wheel)
    return environment


def test_the_published_wheel_has_every_kernel(files, tmp_path):
    """The instruction sets that a build here has, and errors of C++ that reach Python: both depend on how it is linked."""
    environment = installed_wheel(files, tmp_path / "venv")
    environment.run("python", "-c", "import triton", status=1)
    tried = """
import torch, res2net_fused as rf
from res2net_fused.backends.cpu.settings import available_instruction_sets
print(*available_instruction_sets())
try:
    torch.ops.res2net_fused_native.cpu_norm_statistics(torch.zeros(1, 2, 3, 3), 0.0, 99)
except RuntimeError as error:
    print(error)
block = rf.Bottle2neck(16, 4, scale=4, baseWidth=32).eval()
with torch.no_grad():
    print(rf.explain(block, torch.randn(1, 16, 5, 5)))
"""
    sets, *rest = environment.run("python", "-OO", "-c", tried).stdout.splitlines()  # without docstrings and assertions
    assert sets.split() == available_instruction_sets()
    assert "must be channels-last" in rest[0]
    assert re.search(r"yes +cpu ", "\n".join(rest)), rest


@pytest.mark.slow
def test_the_published_wheel_is_the_whole_product(files, tmp_path):
    try_commands(installed_wheel(files, tmp_path / "venv"), short=True, cpu_library=True)


@pytest.mark.slow
def test_the_wheel_for_any_system_is_a_whole_product_too(files, tmp_path):
    try_commands(installed_wheel(files, tmp_path / "venv", "any"), short=True, cpu_library=False)


ON_REFERENCE = """
import sys, torch, res2net_fused as rf
from res2net_fused import cli
torch.manual_seed(0)
block, x = rf.Bottle2neck(16, 4, scale=4, baseWidth=32).eval(), torch.randn(1, 16, 5, 5)
with torch.no_grad():
    out, said = block(x), str(rf.explain(block, x))
    exact = block.double()(x.double())
assert (out - exact).norm() < 5e-6 * exact.norm()
print(rf.__file__, said, sep="\\n")
sys.exit(cli.main(["info", "--device", "cpu"]))
"""


def test_the_wheel_for_any_system_says_what_is_missing(files, tmp_path):
    environment = installed_wheel(files, tmp_path / "venv", "any")
    file, *rest = environment.run("python", "-c", ON_REFERENCE).stdout.splitlines()
    assert file.startswith(str(environment.site)) and re.search("yes +reference ", "\n".join(rest))
    why = "the cpu library was not built: this is the wheel without native code, which pip takes where no other fits"
    assert re.search(f"cpu library +not loaded: {why}: on Linux run `pip install", "\n".join(rest))


def test_a_wheel_that_is_not_unpacked(files, tmp_path):
    """On sys.path itself, as zipped applications have packages."""
    environment, wheel = Environment(tmp_path / "venv"), published.wheel_in(files, PLATFORM)
    environment.variables["PYTHONPATH"] = str(wheel)
    file, *rest = environment.run("python", "-c", ON_REFERENCE).stdout.splitlines()
    assert file.startswith(str(wheel)) and re.search("yes +reference ", "\n".join(rest))
    assert re.search("cpu library +not loaded: .* lies in an archive", "\n".join(rest))


def stand_in(folder: Path, name: str, version: str) -> None:
    """An empty wheel."""
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{information}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{information}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{information}/RECORD", "")


@pytest.mark.parametrize("system, expected", [
    (PLATFORM, PLATFORM), ("manylinux_2_17_x86_64", "any"), ("musllinux_1_2_x86_64", "any"), ("macosx_14_0_arm64", "any"),
    ("win_amd64", "any"),
])  # fmt: skip
def test_what_pip_takes_of_an_index(files, tmp_path, system, expected):
    """With torch there, wherever it is from, and no Triton, which PyPI has for no more than glibc on two processors."""
    for name, version in (("torch", "2.13.0"), ("numpy", "2.0.0")):
        stand_in(tmp_path, name, version)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-index", "--report", "-"]
    offered = ["--find-links", str(files), "--find-links", str(tmp_path), "--only-binary", ":all:"]
    machine = ["--platform", system, "--python-version", "3.12", "--target", str(tmp_path / "site")]
    done = subprocess.run([*pip, *offered, *machine, "res2net-fused"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names = {entry["metadata"]["name"]: entry["download_info"]["url"] for entry in json.loads(done.stdout)["install"]}
    assert set(names) == {"res2net-fused", "torch", "numpy"} and names["res2net-fused"].endswith(f"-py3-none-{expected}.whl")


def test_the_published_sources(files):
    """Everything that is under version control."""
    (archive,) = files.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    tracked = {name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()}
    assert tracked - names <= {".gitignore", "res2net_fused/lib/.gitignore"}
    sums = dict(line.split("  ")[::-1] for line in (files / "SHA256SUMS").read_text().splitlines())
    assert sums[archive.name] == hashlib.sha256(archive.read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_published_sources_build_without_an_index(files, tmp_path):
    (archive,) = files.glob("*.tar.gz")
    environment = Environment(tmp_path / "venv")
    environment.expose(build_tools())
    environment.pip("--no-build-isolation", archive, RES2NET_FUSED_BUILD="off")
    environment.run("python", "-c", "import res2net_fused")
