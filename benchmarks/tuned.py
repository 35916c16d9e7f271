"""Tunes on this machine, then times what was chosen beside every candidate and eager in another run, and says what is lost.

    python benchmarks/tuned.py
    python benchmarks/tuned.py chains blocks --batch 1 8
    python benchmarks/tuned.py networks --train --batch 8 --seconds 30

Chains and blocks of 26w4s and 14w8s at the four stages of Res2Net-50, and the networks. The table goes to a temporary file. A
row is the fastest of all others over the tuned one: 1 means that nothing was faster, 0.95 that something took 5 % less. Spread:
from the 20th to the 80th percentile of the tuned one, relative to its median; a loss below it is noise.

The machine must be otherwise idle.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from res2net_fused import accelerate, tune
from res2net_fused._tables import format_table
from res2net_fused._timing import Timing, measure
from res2net_fused.backends import choices
from res2net_fused.backends.choices_file import PATH_VARIABLE
from res2net_fused.backends.measuring import Trial, candidates
from res2net_fused.bench import results
from res2net_fused.bench.networks import random_network
from res2net_fused.modules.measuring import call_of
from res2net_fused.ops.measured_chain import chain_call, measure_chain
from res2net_fused.testing.cases import WidthScale, cases

PARTS = ("chains", "blocks", "networks")
CONFIGS = (WidthScale(26, 4), WidthScale(14, 8))
NETWORKS = ("res2net50_26w4s", "res2net50_14w8s")

Row = tuple[str, dict[str, Timing]]


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="default: 1 8")
    parser.add_argument("--train", action="store_true", help="blocks and networks: forward and backward, in training mode")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timing for each row; networks take five times that")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = results.environment("cpu", "")["device"]
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, fp32, channels-last", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[PATH_VARIABLE] = str(Path(folder, "choices.json"))
        os.environ[choices.MODE_VARIABLE] = "tuned"
        choices.forget()
        for part in options.parts:
            rows_of = {"chains": chains, "blocks": blocks, "networks": whole}[part]
            rows = [row for batch in options.batch for row in rows_of(batch, options)]
            _print(f"{part}{', training' * options.train}", rows)
    return 0


def chains(batch: int, options: argparse.Namespace) -> Iterator[Row]:
    for case in cases(("chain",), CONFIGS, (batch,), "float32", "cpu", ("normal",)):
        module = case.module()
        problem = case.problem(module)
        weights = [p.detach() for p in module.parameters() if p.dim() == 4]
        measure_chain(problem, weights, None)
        trials: dict[str, Trial] = {}
        for name in [*candidates("inference", problem), "tuned"]:
            trials[name] = Trial(None if name == "tuned" else name, chain_call(problem, weights, None, _layout(name, problem)))
        yield f"{case.config} stage {case.stage} batch {batch}", _timed(trials, options.seconds)


def _layout(name: str, problem: object) -> str:
    found = choices.lookup("inference", problem) if name == "tuned" else None  # type: ignore[arg-type]
    return (name if found is None else found.backend).partition(":")[0]


def blocks(batch: int, options: argparse.Namespace) -> Iterator[Row]:
    for case in cases(("block",), CONFIGS, (batch,), "float32", "cpu", ("normal",)):
        block = accelerate(case.module().train(options.train)).to(memory_format=torch.channels_last)
        x = case.inputs()[0].contiguous(memory_format=torch.channels_last)
        yield f"{case.config} stage {case.stage} batch {batch}", _tuned_and_timed(block, x, options, options.seconds)


def whole(batch: int, options: argparse.Namespace) -> Iterator[Row]:
    for name in NETWORKS:
        model = accelerate(random_network(name).train(options.train))
        x = torch.randn(batch, 3, 224, 224)
        yield f"{name} batch {batch}", _tuned_and_timed(model, x, options, 5 * options.seconds)


def _tuned_and_timed(model: nn.Module, x: Tensor, options: argparse.Namespace, seconds: float) -> dict[str, Timing]:
    report = tune(model, x, training=options.train, progress=False)
    taken = {name for call in report.calls for name in call.ms}
    passes = "training" if options.train else "inference"
    trials = {name: Trial(name, call_of(copy.deepcopy(model), x, passes)) for name in sorted(taken)}
    trials["tuned"] = Trial(None, call_of(copy.deepcopy(model), x, passes))
    return _timed(trials, seconds)


def _timed(trials: dict[str, Trial], seconds: float) -> dict[str, Timing]:
    for trial in trials.values():
        trial.run()
    return measure(trials, "cpu", seconds=seconds, min_repeats=7, max_repeats=400, warm_up=1, peaks=False)


def _print(title: str, rows: list[Row]) -> None:
    names = list(dict.fromkeys(name for _, timings in rows for name in timings if name != "tuned"))
    table, ratios = [], []
    for what, timings in rows:
        tuned = timings["tuned"]
        others = {name: timing.median_ms for name, timing in timings.items() if name != "tuned"}
        best = min(others, key=others.__getitem__)
        ratios.append(others[best] / tuned.median_ms)
        spread = (tuned.p80_ms - tuned.p20_ms) / tuned.median_ms
        cells = [f"{others[name]:.2f}" if name in others else "-" for name in names]
        table.append((what, *cells, f"{tuned.median_ms:.2f}", best, f"{ratios[-1]:.3f}", f"{spread:.3f}"))
    head = (title, *(f"{name} ms" for name in names), "tuned ms", "fastest other", "other / tuned", "spread")
    mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
    print(f"\n{format_table(head, table, left=1)}\ngeometric mean {mean:.3f}, smallest {min(ratios):.3f}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
