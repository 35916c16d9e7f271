"""The Triton backend seen from a process without the interpreter, which runs its own tests in a process of their own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tree import ROOT, TESTS

from res2net_fused.backends import triton as triton_backend
from res2net_fused.backends.cuda import chain as cuda_chain
from res2net_fused.backends.triton import availability, chain1d
from res2net_fused.backends.triton.step_plan import CHUNK_BYTES, default_tile, multiprocessors, plan_steps
from res2net_fused.chain.config import Chain1dConfig, ChainConfig
from res2net_fused.chain.problem import Chain1dProblem, ChainProblem

SM90 = (9, 0)


def problem(config: ChainConfig | None = None, **changes) -> ChainProblem:
    """26w4s in the first stage at batch 32, on the GPU unless the changes say otherwise."""
    fields = {
        "config": config or ChainConfig(),
        "device": torch.device("cuda", 0),
        "dtype": torch.bfloat16,
        "batch": 32,
        "height": 56,
        "width_pixels": 56,
        "width": 26,
        "steps": 3,
        "channels_last": True,
    }
    return ChainProblem(**{**fields, **changes})


INTERPRETED = sorted((TESTS / "backends/triton/interpreter").glob("test_*.py"))


@pytest.mark.parametrize("files", [INTERPRETED[::2], INTERPRETED[1::2]], ids=["first_half", "second_half"])
def test_interpreter(files: list[Path], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A process for each of two workers; each more would import everything again. It sees no GPU, whose settings of TF32 would
    count, nor the checkout, beside which an installed package would not be the one that is tried."""
    pytest.importorskip("triton")
    most = request.config.getoption("--cases")
    chosen = ["-m", request.config.getoption("-m"), *([f"--cases={most}"] if most else []), *map(str, files)]
    settings = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", "-q", *settings, *chosen]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("STAND_IN_CARD", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert passed and "skipped" not in done.stdout


@pytest.fixture
def fresh_import_of_triton():
    triton_backend.availability.why_not_installed.cache_clear()
    yield
    triton_backend.availability.why_not_installed.cache_clear()


def test_reason_without_triton(monkeypatch, fresh_import_of_triton) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "Triton cannot be imported" in triton_backend.chain.why_not(problem())


def test_reason_with_an_old_triton(monkeypatch, fresh_import_of_triton) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    assert "3.5.1; at least 3.6" in triton_backend.chain.why_not(problem())


def test_backend_imports_without_triton(tmp_path) -> None:
    code = (
        "import sys\n"
        "sys.modules['triton'] = None\n"
        "from res2net_fused.backends.triton import chain\n"
        "from res2net_fused.backends.triton import step_plan\n"
        "assert 'cannot be imported' in chain.why_not(None)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize(
    "changes, capability, reason",
    [
        ({"dtype": torch.float64}, SM90, "float64"),
        ({"device": torch.device("meta")}, SM90, "must be on a CUDA device"),
        ({}, (7, 5), "compute capability 7.5; at least 8.0"),
        ({"height": 2**16, "width_pixels": 2**16}, SM90, "65536x65536 output pixels; at most 2147482624"),
        ({"height": 2**14, "width_pixels": 2**14, "width": 64, "config": ChainConfig(groups=64)}, SM90, "at most 134217712"),
        ({"width": 2**14}, SM90, "a convolution group has 16384 channels; at most 15360"),
        ({"width": 2**14, "config": ChainConfig(groups=2)}, SM90, None),
        ({}, SM90, None),
        ({"dtype": torch.float32}, (8, 0), None),
    ],
)
def test_reasons(monkeypatch, changes, capability, reason) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_backend.availability, "capability", lambda device: capability)
    why = triton_backend.chain.why_not(problem(**changes))
    assert why is None if reason is None else reason in why


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"length": 2**30}, "rows of x hold 1073741824 values and 2 more at each end; at most 1073740800"),
        ({"config": Chain1dConfig(dilation=2**30)}, "and 1073741824 more at each end"),
        ({"width": 2**15}, "a convolution has 3221225472 weights"),
        ({}, None),
    ],
)
def test_reasons_along_rows(monkeypatch, changes, reason) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(triton_backend.availability, "capability", lambda device: SM90)
    fields = {"config": Chain1dConfig(dilation=2), "device": torch.device("cuda", 0), "dtype": torch.float16, "batch": 3}
    rows = Chain1dProblem(**{**fields, "length": 200, "width": 64, "steps": 7, "kernel_size": 3, **changes})
    why = chain1d.why_not_1d(rows)
    assert why is None if reason is None else reason in why


def test_a_launch_has_no_more_programs_than_a_grid_holds() -> None:
    pytest.importorskip("triton")
    from res2net_fused.backends.triton.launch import KernelCall

    assert KernelCall(None, 2**31 - 1, {}, {}).programs == 2**31 - 1
    with pytest.raises(ValueError, match="2147483648 programs in one launch; at most 2147483647"):
        KernelCall(None, 2**31, {}, {})


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs on the CPU")
def test_reason_on_the_cpu() -> None:
    pytest.importorskip("triton")
    assert "TRITON_INTERPRET=1" in triton_backend.chain.why_not(problem(device=torch.device("cpu")))


def test_tf32_follows_cudnn_convolutions() -> None:
    conv = torch.backends.cudnn.conv
    before = conv.fp32_precision
    try:
        for setting in ("ieee", "tf32"):
            conv.fp32_precision = setting
            assert availability.convolutions_use_tf32() == (setting == "tf32")
    finally:
        conv.fp32_precision = before


def test_tf32_follows_the_old_flag_too(tmp_path) -> None:
    # A process of its own: once the new setting was written, PyTorch refuses to answer for the old one.
    code = (
        "import torch\n"
        "from res2net_fused.backends.triton.availability import convolutions_use_tf32 as tf32\n"
        "for flag in (False, True):\n"
        "    torch.backends.cudnn.allow_tf32 = flag\n"
        "    assert tf32() == flag\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@pytest.mark.parametrize("setting", ["tf32", "ieee"])
@pytest.mark.parametrize("override", ["0", "1", None])
def test_tf32_is_forbidden_by_the_environment_and_never_forced(setting, override, monkeypatch) -> None:
    """NVIDIA's libraries read the variable so: every value but 0 is reserved and changes nothing."""
    for module in (availability, cuda_chain):
        monkeypatch.setattr(module, "convolution_precision", lambda: setting)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if override is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    allowed = setting == "tf32" and override != "0"
    single = problem(dtype=torch.float32)
    assert availability.convolutions_use_tf32() == allowed
    assert availability.plan_for(single, SM90).precision == ("tf32" if allowed else "ieee")
    assert availability.plan_training_for(single, SM90).precision == ("tf32" if allowed else "ieee")
    refusal = cuda_chain.precision_refusal(single)
    if allowed:
        assert refusal is None
    else:
        assert ("NVIDIA_TF32_OVERRIDE=0" if override == "0" else "fp32_precision is 'ieee'") in refusal


STAND_INS = {(8, 6): None, (12, 0): None, (8, 7): "8.6", (10, 3): "10.0", (11, 0): "10.0", (12, 1): "12.0", (13, 0): "12.0"}


@pytest.mark.parametrize("capability, stand_in", STAND_INS.items())
def test_an_unknown_card_is_planned_as_the_nearest_known_one_and_said_so(capability, stand_in) -> None:
    known = capability if stand_in is None else tuple(map(int, stand_in.split(".")))
    plan, own = plan_steps(problem(batch=2), capability), "{}.{}".format(*capability)
    assert plan.tile == default_tile(problem(batch=2), known, "ieee", plan.images)
    said = f", as for compute capability {stand_in}, since {own} is not known"
    assert plan.describe(problem(batch=2)).endswith(said) == (stand_in is not None)
    assert multiprocessors(capability) == multiprocessors(known) > 80


@pytest.mark.parametrize("tf32", [False, True])
def test_precision_of_the_plan(tf32) -> None:
    assert plan_steps(problem(dtype=torch.float32), SM90, tf32=tf32).precision == ("tf32" if tf32 else "ieee")
    assert plan_steps(problem(), SM90, tf32=tf32).precision == "ieee"


@pytest.mark.parametrize("steps", [1, 3, 7])
def test_a_chain_is_one_launch_per_convolution(steps) -> None:
    plan = plan_steps(problem(width=32, steps=steps), SM90)
    assert [launch.steps for launch in plan.launches] == [1] * steps
    assert [launch.passes for launch in plan.launches] == [False] * (steps - 1) + [True]
    assert [launch.forms_next for launch in plan.launches] == [True] * (steps - 1) + [False]
    assert [launch.reads_u for launch in plan.launches] == [False] + [True] * (steps - 1)


def test_a_stage_block_is_one_launch() -> None:
    stage = ChainConfig(stride=2, pool="avg3", hierarchical=False)
    plan = plan_steps(problem(stage, batch=256), SM90)
    assert [(launch.steps, launch.passes) for launch in plan.launches] == [(3, True)]
    assert plan.images == 256 and plan.scratch_buffers == 0


def test_badly_aligned_first_group_is_aligned_once_where_that_pays() -> None:
    assert len(plan_steps(problem(), SM90).launches) == 4
    assert len(plan_steps(problem(batch=1), SM90).launches) == 3
    assert len(plan_steps(problem(), SM90, pitch=32).launches) == 3
    assert len(plan_steps(problem(width=104), SM90).launches) == 3


@pytest.mark.parametrize("batch", [1, 31, 32, 33, 256])
def test_chunks_stay_in_the_cache_and_cover_the_batch(batch) -> None:
    plan = plan_steps(problem(batch=batch), SM90)
    assert plan.images * 4 * 56 * 56 * plan.padded_channels * 2 <= CHUNK_BYTES
    chunks = -(-batch // plan.images)
    assert (chunks - 1) * plan.images < batch <= chunks * plan.images
    assert (f"{4 * chunks} launches" if batch > 1 else "3 launches") in plan.describe(problem(batch=batch))


@pytest.mark.parametrize("capability, wanted", [((8, 0), 108), ((9, 0), 132), ((10, 0), 148)])
@pytest.mark.parametrize("size, width", [(56, 26), (28, 52), (14, 104)])
def test_every_multiprocessor_has_work_at_batch_32(capability, wanted, size, width) -> None:
    large = problem(height=size, width_pixels=size, width=width)
    plan = plan_steps(large, capability)
    middle = next(launch for launch in plan.launches if launch.steps and not launch.passes)
    assert plan.programs(large, middle, plan.images) >= wanted
