"""The commands of the GPU program on stand-in cards, from their command lines to the files that they leave."""

import json
import re
import subprocess
import sys

import card
import numpy
import pytest
from PIL import Image
from tree import ROOT

from res2net_fused.bench import results

RF = "-m", "res2net_fused"
RECORD = (str(ROOT / "benchmarks" / "record"),)
# Work of one image on small maps, in the launches of 32 images on the true ones.
CUT = {"batch": 32}
on_cards = pytest.mark.parametrize("name", ["H100", "RTX4090"])
# The other one in `make test-full`: six minutes of two cores are what continuous integration has for rehearsals.
on_h100 = pytest.mark.parametrize("name", ["H100", pytest.param("RTX4090", marks=pytest.mark.slow)])
on_rtx4090 = pytest.mark.parametrize("name", ["RTX4090", pytest.param("H100", marks=pytest.mark.slow)])


def run(name, *arguments, faults=(), expected=0, timeout=600, **settings):
    """A command on two stand-in cards, its work cut; its output."""
    env = card.environment(card.Settings(name, count=2, **CUT | settings), json.dumps(faults))
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == expected, f"exit status {done.returncode}\n{done.stdout[-5000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def opened(folder, stem="bench-cuda"):
    """The rows of a result file, whose plot shows something in every panel."""
    data = results.read(folder / f"{stem}.json")
    picture = numpy.asarray(Image.open(folder / f"{stem}.png").convert("L"))
    assert picture.shape[0] > 200 and picture.std() > 5
    return data


@on_cards
def test_rehearsed_info_names_the_card_and_what_can_run(name):
    text = run(name, *RF, "info", "--device", "cuda:1")
    assert card.CARDS[name].name in text
    backends = dict(line.split(maxsplit=1) for line in text.split("backends for cuda:1:")[1].splitlines()[1:5])
    assert all(backends[backend] == "can run" for backend in ("cuda", "triton", "reference")), backends


@on_rtx4090
def test_rehearsed_check_is_green(name):
    text = run(name, *RF, "check", "--quick", "--configs", "26w4s", "--device", "cuda:1", "--dtype", "bfloat16,tf32")
    assert " 0 misses" in text and "triton" in text and "MISS" not in text


CHECK_FAULTS = [
    {"kind": "hang", "backend": "triton", "call": "forward", "width": 52, "height": 12},
    {"kind": "kill", "backend": "triton", "call": "forward", "width": 104, "height": 9},
    {"kind": "triton_cuda_error", "backend": "cuda", "call": "forward", "width": 208, "height": 7},
]


def test_rehearsed_check_goes_on_behind_every_fault():
    """Each costs its own row: what was compared before it and what comes behind it is in the one table."""
    arguments = ["check", "--quick", "--configs", "26w4s", "--dtype", "bfloat16", "--no-network", "--limit", "15"]
    text = run("H100", *RF, *arguments, faults=CHECK_FAULTS, expected=1)
    rows = [line.split() for line in text.splitlines() if re.match(r"(chain|block) +26w4s ", line)]
    rows = {(workload, f"{stage} {variant}", backend): rest[-1] for workload, _, stage, variant, backend, *rest in rows}
    backends = {backend for *_, backend in rows}
    assert backends == {"reference", "triton", "cuda"}
    places = [(workload, f"{stage} {variant}") for workload in ("chain", "block") for stage in "1234"
              for variant in ("normal", "stage")]  # fmt: skip
    failed = {
        ("chain", "2 normal", "triton"): r"hung for \d+ s; its process was killed",
        ("chain", "3 normal", "triton"): r"its process was killed by signal 9 \(SIGKILL\)",
        ("chain", "4 normal", "cuda"): r"RuntimeError: .*Triton Error \[CUDA\]: an illegal memory access",
    }
    assert {key for key, outcome in rows.items() if outcome == "FAILED"} == set(failed), text
    assert set(rows) == {(*place, backend) for place in places for backend in backends}, text
    for (workload, stage, backend), words in failed.items():
        assert re.search(rf"^failed, {workload} 26w4s stage {stage} bfloat16, backend {backend}: {words}", text, re.M), text
    assert f"{len(rows)} comparisons, 3 misses" in text and "ended before" not in text


# Benchmarks -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # the default parts below hold all of it
@on_rtx4090
def test_rehearsed_quick_bench_writes_all_its_rows(name, tmp_path):
    text = run(name, *RF, "bench", "--quick", "--batch", "1", "--out", tmp_path, "--device", "cuda:1", "--configs", "26w4s",
               "--no-network")  # fmt: skip
    data = opened(tmp_path)
    assert not data["environment"]["failures"], text
    assert data["environment"]["device"] == card.CARDS[name].name
    rows = data["rows"]
    assert {row["workload"] for row in rows} == {"chain", "block"}
    assert {row["device"] for row in rows} == {"cuda:1"}
    for workload in ("chain", "block"):
        for stage in (1, 2, 3, 4):
            found = {(r["provider"], r["graph"]) for r in rows if (r["workload"], r["stage"]) == (workload, stage)}
            assert {("ours", False), ("ours_graph", True), ("eager_channels_last", True)} <= found, found
    assert "speed-up" in text and "ours" in text


@on_h100
def test_rehearsed_bench_runs_all_its_default_parts(name, tmp_path):
    """At a batch of 1, planned as one of 32: chains, blocks, their training, networks, peers that compile."""
    networks = ("res2net50_26w4s", "resnet50")[: 1 if name == "H100" else 2]  # one is enough in the default run
    arguments = ["bench", "--batch", "1", "--out", tmp_path, "--configs", "26w4s", "--model", ",".join(networks)]
    text = run(name, *RF, *arguments)
    data = opened(tmp_path)
    assert not data["environment"]["failures"], text
    kinds = {(row["workload"], row["provider"]) for row in data["rows"]}
    assert {("chain", "ours_graph"), ("block", "compile"), ("train_chain", "ours"), ("train_block", "eager"),
            ("network", "ours_graph"), ("network", "eager_channels_last")} <= kinds  # fmt: skip
    assert {row["config"] for row in data["rows"] if row["workload"] == "network"} == {*networks}
    assert "Triton" in text or "triton" in text


FAULTS = [
    {"kind": "compile_error", "backend": "triton", "call": "forward", "width": 26},
    {"kind": "out_of_resources", "backend": "triton", "call": "forward", "width": 52},
    {"kind": "out_of_memory", "backend": "triton", "call": "forward", "width": 104},
    {"kind": "cuda_error", "backend": "triton", "call": "forward", "width": 208},
    {"kind": "triton_cuda_error", "backend": "triton", "call": "block_forward", "width": 26},
    {"kind": "wrong", "backend": "triton", "call": "block_forward", "width": 52},
    {"kind": "hang", "backend": "triton", "call": "block_forward", "width": 104},
    {"kind": "kill", "backend": "triton", "call": "block_forward", "width": 208},
]  # fmt: skip
# What the record says of each, by workload and stage.
SAID = {
    ("chain", 1): "compil", ("chain", 2): "tile", ("chain", 3): "memory", ("chain", 4): "illegal memory access",
    ("block", 1): "Triton Error", ("block", 2): "differs from float64", ("block", 3): "hung", ("block", 4): "signal 9",
}  # fmt: skip


def check_faults(environment, rows, ours, told):
    """Every fault stands in the file with its contender, and everything else is measured."""
    failures = environment["failures"]
    for (workload, stage), words in SAID.items():
        mine = {name: why for name, why in failures.items() if name.startswith(f"{workload} 26w4s stage {stage} batch")}
        assert mine, (workload, stage, failures)
        assert any(words.lower() in why.lower() for why in mine.values()), (words, mine)
        timed = {row["provider"] for row in rows if (row["workload"], row["stage"]) == (workload, stage)}
        assert "eager" in timed and "eager_channels_last" in timed, (workload, stage, timed)
        assert not timed & ours, (workload, stage, timed)
    assert told


@pytest.mark.slow  # minutes; the same faults without a card: tests/benchmarks/test_record_faults.py
def test_rehearsed_bench_survives_every_fault(tmp_path):
    arguments = ["bench", "--batch", "1", "--quick", "--no-network", "--configs", "26w4s", "--out", tmp_path, "--limit", "30"]
    options = {"faults": FAULTS, "expected": 1, "cuda_library": False, "timeout": 900}
    text = run("H100", *RF, *arguments, **options)
    data = results.read(tmp_path / "bench-cuda.json")
    check_faults(data["environment"], data["rows"], {"ours", "ours_graph"}, "failed" in text)
    before = data["rows"]
    text = run("H100", *RF, *arguments, **options)  # goes on behind the faults: nothing is left
    assert results.read(tmp_path / "bench-cuda.json")["rows"] == before


@pytest.mark.slow
def test_rehearsed_record_survives_every_fault(tmp_path):
    """Triton by its name and ours through it fail where a fault is planted; the cuda backend is timed all the same."""
    path = tmp_path / "record.json"
    arguments = ["--no-build", "--out", path, "--part", "chain", "--part", "block", "--configs", "26w4s", "--batch", "1",
                 "--dtype", "bfloat16", "--commit", "rehearsed", "--limit", "30", "--minutes", "30"]  # fmt: skip
    text = run("H100", *RECORD, *arguments, faults=FAULTS, expected=1, timeout=1500)
    data = results.read(path)
    check_faults(data["environment"], data["rows"], {"triton"}, "FAILED" in text)
    assert {row["provider"] for row in data["rows"]} >= {"cuda", "eager", "compile"}


@pytest.mark.slow
def test_rehearsed_empty_graphs_are_failures(tmp_path):
    arguments = ["bench", "--batch", "1", "--quick", "--no-network", "--configs", "14w8s", "--out", tmp_path]
    run("H100", *RF, *arguments, faults=[{"kind": "empty_graph"}], expected=1)
    data = results.read(tmp_path / "bench-cuda.json")
    assert data["rows"] and not any(row["graph"] for row in data["rows"])
    assert any("CUDA graph" in name for name in data["environment"]["failures"])


# The record and the tiles ---------------------------------------------------------------------------------------------


@on_h100
def test_rehearsed_record_goes_on_where_it_stopped(name, tmp_path):
    path = tmp_path / "record.json"
    arguments = ["--quick", "--no-build", "--out", path, "--commit", "rehearsed", "--device", "cuda:1"]
    text = run(name, *RECORD, *arguments)
    data = results.read(path)
    assert not data["environment"]["failures"], text
    assert {row["workload"] for row in data["rows"]} == set(results.WORKLOADS)
    assert "Not measured yet" not in text
    again = run(name, *RECORD, *arguments)
    assert results.read(path)["rows"] == data["rows"] and "0 cases to go" in again


@on_rtx4090
def test_rehearsed_tuning_writes_a_table_that_is_used(name, tmp_path):
    table = tmp_path / "tiles.json"
    text = run(name, *RF, "tune", "--configs", "26w4s", "--batch", "1", "--minutes", "1", "--out", table)
    rows = json.loads(table.read_text())["tiles"]
    assert rows and all(row["capability"] == "{}.{}".format(*card.CARDS[name].capability) for row in rows), text


def _of_tile(kind, stage, block_m, block_n, block_k, warps, stages, **constants):
    """A fault of one tile, and how the record names it."""
    constants |= {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
    fault = {"kind": kind, "stage": stage, "constants": constants, "warps": warps, "stages": stages}
    return fault, f"{block_m}x{block_n}x{block_k}, {warps} warps, {stages} stages"


TILE_FAULTS = {  # by what is said; all in the first block and at the start of the second
    "CompilationError": _of_tile("compile_error", "compile", 16, 16, 16, 1, 3, IN_CHANNELS=256, OUT_CHANNELS=128),
    "out of resource": _of_tile("out_of_resources", "launch", 16, 16, 32, 1, 2, IN_CHANNELS=256, OUT_CHANNELS=128),
    "Triton Error": _of_tile("triton_cuda_error", "launch", 32, 32, 32, 4, 4, CHANNELS=26),
    "hung": _of_tile("hang", "launch", 64, 16, 32, 4, 4, CHANNELS=26),
    "signal 9": _of_tile("kill", "launch", 16, 16, 16, 1, 3, IN_CHANNELS=128, OUT_CHANNELS=256),
    "(SIGKILL)": _of_tile("kill", "compile", 16, 16, 16, 1, 3, IN_CHANNELS=64, OUT_CHANNELS=128),
}


@pytest.mark.slow  # a minute; the same faults without a card: tests/bench/test_tune.py
def test_rehearsed_tuning_goes_on_behind_every_fault(tmp_path):
    table = tmp_path / "tiles.json"
    arguments = ["tune", "--configs", "26w4s", "--batch", "1", "--minutes", "4", "--limit", "10", "--out", table]
    text = run("H100", *RF, *arguments, faults=[fault for fault, _ in TILE_FAULTS.values()], expected=1)
    assert "20 of 20 shapes are in" in text
    environment = results.read(tmp_path / "tiles.tuning.json")["environment"]
    said = environment["failures"] | environment["absent"]
    for words, (_, name) in TILE_FAULTS.items():
        assert any(tile.endswith(f": {name}") and words in why for tile, why in said.items()), (words, said)


CALL_FAULTS = [
    {"kind": "hang", "backend": "cuda", "call": "block_forward", "width": 52, "height": 4},
    {"kind": "kill", "backend": "triton", "call": "block_forward", "width": 104, "height": 2},
    {"kind": "triton_cuda_error", "backend": "triton", "call": "block_forward", "width": 208, "height": 1},
]


@pytest.mark.slow  # minutes
def test_rehearsed_tuning_of_a_model_goes_on_behind_every_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("RES2NET_FUSED_CHOICES", str(tmp_path / "choices.json"))
    arguments = ["tune", "--model", "res2net50_26w4s", "--size", "32", "--batch", "1", "--minutes", "5", "--limit", "25"]
    text = run("H100", *RF, *arguments, faults=CALL_FAULTS, expected=1)
    left_out = {"4x52, 4, 4": "hung for", "4x104, 2, 2": "signal 9", "4x208, 1, 1": "illegal memory", "the whole model": "hung"}
    for what, words in left_out.items():
        assert any(what in line and words in line for line in text.splitlines()), (what, text)
    assert len(json.loads((tmp_path / "choices.json").read_text())["choices"]) == 8 - 3


# What people do -------------------------------------------------------------------------------------------------------

SCRIPT = """
import torch, res2net_fused as rf
from res2net_fused.bench.networks import random_network
model = rf.accelerate(random_network("res2net50_26w4s", (1, 1, 1, 1))).cuda().eval()
images = torch.randn(2, 3, 64, 64, device="cuda")
with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
    print(rf.explain(model, images))
rf.freeze(model)
static, graph = images.clone(), torch.cuda.CUDAGraph()
with torch.inference_mode():
    model(static)
    with torch.cuda.graph(graph):
        out = model(static)
    static.copy_(images.flip(0))
    graph.replay()
    torch.testing.assert_close(out, model(images.flip(0)))
    torch.testing.assert_close(torch.nn.DataParallel(model, [0, 1])(images), model(images))
print("done")
"""


@on_cards
def test_rehearsed_explain_autocast_freeze_capture_and_two_cards(name):
    text = run(name, "-c", SCRIPT)
    assert "4 of 4 blocks fused" in text and "experimental" in text and text.rstrip().endswith("done")


def test_rehearsed_kernels_compute_through_their_launches(tmp_path):
    """Nobody overwrites what the kernels give: Triton's in the interpreter, the CUDA kernel's in the emulator."""
    code = """
import torch
from res2net_fused import hierarchical_conv2d
generator = torch.Generator().manual_seed(0)
for backend, dtype, bound in (("triton", torch.float32, 1e-5), ("cuda", torch.bfloat16, 1.5e-2)):
    x = torch.randn(2, 104, 7, 9, generator=generator).to("cuda", dtype).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(26, 26, 3, 3, generator=generator).to("cuda", dtype) / 15 for _ in range(3)]
    torch.backends.cudnn.allow_tf32 = False
    out = hierarchical_conv2d(x, weights, backend=backend).double()
    expected = hierarchical_conv2d(x.double(), [w.double() for w in weights], backend="reference")
    error = float((out - expected).norm() / expected.norm())
    assert 0 < error < bound, (backend, error)
"""
    run("H100", "-c", code, launch="interpreter")
