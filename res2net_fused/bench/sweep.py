"""The main job: the parity gate, then scale against latency for chains and blocks, their training, then whole networks."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..parity import check_cases, convolution_precision
from ..tables import format_table
from . import results, runtimes
from .measure import Contender, measure
from .networks import NetworkCase, network_ratios, prepare_network, random_network, ratio_table, time_networks
from .photographs import photographs
from .progress import progress
from .providers import OURS, PROVIDERS, contender, forget_compiled, select, unavailable
from .schedule import FIGURE_CONFIGS, YARDSTICK, network_name
from .training import SgdStep, TrainingStep, check_training_case, plain, training_module, training_network, with_inner_chains
from .workloads import TRAINED, Case, Config, cases

WORKLOADS = ("chain", "block")
TRAIN = ("default", "all", "none")
_TOGETHER = 6  # networks that take turns with each other: the copies of more would fill a machine's memory
_TRAINERS = ("ours", "eager", "eager_channels_last")


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
    models: tuple[str, ...] = ()
    model_batches: tuple[int, ...] = ()
    train: str = "none"  # of TRAIN

    def cases(self) -> list[Case]:
        return cases(WORKLOADS, self.configs, self.batches, self.dtype, self.device)

    def trained_cases(self) -> list[Case]:
        """Chains and blocks whose forward and backward are timed; by default those of the figures."""
        if self.train == "none":
            return []
        some = tuple(config for config in FIGURE_CONFIGS if config in self.configs)
        if self.train == "all":
            return cases(TRAINED, self.configs, self.batches, self.dtype, self.device)
        chains = cases(["train_chain"], some, self.batches[:1], self.dtype, self.device)
        return chains + cases(["train_block"], some[:1], self.batches[:1], self.dtype, self.device)

    def trained_networks(self) -> tuple[str, ...]:
        return tuple(name for name in self.models if name != network_name(YARDSTICK)) if self.train == "all" else ()

    def training_providers(self) -> list[str]:
        return [*_TRAINERS, *(["compile"] if self.peers == "all" else [])]

    def providers(self, workload: str) -> list[str]:
        return select(self.device, workload, self.peers, self.quick, self.dtype)


def run_sweep(settings: Settings, out: Path, command: str) -> int:
    """Checks, measures, prints, and writes `out`/bench-<device>.json and .png; returns the exit status."""
    todo = settings.cases()
    with progress("parity against float64", len(todo)) as bar:
        parity = check_cases(todo, settings.backend, bar.update)
    trained = settings.trained_cases()
    checked = with_inner_chains(trained)
    with progress("gradients against float64", len(checked)) as bar, convolution_precision(settings.dtype, settings.device):
        for case in checked:
            parity += check_training_case(case, "ours", settings.backend)
            bar.update()
    networks = []
    for name in settings.models:
        print(f"{name} on two photographs against float64", flush=True)
        networks.append(prepare_network(name, settings.dtype, settings.device, settings.backend))
        parity += networks[-1].parity
    print("\nLargest error of each kind (relative to float64):")
    print(parity.worst())
    if not parity.ok:
        print(f"\nThe parity gate is red, so nothing is timed. Misses:\n{parity.misses}")
        return 1
    rows = []
    with progress("timing chains and blocks", len(todo)) as bar, convolution_precision(settings.dtype, settings.device):
        for case in todo:
            rows += _time_case(case, settings, bar)
            bar.update()
    with progress("timing forward and backward", len(trained)) as bar, convolution_precision(settings.dtype, settings.device):
        for case in trained:
            rows += _time_trained(case, settings)
            bar.update()
    for name in settings.trained_networks():
        for batch in settings.model_batches:
            print(f"a training step of {name} at batch {batch}", flush=True)
            rows += _time_trained_network(name, batch, settings)
    rows += _time_networks(networks, settings)
    environment = results.environment(settings.device, command) | {"peers": runtimes.versions()}
    stem = f"bench-{torch.device(settings.device).type}"
    results.write(out / f"{stem}.json", environment, rows)
    _print_outcome(rows, environment, networks, unavailable(settings.device, settings.dtype))
    from .plot import plot  # matplotlib takes a second to import

    plot(results.read(out / f"{stem}.json"), out / f"{stem}.png")
    print(f"\nWritten: {out / stem}.json and {out / stem}.png")
    return 0


def _time_networks(networks: list[NetworkCase], settings: Settings) -> list[dict[str, Any]]:
    rows, repeats = [], 3 if settings.quick else 10
    for batch in settings.model_batches:
        for i in range(0, len(networks), _TOGETHER):
            some, names = networks[i : i + _TOGETHER], settings.providers("network")
            rows += time_networks(some, batch, names, settings.device, settings.backend, repeats)
    return rows


def _time_case(case: Case, settings: Settings, bar: Any) -> list[dict[str, Any]]:
    module, inputs = case.module(), case.inputs(2 if settings.quick else 4)
    forget_compiled()
    contenders = {}
    for name in settings.providers(case.workload):
        bar.set_postfix_str(f"preparing {name}")  # exporting and compiling take seconds
        contenders[name] = contender(name, module, inputs, settings.backend)
        contenders[name].run()
    bar.set_postfix_str("")
    timings = measure(contenders, settings.device, seconds=0.2 if settings.quick else 1.5)
    return [
        timing.row(
            workload=case.workload, config=str(case.config), stage=case.stage, batch=case.batch, dtype=case.dtype,
            device=case.device, provider=name,
        )  # fmt: skip
        for name, timing in timings.items()
    ]


def _time_trained(case: Case, settings: Settings) -> list[dict[str, Any]]:
    forget_compiled()
    inputs = plain(case).inputs(2)
    contenders = {}
    for name in settings.training_providers():
        step = TrainingStep(training_module(case, name, settings.backend), case.dtype, name == "compile")
        contenders[name] = Contender(step, _own(inputs, name))
        contenders[name].run()
    timings = measure(contenders, settings.device, seconds=0.2 if settings.quick else 1.0, min_repeats=3)
    case_fields = {name: getattr(case, name) for name in ("workload", "stage", "batch", "dtype", "device")}
    return [timing.row(**case_fields, config=str(case.config), provider=name) for name, timing in timings.items()]


def _time_trained_network(model: str, batch: int, settings: Settings) -> list[dict[str, Any]]:
    forget_compiled()
    network = random_network(model).to(settings.device)
    images = photographs().to(settings.device)
    images = images.repeat(-(-batch // len(images)), 1, 1, 1)[:batch]
    contenders = {}
    for name in settings.training_providers():
        step = SgdStep(training_network(network, name, settings.backend), settings.dtype, name == "compile")
        contenders[name] = Contender(step, _own([images], name))
    timings = measure(contenders, settings.device, seconds=1.5, min_repeats=3, warm_up=1)
    fields = {"workload": "train_step", "config": model, "stage": None, "batch": batch}
    return [
        timing.row(**fields, dtype=settings.dtype, device=settings.device, provider=name) for name, timing in timings.items()
    ]


def _own(inputs: list[torch.Tensor], name: str) -> list[torch.Tensor]:
    layout = torch.channels_last if PROVIDERS[name].channels_last else torch.contiguous_format
    return [x.clone(memory_format=layout) for x in inputs]


def _print_outcome(
    rows: list[dict[str, Any]], environment: dict[str, Any], networks: list[NetworkCase], absent: dict[str, str]
) -> None:
    print(
        f"\nMedian milliseconds of interleaved runs on {environment['device']}, {environment['threads']} threads, "
        f"torch {environment['torch']}, commit {environment['commit']}."
    )
    print("Chains are compared with BatchNorms folded on all sides; a peer's block or network runs as PyTorch runs it.")
    print("train_*: forward and backward with BatchNorm in training mode, of a network a step of SGD.\n")
    print(outcome_table(rows))
    for name, reason in absent.items():
        print(f"not timed, {name}: {reason}")
    if not networks:
        return
    print("\nNetworks, times of the others over our fastest (above 1x, ours is faster):")
    print(ratio_table(network_ratios(rows)))
    print("\nNetworks on two photographs: how many blocks run fused, largest absolute difference from the un-accelerated")
    print("network, and errors relative to float64:")
    head = ("network", "", "fused", "backend", "difference", "error of ours", "error of eager")
    lines = [
        (case.name, row.stage, case.coverage, row.backend, f"{case.differences[row.stage]:.1e}", f"{row.error:.1e}",
         f"{row.eager_error:.1e}")
        for case in networks
        for row in case.parity
    ]  # fmt: skip
    print(format_table(head, lines, left=4))


def outcome_table(rows: list[dict[str, Any]]) -> str:
    """One line for each workload, batch, config and stage: every provider's median, and the best peer's over our best."""
    providers = [name for name in PROVIDERS if any(row["provider"] == name for row in rows)]
    cells: dict[tuple[object, ...], dict[str, float]] = {}
    for row in rows:
        stage = "all" if row["stage"] is None else row["stage"]
        key: tuple[object, ...] = (row["workload"], row["config"], stage, row["batch"], row["dtype"])
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
