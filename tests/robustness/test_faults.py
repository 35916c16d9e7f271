"""What a machine may lack or have broken: each gives a path that works, or one error that names the remedy.

Beside it: test_native.py (libraries that do not load), test_install.py (builds without a tool), test_damaged_files.py (files).
"""

import json
import os
import re
import shutil
import subprocess
import sys
import types
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from helpers import CHAINS, assert_close, tool

from res2net_fused import cli, hierarchical_conv2d
from res2net_fused._native import build_flags, library
from res2net_fused.backends import cpu as cpu_backend
from res2net_fused.backends import selection
from res2net_fused.backends import triton as triton_backend
from res2net_fused.backends.cuda import plan as launch_plan
from res2net_fused.backends.triton import tiles as tile_table
from res2net_fused.backends.triton.step_plan import plan_steps, plan_training
from res2net_fused.bench import tune
from res2net_fused.chain.config import ChainConfig
from res2net_fused.chain.problem import ChainProblem

PACKAGE = library.PACKAGE
CHAIN = CHAINS["last"]
needs_library = pytest.mark.skipif(not library.cpu_library().loaded, reason=library.cpu_library().reason)


def problem(device="cuda", **changes):
    fields = {"dtype": torch.bfloat16, "batch": 32, "height": 56, "width_pixels": 56, "width": 26, "steps": 3}
    return ChainProblem(ChainConfig(), torch.device(device), channels_last=True, **fields | changes)


@pytest.fixture
def blocked(tmp_path):
    """A folder that nobody can make, root neither: its parent is a file."""
    (tmp_path / "file").write_text("")
    return tmp_path / "file" / "folder"


# Nothing but PyTorch --------------------------------------------------------------------------------------------------

BARE = """
import sys, torch, res2net_fused as rf
from res2net_fused import cli
from res2net_fused._native import library
from res2net_fused.modules.reference_blocks import ReferenceBottle2neck
assert rf.__file__.startswith(sys.argv[1]), rf.__file__
block = ReferenceBottle2neck(64, 16, baseWidth=26, scale=4).eval()
x = torch.randn(2, 64, 9, 7)
with torch.no_grad():
    before = block(x)
    rf.accelerate(block)
    assert (block(x) - before).norm() < 1e-5 * before.norm()
    print(rf.explain(block, x))
for backend in ("cpu", "triton", "cuda"):
    try:
        rf.hierarchical_conv2d(torch.randn(1, 8, 5, 5), [torch.randn(4, 4, 3, 3)], backend=backend)
    except RuntimeError as error:
        print("REFUSED", backend, error)
assert cli.main(["info", "--device", "cpu"]) == 0
arguments = ["--quick", "--no-network", "--device", "cpu", "--configs", "14w8s", "--batch", "1", "--dtype", "float32"]
assert cli.main(["check", *arguments]) == 0
"""


def test_without_compiler_cuda_and_triton(tmp_path):
    """A package with nothing built, and a Triton that does not load."""
    ignored = shutil.ignore_patterns("*.so", "build.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "res2net_fused", ignore=ignored)
    (tmp_path / "triton.py").write_text("raise ImportError('libtriton.so: cannot open')")
    env = {k: v for k, v in os.environ.items() if not k.startswith("RES2NET_FUSED_")}
    env |= {"PYTHONPATH": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", BARE, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    refused = dict(re.findall(r"REFUSED (\w+) (.*)", done.stdout))
    assert "pip install --no-build-isolation" in refused["cpu"]
    assert re.search("Triton cannot be imported .*libtriton.so.*pip install triton", refused["triton"])
    assert "runs on cuda tensors" in refused["cuda"]
    assert re.search("yes +reference .*cpu: the native extension is not built", done.stdout)  # explain
    assert "0 misses" in done.stdout  # check


def test_an_empty_folder_in_place_of_triton(monkeypatch):
    """The import succeeds, which is how an uninstall leaves it."""
    triton_backend.availability.why_not_installed.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    why = triton_backend.chain.why_not(problem())
    triton_backend.availability.why_not_installed.cache_clear()
    assert "no attribute '__version__'" in why and "pip install triton" in why


# A stale or broken build ----------------------------------------------------------------------------------------------


@pytest.fixture
def stale(monkeypatch):
    """The libraries as they look to a newer package, which calls operators that they do not have."""
    monkeypatch.setitem(library._OPERATORS, "cpu", library._OPERATORS["cpu"] | {"cpu_of_tomorrow": 3, "cpu_sum": 7})
    monkeypatch.setattr(library, "_installed", library.NativeLibraries(PACKAGE))
    selection._log_once.cache_clear()
    if hasattr(torch.ops.res2net_fused_native, "known_decisions"):
        torch.ops.res2net_fused_native.known_decisions(True)  # of a process in which the libraries were good


@needs_library
def test_a_library_without_an_operator_is_left_alone(stale):
    status = library.cpu_library()
    assert not status.loaded
    assert (
        "lacks cpu_sum, cpu_of_tomorrow, or they take other arguments: install the wheel again, or rebuild it by `pip install"
        in status.reason
    )
    tensors = CHAIN.tensors(dtype=torch.float32)
    assert_close(hierarchical_conv2d(*tensors), hierarchical_conv2d(*CHAIN.tensors()))  # by the reference
    with pytest.raises(RuntimeError, match="lacks cpu_sum.*rebuild it"):
        hierarchical_conv2d(*tensors, backend="cpu")
    assert cpu_backend.settings.available_instruction_sets() == []


def named_arguments(sources):
    """The lists of csrc/common/named_arguments.h's kind, by macro, as RES2NET_SCHEMA writes them."""
    found = {}
    for path in sorted(sources.rglob("*.h")) + sorted(sources.rglob("*.cpp")):
        for name, body in re.findall(r"#define (\w+)\(INT, BOOL, FLOAT\)((?:.*\\\n)*.*)", path.read_text()):
            body = re.sub(r"(\w+)\(INT, BOOL, FLOAT\)", lambda match: found[match[1]], body)
            body = body.replace("\\\n", "")
            found[name] = re.sub(r"(INT|BOOL|FLOAT)\((\w+)\)", lambda match: f"{match[1].lower()} {match[2]}", body)
    return found


def test_the_operators_that_are_asked_for_are_those_of_the_sources():
    sources = PACKAGE.parent / "csrc"
    if not sources.is_dir():
        pytest.skip("the sources are not beside the installed package")
    defined, named = {}, named_arguments(sources)
    files = {
        "cpu": ("cpu/ops/*.cpp", "cuda/plan/*_ops.cpp"),
        "cuda": ("cuda/*_ops.cpp", "cuda/chain/*_ops.cpp"),
        "ops": ("operators/*.cpp",),
    }
    for name, patterns in files.items():
        texts = [path.read_text() for pattern in patterns for path in sorted(sources.glob(pattern))]
        text = re.sub(r"RES2NET_SCHEMA\((\w+)\)", lambda match: f'"{named[match[1]]}"', re.sub("//.*", "", "\n".join(texts)))
        schemas = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', text)
        parsed = [torch._C.parse_schema("".join(re.findall(r'"([^"]*)"', schema))) for schema in schemas]
        defined[name] = {schema.name: len(schema.arguments) for schema in parsed}
    assert library._OPERATORS == defined, "csrc/ defines other operators than library._OPERATORS names: change the latter"


PART = {"built": True, "file": build_flags.CPU_LIBRARY, "size": 1, "reason": ""}


@pytest.mark.parametrize(
    "record",
    [
        "[" * 100_000,
        "\x00\x01\x02",
        json.dumps({"info": {"cuda_version": 13, "commit": ["x"]}, "parts": {"cpu": PART | {"built": "yes"}}}),
        json.dumps({"info": {"instruction_sets": 7}, "parts": {"cpu": {"built": True}, "python": None, "cuda": []}}),
        json.dumps({"info": {"cuda_version": 13}, "parts": dict.fromkeys(("cpu", "cuda", "python"), PART | {"size": "big"})}),
        json.dumps({"info": {"cuda_version": 13}, "parts": dict.fromkeys(("cpu", "cuda", "python"), PART)}),
        json.dumps({"info": {}, "parts": {"python": PART | {"file": "../../elsewhere.so"}}}),
    ],
    ids=range(7),
)
def test_a_wrong_record_of_the_build(tmp_path, monkeypatch, capsys, record):
    (tmp_path / "lib").mkdir()
    (tmp_path / build_flags.BUILD_RECORD).write_text(record)
    for name in ("cpu", "cuda"):
        (tmp_path / library._FILES[name]).write_bytes(b"not a library")
    monkeypatch.setattr(library, "_installed", library.NativeLibraries(tmp_path))
    for status in (library.cpu_library(), library.cuda_library()):
        assert not status.loaded and "pip install" in status.reason
    assert library.build_information()["source"] != "_build_info"
    assert cli.main(["info", "--device", "cpu"]) == 0
    assert "not loaded: " in capsys.readouterr().out


@pytest.mark.parametrize("version", [13, None, ["13.0"], "12.8.1"])
def test_a_cuda_library_of_unknown_version(monkeypatch, version):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "rebuild it" in library._unfit_for_cuda(version)


@pytest.mark.parametrize(
    "version, release", [("2.13.0+cpu", (2, 13)), ("2.14.0a0+git1a2b3c", (2, 14)), ("2.15rc1", (2, 15)), ("3.0", (3, 0))]
)
def test_versions_of_torch(version, release):
    assert library.release(version) == release


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"not a module"])
def test_a_broken_pybind_module_is_not_opened(monkeypatch, tmp_path, content):
    """Opening a truncated file can end the process."""
    (tmp_path / "lib").mkdir()
    part = {"built": True, "file": "_build_info.so", "size": 223392, "reason": ""}
    (tmp_path / build_flags.BUILD_RECORD).write_text(json.dumps({"info": {"commit": "c"}, "parts": {"python": part}}))
    (tmp_path / "_build_info.so").write_bytes(content)
    monkeypatch.setattr(library, "PACKAGE", tmp_path)
    monkeypatch.setattr(library, "_installed", library.NativeLibraries(tmp_path))
    monkeypatch.setattr(library.importlib, "import_module", lambda *names: pytest.fail("it was imported"))
    information = library.build_information()
    assert information["source"] == "build.json" and information["commit"] == "c"


# Folders that cannot be written ---------------------------------------------------------------------------------------


def test_tune_says_at_once_that_its_table_cannot_be_written(blocked, monkeypatch):
    monkeypatch.setattr(tune, "jobs", lambda blocks: pytest.fail("it measures first"))
    with pytest.raises(RuntimeError, match="tiles.json cannot be written.*name another file by --out or RES2NET_FUSED_TILES"):
        tune.run_tune([], "cuda", blocked / "tiles.json", "tune", [], 1.0, False)


def test_bench_says_at_once_that_its_folder_cannot_be_written(blocked, capsys):
    tool(find_spec("matplotlib"), "matplotlib", "pip install 'res2net-fused[bench]'")
    assert cli.main(["bench", "--quick", "--no-network", "--device", "cpu", "--out", str(blocked)]) == 2
    said = capsys.readouterr()
    assert "cannot be written" in said.err and "name another folder" in said.err and said.out == ""


@pytest.fixture
def fresh_tables(monkeypatch):
    monkeypatch.delenv(tile_table.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    tile_table.forget()
    yield
    tile_table.forget()


def test_tiles_without_a_home(monkeypatch, fresh_tables, caplog):
    """A user in a container has no entry in /etc/passwd and no HOME."""

    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    monkeypatch.delenv("RES2NET_FUSED_CHOICES")
    assert plan_steps(problem(), (9, 0)).tile_source == "rule"
    assert "RES2NET_FUSED_CHOICES" in caplog.text
    with pytest.raises(RuntimeError, match="set RES2NET_FUSED_CHOICES to a file"):
        tune.run_tune([], "cuda", None, "tune", [], 1.0, False)


@pytest.mark.parametrize("kind", ["folder", "below a file"])
def test_a_table_of_tiles_that_cannot_be_read(monkeypatch, fresh_tables, tmp_path, blocked, caplog, kind):
    monkeypatch.setenv(tile_table.ENVIRONMENT_VARIABLE, str(tmp_path if kind == "folder" else blocked))
    assert plan_steps(problem(), (9, 0)).tile_source == "rule"
    assert "tuned tiles are not used" in caplog.text


def kernel_call(launch):
    """A launch whose kernel is `launch`."""
    pytest.importorskip("triton")
    from res2net_fused.backends.triton.launch import KernelCall

    class Kernel:
        def __getitem__(self, grid):
            return launch

    return KernelCall(Kernel(), 1, {"BLOCK_M": 128}, {"num_stages": 8})


def test_tritons_cache_that_cannot_be_written(monkeypatch, blocked):
    def launch(**arguments):
        cache.get_cache_manager("0123456789abcdef").put("binary", "kernel.json", binary=False)

    call = kernel_call(launch)
    from triton.runtime import cache

    monkeypatch.setenv("TRITON_CACHE_DIR", str(blocked))
    with pytest.raises(RuntimeError, match="set TRITON_CACHE_DIR to a folder that can be written"):
        call.run()


def test_a_tile_that_does_not_fit_the_gpu():
    def launch(**arguments):
        raise OutOfResources(300_000, 101_376, "shared memory")

    call = kernel_call(launch)
    from triton.runtime.errors import OutOfResources

    with pytest.raises(RuntimeError, match="'BLOCK_M': 128, 'num_stages': 8} does not fit.*RES2NET_FUSED_TILES.*tune"):
        call.run()
    with pytest.raises(OutOfResources):  # what `tune` passes over
        call.launch()


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton's driver starts here")
def test_a_driver_that_does_not_start(monkeypatch):
    """What happens without a C compiler, which Triton needs at its first launch; here for want of a GPU."""
    pytest.importorskip("triton")
    triton_backend.availability._driver_refusal.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(triton_backend.availability, "capability", lambda device: (9, 0))
    why = triton_backend.chain.why_not(problem())  # so that auto moves on to the next backend
    triton_backend.availability._driver_refusal.cache_clear()
    assert re.search(r"driver does not start.*C compiler.*TRITON_CACHE_DIR", why)
    assert "AttributeError" not in why  # the functions that are called exist in every supported Triton


# GPUs that no table knows ---------------------------------------------------------------------------------------------

UNKNOWN = [(8, 7), (9, 9), (10, 3), (11, 0), (12, 1), (99, 0)]


@pytest.mark.parametrize("capability", UNKNOWN, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_triton_plans_for_an_unknown_gpu(monkeypatch, capability, dtype):
    monkeypatch.setattr(triton_backend.availability, "capability", lambda device: capability)
    for width, size in ((26, 56), (208, 7), (1, 3)):
        for batch in (1, 256):
            p = problem(width=width, height=size, width_pixels=size, batch=batch, dtype=dtype)
            for plan in (plan_steps(p, capability), plan_training(p, capability)):
                assert plan.tile_source == "rule" and plan.launches
                assert all(plan.programs(p, launch, plan.images) >= 1 for launch in plan.launches)
            assert "driver" in (triton_backend.chain.why_not(p) or "driver")


@needs_library
@pytest.mark.parametrize("capability", UNKNOWN, ids=str)
def test_cuda_plans_for_an_unknown_gpu(capability):
    major, minor = capability
    limits = launch_plan.LIMITS["sm_86"]._replace(capability_major=major, capability_minor=minor)
    for changed in ({}, {"multiprocessors": 1, "l2_bytes": 0}, {"multiprocessors": 999, "shared_per_multiprocessor": 2**19}):
        plan = launch_plan.plan_chain(problem(), limits._replace(**changed))
        assert plan.shared_bytes <= limits.shared_per_block_optin and plan.ctas >= 1
        assert launch_plan.INSTANCE_NAMES[plan.instance] not in launch_plan.WGMMA_INSTANCES
    with pytest.raises(ValueError, match="shared memory"):
        launch_plan.plan_chain(problem(), limits._replace(shared_per_block_optin=0))


@needs_library
def test_a_plan_of_an_unknown_gpu_is_refused_not_guessed():
    old = launch_plan.LIMITS["sm_80"]._replace(capability_major=0, capability_minor=0)
    with pytest.raises(ValueError, match="at least 8.0"):
        launch_plan.plan_chain(replace(problem(), batch=1), old)
