"""Whole networks on the CPU: Res2Net-50 26w4s and 14w8s against PyTorch, ONNX Runtime, OpenVINO and ResNet-50, in one run.

    python benchmarks/cpu_network.py
    python benchmarks/cpu_network.py --batch 1 --repeats 20 --out results/network.json
    python benchmarks/cpu_network.py --bar-pytorch 1.1 --bar-peer 1 --bar-resnet 0.9

At each batch size all providers of all three networks take turns, repeat after repeat, on photographs of 224x224. Medians are
compared: the fastest of ours with PyTorch's fastest mode, with ONNX Runtime and OpenVINO (the extra `peers`), and with
ResNet-50 in PyTorch's fastest mode. A ratio above 1 means that ours is faster. Every network is compared with float64 before
it is timed.

Exit status 1: a ratio is below its bar, or the parity gate is red. 2: a bar cannot be judged, since a peer was not timed, or
somebody failed or computes something else as it would be timed.

The machine must be otherwise idle: one busy neighbour makes every barrier between two threads wait for it.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from res2net_fused.bench import networks, providers, results, runtimes
from res2net_fused.bench.network_runner import NetworkContests, TurnConditions
from res2net_fused.bench.networks import NetworkRatios
from res2net_fused.bench.record_file import Record

BACKEND = "auto"
_JUDGED_BY = {"bar_pytorch": ("pytorch",), "bar_peer": tuple(runtimes.RUNTIMES), "bar_resnet": ("resnet50",)}


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    absent = providers.unavailable("cpu")
    for name, reason in absent.items():
        print(f"not timed, {name}: {reason}")
    if absent and options.bar_peer is not None:
        print(f"cpu_network: --bar-peer needs {' and '.join(absent)}", file=sys.stderr)
        return 2
    names = [name for name in providers.select("cpu", "network", "all") if not (options.no_compile and "compile" in name)]
    command = shlex.join(["python", "benchmarks/cpu_network.py", *arguments])
    environment = results.environment("cpu", command) | {"peers": runtimes.versions()}
    try:
        cases = []
        for model in networks.DEFAULT_MODELS:
            print(f"{model} on two photographs against float64", flush=True)
            cases.append(networks.prepare_network(model, "float32", "cpu", BACKEND))
            if not cases[-1].parity.ok:
                print(f"The parity gate is red, so nothing is timed. Misses:\n{cases[-1].parity.misses}")
                return 1
        with tempfile.TemporaryDirectory() as folder:
            record = Record(options.out or Path(folder, "rows.json"), environment, again=True)
            record.begin_run()
            rounds = (options.repeats, options.repeats)
            timer = NetworkContests(TurnConditions("cpu", BACKEND, False, None, None, 1, seconds=0, rounds=rounds), record)
            for batch in options.batch:
                outcome = timer.time_networks(cases, batch, providers.contestants(names, "cpu"))
                record.add(outcome.rows, outcome.failures)
            record.close()
    except (ImportError, RuntimeError, ValueError) as error:
        print(f"cpu_network: {error}", file=sys.stderr)
        return 2
    if options.out:
        print(f"Written: {options.out}")
    for name, reason in record.failures.items():
        print(f"cpu_network: failed, {name}: {reason}", file=sys.stderr)
    found = networks.network_ratios(record.rows)
    status = report(found, environment, {name: getattr(options, name) for name in _JUDGED_BY})
    return 2 if record.failures else status


def report(found: Sequence[NetworkRatios], environment: dict[str, object], bars: dict[str, float | None]) -> int:
    """Prints the ratios and what is below its bar; returns the exit status."""
    print(f"\n{environment['device']}, {environment['threads']} threads, torch {environment['torch']}, medians in ms;")
    print(f"{environment['peers']}; ratios above 1: ours is faster")
    print(networks.ratio_table(found))
    below = 0
    for name, bar in bars.items():
        for one in found if bar is not None else ():
            for other in _JUDGED_BY[name]:
                value = one.ratio(other)
                if not (value is not None and value >= bar):
                    below += 1
                    measured = "not timed" if value is None else f"{value:.2f}x"
                    print(f"below its bar: {one.model}, batch {one.batch}, over {other}: {measured}, {bar:g}x is asked for")
    return int(below > 0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="default: 1 8")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--repeats", type=int, default=10, help="of every provider on every network (default: 10)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out, which takes minutes to compile")
    parser.add_argument("--out", type=Path, help="JSON file for the rows (default: none)")
    parser.add_argument("--bar-pytorch", type=float, metavar="RATIO", help="over PyTorch's fastest mode")
    parser.add_argument("--bar-peer", type=float, metavar="RATIO", help="over ONNX Runtime and over OpenVINO")
    parser.add_argument("--bar-resnet", type=float, metavar="RATIO", help="over ResNet-50 in PyTorch's fastest mode")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
