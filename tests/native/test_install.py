"""Installing from source: with and without what the native extension needs."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import find_nvcc
from tree import ROOT

BUILD_SETTINGS = {"CXX", "CUDA_HOME", "CUDA_PATH", "MAX_JOBS"}  # variables that steer a build

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the native extension is built on Linux only")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy with nothing built and the kernels left out: what is tested is how setup.py builds, and that quickly.

    The real tree stays untouched; the tests share one build folder, so most of them compile nothing.
    """
    root = tmp_path_factory.mktemp("checkout") / "res2net-fused"
    root.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy2(ROOT / name, root)
    for folder, pattern in (("common", "*"), ("python", "*"), ("cpu/ops", "build_info_ops.cpp"), ("cuda", "device*")):
        (root / "csrc" / folder).mkdir(parents=True)
        for source in (ROOT / "csrc" / folder).glob(pattern):
            shutil.copy2(source, root / "csrc" / folder)
    ignored = shutil.ignore_patterns("*.so", "build.json", "__pycache__")
    shutil.copytree(ROOT / "res2net_fused", root / "res2net_fused", ignore=ignored)
    return root


def environment(compiler_on_path=True, **extra):
    """This environment without settings of its own; without a compiler, PATH holds this Python's tools only."""
    env = {k: v for k, v in os.environ.items() if k not in BUILD_SETTINGS and not k.startswith("RES2NET_FUSED_")}
    if not compiler_on_path:
        env["PATH"] = sysconfig.get_path("scripts")
        found = [tool for tool in ("c++", "g++", "clang++", "nvcc") if shutil.which(tool, path=env["PATH"])]
        if found:
            pytest.skip(f"{found} lie beside this Python's own tools")
    return env | {"RES2NET_FUSED_CUDA_ARCHS": "none"} | extra


def build(checkout, target, env):
    """setup.py's build_ext alone, into `target`; returns the finished process and the record it left."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(target)]
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    record = target / "res2net_fused" / "lib" / "build.json"
    return done, json.loads(record.read_text()) if record.exists() else None


def need_compiler():
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        pytest.skip("needs a C++ compiler")


def libraries_in(folder):
    return sorted(path.name for path in folder.rglob("*.so"))


def pip_install(checkout, site, env):
    pip = [sys.executable, "-m", "pip", "install", "-v", "--no-build-isolation", "--no-deps", "--no-index"]
    return subprocess.run([*pip, "--target", str(site), str(checkout)], env=env, capture_output=True, text=True)


def loaded_from(site, tmp_path):
    """The CPU library's status in a fresh process that imports the package from `site`."""
    code = (
        "import dataclasses, json, res2net_fused; from res2net_fused._native import library\n"
        "status = library.cpu_library()\n"
        "print(json.dumps([res2net_fused.__file__, status.loaded, status.reason, library.build_information()]))"
    )
    env = os.environ | {"PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    file, loaded, reason, information = json.loads(done.stdout.splitlines()[-1])
    assert Path(file).is_relative_to(site)
    return loaded, reason, information


def test_install_without_a_compiler(checkout, tmp_path):
    site = tmp_path / "site"
    done = pip_install(checkout, site, environment(compiler_on_path=False))
    assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout + done.stderr
    assert "cpu: NOT BUILT: no C++ compiler found (looked for c++, g++, clang++)" in output
    assert "apt-get install g++" in output
    assert libraries_in(site) == []
    loaded, reason, information = loaded_from(site, tmp_path)
    assert not loaded and "no C++ compiler found" in reason
    assert information["source"] == "build.json" and not any(p["built"] for p in information["parts"].values())


def test_install_with_a_compiler(checkout, tmp_path):
    need_compiler()
    site = tmp_path / "site"
    done = pip_install(checkout, site, environment(RES2NET_FUSED_BUILD="require"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert libraries_in(site) == ["libres2net_fused_cpu.so", "libres2net_fused_ops.so"]
    assert (site / "bin" / "res2net-fused").exists()
    loaded, reason, information = loaded_from(site, tmp_path)
    # It loads in that process; as the kernels were left out, their operators are missed and it is not used.
    assert not loaded and re.search("lacks .*cpu_block_forward, .*cpu_pack, .*rebuild it by `pip install", reason), reason
    assert information["source"] == "build.json" and information["cuda_version"] is None


def build_wheel(source, target, env):
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", str(target)]
    done = subprocess.run([*pip, str(source)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = target.glob("*.whl")
    return wheel


def test_one_wheel_serves_every_python(checkout, tmp_path):
    need_compiler()
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    stale = checkout / "build" / f"lib.{sysconfig.get_platform()}-{sys.implementation.cache_tag}" / "res2net_fused"
    stale.mkdir(parents=True, exist_ok=True)
    (stale / "removed_long_ago.py").touch()
    (stale / f"_build_info{sysconfig.get_config_var('EXT_SUFFIX')}").touch()
    wheel = build_wheel(checkout, tmp_path, environment(RES2NET_FUSED_BUILD="require"))
    assert wheel.name.endswith(f"-py3-none-{platform}.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        (tag,) = [name for name in archive.namelist() if name.endswith("/WHEEL")]
        assert f"Tag: py3-none-{platform}\n" in archive.read(tag).decode()
        record = json.loads(archive.read("res2net_fused/lib/build.json"))
    sources = [str(path.relative_to(checkout)) for path in (checkout / "res2net_fused").rglob("*.py")]
    data = ["lib/build.json", "lib/libres2net_fused_cpu.so", "lib/libres2net_fused_ops.so", "ops/schemas.inc", "py.typed"]
    assert sorted(names) == sorted([*sources, *(f"res2net_fused/{name}" for name in data)])
    assert record["parts"]["cpu"]["built"] and "serve every Python" in record["parts"]["python"]["reason"]


def test_builds_in_place_have_the_pybind_module(checkout, request):
    need_compiler()
    pytest.importorskip("pybind11")
    package = checkout / "res2net_fused"
    request.addfinalizer(lambda: [path.unlink() for path in (*package.rglob("*.so"), package / "lib" / "build.json")])
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    done = subprocess.run(command, cwd=checkout, env=environment(RES2NET_FUSED_BUILD="require"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(list(package.glob("_build_info*.so"))) == 1
    loaded, reason, information = loaded_from(checkout, checkout.parent)
    assert information["source"] == "_build_info"


def test_require_fails_without_a_compiler(checkout, tmp_path):
    env = environment(compiler_on_path=False, RES2NET_FUSED_BUILD="require")
    done, record = build(checkout, tmp_path, env)
    assert done.returncode != 0 and record is None
    assert "RES2NET_FUSED_BUILD=require, ops: no C++ compiler found" in done.stderr


def test_compiler_that_fails(checkout, tmp_path):
    done, record = build(checkout, tmp_path, environment(CXX=shutil.which("false")))
    assert done.returncode == 0 and "compiling the cpu part failed" in done.stderr
    assert not record["parts"]["cpu"]["built"] and "GCC >= 11" in record["parts"]["cpu"]["reason"]
    done, _ = build(checkout, tmp_path, environment(CXX="no-such-compiler", RES2NET_FUSED_BUILD="require"))
    assert done.returncode != 0 and "looked for CXX=no-such-compiler" in done.stderr


def test_off_builds_nothing_and_removes_what_an_earlier_build_left(checkout, tmp_path):
    need_compiler()
    done, record = build(checkout, tmp_path, environment())
    assert done.returncode == 0 and record["parts"]["cpu"]["built"], done.stderr
    assert not record["parts"]["cuda"]["built"] and "RES2NET_FUSED_CUDA_ARCHS=none" in record["parts"]["cuda"]["reason"]
    done, record = build(checkout, tmp_path, environment(RES2NET_FUSED_BUILD="off"))
    assert done.returncode == 0 and "RES2NET_FUSED_BUILD=off" in record["parts"]["cpu"]["reason"]
    assert libraries_in(tmp_path) == []


def test_wrong_settings_are_named(checkout, tmp_path):
    done, _ = build(checkout, tmp_path, environment(RES2NET_FUSED_BUILD="maybe"))
    assert done.returncode != 0 and "expected 'auto', 'require' or 'off', got 'maybe'" in done.stderr
    find_nvcc()  # without one the architectures are not looked at
    done, _ = build(checkout, tmp_path, environment(RES2NET_FUSED_CUDA_ARCHS="17"))
    assert done.returncode != 0 and "RES2NET_FUSED_CUDA_ARCHS: '17'" in done.stderr


def test_without_torch_the_build_says_so(checkout, tmp_path):
    need_compiler()
    # An isolated build environment has no torch; hiding it from find_spec is the same to setup.py.
    code = (
        "import importlib.util as util, runpy, sys\n"
        "real = util.find_spec\n"
        "util.find_spec = lambda name, *a: None if name == 'torch' else real(name, *a)\n"
        "sys.argv = ['setup.py', 'build_ext', '--build-lib', sys.argv[1]]\n"
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=checkout, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "cpu: NOT BUILT: torch is not installed in the build environment" in done.stderr
    assert "pip install --no-build-isolation" in done.stderr


def test_cuda_library_builds_without_a_gpu(checkout, tmp_path):
    find_nvcc()
    done, record = build(checkout, tmp_path, environment(RES2NET_FUSED_CUDA_ARCHS="90a"))
    assert done.returncode == 0 and record["parts"]["cuda"]["built"], done.stderr
    assert record["info"]["cuda_architectures"] == ["90a"]
    assert "libres2net_fused_cuda.so" in libraries_in(tmp_path)
    assert re.search(r"^res2net-fused: compiling the cuda part, (\d) of \1 files$", done.stdout, re.M)
    done, _ = build(checkout, tmp_path, environment(RES2NET_FUSED_CUDA_ARCHS="90a"))
    assert "compiling" not in done.stdout, "nothing changed"


def fake_nvcc(folder, version):
    (folder / "bin").mkdir(parents=True)
    (folder / "bin" / "nvcc").write_text(f"#!/bin/sh\necho V{version}\n")
    (folder / "bin" / "nvcc").chmod(0o755)
    return {"CUDA_HOME": str(folder), "RES2NET_FUSED_CUDA_ARCHS": "90a"}


def test_an_nvcc_of_another_cuda_than_torchs_compiles_nothing(checkout, tmp_path):
    need_compiler()
    # A package that shadows torch's: what it says of its CUDA is all that differs.
    shadow = tmp_path / "shadow" / "torch"
    shadow.mkdir(parents=True)
    (shadow / "__init__.py").touch()
    (shadow / "version.py").write_text("cuda: Optional[str] = '13.0'\n")
    for name in ("include", "lib"):
        (shadow / name).symlink_to(Path(torch.__file__).parent / name)
    env = fake_nvcc(tmp_path / "cuda", "12.4.131") | {"PYTHONPATH": str(shadow.parent)}
    done, record = build(checkout, tmp_path / "out", environment(**env))
    assert done.returncode == 0 and record["parts"]["cpu"]["built"] and not record["parts"]["cuda"]["built"], done.stderr
    reason = record["parts"]["cuda"]["reason"]
    assert "nvcc is of CUDA 12.4.131, and torch of CUDA 13.0; the CUDA library needs an nvcc of torch's major version" in reason
    assert "compiling the cuda part" not in done.stdout and "compiling the cpu part" in done.stdout
    done, _ = build(checkout, tmp_path / "none", environment(**env, RES2NET_FUSED_BUILD="require"))
    assert done.returncode != 0 and "RES2NET_FUSED_BUILD=require, cuda: " in done.stderr and "12.4.131" in done.stderr


def test_kernels_of_every_instruction_set_reach_the_library(checkout, tmp_path, request):
    need_compiler()
    kernel = checkout / "csrc" / "cpu" / "kernels" / "probe.cpp"
    operator = checkout / "csrc" / "cpu" / "ops" / "probe_ops.cpp"
    request.addfinalizer(lambda: (kernel.unlink(), operator.unlink()))
    kernel.parent.mkdir()
    kernel.write_text(
        "namespace res2net_fused::RES2NET_FUSED_ISA {\n"
        "extern const int probe_lanes;\n"
        "__attribute__((used)) extern const int probe_lanes =\n"
        "#if defined(__AVX512F__)\n  16;\n#elif defined(__AVX2__)\n  8;\n#else\n  4;\n#endif\n}\n"
    )
    operator.write_text(
        "#include <torch/csrc/stable/library.h>\n"
        "namespace res2net_fused {\n"
        "namespace portable { extern const int probe_lanes; }\n"
        "#ifdef RES2NET_FUSED_HAVE_AVX2\nnamespace avx2 { extern const int probe_lanes; }\n#endif\n"
        "#ifdef RES2NET_FUSED_HAVE_AVX512\nnamespace avx512 { extern const int probe_lanes; }\n#endif\n"
        "static std::vector<int64_t> lanes() {\n"
        "  std::vector<int64_t> found = {portable::probe_lanes};\n"
        "#ifdef RES2NET_FUSED_HAVE_AVX2\n  found.push_back(avx2::probe_lanes);\n#endif\n"
        "#ifdef RES2NET_FUSED_HAVE_AVX512\n  found.push_back(avx512::probe_lanes);\n#endif\n"
        "  return found;\n}\n}\n"
        'STABLE_TORCH_LIBRARY_FRAGMENT(res2net_fused_native, m) { m.def("probe_lanes() -> int[]"); }\n'
        "STABLE_TORCH_LIBRARY_IMPL(res2net_fused_native, CompositeExplicitAutograd, m) {\n"
        '  m.impl("probe_lanes", TORCH_BOX(&res2net_fused::lanes));\n}\n'
    )
    done, record = build(checkout, tmp_path, environment(RES2NET_FUSED_BUILD="require"))
    assert done.returncode == 0, done.stderr
    code = "import sys, torch; torch.ops.load_library(sys.argv[1]); print(torch.ops.res2net_fused_native.probe_lanes())"
    library = tmp_path / "res2net_fused" / record["parts"]["cpu"]["file"]
    done = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = {"portable": 4, "avx2": 8, "avx512": 16}
    assert json.loads(done.stdout) == [expected[name] for name in record["info"]["instruction_sets"]]
    assert record["info"]["instruction_sets"][0] == "portable"


# make -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def make(tmp_path):
    """make(arguments): the Makefile's calls of Python in an empty checkout, in order; `make.torch` is what the Python has."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed")
    shutil.copy2(ROOT / "Makefile", tmp_path)
    native = (f"res2net_fused/_native/{name}.py" for name in ("build_flags", "cuda_toolkit"))
    for name in ("setup.py", "pyproject.toml", "csrc/a.cpp", *native):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).touch()
    # Stands for the interpreter of an environment, and for the one that creates environments.
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        f'echo "${{RES2NET_FUSED_BUILD:+BUILD=$RES2NET_FUSED_BUILD }}$*" >> {tmp_path}/calls\n'
        'case "$*" in\n'
        '  "-m venv "*) mkdir -p "$3/bin"; cp "$0" "$3/bin/python";;\n'
        f"  *find_spec*) test -e {tmp_path}/has_torch;;\n"
        "  *importlib.metadata*) echo 28;;\n"
        "  *cuda_toolkit.py) echo [nvcc];;\n"
        "esac\n"
    )
    python.chmod(0o755)

    def run(*arguments, origin=()):
        (tmp_path / "calls").unlink(missing_ok=True)
        env = {k: v for k, v in os.environ.items() if k not in ("TORCH", "TRITON", "VENV", "MAKEFLAGS", "RES2NET_FUSED_BUILD")}
        command = ["make", "setup", f"PYTHON={python}", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=env | dict(origin), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []

    run.python, run.folder = python, tmp_path
    return run


def torch_installed(calls):
    return [call.removeprefix("-m pip install ") for call in calls if "install torch==" in call]


def test_make_installs_the_pins_or_what_it_is_told(make):
    pinned = re.search(r"^TORCH \?= (torch==\S+)$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert torch_installed(make())[0].startswith(f"{pinned} triton==")
    assert make() == [], "everything is there"
    other = ("TORCH=torch==2.11.0", "TRITON=triton==3.6.0")
    assert torch_installed(make(*other)) == ["torch==2.11.0 triton==3.6.0"]
    assert make(*other) == []
    assert torch_installed(make("TORCH=torch==2.11.0")) == ["torch==2.11.0 triton"], "which Triton, torch itself says"
    assert torch_installed(make(origin={"TORCH": "torch==2.12.0"})) == ["torch==2.12.0 triton"]


def test_make_builds_behind_the_compiler_that_it_installs(make):
    calls = make()
    (extras,) = [i for i, call in enumerate(calls) if call.endswith("-e .[nvcc]")]
    assert calls[extras].startswith("BUILD=off ")
    assert calls.index("setup.py build_ext --inplace") > extras


def test_make_fails_where_the_build_does(make):
    """It runs beside pip."""
    make.python.write_text(make.python.read_text() + 'case "$*" in *build_ext*) sleep 0.3; exit 3;; esac\n')
    with pytest.raises(AssertionError):
        make()
    assert not (make.folder / ".venv" / ".installed").exists()


def test_make_installs_a_timm_that_can_be_used(make):
    """No dependencies are installed, which would change torch, but huggingface_hub, which fetches weights, with its own."""
    calls = make()
    (timm,) = [i for i, call in enumerate(calls) if "torchvision==0.28.*" in call]
    assert "--no-deps" in calls[timm] and " timm " in calls[timm]
    (hub,) = [i for i, call in enumerate(calls) if "huggingface_hub" in call]
    assert "--no-deps" not in calls[hub]
    assert calls.index(".ci/fit_torchvision.py") > timm > hub


def test_make_installs_what_only_wheels_need_with_them(make):
    assert not any("release" in call for call in make()), "zig takes half a gigabyte"
    calls = make("wheels")
    assert calls.index("-m pip install res2net-fused[release]") < calls.index("release/artefacts.py")
    assert any("res2net-fused[bench,test,release] " in call for call in make("VENV=other", "EXTRAS=bench,test,release"))
    assert "make setup EXTRAS=bench,test,release\n" in (ROOT / ".ci" / "run").read_text(), "a test there needs it"


def test_make_leaves_the_torch_of_an_environment_that_it_did_not_create(make):
    for name in ("theirs", "empty"):
        (make.folder / name / "bin").mkdir(parents=True)
        shutil.copy2(make.python, make.folder / name / "bin" / "python")
    assert torch_installed(make("VENV=empty")), "it has no torch"
    (make.folder / "has_torch").touch()
    assert torch_installed(make("VENV=theirs")) == [] and make("VENV=theirs") == []
    assert torch_installed(make("VENV=theirs", "TORCH=torch==2.12.0")) == ["torch==2.12.0 triton"]
    assert torch_installed(make("VENV=created"))
    (make.folder / "Makefile").touch()
    assert torch_installed(make("VENV=created")), "make's own follows the pins"
    assert torch_installed(make()), "and so does the usual one"


def test_importing_the_package_leaves_optimizers_and_the_compiler_alone():
    code = (
        "import sys, torch, res2net_fused as rf, torch.optim.optimizer as o\n"
        "assert not o._global_optimizer_post_hooks\n"
        "assert 'torch._dynamo' not in sys.modules  # seconds, for who may never compile\n"
        "block = rf.Bottle2neck(16, 4, scale=4, baseWidth=32).eval()\n"
        "with torch.no_grad(): block(torch.randn(1, 16, 5, 5))\n"
        "assert len(o._global_optimizer_post_hooks) == 1  # weights are kept from here on\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
