"""`res2net-fused check`: every backend compared with float64, and the table of it.

On a GPU a child process compares (`supervise`), so that a fault costs the comparison that met it, and nothing else.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .._timing import use_device
from ..backends import policy
from ..testing.cases import TORCH_DTYPES, Case
from ..testing.parity import ParityReport, Watch, check_cases, unavailable_backends, why_not
from .networks import DEFAULT_MODELS, prepare_network
from .progress import progress
from .sample_images import sample_images

_NETWORK = DEFAULT_MODELS[0]
_PHOTOGRAPHS = 2


@dataclass(frozen=True)
class CheckOptions:
    """What to compare: see `res2net-fused check --help`. networks: the dtypes in which a whole network is compared, too."""

    cases: tuple[Case, ...]
    networks: tuple[str, ...]
    device: str
    backend: str | None
    limit_s: float  # for one comparison on a GPU

    def names(self) -> list[str]:
        """Everything, in order, by what `Watch.done` is told."""
        return [*map(str, self.cases), *map(_network_name, self.networks)]


def run_check(options: CheckOptions, child: Sequence[str]) -> int:
    """Compares and prints; returns the exit status: 1 where something missed, failed or was not reached.

    child: the command that calls `compare_in_child` on a GPU, to which the path of its journal is added. Raises RuntimeError
    for a backend that can run none of the cases.
    """
    use_device(options.device)
    none_can = None if options.backend is None else why_not(options.cases, options.backend)
    if none_can is not None:
        raise RuntimeError(none_can)
    if torch.device(options.device).type != "cuda" or os.name != "posix":  # where no process can be supervised
        return _say(options, _compare(options, Watch(), finished=()), 0)
    from .check_journal import Journal
    from .supervise import supervise

    with tempfile.TemporaryDirectory() as folder:
        path, status = Path(folder, "check"), 1
        try:
            status = supervise([*child, str(path)], path)
        finally:  # what was compared before a Ctrl-C is shown too
            journal = Journal(path, options.limit_s)
            journal.close()
            left = [name for name in options.names() if name not in journal.finished]
            journal.report.unchecked |= dict.fromkeys(left, "the check ended before")
            status = _say(options, journal.report, status or int(bool(left)))
    return status


def compare_in_child(options: CheckOptions, path: Path) -> bool:
    """Goes on with what the journal at `path` lacks; returns whether a new process has to go on behind this one."""
    from .check_journal import Journal

    use_device(options.device)
    journal = Journal(path, options.limit_s)
    try:
        return _compare(options, journal, journal.finished).lost
    finally:
        journal.close()


def _compare(options: CheckOptions, watch: Watch, finished: Collection[str]) -> ParityReport:
    """Everything but what is finished; ends where the device is lost."""
    cases = [case for case in options.cases if str(case) not in finished]
    with progress("parity against float64", len(cases)) as bar:
        watch.advance = bar.update
        report = check_cases(cases, options.backend, watch)
    dtypes = [dtype for dtype in options.networks if _network_name(dtype) not in finished]
    if report.lost or not dtypes:
        return report
    try:
        sample_images()
    except ImportError as error:  # the rest of the check needs nothing but what the package depends on
        for dtype in dtypes:
            report.unchecked[_network_name(dtype)] = str(error)
            watch.done(_network_name(dtype), str(error))
        return report
    with progress("Res2Net-50 on two photographs against float64", len(dtypes), "dtypes") as bar:
        watch.advance = bar.update
        for dtype in dtypes:
            _compare_network(options, dtype, watch, report)
            if report.lost:
                break
            watch.done(_network_name(dtype))
    return report


def _compare_network(options: CheckOptions, dtype: str, watch: Watch, report: ParityReport) -> None:
    backend = options.backend or _kernels_for(torch.device(options.device), TORCH_DTYPES[dtype])
    what = "network", _NETWORK, "all", _PHOTOGRAPHS, backend, dtype
    if not watch.begins(what):
        return
    before = len(report)
    try:
        report += prepare_network(_NETWORK, dtype, options.device, backend).parity
    except Exception as error:
        report.failed(error, what)
    watch.found(report[before:])


def _kernels_for(device: torch.device, dtype: torch.dtype) -> str:
    """What compares kernels: "auto", unless it would leave the whole network to PyTorch's operators for their speed."""
    return "auto" if policy.why_left_to_pytorch(device, dtype) is None else device.type


def _network_name(dtype: str) -> str:
    return f"network {_NETWORK} {dtype}"


def _say(options: CheckOptions, report: ParityReport, status: int) -> int:
    """Prints what came of it; returns the exit status. status: of what compared."""
    print(f"\n{report}\n")
    if options.backend is None:
        for name, reason in unavailable_backends(options.device).items():
            print(f"not checked, backend {name}: {reason}")
    for what, reason in report.unchecked.items():
        print(f"not checked, {what}: {reason}")
    for row in report:
        if row.failure:
            print(f"failed, {row.workload} {row.config} stage {row.stage} {row.dtype}, backend {row.backend}: {row.failure}")
    print(f"{len(report)} comparisons, {len(report.misses)} misses")
    return status or int(not report.ok)
