"""Every kind of kernel under NVIDIA's compute-sanitizer on a GPU: memory accesses, races and barriers, in small calls."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_cases import CUT, PLANNED_TF32, STAND_IN, launch_of

from res2net_fused.backends.cuda import plan as launch_plan

HERE = Path(__file__).parent
CHAIN, STREAMS = HERE / "test_cuda_chain.py", HERE / "test_streams.py"


def first(instance, **fields):
    """The first case cut by hand that this kernel runs, as a test of CHAIN."""
    for case in CUT:
        plan = launch_of(case, launch_plan.LIMITS["sm_90"])
        if launch_plan.INSTANCE_NAMES[plan.instance] == instance and all(getattr(case, k) == v for k, v in fields.items()):
            return f"{CHAIN}::test_every_way_to_cut_a_call_is_exact_for_integers[{case}]"
    raise LookupError(f"no case is cut for {instance}")


def calls():
    """By kind of kernel, a test that launches it."""
    single = next(case for case in PLANNED_TF32 if case.width == 27)
    return {
        "strip, depths fixed": first("d2c4t4"),
        "strip, depths at run time": first("d0c7t2"),
        "strip, padded slots": first("d2c4t4", pad=6, fill=True),
        "strip, TF32, odd width": f"{CHAIN}::test_float32_is_multiplied_in_tf32[{single}-integers]",
        "cluster": first("cluster_c2t2", clusters=True),
        "cluster, several rows": first("cluster_c4t2", clusters=True),
        "wgmma": first("wgmma_c7t2"),
        "Triton, pointwise and step": f"{STREAMS}::test_frozen_weights_are_there_on_every_stream[triton]",
        "Triton, training": f"{STREAMS}::test_training_on_a_side_stream_gives_the_same_bits[triton]",
    }


# Errors that calls of CUDA's interface return are torch's business: it asks for what a driver may not have.
TOOLS = {"memcheck": ["--report-api-errors", "no"], "racecheck": [], "synccheck": []}


def find_sanitizer():
    """compute-sanitizer of PATH, of CUDA_HOME or of /usr/local/cuda, else None."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [None] + [str(Path(home, "bin")) for home in homes if home]
    return next(filter(None, (shutil.which("compute-sanitizer", path=folder) for folder in folders)), None)


@pytest.mark.skipif(not find_sanitizer(), reason="compute-sanitizer of the CUDA toolkit is not on PATH or under CUDA_HOME")
@pytest.mark.skipif(bool(STAND_IN), reason="a stand-in card runs no device code")
@pytest.mark.parametrize("tool", TOOLS)
def test_sanitizer_finds_nothing(tool):
    """In one process: to start it costs more time than all the calls."""
    chosen = list(calls().values())
    # Without torch's cache every tensor is an allocation of its own, whose bounds the tool knows.
    env = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    sanitizer = [find_sanitizer(), "--tool", tool, *TOOLS[tool], "--error-exitcode", "9"]
    done = subprocess.run(
        [*sanitizer, sys.executable, "-m", "pytest", "-q", "-rs", *chosen], env=env, capture_output=True, text=True
    )
    text = done.stdout + done.stderr
    if done.returncode == 0 and " passed" not in text:
        pytest.skip(f"this card or machine has none of these kernels: {text[-300:]}")
    assert done.returncode == 0 and "SUMMARY: 0 " in text, text[-6000:]
    print(text)  # which kinds this card or machine has not
