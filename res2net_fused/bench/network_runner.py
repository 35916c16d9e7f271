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
from ..chain.tolerances import network_bound
from ..models.network import Network
from ..testing.parity import convolution_precision
from .candidates import Builder, Built, Model, RunConditions, is_ours
from .exact import CHECKED_IMAGES_OF_NETWORKS, Miss, Truth
from .networks import NetworkCase, compare
from .providers import PROVIDERS, forget_compiled
from .record_file import failure_name
from .runner import Runner, fastest_cudnn
from .timed_case import BASELINE, Candidate, TimedCase
from .turns import Outcome
from .work import least_work_of_network, rotation_count


@dataclass(frozen=True)
class TurnConditions(RunConditions):
    """Conditions with turns of their own on a CPU: seconds for all contenders of a case, and the least and most rounds."""

    seconds: float = 1.5
    rounds: tuple[int, int] = (5, 200)

    @property
    def turns(self) -> dict[str, Any]:
        if self.l2 is not None:
            return super().turns
        return {"seconds": self.seconds, "min_repeats": self.rounds[0], "max_repeats": self.rounds[1]}


@dataclass(frozen=True)
class TimedNetwork(TimedCase):
    """A network by its name, which need not be a Res2Net-50; `config` says nothing."""

    model: str = ""

    @property
    def config_name(self) -> str:
        return self.model


def timed_network(model: str, batch: int, dtype: str, candidates: tuple[Candidate, ...], workload: str = "network"):
    return TimedNetwork(workload, BASELINE, None, "normal", batch, dtype, candidates, model=model)


class NetworkRunner(Runner):
    """A runner that also times networks, by their names."""

    def time_networks(self, networks: Sequence[NetworkCase], batch: int, candidates: tuple[Candidate, ...]) -> Outcome:
        """Times every candidate on every network in turn; not ours on a network where it misses on the photographs."""
        outcome = Outcome()
        built: dict[tuple[TimedCase, Candidate], Built] = {}
        forget_compiled()
        with self._networks(networks[0].dtype):
            for network in networks:
                case = timed_network(network.name, batch, network.dtype, candidates)
                ours = [failure_name(case, *one) for one in candidates if is_ours(one[0])]
                with self.noted([name for name in ours if not self.record.settled(name)], outcome):
                    _gate(network, self.conditions.backend)
                with self.noted([failure_name(case, *one) for one in self.left(case, outcome)], outcome):
                    built |= {(case, who): one for who, one in self._built(case, network, outcome).items()}
            for (case, candidate), timing in self.take_turns(built, outcome).items():
                outcome.rows.append(self.row(case, candidate, timing, built[case, candidate]))
        self.record.unmark()
        return outcome

    def left(self, case: TimedCase, outcome: Outcome) -> list[Candidate]:
        """Those of a case's candidates of whom it is not known why they have no row."""
        names = {one: failure_name(case, *one) for one in case.candidates}
        return [one for one, name in names.items() if not (self.record.settled(name) or outcome.explains(name))]

    def _built(self, case: TimedCase, network: NetworkCase, outcome: Outcome) -> dict[Candidate, Built]:
        l2, count = self.conditions.l2, 1
        if l2 is not None:
            work = least_work_of_network(network.network, (case.batch, *network.images.shape[1:]), case.dtype)
            count = rotation_count(sum(part.activations + part.parameters for part in work), l2)
        # Rolled, so that no replay may take another one's output.
        images = [network.batch(case.batch).roll(i, -1) for i in range(count)]
        truth = Truth(case, network.network, images, CHECKED_IMAGES_OF_NETWORKS, network_bound)
        return self.build(case, _builders(network, self.conditions.backend), images, 2, truth.check, outcome)

    def time_training(self, network: Network, case: TimedNetwork, images: Tensor) -> Outcome:
        """Times a step of SGD. images: (N, 3, H, W)."""
        outcome = Outcome()
        forget_compiled()
        with self._networks(case.dtype), self.noted([failure_name(case, *one) for one in self.left(case, outcome)], outcome):
            self._measure(case, self.build_steps(case, network, [images], outcome), outcome)
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
