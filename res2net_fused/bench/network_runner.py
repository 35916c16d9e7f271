"""Whole networks timed: each provider on each network, all in turn, on photographs; and their steps of SGD."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn

from ..backends.selection import FIRST_CHOICE
from ..models.network import Network
from ..testing.parity import convolution_precision
from ..testing.tolerances import network_bound
from .candidates import Builder, Built, Conditions, Model, is_ours, training_builders
from .exact import CHECKED_IMAGES_OF_NETWORKS, Miss, Truth
from .networks import NetworkCase, compare
from .providers import PROVIDERS, forget_compiled
from .record_file import failure_name
from .roofline import least_work_of_network, rotation_count
from .runner import Contests, fastest_cudnn, judged
from .schedule import YARDSTICK, Contestant, Unit
from .timing import Contender
from .training import SgdStep, SgdTruth
from .turns import Outcome


@dataclass(frozen=True)
class TurnConditions(Conditions):
    """On a CPU: seconds for all contenders of a unit together, and how many rounds at least and at most."""

    seconds: float = 1.5
    rounds: tuple[int, int] = (5, 200)

    @property
    def turns(self) -> dict[str, Any]:
        if self.l2 is not None:
            return super().turns
        return {"seconds": self.seconds, "min_repeats": self.rounds[0], "max_repeats": self.rounds[1]}


@dataclass(frozen=True)
class NetworkUnit(Unit):
    """A network by its name, which need not be a Res2Net-50; `config` says nothing."""

    model: str = ""

    @property
    def config_name(self) -> str:
        return self.model


def network_unit(model: str, batch: int, dtype: str, contestants: tuple[Contestant, ...], workload: str = "network"):
    return NetworkUnit(workload, YARDSTICK, None, "normal", batch, dtype, contestants, model=model)


class NetworkContests(Contests):
    """As `Contests`, and networks by their names."""

    def time_networks(self, cases: Sequence[NetworkCase], batch: int, contestants: tuple[Contestant, ...]) -> Outcome:
        """Every contestant on every network in turn. Of one that was not compared on the photographs yet, ours is not timed
        where it misses there."""
        outcome = Outcome()
        built: dict[tuple[Unit, Contestant], Built] = {}
        forget_compiled()
        with self._networks(cases[0].dtype):
            for case in cases:
                unit = network_unit(case.name, batch, case.dtype, contestants)
                ours = [failure_name(unit, *one) for one in contestants if is_ours(one[0])]
                with self.noted([name for name in ours if not self.record.settled(name)], outcome):
                    _gate(case, self.conditions.backend)
                with self.noted([failure_name(unit, *one) for one in self.left(unit, outcome)], outcome):
                    built |= {(unit, who): one for who, one in self._built(unit, case, outcome).items()}
            for (unit, contestant), timing in self.take_turns(built, outcome).items():
                outcome.rows.append(self.row(unit, contestant, timing, built[unit, contestant], None))
        self.record.unmark()
        return outcome

    def left(self, unit: Unit, outcome: Outcome) -> list[Contestant]:
        """Of a unit's contestants those of whom it is not known why they have no row."""
        names = {one: failure_name(unit, *one) for one in unit.contestants}
        return [one for one, name in names.items() if not (self.record.settled(name) or outcome.explains(name))]

    def _built(self, unit: Unit, case: NetworkCase, outcome: Outcome) -> dict[Contestant, Built]:
        l2, count = self.conditions.l2, 1
        if l2 is not None:
            work = least_work_of_network(case.network, (unit.batch, *case.images.shape[1:]), unit.dtype)
            count = rotation_count(sum(part.activations + part.parameters for part in work), l2)
        # Rolled, so that no replay may take another one's output.
        images = [case.batch(unit.batch).roll(i, -1) for i in range(count)]
        truth = Truth(unit, case.network, images, CHECKED_IMAGES_OF_NETWORKS, network_bound)
        return self.build(unit, _builders(case, self.conditions.backend), images, 2, truth.check, outcome)

    def time_training(self, network: Network, unit: NetworkUnit, images: Tensor) -> Outcome:
        """A step of SGD. images: (N, 3, H, W)."""
        outcome = Outcome()
        forget_compiled()
        with self._networks(unit.dtype), self.noted([failure_name(unit, *one) for one in self.left(unit, outcome)], outcome):
            truth = SgdTruth(unit, network, images)

            def check(name: str, contender: Contender, model: Model):
                assert isinstance(contender.model, SgdStep)
                return judged(truth.check(contender.model, name), name)

            built = self.build(unit, training_builders(network, unit, self.conditions), [images], 1, check, outcome)
            for (_, who), timing in self.take_turns({(unit, who): one for who, one in built.items()}, outcome).items():
                outcome.rows.append(self.row(unit, who, timing, built[who], None))
        self.record.unmark()
        return outcome

    @contextmanager
    def _networks(self, dtype: str) -> Iterator[None]:
        with (
            fastest_cudnn(),
            convolution_precision(dtype, self.conditions.device),
            torch._dynamo.config.patch(recompile_limit=64),  # the networks share one class; beyond it they would run eager
        ):
            yield


def _gate(case: NetworkCase, backend: str) -> None:
    if not case.parity:
        compare(case, backend)
    for row in case.parity.misses:
        raise Miss(row)


def _builders(case: NetworkCase, backend: str) -> Builder:
    models: dict[str, Callable[[Tensor], Tensor]] = {}

    def build(name: str, graph: bool) -> Model:
        if name not in models:
            models[name] = PROVIDERS[name].build(copy.deepcopy(case.network), backend)
        call = models[name]
        if not is_ours(name):
            return Model(call, {})
        backends = ", ".join(sorted({backend for backend, _ in case.choices}))
        reasons = [reason for _, reason in case.choices if reason != FIRST_CHOICE]
        facts: dict[str, object] = {"backend": backends, "reason": "; ".join(dict.fromkeys(reasons)) or FIRST_CHOICE}
        return Model(call, facts, call if isinstance(call, nn.Module) else None)

    return build
