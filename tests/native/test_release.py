"""How wheels for other systems are linked, and the table of the versions that were tried."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from record_cases import load_setup
from tree import ROOT, TESTS


class Case(NamedTuple):
    """What the choice of cases knows of a test."""

    nodeid: str


def script(path: str):
    spec = importlib.util.spec_from_file_location(f"script_{path.replace('/', '_')}", ROOT / f"{path}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_flags_are_translated_for_zig():
    """Libraries leave the lists for the linker, and as-needed goes: of what stands for PyTorch nothing would seem needed."""
    given = ["a.o", "-shared", "-cudart", "static", "-gencode=arch=compute_90a,code=sm_90a", "-Xlinker=-rpath,$ORIGIN,-lops",
             "-Xlinker", "--no-as-needed,-ltorch,--as-needed", "-ltorch_cpu", "-Wl,-soname,liba.so", "-o", "a.so"]  # fmt: skip
    expected = ["a.o", "-shared", "-lcudart_static", "-lrt", "-ldl", "-Wl,-rpath,$ORIGIN", "-lops", "-ltorch", "-ltorch_cpu",
                "-Wl,-soname,liba.so", "-o", "a.so"]  # fmt: skip
    assert script("release/link")._translated(given) == expected


@pytest.mark.parametrize("platform", ["linux_x86_64", "manylinux_2_28_riscv64", "musllinux_1_2_x86_64", "macosx_11_0_arm64"])
def test_other_platforms_are_refused(platform):
    env = os.environ | {"RES2NET_FUSED_PLATFORM": platform}
    done = subprocess.run([sys.executable, "setup.py", "build_ext"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode != 0
    assert f"RES2NET_FUSED_PLATFORM: platform is {platform!r}; expected such as manylinux_2_28_x86_64" in done.stderr


def test_what_is_missing_for_another_processor(monkeypatch):
    setup = load_setup()
    monkeypatch.setenv("RES2NET_FUSED_PLATFORM", "manylinux_2_28_aarch64")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(setup.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(setup.shutil, "which", lambda *_, **__: None)
    with pytest.raises(setup.Missing, match="aarch64-linux-gnu-g[+][+] not found: .*apt-get install g[+][+]-aarch64-linux-gnu"):
        setup.Toolchain().compiler()
    assert (
        setup.flags.kernel_instruction_sets(ROOT, "aarch64") == ("neon",) == setup.flags.kernel_instruction_sets(ROOT, "arm64")
    )


# torch and filelock are this machine's; what the package itself asks of the system is another one's.
ELSEWHERE = """
import os, pathlib, platform, signal, sys
import filelock, torch, torch.utils.data
name, folder = sys.argv[1:]
sys.path.insert(0, folder)
absent = {"triton"} | ({"fcntl", "grp", "pwd", "resource", "termios"} if name == "Windows" else set())
for module in [module for module in sys.modules if module.partition(".")[0] in absent]:
    del sys.modules[module]
class Absent:
    @staticmethod
    def find_spec(module, path=None, target=None):
        if module.partition(".")[0] in absent:
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)
sys.meta_path.insert(0, Absent)
del os.sched_getaffinity
if name == "Windows":
    del os.fork, os.killpg, signal.SIGKILL
read = pathlib.Path.read_text
def read_text(path, *args, **kwargs):
    if path.parts[:2] in (("/", "proc"), ("/", "sys")):
        raise FileNotFoundError(2, "No such file or directory", str(path))
    return read(path, *args, **kwargs)
pathlib.Path.read_text = read_text
sys.platform = {"Darwin": "darwin", "Windows": "win32", "Linux": "linux"}[name]
platform.system = lambda: name

import res2net_fused as rf
from res2net_fused import cli
assert rf.__file__.startswith(folder), rf.__file__
from res2net_fused.models import create_model
model = create_model("res2net50_26w_4s", fused=False, layers=(1, 1, 1, 1)).eval()
x = torch.randn(1, 3, 32, 32)
with torch.no_grad():
    plain = model.double()(x.double())
    accelerated = rf.accelerate(model.float())
    error = (accelerated(x).double() - plain).norm() / plain.norm()
assert error < 5e-6, error
print(rf.explain(accelerated, x))
accelerated.train()(x.repeat(2, 1, 1, 1)).sum().backward()
sys.exit(cli.main(["info", "--device", "cpu"]))
"""


@pytest.mark.parametrize("system", [pytest.param(name, marks=pytest.mark.slow) for name in ("Darwin", "Linux")] + ["Windows"])
def test_without_a_wheel_pure_python_runs_and_says_what_is_missing(system, monkeypatch, tmp_path):
    """macOS, Windows, and a Linux without a compiler, such as one with musl: what setup.py leaves there, and what it runs."""
    setup = load_setup()
    package = tmp_path / "res2net_fused"
    shutil.copytree(ROOT / "res2net_fused", package, ignore=shutil.ignore_patterns("*.so", "build.json", "__pycache__"))
    monkeypatch.setattr(setup.platform, "system", lambda: system)
    monkeypatch.setattr(setup.shutil, "which", lambda *_, **__: None)
    monkeypatch.delenv("CXX", raising=False)
    parts = setup.NativeParts(package, "auto", None, in_place=False, commit="c0ffee").build()
    assert not any(part["built"] for part in parts.values())
    why = "no C++ compiler found" if system == "Linux" else f"is built on Linux only, not on {system}"
    assert why in parts["cpu"]["reason"]
    command = [sys.executable, "-c", ELSEWHERE, system, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "4 of 4 blocks fused" in done.stdout and re.search(r"yes +reference ", done.stdout), done.stdout
    assert re.search(rf"cpu library +not loaded: the cpu library was not built: .*{re.escape(why)}", done.stdout), done.stdout


def test_the_table_of_versions_keeps_one_row_for_each():
    run = script("tests/integration/versions/run")
    page = f"before\n{run.BEGIN}\n| Python |\n|---|\n{run.END}\nafter\n"
    page = run.with_row(page, "3.11.7|2.11.0|3.6.0|x86_64", "FAILED: -m pytest")
    page = run.with_row(page, "3.11.7|2.13.0|3.7.1|x86_64", "passed")
    page = run.with_row(page, "3.11.7|2.11.0|3.6.0|x86_64", "passed")
    rows = [line for line in page.splitlines() if line.startswith("| 3")]
    assert [row.split(" | ")[1] for row in rows] == ["2.13.0", "2.11.0"]
    assert all(row.endswith("| passed |") for row in rows) and page.startswith("before\n") and page.endswith("after\n")


def test_core_tests_run_where_the_checkout_is_not_imported():
    """A Python that starts in it imports its package in the place of the wheel that is tried."""
    for name in script("tests/integration/versions/run").CORE:
        path = TESTS / name
        for file in path.rglob("test_*.py") if path.is_dir() else [path]:
            assert not re.search(r"\bcwd=(ROOT|TESTS)\b", file.read_text()), file


@pytest.mark.parametrize("most, kept", [(None, 8), (1, 2), (2, 3), (9, 8)])
def test_a_few_cases_of_each_test(most, kept, pytestconfig):
    conftest = pytestconfig.pluginmanager.get_plugin(str(TESTS / "conftest.py"))
    cases = [Case(f"tests/test_a.py::{name}[{k}]") for name, count in (("test_one", 1), ("test_many", 7)) for k in range(count)]
    items, dropped = list(cases), []
    hook = SimpleNamespace(pytest_deselected=lambda items: dropped.extend(items))
    conftest.pytest_collection_modifyitems(SimpleNamespace(getoption=lambda _: most, hook=hook), items)
    assert len(items) == kept and sorted(items + dropped) == sorted(cases)
    assert {case.nodeid.partition("[")[0] for case in items} == {"tests/test_a.py::test_one", "tests/test_a.py::test_many"}
