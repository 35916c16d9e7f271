"""Measures a call of `hierarchical_conv2d` that is no block's, where RES2NET_FUSED_CHOICE asks for it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..backends import choices
from ..backends.measuring import Measured, Trial, candidates, settle
from ..backends.selection import get_backend, is_auto
from ..chain import reference
from ..chain.problem import ChainProblem

_SEED = 20190402
_log = logging.getLogger("res2net_fused")


def measure_if_asked(problem: ChainProblem, backend: str, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> None:
    """Measures a call that has just come; whatever goes wrong, it goes on by what is predicted."""
    if not is_auto(backend) or problem.batch == 0 or not choices.is_to_be_measured("inference", problem):
        return
    choices.is_measured_now("inference", problem)
    try:
        measure_chain(problem, weights, biases)
    except Exception as error:  # no memory
        _log.warning("a chain's call (%s) cannot be measured: %s: %.300s", problem, type(error).__name__, error)


def measure_chain(problem: ChainProblem, weights: Sequence[Tensor], biases: Sequence[Tensor] | None) -> Measured:
    """Measures a call with packed weights on random images.

    weights, biases: of the chain, each (w, w/groups, 3, 3) and (w,), which no gradient reaches.
    """
    weights, biases = [w.detach() for w in weights], None if biases is None else [b.detach() for b in biases]
    alone = replace(problem, around=None)

    def trial(choice: str) -> Trial:
        return Trial(choice, chain_call(alone, weights, biases, choice.partition(":")[0]))

    def exact() -> Sequence[Tensor]:
        wide = None if biases is None else [b.double() for b in biases]
        return [reference.hierarchical_conv2d(_images(alone).double(), [w.double() for w in weights], wide, alone.config)]

    with torch.no_grad(), torch.autocast(problem.device.type, enabled=False):
        measured = settle("inference", alone, candidates("inference", alone), trial, exact)
    assert measured is not None
    return measured


def chain_call(
    problem: ChainProblem, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, layout: str
) -> Callable[[], Sequence[Tensor]]:
    """The operator on random images, with weights packed for the backend `layout`, as a function without arguments."""
    x, packed = _images(problem), get_backend(layout).pack(weights, biases, problem.config)
    settings = problem.config.as_kwargs().values()

    def call() -> Sequence[Tensor]:
        return [torch.ops.res2net_fused.hierarchical_conv2d.default(x, weights, biases, packed, layout, *settings, "auto")]

    return call


def _images(problem: ChainProblem) -> Tensor:
    """x (N, s*w, H, W), the same at every call."""
    generator = torch.Generator("cpu").manual_seed(_SEED)
    shape = problem.batch, problem.scale * problem.width, problem.height, problem.width_pixels
    x = torch.randn(shape, generator=generator, device="cpu").to(problem.device, problem.dtype)
    return x.contiguous(memory_format=torch.channels_last) if problem.channels_last else x
