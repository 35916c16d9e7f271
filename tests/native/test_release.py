"""How wheels for other systems are linked, and the table of the versions that were tried."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
from record_cases import load_setup
from tree import ROOT


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


@pytest.mark.parametrize("system", ["Darwin", "Windows"])
def test_elsewhere_than_on_linux_nothing_is_built(system, monkeypatch, tmp_path):
    setup = load_setup()
    monkeypatch.setattr(setup.platform, "system", lambda: system)
    parts = setup.NativeParts(tmp_path, "auto", None, in_place=False, commit="c0ffee").build()
    assert not any(part["built"] for part in parts.values())
    assert f"is built on Linux only, not on {system}" in parts["cpu"]["reason"]


def test_the_table_of_versions_keeps_one_row_for_each():
    run = script("tests/integration/versions/run")
    page = f"before\n{run.BEGIN}\n| Python |\n|---|\n{run.END}\nafter\n"
    page = run.with_row(page, "3.11.7|2.11.0|3.6.0|x86_64", "FAILED: -m pytest")
    page = run.with_row(page, "3.11.7|2.13.0|3.7.1|x86_64", "passed")
    page = run.with_row(page, "3.11.7|2.11.0|3.6.0|x86_64", "passed")
    rows = [line for line in page.splitlines() if line.startswith("| 3")]
    assert [row.split(" | ")[1] for row in rows] == ["2.13.0", "2.11.0"]
    assert all(row.endswith("| passed |") for row in rows) and page.startswith("before\n") and page.endswith("after\n")
