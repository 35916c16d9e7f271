"""How one case is checked and timed: its candidates built, compared with float64, and run in turn past the L2."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace

import torch
import torch._dynamo.config
from torch import Tensor

from .._timing import Contender, GraphedContender, Timing
from ..chain.tolerances import forward_bound
from ..models.network import Network
from ..testing.cases import TRAINED, Case
from ..testing.parity import ParityRow, convolution_precision
from .candidates import (
    Builder,
    Built,
    Model,
    RunConditions,
    case_builders,
    is_ours,
    module_case,
    random_tensors,
    training_builders,
    training_case_builders,
)
from .exact import CHECKED_IMAGES, Miss, Truth, allowed
from .providers import PROVIDERS, forget_compiled
from .record_file import Record, Row, failure_name
from .timed_case import Candidate, TimedCase
from .training import (
    SgdStep,
    SgdTruth,
    TrainingStep,
    TrainingTruth,
    check_step,
    check_training_case,
    plain,
    with_inner_chains,
)
from .turns import Outcome, noted, take_turns
from .work import Work, least_work, rotation_count

_TIMED_SHARE = 0.25  # of the limit for building: what is timed is compiled, and was run before

# Compares a candidate that is built with float64; Miss where it misses.
Check = Callable[[str, Contender, Model], ParityRow]


class Runner:
    """Times chains and blocks, in eval mode and in training."""

    def __init__(self, conditions: RunConditions, record: Record) -> None:
        """record: where failures are written as they happen, and who runs is marked."""
        self.conditions, self.record = conditions, record

    def time(self, case: TimedCase) -> Outcome:
        """Builds, checks and times a case's candidates in turn, without those of which the record knows why they cannot.

        Whatever one of them raises is its own failure, and the others go on. Raises ContextLost where they cannot.
        """
        outcome = Outcome()
        names = {candidate: failure_name(case, *candidate) for candidate in case.candidates}
        left = tuple(candidate for candidate, name in names.items() if not self.record.settled(name))
        case = replace(case, candidates=left)
        self._forget(case)
        torch._dynamo.config.recompile_limit = 64  # several networks share one class; beyond it they would run eager
        with self.noted([names[candidate] for candidate in left], outcome):
            with fastest_cudnn(), convolution_precision(case.dtype, self.conditions.device):
                self._time(case, outcome)
        return outcome

    def _forget(self, case: TimedCase) -> None:
        """Drops what was compiled for the case before."""
        forget_compiled()

    def noted(self, names: Sequence[str], outcome: Outcome) -> AbstractContextManager[None]:
        """See `turns.noted`."""
        return noted(self.record, names, outcome, self.conditions.limit_s)

    def floor_ms(self, parts: Sequence[Work], dtype: str) -> float | None:
        """The roofline's time for this work; None where nobody measured the device's rates, as nobody does here."""
        return None

    def _time(self, case: TimedCase, outcome: Outcome) -> None:
        if case.workload in TRAINED:
            self._time_training_case(case, module_case(case, self.conditions), outcome)
        else:
            self._time_case(case, module_case(case, self.conditions), outcome)

    def _time_case(self, case: TimedCase, inner: Case, outcome: Outcome) -> None:
        module = inner.module()
        shape = (case.batch, inner.channels, inner.input_size, inner.input_size)
        work = least_work(module, shape, case.dtype)
        count = rotation_count(work.activations, self.conditions.l2)
        inputs = random_tensors(shape, count, case.dtype, self.conditions.device)
        truth = Truth(case, module, inputs, CHECKED_IMAGES, lambda eager: forward_bound(case.dtype, eager))
        built = self.build(case, case_builders(inner, module, self.conditions), inputs, 8, truth.check, outcome)
        self._measure(case, built, outcome, self.floor_ms([work], case.dtype))

    def _time_training_case(self, case: TimedCase, inner: Case, outcome: Outcome) -> None:
        shape = case.batch, plain(inner).channels, inner.input_size, inner.input_size
        inputs = random_tensors(shape, 2, "float32", self.conditions.device)
        truth = functools.cache(lambda number: TrainingTruth(inner, number))

        def check(name: str, contender: Contender, model: Model) -> ParityRow:
            step = contender.model
            assert isinstance(step, TrainingStep)
            report = check_step(lambda number: truth(number).check(step, name), lambda bound: allowed(bound, name))
            for chain in with_inner_chains([inner])[:-1] if is_ours(name) else []:
                report += check_training_case(chain, name, self.conditions.backend)
            return judged(report)

        built = self.build(case, training_case_builders(inner, self.conditions), inputs, 1, check, outcome)
        self._measure(case, built, outcome)

    def build_steps(
        self, case: TimedCase, network: Network, images: Sequence[Tensor], outcome: Outcome
    ) -> dict[Candidate, Built]:
        """The candidates of a network's step of SGD, each compared with float64 on the first of the images or random ones."""
        truth = functools.cache(lambda number: SgdTruth(case, network, images[0], number))

        def check(name: str, contender: Contender, model: Model) -> ParityRow:
            step = contender.model
            assert isinstance(step, SgdStep)
            return judged(check_step(lambda number: truth(number).check(step, name), lambda bound: allowed(bound, name)))

        return self.build(case, training_builders(network, case, self.conditions), images, 1, check, outcome)

    def build(
        self, case: TimedCase, builder: Builder, inputs: Sequence[Tensor], min_calls: int, check: Check, outcome: Outcome
    ) -> dict[Candidate, Built]:
        """Every candidate that can be built here and is right, warmed up."""
        built: dict[Candidate, Built] = {}
        for name, graph in case.candidates:
            who = failure_name(case, name, graph)
            if self.record.settled(who):
                continue  # one on the baseline, whose candidates are not known before
            with self.noted([who], outcome):
                model = builder(name, graph)
                last = is_ours(name) or PROVIDERS[name].channels_last
                layout = torch.channels_last if last else torch.contiguous_format
                # Or one candidate would warm the L2 for the next. Other values while graphs are captured: no intermediate
                # that is left of a capture may look like a replay's.
                own = [x.clone(memory_format=layout).mul_(0.5) for x in inputs]
                contender = GraphedContender(model.call, own, min_calls) if graph else Contender(model.call, own)
                contender.run()
                for mine, x in zip(own, inputs, strict=True):
                    mine.copy_(x)
                row = check(name, contender, model)
                built[name, graph] = Built(contender, model.facts | {"error": row.error, "allowed_error": row.bound})
        return built

    def _measure(self, case: TimedCase, built: Mapping[Candidate, Built], outcome: Outcome, least: float | None = None) -> None:
        for (_, candidate), timing in self.take_turns({(case, c): one for c, one in built.items()}, outcome).items():
            outcome.rows.append(self.row(case, candidate, timing, built[candidate], least))

    def take_turns(
        self, built: Mapping[tuple[TimedCase, Candidate], Built], outcome: Outcome
    ) -> dict[tuple[TimedCase, Candidate], Timing]:
        """See `turns.take_turns`."""
        names = {(case, candidate): failure_name(case, *candidate) for case, candidate in built}
        contenders = {key: one.contender for key, one in built.items()}
        limit_s = _TIMED_SHARE * self.conditions.limit_s
        return take_turns(contenders, names, self.record, outcome, self.conditions.device, limit_s, self.conditions.turns)

    def row(self, case: TimedCase, candidate: Candidate, timing: Timing, built: Built, least: float | None = None) -> Row:
        return make_row(case, candidate, timing, self.conditions, least) | built.facts | {"calls": built.contender.calls}


def judged(rows: Sequence[ParityRow]) -> ParityRow:
    """The row nearest to its bound; Miss where one missed it."""
    for row in rows:
        if not row.ok:
            raise Miss(row)
    return max(rows, key=lambda row: row.error / row.bound)


def make_row(case: TimedCase, candidate: Candidate, timing: Timing, conditions: RunConditions, least: float | None) -> Row:
    """least: milliseconds of the roofline, None where there is none to state."""
    name, graph = candidate
    row = timing.row(
        workload=case.workload, config=case.config_name, stage=case.stage, variant=case.variant, batch=case.batch,
        dtype=case.dtype, device=conditions.device, provider=name, graph=graph, run=conditions.run,
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
