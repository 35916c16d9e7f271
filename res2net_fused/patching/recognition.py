"""Which blocks of a model are Res2Net blocks, and which recurrence each of them computes.

The published blocks share names and state_dict keys while their outputs differ, so names only propose: a recurrence is
accepted when the reference agrees in float64 with the block's own forward, in train and in eval mode, on a deep copy with
random parameters. That is done once for each configuration.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from ..chain.activations import activate
from ..chain.config import ChainConfig
from ..modules.block_parts import ENDINGS, BlockParts, BlockPaths, find_layout, parts_of, wrappers
from ..modules.block_state import STATE
from ..modules.block_structure import find_by_structure
from ..modules.confirmation import (
    SEED,
    agree,
    agrees_in_float,
    equal_settings,
    is_convolution,
    of_memory,
    own_parts,
    random_twin,
    seeded,
)
from ..modules.eligibility import fused_activation
from ..modules.reference_blocks import bottle2neck
from ..modules.switches import MODULE_ATTRIBUTES, switches, unforeseeable
from .class_swap import own_class

_PROPOSALS = 6  # of a module's structure, that are tried
Layout = TypeVar("Layout")
Found = TypeVar("Found")


def layout_of(module: nn.Module) -> BlockPaths | None:
    """The paths at which a module keeps the parts of a 2-D bottleneck, or None where it has no such parts."""
    if isinstance(module, torch.jit.ScriptModule):
        return None
    return find_layout(module) or next(find_by_structure(module), None)


@dataclasses.dataclass(frozen=True)
class Recognised:
    """What a block is confirmed to compute. shortcut: forward's parameter for what is added in x's place, or None.

    layout: the paths by which it does, with its ending.
    """

    config: ChainConfig
    shortcut: str | None
    layout: BlockPaths


def recognise(block: nn.Module, layout: BlockPaths) -> tuple[Recognised | None, str]:
    """The confirmed settings of a block with that layout, or None and the reason."""
    found, reason = confirmed_once(block, layout, _structure(parts_of(block, layout)), _confirm)
    for other in itertools.islice(find_by_structure(block), _PROPOSALS):
        if found is not None:
            break
        if other != layout and _structure(parts_of(block, other)) is None:
            found, _ = confirmed_once(block, other, None, _confirm)
    return found, reason if found is None else AGREED


def confirmed_once(
    block: nn.Module,
    layout: Layout,
    refusal: str | None,
    confirm: Callable[[nn.Module, Layout], tuple[Found | None, str]],
) -> tuple[Found | None, str]:
    """What `confirm(block, layout)` finds, or None and the reason, such as `refusal`.

    Tried once for each configuration, outside the modes of the caller; what failed, or was tried in a trace, is tried again.
    """
    doubt = unforeseeable(own_class(block))
    if refusal is not None or doubt is not None:
        return None, refusal or f"its own code {doubt}"
    signature = own_signature(block), layout
    if signature not in _confirmed:
        try:
            with seeded(), _disable_current_modes():
                found = confirm(block, layout)
        except Exception as error:  # the block's own code may fail in any way; it is then left alone, and explain says why
            return None, f"its own forward could not be tried: {type(error).__name__}: {error}"  # now; so it is not kept
        if torch._C._get_tracing_state() is not None:
            return found
        _confirmed[signature] = found
    return _confirmed[signature]


_confirmed: dict[tuple[object, ...], tuple[Any, str]] = {}
AGREED = "the reference agrees with its own forward in float64"
DISAGREED = "no known recurrence agrees with its own forward"


def _structure(block: BlockParts) -> str | None:
    convs = block.convs
    for name, conv in block.convolutions():
        if not isinstance(conv, nn.Conv2d):
            return f"{name} is a {type(conv).__name__}, not a plain Conv2d"
        if type(conv) is not nn.Conv2d and own_parts(conv):
            return f"{name} is a {type(conv).__name__}, a Conv2d with parts of its own"
    width = convs[0].in_channels
    first = convs[0]
    if first.kernel_size != (3, 3) or first.stride[0] != first.stride[1] or first.dilation[0] != first.dilation[1]:
        return "convs are not square 3x3 convolutions"
    for conv in convs:
        if conv.in_channels != conv.out_channels or equal_settings(conv) != equal_settings(first):
            return "convs differ among themselves"
        if conv.padding != conv.dilation or conv.padding_mode != "zeros":
            return f"convs are padded by {conv.padding} ({conv.padding_mode}); zeros by the dilation {conv.dilation} is fused"
    for name, conv in (("conv1", block.conv1), ("conv3", block.conv3)):
        strided = name == "conv3" and conv.stride != (1, 1)
        if conv.kernel_size != (1, 1) or strided or conv.padding != (0, 0) or conv.groups != 1:
            return f"{name} is not a plain 1x1 convolution"
    channels = block.conv1.out_channels
    if channels != block.conv3.in_channels or channels % width or channels // width - len(convs) not in (0, 1):
        return f"{len(convs)} convolutions of width {width} do not make up {channels} channels"
    if len(block.bns) != len(convs):
        return "convs and bns differ in number"
    return None


def own_signature(block: nn.Module) -> tuple[object, ...]:
    """All that a block's forward may depend on, but for the values of its tensors."""
    ignored = MODULE_ATTRIBUTES | {"training", STATE}
    attributes = tuple(sorted((k, repr(v)) for k, v in vars(block).items() if k not in ignored))
    children = tuple((name, type(child), child.extra_repr()) for name, child in block.named_modules() if name)
    tensors = tuple(name for name, _ in itertools.chain(block.named_parameters(), block.named_buffers()))
    return own_class(block), attributes, children, tensors, tuple(map(switches, block.modules()))


def _candidates(block: BlockParts) -> Iterator[ChainConfig]:
    """Settings the block may have, the likeliest first."""
    conv = block.convs[0]
    scale = block.conv1.out_channels // conv.in_channels
    stage = getattr(block.module, "stype", None) == "stage" or bool(getattr(block.module, "is_first", False))
    passthroughs = ("none",) if len(block.convs) == scale else ("last", "first", "first_added")
    pools = ("avg3", "avg3_nopad", "max3", None) if stage or conv.stride[0] > 1 else (None, "avg3", "avg3_nopad", "max3")
    activation = fused_activation(block.relu) or "relu"  # of another one each call says that it is not fused
    for hierarchical, passthrough, pool in itertools.product((not stage, stage), passthroughs, pools):
        try:
            yield ChainConfig(
                stride=conv.stride[0], dilation=conv.dilation[0], groups=conv.groups,
                hierarchical=hierarchical, passthrough=passthrough, pool=pool, activation=activation,
            )  # fmt: skip
        except ValueError:
            continue  # a combination that does not exist


def _confirm(block: nn.Module, layout: BlockPaths) -> tuple[Recognised | None, str]:
    parts = parts_of(random_twin(block), layout)
    refusal = _hidden_arithmetic(parts)
    if refusal is not None:
        return None, refusal
    own = _own_results(own_class(block).forward, parts)
    plain_call, plain_results = own[0]
    for config, ending in itertools.product(_candidates(parts), ENDINGS):
        parts.ending = ending
        agreed = [call for call, results in own if _agrees(parts, config, call, results)]
        if agreed and (agreed[0] is plain_call or isinstance(plain_results, Exception)):
            if agreed[0] is plain_call and not _agrees_elsewhere(own_class(block).forward, parts, config):
                continue
            return Recognised(config, agreed[-1].name, dataclasses.replace(layout, ending=ending)), AGREED
    if isinstance(plain_results, Exception):
        raise plain_results
    return None, DISAGREED + _unknown_parts(block, layout)


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """One way to call a block: with x, and with a shortcut for the parameter `name` where there is one."""

    x: Tensor
    shortcut: Tensor | None = None
    name: str | None = None

    def __call__(self, forward: Callable[..., Tensor]) -> Tensor:
        return forward(self.x.clone(), *(() if self.shortcut is None else (self.shortcut.clone(),)))


def _own_results(forward: Callable[..., Tensor], parts: BlockParts) -> list[tuple[_Call, list[Tensor] | Exception]]:
    """What the block's own forward gives in eval and train mode: with x and, where it may take a shortcut, with that too.

    Or the error: blocks that stride need their shortcut, and others need what nobody can guess.
    """
    x = torch.randn(2, parts.conv1.in_channels, 7, 10, dtype=torch.float64, device="cpu")
    x[1] *= 50  # beyond the bounds of clamped activations
    calls = [_Call(x)]
    parameters = list(inspect.signature(forward).parameters)[2:]
    if parameters and parts.downsample is None:
        stride = parts.conv1.stride[0] * parts.convs[0].stride[0]
        shape = 2, parts.conv3.out_channels, (7 - 1) // stride + 1, (10 - 1) // stride + 1
        calls.append(_Call(x, torch.randn(shape, dtype=torch.float64, device="cpu"), parameters[0]))
    return [(call, _tried(functools.partial(call, functools.partial(forward, parts.module)), parts)) for call in calls]


def _tried(call: Callable[[], Tensor], parts: BlockParts) -> list[Tensor] | Exception:
    try:
        return [_outputs(call, parts.module, mode) for mode in (False, True)]
    except Exception as error:
        if of_memory(error):
            raise
        return error


def _agrees(parts: BlockParts, config: ChainConfig, call: _Call, own: list[Tensor] | Exception) -> bool:
    def ours(x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        return bottle2neck(parts, x, config, shortcut)

    if isinstance(own, Exception):
        return False
    results = _tried(functools.partial(call, ours), parts)  # sizes that do not fit raise: not this recurrence
    return not isinstance(results, Exception) and all(agree(a, b) for a, b in zip(results, own, strict=True))


def _agrees_elsewhere(forward: Callable[..., Tensor], parts: BlockParts, config: ChainConfig) -> bool:
    """Whether both agree in eval mode for images of another size and type."""
    parts.module.eval()
    try:
        return agrees_in_float(parts.module, lambda x: bottle2neck(parts, x, config), parts.conv1.in_channels, forward)
    except Exception as error:
        if of_memory(error):
            raise
        return False


def _hidden_arithmetic(block: BlockParts) -> str | None:
    """Why a convolution or activation of a library's own class computes something else than its weights say, or None."""
    name, u = fused_activation(block.relu), torch.linspace(-30, 30, 601, dtype=torch.float64, device="cpu")
    if name is not None and not agree(activate(u, name), block.relu(u.clone())):
        return f"relu ({type(block.relu).__name__}) is not the activation {name}"
    for name, conv in block.convolutions():
        for training in (False, True):
            block.module.train(training)
            if not is_convolution(conv):
                return f"{name} ({type(conv).__name__}) is not what its weights and norm compute"
    return None


def _unknown_parts(block: nn.Module, layout: BlockPaths) -> str:
    """The modules that no published Res2Net block has, for the reason: attention fusion, gates, plugins."""
    known = {id(m) for m in parts_of(block, layout).modules()} | {id(m) for m in wrappers(block, layout)}
    pool = parts_of(block, layout).pool
    if isinstance(pool, nn.MaxPool2d):
        return ", which has a MaxPool2d: only its absence or one over 3x3 pixels, padded by 1, on the passed group is fused"
    unknown = []
    for name, child in block.named_children():
        members = list(child) if isinstance(child, nn.ModuleList) else [child]
        strange = [m for m in members if id(m) not in known]
        if strange and not any(id(m) in known for m in child.modules()):
            unknown.append(f"{name} ({type(strange[0]).__name__})")
    return f", which has {', '.join(unknown)} besides" if unknown else ""


def _outputs(call: Callable[[], Tensor], twin: nn.Module, training: bool) -> Tensor:
    buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    twin.train(training)
    torch.default_generator.manual_seed(SEED)  # dropout and stochastic depth draw alike
    out = call()
    for name, buffer in twin.named_buffers():
        buffer.copy_(buffers[name])
    return out
