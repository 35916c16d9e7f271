"""Who takes part in a unit of a record: their models, and the modules and inputs that they are built from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..backends.base import BACKENDS
from ..backends.selection import choose, choose_for_training, get_backend
from ..models.network import Network
from ..patching.accelerate import accelerate, freeze
from ..testing.cases import TORCH_DTYPES, Case, Config, channels_last, fused
from .networks import random_network
from .providers import OURS, PROVIDERS, unavailable
from .roofline import Rates, Work, floor_ms
from .sample_images import calibrate
from .schedule import Unit, network_name
from .timing import Contender
from .training import SgdStep, TrainingStep, plain, training_module, training_network
from .turns import Absent


@dataclass(frozen=True)
class Conditions:
    """Of all units in one run. rates: None where they could not be measured. l2: bytes, None on a CPU. run: its number in the
    record. limit_s: seconds for building and checking one contestant, after which it counts as hanging."""

    device: str
    backend: str
    quick: bool
    rates: Rates | None
    l2: int | None
    run: int
    limit_s: float = 420.0

    @property
    def repeats(self) -> int:
        return 3 if self.quick else 50 if self.l2 is not None else 10

    @property
    def turns(self) -> dict[str, Any]:
        """How long `measure` goes on."""
        return {"seconds": 0.5, "min_repeats": self.repeats, "max_repeats": 4 * self.repeats}

    @property
    def image_size(self) -> int:
        return 64 if self.quick else 224

    def floor_ms(self, parts: Sequence[Work], dtype: str) -> float | None:
        """Of the roofline; None where the rates are not known."""
        return None if self.rates is None else floor_ms(parts, self.rates, dtype)


@dataclass
class Model:
    """What is called, what a row says of it beside the times, and of ours, what runs where nothing is compiled around it."""

    call: Callable[[Tensor], Tensor]
    facts: dict[str, object]
    plain: Callable[[Tensor], Tensor] | None = None


@dataclass
class Built:
    """A contestant ready to be timed."""

    contender: Contender
    facts: dict[str, object]


# By provider and whether it will be captured. Raises Absent for one that cannot run here.
Builder = Callable[[str, bool], Model]


def is_ours(name: str) -> bool:
    """Whether a contestant is ours, by backend="auto" or by the name of a backend."""
    return name in OURS or name in BACKENDS


def _peer(name: str, module: nn.Module, dtype: str, conditions: Conditions) -> Callable[[Tensor], Tensor]:
    why = unavailable(conditions.device, dtype).get(name)
    if why is None and (name not in PROVIDERS or torch.device(conditions.device).type not in PROVIDERS[name].devices):
        why = f"{name} is none of the providers on this device"
    if why is not None:
        raise Absent(why)
    return PROVIDERS[name].build(copy.deepcopy(module), "")


def case_builders(case: Case, module: nn.Module, conditions: Conditions) -> Builder:
    problem = case.problem(module)
    compiled: dict[str, Callable[[Tensor], Tensor]] = {}

    def build(name: str, graph: bool) -> Model:
        if not is_ours(name):
            if name not in compiled:
                compiled[name] = _peer(name, module, case.dtype, conditions)
            return Model(compiled[name], {})
        if name in OURS:
            choice = choose(problem, conditions.backend)
            backend, reason = choice.name, choice.reason  # by its name, so that weights are packed for it
        else:
            backend, reason = name, "asked for by its name"
            why = get_backend(backend).why_not(problem)
            if why is not None:
                raise Absent(why)
        model = fused(channels_last(copy.deepcopy(module)), backend)
        frozen = graph and isinstance(model, nn.Module)  # a captured block would fold its BatchNorms at every replay
        if frozen and isinstance(model, nn.Module):
            freeze(model)
        return Model(model, {"backend": backend, "reason": reason, "frozen": frozen}, model)

    return build


def network_builders(network: Network, dtype: str, compiles: bool, conditions: Conditions) -> Builder:
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
                models[key] = Model(_peer(name, network, dtype, conditions), {})
        return models[key]

    return build


def training_builders(network: Network, unit: Unit, conditions: Conditions) -> Builder:
    def build(name: str, graph: bool) -> Model:
        return Model(SgdStep(training_network(network, name, conditions.backend), unit.dtype, name == "compile"), {})

    return build


def training_case_builders(case: Case, conditions: Conditions) -> Builder:
    problem = plain(case).problem(plain(case).module())

    def build(name: str, graph: bool) -> Model:
        if name in BACKENDS:
            try:
                choose_for_training(problem, name)
            except RuntimeError as error:
                raise Absent(str(error)) from None
        return Model(TrainingStep(training_module(case, name, conditions.backend), case.dtype, name == "compile"), {})

    return build


# Modules and inputs ---------------------------------------------------------------------------------------------------


def case_of(unit: Unit, conditions: Conditions) -> Case:
    assert unit.stage is not None  # of a chain or block
    return Case(unit.workload, unit.config, unit.stage, unit.batch, unit.dtype, conditions.device, unit.variant)


def build_network(config: Config, dtype: str, conditions: Conditions) -> Network:
    """Res2Net-50 or, of config 64w1s, ResNet-50, with random weights and fitting statistics; one block a stage if quick."""
    layers = (1, 1, 1, 1) if conditions.quick else None
    network = random_network(network_name(config), layers).to(conditions.device)
    calibrate(network, random_images(4, 1, "float32", conditions)[0])
    return network.requires_grad_(False).to(TORCH_DTYPES[dtype])


def random_images(batch: int, count: int, dtype: str, conditions: Conditions) -> list[Tensor]:
    """Random images (N, 3, H, W) in channels-last; normal as normalised photographs are."""
    shape = (batch, 3, conditions.image_size, conditions.image_size)
    images = random_tensors(shape, count, dtype, conditions.device, rectified=False)
    return [x.contiguous(memory_format=torch.channels_last) for x in images]


def random_tensors(shape: Sequence[int], count: int, dtype: str, device: str, rectified: bool = True) -> list[Tensor]:
    """Made where they are used: the large ones would take the CPU seconds. Non-negative if `rectified`, as behind a ReLU."""
    generator = torch.Generator(device).manual_seed(1)
    tensors = [torch.randn(shape, generator=generator, dtype=TORCH_DTYPES[dtype], device=device) for _ in range(count)]
    return [x.relu_() for x in tensors] if rectified else tensors
