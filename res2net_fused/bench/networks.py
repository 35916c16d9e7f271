"""Whole networks on two photographs: compared with float64, and the ratios that their times are judged by."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .._tables import format_table
from ..backends.selection import choose
from ..models.network import Network
from ..models.registry import CONFIGURATIONS, create_model, model_name
from ..modules.block_parts import parts_of
from ..modules.block_state import STATE, FusedModule
from ..modules.reference_blocks import ReferenceBottle2neck
from ..patching.accelerate import accelerate
from ..patching.explain import explain
from ..testing.cases import TORCH_DTYPES, channels_last
from ..testing.parity import ParityReport, check_network, convolution_precision
from . import runtimes
from .floor import FLOORS
from .providers import OURS, PYTORCH, label
from .sample_images import calibrate, sample_images
from .timed_case import BASELINE, TARGET_CONFIGS, network_name

DEFAULT_MODELS = tuple(network_name(config) for config in (*TARGET_CONFIGS, BASELINE))
RUNTIMES = (*runtimes.RUNTIMES, runtimes.TENSORRT)  # that are no mode of PyTorch
Row = dict[str, Any]


@dataclass
class NetworkCase:
    """A network, and how what `accelerate` made of a copy of it compares on two photographs; the copy is not kept."""

    name: str
    dtype: str
    network: Network
    images: Tensor  # (2, 3, H, W), of the size that the network is published for
    parity: ParityReport = field(default_factory=ParityReport)  # empty before it is compared
    differences: dict[str, float] = field(default_factory=dict)  # by place, the largest absolute one between network and copy
    coverage: str = ""  # how many of the copy's blocks ran fused, such as 16 of 16
    choices: list[tuple[str, str]] = field(default_factory=list)  # backends of the copy's blocks, and why it was those

    def batch(self, size: int) -> Tensor:
        """(size, 3, H, W): the photographs as often as it takes."""
        return self.images.repeat(-(-size // len(self.images)), 1, 1, 1)[:size].contiguous()

    def table(self) -> list[list[str]]:
        """Cells of a line for each place that was compared."""
        return [
            [self.name, row.stage, self.coverage, row.backend, f"{self.differences[row.stage]:.1e}", f"{row.error:.1e}",
             f"{row.eager_error:.1e}"]
            for row in self.parity
        ]  # fmt: skip


def spelt(name: str) -> str:
    """The name of a network as rows have it, such as res2net50_26w4s. Raises ValueError for one that there is not."""
    return re.sub(r"(?<=\d[cw])_", "", model_name(name))


def random_network(name: str, layers: Sequence[int] | None = None) -> Network:
    """A network of plain PyTorch, to be accelerated, with the same random weights at every call; small beside the shortcuts, as
    in trained networks: else every block would amplify the rounding of the last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = create_model(name, layers=layers, fused=False)
    for module in network.modules():
        if isinstance(module, ReferenceBottle2neck):
            nn.init.constant_(parts_of(module).bn3.weight, 0.25)
    return network


def plain_network(name: str, dtype: str, device: str) -> NetworkCase:
    """A network with the statistics of the photographs, not compared yet."""
    images = sample_images(CONFIGURATIONS[model_name(name)].image_size)
    network = calibrate(random_network(name), images).requires_grad_(False).to(device, TORCH_DTYPES[dtype])
    return NetworkCase(spelt(name), dtype, network, images.to(device, TORCH_DTYPES[dtype]))


def compare(case: NetworkCase, backend: str) -> NetworkCase:
    """The case with its comparison with float64. RuntimeError where a block would not run fused."""
    model = channels_last(accelerate(copy.deepcopy(case.network), backend))
    images = case.images.contiguous(memory_format=torch.channels_last)
    case.parity, case.differences = check_network(case.network, model, images, case.name, case.dtype)
    reports = explain(model)
    case.coverage = f"{sum(report.fused is True for report in reports)} of {len(reports)}"
    states = [getattr(block, STATE) for block in model.modules() if isinstance(block, FusedModule)]
    with convolution_precision(case.dtype, case.images.device):
        choices = [choose(state.last_problem, backend) for state in states if state.last_problem is not None]
    case.choices = list(dict.fromkeys((choice.name, choice.reason) for choice in choices))
    return case


def prepare_network(name: str, dtype: str, device: str, backend: str) -> NetworkCase:
    return compare(plain_network(name, dtype, device), backend)


# Ratios ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NetworkRatios:
    """What a Res2Net took at one batch by one form of ours, and by what it is compared with the other's time and provider.

    others: "pytorch", the fastest mode of PyTorch on the same network; each runtime by its name; "resnet50", the fastest
    mode of PyTorch on ResNet-50. floors: milliseconds by the fields of FLOORS. What was not timed is not there.
    """

    model: str
    batch: int
    provider: str
    ms: float
    others: dict[str, tuple[float, str]]
    floors: dict[str, float] = field(default_factory=dict)

    def ratio(self, other: str) -> float | None:
        """How many times as long the other takes: above 1, ours is faster."""
        return self.others[other][0] / self.ms if other in self.others else None

    def over_floor(self, name: str) -> float | None:
        """How many times the floor ours takes: 1 at best."""
        return self.ms / self.floors[name] if name in self.floors else None


def network_ratios(rows: Iterable[Row]) -> list[NetworkRatios]:
    """The ratios of one run's rows, by network: of every form of ours that was timed.

    Networks that ours was not timed on are left out, and so is ResNet-50 itself.
    """
    by_case: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row["workload"] == "network":
            by_case.setdefault((row["config"], row["batch"]), []).append(row)
    found = []
    for (model, batch), of_case in by_case.items():
        forms = [form for name in OURS if (form := _fastest(of_case, [name])) is not None]
        if not forms or model == network_name(BASELINE):
            continue
        others = {"pytorch": _fastest(of_case, PYTORCH)}
        others |= {name: _fastest(of_case, [name]) for name in RUNTIMES}
        others["resnet50"] = _fastest(by_case.get((network_name(BASELINE), batch), []), PYTORCH)
        timed = {k: v for k, v in others.items() if v is not None}
        floors = {name: row[name] for row in of_case for name in FLOORS if name in row}
        found += [NetworkRatios(model, batch, name, ms, timed, floors) for ms, name in forms]
    return found


def _fastest(rows: Iterable[Row], names: Iterable[str]) -> tuple[float, str] | None:
    return min(((row["median_ms"], label(row)) for row in rows if row["provider"] in names), default=None)


def ratio_table(ratios: Sequence[NetworkRatios]) -> str:
    """One line for each network and batch; ratios above 1 mean that ours is faster, and those of a floor are ours over it."""
    measured = [name for name in RUNTIMES if any(name in found.others for found in ratios)]
    others = ("pytorch", *measured, "resnet50")
    head = ["network", "batch", "ours", "ms", "over PyTorch", *(f"over {name}" for name in measured), "over ResNet-50"]
    floors = {name: text for name, text in FLOORS.items() if any(name in found.floors for found in ratios)}
    head += [f"ms / {text}" for text in floors.values()]
    lines = []
    for found in ratios:
        cells = []
        for other in others:
            if other not in found.others:
                cells.append("not timed")
                continue
            ms, provider = found.others[other]
            which = "" if other in measured else f" {provider}"
            cells.append(f"{found.ratio(other):.2f}x ({ms:.4g} ms{which})")
        for name in floors:
            over = found.over_floor(name)
            cells.append("not timed" if over is None else f"{over:.2f}x ({found.floors[name]:.4g} ms)")
        lines.append([found.model, str(found.batch), found.provider, f"{found.ms:.4g}", *cells])
    return format_table(head, lines, left=1)
