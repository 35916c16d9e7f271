"""The record of a GPU: its file, and the machinery that checks and times, on the CPU, with faults planted in the middle."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from record_cases import ROOT, conditions, environment, row, script

from res2net_fused.bench import (
    contestants,
    contests,
    jax_cases,
    measure,
    record_file,
    results,
    schedule,
    supervise,
    training,
    turns,
)
from res2net_fused.bench.schedule import Unit
from res2net_fused.bench.workloads import TRAINED, Config

# The file -------------------------------------------------------------------------------------------------------------


def test_later_calls_add_to_a_record(tmp_path):
    path = tmp_path / "device" / "record.json"
    first = record_file.Record(path, environment(command="one"))
    first.begin_run()
    assert first.run == 1
    first.add([row(), row(provider="compile")], {"chain x, jax": "not installed"})
    first.close()
    second = record_file.Record(path, environment(command="two"))
    second.begin_run()
    assert second.run == 2
    second.add([row(median_ms=3.0, run=2), row(graph=False)], {})
    data = results.read(path)
    assert [(r["provider"], r["graph"], r["median_ms"]) for r in data["rows"]] == [
        ("ours_graph", True, 3.0), ("compile", True, 1.0), ("ours_graph", False, 1.0),
    ]  # fmt: skip
    assert data["environment"]["command"] == "one; two"
    assert data["environment"]["failures"] == {"chain x, jax": "not installed"}
    second.close()
    assert record_file.Record(path, environment(), again=True).rows == []
    assert [p.name for p in path.parent.iterdir() if "running" not in p.name] == ["record.json.before"]
    assert results.read(path.with_name("record.json.before")) == data


@pytest.mark.parametrize("change", [{"commit": "other"}, {"torch": "0"}, {"device": "x"}, {"native": {}}, {"threads": -1}])
def test_other_environments_are_refused(tmp_path, change):
    path = tmp_path / "record.json"
    old = record_file.Record(path, environment())
    old.save()
    old.close()
    with pytest.raises(ValueError, match=rf"{next(iter(change))} is .*--out"):
        record_file.Record(path, environment(**change))


def test_what_is_missing(tmp_path):
    unit = schedule.schedule("cuda")[0]
    record = record_file.Record(tmp_path / "record.json", environment())
    keys = unit.keys("cuda")
    assert record.missing(keys, unit) == keys
    record._rows = {key: {} for key in keys[1:]}
    assert record.missing(keys, unit) == keys[:1]
    for reasons in (record.failures, record.absent):
        reasons[record_file.failure_name(unit, *unit.contestants[0])] = "why"
        assert record.missing(keys, unit) == []
        record.retry()
        assert record.missing(keys, unit) == keys[:1]


def test_folder_names():
    assert record_file.folder_name("NVIDIA H200") == "nvidia-h200"
    assert record_file.folder_name("AMD EPYC (AVX512)") == "amd-epyc-avx512"


# Building -------------------------------------------------------------------------------------------------------------


def test_architectures():
    build = script("native_build")
    assert [build.architecture(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0))] == ["80", "89", "90a", "100"]


def test_direct_compiling(tmp_path):
    build, flags = script("native_build"), pytest.importorskip("res2net_fused.build_flags")
    compiler = next((c for c in ("c++", "g++", "clang++") if build.shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C++ compiler")
    source = tmp_path / "a.cpp"
    unit = flags.Unit(source, "obj/a.o", ("-fPIC",))
    target = flags.Target("a", "liba.so", "cxx", (unit,), ("-shared",))
    source.write_text('extern "C" int seven() { return 7; }')
    assert build.compile_target(target, [compiler], tmp_path / "build", tmp_path / "out" / "liba.so") == ""
    import ctypes

    assert ctypes.CDLL(str(tmp_path / "out" / "liba.so")).seven() == 7
    source.write_text("int seven( { return 7; }")
    assert "error" in build.compile_target(target, [compiler], tmp_path / "build", tmp_path / "out" / "liba.so")
    assert not (tmp_path / "out" / "liba.so").exists()


# Checking and timing on the CPU ---------------------------------------------------------------------------------------


@pytest.fixture
def timed(monkeypatch):
    """What was timed, by the names of the contestants; each once."""
    found = []

    def once(contenders, device, **_):
        found.append({key[-1][0] for key in contenders})
        return measure.measure(contenders, device, seconds=0, min_repeats=1, warm_up=0)

    monkeypatch.setattr(turns, "measure", once)
    return found


@pytest.fixture
def record(tmp_path):
    record = record_file.Record(tmp_path / "record.json", environment())
    record.begin_run()
    yield record
    record.close()


def run_child(path, *arguments):
    """The process that measures, in this one."""
    child = ["--device", "cpu", "--commit", "test", "--out", str(path), "--child", str(time.time())]
    return script("record").main(["--quick", *arguments, *child])


def quick_unit(workload):
    return next(u for u in schedule.schedule("cpu", quick=True) if u.workload == workload)


def test_chains_and_blocks_on_the_cpu(tmp_path, capsys, timed):
    path = tmp_path / "record.json"
    assert run_child(path, "--part", "chain", "--part", "block") == 0
    data = results.read(path)
    assert {(r["workload"], r["stage"], r["variant"], r["provider"]) for r in data["rows"]} == {
        (*case, provider)
        for case in (("chain", 3, "normal"), ("chain", 4, "normal"), ("block", 4, "normal"), ("block", 4, "stage"))
        for provider in ("ours", "eager_channels_last")
    }
    for r in data["rows"]:
        assert r["roofline_share"] == pytest.approx(r["floor_ms"] / r["median_ms"]) and r["run"] == 1
        assert ("backend" in r) == (r["provider"] == "ours") and 0 < r["error"] < 5e-6
    assert data["environment"]["runs"][0]["copy_gb_s"] >= 0
    assert len(timed) == 4
    assert run_child(path, "--part", "chain") == 0
    assert len(timed) == 4 and len(results.read(path)["environment"]["runs"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("workload", ["network", pytest.param("train_step", marks=pytest.mark.slow)])
def test_networks_on_the_cpu(timed, record, workload):
    outcome = contests.Contests(conditions(), record).time(quick_unit(workload))
    assert not outcome.failures
    found = {(r["config"], r["provider"]): r for r in outcome.rows}
    assert set(found) == {
        ("res2net50_26w4s", "ours"), ("res2net50_26w4s", "eager_channels_last"), ("resnet50", "eager_channels_last"),
    }  # fmt: skip
    yardstick = found["resnet50", "eager_channels_last"]["median_ms"]
    ours = found["res2net50_26w4s", "ours"]
    assert ours["yardstick_ms"] == yardstick
    assert ("floor_ms" in ours) == ("frozen" in ours) == (workload == "network")


def test_training_steps_train():
    unit = quick_unit("train_step")
    network = contestants.build_network(unit.config, "float32", conditions())
    step = contestants.training_builders(network, unit, conditions())("ours", False).call
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        losses = [float(step(x)) for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("workload", TRAINED)
def test_chains_and_blocks_in_training(timed, record, workload):
    outcome = contests.Contests(conditions(), record).time(quick_unit(workload))
    assert not outcome.failures
    assert [r["provider"] for r in outcome.rows] == ["ours", "eager_channels_last"]


def test_without_rates_there_is_no_floor(timed, record):
    outcome = contests.Contests(conditions(rates=None), record).time(quick_unit("chain"))
    assert len(outcome.rows) == 2 and not any("floor_ms" in r for r in outcome.rows)


def test_what_cannot_run_here_is_no_failure(timed, record):
    contestants = (("ours", False), ("cuda", False), ("tensorrt", True))
    unit = Unit("chain", Config(26, 4), 4, "normal", 1, "float32", contestants)
    outcome = contests.Contests(conditions(), record).time(unit)
    assert [r["provider"] for r in outcome.rows] == ["ours"]
    assert not outcome.failures and [name.split(", ")[1][:8] for name in outcome.absent] == ["cuda", "tensorrt"]


# What is wrong is not timed -------------------------------------------------------------------------------------------


def wrong(monkeypatch, backend, factor=1.001):
    """What a backend of ours computes is off by a thousandth."""
    right = contestants.fused

    def planted(module, name):
        model = right(module, name)
        return model if name != backend else lambda x: model(x) * factor

    monkeypatch.setattr(contestants, "fused", planted)


BACKENDS = Unit("chain", Config(26, 4), 4, "normal", 1, "float32", tuple((n, False) for n in ("ours", "reference", "cpu")))


def test_a_miss_bars_its_backend_alone(timed, record, monkeypatch):
    wrong(monkeypatch, "cpu")
    outcome = contests.Contests(conditions(), record).time(BACKENDS)
    assert timed == [{"reference"}]  # auto takes cpu
    assert set(outcome.failures) == {f"{BACKENDS}, ours", f"{BACKENDS}, cpu"} == set(record.failures)
    assert "relative error is 0.001; at most 5e-06" in outcome.failures[f"{BACKENDS}, cpu"]


def test_a_backend_by_name_leaves_the_others_checked(timed, record, monkeypatch):
    wrong(monkeypatch, "cpu")
    outcome = contests.Contests(conditions(backend="reference"), record).time(BACKENDS)
    assert timed == [{"ours", "reference"}] and set(outcome.failures) == {f"{BACKENDS}, cpu"}


def test_a_peer_has_to_compute_the_same(timed, record, monkeypatch):
    provider = contests.PROVIDERS["eager_channels_last"]
    planted = replace(provider, build=lambda module, _: lambda x: module(x) * 1.001)
    monkeypatch.setitem(contests.PROVIDERS, "eager_channels_last", planted)
    outcome = contests.Contests(conditions(), record).time(quick_unit("chain"))
    assert timed == [{"ours"}] and len(outcome.failures) == 1


class Replay(measure.Contender):
    """A graph that holds nothing, or whose only result is that of its capture."""

    outputs_of: str

    def __init__(self, model, inputs, min_calls=1):
        super().__init__(model, inputs)
        self._kept = super().outputs()

    def run(self):
        return None

    def outputs(self):
        return [torch.full_like(out, float("nan")) for out in self._kept] if self.outputs_of == "nobody" else self._kept


@pytest.mark.parametrize("outputs_of", ["nobody", "the capture"])
def test_an_empty_graph_is_no_result(timed, record, monkeypatch, outputs_of):
    monkeypatch.setattr(Replay, "outputs_of", outputs_of, raising=False)
    monkeypatch.setattr(contests, "GraphedContender", Replay)
    unit = replace(quick_unit("chain"), contestants=(("ours", True), ("ours", False)))
    outcome = contests.Contests(conditions(), record).time(unit)
    assert [r["graph"] for r in outcome.rows] == [False]
    assert "wrong 3 normal" in outcome.failures[f"{unit}, ours in a CUDA graph"]


@pytest.mark.parametrize("image", [0, 21, 39])
def test_all_images_of_a_batch_are_looked_at(timed, record, monkeypatch, image):
    """A batch as it is timed; one image that nobody wrote."""
    right = contestants.fused

    def planted(module, name):
        model, seen = right(module, name), []

        def call(x):
            seen.append(len(x))
            assert set(seen) == {40}
            out = model(x).clone()
            out[image, 5, 0, 0] = float("nan")
            return out

        return call

    monkeypatch.setattr(contestants, "fused", planted)
    outcome = contests.Contests(conditions(), record).time(replace(quick_unit("chain"), stage=4, batch=40))
    assert timed == [{"eager_channels_last"}] and "wrong" in next(iter(outcome.failures.values()))


def test_a_wrong_compiled_network_is_noticed(timed, record, monkeypatch):
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network, **_: lambda x: network(x) * 1.001)
    timer = contests.Contests(conditions(), record)
    monkeypatch.setattr(timer, "_compiles", lambda unit: True)
    outcome = timer.time(quick_unit("network"))
    assert compiled is not torch.compile and timed == [{"eager_channels_last"}]
    assert "wrong logits" in outcome.failures[f"{quick_unit('network')}, ours"]


def test_a_network_whose_blocks_are_not_fused_is_not_timed(timed, record, monkeypatch):
    monkeypatch.setattr(contestants, "accelerate", lambda network, _: network)
    outcome = contests.Contests(conditions(), record).time(quick_unit("network"))
    assert timed == [{"eager_channels_last"}] and "fused" in next(iter(outcome.failures.values()))


def test_training_is_checked_at_its_own_batch(timed, record, monkeypatch):
    """The second weight's gradient is off by a thousandth where the batch is the one that is timed."""
    own, seen = training.TrainingStep.gradients, set()

    def planted(step, x, grad=None):
        out, *gradients = own(step, x, grad)
        if step.forward.backend is not None and len(x) == 6:
            gradients[2] *= 1.001
        seen.add(len(x))
        return out, *gradients

    monkeypatch.setattr(training.TrainingStep, "gradients", planted)
    unit = replace(quick_unit("train_chain"), batch=6)
    outcome = contests.Contests(conditions(), record).time(unit)
    assert timed == [{"eager_channels_last"}] and "wrong 4 normal, gradients" in outcome.failures[f"{unit}, ours"]
    assert seen == {3, 6}  # float64 and eager's error are taken of the different ones


def test_copies_of_images_train_as_a_whole_batch():
    """What the checks rest on: float64 of the few images is float64 of the batch."""
    case = replace(contestants.case_of(quick_unit("train_chain"), conditions()), batch=8)
    (x,) = training.plain(case).inputs()
    copies = training.Copies(x, 8)
    assert copies.count == 2 and not torch.equal(copies.index, torch.arange(8) % 4)
    exact = training.training_module(case, "eager_channels_last", "").double()
    few, grad = copies.few.double(), torch.randn(exact(copies.few.double()).shape, dtype=torch.float64)
    step = training.TrainingStep(exact, "float32")
    out, of_x, *gradients = step.gradients(few, grad)
    whole, of_whole, *of_parameters = step.gradients(copies.spread(few), copies.spread(grad))
    assert copies.error(whole, out) < 1e-13 and copies.error(of_whole, of_x) < 1e-12
    for a, b in zip(of_parameters, gradients, strict=True):
        torch.testing.assert_close(a, 2 * b)
    assert torch.equal(copies.first(whole), whole[[int((copies.index == i).nonzero()[0]) for i in range(4)]])


def test_a_wrong_training_step_is_not_timed_under_its_own_name(timed, record, monkeypatch):
    """`cpu` asked for by name, where `ours` is right: its step does not move one layer's parameters."""
    right = contestants.training_network

    def planted(network, name, backend):
        model = right(network, name, backend)
        if name == "cpu":
            model.get_parameter("layer1.0.conv1.weight").register_hook(lambda grad: 3 * grad)
        return model

    monkeypatch.setattr(contestants, "training_network", planted)
    unit = replace(quick_unit("train_step"), contestants=(("ours", False), ("cpu", False)))
    outcome = contests.Contests(conditions(), record).time(unit)
    assert [r["provider"] for r in outcome.rows if r["config"] != "resnet50"] == ["ours"]
    assert "wrong gradients" in outcome.failures[f"{unit}, cpu"]


# Faults ---------------------------------------------------------------------------------------------------------------

FAULTS = {
    "compile error": RuntimeError("at 10:4: expected a power of two"),
    "memory": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    "CUDA": RuntimeError("CUDA error: an illegal memory access was encountered"),
    "Triton": RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
}


def plant(monkeypatch, error, after):
    """Ours of the first unit raises at this call."""
    right = contestants.fused

    def planted(module, name):
        model, calls = right(module, name), []

        def call(x):
            calls.append(x)
            if len(calls) == after and x.shape[-1] == 14:
                raise error
            return model(x)

        return call

    monkeypatch.setattr(contestants, "fused", planted)


# The first call warms up, then each of 4 inputs is checked and the first again, from poisoned memory; the last ones are timed.
@pytest.mark.parametrize("fault, after", [("memory", 1), ("compile error", 3), ("memory", 8), ("CUDA", 1), ("Triton", 8)])
def test_a_fault_is_a_recorded_failure(tmp_path, timed, monkeypatch, fault, after):
    error, path = FAULTS[fault], tmp_path / "record.json"
    plant(monkeypatch, error, after)
    lost = supervise.poisons_context(error)
    assert run_child(path, "--part", "chain") == (supervise.AGAIN if lost else 0)
    if lost:  # nothing else of this process counts
        assert len(results.read(path)["rows"]) == 0
        assert run_child(path, "--part", "chain") == 0
    data = results.read(path)
    assert [(r["stage"], r["provider"]) for r in data["rows"]] == [
        (3, "eager_channels_last"), (4, "ours"), (4, "eager_channels_last"),
    ]  # fmt: skip
    ((name, reason),) = data["environment"]["failures"].items()
    assert name == f"{quick_unit('chain')}, ours" and str(error) in reason


def test_what_all_contestants_share_fails_for_all(tmp_path, timed, monkeypatch):
    def inputs(shape, *_):
        if shape[-1] == 14:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return own(shape, *_)

    own = contests.random_tensors
    monkeypatch.setattr(contests, "random_tensors", inputs)
    assert run_child(tmp_path / "record.json", "--part", "chain") == 0
    data = results.read(tmp_path / "record.json")
    assert {r["stage"] for r in data["rows"]} == {4} and len(data["environment"]["failures"]) == 2


def test_rates_that_cannot_be_measured_stop_nothing(tmp_path, timed, monkeypatch):
    record = script("record")
    monkeypatch.setattr(record.roofline, "measure_rates", lambda *_: 1 / 0)
    assert run_child(tmp_path / "record.json", "--part", "chain") == 0
    data = results.read(tmp_path / "record.json")
    assert len(data["rows"]) == 4 and record.RATES in data["environment"]["failures"]


PLANTED = """
import os, signal, sys, time
if "--child" in sys.orig_argv:
    import torch
    from res2net_fused.bench import contestants, contests
    right = contestants.case_builders

    def planted(case, module, conditions):
        build = right(case, module, conditions)

        def at(name, graph):
            model = build(name, graph)
            if name != "ours":
                return model
            where = case.workload, case.stage, case.variant
            if where == ("chain", 3, "normal"):
                os.kill(os.getpid(), signal.SIGKILL)
            if where == ("chain", 4, "normal"):
                time.sleep(600)
            if where == ("block", 4, "normal"):
                raise RuntimeError("CUDA error: unspecified launch failure")
            return contestants.Model(lambda x: model.call(x) * 1.001, model.facts)

        return at

    contests.case_builders = planted
"""


def test_a_call_goes_on_behind_whatever_ends_its_processes(tmp_path):
    """SIGKILL, a hang, a lost context and a wrong result, each in its unit; then a second call."""
    (tmp_path / "sitecustomize.py").write_text(PLANTED)
    path = tmp_path / "record.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "record.py"), "--device", "cpu", "--quick", "--no-build"]
    command += ["--part", "chain", "--part", "block", "--limit", "12", "--out", str(path)]
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stdout + done.stderr
    data = results.read(path)
    assert [r["provider"] for r in data["rows"]] == ["eager_channels_last"] * 4
    reasons = list(data["environment"]["failures"].values())
    for reason, words in zip(reasons, ("SIGKILL", "hung for 12 s", "unspecified launch failure", "wrong 4 stage"), strict=True):
        assert words in reason
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 1 and "0 units to go" in again.stdout and "SIGKILL" in again.stdout
    assert results.read(path)["rows"] == data["rows"]
    assert [p.name for p in tmp_path.glob("record*")] == ["record.json"]


# The command ----------------------------------------------------------------------------------------------------------


def test_time_that_is_up_starts_nothing(tmp_path, capsys):
    path = tmp_path / "record.json"
    arguments = ["--device", "cpu", "--quick", "--no-build", "--out", str(path), "--part", "chain", "--minutes", "0"]
    assert script("record").main(arguments) == 0
    assert "Not measured yet (2 units)" in capsys.readouterr().out
    assert results.read(path)["rows"] == []


def test_a_record_needs_a_commit(tmp_path, monkeypatch, capsys):
    record = script("record")
    monkeypatch.setattr(record.results, "source_commit", lambda: "unknown")
    arguments = ["--device", "cpu", "--no-build", "--out", str(tmp_path / "r.json"), "--minutes", "0"]
    assert record.main(arguments) == 2
    assert "--commit" in capsys.readouterr().err
    assert record.main([*arguments, "--commit", "abc"]) == 0
    assert results.read(tmp_path / "r.json")["environment"]["commit"] == "abc"


@pytest.mark.parametrize("text", ["", '{"rows": []}', '{"environment": {"device": "x"}, "rows": [{"workload": "new"}]}'])
def test_a_record_of_another_version_is_kept(tmp_path, capsys, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    arguments = ["--device", "cpu", "--quick", "--no-build", "--out", str(path), "--minutes", "0"]
    assert script("record").main(arguments) == 2
    assert str(path) in capsys.readouterr().err and path.read_text() == text
    assert script("record").main([*arguments, "--again"]) == 0
    assert path.with_name("record.json.before").read_text() == text


def test_the_named_device_is_the_current_one(monkeypatch, tmp_path, capsys):
    record, chosen = script("record"), []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(record, "_environment", lambda *_: environment())
    arguments = ["--no-build", "--out", str(tmp_path / "r.json"), "--minutes", "0", "--part", "chain"]
    monkeypatch.setattr(record, "supervise", lambda *_, **__: 0)
    assert record.main(["--device", "cuda:1", *arguments]) == 0 and chosen == ["cuda:1"]
    assert record.main(["--device", "cuda:2", *arguments]) == 2 and len(chosen) == 1
    assert "sees 2 CUDA devices" in capsys.readouterr().err


def test_the_plan_can_be_listed_without_a_gpu(capsys):
    assert script("record").main(["--device", "cuda", "--list", "--configs", "26w4s", "--batch", "32", "--part", "chain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and lines[0].endswith("chain 26w4s stage 1 batch 32 bfloat16")


@pytest.mark.slow
def test_record_from_a_plain_checkout(tmp_path):
    """Isolated from the installed package and from tqdm and matplotlib."""
    path = tmp_path / "record.json"
    script = str(ROOT / "benchmarks" / "record.py")
    command = [sys.executable, script, "--device", "cpu", "--quick", "--no-build", "--out", str(path)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {r["workload"] for r in results.read(path)["rows"]} == set(results.WORKLOADS)


# JAX ------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "workload, stage, variant", [("chain", 4, "normal"), ("block", 4, "stage"), ("network", None, "normal")]
)
def test_jax_computes_the_same(workload, stage, variant):
    pytest.importorskip("jax")
    unit = Unit(workload, Config(26, 4), stage, variant, 1, "float32", (("jax", False),))
    found = jax_cases.time_unit(unit, conditions(), 300)  # raises where its error is beyond the bound
    results.validate({"environment": environment(), "rows": [found]})


def test_jax_that_fails_is_told(monkeypatch, tmp_path):
    broken = tmp_path / "jax_peer.py"
    broken.write_text("raise SystemExit('no such device')")
    monkeypatch.setattr(jax_cases, "PEER", broken)
    unit = Unit("chain", Config(26, 4), 4, "normal", 1, "float32", (("jax", False),))
    with pytest.raises(RuntimeError, match="no such device"):
        jax_cases.time_unit(unit, conditions(), 60)
    broken.write_text("import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match="longer than"):
        jax_cases.time_unit(unit, conditions(), 0.2)
    broken.write_text("import json; print(json.dumps({'error': 0.5}))")
    with pytest.raises(RuntimeError, match="relative error is 0.5"):
        jax_cases.time_unit(unit, conditions(), 60)
