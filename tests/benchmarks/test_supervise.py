"""Measuring in child processes: what kills, hangs or poisons one costs a single contender. Real processes, no GPU."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from res2net_fused.bench import results, supervise
from res2net_fused.bench.record_file import Record
from res2net_fused.bench.supervise import Mark
from res2net_fused.testing.cuda_errors import poisons_context

# Runs contenders by name until something happens to it; argv: the record, seconds for each, names.
CHILD = """
import os, signal, sys, time
from pathlib import Path
from res2net_fused.bench import results, supervise
from res2net_fused.bench.record_file import Record

record = Record(Path(sys.argv[1]), results.environment("cpu", "child"))
record.begin_run()
row = {"workload": "chain", "config": "26w4s", "stage": 1, "batch": 1, "dtype": "float32", "device": "cpu"}
row |= {"median_ms": 1, "p20_ms": 1, "p80_ms": 1, "peak_mb": 0}
for i, name in enumerate(sys.argv[3:]):
    if record.settled(name) or any(r["stage"] == i for r in record.rows):
        continue
    record.mark(name, limit_s=float(sys.argv[2]))
    if name == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "hung":
        time.sleep(60)
    if name == "crashed":
        raise SystemExit(7)
    if name == "poisoned":
        record.add(failures={name: "CUDA error: an illegal memory access was encountered"})
        record.close()
        sys.exit(supervise.AGAIN)
    record.add([row | {"provider": "ours", "stage": i}])
record.unmark()
record.close()
"""
ENVIRONMENT = results.environment("cpu", "parent")


def run(path, *names, limit_s=30.0, **settings):
    return supervise.supervise([sys.executable, "-c", CHILD, str(path), str(limit_s), *names], path, **settings)


def test_every_fault_costs_its_contender_alone(tmp_path):
    path = tmp_path / "record.json"
    assert run(path, "first", "killed", "poisoned", "crashed", "last") == 0
    record = Record(path, ENVIRONMENT)
    assert [row["stage"] for row in record.rows] == [0, 4]
    assert record.failures == {
        "killed": "its process was killed by signal 9 (SIGKILL)",
        "poisoned": "CUDA error: an illegal memory access was encountered",
        "crashed": "its process ended with exit status 7",
    }
    record.close()
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_what_hangs_is_killed_and_named(tmp_path):
    path = tmp_path / "record.json"
    assert run(path, "hung", "last", limit_s=1) == 0
    record = Record(path, ENVIRONMENT)
    assert [row["stage"] for row in record.rows] == [1]
    assert record.failures == {"hung": "hung for 1 s; its process was killed"}


def test_what_is_cut_off_twice_is_left(tmp_path):
    """Or a contender that takes longer than a call would come first for ever."""
    path = tmp_path / "record.json"
    for previous in range(2):
        mark = Mark(path)
        mark.lock()
        mark.set(["slow"], 30)
        mark.close()
        mark.end(cut_s=20)
        record = Record(path, ENVIRONMENT)
        record.close()
        assert len(record.failures) == previous
    assert record.failures == {"slow": "took all the time that was left, twice (20 s, 20 s)"}


def test_time_that_is_up_ends_the_child(tmp_path):
    path, start = tmp_path / "record.json", time.time()
    assert run(path, "hung", deadline=start + 1) == 0
    assert time.time() - start < 30
    record = Record(path, ENVIRONMENT)
    assert not record.failures and record.missing([("hung", False)], "x") == [("hung", False)]


def test_children_that_never_begin_end_the_call(tmp_path, capsys):
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    assert supervise.supervise(command, tmp_path / "record.json") == 1
    assert capsys.readouterr().out.count("exit status 3") == 2


def test_a_refusal_is_passed_on(tmp_path):
    assert supervise.supervise([sys.executable, "-c", "raise SystemExit(2)"], tmp_path / "record.json") == supervise.REFUSED


def test_a_terminated_parent_leaves_no_child_and_no_failure(tmp_path):
    path = tmp_path / "record.json"
    code = "import sys; from pathlib import Path; from res2net_fused.bench.supervise import supervise; "
    code += "supervise(sys.argv[2:], Path(sys.argv[1]))"
    parent = subprocess.Popen([sys.executable, "-c", code, str(path), sys.executable, "-c", CHILD, str(path), "60", "hung"])
    mark = Mark(path)
    for _ in range(600):
        if mark.read().get("names"):
            break
        time.sleep(0.1)
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(30) == 128 + signal.SIGTERM
    record = Record(path, ENVIRONMENT)  # not locked any more
    assert not record.failures and not record.running


def test_two_processes_do_not_write_one_record(tmp_path):
    first = Record(tmp_path / "record.json", ENVIRONMENT)
    with pytest.raises(ValueError, match="another process"):
        Record(tmp_path / "record.json", ENVIRONMENT)
    first.close()
    Record(tmp_path / "record.json", ENVIRONMENT).close()


def test_a_mark_that_nobody_explained_is_a_failure(tmp_path):
    """The whole job was killed: the next call goes on behind what ran."""
    record = Record(tmp_path / "record.json", ENVIRONMENT)
    record.mark("a long name that another one is shorter than", limit_s=1)
    record.mark("x", "y", limit_s=1)
    assert record.running == ["x", "y"]
    record.close()
    Mark(record.path).end(reason="a long reason " * 20)
    later = Mark(record.path)
    later.lock()
    later.set(["x", "y"], 1)
    assert later.read()["names"] == ["x", "y"]
    later.close()
    again = Record(tmp_path / "record.json", ENVIRONMENT)
    assert set(again.failures) == {"x", "y"} and not again.running
    assert json.loads((tmp_path / "record.json").read_text())["environment"]["failures"] == again.failures


POISONOUS = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"),
    RuntimeError("launch failed: cudaErrorIllegalAddress"),
    RuntimeError("CUDA_ERROR_LAUNCH_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    torch.AcceleratorError("unknown"),
]
HARMLESS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("at 10:4: expected a power of two"),
    ValueError("device is cuda:9"),
]


@pytest.mark.parametrize("error", POISONOUS, ids=str)
def test_what_poisons_a_context(error):
    assert poisons_context(error)
    try:
        try:
            raise error
        except Exception as inner:
            raise RuntimeError("backend compiler failed") from inner
    except RuntimeError as outer:
        assert poisons_context(outer)


@pytest.mark.parametrize("error", HARMLESS, ids=str)
def test_what_does_not(error):
    assert not poisons_context(error)


def test_running_out_of_resources_poisons_nothing():
    resources = pytest.importorskip("triton.runtime.errors").OutOfResources(300_000, 232_448, "shared memory")
    assert not poisons_context(resources)
