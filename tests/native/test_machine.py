"""A GPU that PyTorch does not see: why, in one sentence with the remedy, before the CPU is measured in its place."""

import re
from pathlib import Path

import pytest
import torch

from res2net_fused import cli
from res2net_fused._native import machine
from res2net_fused.backends import triton as triton_backend
from res2net_fused.bench import check, run
from res2net_fused.testing import parity

CUDA_13 = machine.TorchBuild("2.13.0+cu130", "13.0", error="No CUDA GPUs are available")
CPU_ONLY = machine.TorchBuild("2.13.0+cpu", None)
OPEN_MODULE = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {}  Release Build  Wed Jul 30\nGCC version: 12\n"
CLOSED_MODULE = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Mar  5 22:23:56 UTC 2024\nGCC version:\n"


class Root:
    """A folder that stands for / of a machine without anything of NVIDIA's."""

    def __init__(self, folder):
        self.folder = folder
        self.environ = {"PATH": str(folder / "bin")}
        self.file("bin/other").chmod(0o755)
        self.pci("0000:00:01.0", "0x8086", "0x030000")

    def file(self, name, text=""):
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    def pci(self, slot, vendor, kind):
        self.file(f"sys/bus/pci/devices/{slot}/vendor", vendor + "\n")
        self.file(f"sys/bus/pci/devices/{slot}/class", kind + "\n")

    def driver(self, version, text=CLOSED_MODULE):
        self.file("proc/driver/nvidia/version", text.format(version))

    def why(self, build):
        return machine.why_no_gpu(build, self.environ, self.folder)


@pytest.fixture
def root(tmp_path):
    return Root(tmp_path)


@pytest.mark.parametrize("build", [CPU_ONLY, CUDA_13])
def test_nothing_is_said_where_no_gpu_is_about(root, build):
    root.environ["CUDA_VISIBLE_DEVICES"] = ""
    root.pci("0000:01:00.1", "0x10de", "0x040300")  # NVIDIA's sound, such as of a passed-through half of a card
    assert root.why(build) is None


@pytest.mark.parametrize("sign", ["driver", "module", "node", "wsl", "bus", "smi"])
def test_any_sign_of_a_gpu_is_enough(root, sign):
    if sign == "driver":
        root.driver("580.65.06")
    elif sign == "module":
        root.file("sys/module/nvidia/version", "580.65.06\n")
    elif sign == "smi":
        root.file("bin/nvidia-smi", "#!/bin/sh\necho 580.65.06\n").chmod(0o755)
    elif sign == "bus":
        root.pci("0000:01:00.0", "0x10de", "0x030200")
    else:
        root.file("dev/nvidia0" if sign == "node" else "dev/dxg")
    assert "PyTorch 2.13.0+cpu is built for CPUs only: install one for" in root.why(CPU_ONLY)
    assert root.why(CUDA_13)


def test_torch_of_another_kind(root):
    root.driver("550.54.15")
    assert "is built for CPUs only: install one for CUDA 12 (https://pytorch.org" in root.why(CPU_ONLY)
    root.driver("580.65.06", OPEN_MODULE)
    assert "install one for CUDA 13 (" in root.why(CPU_ONLY)
    rocm = machine.TorchBuild("2.13.0+rocm7.0", None, hip="7.0.51831")
    assert "is built for AMD's ROCm 7.0.51831: install one for CUDA 13 (" in root.why(rocm)


@pytest.mark.parametrize("text", [CLOSED_MODULE, OPEN_MODULE])
@pytest.mark.parametrize(
    "cuda, driver, needed",
    [("13.0", "575.57.08", 580), ("13.2", "535.183.01", 580), ("12.6", "470.256.02", 525), ("13.0", "580.65.06", None),
     ("12.6", "550.54.15", None), ("12.6", "580.65.06", None), ("14.0", "580.65.06", None)],
)  # fmt: skip
def test_a_driver_that_is_too_old(root, text, cuda, driver, needed):
    root.driver(driver, text)
    root.file("dev/nvidia0")
    why = root.why(machine.TorchBuild("2.13.0", cuda))
    if needed is None:
        assert "driver of at least" not in why
        return
    assert f"is built for CUDA {cuda}, which needs an NVIDIA driver of at least {needed}, and this" in why
    assert f"one is {driver}: update the driver" in why
    assert f"or install one for CUDA {11 if driver.startswith('470') else 12} (" in why


@pytest.mark.parametrize("chosen", ["", " ", "-1", "none", "2", "7,0"])
def test_a_variable_that_hides_every_gpu(root, chosen):
    root.driver("580.65.06")
    for i in range(2):
        root.file(f"dev/nvidia{i}")
    root.environ["CUDA_VISIBLE_DEVICES"] = chosen
    assert root.why(CUDA_13) == f"CUDA_VISIBLE_DEVICES is {chosen!r}, which hides every GPU: unset it"


@pytest.mark.parametrize("chosen", ["0", "1,0", "0,-1", "GPU-8932f937", "MIG-GPU-8932f937/1/0"])
def test_a_variable_that_leaves_a_gpu(root, chosen):
    root.driver("580.65.06")
    for i in range(2):
        root.file(f"dev/nvidia{i}")
    root.environ["CUDA_VISIBLE_DEVICES"] = chosen
    assert "PyTorch 2.13.0+cu130 says: No CUDA GPUs are available; does nvidia-smi list" in root.why(CUDA_13)


def test_what_else_may_be_missing(root, monkeypatch):
    root.pci("0000:01:00.0", "0x10de", "0x030000")
    assert "no driver is loaded: install NVIDIA's" in root.why(CUDA_13)
    root.driver("580.65.06")
    assert "NVIDIA's driver 580.65.06 is loaded, but there is no /dev/nvidia0: in a container" in root.why(CUDA_13)
    node = root.file("dev/nvidia0")
    monkeypatch.setattr(machine.os, "access", lambda path, mode: Path(path) != node)
    assert f"this user may not open {node}: ask for access" in root.why(CUDA_13)


# The commands ---------------------------------------------------------------------------------------------------------

WHY = "its driver is asleep: wake it"


@pytest.fixture
def unseen(monkeypatch):
    """This process on a machine with a GPU that PyTorch does not see."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(machine, "why_no_gpu", lambda build: WHY)


def test_the_device_of_a_command(unseen, capsys, monkeypatch):
    assert machine.choose_device("cpu", "check") == "cpu"
    assert capsys.readouterr().err == ""
    assert machine.choose_device(None, "check") == "cpu"
    assert capsys.readouterr().err == f"check: on the CPU, for PyTorch sees no GPU: {WHY}\n"
    with pytest.raises(RuntimeError, match=f"device is 'cuda:1', but this PyTorch sees no GPU: {WHY}"):
        machine.choose_device("cuda:1", "check")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.choose_device(None, "check") == "cuda" and machine.choose_device("cuda:1", "check") == "cuda:1"
    assert machine.why_no_gpu_here() is None and capsys.readouterr().err == ""


def test_the_words_of_torch_itself_are_kept(unseen, monkeypatch):
    def fail():
        raise RuntimeError("The NVIDIA driver on your system is too odd\nand so on")

    found = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(machine, "why_no_gpu", found.append)
    machine.why_no_gpu_here()
    assert [(build.cuda, build.error) for build in found] == [("13.0", "The NVIDIA driver on your system is too odd")]


class Stopped(Exception):
    pass


@pytest.mark.parametrize("command", ["info", "check", "bench"])
def test_commands_say_it_before_they_start(command, unseen, capsys, monkeypatch, tmp_path):
    def stop(*arguments, **keywords):
        raise Stopped

    for module, name in ((check, "run_check"), (parity, "unavailable_backends"), (run, "run_bench")):
        monkeypatch.setattr(module, name, stop)
    out = ["--out", str(tmp_path)] if command == "bench" else []
    with pytest.raises(Stopped):
        cli.main([command, *out])
    assert f"res2net-fused {command}: on the CPU, for PyTorch sees no GPU: {WHY}\n" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([command, "--device", "cuda", *out])
    assert f"device is 'cuda'; this PyTorch sees 0 CUDA devices: {WHY}" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's driver starts here")
def test_info_names_what_keeps_a_gpu_from_its_kernels(capsys, monkeypatch):
    pytest.importorskip("triton")
    for name, value in (("is_available", True), ("device_count", 1), ("get_device_name", "a card")):
        monkeypatch.setattr(torch.cuda, name, lambda *device, value=value: value)
    monkeypatch.setattr(triton_backend.availability, "capability", lambda device: (9, 0))
    triton_backend.availability._driver_refusal.cache_clear()
    assert cli.main(["info"]) == 0
    triton_backend.availability._driver_refusal.cache_clear()
    said = capsys.readouterr()
    assert re.search(r"^  triton +Triton's driver does not start .* it needs a C compiler .* Python's headers", said.out, re.M)
    assert re.search(r"^  cuda +\S", said.out, re.M) and re.search(r"^  device +a card$", said.out, re.M) and said.err == ""


def test_the_record_says_it_too(unseen, capsys, monkeypatch):
    import record.__main__ as recorder

    def stop(*arguments):
        raise Stopped

    monkeypatch.setattr(recorder, "_environment", stop)
    with pytest.raises(Stopped):
        recorder.main([])
    assert f"record: on the CPU, for PyTorch sees no GPU: {WHY}" in capsys.readouterr().err
    assert recorder.main(["--device", "cuda"]) == 2
    assert f"record: device is 'cuda', but this PyTorch sees no GPU: {WHY}" in capsys.readouterr().err
    assert recorder.main(["--device", "cuda", "--list"]) == 0  # what a GPU would be asked, on any machine
