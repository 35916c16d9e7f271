"""The one place where a backend is chosen, and where its reasons come from.

Order: the `backend` argument, then RES2NET_FUSED_BACKEND, then "auto": the first of AUTO_ORDER that can run the call. An
explicit choice that cannot run raises with the reason; auto moves on, and logs once for each reason.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..chain import BACKENDS, ChainConfig, ChainProblem

ENVIRONMENT_VARIABLE = "RES2NET_FUSED_BACKEND"
FIRST_CHOICE = "first choice on this device"  # as a reason
AUTO_ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpu", "reference")}
_MODULES = {"reference": "aten", "triton": "triton_backend", "cpu": "native_cpu", "cuda": "native_cuda"}
# Backends whose kernels no committed record has measured on a GPU, and what `explain` says of them; empty once one has.
EXPERIMENTAL = dict.fromkeys(("cuda", "triton"), "experimental: never measured on a GPU")
_log = logging.getLogger("res2net_fused")


class Backend(Protocol):
    """What each module in this folder offers.

    One may also offer `why_not_auto(problem) -> str | None`: why auto should rather take a later backend for a call that can
    run here; if only the last one, the reference, is left, it runs here nevertheless.

    One may offer `input_gradient(problem, dz, weight) -> Tensor | None`: du of one convolution, None where ATen is faster,
    and `convolution(problem, u, weight) -> Tensor | None`: z of one convolution without bias or activation.

    One with a backward of the whole chain without batch statistics offers `chain_backward`, as in `triton_training.py`, and
    `runs_chain_backward(problem, by_name) -> bool`: whether that takes a call that it can train; by_name: it was asked for.

    One that runs the chain with BatchNorm in training mode is a `TrainingBackend`. Where it has more than the convolutions it
    offers `train_forward` and maybe `train_backward`, as in `native_cpu_training.py`; with `SYNCHRONISES = True` these take
    `group`, the processes over which statistics are taken, else ATen's passes run in their place.
    """

    def why_not(self, problem: ChainProblem) -> str | None:
        """None where the call can run, else the reason: first of the machine, then of the problem."""

    def forward(
        self,
        problem: ChainProblem,
        x: Tensor,  # (N, s*w, H, W), any strides
        weights: Sequence[Tensor],  # each (w, w/groups, 3, 3)
        biases: Sequence[Tensor] | None,  # each (w,), the weights' dtype or fp32
        packed: Sequence[Tensor] | None,  # what `pack` returned for these weights, or None
    ) -> Tensor:
        """A new tensor (N, s*w, H/stride, W/stride) in the memory format that `chain.memory_format(x)` names."""

    def pack(self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig) -> list[Tensor]:
        """The weights in this backend's own layout; empty where it reads them as they are."""

    def plan(self, problem: ChainProblem) -> str:
        """One line for `explain`: how this call would run."""


class TrainingBackend(Backend, Protocol):
    """One that runs the chain with BatchNorm in training mode."""

    def why_not_training(self, problem: ChainProblem) -> str | None:
        """As `why_not`."""

    def plan_training(self, problem: ChainProblem) -> str:
        """A few words for `explain`."""


@dataclass(frozen=True)
class Choice:
    """A backend for one problem, and for every backend asked before it the reason against it."""

    name: str
    rejected: tuple[tuple[str, str], ...] = ()
    requested_by: str = "auto"

    @property
    def reason(self) -> str:
        if self.requested_by != "auto":
            return f"asked for by {self.requested_by}"
        return "; ".join(f"{name}: {why}" for name, why in self.rejected) or FIRST_CHOICE


@functools.cache
def get_backend(name: str) -> Any:
    """A module that is a `Backend`; untyped, for what it may offer besides differs."""
    return importlib.import_module(f"{__package__}.{_MODULES[name]}")


def requested(backend: str) -> tuple[str, str]:
    """The backend asked for and by whom: ("auto", "auto") if by nobody."""
    name, source = backend, f"backend={backend!r}"
    if backend == "auto":
        name = os.environ.get(ENVIRONMENT_VARIABLE, "auto") or "auto"
        source = f"{ENVIRONMENT_VARIABLE}={name}"
    if name not in BACKENDS:
        raise ValueError(f"{source}: allowed are {', '.join(map(repr, BACKENDS))}")
    return name, "auto" if name == "auto" else source


def choose_for_training(problem: ChainProblem, backend: str = "auto") -> Choice:
    """As `choose`, of the backends that run BatchNorm in training mode."""
    name, source = requested(backend)
    order = AUTO_ORDER.get(problem.device.type, ("reference",)) if name == "auto" else (name,)
    rejected: list[tuple[str, str]] = []
    for candidate in order:
        module = get_backend(candidate)
        trains = getattr(module, "why_not_training", None)
        why = "it has no kernels for BatchNorm in training mode" if trains is None else trains(problem)
        if why is None:
            _warn_of_reference(candidate, problem, rejected)
            return Choice(candidate, tuple(rejected), source)
        rejected.append((candidate, why))
    if name != "auto":
        raise RuntimeError(f"{source} cannot train {problem}: {why}")
    raise RuntimeError(f"no backend can train {problem}: " + "; ".join(f"{name}: {why}" for name, why in rejected))


def backend_of_gradients(problem: ChainProblem, backend: str = "auto") -> Any:
    """The backend whose own `chain_backward` runs the backward of a chain without batch statistics; None for `backward.py`."""
    name, _ = requested(backend)
    by_name = name != "auto"
    for candidate in (name,) if by_name else AUTO_ORDER.get(problem.device.type, ()):
        module = get_backend(candidate)
        offered = hasattr(module, "chain_backward") and module.runs_chain_backward(problem, by_name)
        if offered and problem.batch > 0 and module.why_not_training(problem) is None:
            return module
    return None


def choose(problem: ChainProblem, backend: str = "auto", layout: str = "plain") -> Choice:
    """The backend that a call runs on. Raises RuntimeError where an explicit choice cannot run it.

    layout: of the call's packed weights. Auto takes the backend that they were packed for where it can run the call: packing
    anew at each call costs more than the predictions of `why_not_auto` differ.
    """
    name, source = requested(backend)
    if name != "auto":
        why = get_backend(name).why_not(problem)
        if why is not None:
            raise RuntimeError(f"{source} cannot run {problem}: {why}")
        return Choice(name, requested_by=source)
    rejected: list[tuple[str, str]] = []
    postponed = None
    order = AUTO_ORDER.get(problem.device.type, ("reference",))
    if layout in order[:-1] and get_backend(layout).why_not(problem) is None:
        return Choice(layout, (("others", "the weights are packed for this one"),))
    for candidate in order:
        module = get_backend(candidate)
        why = module.why_not(problem)
        if why is None and postponed is not None and candidate == order[-1]:
            return Choice(postponed, tuple(r for r in rejected if r[0] != postponed))
        if why is None and hasattr(module, "why_not_auto"):
            why = module.why_not_auto(problem)
            postponed = None if why is None else candidate
        if why is None:
            _warn_of_reference(candidate, problem, rejected)
            return Choice(candidate, tuple(rejected))
        rejected.append((candidate, why))
        _log_once(candidate, why)
    raise RuntimeError(f"no backend can run {problem}: " + "; ".join(f"{name}: {why}" for name, why in rejected))


@functools.lru_cache(1024)  # reasons hold sizes: of ever new shapes there is no end
def _log_once(candidate: str, why: str) -> None:
    _log.info("backend %s is not used: %s", candidate, why)


_warned: list[str] = []


def _warn_of_reference(chosen: str, problem: ChainProblem, rejected: Sequence[tuple[str, str]]) -> None:
    """Once a process, that a GPU runs none of the kernels; torch.float64 has none anywhere."""
    if _warned or not rejected or chosen != "reference" or problem.device.type != "cuda" or problem.dtype == torch.float64:
        return
    _warned.append("; ".join(f"{name}: {why}" for name, why in rejected))
    _log.warning("PyTorch's own operators run on this GPU, not this package's kernels: %s", _warned[0])
