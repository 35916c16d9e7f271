"""Measures one call on this machine: every choice that can run it is compared with float64, and those that are right are timed.

They take turns in one run, so that drifts of the machine meet all alike, in the very code that later calls take. What is wrong
or raises is put aside for the process and said once.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .._timing import Contender, measure
from ..chain.problem import Chain1dProblem, ChainProblem
from ..chain.tolerances import OTHER_RELUS, TRAINED_OVER_EAGER, first_use_bound
from . import choices
from .base import BACKENDS
from .choices import Problem
from .choices_file import OWN, Row
from .selection import get_backend, put_aside, why_put_aside
from .triton.availability import uses_tf32

SECONDS = 0.4  # for all choices of one call together
_TURN_MS = 3.0  # of calls in a row: what a change of choice costs the first of them weighs little beside it
_MIN_REPEATS, _MAX_REPEATS = 7, 60

_log = logging.getLogger("res2net_fused")
_lock = threading.RLock()  # two measurements at once would measure each other


class Trial(Contender):
    """One choice for one call, on tensors of its own."""

    def __init__(self, choice: str | None, call: Callable[[], Sequence[Tensor]]) -> None:
        """choice: None for none, as the call comes. call: returns everything that is compared: outputs, then gradients."""
        super().__init__(lambda x: x, [torch.empty(0)])
        self.choice, self._call = choice, call

    def _pinned(self) -> AbstractContextManager[None]:
        return nullcontext() if self.choice is None else choices.pinned(self.choice)

    def run(self) -> None:
        with self._pinned():
            for _ in range(self.calls):
                self._call()

    def outputs(self) -> list[Tensor]:
        """Clones of what a call computes."""
        with self._pinned():
            return [t.detach().clone() for t in self._call()]


class NotTaken(Exception):
    """The call went another way than the choice that was to be tried, with the reason: no fault of the choice."""


@dataclass
class Measured:
    """What came of one call. row: None where nothing could be measured. failures: of choices that are wrong or raised."""

    row: Row | None
    failures: dict[str, str] = field(default_factory=dict)


def candidates(passes: str, problem: Problem) -> list[str]:
    """Every choice that can run the call fused, such as "cpu:direct"."""
    found: list[str] = []
    for name in BACKENDS[1:]:
        backend = get_backend(name)
        if isinstance(problem, Chain1dProblem):
            why = backend.why_not_1d(problem)
        else:
            why = backend.why_not_training(problem) if passes == "training" else backend.why_not(problem)
        if (why or why_put_aside(backend, problem)) is None:
            found += backend.ways(problem) if isinstance(problem, ChainProblem) and passes == "inference" else (name,)
    return found


def settle(
    passes: str,
    problem: Problem,
    names: Sequence[str],
    trial: Callable[[str], Trial],
    exact: Callable[[], Sequence[Tensor]],
    seconds: float = SECONDS,
    last: bool = True,
) -> Measured | None:
    """Measures a call and takes the result into the table.

    passes, problem: as for `choices.lookup`. names: of choices, where the block has one its own forward first. trial: makes the
    contender of a choice. exact: what all of them should compute, in float64, the output first. seconds: for all timings.
    last: whether these are the last images: before, None is returned where other ones are to tell (`on_other_images`). On the
    last ones such a choice is left out, and put aside where rounding cannot explain it.
    """
    with _lock, torch.inference_mode(False):
        expected = [t.detach().double() for t in exact()]
        measured = Measured(None)
        trials: dict[str, Trial] = {}
        errors: dict[str, float] = {}
        for name in names:
            if _why_aside(name, problem) is not None:
                continue
            try:
                made = trial(name)
                found = made.outputs()
                errors[name] = _error(found, expected)
            except NotTaken as error:
                measured.failures[name] = str(error)
                continue
            except torch.OutOfMemoryError:
                measured.failures[name] = "no memory is left to try it"  # this time
                continue
            except Exception as error:  # a compiler's, a launcher's, the driver's
                measured.failures[name] = _put_aside(name, problem, f"it raises {type(error).__name__} ({error!s:.200})")
                continue
            limit = _limit(passes, problem, errors.get(OWN, 0.0))
            if name != OWN and not errors[name] <= limit:
                wrong = f"it differs from float64 by {errors[name]:.2g} in the norm; at most {limit:.2g} is allowed"
                by_rounding = _error(found[:1], expected[:1]) <= limit and errors.pop(name) <= OTHER_RELUS
                if by_rounding and not last:
                    return None
                measured.failures[name] = wrong if by_rounding else _put_aside(name, problem, wrong)
                continue
            trials[name] = made
        for name in list(trials):  # one way of a backend that was wrong in another, or by `verification.py`
            why = _why_aside(name, problem)
            if why is not None:
                del trials[name]
                measured.failures.setdefault(name, why)
        if not trials.keys() - {OWN}:
            return measured  # nothing to compare the block's own forward with
        device = str(problem.device)
        first = measure(trials, device, seconds=0, min_repeats=1, warm_up=1, peaks=False)
        once = min(timing.median_ms for timing in first.values())
        for made in trials.values():
            made.calls = max(1, math.ceil(_TURN_MS / max(once, 1e-3)))
        timings = measure(
            trials, device, seconds=seconds, min_repeats=_MIN_REPEATS, max_repeats=_MAX_REPEATS, warm_up=1, peaks=False
        )
        ms = {name: timing.median_ms for name, timing in timings.items()}
        best = min(ms, key=ms.__getitem__)
        measured.row = Row(
            choices.machine(problem.device), choices.kind_of(passes, problem), choices.size_of(problem), best,
            {name: float(f"{value:.4g}") for name, value in ms.items()}, {name: float(f"{errors[name]:.3g}") for name in ms},
        )  # fmt: skip
        choices.record([measured.row])
        return measured


def _error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest of all results' errors relative to the norm; infinite where one is not finite or of another shape."""
    largest = 0.0
    for out, ref in zip(found, expected, strict=True):
        error = float((out.double() - ref).norm() / ref.norm().clamp_min(1e-30)) if out.shape == ref.shape else math.inf
        largest = max(largest, error if math.isfinite(error) else math.inf)
    return largest


def _limit(passes: str, problem: Problem, own: float) -> float:
    """own: the error of the block's own forward, in which norms over a batch magnify rounding."""
    limit = first_use_bound(problem.dtype, problem.dtype == torch.float32 and uses_tf32(problem))
    return max(limit, 0.0 if passes == "inference" else TRAINED_OVER_EAGER.limit * own)


def _why_aside(name: str, problem: Problem) -> str | None:
    return None if name == OWN else why_put_aside(get_backend(name.partition(":")[0]), problem)


def _put_aside(name: str, problem: Problem, reason: str) -> str:
    if name == OWN:
        return reason
    why = put_aside(get_backend(name.partition(":")[0]), problem, reason)
    _log.warning("backend %s for %s: %s; please report it with `res2net-fused info`", name, problem, why)
    return why
