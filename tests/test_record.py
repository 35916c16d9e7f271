"""The record of a GPU and the README's results: order, merging, floors, figures, and the machinery on the CPU."""

import importlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from res2net_fused.bench import contests, figures, jax_cases, measure, record_file, results, roofline, schedule, training
from res2net_fused.bench.schedule import Budget, Unit
from res2net_fused.bench.workloads import STAGES, TRAINED, Case, Config
from res2net_fused.parity import ParityReport, ParityRow

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scripts():
    """Imports a script of benchmarks/."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))


# Order and time -------------------------------------------------------------------------------------------------------


def test_what_the_figures_need_comes_first_and_jax_last():
    units = schedule.schedule("cuda")
    assert [(u.workload, str(u.config), u.stage) for u in units[:8]] == [
        ("chain", config, stage) for config in ("26w4s", "14w8s") for stage in STAGES
    ]
    # (of bf16, batch 32) before the other batches; those and networks before fp16; training next to last
    where = {}
    for i, unit in enumerate(units):
        kind = "jax" if unit.contestants[0][0] == "jax" else unit.workload
        where.setdefault((kind, unit.batch, unit.dtype), []).append(i)
    half_from = min(i for (_, _, dtype), found in where.items() if dtype == "float16" for i in found)
    first_jax = min(where["jax", 32, "bfloat16"])
    assert max(where["chain", 256, "bfloat16"]) < half_from < min(where["train_step", 128, "bfloat16"]) < first_jax
    assert first_jax > max(max(found) for (kind, _, _), found in where.items() if kind != "jax")
    assert min(where["network", 32, "bfloat16"]) < min(where["chain", 256, "bfloat16"])


def test_the_record_is_complete():
    units = schedule.schedule("cuda")
    keys = [key for unit in units for key in unit.keys("cuda")]
    assert len(set(keys)) == len(keys)
    assert {name for unit in units for name, _ in unit.contestants} <= set(results.PROVIDERS)
    cases = {(u.workload, u.config_name, u.stage, u.batch, u.dtype) for u in units}
    for batch in (1, 32, 256):
        for dtype in ("bfloat16", "float16"):
            for config in ("26w4s", "14w8s", "48w2s", "26w8s", "64w1s"):
                assert {(w, config, stage, batch, dtype) for w in ("chain", "block") for stage in STAGES} <= cases
                if config != "64w1s":  # which is timed beside each of them
                    assert ("network", f"res2net50_{config}", None, batch, dtype) in cases
    assert [u for u in units if u.variant == "stage" and u.batch in (32, 256) and str(u.config) == "26w4s"]
    first = units[0].contestants
    for graphed in ("ours_graph", "compile_max_autotune", "eager_channels_last", "compile", "triton", "cuda"):
        assert (graphed, True) in first
    assert {("ours", False), ("eager", False)} <= set(first)


def test_parts_are_taken_out_of_the_whole():
    chains = schedule.schedule("cuda", ["chain"])
    assert {unit.workload for unit in chains} == {"chain"}
    assert chains == [unit for unit in schedule.schedule("cuda") if unit.workload == "chain"]


def test_time_is_judged_by_what_came_before():
    now = [100.0]
    budget = Budget(2, started=90.0, clock=lambda: now[0])
    assert (budget.elapsed, budget.left) == (10.0, 110.0)
    assert budget.fits("chain") and not budget.fits("network")
    budget.note("network", 80.0)
    assert budget.expected("network") == 100.0 and budget.fits("network")
    now[0] = 111.0
    assert not budget.fits("network")
    for _ in range(3):
        budget.note("network", 8.0)
    assert budget.expected("network") == 10.0


# Roofline -------------------------------------------------------------------------------------------------------------

H200 = roofline.Rates(4300, {"bfloat16": 790})


FLOORS = [("26w4s", 1, 9.7), ("26w4s", 2, 4.9), ("14w8s", 1, 10.5), ("48w2s", 1, 9.0)]  # of an H200


@pytest.mark.parametrize("config, stage, microseconds", FLOORS)
def test_floor_of_a_chain(config, stage, microseconds):
    case = Case("chain", Config.parse(config), stage, 32, "bfloat16", "cpu")
    module = case.module()
    shape = (32, case.channels, case.input_size, case.input_size)
    work = roofline.least_work(module, shape, "bfloat16")
    assert work.flops == case.problem(module).flops
    assert work.activations == 2 * 2 * torch.Size(shape).numel()
    assert work.parameters >= 2 * sum(w.numel() for w in module.weights)
    assert 1e3 * roofline.floor_ms([work], H200, "bfloat16") == pytest.approx(microseconds, rel=0.02)


def test_floor_of_a_strided_block_counts_its_shortcut():
    case = Case("block", Config(26, 4), 2, 3, "float32", "cpu", "stage")
    work = roofline.least_work(case.module(), (3, 256, 56, 56), "float32")
    assert work.activations == 4 * 3 * (256 * 56**2 + 512 * 28**2)
    products = 256 * 208 * 56**2 + (9 * 3 * 52**2 + 208 * 512 + 256 * 512) * 28**2
    assert work.flops == 2 * 3 * products


def test_floor_is_the_larger_of_moving_and_multiplying():
    rates = roofline.Rates(100, {"float32": 10})
    assert roofline.Work(10**9, 0, 0).floor_ms(rates, "float32") == pytest.approx(10)
    assert roofline.Work(6 * 10**8, 4 * 10**8, 10**12).floor_ms(rates, "float32") == pytest.approx(100)


def test_network_is_stem_blocks_and_head():
    network = contests.build_network(Config(26, 4), "float32", conditions())
    parts = roofline.least_work_of_network(network, (2, 3, 64, 64), "float32")
    assert len(parts) == 1 + 4 + 1
    whole = roofline.least_work(network, (2, 3, 64, 64), "float32")
    assert sum(part.flops for part in parts) == whole.flops
    assert sum(part.parameters for part in parts) == whole.parameters


def test_inputs_rotate_past_the_cache():
    l2 = 50 * 2**20
    assert roofline.rotation_count(2 * l2, l2) == 1
    assert roofline.rotation_count(2 * l2 - 1, l2) == 2
    assert roofline.rotation_count(160_000, l2) * 160_000 >= 2 * l2
    assert roofline.rotation_count(1, None) == 4


def test_rates_are_measured():
    rates = roofline.measure_rates("cpu", ["float32"], quick=True)
    assert rates.copy_gb_s > 0 and rates.matrix_tflops["float32"] > 0


# The file -------------------------------------------------------------------------------------------------------------


def environment(**changes):
    return results.environment("cpu", "record") | {"native": {"cpu": True}, "quick": False} | changes


def row(**changes):
    base = {"workload": "chain", "config": "26w4s", "stage": 1, "variant": "normal", "batch": 32, "dtype": "bfloat16"}
    base |= {"device": "cuda", "provider": "ours_graph", "graph": True, "median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.1}
    return base | {"peak_mb": 1.0, "run": 1} | changes


def test_later_calls_add_to_a_record(tmp_path):
    path = tmp_path / "device" / "record.json"
    first = record_file.Record(path, environment(command="one"))
    assert first.run == 1
    first.add([row(), row(provider="compile")], {"chain x, jax": "not installed"})
    second = record_file.Record(path, environment(command="two"))
    assert second.run == 2
    second.add([row(median_ms=3.0, run=2), row(graph=False)], {})
    data = results.read(path)
    assert [(r["provider"], r["graph"], r["median_ms"]) for r in data["rows"]] == [
        ("ours_graph", True, 3.0), ("compile", True, 1.0), ("ours_graph", False, 1.0),
    ]  # fmt: skip
    assert data["environment"]["command"] == "one; two"
    assert data["environment"]["failures"] == {"chain x, jax": "not installed"}
    assert record_file.Record(path, environment(), again=True).rows == []
    assert not list(path.parent.glob("*.new"))


@pytest.mark.parametrize("change", [{"commit": "other"}, {"torch": "0"}, {"device": "x"}, {"native": {}}, {"threads": -1}])
def test_other_environments_are_refused(tmp_path, change):
    path = tmp_path / "record.json"
    record_file.Record(path, environment()).save()
    with pytest.raises(ValueError, match=rf"{next(iter(change))} is .*--out"):
        record_file.Record(path, environment(**change))


def test_what_is_missing():
    unit = schedule.schedule("cuda")[0]
    record = record_file.Record(Path("nowhere.json"), environment())
    keys = unit.keys("cuda")
    assert record.missing(keys, unit) == keys
    record._rows = {key: {} for key in keys[1:]}
    assert record.missing(keys, unit) == keys[:1]
    record.failures[record_file.failure_name(unit, *unit.contestants[0])] = "why"
    assert record.missing(keys, unit) == []


def test_folder_names():
    assert record_file.folder_name("NVIDIA H200") == "nvidia-h200"
    assert record_file.folder_name("AMD EPYC (AVX512)") == "amd-epyc-avx512"


# Figures --------------------------------------------------------------------------------------------------------------


def by_name(rows):
    return {figure.name: figure for figure in figures.figures(rows)}


def test_chain_figures():
    rows = [row(), row(provider="eager_channels_last", median_ms=5.5), row(provider="compile_max_autotune", median_ms=1.9)]
    found = by_name(rows)
    eager = found["chain 26w4s stage 1, batch 32, over eager_channels_last"]
    assert (eager.value, eager.bar, eager.outcome) == (5.5, 5.0, "pass")
    assert found["chain 26w4s stage 1, batch 32, over compile_max_autotune"].outcome == "FAIL"
    assert found["chain 26w4s stage 2, batch 32, over eager_channels_last"].outcome == "unmeasured"
    assert len([f for f in found if f.startswith("chain 26w4s") or f.startswith("chain 14w8s")]) == 16


@pytest.mark.parametrize("change", [{"run": 2}, {"graph": False}, {"dtype": "float16"}, {"batch": 1}, {"variant": "stage"}])
def test_ratios_are_taken_between_like_rows_of_one_run(change):
    rows = [row(), row(provider="eager_channels_last", median_ms=9.0) | change]
    assert by_name(rows)["chain 26w4s stage 1, batch 32, over eager_channels_last"].value is None


def test_blocks_are_summed_as_often_as_they_occur():
    peer = {("stage", 1): 10.0, ("normal", 3): 20.0}
    rows = []
    for variant in ("stage", "normal"):
        for stage in STAGES:
            case = {"workload": "block", "stage": stage, "variant": variant}
            slow = peer.get((variant, stage), 2.0)
            rows += [row(**case), row(**case, provider="compile", median_ms=99.0),
                     row(**case, provider="compile_max_autotune", median_ms=slow)]  # fmt: skip
    name = "blocks of Res2Net-50 26w4s summed, batch 32, over torch.compile"
    found = by_name(rows)[name]
    assert found.value == pytest.approx((10 + 3 * 2 + (2 + 3 + 2) * 2 + 5 * 20) / 16)
    assert by_name(rows[:-3])[name].value is None
    assert by_name(rows[:-3])[name].note == "missing: 1 of 8, such as normal block of stage 4"


def test_the_worst_of_48w2s_counts():
    rows = []
    for stage, batch, peer in ((1, 32, 1.5), (4, 256, 0.9), (2, 1, 1.2)):
        case = {"config": "48w2s", "stage": stage, "batch": batch}
        rows += [row(**case), row(**case, provider="compile", median_ms=peer)]
    found = by_name(rows)["chain 48w2s over torch.compile"]
    assert (found.value, found.outcome, found.note) == (0.9, "FAIL", "worst of 3: stage 4, batch 256")


def test_networks_are_compared_with_the_yardstick():
    case = {"workload": "network", "config": "res2net50_14w8s", "stage": None, "batch": 256}
    rows = [row(**case, median_ms=4.0, yardstick_ms=5.0)]
    assert by_name(rows)["res2net50_14w8s, batch 256, over compiled ResNet-50"].value == 1.25
    assert "1.25x" in figures.figure_table(figures.figures(rows))
    assert by_name([])["res2net50_26w4s, batch 32, over compiled ResNet-50"].outcome == "unmeasured"


# Building -------------------------------------------------------------------------------------------------------------


def test_architectures(scripts):
    build = scripts("native_build")
    assert [build.architecture(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0))] == ["80", "89", "90a", "100"]


def test_direct_compiling(scripts, tmp_path):
    build, flags = scripts("native_build"), pytest.importorskip("res2net_fused.build_flags")
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


def conditions(**changes):
    rates = roofline.Rates(10, {"float32": 0.1})
    return replace(contests.Conditions("cpu", "auto", True, rates, None, 1), **changes)


@pytest.fixture
def few_repeats(monkeypatch):
    def once(contenders, device, **_):
        return measure.measure(contenders, device, seconds=0, min_repeats=1, warm_up=0)

    monkeypatch.setattr(contests, "measure", once)


def run_record(scripts, path, *arguments):
    return scripts("record").main(["--device", "cpu", "--quick", "--no-build", "--out", str(path), *arguments])


def test_chains_and_blocks_on_the_cpu(scripts, tmp_path, capsys, few_repeats):
    path = tmp_path / "record.json"
    assert run_record(scripts, path, "--part", "chain", "--part", "block") == 0
    data = results.read(path)
    assert {(r["workload"], r["stage"], r["variant"], r["provider"]) for r in data["rows"]} == {
        (*case, provider)
        for case in (("chain", 3, "normal"), ("chain", 4, "normal"), ("block", 4, "normal"), ("block", 4, "stage"))
        for provider in ("ours", "eager_channels_last")
    }
    for r in data["rows"]:
        assert r["roofline_share"] == pytest.approx(r["floor_ms"] / r["median_ms"]) and r["run"] == 1
        assert ("backend" in r) == (r["provider"] == "ours")
    assert data["environment"]["runs"][0]["copy_gb_s"] >= 0
    out = capsys.readouterr().out
    assert out.count("comparisons, 0 misses") == 2  # chains, blocks
    assert "unmeasured" in out
    assert run_record(scripts, path, "--part", "chain") == 0
    assert "0 units to go" in capsys.readouterr().out
    assert len(results.read(path)["environment"]["runs"]) == 2


@pytest.mark.parametrize("workload", ["network", pytest.param("train_step", marks=pytest.mark.slow)])
def test_networks_on_the_cpu(few_repeats, workload):
    (unit,) = [u for u in schedule.schedule("cpu", [workload], quick=True) if u.workload == workload]
    assert contests.gate([unit], conditions()).ok
    outcome = contests.Contests(conditions()).time(unit)
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
    (unit,) = [u for u in schedule.schedule("cpu", ["train_step"], quick=True) if u.workload == "train_step"]
    network = contests.build_network(unit.config, "float32", conditions())
    step, _ = contests._training_builders(network, unit, conditions())("ours", False)
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        losses = [float(step(x)) for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("workload", TRAINED)
def test_chains_and_blocks_in_training(few_repeats, workload):
    (unit,) = [u for u in schedule.schedule("cpu", ["train_step"], quick=True) if u.workload == workload]
    report = contests.gate([unit], conditions())
    assert report.ok and any("gradients" in row.stage for row in report)
    outcome = contests.Contests(conditions()).time(unit)
    assert not outcome.failures
    assert [r["provider"] for r in outcome.rows] == ["ours", "eager_channels_last"]


def test_wrong_gradients_make_the_gate_red(monkeypatch):
    """The second weight's gradient is off by a thousandth."""
    own = training.TrainingStep.gradients
    (unit,) = [u for u in schedule.schedule("cpu", ["train_step"], quick=True) if u.workload == "train_chain"]

    def wrong(step, x, grad=None):
        out, *gradients = own(step, x, grad)
        gradients[2] *= 1.001 if grad is None else 1.0  # of ours alone
        return out, *gradients

    monkeypatch.setattr(training.TrainingStep, "gradients", wrong)
    with pytest.raises(contests.RedGate, match="gradients"):
        contests.gate([unit], conditions())


def test_training_figures():
    case = {"workload": "train_step", "config": "res2net50_26w4s", "stage": None, "batch": 128, "graph": False}
    rows = [row(**case, provider="ours", median_ms=10.0, peak_mb=100.0),
            row(**case, provider="triton", median_ms=5.0, peak_mb=70.0),
            row(**case, provider="eager_channels_last", median_ms=10.0, peak_mb=100.0),
            row(**case, provider="compile", median_ms=6.0, peak_mb=90.0)]  # fmt: skip
    found = by_name(rows)
    assert found["res2net50_26w4s training step, batch 128, over eager_channels_last"].outcome == "pass"
    assert found["res2net50_26w4s training step, batch 128, over compile"].value == pytest.approx(1.2)
    assert found["res2net50_26w4s training peak memory, batch 128, over eager_channels_last"].value == pytest.approx(1 / 0.7)
    assert found["res2net50_14w8s training step, batch 256, over compile"].outcome == "unmeasured"


def miss():
    return ParityReport([ParityRow("chain", "26w4s", "3 normal", 1, "cpu", "float32", float("nan"), 1e-7, 5e-6)])


def test_a_red_gate_times_nothing(scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(contests, "check_case", lambda *_: miss())
    path = tmp_path / "record.json"
    assert run_record(scripts, path, "--part", "chain") == 1
    assert "MISS" in capsys.readouterr().out
    assert results.read(path)["rows"] == []


def test_a_wrong_compiled_network_is_noticed():
    (unit,) = schedule.schedule("cpu", ["network"], quick=True)
    network = contests.build_network(unit.config, "float32", conditions())
    images = torch.randn(2, 3, 64, 64)
    right = contests.Built(measure.Contender(network, [images]), {})
    timer = contests.Contests(conditions())
    timer._check_built(unit, network, {("ours", False): right}, images)
    wrong = contests.Built(measure.Contender(lambda x: network(x) * 1.001, [images]), {})
    with pytest.raises(contests.RedGate, match="MISS"):
        timer._check_built(unit, network, {("ours", False): wrong}, images)


def test_what_cannot_be_built_is_recorded(few_repeats):
    unit = Unit("chain", Config(26, 4), 4, "normal", 1, "float32", (("ours", False), ("cuda", False)))
    outcome = contests.Contests(conditions()).time(unit)
    assert [r["provider"] for r in outcome.rows] == ["ours"]
    ((name, reason),) = outcome.failures.items()
    assert name.endswith(", cuda") and "cpu" in reason


def test_time_that_is_up_starts_nothing(scripts, tmp_path, capsys):
    path = tmp_path / "record.json"
    assert run_record(scripts, path, "--part", "chain", "--minutes", "0") == 0
    assert "Not measured yet (2 units)" in capsys.readouterr().out
    assert results.read(path)["rows"] == []


def test_a_record_needs_a_commit(scripts, tmp_path, monkeypatch, capsys):
    record = scripts("record")
    monkeypatch.setattr(record.results, "source_commit", lambda: "unknown")
    arguments = ["--device", "cpu", "--no-build", "--out", str(tmp_path / "r.json"), "--minutes", "0"]
    assert record.main(arguments) == 2
    assert "--commit" in capsys.readouterr().err
    assert record.main([*arguments, "--commit", "abc"]) == 0
    assert results.read(tmp_path / "r.json")["environment"]["commit"] == "abc"


def test_the_plan_can_be_listed_without_a_gpu(scripts, capsys):
    assert scripts("record").main(["--device", "cuda", "--list", "--configs", "26w4s", "--batch", "32", "--part", "chain"]) == 0
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


# README ---------------------------------------------------------------------------------------------------------------


def test_the_readme_shows_the_committed_records(scripts):
    assert scripts("readme_results").main(["--check"]) == 0


def test_readme_is_written_and_checked(scripts, tmp_path, capsys):
    readme = scripts("readme_results")
    (tmp_path / "README.md").write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    rows = [
        row(stage=stage, provider=provider, graph=graph, median_ms=ms, roofline_share=0.5, workload=workload)
        for workload in ("chain", "block")
        for stage in STAGES
        for provider, graph, ms in (("ours_graph", True, 1.0), ("compile", False, 9.0), ("compile", True, 3.0 - stage / 2))
    ]
    rows.append(row(workload="block", stage=1, variant="stage", median_ms=100.0))
    network = {"workload": "network", "config": "res2net50_26w4s", "stage": None}
    rows.append(row(**network, median_ms=4.0, yardstick_ms=3.0))
    path = tmp_path / "benchmarks" / "results" / "some-gpu" / "record.json"
    results.write(path, environment(device="Some GPU", cuda="13.0", command="make record"), rows)
    arguments = ["--root", str(tmp_path)]
    assert readme.main([*arguments, "--check"]) == 1
    assert readme.main(arguments) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    assert "### Some GPU" in text and "CUDA 13.0" in text and "`make record`" in text
    line = next(line for line in text.splitlines() if line.startswith("| 26w4s"))
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "26w4s", "32", "bfloat16", "7", "4", "2.50 2.00 1.50 1.00", "50 50 50 50",
    ]  # fmt: skip
    assert "0.75" in next(line for line in text.splitlines() if line.startswith("| res2net50_26w4s"))  # a loss, shown
    assert "(benchmarks/results/some-gpu/record.png)" in text
    assert readme.main([*arguments, "--check"]) == 0
    path.with_suffix(".png").unlink()
    assert readme.main([*arguments, "--check"]) == 1
    assert "no plot" in capsys.readouterr().out


def test_bad_records_and_readmes_are_named(scripts, tmp_path, capsys):
    readme = scripts("readme_results")
    (tmp_path / "README.md").write_text("no markers")
    assert readme.main(["--root", str(tmp_path)]) == 2
    path = tmp_path / "benchmarks" / "results" / "x" / "bad.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps([]))
    assert readme.main(["--root", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "results:begin" in err and "bad.json" in err


def test_markdown_columns_are_aligned(scripts):
    table = scripts("readme_results").markdown_table(["a", "long head"], [["first", "1"]])
    assert table == "| a     | long head |\n| :---- | --------: |\n| first |         1 |"
