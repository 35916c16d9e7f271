"""The CUDA kernels through nvcc: nothing spilled, no stack, nothing serialized, and as many tensor-core instructions as the
source's loops say. Needs nvcc, no GPU."""

import collections
import re
import subprocess
import zipfile

import pytest
from helpers import find_nvcc, tool
from published import built_before, wheel_in
from tree import ROOT

from res2net_fused._native import build_flags, library
from res2net_fused._tables import format_table
from res2net_fused.backends.cuda import kernel_report, machine_code
from res2net_fused.backends.cuda import plan as launch_plan

SOURCE = ROOT / "csrc" / build_flags.INSTANCE_SOURCE
UNROLL = int(re.search(r"RES2NET_CHAIN_UNROLL (\d+)", (ROOT / "csrc/cuda/plan/instances.h").read_text())[1])
# The others are compiled by the slow tests; d0c7t2 runs every type.
QUICK = [("d2c4t4", "80"), ("d0c7t2", "80"), ("d0c7t2", "100"), ("cluster_c4t2", "90a"), ("wgmma_c7t2", "90a")]
MODEL_SOURCE = (ROOT / "csrc/cuda/plan/time_model.h").read_text()
MODEL = {name: float(value) for name, value in re.findall(r"constexpr double (\w+) = (\d+);", MODEL_SOURCE)}
# The opcode of the tensor-core instruction of each type
PRODUCTS = {"bf16": "HMMA.16816.F32.BF16 ", "fp16": "HMMA.16816.F32 ", "tf32": "HMMA.1688.F32.TF32 "}


def types_of(instance):
    return ["bf16", "fp16"] + ["tf32"] * instance.startswith("d0")


def compile_instance(instance, architecture, folder):
    """(compiled file, the compiler's messages)"""
    binary = folder / f"{instance}_{architecture}.fatbin"
    # The flags of the shipped library, but for what is about linking.
    flags = [f for f in build_flags.NVCC_FLAGS if f not in ("-cudart", "static")]
    target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    flags += [target, "-Xptxas", "-v", f"-I{ROOT / 'csrc'}", build_flags.instance_define(instance)]
    command = [find_nvcc(), *flags, "-fatbin", "-o", str(binary), str(SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return binary, done.stdout + done.stderr


def counted(kernel):
    """Half tile and turn of the main loop as the launch plan counts them."""
    columns, tiles = map(int, re.search(r"c(\d+)t(\d+)", kernel.instance).groups())
    depths = int(kernel.instance[1]) if kernel.instance.startswith("d") else 0
    wgmma, tf32 = kernel.instance.startswith("wgmma"), kernel.dtype == "tf32"
    newer = int(re.findall(r"\d+", kernel.architecture)[0]) >= 100
    kind = "_TF32" + "_100" * newer if tf32 else "_WIDE" if columns > 7 else "_WGMMA" if wgmma else ""
    sure = 2 * max(0, depths - 1)
    per_column = MODEL[f"FINISH_PER_COLUMN{kind}"]
    half_tile = MODEL["FINISH_PER_ROW"] + sure * MODEL["FINISH_PER_COLUMN_SURE"] + (columns - sure) * per_column
    load = "_TF32" if tf32 else "_SWIZZLED" if depths in (1, 2, 4) else ""
    per_slice = tiles * (MODEL[f"TURN_PER_LOAD{load}"] + columns) + -(-columns // 2)
    turn = MODEL["TURN_INSTRUCTIONS_WGMMA"] if wgmma else MODEL["TURN_INSTRUCTIONS"] + UNROLL * per_slice
    turn += MODEL["TURN_MOVES_TF32"] * (tf32 and kernel.instance == "d0c6t2")
    return half_tile, turn


def architectures_of(instance):
    wgmma = instance.startswith(build_flags.WGMMA_PREFIX)
    return [build_flags.WGMMA_ARCHITECTURE] if wgmma else build_flags.DEFAULT_CUDA_ARCHITECTURES


def marked():
    for instance in launch_plan.INSTANCE_NAMES:
        for architecture in architectures_of(instance):
            marks = [] if (instance, architecture) in QUICK else [pytest.mark.slow]
            yield pytest.param(instance, architecture, marks=marks, id=f"{instance}-sm_{architecture}")


@pytest.mark.parametrize("instance, architecture", list(marked()))
def test_instance_compiles_without_spills(instance, architecture, tmp_path):
    cuobjdump = tool(kernel_report.find_cuobjdump(), "cuobjdump", "install triton")
    binary, messages = compile_instance(instance, architecture, tmp_path)
    # wgmma: neither serialized (C7510, C7520) nor with fences that the compiler had to add (C7519)
    assert "serialized" not in messages and "warning" not in messages and "injected" not in messages, messages
    types = types_of(instance)
    assert messages.count("Compiling entry function") == len(types)
    assert messages.count("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads") == len(types), messages
    kernels = kernel_report.compiled_kernels(binary, cuobjdump)
    assert [(k.instance, k.dtype) for k in kernels] == [(instance, dtype) for dtype in types]
    assert all(k.stack == k.local == 0 for k in kernels)
    assert all(k.architecture == f"sm_{architecture}" for k in kernels)

    for kernel in kernels:
        half_tile, turn = counted(kernel)
        if not instance.startswith("cluster"):
            assert kernel.counts.half_tile == pytest.approx(half_tile, rel=0.1)
        assert kernel.counts.turn == pytest.approx(turn, rel=0.1)
        assert kernel.counts.copy == pytest.approx(MODEL["COPY_INSTRUCTIONS"], rel=0.1) and kernel.counts.copy <= 14
        weights = MODEL["WEIGHT_INSTRUCTIONS" + "_PART" * instance.startswith("cluster")] if architecture == "80" else 0
        assert kernel.counts.weights == pytest.approx(weights, rel=0.1)
    functions = {symbol: text for (_, symbol), text in machine_code.functions(binary, cuobjdump).items()}
    columns, tiles = map(int, re.fullmatch(r"(?:d\d+|cluster_|wgmma_)c(\d+)t(\d+)", instance).groups())
    for symbol, text in functions.items():
        _, dtype = kernel_report.instance_of(symbol)
        assert ("UBLKCP" in text) == ("ACQBULK" in text) == ("PREEXIT" in text) == (architecture != "80")
        assert not re.search(r"\b(STL|LDL)\b", text)
        if instance.startswith("wgmma"):
            product = f"HGMMA.64x{8 * columns}x16.F32{'.BF16' * (dtype == 'bf16')} "
            assert text.count(product) == text.count("HGMMA") == UNROLL * tiles
            # One wait for all but the last products, one for all of a pass.
            assert text.count("WARPGROUP.ARRIVE") == 1 and text.count("WARPGROUP.DEPBAR") == 2
            assert not re.search(r"\bHMMA|\bLDSM", text)
            continue
        assert text.count(PRODUCTS[dtype]) == text.count("HMMA") == UNROLL * columns * tiles
        assert text.count("LDSM.16.M88.4") == UNROLL * (tiles + columns // 2)
        assert text.count("LDSM.16.M88.2") == UNROLL * (columns % 2)
        clusters = instance.startswith("cluster") and architecture != "80"
        # One barrier of the cluster, with its fence of the whole GPU, before anything is sent; what is sent is counted.
        assert text.count("UCGABAR_ARV") == text.count("UCGABAR_WAIT") == text.count("MEMBAR.ALL.GPU") == clusters
        assert ("STAS.128" in text) == clusters
        assert ("BPT.TRAP" in text) == (instance.startswith("cluster") and not clusters)
    assert len(functions) == len(types)


@pytest.mark.parametrize("version, traps", [(80, True), (90, False)])
def test_code_without_clusters_traps_where_it_would_need_them(version, traps, tmp_path):
    """The driver of a newer device compiles it from PTX: there a missing barrier would give wrong numbers in silence."""
    text = tmp_path / "cluster.ptx"
    flags = ["-std=c++20", "-O3", f"-arch=compute_{version}", f"-I{ROOT / 'csrc'}"]
    flags.append(build_flags.instance_define("cluster_c2t2"))
    subprocess.run([find_nvcc(), *flags, "-ptx", "-o", str(text), str(SOURCE)], check=True)
    kernels = text.read_text().split(".entry")[1:]
    assert len(kernels) == 2
    for kernel in kernels:
        assert ("trap;" in kernel) == traps and ("barrier.cluster" in kernel) != traps


@pytest.mark.parametrize("architectures, ptx", [("80", 90), ("86", 90), ("90a", 90), ("80;90a", 90), ("80;90a;100", 100)])
def test_ptx_for_devices_to_come_has_clusters(architectures, ptx):
    flags = build_flags.gencode_flags(architectures.split(";"))
    assert [flag for flag in flags if "code=compute" in flag] == [f"-gencode=arch=compute_{ptx},code=compute_{ptx}"]


def test_the_table_lists_every_instance_of_the_built_library(monkeypatch):
    # Machine code is looked into above; of a whole library that takes half a minute.
    monkeypatch.setattr(machine_code, "functions", lambda *_: collections.defaultdict(str))
    tool(kernel_report.find_cuobjdump(), "cuobjdump", "install triton")
    record = library.NativeLibraries(library.PACKAGE).record()["parts"].get("cuda", {})
    if not record.get("built"):
        pytest.skip(f"the CUDA library is not built: {record.get('reason')}")
    head, *rows = kernel_report.kernel_table()
    architectures = {row[0] for row in rows}
    built = [(i, a) for i in launch_plan.INSTANCE_NAMES for a in architectures_of(i) if f"sm_{a}" in architectures]
    kernels = {(f"sm_{architecture}", instance, dtype) for instance, architecture in built for dtype in types_of(instance)}
    assert {row[:3] for row in rows} == kernels and len(rows) == len(kernels)
    assert all(16 < int(row[3]) <= 255 and set(row[6:10]) == {"0"} for row in rows)
    assert "26: " in next(row[10] for row in rows if row[1] == "d2c4t4")
    assert "26: " in next(row[10] for row in rows if row[1:3] == ("d0c4t2", "tf32"))
    assert len(format_table(head, rows).splitlines()) == len(rows) + 2


def test_the_published_wheel_has_every_instance(monkeypatch, tmp_path):
    """For every architecture, and as PTX for those to come."""
    monkeypatch.setattr(machine_code, "functions", lambda *_: collections.defaultdict(str))  # as above
    cuobjdump = tool(kernel_report.find_cuobjdump(), "cuobjdump", "install triton")
    folder = built_before("manylinux_2_28_x86_64")
    if folder is None:
        pytest.skip("dist/ has no wheel of this commit: `make wheels` builds it")
    with zipfile.ZipFile(wheel_in(folder, "manylinux_2_28_x86_64")) as archive:
        if f"res2net_fused/{build_flags.CUDA_LIBRARY}" not in archive.namelist():
            pytest.skip("dist/ has a wheel without the CUDA library: `make wheels` found no nvcc")
        file = archive.extract(f"res2net_fused/{build_flags.CUDA_LIBRARY}", tmp_path)
    names = launch_plan.INSTANCE_NAMES
    expected = [(f"sm_{a}", i, dtype) for i in names for a in architectures_of(i) for dtype in types_of(i)]
    found = [(k.architecture, k.instance, k.dtype) for k in kernel_report.compiled_kernels(file, cuobjdump)]
    assert sorted(found) == sorted(expected)
    listed = subprocess.run([cuobjdump, "--list-ptx", file], capture_output=True, text=True, check=True).stdout
    newest = build_flags.DEFAULT_CUDA_ARCHITECTURES[-1]
    everywhere = [i for i in names if newest in architectures_of(i)]
    assert re.findall(r"\.(sm_\w+)\.ptx", listed) == [f"sm_{newest}"] * (len(everywhere) + 1), "and device.cu"
