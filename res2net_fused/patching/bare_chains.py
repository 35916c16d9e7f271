"""Chains over images that stand alone, without the 1x1 convolutions of a bottleneck: listed by `explain`, fused by nothing."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..chain.activations import activate
from ..chain.config import PASSTHROUGHS, POOLS, ChainConfig
from ..chain.reference import hierarchical_chain
from ..modules.block_structure import Unit, chain_alone
from ..modules.called_activations import seen_activations
from ..modules.confirmation import agree, random_twin
from .class_swap import own_class
from .recognition import AGREED, DISAGREED, confirmed_once

BARE_CHAIN = (
    "a chain without the 1x1 convolutions of a bottleneck runs its own forward; hierarchical_conv2d computes such a chain"
)

Step = Callable[[Tensor], Tensor]


def is_bare_chain(module: nn.Module) -> bool:
    """Whether the module's convolutions are all it has, and it computes the recurrence of a Res2Net chain with them."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    layout = tuple((unit.top, unit.path, unit.norm, unit.act) for unit in chain_alone(module, nn.Conv2d))
    return bool(layout) and confirmed_once(module, layout, None, _confirm)[1] == AGREED


def _confirm(module: nn.Module, layout: object) -> tuple[None, str]:
    twin = random_twin(module).eval()
    units = chain_alone(twin, nn.Conv2d)
    width, forward = units[0].conv.in_channels, own_class(module).forward
    for scale in (len(units) + 1, len(units)):
        x = torch.randn(2, scale * width, 9, 12, dtype=torch.float64, device="cpu")
        seen = seen_activations(forward, twin, x)
        if isinstance(seen, Exception):
            continue
        own, activations = seen
        for steps, config in itertools.product(_steps(twin, units, activations), _candidates(units[0].conv.stride[0])):
            if config.scale(len(units)) == scale and _agrees(steps, config, x.split(width, 1), own):
                return None, AGREED
    return None, DISAGREED


def _candidates(stride: int) -> Iterator[ChainConfig]:
    for hierarchical, passthrough, pool in itertools.product((True, False), PASSTHROUGHS, POOLS):
        try:
            yield ChainConfig(stride, hierarchical=hierarchical, passthrough=passthrough, pool=pool)
        except ValueError:
            continue  # a combination that does not exist


def _agrees(steps: Sequence[Step], config: ChainConfig, groups: Sequence[Tensor], own: Tensor) -> bool:
    try:
        return agree(torch.cat(hierarchical_chain(groups, lambda k, u: steps[k](u), config), 1), own)
    except (RuntimeError, ValueError, TypeError):  # sizes that do not fit
        return False


def _steps(module: nn.Module, units: Sequence[Unit], activations: Sequence[str]) -> Iterator[list[Step]]:
    """The ways to see each convolution with what follows it: its wrapper, and a norm and an activation behind that."""
    for name, norm_first in itertools.product(("none", *activations), (True, False)):
        yield [_step(module, unit, name, norm_first) for unit in units]


def _step(module: nn.Module, unit: Unit, activation: str, norm_first: bool) -> Step:
    top = module.get_submodule(".".join(unit.top))
    apart = unit.norm is not None and unit.norm[: len(unit.top)] != unit.top
    norm = module.get_submodule(".".join(unit.norm)) if apart and unit.norm else nn.Identity()
    if norm_first:
        return lambda u: activate(norm(top(u)), activation)
    return lambda u: norm(activate(top(u), activation))
