"""The main job: scale against latency for chains and blocks, their training, then whole networks; nothing unchecked is timed.

What is measured goes into the result file case by case. On a GPU a child process measures (`supervise`), so that a fault costs
the contender that met it, and nothing else.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .._native import library as native
from ..testing.cases import TRAINED, Case, Config, cases
from ..testing.parity import why_not
from . import results, roofline, runtimes
from .network_runner import NetworkContests, TurnConditions, network_unit
from .networks import NetworkCase, plain_network, random_network
from .outcome import print_outcome
from .progress import progress
from .providers import contestants, select, unavailable
from .record_file import Record, different_fields
from .sample_images import photographs
from .schedule import FIGURE_CONFIGS, YARDSTICK, Unit, network_name
from .supervise import AGAIN, supervise
from .timing import use_device
from .turns import ContextLost, Outcome

WORKLOADS = ("chain", "block")
TRAIN = ("default", "all", "none")
_TOGETHER = 6  # networks that take turns with each other: the copies of more would fill a machine's memory
_TRAINERS = ("ours", "eager", "eager_channels_last")


@dataclass(frozen=True)
class Settings:
    """What to sweep: see `res2net-fused bench --help`."""

    configs: tuple[Config, ...]
    batches: tuple[int, ...]
    dtype: str
    device: str
    backend: str = "auto"
    peers: str = "default"
    quick: bool = False
    models: tuple[str, ...] = ()
    model_batches: tuple[int, ...] = ()
    train: str = "none"  # of TRAIN

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def name(self) -> str:
        """Of the files."""
        return f"bench-{torch.device(self.device).type}"

    def cases(self) -> list[Case]:
        return cases(WORKLOADS, self.configs, self.batches, self.dtype, self.device)

    def trained_cases(self) -> list[Case]:
        """Chains and blocks whose forward and backward are timed; by default those of the figures."""
        if self.train == "none":
            return []
        some = tuple(config for config in FIGURE_CONFIGS if config in self.configs)
        if self.train == "all":
            return cases(TRAINED, self.configs, self.batches, self.dtype, self.device)
        chains = cases(["train_chain"], some, self.batches[:1], self.dtype, self.device)
        return chains + cases(["train_block"], some[:1], self.batches[:1], self.dtype, self.device)

    def trained_networks(self) -> tuple[str, ...]:
        return tuple(name for name in self.models if name != network_name(YARDSTICK)) if self.train == "all" else ()

    def training_providers(self) -> list[str]:
        return [*_TRAINERS, *(["compile"] if self.peers == "all" else [])]

    def contestants(self, workload: str) -> tuple[tuple[str, bool], ...]:
        """Training is launched from Python by everybody, as a training run is."""
        if workload in TRAINED or workload == "train_step":
            return tuple((name, False) for name in self.training_providers())
        return contestants(select(self.device, workload, self.peers, self.quick, self.dtype), self.device)

    def units(self, some: Sequence[Case]) -> list[Unit]:
        return [
            Unit(case.workload, case.config, case.stage, case.variant, case.batch, case.dtype, self.contestants(case.workload))
            for case in some
        ]

    def network_units(self) -> list[Unit]:
        steps = [
            network_unit(name, batch, self.dtype, self.contestants("train_step"), "train_step")
            for name in self.trained_networks()
            for batch in self.model_batches
        ]
        return steps + [
            network_unit(name, batch, self.dtype, self.contestants("network"))
            for batch in self.model_batches
            for name in self.models
        ]


def run_sweep(
    settings: Settings, out: Path, command: str, *, again: bool = False, limit_s: float = 420.0, child: Sequence[str] = ()
) -> int:
    """Measures, prints, and writes `out`/bench-<device>.json and .png; returns the exit status: 1 where something failed.

    What an earlier call with the same settings began, and did not finish or could not, is gone on with; `again` does not.
    limit_s: for building and checking one contender on a GPU. child: the command that calls `measure` there.
    Raises RuntimeError for a backend that can run none of it, ImportError where there are no photographs for the networks.
    """
    use_device(settings.device)
    none_can = None if settings.backend == "auto" else why_not(settings.cases(), settings.backend)
    if none_can is not None:
        raise RuntimeError(none_can)
    if settings.models:
        photographs()
    path, environment = out / f"{settings.name}.json", _environment(settings, command)
    record = _open(path, environment, settings, again)
    status = 0
    try:
        if not _left(settings, record):
            print(f"Nothing is left to measure of what {path} was begun for: --again measures anew.")
        elif settings.cuda:
            record.save()
            record.close()
            status = supervise(child, path)
            record = Record(path, environment)
        else:
            status = _measure(settings, record, limit_s)
        record.save()
    finally:
        record.close()
    data = results.read(path)
    print_outcome(data, unavailable(settings.device, settings.dtype))
    _draw(data, path.with_suffix(".png"))
    print(f"Written: {path}")
    return status or int(bool(record.failures))


def measure(settings: Settings, out: Path, command: str, limit_s: float) -> int:
    """The child process of `run_sweep`; returns its exit status for `supervise`."""
    use_device(settings.device)
    record = Record(out / f"{settings.name}.json", _environment(settings, command))
    try:
        return _measure(settings, record, limit_s)
    finally:
        record.close()


def _environment(settings: Settings, command: str) -> dict[str, Any]:
    libraries = [native.cpu_library(), *([native.cuda_library()] if settings.cuda else [])]
    return results.environment(settings.device, command) | {
        "peers": runtimes.versions(settings.device),
        "native": {library.name: library.loaded for library in libraries},
        "quick": settings.quick,
        "settings": json.loads(json.dumps(asdict(settings) | {"configs": [str(config) for config in settings.configs]})),
    }


def _open(path: Path, environment: dict[str, Any], settings: Settings, again: bool) -> Record:
    """Goes on with the file of an earlier call of the same that left something unmeasured or failed; else begins anew."""
    try:
        old = results.read(path)["environment"]
        same = not different_fields(old, environment) and old.get("settings") == environment["settings"]
    except (OSError, ValueError):
        same = False
    record = Record(path, environment, again or not same)
    if record.failures or _left(settings, record):
        return record
    record.close()
    return Record(path, environment, again=True)


def _left(settings: Settings, record: Record) -> list[Unit]:
    units = settings.units([*settings.cases(), *settings.trained_cases()]) + settings.network_units()
    return [unit for unit in units if record.missing(unit.keys(settings.device), unit)]


# Measuring ------------------------------------------------------------------------------------------------------------


class _Timer(NetworkContests):
    """Tells a progress bar who is being prepared or timed."""

    bar: Any = None

    @contextmanager
    def noted(self, names: Sequence[str], outcome: Outcome) -> Iterator[None]:
        if self.bar is not None and names:
            self.bar.set_postfix_str(names[0])  # exporting and compiling take seconds to minutes
        with super().noted(names, outcome):
            yield


def _measure(settings: Settings, record: Record, limit_s: float) -> int:
    quick, l2 = settings.quick, roofline.l2_bytes(settings.device)
    if quick and l2 is not None:
        l2 = 0  # one input, and no minute to make the others
    record.begin_run()
    conditions = TurnConditions(settings.device, settings.backend, quick, None, l2, record.run, limit_s)
    timer = _Timer(conditions, record)
    left = _left(settings, record)

    def begin(seconds: float, rounds: tuple[int, int]) -> None:
        timer.conditions = replace(conditions, seconds=0.2 if quick else seconds, rounds=rounds)

    try:
        begin(1.5, (5, 200))
        _each(timer, "chains and blocks", [unit for unit in left if unit.workload in WORKLOADS], timer.time)
        begin(1.0, (3, 200))
        _each(timer, "forward and backward", [unit for unit in left if unit.workload in TRAINED], timer.time)
        begin(1.5, (3, 200))
        steps = [unit for unit in left if unit.workload == "train_step"]
        _each(timer, "steps of SGD", steps, lambda unit: _time_steps(timer, unit))
        timer.conditions = replace(conditions, seconds=0, rounds=(3, 3) if quick else (10, 10))
        _time_networks(timer, settings, {(unit.config_name, unit.batch) for unit in left if unit.workload == "network"})
    except ContextLost as error:
        print(f"the CUDA context is lost: {error}", flush=True)
        return AGAIN
    finally:
        record.unmark()
    return 0


def _each(timer: _Timer, what: str, units: Sequence[Unit], time: Callable[[Any], Outcome]) -> None:
    with _bar(timer, what, len(units), "cases") as bar:
        for unit in units:
            _note(timer, time(unit))
            bar.update()


@contextmanager
def _bar(timer: _Timer, what: str, total: int, of: str) -> Iterator[Any]:
    """Nothing is said of what there is nothing of."""
    if not total:
        yield None
        return
    with progress(f"checking and timing {what}", total, of) as bar:
        timer.bar = bar
        try:
            yield bar
        finally:
            timer.bar = None


def _note(timer: _Timer, outcome: Outcome) -> None:
    timer.record.add(outcome.rows, outcome.failures, outcome.absent)
    for name, reason in outcome.failures.items():
        print(f"failed, {name}: {reason}", flush=True)


def _time_steps(timer: _Timer, unit: Any) -> Outcome:
    network = random_network(unit.model).to(timer.conditions.device)
    images = photographs().to(timer.conditions.device)
    return timer.time_training(network, unit, images.repeat(-(-unit.batch // len(images)), 1, 1, 1)[: unit.batch])


def _time_networks(timer: _Timer, settings: Settings, left: set[tuple[str, int]]) -> None:
    """Networks of one group are timed together, also those that have been: their times are compared."""
    made: dict[str, NetworkCase] = {}
    groups = [
        (batch, settings.models[i : i + _TOGETHER])
        for batch in settings.model_batches
        for i in range(0, len(settings.models), _TOGETHER)
    ]
    groups = [(batch, names) for batch, names in groups if any((name, batch) in left for name in names)]
    with _bar(timer, f"networks {', '.join(settings.models)}", len(groups), "groups") as bar:
        for batch, names in groups:
            for name in names:
                if name not in made:
                    made[name] = plain_network(name, settings.dtype, settings.device)
            together = [made[name] for name in names]
            _note(timer, timer.time_networks(together, batch, settings.contestants("network")))
            tables = {name: case.table() for name, case in made.items() if case.parity}
            timer.record.describe_run(networks=tables)
            timer.record.save()
            bar.update()


def _draw(data: dict[str, Any], path: Path) -> None:
    from .plot import plot  # matplotlib takes a second to import

    try:
        plot(data, path)
    except (ImportError, ValueError) as error:
        print(f"No plot: {error}")


def command_line(arguments: list[str]) -> str:
    """What the user typed, for the record."""
    return shlex.join(["res2net-fused", *arguments])
