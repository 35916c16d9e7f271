"""The one place where a backend is chosen, and where its reasons come from.

Order: the `backend` argument, then RES2NET_FUSED_BACKEND, then "auto": what was measured to be fastest (`choices.py`), else
the first of AUTO_ORDER that can run the call. An explicit choice that cannot run raises with the reason; auto moves on, and
logs once for each reason.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import torch
from torch.compiler import is_compiling

from ..chain.activations import shows_slope
from ..chain.problem import Chain1dProblem, ChainProblem
from . import choices, policy
from .base import BACKENDS, Backend
from .choices import Problem

ENVIRONMENT_VARIABLE = "RES2NET_FUSED_BACKEND"

FIRST_CHOICE = "first choice on this device"  # as a reason

AUTO_ORDER: dict[str, tuple[str, ...]] = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}

AUTO_ORDER_1D: dict[str, tuple[str, ...]] = {"cpu": ("cpu", "reference")}  # Triton's 1-D kernel was never timed on a GPU

Kind = TypeVar("Kind", ChainProblem, Chain1dProblem)

NOTHING: Mapping[str, str] = MappingProxyType({})

_log = logging.getLogger("res2net_fused")


@dataclass(frozen=True)
class Choice:
    """A backend for one problem, and for every backend asked before it the reason against it. measured: what speaks for it."""

    name: str
    rejected: tuple[tuple[str, str], ...] = ()
    requested_by: str = "auto"
    measured: str = ""

    @property
    def reason(self) -> str:
        if self.requested_by != "auto":
            return f"asked for by {self.requested_by}"
        if self.measured:
            return self.measured
        return "; ".join(f"{name}: {why}" for name, why in self.rejected) or FIRST_CHOICE


@functools.cache
def get_backend(name: str) -> Backend:
    """The backend of this name, whose folder or file is imported when it is first needed."""
    return importlib.import_module(f"{__package__}.{name}").BACKEND


def requested(backend: str) -> tuple[str, str]:
    """The backend asked for and by whom: ("auto", "auto") if by nobody."""
    name, source = backend, f"backend={backend!r}"
    if backend == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE, "auto") or "auto"
        source = f"{ENVIRONMENT_VARIABLE}={name}"
    if name not in BACKENDS:
        raise ValueError(f"{source}: allowed are {', '.join(map(repr, BACKENDS))}")
    return name, "auto" if name == "auto" else source


def is_auto(backend: str) -> bool:
    """Whether nobody asks for a backend; while a graph is traced the environment is not looked at."""
    return backend == "auto" if is_compiling() else requested(backend)[0] == "auto"


def choose_for_training(problem: ChainProblem, backend: str = "auto", against: Mapping[str, str] = NOTHING) -> Choice:
    """The backend, of those that run BatchNorm in training mode, that a call runs on. Arguments and errors as of `choose`."""
    return _choose(
        "cannot train", problem, backend, AUTO_ORDER, lambda found, p: found.why_not_training(p), against=against,
        passes="training",
    )  # fmt: skip


def backend_of_gradients(problem: ChainProblem, backend: str = "auto", against: Mapping[str, str] = NOTHING) -> Backend | None:
    """The backend whose own `chain_backward` runs a chain without batch statistics; None for `chain.backward`."""
    if not shows_slope(problem.config.activation):
        return None
    name, _ = requested(backend)
    by_name = name != "auto"
    for candidate in (name,) if by_name else AUTO_ORDER.get(problem.device.type, ()):
        found = get_backend(candidate)
        offered = problem.batch > 0 and found.runs_chain_backward(problem, by_name)
        if offered and (found.why_not_training(problem) or _why_doubted(found, problem, against)) is None:
            return found
    return None


def choose(problem: Problem, backend: str = "auto", layout: str = "plain", against: Mapping[str, str] = NOTHING) -> Choice:
    """The backend that a call runs on. Raises RuntimeError where an explicit choice cannot run it.

    layout: of the call's packed weights. Auto takes the backend that they were packed for where it can run the call: packing
    anew at each call costs more than the predictions of `why_not_auto` differ.
    against: reasons of the caller's, by the names of backends.
    """
    if isinstance(problem, Chain1dProblem):
        return _choose("cannot run", problem, backend, AUTO_ORDER_1D, lambda found, p: found.why_not_1d(p), against=against)

    packed_for = layout in AUTO_ORDER.get(problem.device.type, ())[:-1] and requested(backend)[0] == "auto"
    if packed_for and choices.lookup("inference", problem) is None:
        found = get_backend(layout)
        if (found.why_not(problem) or _why_doubted(found, problem, against)) is None:
            return Choice(layout, (("others", "the weights are packed for this one"),))
    return _choose(
        "cannot run", problem, backend, AUTO_ORDER, lambda found, p: found.why_not(p), lambda found, p: found.why_not_auto(p),
        against,
    )  # fmt: skip


def _choose(
    cannot: str,
    problem: Kind,
    backend: str,
    orders: dict[str, tuple[str, ...]],
    why_not: Callable[[Backend, Kind], str | None],
    why_not_auto: Callable[[Backend, Kind], str | None] = lambda found, problem: None,
    against: Mapping[str, str] = NOTHING,
    passes: str = "inference",
) -> Choice:
    """The backend asked for, or what was measured, or the first in order that speaks neither against nor for a later one."""
    name, source = requested(backend)
    if name != "auto":
        named = get_backend(name)
        why = why_not(named, problem) or _why_doubted(named, problem, against)
        if why is not None:
            raise RuntimeError(f"{source} {cannot} {problem}: {why}")
        return Choice(name, requested_by=source)
    measured = choices.lookup(passes, problem)
    if measured is not None and measured.backend:
        found = get_backend(measured.backend)
        if (why_not(found, problem) or _why_doubted(found, problem, against)) is None:
            return Choice(measured.backend, measured=str(measured))
    rejected: list[tuple[str, str]] = []
    postponed = None
    order = orders.get(problem.device.type, ("reference",))
    for candidate in order:
        found = get_backend(candidate)
        why = why_not(found, problem) or _why_doubted(found, problem, against)
        if why is None and candidate == "cpu":
            why = policy.why_left_to_pytorch(problem.device, problem.dtype)
        if why is None and postponed is not None and candidate == order[-1]:
            return Choice(postponed, tuple(r for r in rejected if r[0] != postponed))
        if why is None:
            why = why_not_auto(found, problem)
            postponed = None if why is None else candidate
        if why is None:
            _warn_of_reference(candidate, problem, rejected)
            return Choice(candidate, tuple(rejected))
        rejected.append((candidate, why))
        _log_once(candidate, why)
    reasons = "; ".join(f"{name}: {why}" for name, why in rejected)
    raise RuntimeError(f"no backend {cannot.replace('not', '')} {problem}: {reasons}")


_aside: dict[tuple[str, Hashable], str] = {}  # (backend, `Backend.instance`) -> what was found wrong in this process


def _why_doubted(backend: Backend, problem: Problem, against: Mapping[str, str]) -> str | None:
    if not _aside:
        return against.get(backend.name)
    return against.get(backend.name) or _aside.get((backend.name, backend.instance(problem)))


def why_put_aside(backend: Backend, problem: Problem) -> str | None:
    """What was found wrong with it for calls of this kind in this process, or None."""
    return _aside.get((backend.name, backend.instance(problem)))


def put_aside(backend: Backend, problem: Problem, reason: str) -> str:
    """Makes every later choice for calls of this kind another one, which has what this returns among its reasons."""
    why = _aside.setdefault((backend.name, backend.instance(problem)), f"put aside in this process: {reason}")
    choices.forget_native()
    return why


def plan(problem: Problem, name: str) -> str:
    """One line for `explain`: how the backend of this name would run the call."""
    found = get_backend(name)
    return found.plan_1d(problem) if isinstance(problem, Chain1dProblem) else found.plan(problem)


@functools.lru_cache(1024)  # reasons hold sizes: of ever new shapes there is no end
def _log_once(candidate: str, why: str) -> None:
    _log.info("backend %s is not used: %s", candidate, why)


_warned: list[str] = []


def _warn_of_reference(chosen: str, problem: Problem, rejected: Sequence[tuple[str, str]]) -> None:
    """Warns, once a process, that a GPU runs none of the kernels; torch.float64 has none anywhere."""
    if _warned or not rejected or chosen != "reference" or problem.device.type != "cuda" or problem.dtype == torch.float64:
        return
    _warned.append("; ".join(f"{name}: {why}" for name, why in rejected))
    _log.warning("PyTorch's own operators run on this GPU, not this package's kernels: %s", _warned[0])
