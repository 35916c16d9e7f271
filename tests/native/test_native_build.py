"""benchmarks/native_build.py: the build where nothing may be installed, without setuptools and ninja."""

import importlib
import os
import time
from pathlib import Path

import pytest
from tree import ROOT

from res2net_fused._native import build_flags, cuda_toolkit, library


@pytest.fixture
def native_build(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("native_build")


def test_direct_compiling_of_what_changed(native_build, tmp_path, monkeypatch, capsys):
    compiler = next((c for c in ("c++", "g++", "clang++") if native_build.shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    for name, text in (("a.h", "int f();"), ("a.cpp", '#include "a.h"'), ("b.cpp", "int b;")):
        (tmp_path / name).write_text(text)
    real, commands = native_build.subprocess.run, []

    def run(command, **keywords):
        commands.append(command)
        return real(command, **keywords)

    monkeypatch.setattr(native_build.subprocess, "run", run)

    def compiled(*extra):
        units = tuple(build_flags.Unit(tmp_path / f"{name}.cpp", f"obj/{name}.o", ("-fPIC", *extra)) for name in "ab")
        target = build_flags.Target("a", "liba.so", "cxx", units, ("-shared",))
        commands.clear()
        assert native_build.compile_target(target, [compiler], tmp_path / "build", tmp_path / "liba.so") == ""
        assert "building the a part, 2 files" in capsys.readouterr().out
        return sorted(Path(command[command.index("-c") + 1]).stem for command in commands if "-c" in command)

    assert compiled() == ["a", "b"] and compiled() == []
    os.utime(tmp_path / "a.h", (time.time() + 100, time.time() + 100))
    assert compiled() == ["a"]
    os.utime(tmp_path / "a.h", (1, 1))
    assert compiled("-O1") == ["a", "b"], "other flags"
    (tmp_path / "build" / "obj" / "b.o").unlink()
    assert compiled("-O1") == ["b"]


def test_direct_building_without_an_nvcc_that_fits(native_build, tmp_path, monkeypatch):
    def refuse(torch_cuda):
        raise cuda_toolkit.NoNvcc("nvcc is of CUDA 12.4.131, and torch of CUDA 13.0")

    monkeypatch.setattr(cuda_toolkit, "find_nvcc", refuse)
    monkeypatch.setattr(native_build, "PACKAGE", tmp_path)
    monkeypatch.setattr(native_build, "compile_target", lambda *arguments: "it was not tried")
    monkeypatch.setenv("CXX", "c++")
    (tmp_path / "lib").mkdir()
    problems = native_build._build_directly("90a", "c0ffee")
    assert problems[0] == "the CUDA library was not built: nvcc is of CUDA 12.4.131, and torch of CUDA 13.0"
    assert "12.4.131" in library.NativeLibraries(tmp_path).status("cuda").reason
