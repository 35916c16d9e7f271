"""How one unit of a record is checked and timed: its contestants built, rotated past the L2, and run in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
import torch._dynamo.config
from torch import Tensor, nn

from ..accelerate import accelerate, freeze
from ..backends.selection import choose, choose_for_training, get_backend
from ..chain import BACKENDS
from ..models.network import Network
from ..parity import ParityReport, ParityRow, check_case, check_network, relative_error
from ..tolerances import network_bound
from .measure import Contender, GraphedContender, Timing, measure
from .networks import random_network
from .photographs import calibrate
from .providers import OURS, PROVIDERS, forget_compiled
from .record_file import Row, failure_name
from .roofline import Rates, Work, floor_ms, least_work, least_work_of_network, rotation_count
from .schedule import YARDSTICK, Contestant, Unit, network_name
from .training import (
    SgdStep,
    TrainingStep,
    autocast,
    check_training_case,
    plain,
    training_module,
    training_network,
    with_inner_chains,
)
from .workloads import TORCH_DTYPES, TRAINED, Case, Config, channels_last, fused

_CHECKED_IMAGES = 2  # of a network in the parity gate


class RedGate(RuntimeError):
    """A result missed its bound: nothing may be timed."""

    def __init__(self, misses: ParityReport) -> None:
        super().__init__(f"the parity gate is red:\n{misses}")


@dataclass(frozen=True)
class Conditions:
    """Of all units in one call. run: its number in the record. l2: bytes, None on a CPU."""

    device: str
    backend: str
    quick: bool
    rates: Rates
    l2: int | None
    run: int

    @property
    def repeats(self) -> int:
        return 3 if self.quick else 50 if self.l2 is not None else 10

    @property
    def image_size(self) -> int:
        return 64 if self.quick else 224


@dataclass
class Built:
    """A contestant ready to be timed, and what its row says beside the times."""

    contender: Contender
    facts: dict[str, object]


@dataclass
class Outcome:
    """Rows of a unit, and by unit and provider why there is none."""

    rows: list[Row] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)


# The parity gate ------------------------------------------------------------------------------------------------------


def gate(units: Sequence[Unit], conditions: Conditions) -> ParityReport:
    """Compares with float64 whatever of ours these units would time. Raises RedGate on a miss."""
    report = ParityReport()
    for unit in units:
        if unit.contestants[0][0] not in OURS:
            continue
        if unit.workload == "network":
            report += _check_network(unit, conditions)
        elif unit.workload == "train_step":
            report.append(_check_training(unit, conditions))
        elif unit.workload in TRAINED:
            report += _check_trained(unit, conditions)
        else:
            case = _case(unit, conditions)
            backend = None if conditions.backend == "auto" else conditions.backend
            if backend is None or get_backend(backend).why_not(case.problem(case.module())) is None:
                report += check_case(case, backend)  # what cannot run is a recorded failure of its row, not a miss
        if report.misses:
            raise RedGate(report.misses)
    return report


def _check_trained(unit: Unit, conditions: Conditions) -> ParityReport:
    """Of ours what can train here; what cannot is a recorded failure of its row, not a miss."""
    case, report = _case(unit, conditions), ParityReport()
    problem = plain(case).problem(plain(case).module())
    for name in dict.fromkeys(name for name, _ in unit.contestants if name in OURS or name in BACKENDS):
        try:
            choose_for_training(problem, conditions.backend if name in OURS else name)
        except RuntimeError:
            continue
        for one in with_inner_chains([case]):
            report += check_training_case(one, name, conditions.backend)
    return report


def _check_network(unit: Unit, conditions: Conditions) -> ParityReport:
    network = build_network(unit.config, unit.dtype, conditions)
    images = _images(_CHECKED_IMAGES, 1, unit.dtype, conditions)[0]
    return check_network(network, _ours(network, conditions), images, unit.config_name, unit.dtype)[0]


def _check_training(unit: Unit, conditions: Conditions) -> ParityRow:
    """Logits in training mode under autocast, BatchNorm with the statistics of the batch."""
    network = build_network(unit.config, "float32", conditions).train()
    images = _images(_CHECKED_IMAGES, 1, "float32", conditions)[0]
    with torch.no_grad():
        expected = copy.deepcopy(network).double()(images.double())
        with autocast(unit.dtype, conditions.device):
            eager = relative_error(copy.deepcopy(network)(images), expected)
            error = relative_error(accelerate(copy.deepcopy(network), conditions.backend)(images), expected)
    what = unit.workload, unit.config_name, "logits", _CHECKED_IMAGES, conditions.backend, unit.dtype
    return ParityRow(*what, error, eager, network_bound(eager))


# One unit -------------------------------------------------------------------------------------------------------------


class Contests:
    """Times units; the ResNet-50 of the last network stays, since the next one is timed beside it."""

    def __init__(self, conditions: Conditions) -> None:
        self.conditions = conditions
        self._yardstick: tuple[object, dict[Contestant, Built], dict[str, str], float | None] | None = None

    def time(self, unit: Unit) -> Outcome:
        """Builds, warms up and times a unit's contestants in turn. Raises RedGate where a compiled network is wrong."""
        if self._yardstick is None or self._yardstick[0] != _yardstick_key(unit):
            self._yardstick = None
            forget_compiled()
        torch._dynamo.config.recompile_limit = 64  # several networks share one class; beyond it they would run eager
        with _fastest_cudnn():
            return self._time_network(unit) if unit.stage is None else self._time_case(unit)

    def _time_case(self, unit: Unit) -> Outcome:
        case, outcome = _case(unit, self.conditions), Outcome()
        if unit.workload in TRAINED:
            return self._time_training_case(unit, case, outcome)
        module = case.module()
        shape = (unit.batch, case.channels, case.input_size, case.input_size)
        work = least_work(module, shape, unit.dtype)
        inputs = _random(shape, rotation_count(work.activations, self.conditions.l2), unit.dtype, self.conditions.device)
        builders = _case_builders(case, module, self.conditions)
        built = _build(unit, builders, inputs, 8, outcome)
        timings = self._measure(built)
        least = self._floor([work], unit.dtype)
        for contestant, timing in timings.items():
            outcome.rows.append(self._row(unit, contestant, timing, built[contestant], least))
        return outcome

    def _time_training_case(self, unit: Unit, case: Case, outcome: Outcome) -> Outcome:
        shape = unit.batch, plain(case).channels, case.input_size, case.input_size
        inputs = _random(shape, 2, "float32", self.conditions.device)
        built = _build(unit, _training_case_builders(case, self.conditions), inputs, 1, outcome)
        for contestant, timing in self._measure(built).items():
            outcome.rows.append(self._row(unit, contestant, timing, built[contestant], None))
        return outcome

    def _time_network(self, unit: Unit) -> Outcome:
        outcome = Outcome()
        ours, least = self._network(unit, outcome)
        if self._yardstick is None:
            others = tuple(contestant for contestant in unit.contestants if contestant[0] not in (*OURS, *BACKENDS))
            peers = replace(unit, config=YARDSTICK, contestants=others)
            of_peers = Outcome()
            built, floor = self._network(peers, of_peers)
            self._yardstick = _yardstick_key(unit), built, of_peers.failures, floor
        _, yardstick, failures, yardstick_floor = self._yardstick
        outcome.failures |= failures
        timings = self._measure({**{(False, c): b for c, b in ours.items()}, **{(True, c): b for c, b in yardstick.items()}})
        for (is_yardstick, contestant), timing in timings.items():
            if is_yardstick:
                named = replace(unit, config=YARDSTICK)
                row = self._row(named, contestant, timing, yardstick[contestant], yardstick_floor)
            else:
                row = self._row(unit, contestant, timing, ours[contestant], least)
                peer = timings.get((True, self._same_way(unit, contestant)))
                row["yardstick_ms"] = peer and peer.median_ms
            outcome.rows.append(row)
        return outcome

    def _same_way(self, unit: Unit, contestant: Contestant) -> Contestant:
        """The contestant of the yardstick that is compiled and replayed as this one of a Res2Net."""
        name, graph = contestant
        if name not in OURS and name not in BACKENDS:
            return contestant
        return ("compile" if self._compiles(unit) else "eager_channels_last", graph)

    def _compiles(self, unit: Unit) -> bool:
        """Whether `ours` is compiled beyond being accelerated: for whole networks in eval mode."""
        return unit.workload == "network" and not self.conditions.quick

    def _network(self, unit: Unit, outcome: Outcome) -> tuple[dict[Contestant, Built], float | None]:
        """A network's contestants and the milliseconds of its roofline."""
        training = unit.workload == "train_step"
        network = build_network(unit.config, "float32" if training else unit.dtype, self.conditions)
        shape = (unit.batch, 3, self.conditions.image_size, self.conditions.image_size)
        if training:
            images = _images(unit.batch, 2, "float32", self.conditions)
            builders = _training_builders(network, unit, self.conditions)
            return _build(unit, builders, images, 1, outcome), None
        parts = least_work_of_network(network, shape, unit.dtype)
        moved = sum(part.activations + part.parameters for part in parts)
        images = _images(unit.batch, max(2, rotation_count(moved, self.conditions.l2)), unit.dtype, self.conditions)
        built = _build(unit, _network_builders(network, self._compiles(unit), self.conditions), images, 2, outcome)
        self._check_built(unit, network, built, images[0])
        return built, self._floor(parts, unit.dtype)

    def _check_built(self, unit: Unit, network: Network, built: Mapping[Contestant, Built], images: Tensor) -> None:
        """Logits of `ours` as timed: compiling may have gone wrong where the accelerated model was right."""
        report = ParityReport()
        with torch.inference_mode():
            expected: Tensor | None = None
            eager = 0.0
            for (name, graph), one in built.items():
                if name not in OURS:
                    continue
                if expected is None:
                    few = images[:_CHECKED_IMAGES]
                    expected = copy.deepcopy(network).double()(few.double())
                    eager = relative_error(network(few), expected)
                error = relative_error(one.contender.model(images)[:_CHECKED_IMAGES], expected)
                label = "logits, graph" if graph else "logits"
                bound = network_bound(eager)
                report.append(
                    ParityRow(unit.workload, unit.config_name, label, unit.batch, name, unit.dtype, error, eager, bound)
                )
        if report.misses:
            raise RedGate(report.misses)

    def _measure(self, built: Mapping) -> dict:
        contenders = {key: one.contender for key, one in built.items()}
        repeats = self.conditions.repeats
        return measure(contenders, self.conditions.device, seconds=0.5, min_repeats=repeats, max_repeats=4 * repeats)

    def _floor(self, parts: Sequence[Work], dtype: str) -> float:
        return floor_ms(parts, self.conditions.rates, dtype)

    def _row(self, unit: Unit, contestant: Contestant, timing: Timing, built: Built, least: float | None) -> Row:
        return make_row(unit, contestant, timing, self.conditions, least) | built.facts | {"calls": built.contender.calls}


def _yardstick_key(unit: Unit) -> object:
    """Networks with the same one are timed beside the same ResNet-50; None for a chain or block."""
    return None if unit.stage is not None else (unit.workload, unit.batch, unit.dtype, unit.contestants)


def make_row(unit: Unit, contestant: Contestant, timing: Timing, conditions: Conditions, least: float | None) -> Row:
    """least: milliseconds of the roofline, None where there is none to state."""
    name, graph = contestant
    row = timing.row(
        workload=unit.workload, config=unit.config_name, stage=unit.stage, variant=unit.variant, batch=unit.batch,
        dtype=unit.dtype, device=conditions.device, provider=name, graph=graph, run=conditions.run,
    )  # fmt: skip
    return row if least is None else row | {"floor_ms": least, "roofline_share": least / timing.median_ms}


@contextmanager
def _fastest_cudnn() -> Iterator[None]:
    """cuDNN tries its algorithms for each shape, which is to the good of the peers."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


# Contestants ----------------------------------------------------------------------------------------------------------

# By provider and whether it will be captured: the model to call, and facts for its row.
Builder = Callable[[str, bool], tuple[Callable[[Tensor], Tensor], dict[str, object]]]


def _build(
    unit: Unit, builder: Builder, inputs: Sequence[Tensor], min_calls: int, outcome: Outcome
) -> dict[Contestant, Built]:
    """Every contestant that can be built here, warmed up; of the others the reason goes to `outcome`."""
    built: dict[Contestant, Built] = {}
    for name, graph in unit.contestants:
        try:
            model, facts = builder(name, graph)
            layout = torch.channels_last if name not in PROVIDERS or PROVIDERS[name].channels_last else torch.contiguous_format
            own = [x.clone(memory_format=layout) for x in inputs]  # or one contestant would warm the L2 for the next
            contender = GraphedContender(model, own, min_calls) if graph else Contender(model, own)
            contender.run()
        except Exception as error:  # a peer's compiler may raise anything
            if "CUDA error" in str(error):
                raise  # nothing after it on this device can be trusted
            outcome.failures[failure_name(unit, name, graph)] = f"{type(error).__name__}: {str(error).strip()[:300]}"
            continue
        built[name, graph] = Built(contender, facts)
    return built


def _case_builders(case: Case, module: nn.Module, conditions: Conditions) -> Builder:
    problem = case.problem(module)
    compiled: dict[str, Callable[[Tensor], Tensor]] = {}

    def build(name: str, graph: bool):
        if name in PROVIDERS and name not in OURS:
            if name not in compiled:
                compiled[name] = PROVIDERS[name].build(copy.deepcopy(module), "")
            return compiled[name], {}
        if name in OURS:
            backend = choose(problem, conditions.backend).name  # by its name, so that weights are packed for it
        else:
            backend = name
            why = get_backend(backend).why_not(problem)
            if why is not None:
                raise RuntimeError(why)
        model = fused(channels_last(copy.deepcopy(module)), backend)
        frozen = graph and isinstance(model, nn.Module)  # a captured block would fold its BatchNorms at every replay
        if frozen and isinstance(model, nn.Module):
            freeze(model)
        return model, {"backend": backend, "frozen": frozen}

    return build


def _network_builders(network: Network, compiles: bool, conditions: Conditions) -> Builder:
    models: dict[str, tuple[Callable[[Tensor], Tensor], dict[str, object]]] = {}

    def build(name: str, graph: bool):
        key = OURS[0] if name in OURS else name
        if key not in models:
            if name in OURS:
                model: Callable[[Tensor], Tensor] = _ours(network, conditions)
                if compiles:
                    model = torch.compile(model, fullgraph=True, dynamic=False)
                models[key] = model, {"backend": conditions.backend, "frozen": True, "compiled": compiles}
            else:
                models[key] = PROVIDERS[name].build(copy.deepcopy(network), ""), {}
        return models[key]

    return build


def _ours(network: Network, conditions: Conditions) -> Network:
    return freeze(channels_last(accelerate(copy.deepcopy(network), conditions.backend)))


def _training_builders(network: Network, unit: Unit, conditions: Conditions) -> Builder:
    def build(name: str, graph: bool):
        return SgdStep(training_network(network, name, conditions.backend), unit.dtype, name == "compile"), {}

    return build


def _training_case_builders(case: Case, conditions: Conditions) -> Builder:
    def build(name: str, graph: bool):
        return TrainingStep(training_module(case, name, conditions.backend), case.dtype, name == "compile"), {}

    return build


# Modules and inputs ---------------------------------------------------------------------------------------------------


def _case(unit: Unit, conditions: Conditions) -> Case:
    assert unit.stage is not None  # of a chain or block
    return Case(unit.workload, unit.config, unit.stage, unit.batch, unit.dtype, conditions.device, unit.variant)


def build_network(config: Config, dtype: str, conditions: Conditions) -> Network:
    """Res2Net-50 or, of config 64w1s, ResNet-50, with random weights and fitting statistics; one block a stage if quick."""
    layers = (1, 1, 1, 1) if conditions.quick else None
    network = random_network(network_name(config), layers).to(conditions.device)
    calibrate(network, _images(4, 1, "float32", conditions)[0])
    return network.requires_grad_(False).to(TORCH_DTYPES[dtype])


def _images(batch: int, count: int, dtype: str, conditions: Conditions) -> list[Tensor]:
    """Random images (N, 3, H, W) in channels-last; normal as normalised photographs are."""
    shape = (batch, 3, conditions.image_size, conditions.image_size)
    images = _random(shape, count, dtype, conditions.device, rectified=False)
    return [x.contiguous(memory_format=torch.channels_last) for x in images]


def _random(shape: Sequence[int], count: int, dtype: str, device: str, rectified: bool = True) -> list[Tensor]:
    """Made where they are used: the large ones would take the CPU seconds. Non-negative if `rectified`, as behind a ReLU."""
    generator = torch.Generator(device).manual_seed(1)
    tensors = [torch.randn(shape, generator=generator, dtype=TORCH_DTYPES[dtype], device=device) for _ in range(count)]
    return [x.relu_() for x in tensors] if rectified else tensors
