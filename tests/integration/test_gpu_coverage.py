"""Which CUDA instances and Triton tiles the GPU tests launch on which card, counted without a GPU.

What the plans of the published networks choose, and what a record times, must be launched by a GPU test on that card.
"""

import itertools
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tree import ROOT, TESTS

pytest.importorskip("triton")

import card  # noqa: E402
import compile_pool  # noqa: E402
import emulated_cases  # noqa: E402
import gpu_cases  # noqa: E402
from emulator import harness  # noqa: E402
from record import schedule  # noqa: E402

from res2net_fused._native import library  # noqa: E402
from res2net_fused._tables import format_table  # noqa: E402
from res2net_fused.backends.cuda import plan as launch_plan  # noqa: E402
from res2net_fused.backends.cuda.kernel_report import PUBLISHED, _problem, _published  # noqa: E402
from res2net_fused.testing.cases import Case, WidthScale, cases  # noqa: E402

BATCHES = (1, 32, 256)  # of `info --kernels`
# Why a card cannot.
REASONS = "fits the .* bytes of shared memory|bytes of shared memory; a block may have|no wgmma|no thread-block clusters"
needs_plans = pytest.mark.skipif(not library.cpu_library().loaded, reason="the plans are in the CPU library")
on_devices = pytest.mark.parametrize("device", launch_plan.LIMITS)


def in_halves(todo):
    return [gpu_cases.replace(case, dtype=dtype) for case in todo for dtype in gpu_cases.HALVES]


# What tests/gpu/test_cuda_chain.py launches.
CHAINS = [*in_halves(gpu_cases.PLANNED), *gpu_cases.PLANNED_TF32, *gpu_cases.TIMED, *gpu_cases.IN_BLOCKS, *gpu_cases.CUT]


def launch(plan, dtype):
    """(what is told to a launch, dtype), the instance first."""
    return plan[:12], dtype


def launched(device):
    """By launch the first case, and by case the reason of those that the device refuses."""
    launches, refused = {}, {}
    for case in CHAINS:
        try:
            launches.setdefault(launch(gpu_cases.launch_of(case, launch_plan.LIMITS[device]), case.dtype), str(case))
        except ValueError as error:
            refused[str(case)] = str(error)
    return launches, refused


def instances(launches):
    return {(launch_plan.INSTANCE_NAMES[numbers[0]], dtype) for numbers, dtype in launches}


@needs_plans
@on_devices
def test_every_launch_of_the_published_chains_is_tried(device):
    """Those that `info --kernels` predicts, in every type: instance and cut."""
    launches, refused = launched(device)
    wanted = {}
    for (width, scale, stage, size), batch, dtype in itertools.product(_published(), BATCHES, launch_plan.TYPES):
        block = _problem(batch, width << stage, scale, size, dtype)
        for problem in (block, replace(block, around=None)):
            try:
                plan = launch_plan.plan_chain(problem, launch_plan.LIMITS[device])
            except ValueError:
                continue  # a card without the shared memory for it: Triton's or PyTorch's then
            wanted[launch(plan, dtype)] = f"{width}w{scale}s {size} batch {batch} {dtype}"
    rows = [(f"{launch_plan.INSTANCE_NAMES[key[0][0]]}", case, launches.get(key, "nobody")) for key, case in wanted.items()]
    assert set(wanted) <= set(launches), format_table(("instance", "chain", "launched by"), rows, left=3)
    assert len(PUBLISHED) == 3 and len(wanted) >= 60
    assert all(re.search(REASONS, reason) for reason in refused.values()), refused


@needs_plans
def test_hopper_launches_every_instance_and_every_case():
    launches, refused = launched("sm_90")
    assert {name for name, _ in instances(launches)} == set(launch_plan.INSTANCE_NAMES) and not refused


def test_what_the_emulator_runs_by_hand_reaches_a_gpu():
    """Every case that is cut, or in padded slots, or in TF32, of the emulator's own lists."""
    mine = {str(case) for case in CHAINS}
    lists = [v for v in vars(emulated_cases).values() if isinstance(v, list) and isinstance(v[0], gpu_cases.Chain)]
    assert len(lists) == 8 and {str(case) for own in lists for case in own} <= mine


@needs_plans
@on_devices
def test_no_launch_takes_more_shared_memory_than_there_is(device):
    """What is cut by hand has no plan to say what it takes; of planned launches that figure is the plan's."""
    limits, found = launch_plan.LIMITS[device], {True: 0, False: 0}
    for case in CHAINS:
        try:
            plan = gpu_cases.launch_of(case, limits)
        except ValueError:
            continue
        needed = harness.shared_bytes(case, plan)
        assert needed <= limits.shared_per_block_optin and (case.tile or needed == plan.shared_bytes), case
        found[bool(case.tile)] += 1
    assert min(found.values()) >= 30, found


@needs_plans
@pytest.mark.parametrize("case", [case for case in gpu_cases.CUT if case.tile and case.dtype != torch.float16], ids=str)
def test_launches_cut_by_hand_are_the_emulators(case):
    emulated = harness.plan_of(case)._replace(**case.tile)
    own = gpu_cases.launch_of(case, launch_plan.LIMITS["sm_90"])
    told = set(case.tile) | {"instance", "whole"}
    assert {name: getattr(own, name) for name in told} == {name: getattr(emulated, name) for name in told}


# Triton ---------------------------------------------------------------------------------------------------------------

TRITON = [*gpu_cases.INFERENCE, *gpu_cases.TRAINING, *gpu_cases.GRADIENTS]
EAGER = [case for dtype, batch in gpu_cases.EAGER for case in gpu_cases.network_blocks(dtype, batch)]


def published_cases():
    """The published networks' chains and blocks, and their training, in what has tiles of its own: halves, float32, TF32."""
    configs = [WidthScale(*config) for config in PUBLISHED]
    for dtype in ("bfloat16", "float32", "tf32"):
        yield from cases(("chain",), configs, BATCHES[:2], dtype, "cuda")
        yield from cases(("train_chain",), configs, (32, 128) if dtype == "bfloat16" else (32,), dtype, "cuda")
    yield from cases(("chain", "block"), configs, BATCHES, "bfloat16", "cuda")
    for case in schedule.schedule("cuda"):
        if case.stage is not None and case.config.scale > 1:
            yield Case(case.workload, case.config, case.stage, case.batch, case.dtype, "cuda", case.variant)


def tiles(todo, capability):
    """(kernel, precision, tile), and a case that takes it."""
    named = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_C", "num_warps", "num_stages")
    found = {}
    for case in todo:
        kind = "half" if case.dtype in ("bfloat16", "float16") else case.dtype
        for call in gpu_cases.kernel_calls([case], capability):
            tile = [(call.arguments | call.options).get(name) for name in named]
            found.setdefault((call.kernel.__name__, kind, *tile), str(case))
    return found


@on_devices
def test_every_triton_tile_that_is_timed_is_launched(device):
    capability = launch_plan.LIMITS[device][:2]
    mine, wanted = tiles(TRITON, capability), tiles(dict.fromkeys(published_cases()), capability)
    missing = {tile: case for tile, case in wanted.items() if tile not in mine}
    assert not missing, "\n".join(f"{tile}: {case}" for tile, case in missing.items())


@pytest.mark.parametrize("name", ["H100", *(pytest.param(n, marks=pytest.mark.slow) for n in card.CARDS if n != "H100")])
def test_the_kernels_to_compile_are_counted(name):
    """By what `make test-gpu` asks its tests before it compiles: on a card without the CUDA library, which runs most."""
    env = card.environment(card.Settings(name, cuda_library=False))
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", "gpu"]
    done = subprocess.run(command, env=env, cwd=TESTS, capture_output=True, text=True)
    found = re.search(r"compile: (\d+) kernels", done.stdout)
    assert done.returncode == 0 and found, done.stdout[-3000:] + done.stderr[-3000:]
    assert 500 < int(found[1]) <= compile_pool.MOST_KERNELS
    seconds = compile_pool.MOST_KERNELS * compile_pool.SECONDS / 8
    assert seconds <= 150, "of ten minutes, on eight processors"
    page = " ".join((ROOT / "CONTRIBUTING.md").read_text().split())
    assert compile_pool.arithmetic(compile_pool.MOST_KERNELS, 8) in page


def test_what_is_compiled_ahead_is_what_a_launch_looks_up(tmp_path):
    """On a stand-in card, with the real compiler: a launch behind the pool adds nothing to Triton's cache."""
    code = (
        "import sys; sys.path[:0] = ['tests/support']\n"
        "import torch, pathlib, compile_pool, gpu_cases\n"
        "from res2net_fused.testing.cases import WidthScale, cases, fused\n"
        "case = cases(['block'], [WidthScale(26, 4)], [1], 'bfloat16', 'cuda')[3]\n"
        "folder, capability = pathlib.Path(sys.argv[1]), torch.cuda.get_device_capability()\n"
        "calls = gpu_cases.distinct(gpu_cases.kernel_calls([case], capability))\n"
        "assert not compile_pool.compile_all(calls, capability, 2)\n"
        "ahead = {path.name for path in folder.rglob('*.cubin')}, len(list(folder.iterdir()))\n"
        "x = case.inputs()[0].contiguous(memory_format=torch.channels_last)\n"
        "with torch.inference_mode():\n"
        "    fused(case.module(), 'triton')(x)\n"
        "from card.triton_driver import LAUNCHES\n"
        "assert LAUNCHES.count >= 5 and len(ahead[0]) >= 2, (LAUNCHES.count, ahead)\n"
        "assert ahead == ({path.name for path in folder.rglob('*.cubin')}, len(list(folder.iterdir())))\n"
    )
    cache = str(tmp_path / "cache")
    env = card.environment(card.Settings("H100", compiles=True, cuda_library=False)) | {"TRITON_CACHE_DIR": cache}
    (tmp_path / "code.py").write_text(f"if __name__ == '__main__':\n    exec({code!r})\n")  # the pool's processes import it
    command = [sys.executable, str(tmp_path / "code.py"), cache]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"compiling \d+ Triton kernels in 2 processes", done.stdout)


# The tests themselves -------------------------------------------------------------------------------------------------


def test_the_order_names_every_file():
    order = re.search(r"ORDER = \(([^)]*)\)", (TESTS / "gpu" / "conftest.py").read_text())[1]
    named = [f"test_{name}.py" for name in re.findall(r"\w+", order)]
    assert sorted(named) == sorted(path.name for path in (TESTS / "gpu").glob("test_*.py"))


@pytest.mark.slow  # the default run skips them one by one
def test_no_gpu_test_runs_without_a_gpu():
    if torch.cuda.is_available() or "STAND_IN_CARD" in os.environ:
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(TESTS / "gpu")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" not in done.stdout.splitlines()[-1], done.stdout[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("lacks", ["nothing", "CUDA library", "Triton"])
@pytest.mark.parametrize("name", card.CARDS)
def test_gpu_tests_are_green_or_skipped_on_every_card(name, lacks, tmp_path):
    env = card.environment(card.Settings(name, cuda_library=lacks != "CUDA library"))
    if lacks == "Triton":
        (tmp_path / "triton").mkdir()
        (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('hidden by a test')")
        env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "gpu"]
    done = subprocess.run(command, env=env, cwd=TESTS, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 50
