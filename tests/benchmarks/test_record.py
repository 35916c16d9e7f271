"""The record of a GPU: its file, its command, and the machinery that checks and times, on the CPU."""

import os
import subprocess
import sys

import pytest
import record.__main__ as recorder
import torch
from record import jax_case
from record.runner import build_network
from record.schedule import schedule
from record_cases import ROOT, conditions, environment, load_setup, quick_case, record_runner, row, run_child

from res2net_fused.bench import candidates, record_file, results
from res2net_fused.bench.timed_case import TimedCase
from res2net_fused.testing.cases import TRAINED, WidthScale

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


def test_threads_count_on_a_processor_whatever_torch_is_built_for(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    here = environment()
    assert record_file.different_fields(here, {**here, "threads": -1})


@pytest.mark.parametrize("change", [{"commit": "other"}, {"torch": "0"}, {"device": "x"}, {"native": {}}, {"threads": -1}])
def test_other_environments_are_refused(tmp_path, change):
    path = tmp_path / "record.json"
    old = record_file.Record(path, environment())
    old.save()
    old.close()
    with pytest.raises(ValueError, match=rf"{next(iter(change))} is .*--out"):
        record_file.Record(path, environment(**change))


def test_what_is_missing(tmp_path):
    case = schedule("cuda")[0]
    record = record_file.Record(tmp_path / "record.json", environment())
    keys = case.keys("cuda")
    assert record.missing(keys, case) == keys
    record._rows = {key: {} for key in keys[1:]}
    assert record.missing(keys, case) == keys[:1]
    for reasons in (record.failures, record.absent):
        reasons[record_file.failure_name(case, *case.candidates[0])] = "why"
        assert record.missing(keys, case) == []
        record.retry()
        assert record.missing(keys, case) == keys[:1]


def test_folder_names():
    assert recorder.folder_name("NVIDIA H200") == "nvidia-h200"
    assert recorder.folder_name("AMD EPYC (AVX512)") == "amd-epyc-avx512"


# Building -------------------------------------------------------------------------------------------------------------


def test_architectures():
    assert [load_setup().architecture(c) for c in ((8, 0), (8, 9), (9, 0), (10, 0))] == ["80", "89", "90a", "100"]


# Checking and timing on the CPU ---------------------------------------------------------------------------------------


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
    outcome = record_runner(record).time(quick_case(workload))
    assert not outcome.failures
    found = {(r["config"], r["provider"]): r for r in outcome.rows}
    assert set(found) == {
        ("res2net50_26w4s", "ours"), ("res2net50_26w4s", "eager_channels_last"), ("resnet50", "eager_channels_last"),
    }  # fmt: skip
    baseline = found["resnet50", "eager_channels_last"]["median_ms"]
    ours = found["res2net50_26w4s", "ours"]
    assert ours["yardstick_ms"] == baseline
    assert ("floor_ms" in ours) == ("frozen" in ours) == (workload == "network")


def test_training_steps_train():
    case = quick_case("train_step")
    network = build_network(case.config, "float32", conditions())
    step = candidates.training_builders(network, case, conditions())("ours", False).call
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        losses = [float(step(x)) for _ in range(4)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("workload", TRAINED)
def test_chains_and_blocks_in_training(timed, record, workload):
    outcome = record_runner(record).time(quick_case(workload))
    assert not outcome.failures
    assert [r["provider"] for r in outcome.rows] == ["ours", "eager_channels_last"]


def test_without_rates_there_is_no_floor(timed, record):
    outcome = record_runner(record, rates=None).time(quick_case("chain"))
    assert len(outcome.rows) == 2 and not any("floor_ms" in r for r in outcome.rows)


def test_what_cannot_run_here_is_no_failure(timed, record):
    candidates = (("ours", False), ("cuda", False), ("tensorrt", True))
    case = TimedCase("chain", WidthScale(26, 4), 4, "normal", 1, "float32", candidates)
    outcome = record_runner(record).time(case)
    assert [r["provider"] for r in outcome.rows] == ["ours"]
    assert not outcome.failures and [name.split(", ")[1][:8] for name in outcome.absent] == ["cuda", "tensorrt"]


# The command ----------------------------------------------------------------------------------------------------------


def test_time_that_is_up_starts_nothing(tmp_path, capsys):
    path = tmp_path / "record.json"
    arguments = ["--device", "cpu", "--quick", "--no-build", "--out", str(path), "--part", "chain", "--minutes", "0"]
    assert recorder.main(arguments) == 0
    assert "Not measured yet (2 cases)" in capsys.readouterr().out
    assert results.read(path)["rows"] == []


def test_a_record_needs_a_commit(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recorder.results, "source_commit", lambda: "unknown")
    arguments = ["--device", "cpu", "--no-build", "--out", str(tmp_path / "r.json"), "--minutes", "0"]
    assert recorder.main(arguments) == 2
    assert "--commit" in capsys.readouterr().err
    assert recorder.main([*arguments, "--commit", "abc"]) == 0
    assert results.read(tmp_path / "r.json")["environment"]["commit"] == "abc"


@pytest.mark.parametrize("text", ["", '{"rows": []}', '{"environment": {"device": "x"}, "rows": [{"workload": "new"}]}'])
def test_a_record_of_another_version_is_kept(tmp_path, capsys, text):
    path = tmp_path / "record.json"
    path.write_text(text)
    arguments = ["--device", "cpu", "--quick", "--no-build", "--out", str(path), "--minutes", "0"]
    assert recorder.main(arguments) == 2
    assert str(path) in capsys.readouterr().err and path.read_text() == text
    assert recorder.main([*arguments, "--again"]) == 0
    assert path.with_name("record.json.before").read_text() == text


def test_the_named_device_is_the_current_one(monkeypatch, tmp_path, capsys):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(recorder, "_environment", lambda *_: environment())
    arguments = ["--no-build", "--out", str(tmp_path / "r.json"), "--minutes", "0", "--part", "chain"]
    monkeypatch.setattr(recorder, "supervise", lambda *_, **__: 0)
    assert recorder.main(["--device", "cuda:1", *arguments]) == 0 and chosen == [torch.device("cuda", 1)]
    assert recorder.main(["--device", "cuda:2", *arguments]) == 2 and len(chosen) == 1
    assert "sees 2 CUDA devices" in capsys.readouterr().err


def test_the_plan_can_be_listed_without_a_gpu(capsys):
    assert recorder.main(["--device", "cuda", "--list", "--configs", "26w4s", "--batch", "32", "--part", "chain"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 12 and lines[0].endswith("chain 26w4s stage 1 batch 32 bfloat16")


@pytest.mark.slow
def test_record_from_a_plain_checkout(tmp_path):
    """Isolated from the installed package and from tqdm and matplotlib."""
    path = tmp_path / "record.json"
    script = str(ROOT / "benchmarks" / "record")
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
    case = TimedCase(workload, WidthScale(26, 4), stage, variant, 1, "float32", (("jax", False),))
    found = jax_case.time_case(case, record_runner(None), 300)  # raises where its error is beyond the bound
    results.validate({"environment": environment(), "rows": [found]})


def test_jax_that_fails_is_told(monkeypatch, tmp_path):
    broken = tmp_path / "jax_peer.py"
    broken.write_text("raise SystemExit('no such device')")
    monkeypatch.setattr(jax_case, "PEER", broken)
    case = TimedCase("chain", WidthScale(26, 4), 4, "normal", 1, "float32", (("jax", False),))
    with pytest.raises(RuntimeError, match="no such device"):
        jax_case.time_case(case, record_runner(None), 60)
    broken.write_text("import time; time.sleep(60)")
    with pytest.raises(RuntimeError, match="longer than"):
        jax_case.time_case(case, record_runner(None), 0.2)
    broken.write_text("import json; print(json.dumps({'error': 0.5}))")
    with pytest.raises(RuntimeError, match="relative error is 0.5"):
        jax_case.time_case(case, record_runner(None), 60)
