"""Who is timed on a case: the models of the candidates, and the modules and inputs that they are built from."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._timing import Contender
from ..backends.base import BACKENDS
from ..backends.selection import choose, choose_for_training, get_backend
from ..models.network import Network
from ..patching.accelerate import freeze
from ..testing.cases import TORCH_DTYPES, Case, channels_last, fused
from .providers import OURS, PROVIDERS, unavailable
from .timed_case import TimedCase
from .training import SgdStep, TrainingStep, plain, training_module, training_network
from .turns import Absent


@dataclass(frozen=True)
class RunConditions:
    """What all cases of one run share. l2: bytes, None on a CPU. run: its number in the record. limit_s: seconds for building
    and checking one candidate, after which it counts as hanging."""

    device: str
    backend: str
    quick: bool
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


@dataclass
class Model:
    """What is called, what a row says of it beside the times, and of ours, what runs where nothing is compiled around it."""

    call: Callable[[Tensor], Tensor]
    facts: dict[str, object]
    plain: Callable[[Tensor], Tensor] | None = None


@dataclass
class Built:
    """A candidate ready to be timed."""

    contender: Contender
    facts: dict[str, object]


# By provider and whether it will be captured. Raises Absent for one that cannot run here.
Builder = Callable[[str, bool], Model]


def is_ours(name: str) -> bool:
    """Whether a candidate is ours, by backend="auto" or by the name of a backend."""
    return name in OURS or name in BACKENDS


def peer(name: str, module: nn.Module, dtype: str, conditions: RunConditions) -> Callable[[Tensor], Tensor]:
    """A copy of the module as that provider runs it; Absent for one that cannot run here."""
    why = unavailable(conditions.device, dtype).get(name)
    if why is None and (name not in PROVIDERS or torch.device(conditions.device).type not in PROVIDERS[name].devices):
        why = f"{name} is none of the providers on this device"
    if why is not None:
        raise Absent(why)
    return PROVIDERS[name].build(copy.deepcopy(module), "")


def case_builders(case: Case, module: nn.Module, conditions: RunConditions) -> Builder:
    problem = case.problem(module)
    compiled: dict[str, Callable[[Tensor], Tensor]] = {}

    def build(name: str, graph: bool) -> Model:
        if not is_ours(name):
            if name not in compiled:
                compiled[name] = peer(name, module, case.dtype, conditions)
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


def training_builders(network: Network, case: TimedCase, conditions: RunConditions) -> Builder:
    def build(name: str, graph: bool) -> Model:
        return Model(SgdStep(training_network(network, name, conditions.backend), case.dtype, name == "compile"), {})

    return build


def training_case_builders(case: Case, conditions: RunConditions) -> Builder:
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


def module_case(case: TimedCase, conditions: RunConditions) -> Case:
    """The chain or block that is timed, on the device of this run."""
    assert case.stage is not None  # it is no network
    return Case(case.workload, case.config, case.stage, case.batch, case.dtype, conditions.device, case.variant)


def random_tensors(shape: Sequence[int], count: int, dtype: str, device: str, rectified: bool = True) -> list[Tensor]:
    """Made where they are used: the large ones would take the CPU seconds. Non-negative if `rectified`, as behind a ReLU."""
    generator = torch.Generator(device).manual_seed(1)
    tensors = [torch.randn(shape, generator=generator, dtype=TORCH_DTYPES[dtype], device=device) for _ in range(count)]
    return [x.relu_() for x in tensors] if rectified else tensors
