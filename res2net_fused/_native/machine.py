"""Why PyTorch sees no GPU on a machine that has one, and what to do about it."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

# CUDA's major version -> the first Linux driver that runs it
MINIMUM_DRIVER = {11: 450, 12: 525, 13: 580}
OTHER_BUILDS = "https://pytorch.org/get-started/previous-versions; with make TORCH= and TRITON= name it, see docs/install.md"


class TorchBuild(NamedTuple):
    """A PyTorch. cuda, hip: the version that it was built for, or None; error: its own words on why it sees no GPU."""

    version: str
    cuda: str | None
    hip: str | None = None
    error: str = ""


def why_no_gpu(torch: TorchBuild, environ: Mapping[str, str] | None = None, root: Path = Path("/")) -> str | None:
    """Why this PyTorch, which sees no GPU, does not, with the remedy; None where nothing speaks of an NVIDIA GPU.

    root: for tests, the folder that stands for /.
    """
    environ = os.environ if environ is None else environ
    nodes = [*sorted((root / "dev").glob("nvidia[0-9]*")), *(root / "dev").glob("dxg")]  # dxg: under WSL
    on_bus = any(_is_nvidia_gpu(device) for device in (root / "sys/bus/pci/devices").glob("*"))
    driver = _driver_version(environ, root)
    if not (nodes or on_bus or driver):
        return None
    newest = max((cuda for cuda, first in MINIMUM_DRIVER.items() if driver and _major(driver) >= first), default=None)
    fitting = f"install one for CUDA {newest}" if newest else "install one for the driver's CUDA"
    if torch.cuda is None:
        kind = f"is built for AMD's ROCm {torch.hip}" if torch.hip else "is built for CPUs only"
        return f"PyTorch {torch.version} {kind}: {fitting} ({OTHER_BUILDS})"
    needed = MINIMUM_DRIVER.get(_major(torch.cuda))
    if driver and needed and _major(driver) < needed:
        other = f", or {fitting} ({OTHER_BUILDS})" if newest else ""
        return (
            f"PyTorch {torch.version} is built for CUDA {torch.cuda}, which needs an NVIDIA driver of at least {needed}, "
            f"and this one is {driver}: update the driver{other}"
        )
    chosen = environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None and _hides_all(chosen, len(nodes)):
        return f"CUDA_VISIBLE_DEVICES is {chosen!r}, which hides every GPU: unset it"
    if not driver:
        return "an NVIDIA GPU is on the PCI bus, but no driver is loaded: install NVIDIA's, until `nvidia-smi` lists the GPU"
    if not nodes:
        return f"NVIDIA's driver {driver} is loaded, but there is no /dev/nvidia0: in a container, start it with `--gpus all`"
    closed = [str(node) for node in nodes if not os.access(node, os.R_OK | os.W_OK)]
    if closed:
        return f"this user may not open {', '.join(closed)}: ask for access (often the group video or render)"
    return f"PyTorch {torch.version} says: {torch.error or 'no CUDA device is there'}; does nvidia-smi list the GPU?"


def why_no_gpu_here() -> str | None:
    """`why_no_gpu` of this process; None where PyTorch sees a GPU too."""
    import torch

    if torch.cuda.is_available():
        return None
    error = ""
    if torch.version.cuda is not None:
        try:
            torch.cuda.init()
        except Exception as raised:  # whatever its driver raises is the answer
            error = str(raised).partition("\n")[0]
    return why_no_gpu(TorchBuild(torch.__version__, torch.version.cuda, torch.version.hip, error))


def choose_device(asked: str | None, command: str) -> str:
    """`asked`, else "cuda" where PyTorch sees a GPU, else "cpu", which standard error explains where the machine has a GPU.

    command: who says so. Raises RuntimeError where a CUDA device is asked for and none is seen.
    """
    import torch

    if asked is not None and torch.device(asked).type != "cuda":
        return asked
    if torch.cuda.is_available():
        return asked or "cuda"
    why = why_no_gpu_here()
    if asked is not None:
        raise RuntimeError(f"device is {asked!r}, but this PyTorch sees no GPU: {why or 'nor does this machine show one'}")
    if why is not None:
        print(f"{command}: on the CPU, for PyTorch sees no GPU: {why}", file=sys.stderr, flush=True)
    return "cpu"


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's with its widest vector instructions."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass  # not Linux
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _is_nvidia_gpu(device: Path) -> bool:
    """Whether it is of vendor 10de and a class of displays (03....); its sound and bridge functions are others."""
    try:
        texts = [(device / name).read_text().strip() for name in ("vendor", "class")]
    except OSError:
        return False
    return texts[0] == "0x10de" and texts[1].startswith("0x03")


def _driver_version(environ: Mapping[str, str], root: Path) -> str | None:
    """The loaded kernel module's, else what nvidia-smi says, the only one to ask under WSL; None where there is neither."""
    for file, pattern in (
        ("proc/driver/nvidia/version", r"Kernel Module(?: for \S+)?\s+(\d+[\d.]*)"),
        ("sys/module/nvidia/version", r"(\d+[\d.]*)"),
    ):
        try:
            match = re.search(pattern, (root / file).read_text())
        except OSError:
            continue
        if match:
            return match[1]
    smi = shutil.which("nvidia-smi", path=environ.get("PATH", os.defpath))
    if smi is None:
        return None
    command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.match(r"\d+[\d.]*", text)
    return match[0] if match else None


def _major(version: str) -> int:
    return int(version.split(".")[0])


def _hides_all(chosen: str, nodes: int) -> bool:
    """CUDA reads CUDA_VISIBLE_DEVICES up to the first entry that names no device."""
    first = chosen.split(",")[0].strip()
    if first.startswith(("GPU-", "MIG-")):
        return False
    return not first.isdecimal() or (nodes > 0 and int(first) >= nodes)
