"""How one unit of a record is checked and timed: its contestants built, compared with float64, and run in turn past the L2."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
import torch._dynamo.config
from torch import Tensor

from ..testing.cases import TRAINED, Case
from ..testing.parity import ParityRow, convolution_precision
from ..testing.tolerances import forward_bound, network_bound
from .candidates import (
    Builder,
    Built,
    Conditions,
    Model,
    build_network,
    case_builders,
    case_of,
    is_ours,
    network_builders,
    random_images,
    random_tensors,
    training_builders,
    training_case_builders,
)
from .exact import CHECKED_IMAGES, CHECKED_IMAGES_OF_NETWORKS, Miss, Truth, allowed
from .providers import PROVIDERS, forget_compiled
from .record_file import Record, Row, failure_name
from .roofline import least_work, least_work_of_network, rotation_count
from .schedule import YARDSTICK, Contestant, Unit
from .timing import Contender, GraphedContender, Timing
from .training import SgdStep, SgdTruth, TrainingStep, TrainingTruth, check_training_case, plain, with_inner_chains
from .turns import Outcome, noted, take_turns

_TIMED_SHARE = 0.25  # of the limit for building: what is timed is compiled, and was run before

# Of a contestant that is built: compared with float64, Miss where it misses.
Check = Callable[[str, Contender, Model], ParityRow]


class Contests:
    """Times units; the ResNet-50 of the last network stays, since the next one is timed beside it."""

    def __init__(self, conditions: Conditions, record: Record) -> None:
        """record: where failures are written as they happen, and who runs is marked."""
        self.conditions, self.record = conditions, record
        self._yardstick: tuple[object, dict[Contestant, Built], float | None] | None = None

    def time(self, unit: Unit) -> Outcome:
        """Builds, checks and times a unit's contestants in turn, without those of which the record knows why they cannot.

        Whatever one of them raises is its own failure, and the others go on. Raises ContextLost where they cannot.
        """
        outcome = Outcome()
        names = {contestant: failure_name(unit, *contestant) for contestant in unit.contestants}
        left = tuple(contestant for contestant, name in names.items() if not self.record.settled(name))
        unit = replace(unit, contestants=left)
        if self._yardstick is None or self._yardstick[0] != _yardstick_key(unit):
            self._yardstick = None
            forget_compiled()
        torch._dynamo.config.recompile_limit = 64  # several networks share one class; beyond it they would run eager
        with self.noted([names[contestant] for contestant in left], outcome):
            with fastest_cudnn(), convolution_precision(unit.dtype, self.conditions.device):
                if unit.workload in TRAINED:
                    self._time_training_case(unit, case_of(unit, self.conditions), outcome)
                elif unit.stage is not None:
                    self._time_case(unit, case_of(unit, self.conditions), outcome)
                else:
                    self._time_network(unit, outcome)
        return outcome

    def noted(self, names: Sequence[str], outcome: Outcome) -> AbstractContextManager[None]:
        """See `turns.noted`."""
        return noted(self.record, names, outcome, self.conditions.limit_s)

    def _time_case(self, unit: Unit, case: Case, outcome: Outcome) -> None:
        module = case.module()
        shape = (unit.batch, case.channels, case.input_size, case.input_size)
        work = least_work(module, shape, unit.dtype)
        count = rotation_count(work.activations, self.conditions.l2)
        inputs = random_tensors(shape, count, unit.dtype, self.conditions.device)
        truth = Truth(unit, module, inputs, CHECKED_IMAGES, lambda eager: forward_bound(unit.dtype, eager))
        built = self.build(unit, case_builders(case, module, self.conditions), inputs, 8, truth.check, outcome)
        self._measure(unit, built, outcome, self.conditions.floor_ms([work], unit.dtype))

    def _time_training_case(self, unit: Unit, case: Case, outcome: Outcome) -> None:
        shape = unit.batch, plain(case).channels, case.input_size, case.input_size
        inputs = random_tensors(shape, 2, "float32", self.conditions.device)
        truth = TrainingTruth(case)

        def check(name: str, contender: Contender, model: Model) -> ParityRow:
            assert isinstance(contender.model, TrainingStep)
            report = truth.check(contender.model, name)
            for inner in with_inner_chains([case])[:-1] if is_ours(name) else []:
                report += check_training_case(inner, name, self.conditions.backend)
            return judged(report, name)

        built = self.build(unit, training_case_builders(case, self.conditions), inputs, 1, check, outcome)
        self._measure(unit, built, outcome, None)

    def _time_network(self, unit: Unit, outcome: Outcome) -> None:
        ours, least = self._network(unit, outcome)
        if self._yardstick is None:
            others = tuple(contestant for contestant in unit.contestants if not is_ours(contestant[0]))
            self._yardstick = _yardstick_key(unit), *self._network(replace(unit, config=YARDSTICK, contestants=others), outcome)
        _, yardstick, yardstick_floor = self._yardstick
        resnet = replace(unit, config=YARDSTICK)
        together = {(unit, c): one for c, one in ours.items()} | {(resnet, c): one for c, one in yardstick.items()}
        timings = self.take_turns(together, outcome)
        for (of, contestant), timing in timings.items():
            if of == resnet:
                outcome.rows.append(self.row(of, contestant, timing, yardstick[contestant], yardstick_floor))
                continue
            row = self.row(unit, contestant, timing, ours[contestant], least)
            peer = timings.get((resnet, self._same_way(unit, contestant)))
            outcome.rows.append(row | {"yardstick_ms": peer and peer.median_ms})

    def _same_way(self, unit: Unit, contestant: Contestant) -> Contestant:
        """The contestant of the yardstick that is compiled and replayed as this one of a Res2Net."""
        name, graph = contestant
        if not is_ours(name):
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
            images = random_images(unit.batch, 2, "float32", self.conditions)
            steps = SgdTruth(unit, network, images[0])

            def check(name: str, contender: Contender, model: Model) -> ParityRow:
                assert isinstance(contender.model, SgdStep)
                return judged(steps.check(contender.model, name), name)

            return self.build(unit, training_builders(network, unit, self.conditions), images, 1, check, outcome), None
        parts = least_work_of_network(network, shape, unit.dtype)
        moved = sum(part.activations + part.parameters for part in parts)
        images = random_images(unit.batch, max(2, rotation_count(moved, self.conditions.l2)), unit.dtype, self.conditions)
        truth = Truth(unit, network, images, CHECKED_IMAGES_OF_NETWORKS, network_bound)
        builders = network_builders(network, unit.dtype, self._compiles(unit), self.conditions)
        return self.build(unit, builders, images, 2, truth.check, outcome), self.conditions.floor_ms(parts, unit.dtype)

    def build(
        self, unit: Unit, builder: Builder, inputs: Sequence[Tensor], min_calls: int, check: Check, outcome: Outcome
    ) -> dict[Contestant, Built]:
        """Every contestant that can be built here and is right, warmed up."""
        built: dict[Contestant, Built] = {}
        for name, graph in unit.contestants:
            who = failure_name(unit, name, graph)
            if self.record.settled(who):
                continue  # of the yardstick, whose contestants are not known before
            with self.noted([who], outcome):
                model = builder(name, graph)
                last = is_ours(name) or PROVIDERS[name].channels_last
                layout = torch.channels_last if last else torch.contiguous_format
                # Or one contestant would warm the L2 for the next. Other values while graphs are captured: no intermediate
                # that is left of a capture may look like a replay's.
                own = [x.clone(memory_format=layout).mul_(0.5) for x in inputs]
                contender = GraphedContender(model.call, own, min_calls) if graph else Contender(model.call, own)
                contender.run()
                for mine, x in zip(own, inputs, strict=True):
                    mine.copy_(x)
                row = check(name, contender, model)
                built[name, graph] = Built(contender, model.facts | {"error": row.error, "allowed_error": row.bound})
        return built

    def _measure(self, unit: Unit, built: Mapping[Contestant, Built], outcome: Outcome, least: float | None) -> None:
        for (_, contestant), timing in self.take_turns({(unit, c): one for c, one in built.items()}, outcome).items():
            outcome.rows.append(self.row(unit, contestant, timing, built[contestant], least))

    def take_turns(
        self, built: Mapping[tuple[Unit, Contestant], Built], outcome: Outcome
    ) -> dict[tuple[Unit, Contestant], Timing]:
        """See `turns.take_turns`."""
        names = {(unit, contestant): failure_name(unit, *contestant) for unit, contestant in built}
        contenders = {key: one.contender for key, one in built.items()}
        limit_s = _TIMED_SHARE * self.conditions.limit_s
        return take_turns(contenders, names, self.record, outcome, self.conditions.device, limit_s, self.conditions.turns)

    def row(self, unit: Unit, contestant: Contestant, timing: Timing, built: Built, least: float | None) -> Row:
        return make_row(unit, contestant, timing, self.conditions, least) | built.facts | {"calls": built.contender.calls}


def judged(report: Sequence[ParityRow], name: str) -> ParityRow:
    """The row nearest to its bound; Miss where one missed it."""
    rows = [replace(row, bound=allowed(row.bound, name)) for row in report]
    for row in rows:
        if not row.ok:
            raise Miss(row)
    return max(rows, key=lambda row: row.error / row.bound)


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
def fastest_cudnn() -> Iterator[None]:
    """cuDNN tries its algorithms for each shape, which is to the good of the peers."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
