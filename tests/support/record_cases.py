"""What the tests of records share: rows, environments, a runner, the recorder's process, the checkout's setup.py."""

import importlib.util
import time
from dataclasses import replace

import record.__main__ as recorder
from record import roofline, schedule
from record.runner import RecordRunner
from tree import ROOT

from res2net_fused.bench import results
from res2net_fused.bench.candidates import RunConditions

RATES = roofline.Rates(10, {"float32": 0.1})


def load_setup():
    """setup.py as a module: nothing is built by importing it."""
    spec = importlib.util.spec_from_file_location("res2net_fused_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def environment(**changes):
    return results.environment("cpu", "record") | {"native": {"cpu": True}, "quick": False} | changes


def row(**changes):
    base = {"workload": "chain", "config": "26w4s", "stage": 1, "variant": "normal", "batch": 32, "dtype": "bfloat16"}
    base |= {"device": "cuda", "provider": "ours_graph", "graph": True, "median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.1}
    return base | {"peak_mb": 1.0, "run": 1} | changes


def conditions(**changes):
    return replace(RunConditions("cpu", "auto", True, None, 1), **changes)


def record_runner(record, rates=RATES, **changes):
    return RecordRunner(conditions(**changes), record, rates)


def run_child(path, *arguments):
    """The process that measures, in this one."""
    child = ["--device", "cpu", "--commit", "test", "--out", str(path), "--child", str(time.time())]
    return recorder.main(["--quick", *arguments, *child])


def quick_case(workload):
    return next(case for case in schedule.schedule("cpu", quick=True) if case.workload == workload)
