"""The native libraries: what they link to, how they load, and what is said where they cannot."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch
from tree import ROOT

from res2net_fused._native import build_flags, library
from res2net_fused.backends.cuda import plan as launch_plan

PACKAGE = Path(library.__file__).resolve().parents[1]
# CPython's functions, and the mangled names of at::, c10:: and torch::, none of which outlive a release
UNSTABLE_SYMBOL = re.compile(r"_?Py[A-Z_]|_Z[A-Z]*?N?K?(2at|3c10|5torch|5caffe)")

RECORD = library.NativeLibraries(PACKAGE).record()


def built(name):
    """Path of a built part, or a skip that says why it is not there."""
    part = RECORD["parts"].get(name, {"built": False, "reason": "no build record; install the package first"})
    if not part["built"]:
        pytest.skip(f"the {name} part is not built: {part['reason']}")
    return PACKAGE / part["file"]


def tool_output(*command):
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def package_copy(folder, name="cpu"):
    """A package folder with a copy of one library and a record that fits it."""
    source = built(name)
    (folder / "lib").mkdir(parents=True)
    (folder / build_flags.BUILD_RECORD).write_text(json.dumps(RECORD))
    return Path(shutil.copy(source, folder / "lib"))


def fake_package(folder, content=b"not a library", **part):
    """A package folder whose libraries are `content`, the CPU one recorded at its true size unless `part` says otherwise."""
    (folder / "lib").mkdir(parents=True)
    parts = {}
    for name, file in (("cpu", build_flags.CPU_LIBRARY), ("ops", build_flags.OPS_LIBRARY)):
        (folder / file).write_bytes(content)
        parts[name] = {"built": True, "file": file, "size": len(content), "reason": ""}
    parts["cpu"] |= part
    (folder / build_flags.BUILD_RECORD).write_text(json.dumps({"info": {}, "parts": parts}))
    return library.NativeLibraries(folder)


# What the libraries are


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_libraries_use_the_stable_abi_only(name):
    symbols = tool_output("nm", "-D", "--undefined-only", str(built(name))).split()
    assert any(s.startswith("aoti_torch_library") for s in symbols)
    assert [s for s in symbols if UNSTABLE_SYMBOL.match(s)] == []


@pytest.mark.parametrize("symbol", ["PyList_New", "_Py_Dealloc", "_ZN3c106detail7failureEv", "_ZNK2at6Tensor3dimEv"])
def test_the_symbol_check_can_fail(symbol):
    assert UNSTABLE_SYMBOL.match(symbol)


def test_cuda_library_brings_its_own_runtime_and_finds_torchs():
    needed = re.findall(r"NEEDED.*\[(.*)\]", tool_output("readelf", "-d", str(built("cuda"))))
    assert not [name for name in needed if "cudart" in name]
    assert "libtorch.so" in needed  # through it libtorch_cuda.so, where torch has CUDA
    assert not [name for name in needed if "cuda" in name]


def test_cpu_library_needs_no_cuda():
    needed = re.findall(r"NEEDED.*\[(.*)\]", tool_output("readelf", "-d", str(built("cpu"))))
    assert "libtorch_cpu.so" in needed and not [name for name in needed if "cuda" in name]


def test_cuda_kernel_files_include_no_torch_header():
    sources = list((PACKAGE.parent / "csrc" / "cuda").rglob("*.cu*"))
    if not sources:
        pytest.skip("the sources are not beside the installed package")
    for source in sources:
        assert not re.search(r"#include\s*[<\"](torch|ATen|c10)/", source.read_text()), source.name


# Folders of csrc/, each of which includes from itself and those before it. Others see the CPU kernels by one header.
FLOORS = {"cpu": ("kernels", "runtime", "chain", "ops"), "cuda": ("plan", "chain")}


@pytest.mark.parametrize("library", FLOORS)
def test_folders_of_the_sources_include_only_from_those_below(library):
    csrc, floors = PACKAGE.parent / "csrc", FLOORS[library]
    if not csrc.is_dir():
        pytest.skip("the sources are not beside the installed package")
    assert sorted(path.name for path in (csrc / library).iterdir() if path.is_dir()) == sorted(floors)
    wrong, seen = [], 0
    for number, floor in enumerate(floors):
        for source in sorted((csrc / library / floor).iterdir()):
            for other, name, file in re.findall(r'#include "(cpu|cuda)/(?:(\w+)/)?([\w.]+)"', source.read_text()):
                seen += 1
                below = other == library and (not name or floors.index(name) <= number)
                if not below or (name == "kernels" and file != "kernels.h"):
                    wrong.append(f"{library}/{floor}/{source.name} includes {other}/{name}/{file}")
    assert wrong == [] and seen > 10


# Loading


def test_cpu_library_loads_and_states_its_build():
    path = built("cpu")
    status = library.cpu_library()
    assert status == library.LibraryStatus("cpu", True, "", path)
    info = json.loads(torch.ops.res2net_fused_native.build_info())
    assert info["cxx_standard"] >= 202002
    assert info["torch_target"] == ".".join(map(str, build_flags.TORCH_TARGET))
    for key in ("torch_target", "commit", "instruction_sets", "cuda_version", "cuda_architectures"):
        assert info[key] == RECORD["info"][key], key


def test_pybind_module_agrees_with_the_operator():
    built("python")
    assert library.cpu_library().loaded
    information = library.build_information()
    assert information.pop("source") == "_build_info"
    assert information.pop("parts") == RECORD["parts"]
    assert information == json.loads(torch.ops.res2net_fused_native.build_info())


def test_build_information_without_the_pybind_module(monkeypatch):
    monkeypatch.setitem(sys.modules, "res2net_fused._build_info", None)  # import raises ImportError
    information = library.build_information()
    assert information["source"] == ("build.json" if RECORD["info"] else "none")
    assert {k: v for k, v in information.items() if k not in ("source", "parts")} == RECORD["info"]


class Owner:
    def __init__(self):
        self.kind, self.sizes = "a", (3, 1000)


DICT_CHANGES = {
    "an equal value": lambda owner, table: setattr(owner, "sizes", tuple([3, 1000])),
    "another value": lambda owner, table: setattr(owner, "kind", "b"),
    "one more": lambda owner, table: setattr(owner, "more", None),
    "one less": lambda owner, table: delattr(owner, "kind"),
    "another name": lambda owner, table: vars(owner).update(other=vars(owner).pop("kind")),
    "another dictionary": lambda owner, table: setattr(owner, "__dict__", {"kind": "b"}),
    "another class": lambda owner, table: setattr(owner, "__class__", type("Other", (Owner,), {})),
    "a value of the table": lambda owner, table: table.update(x=[1]),
    "less in the table": lambda owner, table: table.clear(),
}


@pytest.mark.parametrize("change", [*DICT_CHANGES, "nothing", "another dictionary of the same"])
def test_dictionaries_are_compared_object_for_object(change):
    same_dicts = library.same_dicts()
    if same_dicts is None:
        built("python")
    owner, table = Owner(), {"x": [1], "y": None}
    held, references = dict(table), [sys.getrefcount(o) for o in (owner, table, table["x"])]
    same = same_dicts([owner], [table, {}])
    assert references == [sys.getrefcount(o) for o in (owner, table, table["x"])], "references are borrowed"
    assert same.alike() and same.alike()
    if change == "another dictionary of the same":
        owner.__dict__ = dict(vars(owner))
    elif change != "nothing":
        DICT_CHANGES[change](owner, table)
    assert same.alike() is (change not in DICT_CHANGES)
    del held


@pytest.mark.parametrize("owners,dicts", [([1], []), ([], [[]]), ([object()], [])])
def test_what_has_no_dictionary_is_refused(owners, dicts):
    same_dicts = library.same_dicts()
    if same_dicts is None:
        built("python")
    with pytest.raises((AttributeError, TypeError)):
        same_dicts(owners, dicts)


@pytest.mark.parametrize("fault", ["absent", "other sources"])
def test_blocks_do_without_the_module(fault, monkeypatch):
    library.same_dicts.cache_clear()
    module = None if fault == "absent" else types.ModuleType("res2net_fused._build_info")
    monkeypatch.setitem(sys.modules, "res2net_fused._build_info", module)
    try:
        assert library.same_dicts() is None
    finally:
        library.same_dicts.cache_clear()


def test_cuda_library_status_fits_this_torch():
    built("cuda")
    status = library.cuda_library()
    if torch.version.cuda is None:
        assert not status.loaded and "has no CUDA" in status.reason
        with pytest.raises(RuntimeError, match="has no CUDA"):
            library.device_limits(0)
    elif torch.version.cuda.split(".")[0] == RECORD["info"]["cuda_version"].split(".")[0]:
        assert status.loaded, status.reason
        info = json.loads(torch.ops.res2net_fused_native.cuda_build_info())
        assert info["cuda_version"] == RECORD["info"]["cuda_version"]
        assert info["cuda_architectures"] == RECORD["info"]["cuda_architectures"]
    else:
        assert not status.loaded and "rebuild it" in status.reason


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_device_limits_agree_with_torch():
    status = library.cuda_library()
    if not status.loaded:
        pytest.skip(status.reason)
    properties = torch.cuda.get_device_properties(0)
    limits = library.device_limits(0)
    assert (limits.capability_major, limits.capability_minor) == (properties.major, properties.minor)
    assert limits.multiprocessors == properties.multi_processor_count
    assert limits.l2_bytes == properties.L2_cache_size
    with pytest.raises(RuntimeError, match="device 4096"):
        library.device_limits(4096)


def test_a_copy_loads_in_a_fresh_process(tmp_path):
    package_copy(tmp_path)
    code = (
        "import sys, torch; from res2net_fused._native.library import NativeLibraries\n"
        "status = NativeLibraries(sys.argv[1]).status('cpu'); assert status.loaded, status.reason\n"
        "print(torch.ops.res2net_fused_native.build_info())"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["commit"] == RECORD["info"]["commit"]


def test_a_second_copy_is_left_alone(tmp_path):
    path = package_copy(tmp_path)
    assert library.cpu_library().loaded
    status = library.NativeLibraries(tmp_path).status("cpu")
    assert not status.loaded and "another copy" in status.reason and str(path) in status.reason


# Reasons


def unloaded_operators(monkeypatch):
    """Lets a test reach the loader although the real library is loaded in this process."""
    monkeypatch.setitem(library._OPERATORS, "cpu", {})


def test_nothing_built_names_the_remedy(tmp_path):
    for name in ("cpu", "cuda"):
        status = library.NativeLibraries(tmp_path).status(name)
        assert not status.loaded and "not built" in status.reason and "pip install" in status.reason


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"info": 3, "parts": {}}', '{"info": {}, "parts": {"cpu": 1}}'])
def test_unreadable_record_counts_as_not_built(tmp_path, text):
    (tmp_path / "lib").mkdir()
    (tmp_path / build_flags.BUILD_RECORD).write_text(text)
    status = library.NativeLibraries(tmp_path).status("cpu")
    assert not status.loaded and "not built" in status.reason


def test_reason_of_the_build_is_passed_on(tmp_path):
    status = fake_package(tmp_path, built=False, reason="no C++ compiler found").status("cpu")
    assert not status.loaded and status.reason.endswith("no C++ compiler found")


def test_missing_file(tmp_path):
    libraries = fake_package(tmp_path)
    (tmp_path / build_flags.CPU_LIBRARY).unlink()
    status = libraries.status("cpu")
    assert not status.loaded and "is missing" in status.reason and "pip install" in status.reason


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file(tmp_path, monkeypatch, kept):
    path = package_copy(tmp_path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * kept)])
    unloaded_operators(monkeypatch)
    status = library.NativeLibraries(tmp_path).status("cpu")
    assert not status.loaded and "bytes where the build wrote" in status.reason


def test_a_truncated_library_of_operators(tmp_path):
    """The CPU library is linked with it: opening either would end the process."""
    shutil.copytree(PACKAGE, tmp_path / "res2net_fused", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "res2net_fused" / built("ops").relative_to(PACKAGE)
    path.write_bytes(path.read_bytes()[:1000])
    code = "import res2net_fused; from res2net_fused._native import library; print(library.cpu_library().reason)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{path} has ") and "bytes where the build wrote" in done.stdout


@pytest.mark.parametrize(
    "tool", [("strip",), ("patchelf", "--set-rpath", "$ORIGIN:/somewhere/that/is/long" * 20)], ids=lambda t: t[0]
)
def test_who_strips_or_relocates_libraries_changes_their_sizes(tmp_path, tool):
    """As images and other packagers do."""
    path = package_copy(tmp_path)
    before = path.stat().st_size
    tools = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    if shutil.which(tool[0], path=tools) is None:
        pytest.skip(f"{tool[0]} is not installed")
    subprocess.run([shutil.which(tool[0], path=tools), *tool[1:], str(path)], check=True)
    assert path.stat().st_size != before
    assert library.NativeLibraries(tmp_path)._unfit("cpu", path) == ""
    path.write_bytes(path.read_bytes()[: before // 2])
    assert "bytes where the build wrote" in library.NativeLibraries(tmp_path)._unfit("cpu", path)


@pytest.mark.parametrize(
    "header", [b"", b"\x7fELF", b"\x7fELF\x02\x01" + b"\xff" * 58, b"\x7fELF\x01\x01" + bytes(58)], ids=len
)
def test_headers_that_are_not_whole(tmp_path, header):
    (tmp_path / "a.so").write_bytes(header)
    assert not library._is_whole(tmp_path / "a.so")


def test_a_package_in_an_archive(tmp_path):
    (tmp_path / "a.whl").touch()
    package = tmp_path / "a.whl" / "res2net_fused"
    reason = library.NativeLibraries(package).status("cpu").reason
    assert reason.startswith(f"{package} lies in an archive") and "unpack it" in reason


def test_file_that_is_no_library(tmp_path, monkeypatch):
    libraries = fake_package(tmp_path)
    unloaded_operators(monkeypatch)
    status = libraries.status("cpu")
    assert not status.loaded and "does not load" in status.reason and "pip install" in status.reason


def test_old_torch():
    """pip leaves one in place where it is told to; it lacks what the package imports."""
    code = (
        "import torch, torch.nn.modules.module as module; torch.__version__ = '2.10.1+cpu'\n"
        "del module._has_any_global_hook, torch.Tag.needs_exact_strides, torch.library.Library\n"
        "import res2net_fused"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    last = done.stderr.strip().rpartition("\n")[2]
    assert last == "ImportError: res2net_fused needs torch 2.11 or later, and torch is 2.10.1+cpu: upgrade torch"


@pytest.mark.parametrize("have, expected", [("12.8", "CUDA 13.0.88"), (None, "no CUDA")])
def test_cuda_library_beside_another_cuda(monkeypatch, have, expected):
    monkeypatch.setattr(torch.version, "cuda", have)
    assert expected in library._unfit_for_cuda("13.0.88")


def test_cuda_library_beside_the_same_major_version(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert library._unfit_for_cuda("13.0.88") == ""


# Once


def test_failure_is_cached(tmp_path):
    libraries = library.NativeLibraries(tmp_path)
    first = libraries.status("cpu")
    fake_package(tmp_path)
    assert libraries.status("cpu") is first


def test_threads_load_once(tmp_path, monkeypatch):
    libraries = fake_package(tmp_path)
    unloaded_operators(monkeypatch)
    calls = []

    def slow_load(path):
        calls.append(path)
        time.sleep(0.05)  # the other threads arrive meanwhile

    monkeypatch.setattr(torch.ops, "load_library", slow_load)
    found = []
    threads = [threading.Thread(target=lambda: found.append(libraries.status("cpu"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls == [str(tmp_path / build_flags.CPU_LIBRARY)]
    assert len(found) == 8 and all(status is found[0] for status in found) and found[0].loaded


# The list of flags


def test_default_architectures_are_those_nvcc_knows():
    assert build_flags.cuda_architectures(None, [80, 86, 90, 100]) == ("80", "90a", "100")
    assert build_flags.cuda_architectures(" ", [70, 80, 86]) == ("80",)


def test_requested_architectures():
    assert build_flags.cuda_architectures("90a; 80,90a", [80, 90]) == ("90a", "80")
    for wrong in ("sm_90", "95", "90b"):
        with pytest.raises(ValueError, match=f"RES2NET_FUSED_CUDA_ARCHS: '{wrong}'.*80, 90"):
            build_flags.cuda_architectures(f"80;{wrong}", [80, 90])


@pytest.mark.parametrize("architectures, built", [(("80", "90a", "100"), True), (("80", "90"), False)])
def test_wgmma_is_compiled_for_hopper_alone(architectures, built, tmp_path):
    facts = build_flags.BuildFacts(cuda_architectures=architectures)
    target = build_flags.cuda_target(ROOT, tmp_path, facts)
    wgmma = [unit for unit in target.units if build_flags.WGMMA_PREFIX in unit.object]
    assert bool(wgmma) == built
    for unit in wgmma:
        assert [flag for flag in unit.flags if "gencode" in flag] == ["-gencode=arch=compute_90a,code=sm_90a"]
    others = [unit for unit in target.units if unit not in wgmma]
    assert all(("-DRES2NET_FUSED_HAVE_WGMMA=1" in unit.flags) == built for unit in others)
    assert all(set(build_flags.gencode_flags(architectures)) <= set(unit.flags) for unit in others)


def test_every_cuda_instance_is_compiled_once_into_an_object_of_its_own(tmp_path):
    facts = build_flags.BuildFacts(cuda_architectures=build_flags.DEFAULT_CUDA_ARCHITECTURES)
    units = build_flags.cuda_target(ROOT, tmp_path, facts).units
    assert len({unit.object for unit in units}) == len(units)
    compiled = {unit.object: flag.partition("=")[2] for unit in units for flag in unit.flags if "FUSED_INSTANCE=" in flag}
    assert tuple(compiled.values()) == launch_plan.INSTANCE_NAMES
    assert all(name in Path(made).parts for made, name in compiled.items())


@pytest.mark.parametrize("version, compressed", [("13.0.88", True), ("12.4.131", False), ("", False)])
def test_device_code_is_compressed_where_nvcc_can(version, compressed, tmp_path):
    target = build_flags.cuda_target(ROOT, tmp_path, build_flags.BuildFacts(cuda_version=version))
    assert all(("-compress-mode=size" in unit.flags) == compressed for unit in target.units)


def test_gencode_embeds_ptx_of_the_newest_plain_architecture():
    flags = build_flags.gencode_flags(("80", "100", "90a"))
    assert flags == (
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=compute_100",
    )


@pytest.mark.parametrize("machine, expected", [("x86_64", ["portable", "avx2", "avx512"]), ("aarch64", ["neon"])])
def test_kernels_compile_once_per_instruction_set(tmp_path, machine, expected):
    kernel = tmp_path / "csrc" / "cpu" / "kernels" / "chain.cpp"
    dispatch = tmp_path / "csrc" / "cpu" / "runtime" / "dispatch.cpp"
    for source in (kernel, dispatch):
        source.parent.mkdir(parents=True)
        source.touch()
    target = build_flags.cpu_target(tmp_path, Path("torch"), machine, build_flags.BuildFacts())
    assert [unit.source for unit in target.units] == [dispatch, *[kernel] * len(expected)]
    for unit, name in zip(target.units[1:], expected, strict=True):
        assert f"-DRES2NET_FUSED_ISA={name}" in unit.flags
        assert ("-mavx512f" in unit.flags) == (name == "avx512") and ("-mavx2" in unit.flags) == (name == "avx2")
    assert len({unit.object for unit in target.units}) == len(target.units)
    have = [flag for flag in target.units[0].flags if flag.startswith("-DRES2NET_FUSED_HAVE_")]
    assert have == [f"-DRES2NET_FUSED_HAVE_{name.upper()}=1" for name in expected]
    assert not [flag for unit in target.units for flag in unit.flags if flag.startswith("-march")]
    assert build_flags.kernel_instruction_sets(tmp_path, machine) == tuple(expected)
