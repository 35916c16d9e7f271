"""The CUDA half of csrc/cuda/chain/hardware.h: the first thing to run on a GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_primitives_do_what_they_are_defined_to_do(tmp_path):
    program = tmp_path / "primitives"
    # wgmma exists in the architecture-specific target only.
    architecture = "sm_90a" if torch.cuda.get_device_capability() == (9, 0) else "native"
    command = ["nvcc", "-std=c++20", "-O2", f"-arch={architecture}", f"-I{ROOT / 'csrc'}", "-o", str(program)]
    subprocess.run([*command, str(ROOT / "tests/cuda/primitives.cu")], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
