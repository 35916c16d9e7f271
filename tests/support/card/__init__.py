"""A stand-in card: a process of this CPU-only machine in which PyTorch, Triton and the CUDA library meet a named NVIDIA card.

Every Python process with tests/support/card/site on its PYTHONPATH and STAND_IN_CARD set has it from its start, children
included: `environment` makes such variables, `python -m card` runs a command under them, docs/stand_in_card.md says what it can
show and what not. It cannot be removed from a process.

    tensors      report cuda:i and lie in host memory; every operator is the CPU's (device.cpp)
    torch.cuda   the cards' figures, streams, events, captures that refuse what the real ones refuse (cuda_module.py)
    Triton       the real `JITFunction.run` and, if asked for, the real compiler; launches as `launch` says (triton_driver.py)
    CUDA         the real operators and launchers over a stub of the CUDA runtime (cuda_library.py)
    results      of `launch="reference"`: PyTorch's own operators, behind launches that did nothing (outcomes.py)
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from .cards import CARDS, Card

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
BUILD = ROOT / "build" / "card"
LAUNCH = ("reference", "nothing", "interpreter")
VARIABLE, FAULTS_VARIABLE = "STAND_IN_CARD", "STAND_IN_FAULTS"


@dataclass(frozen=True)
class Settings:
    """card: a key of CARDS. compiles: whether Triton's kernels are compiled for it. cuda_library: whether there is one.

    batch: by how much the batch that plans and tiles see is larger than the tensors'; above 1 all is cut, as cuts.py says.
    """

    card: str = "H100"
    count: int = 1
    launch: str = "reference"
    compiles: bool = False
    cuda_library: bool = True
    batch: int = 1

    def __post_init__(self) -> None:
        if self.card not in CARDS:
            raise ValueError(f"card is {self.card!r}; allowed are {', '.join(CARDS)}")
        if self.launch not in LAUNCH:
            raise ValueError(f"launch is {self.launch!r}; allowed are {', '.join(LAUNCH)}")

    def text(self) -> str:
        """The value of STAND_IN_CARD."""
        return ",".join(map(str, (self.card, self.count, self.launch, int(self.compiles), int(self.cuda_library), self.batch)))

    @classmethod
    def of(cls, text: str) -> Settings:
        """From the value of STAND_IN_CARD; later fields may be missing."""
        kinds = (str, int, str, lambda t: bool(int(t)), lambda t: bool(int(t)), int)
        return cls(*(kind(part) for kind, part in zip(kinds, text.split(","), strict=False)))


def environment(settings: Settings, faults: str = "") -> dict[str, str]:
    """This process's variables and those that give a child process the card. faults: see faults.py."""
    build_device()
    folders = [str(HERE / "site"), str(HERE.parent), str(ROOT), os.environ.get("PYTHONPATH", "")]
    more = {"PYTHONPATH": os.pathsep.join(filter(None, folders)), VARIABLE: settings.text(), FAULTS_VARIABLE: faults}
    return {**os.environ, **more}


def build_device() -> Path:
    """The library of device.cpp, compiled where it is not there yet (20 s)."""
    torch_root = Path(importlib.util.find_spec("torch").submodule_search_locations[0])  # type: ignore[union-attr,index]
    source = HERE / "device.cpp"
    version = (torch_root / "version.py").read_bytes()
    path = BUILD / f"device-{hashlib.sha256(source.read_bytes() + version).hexdigest()[:16]}.so"
    if not path.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}")
        include = torch_root / "include"
        command = ["c++", "-O1", "-std=c++20", "-fPIC", "-shared", "-Wall", f"-I{include}",
                   f"-I{include / 'torch/csrc/api/include'}", str(source), "-o", str(fresh), f"-L{torch_root / 'lib'}",
                   "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_root / 'lib'}"]  # fmt: skip
        subprocess.run(command, check=True)
        os.replace(fresh, path)
    return path


def insert(settings: Settings) -> None:
    """Gives this process the card. To be called before torch is imported, which looks for CUDA while it is."""
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already; the card must be there before it")
    library = ctypes.CDLL(str(build_device()), mode=ctypes.RTLD_GLOBAL)
    from . import cuda_module, outcomes, triton_driver

    card: Card = CARDS[settings.card]
    device = cuda_module.Device(library)
    cuda_module.insert(device, card, settings.count)
    triton_driver.insert(device, card, launch=settings.launch, compiles=settings.compiles)
    outcomes.insert(device, card, settings)
    global inserted
    inserted = device


inserted = None  # the `cuda_module.Device` of this process
