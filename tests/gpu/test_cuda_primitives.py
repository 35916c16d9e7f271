"""The CUDA half of csrc/cuda/chain/hardware.h: the first thing to run on a GPU."""

import shutil
import subprocess

import pytest
import torch
from gpu_cases import STAND_IN
from tree import ROOT

from res2net_fused._native import cuda_toolkit


@pytest.mark.skipif(bool(STAND_IN), reason="a stand-in card runs no device code")
@pytest.mark.skipif(shutil.which("c++") is None, reason="nvcc needs a host compiler, c++")
def test_primitives_do_what_they_are_defined_to_do(tmp_path):
    try:
        compiler = cuda_toolkit.find_nvcc(torch.version.cuda).command("c++")
    except cuda_toolkit.NoNvcc as error:
        pytest.skip(str(error))
    program = tmp_path / "primitives"
    # wgmma exists in the architecture-specific target only.
    architecture = "sm_90a" if torch.cuda.get_device_capability() == (9, 0) else "native"
    command = [*compiler, "-std=c++20", "-O2", f"-arch={architecture}", f"-I{ROOT / 'csrc'}", "-o", str(program)]
    subprocess.run([*command, str(ROOT / "tests/gpu/primitives.cu")], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
