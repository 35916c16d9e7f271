"""The search for nvcc: every place of it, the one that fits torch, and what a compiler from PyPI needs beside it."""

import re
from pathlib import Path

import pytest
import torch
from tree import ROOT

from res2net_fused._native import cuda_toolkit


def make_nvcc(folder, version="13.0.88"):
    path = folder / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    said = f"echo 'Cuda compilation tools, release {version[:4]}, V{version}'" if version else "exit 1"
    path.write_text(f"#!/bin/sh\n{said}\n")
    path.chmod(0o755)
    return path


def make_pypi(folder, version="13.0.88"):
    home = folder / "site-packages" / "nvidia" / "cu13"
    for name in cuda_toolkit.PYPI_PARTS:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch()
    (home / "bin" / "ptxas").unlink()
    (home / "bin").rmdir()
    path = make_nvcc(home, version)
    (home / "bin" / "ptxas").touch()
    return path


@pytest.fixture
def find(tmp_path):
    """find(torch's CUDA, variables) on a machine of which `tmp_path` is all."""

    def found(torch_cuda=None, **environ):
        environ = {"PATH": str(tmp_path / "home" / "bin")} | environ
        return cuda_toolkit.find_nvcc(torch_cuda, environ, tmp_path, [str(tmp_path / "site-packages" / "nvidia")])

    return found


def test_every_place(find, tmp_path):
    with pytest.raises(cuda_toolkit.NvccNotFound, match=r"nvcc not found .*, or `pip install 'nvidia-cuda-nvcc==13.0.\*'"):
        find()
    for folder in (".", "usr/local/cuda-13.0", "usr/local/cuda", "home"):
        path = (make_pypi if folder == "." else make_nvcc)(tmp_path / folder)
        assert find() == find("13.1") == (path, "13.0.88"), "later ones go before earlier ones"
    named = make_nvcc(tmp_path / "named", "12.8.93")
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        assert find("12.8", **{variable: str(tmp_path / "named")}) == (named, "12.8.93")
    with pytest.raises(cuda_toolkit.NoNvcc, match="CUDA_HOME=/nowhere holds no bin/nvcc: correct or unset it"):
        find(CUDA_HOME="/nowhere")


def test_the_one_of_torchs_major_version(find, tmp_path):
    old = make_nvcc(tmp_path / "home", "12.4.131")
    assert find() == find("12.8") == (old, "12.4.131")
    with pytest.raises(cuda_toolkit.NoNvcc) as refused:
        find("13.0")
    assert f"{old} is of CUDA 12.4.131, and torch of CUDA 13.0; the CUDA library needs an nvcc of" in str(refused.value)
    assert "pip install" in str(refused.value) and not isinstance(refused.value, cuda_toolkit.NvccNotFound)
    new = make_pypi(tmp_path)
    assert find("13.0") == (new, "13.0.88") and find("12.8").path == old
    with pytest.raises(cuda_toolkit.NoNvcc, match="12.4.131, and torch of CUDA 11.8.*the toolkit of CUDA 11 .*CUDA_HOME"):
        find("11.8")
    with pytest.raises(cuda_toolkit.NoNvcc, match="needs an nvcc of torch's major version"):
        find("13.0", CUDA_HOME=str(tmp_path / "home"))


def test_one_that_does_not_run(find, tmp_path):
    make_nvcc(tmp_path / "home", None)
    with pytest.raises(cuda_toolkit.NoNvcc, match="nvcc does not run: install"):
        find()
    assert make_nvcc(tmp_path / "usr/local/cuda") == find().path


@pytest.mark.parametrize("part", sorted(cuda_toolkit.PYPI_PARTS))
def test_one_of_pypi_that_is_not_whole(find, tmp_path, part):
    path = make_pypi(tmp_path)
    (path.parents[1] / part).unlink()
    with pytest.raises(cuda_toolkit.NoNvcc) as refused:
        find()
    assert f"{path} is not whole, {part} is missing: `pip install " in str(refused.value)
    assert f"'{cuda_toolkit.PYPI_PARTS[part]}==13.0.*'" in str(refused.value)


def test_pypis_libraries_are_named_to_its_linker(find, tmp_path):
    path = make_pypi(tmp_path)
    assert find().command("g++") == [str(path), "-ccbin", "g++", f"-L{path.parents[1] / 'lib'}"]
    (tmp_path / "nvidia" / "toolkit" / "lib64").mkdir(parents=True)
    toolkit = make_nvcc(tmp_path / "nvidia" / "toolkit")
    assert find(CUDA_HOME=str(toolkit.parents[1])).command("g++") == [str(toolkit), "-ccbin", "g++"]


def test_another_linker_finds_the_runtime(find, tmp_path):
    """Also where the nvcc on PATH is a script for one elsewhere: nvcc says where its libraries are."""
    path = make_pypi(tmp_path)
    with path.open("a") as script:
        script.write("""echo '#$ LIBRARIES=  "-L/a toolkit/lib/stubs" "-L/a toolkit/lib"' >&2\n""")
    own = f"-L{path.parents[1] / 'lib'}"
    assert find().library_folders() == [own, "-L/a toolkit/lib/stubs", "-L/a toolkit/lib"]


def test_the_extra_of_pyproject_holds_these_packages():
    extra = re.search(r"^nvcc = \[(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)[1]
    names = re.findall(r'"(.+?)==(.+?)\.\*"', extra)
    assert dict(names) == dict.fromkeys(cuda_toolkit.PYPI_PARTS.values(), cuda_toolkit.PYPI_VERSION)


def test_when_make_installs_the_extra(monkeypatch):
    nowhere = {"PATH": "/nowhere"}

    def found(path):
        def find(torch_cuda, environ):
            if path is None:
                raise cuda_toolkit.NoNvcc("none that fits")
            return cuda_toolkit.Nvcc(Path(path), "13.0.88")

        monkeypatch.setattr(cuda_toolkit, "find_nvcc", find)

    monkeypatch.setattr(cuda_toolkit.sys, "platform", "linux")
    found(None)
    assert cuda_toolkit.extra_wanted(None, nowhere) and cuda_toolkit.extra_wanted("13.2", nowhere)
    assert not cuda_toolkit.extra_wanted("12.8", nowhere), "PyPI's packages of CUDA 12 have no nvcc"
    assert not cuda_toolkit.extra_wanted("13.0", nowhere | {"CUDA_HOME": "/opt/cuda"})
    found("/usr/bin/nvcc")
    assert not cuda_toolkit.extra_wanted("13.0", nowhere)
    found("/venv/lib/python3.12/site-packages/nvidia/cu13/bin/nvcc")
    assert cuda_toolkit.extra_wanted("13.0", nowhere), "else the next `make` would leave it out"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("from typing import Optional\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n", "13.0"),
        ("cuda = '12.8'\n", "12.8"),
        ("cuda: Optional[str] = None\n", None),
        ("cuda = os.environ\n", None),
        ("debug = False\n", None),
    ],
)
def test_torchs_cuda_is_read_without_importing_it(tmp_path, text, expected):
    (tmp_path / "version.py").write_text(text)
    assert cuda_toolkit.torch_cuda(tmp_path) == expected


def test_the_installed_torch():
    assert cuda_toolkit.torch_cuda(Path(torch.__file__).parent) == torch.version.cuda
    assert cuda_toolkit.torch_cuda(Path("/nowhere")) is None
