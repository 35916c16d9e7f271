"""Measures a block's call: its own forward, and itself fused in every way that can run it, on copies and random images."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..backends import choices
from ..backends.choices_file import OWN
from ..backends.measuring import SECONDS, Measured, NotTaken, Trial, candidates, settle
from ..backends.selection import choose
from ..chain.memory_format import memory_format
from ..chain.problem import Chain1dProblem, ChainProblem
from ..chain.tolerances import on_other_images
from ..ops.packed_weights import one_operator
from .block_state import STATE

_SEED = 20190402
_log = logging.getLogger("res2net_fused")


def measure_unasked(block: nn.Module, x: Tensor, passes: str, problem: ChainProblem | Chain1dProblem) -> None:
    """Measures a call that has just come, if it can be; whatever goes wrong, the call goes on by what is predicted."""
    choices.is_measured_now(passes, problem)
    try:
        measure_block(block, x, passes, problem)
    except Exception as error:  # a module that cannot be copied, no memory
        _log.warning("a block's call (%s) cannot be measured: %s: %.300s", problem, type(error).__name__, error)


def measure_block(
    block: nn.Module, x: Tensor, passes: str, problem: ChainProblem | Chain1dProblem, seconds: float = SECONDS
) -> Measured:
    """Measures a call of the block on images like x, of which only the kind is looked at, and takes it into the table.

    passes, problem: as for `choices.lookup`. seconds: for all timings. The block, its statistics, gradients and hooks, and the
    random state are left as they are: copies without hooks compute, and no dropout.
    """

    def measured(number: int, last: bool) -> Measured | None:
        return _measure(block, x, passes, problem, seconds, _SEED + number, last)

    return on_other_images(measured)


def _measure(
    block: nn.Module, x: Tensor, passes: str, problem: ChainProblem | Chain1dProblem, seconds: float, seed: int, last: bool
) -> Measured | None:
    generator = torch.Generator("cpu").manual_seed(seed)
    with torch.inference_mode(False), torch.random.fork_rng(devices=_devices(x)):
        images = torch.randn(x.shape, generator=generator, device="cpu").to(x.device, x.dtype)
        images = images.contiguous(memory_format=memory_format(x)) if x.dim() == 4 else images
        bare = bare_copy(block)
        _fill_zeros(bare, generator)

        def trial(choice: str) -> Trial:
            made = copy.deepcopy(bare)
            call = call_of(made, images, passes)

            def taken() -> Sequence[Tensor]:
                found = call()
                refusal = vars(made)[STATE].last_refusal
                if refusal is not None:
                    raise NotTaken(f"the block's own forward ran: {refusal}")
                return found

            return Trial(choice, call if choice == OWN else taken)

        def exact() -> Sequence[Tensor]:
            wide = copy.deepcopy(bare).double()
            with choices.pinned(OWN), torch.autocast(x.device.type, enabled=False):
                return call_of(wide, images.double(), passes)()

        return settle(passes, problem, [OWN, *_fused(passes, problem)], trial, exact, seconds, last)


def _fused(passes: str, problem: ChainProblem | Chain1dProblem) -> list[str]:
    """The choices against the block's own forward: of a block that is not one operator, or is differentiated, its chain's."""
    if passes == "training" or isinstance(problem, Chain1dProblem) or (passes == "inference" and one_operator(problem.config)):
        return candidates(passes, problem)
    return [choose(replace(problem, around=None)).name]


def call_of(block: nn.Module, x: Tensor, passes: str) -> Callable[[], Sequence[Tensor]]:
    """A function of the block's output, and where `passes` have a backward of all gradients too."""
    if passes == "inference":

        def forward() -> Sequence[Tensor]:
            with torch.no_grad():
                return [block(x)]

        return forward

    leaf = x.detach().requires_grad_()
    gradient: list[Tensor] = []

    def forward_and_backward() -> Sequence[Tensor]:
        block.zero_grad(set_to_none=True)
        leaf.grad = None
        with torch.enable_grad():
            out = block(leaf)
            if not gradient:  # all ones would hide a transposed one
                ramp = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).sin().view(out.shape)
                gradient.append(torch.empty_like(out).copy_(ramp))
            out.backward(gradient[0])
        return [out, *(t.grad for t in (leaf, *block.parameters()) if t.grad is not None)]

    return forward_and_backward


def bare_copy(module: nn.Module, kept: object = None) -> nn.Module:
    """A copy without hooks, whose dropout drops nothing and whose norms take no other process's statistics.

    kept: a hook that stays.
    """
    copied = copy.deepcopy(module)
    for m in copied.modules():
        for hooks in (m._forward_hooks, m._forward_pre_hooks, m._backward_hooks, m._backward_pre_hooks):
            for key in [key for key, hook in hooks.items() if hook is not kept]:
                del hooks[key]
        if "drop" in type(m).__name__.lower():
            m.eval()
        if isinstance(m, nn.SyncBatchNorm):
            m.__class__ = _OneProcessNorm  # type: ignore[assignment]
    return copied


class _OneProcessNorm(nn.BatchNorm2d):
    """What a SyncBatchNorm computes where there is one process, for inputs (N, C, ...)."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def _fill_zeros(module: nn.Module, generator: torch.Generator) -> None:
    """Gives parameters that are all zero random values: behind a norm that starts with a factor of zero nothing would show."""
    with torch.no_grad():
        for p in module.parameters():
            if not p.is_meta and not p.any():
                p.copy_(torch.randn(p.shape, generator=generator, device="cpu").mul_(0.1))


def _devices(x: Tensor) -> list[torch.device]:
    return [x.device] if x.device.type == "cuda" else []
