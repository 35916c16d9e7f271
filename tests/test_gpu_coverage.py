"""Which CUDA instances and Triton tiles the GPU tests launch on which card, counted without a GPU.

What the plans of the published networks choose at the record's batches must be launched by a GPU test on that card.
"""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE / "cuda"))

import compile_pool  # noqa: E402
import gpu_cases  # noqa: E402
from test_rehearsals import card  # noqa: E402

from res2net_fused import native  # noqa: E402
from res2net_fused.backends import native_cuda  # noqa: E402
from res2net_fused.bench import schedule  # noqa: E402
from res2net_fused.bench.workloads import Case  # noqa: E402
from res2net_fused.cuda_kernels import PUBLISHED, _problem, _published  # noqa: E402
from res2net_fused.tables import format_table  # noqa: E402

CAPABILITIES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
MOST_KERNELS = 450  # of Triton, compiled for one card by `make test-gpu`: beside them CUDA's own come with the library
needs_plans = pytest.mark.skipif(not native.cpu_library().loaded, reason="the plans are in the CPU library")


def limits(capability):
    return native_cuda.LIMITS["sm_{}{}".format(*capability)]


def launched(todo, device):
    """Instances by name, how many cases of `todo` run on each, and how many a card refuses."""
    counts = Counter()
    for case in todo:
        try:
            counts[native_cuda.INSTANCE_NAMES[gpu_cases.launch_of(case, device).instance]] += 1
        except ValueError:
            counts["refused"] += 1
    return counts


def planned(device):
    """Every instance that `info --kernels` names, at the record's batches and in every type."""
    found = set()
    for width, scale, stage, size in _published():
        for batch in (1, 32, 256):
            for dtype in native_cuda.TYPES:
                try:
                    plan = native_cuda.plan_chain(_problem(batch, width << stage, scale, size, dtype), device)
                except ValueError:
                    continue  # a card without the shared memory for it: PyTorch's or Triton's then
                found.add(native_cuda.INSTANCE_NAMES[plan.instance])
    return found


def in_halves(todo):
    return [gpu_cases.replace(case, dtype=dtype) for case in todo for dtype in gpu_cases.HALVES]


@needs_plans
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_every_planned_cuda_instance_is_launched(capability):
    device = limits(capability)
    lists = {
        "planned": in_halves(gpu_cases.PLANNED), "timed": gpu_cases.TIMED, "TF32": gpu_cases.IN_TF32,
        "cut by hand": in_halves(gpu_cases.CUT),
    }  # fmt: skip
    counts = {name: launched(todo, device) for name, todo in lists.items()}
    every = sorted(set().union(*counts.values()))
    rows = [(name, *(str(counts[name][instance]) for instance in every)) for name in counts]
    table = format_table(("cases", *every), rows, left=1)
    assert len(PUBLISHED) == 3 and planned(device) <= set(every), table
    assert sum(counts["timed"].values()) - counts["timed"]["refused"] >= 60, table


@needs_plans
def test_hopper_launches_every_instance_there_is():
    device = limits((9, 0))
    every = launched([*in_halves(gpu_cases.PLANNED + gpu_cases.CUT), *gpu_cases.TIMED], device)
    assert set(native_cuda.INSTANCE_NAMES) <= set(every) and not every["refused"]


@needs_plans
@pytest.mark.parametrize("case", gpu_cases.CUT, ids=str)
def test_launches_cut_by_hand_are_the_emulators(case):
    from emulator import harness

    emulated = harness.plan_of(case)._replace(**case.tile)
    own = gpu_cases.launch_of(case, limits((9, 0)))
    told = set(case.tile) | {"instance", "whole"}
    assert {name: getattr(own, name) for name in told} == {name: getattr(emulated, name) for name in told}


def tiles(calls):
    """By kernel."""
    named = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps", "num_stages")
    return {
        (call.kernel.__name__, *((call.arguments | call.options).get(name) for name in named)) for call in calls
    }


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_every_triton_tile_that_is_timed_is_launched_and_the_kernels_are_few(capability):
    recorded = [
        Case(unit.workload, unit.config, unit.stage, unit.batch, unit.dtype, "cuda", unit.variant)
        for unit in schedule.schedule("cuda")
        if unit.stage is not None and unit.config.scale > 1
    ]
    calls = list(gpu_cases.kernel_calls([*gpu_cases.INFERENCE, *gpu_cases.TRAINING], capability))
    missing = tiles(gpu_cases.kernel_calls(recorded, capability)) - tiles(calls)
    assert not missing
    assert len(calls) <= MOST_KERNELS, compile_pool.arithmetic(len(calls), 8)
    assert len(calls) * compile_pool.SECONDS / 8 < 120, "of ten minutes, on eight processors"


def test_what_is_compiled_ahead_is_what_a_launch_looks_up(tmp_path):
    """On a stand-in card, with the real compiler: a launch behind `compile_for` adds nothing to Triton's cache."""
    code = (
        "import sys; sys.path[:0] = ['tests', 'tests/cuda']\n"
        "import torch, pathlib, gpu_cases\n"
        "from test_triton_aot import compile_for\n"
        "from res2net_fused.bench.workloads import Config, cases, fused\n"
        "case = cases(['block'], [Config(26, 4)], [1], 'bfloat16', 'cuda')[3]\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for call in gpu_cases.kernel_calls([case], torch.cuda.get_device_capability()):\n"
        "    compile_for(call, torch.cuda.get_device_capability())\n"
        "ahead = {path.name for path in folder.rglob('*.cubin')}, len(list(folder.iterdir()))\n"
        "x = case.inputs()[0].contiguous(memory_format=torch.channels_last)\n"
        "with torch.inference_mode():\n"
        "    fused(case.module(), 'triton')(x)\n"
        "from card.triton_driver import LAUNCHES\n"
        "assert LAUNCHES.count >= 5 and len(ahead[0]) >= 2, (LAUNCHES.count, ahead)\n"
        "assert ahead == ({path.name for path in folder.rglob('*.cubin')}, len(list(folder.iterdir())))\n"
    )
    env = card.environment(card.Settings("H100", compiles=True, cuda_library=False)) | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=env, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_gpu_test_runs_without_a_gpu():
    if torch.cuda.is_available() or "STAND_IN_CARD" in os.environ:
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(HERE / "cuda")]
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" not in done.stdout.splitlines()[-1], done.stdout[-2000:]
