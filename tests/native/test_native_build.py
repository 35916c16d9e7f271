"""setup.py where nothing may be installed: `build_in_place` without setuptools and ninja."""

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from record_cases import load_setup
from tree import ROOT

from res2net_fused._native import build_flags, library


@pytest.fixture
def setup():
    return load_setup()


@pytest.fixture
def compiler(setup):
    try:
        return setup.find_compiler()
    except setup.Missing:
        pytest.skip("no C++ compiler")


def target(folder, names, *extra):
    units = tuple(build_flags.Unit(folder / f"{name}.cpp", f"obj/{name}.o", ("-fPIC", *extra)) for name in names)
    return build_flags.Target("a", "lib/liba.so", "cxx", units, ("-shared",))


def test_direct_compiling(setup, compiler, tmp_path):
    source = tmp_path / "a.cpp"
    source.write_text('extern "C" int seven() { return 7; }')
    built = setup.compile_target(target(tmp_path, "a"), compiler, tmp_path / "build")
    assert ctypes.CDLL(str(built)).seven() == 7
    source.write_text("int seven( { return 7; }")
    with pytest.raises(setup.Missing, match="compiling the a part failed: .*error"):
        setup.compile_target(target(tmp_path, "a"), compiler, tmp_path / "build")


def test_direct_compiling_of_what_changed(setup, compiler, tmp_path, monkeypatch, capsys):
    for name, text in (("a.h", "int f();"), ("a.cpp", '#include "a.h"'), ("b.cpp", "int b;")):
        (tmp_path / name).write_text(text)
    real, commands = setup.run_compiler, []
    monkeypatch.setattr(setup, "run_compiler", lambda command, folder: (commands.append(command), real(command, folder)))

    def compiled(*extra):
        commands.clear()
        assert setup.compile_target(target(tmp_path, "ab", *extra), compiler, tmp_path / "build").is_file()
        assert "building the a part, 2 files" in capsys.readouterr().out
        return sorted(Path(command[command.index("-c") + 1]).stem for command in commands if "-c" in command)

    assert compiled() == ["a", "b"] and compiled() == []
    os.utime(tmp_path / "a.h", (time.time() + 100, time.time() + 100))
    assert compiled() == ["a"]
    os.utime(tmp_path / "a.h", (1, 1))
    assert compiled("-O1") == ["a", "b"], "other flags"
    (tmp_path / "build" / "obj" / "b.o").unlink()
    assert compiled("-O1") == ["b"]


def test_direct_building_without_an_nvcc_that_fits(setup, compiler, tmp_path, monkeypatch):
    """What can be built is built, by ninja only where there is one."""
    asked = []

    def refuse(torch_cuda):
        raise setup.toolkit.NoNvcc("nvcc is of CUDA 12.4.131, and torch of CUDA 13.0")

    def compile_target(target, command, folder, ninja, linker):
        asked.append((target.name, ninja))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "made.so").write_text("made")
        return folder / "made.so"

    monkeypatch.setattr(setup.toolkit, "find_nvcc", refuse)
    monkeypatch.setattr(setup, "find_ninja", lambda: None)
    monkeypatch.setattr(setup, "compile_target", compile_target)
    monkeypatch.setattr(setup, "PACKAGE", tmp_path)
    monkeypatch.setattr(setup, "locked", lambda folder: tmp_path.joinpath("lock").open("w"))
    problems = setup.build_in_place((9, 0), "c0ffee")
    assert problems[0].startswith("cuda: NOT BUILT: nvcc is of CUDA 12.4.131, and torch of CUDA 13.0")
    assert asked[:2] == [("ops", None), ("cpu", None)] and (tmp_path / build_flags.CPU_LIBRARY).read_text() == "made"
    assert "12.4.131" in library.NativeLibraries(tmp_path).status("cuda").reason


def test_setup_is_read_without_setuptools(tmp_path):
    (tmp_path / "setuptools.py").write_text("raise ImportError('hidden')")
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}, {str(ROOT)!r}]; import setup; print(setup.build_in_place.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.strip() == "build_in_place", done.stderr
