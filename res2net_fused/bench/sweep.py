"""The main job: the parity gate, then scale against latency for chains and blocks, then a whole network."""

from __future__ import annotations

import copy
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..accelerate import accelerate
from ..models.res2net import Res2Net, res2net50
from ..parity import ParityReport, check_cases, check_network, convolution_precision
from ..reference import ReferenceBottle2neck
from ..tables import format_table
from . import results
from .measure import Timing, measure
from .photographs import calibrate, photographs
from .providers import OURS, PROVIDERS, contender, forget_compiled, select
from .workloads import TORCH_DTYPES, Case, Config, cases

WORKLOADS = ("chain", "block")
NETWORK = Config(26, 4)


@dataclass(frozen=True)
class Settings:
    """What to sweep: see `res2net-fused bench --help`."""

    configs: tuple[Config, ...]
    batches: tuple[int, ...]
    dtype: str
    device: str
    backend: str = "auto"
    peers: str = "default"
    quick: bool = False
    network: bool = True

    def cases(self) -> list[Case]:
        return cases(WORKLOADS, self.configs, self.batches, self.dtype, self.device)


@dataclass
class NetworkCase:
    """Res2Net-50 on photographs: the network, what `accelerate` made of a copy of it, and how they compare."""

    network: Res2Net
    model: Res2Net
    images: Tensor  # (2, 3, 224, 224)
    parity: ParityReport
    differences: dict[str, float]

    @property
    def config(self) -> str:
        return f"res2net50_{NETWORK}"


def prepare_network(dtype: str, device: str, backend: str) -> NetworkCase:
    """Res2Net-50 with random weights and statistics of the photographs, and its comparison with float64."""
    images = photographs()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = res2net50(NETWORK.width, NETWORK.scale, block=ReferenceBottle2neck)
    for module in network.modules():
        if isinstance(module, ReferenceBottle2neck):
            # Small beside the shortcut, as in trained networks: else every block would amplify the rounding of the last.
            nn.init.constant_(module.bn3.weight, 0.25)
    network = calibrate(network, images).requires_grad_(False).to(device, TORCH_DTYPES[dtype])
    images = images.to(device, TORCH_DTYPES[dtype])
    model = accelerate(copy.deepcopy(network), backend).to(memory_format=torch.channels_last)
    native_layout = images.contiguous(memory_format=torch.channels_last)
    parity, differences = check_network(network, model, native_layout, f"res2net50_{NETWORK}", dtype)
    return NetworkCase(network, model, images, parity, differences)


def run_sweep(settings: Settings, out: Path, command: str) -> int:
    """Checks, measures, prints, and writes `out`/bench-<device>.json and .png; returns the exit status."""
    todo = settings.cases()
    with progress("parity against float64", len(todo)) as advance:
        parity = check_cases(todo, settings.backend, advance)
    network = None
    if settings.network:
        print("Res2Net-50 on two photographs against float64", flush=True)
        network = prepare_network(settings.dtype, settings.device, settings.backend)
        parity += network.parity
    print("\nLargest error of each kind (relative to float64):")
    print(parity.worst())
    if not parity.ok:
        print(f"\nThe parity gate is red, so nothing is timed. Misses:\n{parity.misses}")
        return 1
    rows = []
    with progress("timing chains and blocks", len(todo)) as advance, convolution_precision(settings.dtype):
        for case in todo:
            rows += _time_case(case, settings)
            advance()
    if network is not None:
        print("timing Res2Net-50 on two photographs", flush=True)
        with convolution_precision(settings.dtype):
            rows += _time_network(network, settings)
    environment = results.environment(settings.device, command)
    stem = f"bench-{torch.device(settings.device).type}"
    results.write(out / f"{stem}.json", environment, rows)
    _print_outcome(rows, environment, network)
    from .plot import plot  # matplotlib takes a second to import

    plot(results.read(out / f"{stem}.json"), out / f"{stem}.png")
    print(f"\nWritten: {out / stem}.json and {out / stem}.png")
    return 0


@contextmanager
def progress(title: str, total: int) -> Iterator[Any]:
    """A progress bar on stderr where that is a terminal, and a line on stdout with the time it took."""
    from tqdm import tqdm

    start = time.perf_counter()
    print(f"{title} ({total} cases)", flush=True)
    with tqdm(total=total, desc=title, disable=None, leave=False) as bar:
        yield bar.update
    print(f"{title}: {time.perf_counter() - start:.0f} s", flush=True)


def _time_case(case: Case, settings: Settings) -> list[dict[str, Any]]:
    module, inputs = case.module(), case.inputs(2 if settings.quick else 4)
    names = select(settings.device, case.workload, settings.peers, settings.quick)
    forget_compiled()
    contenders = {name: contender(name, module, inputs, settings.backend) for name in names}
    timings = measure(contenders, settings.device, seconds=0.2 if settings.quick else 1.5)
    return [_row(case.workload, str(case.config), case.stage, case.batch, settings, *item) for item in timings.items()]


def _time_network(network: NetworkCase, settings: Settings) -> list[dict[str, Any]]:
    forget_compiled()
    names = select(settings.device, "network", settings.peers, settings.quick)
    contenders = {name: contender(name, network.network, [network.images], settings.backend) for name in names}
    timings = measure(contenders, settings.device, seconds=2 if settings.quick else 10)
    batch = network.images.shape[0]
    return [_row("network", network.config, None, batch, settings, *item) for item in timings.items()]


def _row(
    workload: str, config: str, stage: int | None, batch: int, settings: Settings, provider: str, timing: Timing
) -> dict[str, Any]:
    return {
        "workload": workload,
        "config": config,
        "stage": stage,
        "batch": batch,
        "dtype": settings.dtype,
        "device": settings.device,
        "provider": provider,
        "median_ms": timing.median_ms,
        "p20_ms": timing.p20_ms,
        "p80_ms": timing.p80_ms,
        "peak_mb": timing.peak_mb,
        "repeats": timing.repeats,
    }


def _print_outcome(rows: list[dict[str, Any]], environment: dict[str, Any], network: NetworkCase | None) -> None:
    print(
        f"\nMedian milliseconds of interleaved runs on {environment['device']}, {environment['threads']} threads, "
        f"torch {environment['torch']}, commit {environment['commit']}."
    )
    print("Chains are compared with BatchNorms folded on all sides; a peer's block or network runs as PyTorch runs it.\n")
    print(outcome_table(rows))
    if network is None:
        return
    backend = network.parity[0].backend
    print(f"\n{network.config} on two photographs, all blocks fused (backend {backend}): largest absolute difference from")
    print("the un-accelerated network, and errors relative to float64:")
    head = ("", "difference", "error of ours", "error of eager")
    print(
        format_table(
            head,
            [
                (row.stage, f"{network.differences[row.stage]:.1e}", f"{row.error:.1e}", f"{row.eager_error:.1e}")
                for row in network.parity
            ],
        )
    )


def outcome_table(rows: list[dict[str, Any]]) -> str:
    """One line for each workload, batch, config and stage: every provider's median, and the best peer's over our best."""
    providers = [name for name in PROVIDERS if any(row["provider"] == name for row in rows)]
    cells: dict[tuple[object, ...], dict[str, float]] = {}
    for row in rows:
        stage = "all" if row["stage"] is None else row["stage"]
        key = (row["workload"], row["config"], stage, row["batch"], row["dtype"])
        cells.setdefault(key, {})[row["provider"]] = row["median_ms"]
    lines = []
    for key, times in cells.items():
        peers = {name: ms for name, ms in times.items() if name not in OURS}
        best = min(peers, key=peers.__getitem__)
        ours = min(ms for name, ms in times.items() if name in OURS)
        measured = [f"{times[name]:.3g}" if name in times else "-" for name in providers]
        lines.append([*map(str, key), *measured, f"{peers[best] / ours:.2f}x", best])
    head = ["workload", "config", "stage", "batch", "dtype", *providers, "speed-up", "over the best peer"]
    return format_table(head, lines, left=2)


def command_line(arguments: list[str]) -> str:
    """What the user typed, for the record."""
    return shlex.join(["res2net-fused", *arguments])
