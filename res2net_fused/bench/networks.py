"""Whole networks on two photographs: compared with float64, timed in turn, and the ratios that they are judged by."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn

from ..accelerate import accelerate
from ..explain import explain
from ..layouts import parts_of
from ..models.network import Network
from ..models.registry import CONFIGURATIONS, create_model, model_name
from ..parity import ParityReport, check_network, convolution_precision, relative_error
from ..reference import ReferenceBottle2neck
from ..tables import format_table
from ..tolerances import network_bound
from . import runtimes
from .measure import Contender, measure
from .photographs import calibrate, photographs
from .progress import progress
from .providers import OURS, PYTORCH, contender, forget_compiled
from .schedule import FIGURE_CONFIGS, YARDSTICK, network_name
from .workloads import TORCH_DTYPES, channels_last

DEFAULT_MODELS = tuple(network_name(config) for config in (*FIGURE_CONFIGS, YARDSTICK))
Row = dict[str, Any]


@dataclass
class NetworkCase:
    """A network, and how what `accelerate` made of a copy of it compares on two photographs; the copy is not kept."""

    name: str
    dtype: str
    network: Network
    images: Tensor  # (2, 3, H, W), of the size that the network is published for
    parity: ParityReport
    differences: dict[str, float]  # by place, the largest absolute one between network and copy
    coverage: str  # how many of the copy's blocks ran fused, such as 16 of 16

    def batch(self, size: int) -> Tensor:
        """(size, 3, H, W): the photographs as often as it takes."""
        return self.images.repeat(-(-size // len(self.images)), 1, 1, 1)[:size].contiguous()


def spelt(name: str) -> str:
    """The name of a network as rows have it, such as res2net50_26w4s. Raises ValueError for one that there is not."""
    return re.sub(r"(?<=\d[cw])_", "", model_name(name))


def random_network(name: str, layers: Sequence[int] | None = None) -> Network:
    """Of plain PyTorch, to be accelerated, with the same random weights at every call; small beside the shortcuts, as in
    trained networks: else every block would amplify the rounding of the last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = create_model(name, layers=layers, fused=False)
    for module in network.modules():
        if isinstance(module, ReferenceBottle2neck):
            nn.init.constant_(parts_of(module).bn3.weight, 0.25)
    return network


def prepare_network(name: str, dtype: str, device: str, backend: str) -> NetworkCase:
    """A network with the statistics of the photographs, and its comparison with float64."""
    images = photographs(CONFIGURATIONS[model_name(name)].image_size)
    network = calibrate(random_network(name), images).requires_grad_(False).to(device, TORCH_DTYPES[dtype])
    images = images.to(device, TORCH_DTYPES[dtype])
    model = channels_last(accelerate(copy.deepcopy(network), backend))
    native_layout = images.contiguous(memory_format=torch.channels_last)
    parity, differences = check_network(network, model, native_layout, spelt(name), dtype)
    reports = explain(model)
    coverage = f"{sum(report.fused is True for report in reports)} of {len(reports)}"
    return NetworkCase(spelt(name), dtype, network, images, parity, differences, coverage)


def time_networks(
    cases: Sequence[NetworkCase], batch: int, names: Sequence[str], device: str, backend: str, repeats: int
) -> list[Row]:
    """Times every provider on every network, all in turn, `repeats` rounds; one row each.

    Raises RuntimeError where a provider as it would be timed computes something else than float64.
    """
    contenders: dict[tuple[str, str], Contender] = {}
    errors: dict[tuple[str, str], float] = {}
    forget_compiled()
    steps = len(cases) * len(names) + repeats
    with (
        progress(f"timing {', '.join(case.name for case in cases)} at batch {batch}", steps, "steps") as bar,
        convolution_precision(cases[0].dtype, device),
        torch._dynamo.config.patch(recompile_limit=64),  # the networks share one class; beyond it they would run eager
    ):
        for case in cases:
            images = case.batch(batch)
            few = images[: len(case.images)]  # what follows are the same photographs
            with torch.inference_mode():
                expected = copy.deepcopy(case.network).double()(few.double())
                allowed = network_bound(relative_error(case.network(few), expected))
            for name in names:
                bar.set_postfix_str(f"preparing {name} of {case.name}")  # exporting and compiling take seconds
                made = contender(name, case.network, [images], backend)
                error = relative_error(made.run()[: len(few)], expected)
                bound = allowed if name in OURS else max(allowed, runtimes.BOUND)
                if not error <= bound:
                    raise RuntimeError(f"{name} on {case.name}: relative error {error:.2g}; at most {bound:.2g} is allowed")
                contenders[case.name, name], errors[case.name, name] = made, error
                bar.update()
        bar.set_postfix_str("")
        timings = measure(
            contenders, device, seconds=0, min_repeats=repeats, max_repeats=repeats, warm_up=1, advance=bar.update
        )
    return [
        timing.row(
            workload="network", config=config, stage=None, batch=batch, dtype=cases[0].dtype, device=device, provider=name,
            error=errors[config, name],
        )  # fmt: skip
        for (config, name), timing in timings.items()
    ]


# Ratios ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkRatios:
    """Of a Res2Net at one batch: our fastest time, and by what it is compared with the other's time and its provider.

    others: "pytorch", the fastest mode of PyTorch on the same network; each runtime by its name; "resnet50", the fastest
    mode of PyTorch on ResNet-50. What was not timed is not there.
    """

    model: str
    batch: int
    provider: str
    ms: float
    others: dict[str, tuple[float, str]]

    def ratio(self, other: str) -> float | None:
        """How many times as long the other takes: above 1, ours is faster."""
        return self.others[other][0] / self.ms if other in self.others else None


def network_ratios(rows: Iterable[Row]) -> list[NetworkRatios]:
    """From rows of one run; networks that ours was not timed on are left out, and so is ResNet-50 itself."""
    times: dict[tuple[str, int], dict[str, float]] = {}
    for row in rows:
        if row["workload"] == "network":
            times.setdefault((row["config"], row["batch"]), {})[row["provider"]] = row["median_ms"]
    found = []
    for (model, batch), by_provider in times.items():
        ours = _fastest(by_provider, OURS)
        if ours is None or model == network_name(YARDSTICK):
            continue
        others = {"pytorch": _fastest(by_provider, PYTORCH)}
        others |= {name: _fastest(by_provider, [name]) for name in runtimes.RUNTIMES}
        others["resnet50"] = _fastest(times.get((network_name(YARDSTICK), batch), {}), PYTORCH)
        found.append(NetworkRatios(model, batch, ours[1], ours[0], {k: v for k, v in others.items() if v is not None}))
    return found


def _fastest(times: dict[str, float], names: Iterable[str]) -> tuple[float, str] | None:
    return min(((times[name], name) for name in names if name in times), default=None)


def ratio_table(ratios: Sequence[NetworkRatios]) -> str:
    """One line for each network and batch; ratios above 1 mean that ours is faster."""
    others = ("pytorch", *runtimes.RUNTIMES, "resnet50")
    head = ["network", "batch", "ours", "ms", "over PyTorch", *(f"over {name}" for name in runtimes.RUNTIMES), "over ResNet-50"]
    lines = []
    for found in ratios:
        cells = []
        for other in others:
            if other not in found.others:
                cells.append("not timed")
                continue
            ms, provider = found.others[other]
            which = "" if other in runtimes.RUNTIMES else f" {provider}"
            cells.append(f"{found.ratio(other):.2f}x ({ms:.4g} ms{which})")
        lines.append([found.model, str(found.batch), found.provider, f"{found.ms:.4g}", *cells])
    return format_table(head, lines, left=1)

