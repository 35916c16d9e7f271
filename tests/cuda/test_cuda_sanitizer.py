"""The chain kernel under NVIDIA's compute-sanitizer: memory accesses and races on a GPU, on small calls of every kind."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_cuda_chain import CASES, HALVES, IN_TF32

FILE = Path(__file__).with_name("test_cuda_chain.py")
# Tests of FILE: fixed and run-time depths, odd sizes, a stage block, an added group, TF32 with an odd width.
CALLS = (
    "test_exact_for_integers[w26s4-1x9x13-bfloat16-torch.bfloat16]",
    "test_exact_for_integers[w104s4-1x5x4-bfloat16-torch.float16]",
    "test_exact_for_integers[w26s4-1x9x11-bfloat16-hierarchical=False-pool=avg3-stride=2-torch.bfloat16]",
    "test_exact_for_integers[w26s4-1x7x9-bfloat16-passthrough=first_added-torch.bfloat16]",
    "test_float32_is_multiplied_in_tf32[w27s4-1x9x13-float32-integers]",
)
# Errors that calls of CUDA's interface return are torch's business: it asks for what a driver may not have.
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}


def find_sanitizer():
    """compute-sanitizer of PATH or of CUDA_HOME, else None."""
    folders = [None] + [str(Path(home, "bin")) for home in [os.environ.get("CUDA_HOME")] if home]
    return next(filter(None, (shutil.which("compute-sanitizer", path=folder) for folder in folders)), None)


def test_the_calls_are_tests_of_the_chain():
    tests = {f"test_exact_for_integers[{case}-{dtype}]" for case in CASES for dtype in HALVES}
    tests |= {f"test_float32_is_multiplied_in_tf32[{case}-integers]" for case in IN_TF32}
    assert set(CALLS) <= tests


@pytest.mark.skipif(not find_sanitizer(), reason="compute-sanitizer of the CUDA toolkit is not on PATH or under CUDA_HOME")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer_finds_nothing(tool):
    # Without torch's cache every tensor is an allocation of its own, whose bounds the tool knows.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizer = [find_sanitizer(), "--tool", tool, *TOOLS[tool], "--error-exitcode", "9"]
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-m", "", *(f"{FILE}::{call}" for call in CALLS)]
    done = subprocess.run([*sanitizer, *pytest_command], env=env, capture_output=True, text=True)
    text = done.stdout + done.stderr
    assert done.returncode == 0 and f"{len(CALLS)} passed" in text and "SUMMARY: 0 " in text, text
