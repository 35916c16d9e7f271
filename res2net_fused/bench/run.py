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
from .._timing import use_device
from ..backends import choices
from ..testing.cases import TRAINED, Case, WidthScale, cases
from ..testing.parity import why_not
from . import results, runtimes
from .neighbours import busy_neighbours
from .network_runner import NetworkRunner, TurnConditions, timed_network
from .networks import NetworkCase, plain_network, random_network
from .outcome import print_outcome
from .progress import progress
from .providers import candidates, select, unavailable
from .record_file import Record, different_fields
from .sample_images import sample_images
from .supervise import supervise
from .timed_case import BASELINE, TARGET_CONFIGS, TimedCase, network_name
from .turns import ContextLost, Outcome
from .work import l2_bytes

WORKLOADS = ("chain", "block")
TRAIN = ("default", "all", "none")
_TOGETHER = 6  # networks that take turns with each other: the copies of more would fill a machine's memory
_TRAINERS = ("ours", "eager", "eager_channels_last")


@dataclass(frozen=True)
class BenchOptions:
    """What to time: see `res2net-fused bench --help`."""

    configs: tuple[WidthScale, ...]
    batches: tuple[int, ...]
    dtype: str
    device: str
    backend: str = "auto"
    peers: str = "default"
    quick: bool = False
    models: tuple[str, ...] = ()
    model_batches: tuple[int, ...] = ()
    train: str = "none"  # of TRAIN
    busy: int = 0  # processes that keep a processor busy each meanwhile

    @property
    def cuda(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def name(self) -> str:
        """The stem of the files' names."""
        return f"bench-{torch.device(self.device).type}" + (f"-busy{self.busy}" if self.busy else "")

    def cases(self) -> list[Case]:
        return cases(WORKLOADS, self.configs, self.batches, self.dtype, self.device)

    def trained_cases(self) -> list[Case]:
        """Chains and blocks whose forward and backward are timed; by default those of the targets."""
        if self.train == "none":
            return []
        some = tuple(config for config in TARGET_CONFIGS if config in self.configs)
        if self.train == "all":
            return cases(TRAINED, self.configs, self.batches, self.dtype, self.device)
        chains = cases(["train_chain"], some, self.batches[:1], self.dtype, self.device)
        return chains + cases(["train_block"], some[:1], self.batches[:1], self.dtype, self.device)

    def trained_networks(self) -> tuple[str, ...]:
        return tuple(name for name in self.models if name != network_name(BASELINE)) if self.train == "all" else ()

    def training_providers(self) -> list[str]:
        return [*_TRAINERS, *(["compile"] if self.peers == "all" else [])]

    def candidates(self, workload: str) -> tuple[tuple[str, bool], ...]:
        """Training is launched from Python by everybody, as a training run is."""
        if workload in TRAINED or workload == "train_step":
            return tuple((name, False) for name in self.training_providers())
        return candidates(select(self.device, workload, self.peers, self.quick, self.dtype), self.device)

    def timed_cases(self, some: Sequence[Case]) -> list[TimedCase]:
        return [
            TimedCase(one.workload, one.config, one.stage, one.variant, one.batch, one.dtype, self.candidates(one.workload))
            for one in some
        ]

    def timed_networks(self) -> list[TimedCase]:
        steps = [
            timed_network(name, batch, self.dtype, self.candidates("train_step"), "train_step")
            for name in self.trained_networks()
            for batch in self.model_batches
        ]
        return steps + [
            timed_network(name, batch, self.dtype, self.candidates("network"))
            for batch in self.model_batches
            for name in self.models
        ]


def run_bench(
    options: BenchOptions, out: Path, command: str, *, again: bool = False, limit_s: float = 420.0, child: Sequence[str] = ()
) -> int:
    """Measures, prints, and writes `out`/bench-<device>.json and .png; returns the exit status: 1 where something failed.

    What an earlier call with the same options began, and did not finish or could not, is gone on with; `again` does not.
    limit_s: for building and checking one contender on a GPU. child: the command that calls `measure` there.
    Raises RuntimeError for a backend that can run none of it, ImportError where there are no photographs for the networks.
    """
    with choices.as_published():
        return _run_bench(options, out, command, again, limit_s, child)


def _run_bench(options: BenchOptions, out: Path, command: str, again: bool, limit_s: float, child: Sequence[str]) -> int:
    use_device(options.device)
    none_can = None if options.backend == "auto" else why_not(options.cases(), options.backend)
    if none_can is not None:
        raise RuntimeError(none_can)
    if options.models:
        sample_images()
    path, environment = out / f"{options.name}.json", _environment(options, command)
    record = _open(path, environment, options, again)
    status = 0
    try:
        if not _left(options, record):
            print(f"Nothing is left to measure of what {path} was begun for: --again measures anew.")
        elif options.cuda:
            record.save()
            record.close()
            status = supervise(child, path)
            record = Record(path, environment)
        else:
            _measure(options, record, limit_s)  # a CPU has no context that could be lost
        record.save()
    finally:
        record.close()
    data = results.read(path)
    print_outcome(data, unavailable(options.device, options.dtype))
    _draw(data, path.with_suffix(".png"))
    print(f"Written: {path}")
    return status or int(bool(record.failures))


def measure(options: BenchOptions, out: Path, command: str, limit_s: float) -> bool:
    """The child process of `run_bench`; returns whether a new process has to go on."""
    with choices.as_published():
        use_device(options.device)
        record = Record(out / f"{options.name}.json", _environment(options, command))
        try:
            return _measure(options, record, limit_s)
        finally:
            record.close()


def _environment(options: BenchOptions, command: str) -> dict[str, Any]:
    libraries = [native.cpu_library(), *([native.cuda_library()] if options.cuda else [])]
    return results.environment(options.device, command) | {
        "peers": runtimes.versions(options.device),
        "native": {library.name: library.loaded for library in libraries},
        "quick": options.quick,
        "choice": choices.mode(),
        "settings": json.loads(json.dumps(asdict(options) | {"configs": [str(config) for config in options.configs]})),
    }


def _open(path: Path, environment: dict[str, Any], options: BenchOptions, again: bool) -> Record:
    """Goes on with the file of an earlier call of the same that left something unmeasured or failed; else begins anew."""
    try:
        old = results.read(path)["environment"]
        same = not different_fields(old, environment) and old.get("settings") == environment["settings"]
    except (OSError, ValueError):
        same = False
    record = Record(path, environment, again or not same)
    if record.failures or _left(options, record):
        return record
    record.close()
    return Record(path, environment, again=True)


def _left(options: BenchOptions, record: Record) -> list[TimedCase]:
    cases = options.timed_cases([*options.cases(), *options.trained_cases()]) + options.timed_networks()
    return [case for case in cases if record.missing(case.keys(options.device), case)]


# Measuring ------------------------------------------------------------------------------------------------------------


class _BarRunner(NetworkRunner):
    """Tells a progress bar who is being prepared or timed."""

    bar: Any = None

    @contextmanager
    def noted(self, names: Sequence[str], outcome: Outcome) -> Iterator[None]:
        if self.bar is not None and names:
            self.bar.set_postfix_str(names[0])  # exporting and compiling take seconds to minutes
        with super().noted(names, outcome):
            yield


def _measure(options: BenchOptions, record: Record, limit_s: float) -> bool:
    """Whether the device is lost to this process."""
    quick, l2 = options.quick, l2_bytes(options.device)
    if quick and l2 is not None:
        l2 = 0  # one input, and no minute to make the others
    record.begin_run()
    conditions = TurnConditions(options.device, options.backend, quick, l2, record.run, limit_s)
    runner = _BarRunner(conditions, record)
    left = _left(options, record)

    def begin(seconds: float, rounds: tuple[int, int]) -> None:
        runner.conditions = replace(conditions, seconds=0.2 if quick else seconds, rounds=rounds)

    try:
        with busy_neighbours(options.busy):
            begin(1.5, (5, 200))
            _each(runner, "chains and blocks", [case for case in left if case.workload in WORKLOADS], runner.time)
            begin(1.0, (3, 200))
            _each(runner, "forward and backward", [case for case in left if case.workload in TRAINED], runner.time)
            begin(1.5, (3, 200))
            steps = [case for case in left if case.workload == "train_step"]
            _each(runner, "steps of SGD", steps, lambda case: _time_steps(runner, case))
            runner.conditions = replace(conditions, seconds=0, rounds=(3, 3) if quick else (10, 10))
            _time_networks(runner, options, {(case.config_name, case.batch) for case in left if case.workload == "network"})
    except ContextLost as error:
        print(f"the CUDA context is lost: {error}", flush=True)
        return True
    finally:
        record.unmark()
    return False


def _each(runner: _BarRunner, what: str, cases: Sequence[TimedCase], time: Callable[[Any], Outcome]) -> None:
    with _bar(runner, what, len(cases), "cases") as bar:
        for case in cases:
            _note(runner, time(case))
            bar.update()


@contextmanager
def _bar(runner: _BarRunner, what: str, total: int, of: str) -> Iterator[Any]:
    """Nothing is said of what there is nothing of."""
    if not total:
        yield None
        return
    with progress(f"checking and timing {what}", total, of) as bar:
        runner.bar = bar
        try:
            yield bar
        finally:
            runner.bar = None


def _note(runner: _BarRunner, outcome: Outcome) -> None:
    runner.record.add(outcome.rows, outcome.failures, outcome.absent)
    for name, reason in outcome.failures.items():
        print(f"failed, {name}: {reason}", flush=True)


def _time_steps(runner: _BarRunner, case: Any) -> Outcome:
    network = random_network(case.model).to(runner.conditions.device)
    images = sample_images().to(runner.conditions.device)
    return runner.time_training(network, case, images.repeat(-(-case.batch // len(images)), 1, 1, 1)[: case.batch])


def _time_networks(runner: _BarRunner, options: BenchOptions, left: set[tuple[str, int]]) -> None:
    """Networks of one group are timed together, also those that have been: their times are compared."""
    made: dict[str, NetworkCase] = {}
    groups = [
        (batch, options.models[i : i + _TOGETHER])
        for batch in options.model_batches
        for i in range(0, len(options.models), _TOGETHER)
    ]
    groups = [(batch, names) for batch, names in groups if any((name, batch) in left for name in names)]
    with _bar(runner, f"networks {', '.join(options.models)}", len(groups), "groups") as bar:
        for batch, names in groups:
            for name in names:
                if name not in made:
                    made[name] = plain_network(name, options.dtype, options.device)
            together = [made[name] for name in names]
            _note(runner, runner.time_networks(together, batch, options.candidates("network")))
            tables = {name: case.table() for name, case in made.items() if case.parity}
            runner.record.describe_run(networks=tables)
            runner.record.save()
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
