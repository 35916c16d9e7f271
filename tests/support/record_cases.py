"""What the tests of records share: rows, environments, conditions of a run, the scripts of benchmarks/."""

import importlib
import sys
import time
from dataclasses import replace

from tree import ROOT

from res2net_fused.bench import results, roofline, schedule
from res2net_fused.bench.candidates import Conditions


def script(name):
    """A module of benchmarks/."""
    folder = str(ROOT / "benchmarks")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def environment(**changes):
    return results.environment("cpu", "record") | {"native": {"cpu": True}, "quick": False} | changes


def row(**changes):
    base = {"workload": "chain", "config": "26w4s", "stage": 1, "variant": "normal", "batch": 32, "dtype": "bfloat16"}
    base |= {"device": "cuda", "provider": "ours_graph", "graph": True, "median_ms": 1.0, "p20_ms": 0.9, "p80_ms": 1.1}
    return base | {"peak_mb": 1.0, "run": 1} | changes


def conditions(**changes):
    rates = roofline.Rates(10, {"float32": 0.1})
    return replace(Conditions("cpu", "auto", True, rates, None, 1), **changes)


def run_child(path, *arguments):
    """The process that measures, in this one."""
    child = ["--device", "cpu", "--commit", "test", "--out", str(path), "--child", str(time.time())]
    return script("record").main(["--quick", *arguments, *child])


def quick_unit(workload):
    return next(u for u in schedule.schedule("cpu", quick=True) if u.workload == workload)
