"""The parity gate: every result that a benchmark would time, first compared with float64.

Outputs are poisoned: while a tested path runs, PyTorch fills every tensor it allocates with NaN, so that an element that
nobody writes makes the error NaN, which is no pass.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .._tables import format_table
from ..backends.base import BACKENDS
from ..backends.selection import choose, get_backend
from ..chain.config import ChainConfig
from ..chain.problem import ChainProblem
from ..chain.tolerances import forward_bound, network_bound
from ..models.network import Network
from ..patching.explain import explain
from .cases import Case, fused
from .cuda_errors import poisons_context

NAMED_BACKENDS = tuple(name for name in BACKENDS if name != "auto")
Compared = tuple[str, str, str, int, str, str]  # what a row compares: workload, config, stage, batch, backend, dtype


@dataclass(frozen=True)
class ParityRow:
    """One comparison. error, eager_error: ||out - ref64|| / ||ref64|| of the tested path and of eager PyTorch.

    failure: what kept the comparison from being made, which is no pass.
    """

    workload: str
    config: str
    stage: str
    batch: int
    backend: str
    dtype: str
    error: float
    eager_error: float
    bound: float
    failure: str = ""

    @property
    def ok(self) -> bool:
        return not self.failure and self.error <= self.bound  # False for NaN

    @property
    def compared(self) -> Compared:
        return self.workload, self.config, self.stage, self.batch, self.backend, self.dtype

    @property
    def outcome(self) -> str:
        return "FAILED" if self.failure else "ok" if self.ok else "MISS"


class Watch:
    """Who is told of every comparison before and after it; this one lets all be made.

    advance: called after each case or network.
    """

    def __init__(self) -> None:
        self.advance: Callable[[], object] = lambda: None

    def begins(self, what: Compared) -> bool:
        """Whether this comparison, which is next, is to be made."""
        return True

    def found(self, rows: Sequence[ParityRow]) -> None:
        """Rows that have just been made."""

    def done(self, what: str, unchecked: str = "") -> None:
        """A case or network is at its end. unchecked: why it was not compared."""
        self.advance()


class ParityReport(list[ParityRow]):
    """A list of ParityRow that prints as a table.

    unchecked: what is not in it, and why. lost: whether its process can use the device no more.
    """

    def __init__(self, rows: Iterable[ParityRow] = ()) -> None:
        super().__init__(rows)
        self.unchecked: dict[str, str] = {}
        self.lost = False

    def failed(self, error: Exception, what: Compared) -> None:
        """Adds a row of what could not be compared."""
        self.append(failed_row(what, words(error)))
        self.lost = poisons_context(error)

    @property
    def ok(self) -> bool:
        return bool(self) and all(row.ok for row in self)

    @property
    def misses(self) -> ParityReport:
        return ParityReport(row for row in self if not row.ok)

    def worst(self) -> ParityReport:
        """Return the row nearest to its bound, or furthest beyond it, of each workload, backend and dtype."""
        worst: dict[tuple[str, str, str], ParityRow] = {}
        for row in self:
            key = (row.workload, row.backend, row.dtype)
            if key not in worst or _badness(row) > _badness(worst[key]):
                worst[key] = row
        return ParityReport(worst.values())

    def __str__(self) -> str:
        head = ("workload", "config", "stage", "backend", "dtype", "batch", "error", "eager", "bound", "")
        rows = [
            (r.workload, r.config, r.stage, r.backend, r.dtype, str(r.batch), f"{r.error:.1e}", f"{r.eager_error:.1e}",
             f"{r.bound:.1e}", r.outcome)
            for r in self
        ]  # fmt: skip
        return format_table(head, rows, left=5)


def failed_row(what: Compared, failure: str) -> ParityRow:
    nan = float("nan")
    return ParityRow(*what, nan, nan, nan, failure)


def _badness(row: ParityRow) -> float:
    return row.error / row.bound if row.error == row.error and row.bound > 0 else float("inf")


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference|| in float64, also across devices; NaN where shapes differ."""
    if out.shape != reference.shape:
        return float("nan")
    reference = reference.double()
    norm = reference.norm()
    return float((out.to(reference.device).double() - reference).norm() / norm) if norm > 0 else float("nan")


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Every tensor that PyTorch allocates without a value holds NaN (or the largest integer)."""
    mode, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic  # a module whose property its types do not know
    fill = settings.fill_uninitialized_memory
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of operators without a deterministic form: only the filling is wanted
            torch.use_deterministic_algorithms(True, warn_only=True)
            settings.fill_uninitialized_memory = True
            yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill


@contextmanager
def convolution_precision(dtype: str, device: str | torch.device) -> Iterator[None]:
    """Set what fp32 means: for "tf32" CUDA's convolutions and products may round to TF32, for "float32" they may not.

    Half types and other devices leave the settings alone. What the older names (`allow_tf32`) say agrees with what is set:
    where it does not, whoever reads them raises, as Dynamo and torch.export do.
    """
    if dtype not in ("float32", "tf32") or torch.device(device).type != "cuda":
        yield
        return
    cudnn, mkldnn, cuda = (getattr(torch.backends, name) for name in ("cudnn", "mkldnn", "cuda"))
    settings = [cudnn.conv, cudnn.rnn, cuda.matmul, mkldnn.matmul]
    before = [setting.fp32_precision for setting in settings]
    # Where they cannot be read already, they were this.
    allowed = _read(lambda: cudnn.allow_tf32, before[0] != "tf32")
    products = _read(torch.get_float32_matmul_precision, "highest")
    try:
        _set_older_names(dtype == "tf32", "high" if dtype == "tf32" else "highest")
        for setting in settings[:3]:  # the older names leave "none" in place of "ieee", which a setting above may widen
            setting.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        yield
    finally:
        _set_older_names(allowed, products)
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value


def _read(read: Callable[[], Any], otherwise: object) -> Any:
    try:
        return read()
    except RuntimeError:
        return otherwise


def _set_older_names(allow_tf32: bool, products: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions announce that these names will go
        torch.backends.cudnn.allow_tf32 = allow_tf32
        torch.set_float32_matmul_precision(products)


class CannotRun(RuntimeError):
    """A backend that was asked for is none for this case."""


def unavailable_backends(device: str) -> dict[str, str]:
    """Return why backends cannot run a plain fp32 chain on this device, by name."""
    problem = ChainProblem(ChainConfig(), torch.device(device), torch.float32, 1, 14, 14, 26, 3, True)
    return {name: why for name in NAMED_BACKENDS if (why := get_backend(name).why_not(problem)) is not None}


def check_case(case: Case, backend: str | None = None, keep_going: bool = False, watch: Watch | None = None) -> ParityReport:
    """Compares one chain or block in channels-last with float64.

    backend: as for `accelerate`; None for each backend that can run the case. RuntimeError where a backend that was asked
    for cannot, or where the block would not run fused. keep_going: what goes wrong with a backend is the failure of its row.
    """
    module = case.module()
    (x,) = case.inputs()
    x = x.contiguous(memory_format=torch.channels_last)
    rows, watch = ParityReport(), watch or Watch()
    with torch.inference_mode(), convolution_precision(case.dtype, case.device):
        chosen = _backends(case, module, backend)  # which may depend on the precision
        expected = copy.deepcopy(module).double()(x.double())
        eager_error = relative_error(module(x), expected)
        bound = forward_bound(case.dtype, eager_error)
        for name in chosen:
            what = compared(case, name)
            if not watch.begins(what):
                continue
            try:
                rows.append(ParityRow(*what, _error_of(case, module, name, x, expected), eager_error, bound))
            except Exception as error:
                if not keep_going:
                    raise
                rows.failed(error, what)
            watch.found(rows[-1:])
            if rows.lost:
                break
    return rows


def compared(case: Case, backend: str | None) -> Compared:
    """backend: None where the fault is nobody's, such as one of eager PyTorch."""
    return case.workload, str(case.config), f"{case.stage} {case.variant}", case.batch, backend or "any", case.dtype


def _backends(case: Case, module: nn.Module, backend: str | None) -> list[str]:
    problem = case.problem(module)
    if backend is None:
        return [name for name in NAMED_BACKENDS if get_backend(name).why_not(problem) is None]
    try:
        return [choose(problem, backend).name]
    except RuntimeError as error:
        raise CannotRun(str(error)) from None


def _error_of(case: Case, module: nn.Module, backend: str, x: Tensor, expected: Tensor) -> float:
    model = fused(module, backend)
    with poisoned_allocations():
        error = relative_error(model(x), expected)
    for block in explain(model) if isinstance(model, nn.Module) else ():
        if not block.fused:
            raise RuntimeError(f"{case} did not run fused: {block.reason}")
    return error


def words(error: Exception) -> str:
    """What was raised, in a line of a table or a record."""
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def why_not(cases: Iterable[Case], backend: str) -> str | None:
    """The first reason of a backend that can run none of the cases, else None."""
    reasons = []
    for case in cases:
        with convolution_precision(case.dtype, case.device):
            try:
                _backends(case, case.module(), backend)
            except CannotRun as error:
                reasons.append(str(error))
            else:
                return None
    return reasons[0] if reasons else None


def check_cases(cases: Sequence[Case], backend: str | None = None, watch: Watch | None = None) -> ParityReport:
    """The gate over many cases. What goes wrong with one is a failure in its row.

    It ends behind a fault that leaves the device unusable to this process (`lost`).
    """
    report, watch = ParityReport(), watch or Watch()
    for case in cases:
        why, everything = "", compared(case, None)
        if watch.begins(everything):
            try:
                found = check_case(case, backend, keep_going=True, watch=watch)
            except CannotRun as error:
                why = report.unchecked[str(case)] = str(error)
            except Exception as error:
                report.failed(error, everything)
                watch.found(report[-1:])
            else:
                report += found
                report.lost = found.lost
            if report.lost:
                break
        watch.done(str(case), why)
    return report


def check_network(
    network: Network, model: Network, images: Tensor, config: str, dtype: str
) -> tuple[ParityReport, dict[str, float]]:
    """Compares an accelerated copy `model` of `network` with float64, at every stage's features and the logits.

    images: (N, 3, H, W), channels-last. Also returns the largest absolute difference between `model` and `network` at each
    place. RuntimeError where a block of `model` would not run fused.
    """
    names = [*(f"{i + 1} features" for i in range(len(network.feature_channels))), "logits"]
    rows, largest = ParityReport(), {}
    with torch.inference_mode(), convolution_precision(dtype, images.device):
        expected = _features(copy.deepcopy(network).double(), images.double())
        eager = _features(network, images)
        with poisoned_allocations():
            ours = _features(model, images)
    blocks = explain(model)
    for block in blocks:
        if not block.fused:
            raise RuntimeError(f"block {block.name} of {config} did not run fused: {block.reason}")
    backend = ", ".join(sorted({block.backend for block in blocks}))
    for name, a, b, c in zip(names, expected, eager, ours, strict=True):
        eager_error = relative_error(b, a)
        bound = network_bound(eager_error)
        error = relative_error(c, a)
        rows.append(ParityRow("network", config, name, images.shape[0], backend, dtype, error, eager_error, bound))
        largest[name] = float((c.double() - b.double()).abs().max())
    return rows, largest


def _features(network: Network, images: Tensor) -> list[Tensor]:
    stages = network.stages(images)
    return [*stages, network.classify(stages[-1])]
