"""Which modules hold a 1-D Res2Net chain, and which recurrence each computes: proposed by their parts, confirmed in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..chain.config import PADDING_MODES, Chain1dConfig
from ..chain.reference import hierarchical_conv1d
from ..modules.block_parts import resolve
from ..modules.block_structure import Structure, ends_of, find_rows, norms_of
from ..modules.called_activations import seen_activations
from ..modules.confirmation import agree, random_twin
from ..modules.folding import is_identity
from ..modules.fused_forward1d import NORMS, ChainParts, Layout1d, enter_block_1d, finish_block_1d, parts_1d, resolve_weights
from .class_swap import own_class
from .recognition import AGREED, DISAGREED, confirmed_once

# Where the published code keeps the chain's convolutions and norms.
_ENDS = 600  # ways in which a bottleneck may call what it has, that are tried
_PATHS = (("convs.*", "bns.*"), ("blocks.*.conv.conv", "blocks.*.norm.norm"), ("blocks.*.conv", "blocks.*.norm"))


def layout_1d_of(module: nn.Module) -> Layout1d | None:
    """The paths at which a module keeps 1-D convolutions of one shape and their norms, or None where it has none."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    for paths in _PATHS:
        convs_path, bns_path = (tuple(path.split(".")) for path in paths)
        found, bns = list(resolve(module, convs_path)), list(resolve(module, bns_path))
        convs = [conv for conv in found if isinstance(conv, nn.Conv1d)]
        if not convs or not len(found) == len(convs) == len(bns):
            continue
        if len({(conv.in_channels, conv.out_channels, conv.kernel_size, conv.dilation) for conv in convs}) > 1:
            continue
        if convs[0].in_channels != convs[0].out_channels or not all(hasattr(bn, "running_mean") for bn in bns):
            continue
        around = all(isinstance(module._modules.get(name), nn.Module) for name in ("conv1", "bn1", "conv3", "bn3", "relu"))
        return Layout1d(convs_path, bns_path, around)
    chain, around_chain = find_rows(module)
    return Layout1d(tuple(unit.path for unit in chain), norms_of(chain), around_chain is not None) if chain else None


def looks_like_1d(module: nn.Module) -> bool:
    """Whether `explain` lists the module: equal convolutions alone do not make a stack of them a Res2Net chain."""
    layout = layout_1d_of(module)
    if layout is None or layout.outer or "*" in layout.convs:
        return layout is not None
    return recognise_1d(module, layout)[1] in (AGREED, DISAGREED)


def recognise_1d(block: nn.Module, layout: Layout1d) -> tuple[tuple[Chain1dConfig, Layout1d] | None, str]:
    """The confirmed settings and layout of a module that seems to have this layout, or None and the reason."""
    return confirmed_once(block, layout, _structure(parts_1d(block, layout)), _confirm)


ORDINARY = "a stack of equal convolutions, not over groups of channels"


def _structure(chain: ChainParts) -> str | None:
    without = all(map(is_identity, chain.bns))
    for i, (conv, bn) in enumerate(zip(chain.convs, chain.bns, strict=True)):
        if type(conv) is not nn.Conv1d:
            return f"the chain's convolution {i} is a {type(conv).__name__}, not a plain Conv1d"
        if type(bn) not in NORMS and not without:
            return f"the chain's norm {i} is a {type(bn).__name__}, not a BatchNorm1d"
        if conv.stride != (1,) or conv.groups != 1 or conv.kernel_size[0] % 2 == 0:
            return f"the chain's convolution {i} has a stride, groups or an even kernel"
        if (conv.bias is None) != (chain.convs[0].bias is None):
            return "some of the chain's convolutions have a bias and some have none"
    return None


def _candidates(dilation: int, activations: Sequence[str]) -> Iterator[Chain1dConfig]:
    """Settings the chain may have; a wrapper may pad where the convolution inside does not."""
    passthroughs = "last", "first", "none", "first_added"
    for activation, padding_mode, passthrough in itertools.product(activations, PADDING_MODES, passthroughs):
        yield Chain1dConfig(dilation, passthrough, padding_mode, activation)


def _confirm(block: nn.Module, layout: Layout1d) -> tuple[tuple[Chain1dConfig, Layout1d] | None, str]:
    twin = random_twin(block).eval()  # in training mode the class's own forward runs
    convs = parts_1d(twin, layout).convs
    width, (dilation,), (taps,) = convs[0].in_channels, convs[0].dilation, convs[0].kernel_size
    structure = find_rows(twin)[1] if layout.outer else None
    entry: Any = twin._modules.get("conv1") if structure is None else structure.first.conv
    channels = entry.in_channels if layout.outer else (len(convs) + 1) * width
    forward = own_class(block).forward
    errors = []
    for given in (channels, len(convs) * width):  # with a group that passes, and without
        x = torch.randn(2, given, dilation * taps + 5, dtype=torch.float64, device="cpu")
        seen = seen_activations(forward, twin, x)
        if isinstance(seen, Exception):
            errors.append(seen)
            continue
        own, activations = seen
        inside: dict[object, list[tuple[Chain1dConfig, Tensor]]] = {}  # what the chain gives, by what comes before it
        for candidate in itertools.chain([layout], _with_ends(layout, structure)):
            if candidate.before not in inside:
                inside[candidate.before] = list(_chains(twin, candidate, x, dilation, activations))
            for config, out in inside[candidate.before]:
                if _ends_as(twin, candidate, out, x, own):
                    return (config, candidate), AGREED
    if not layout.outer and "*" not in layout.convs and _takes(forward, twin, width, dilation * taps + 5):
        return None, ORDINARY
    if len(errors) == 2:
        raise errors[0]
    return None, DISAGREED


def _with_ends(layout: Layout1d, structure: Structure | None) -> Iterator[Layout1d]:
    for before, after, shortcut in itertools.islice(() if structure is None else ends_of(structure), _ENDS):
        yield replace(layout, before=before, after=after, shortcut=shortcut)


def _takes(forward: Callable[..., object], twin: nn.Module, channels: int, length: int) -> bool:
    """Whether the module runs on so many channels."""
    try:
        forward(twin, torch.randn(2, channels, length, dtype=torch.float64, device="cpu"))
    except Exception:
        return False
    return True


def _chains(
    block: nn.Module, layout: Layout1d, x: Tensor, dilation: int, activations: Sequence[str]
) -> Iterator[tuple[Chain1dConfig, Tensor]]:
    """What the module's chain would give, in eval mode, with each of the settings that fit; nothing where none does.

    activations: those that its own forward was seen to call.
    """
    chain = parts_1d(block, layout)
    try:
        inner = enter_block_1d(block, x, layout) if layout.outer else x
    except (RuntimeError, ValueError, TypeError):  # an order of calls that does not fit
        return
    w = resolve_weights(chain)
    for config in _candidates(dilation, activations):
        if inner.shape[1] == config.chain.scale(len(chain.convs)) * chain.convs[0].in_channels:
            yield config, hierarchical_conv1d(inner, w.weights, w.biases, w.scale, w.shift, config)


def _ends_as(block: nn.Module, layout: Layout1d, out: Tensor, x: Tensor, own: Tensor) -> bool:
    """Whether the module computes `own` of x where its chain gives `out`."""
    try:
        return agree(finish_block_1d(block, out, x, layout) if layout.outer else out, own)
    except (RuntimeError, ValueError, TypeError):  # as above
        return False
