"""What a record times beyond `res2net-fused bench`: networks beside the ResNet-50 of the same FLOPs, and the roofline."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from res2net_fused.bench.candidates import Builder, Built, Model, RunConditions, is_ours, peer, random_tensors
from res2net_fused.bench.exact import CHECKED_IMAGES_OF_NETWORKS, Truth
from res2net_fused.bench.networks import random_network
from res2net_fused.bench.providers import OURS
from res2net_fused.bench.record_file import Record
from res2net_fused.bench.runner import Runner
from res2net_fused.bench.sample_images import calibrate
from res2net_fused.bench.timed_case import BASELINE, Candidate, TimedCase, network_name
from res2net_fused.bench.turns import Outcome
from res2net_fused.bench.work import Work, least_work_of_network, rotation_count
from res2net_fused.chain.tolerances import network_bound
from res2net_fused.models.network import Network
from res2net_fused.patching.accelerate import accelerate, freeze
from res2net_fused.testing.cases import TORCH_DTYPES, WidthScale, channels_last

from .roofline import Rates, floor_ms

IMAGE_SIZE, QUICK_IMAGE_SIZE = 224, 64


class RecordRunner(Runner):
    """Times networks too; the ResNet-50 of the last one stays, since the next one is timed beside it."""

    def __init__(self, conditions: RunConditions, record: Record, rates: Rates | None = None) -> None:
        """rates: None where they could not be measured."""
        super().__init__(conditions, record)
        self.rates = rates
        self._baseline: tuple[object, dict[Candidate, Built], float | None] | None = None

    def floor_ms(self, parts: Sequence[Work], dtype: str) -> float | None:
        return None if self.rates is None else floor_ms(parts, self.rates, dtype)

    def _forget(self, case: TimedCase) -> None:
        if self._baseline is None or self._baseline[0] != _baseline_key(case):
            self._baseline = None
            super()._forget(case)

    def _time(self, case: TimedCase, outcome: Outcome) -> None:
        if case.stage is not None:
            super()._time(case, outcome)
            return
        ours, least = self._network(case, outcome)
        if self._baseline is None:
            others = tuple(candidate for candidate in case.candidates if not is_ours(candidate[0]))
            self._baseline = _baseline_key(case), *self._network(replace(case, config=BASELINE, candidates=others), outcome)
        _, baseline, baseline_floor = self._baseline
        resnet = replace(case, config=BASELINE)
        together = {(case, c): one for c, one in ours.items()} | {(resnet, c): one for c, one in baseline.items()}
        timings = self.take_turns(together, outcome)
        for (timed, candidate), timing in timings.items():
            if timed == resnet:
                outcome.rows.append(self.row(timed, candidate, timing, baseline[candidate], baseline_floor))
                continue
            row = self.row(case, candidate, timing, ours[candidate], least)
            beside = timings.get((resnet, self._same_way(case, candidate)))
            outcome.rows.append(row | {"yardstick_ms": beside and beside.median_ms})

    def _same_way(self, case: TimedCase, candidate: Candidate) -> Candidate:
        """The candidate of the baseline that is compiled and replayed as this one of a Res2Net."""
        name, graph = candidate
        if not is_ours(name):
            return candidate
        return ("compile" if self._compiles(case) else "eager_channels_last", graph)

    def _compiles(self, case: TimedCase) -> bool:
        """Whether `ours` is compiled beyond being accelerated: for whole networks in eval mode."""
        return case.workload == "network" and not self.conditions.quick

    def _network(self, case: TimedCase, outcome: Outcome) -> tuple[dict[Candidate, Built], float | None]:
        """A network's candidates and the milliseconds of its roofline."""
        training = case.workload == "train_step"
        network = build_network(case.config, "float32" if training else case.dtype, self.conditions)
        if training:
            return self.build_steps(case, network, random_images(case.batch, 2, "float32", self.conditions), outcome), None
        size = image_size(self.conditions)
        parts = least_work_of_network(network, (case.batch, 3, size, size), case.dtype)
        moved = sum(part.activations + part.parameters for part in parts)
        images = random_images(case.batch, max(2, rotation_count(moved, self.conditions.l2)), case.dtype, self.conditions)
        truth = Truth(case, network, images, CHECKED_IMAGES_OF_NETWORKS, network_bound)
        builders = network_builders(network, case.dtype, self._compiles(case), self.conditions)
        return self.build(case, builders, images, 2, truth.check, outcome), self.floor_ms(parts, case.dtype)


def _baseline_key(case: TimedCase) -> object:
    """Networks with the same one are timed beside the same ResNet-50; None for a chain or block."""
    return None if case.stage is not None else (case.workload, case.batch, case.dtype, case.candidates)


def network_builders(network: Network, dtype: str, compiles: bool, conditions: RunConditions) -> Builder:
    models: dict[str, Model] = {}

    def build(name: str, graph: bool) -> Model:
        key = OURS[0] if name in OURS else name
        if key not in models:
            if name in OURS:
                ours = freeze(channels_last(accelerate(copy.deepcopy(network), conditions.backend)))
                call: Callable[[Tensor], Tensor] = ours
                if compiles:
                    call = torch.compile(ours, fullgraph=True, dynamic=False)
                models[key] = Model(call, {"backend": conditions.backend, "frozen": True, "compiled": compiles}, ours)
            else:
                models[key] = Model(peer(name, network, dtype, conditions), {})
        return models[key]

    return build


def image_size(conditions: RunConditions) -> int:
    """Rows and columns of the images."""
    return QUICK_IMAGE_SIZE if conditions.quick else IMAGE_SIZE


def build_network(config: WidthScale, dtype: str, conditions: RunConditions) -> Network:
    """Res2Net-50 or, of config 64w1s, ResNet-50, with random weights and fitting statistics; one block a stage if quick."""
    layers = (1, 1, 1, 1) if conditions.quick else None
    network = random_network(network_name(config), layers).to(conditions.device)
    calibrate(network, random_images(4, 1, "float32", conditions)[0])
    return network.requires_grad_(False).to(TORCH_DTYPES[dtype])


def random_images(batch: int, count: int, dtype: str, conditions: RunConditions) -> list[Tensor]:
    """Random images (N, 3, H, W) in channels-last; normal as normalised photographs are."""
    size = image_size(conditions)
    images = random_tensors((batch, 3, size, size), count, dtype, conditions.device, rectified=False)
    return [x.contiguous(memory_format=torch.channels_last) for x in images]
