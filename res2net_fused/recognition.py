"""Which blocks of a model are Res2Net blocks, and which recurrence each of them computes.

The published blocks share names and state_dict keys while their outputs differ, so names only propose: a recurrence is
accepted when the reference agrees in float64 with the block's own forward, in train and in eval mode, on a deep copy with
random parameters. That is done once for each configuration.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .chain import ChainConfig
from .reference import bottle2neck

_AGREEMENT = 1e-9  # relative, in float64: rounding stays below 1e-13, another recurrence differs in the first digit
_SEED = 20190402
_MODULE_ATTRIBUTES = frozenset(vars(nn.Module()))


def looks_like_a_block(module: nn.Module) -> bool:
    """Whether the module has the parts of the published 2-D bottleneck."""
    modules = module._modules
    singles = all(isinstance(modules.get(name), nn.Module) for name in ("conv1", "bn1", "conv3", "bn3", "relu"))
    lists = all(isinstance(modules.get(name), nn.ModuleList) and len(modules[name]) for name in ("convs", "bns"))
    return singles and lists and hasattr(module, "scale") and not isinstance(module, torch.jit.ScriptModule)


def recognise(block: nn.Module) -> tuple[ChainConfig | None, str]:
    """The confirmed settings of a block that looks like one, or None and the reason."""
    refusal = _structure(block)
    if refusal is not None:
        return None, refusal
    signature = _signature(block)
    if signature not in _confirmed:
        _confirmed[signature] = _confirm(block)
    return _confirmed[signature]


_confirmed: dict[tuple[object, ...], tuple[ChainConfig | None, str]] = {}


def _structure(block: nn.Module) -> str | None:
    convs = list(block.convs)
    for name, conv in (("conv1", block.conv1), *((f"convs.{i}", c) for i, c in enumerate(convs)), ("conv3", block.conv3)):
        if type(conv) is not nn.Conv2d:
            return f"{name} is a {type(conv).__name__}, not a plain Conv2d"
    width = convs[0].in_channels
    first = convs[0]
    if first.kernel_size != (3, 3) or first.stride[0] != first.stride[1] or first.dilation[0] != first.dilation[1]:
        return "convs are not square 3x3 convolutions"
    for conv in convs:
        if conv.in_channels != conv.out_channels or conv_settings(conv) != conv_settings(first):
            return "convs differ among themselves"
        if conv.padding != conv.dilation or conv.padding_mode != "zeros":
            return f"convs are padded by {conv.padding} ({conv.padding_mode}); zeros by the dilation {conv.dilation} is fused"
    for name in ("conv1", "conv3"):
        conv = getattr(block, name)
        if conv.kernel_size != (1, 1) or conv.stride != (1, 1) or conv.padding != (0, 0) or conv.groups != 1:
            return f"{name} is not a plain 1x1 convolution"
    channels = block.conv1.out_channels
    if channels != block.conv3.in_channels or channels % width or channels // width - len(convs) not in (0, 1):
        return f"{len(convs)} convolutions of width {width} do not make up {channels} channels"
    if len(block.bns) != len(convs):
        return "convs and bns differ in number"
    return None


def conv_settings(conv: nn.Conv2d) -> tuple[object, ...]:
    return conv.in_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups


def _signature(block: nn.Module) -> tuple[object, ...]:
    """All that a block's forward may depend on, but for the values of its tensors."""
    ignored = _MODULE_ATTRIBUTES | {"training"}
    attributes = tuple(sorted((k, repr(v)) for k, v in vars(block).items() if k not in ignored))
    children = tuple((name, type(child), child.extra_repr()) for name, child in block.named_modules() if name)
    tensors = tuple(name for name, _ in itertools.chain(block.named_parameters(), block.named_buffers()))
    return type(block), attributes, children, tensors


def _candidates(block: nn.Module) -> Iterator[ChainConfig]:
    """Settings the block may have, the likeliest first."""
    conv = block.convs[0]
    scale = block.conv1.out_channels // conv.in_channels
    stage = getattr(block, "stype", None) == "stage" or bool(getattr(block, "is_first", False))
    passthroughs = ("none",) if len(block.convs) == scale else ("last", "first", "first_added")
    pools = ("avg3", "avg3_nopad", None) if stage or conv.stride[0] > 1 else (None, "avg3", "avg3_nopad")
    for hierarchical, passthrough, pool in itertools.product((not stage, stage), passthroughs, pools):
        try:
            yield ChainConfig(
                stride=conv.stride[0], dilation=conv.dilation[0], groups=conv.groups,
                hierarchical=hierarchical, passthrough=passthrough, pool=pool,
            )  # fmt: skip
        except ValueError:
            continue  # a combination that does not exist


def _confirm(block: nn.Module) -> tuple[ChainConfig | None, str]:
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.no_grad():
            torch.default_generator.manual_seed(_SEED)  # of the CPU alone: GPUs' generators are the caller's
            twin = _random_twin(block)
            x = torch.randn(2, twin.conv1.in_channels, 7, 10, dtype=torch.float64, device="cpu")
            own = [_outputs(functools.partial(type(block).forward, twin), twin, x, mode) for mode in (False, True)]
            for config in _candidates(block):
                try:
                    ours = [_outputs(lambda t, c=config: bottle2neck(twin, t, c), twin, x, mode) for mode in (False, True)]
                except RuntimeError:
                    continue  # sizes that do not fit: not this recurrence
                if all(_agree(a, b) for a, b in zip(ours, own, strict=True)):
                    return config, "the reference agrees with its own forward in float64"
    except Exception as error:  # the block's own code may fail in any way; it is then left alone, and explain says why
        return None, f"its own forward could not be tried: {type(error).__name__}: {error}"
    return None, "no known recurrence agrees with its own forward"


def _random_twin(block: nn.Module) -> nn.Module:
    """A float64 copy on the CPU, without hooks, with random parameters and statistics: zeros would hide a difference."""
    twin = copy.deepcopy(block)
    if any(tensor.is_meta for tensor in itertools.chain(twin.parameters(), twin.buffers())):
        twin = twin.to_empty(device="cpu")
    twin = twin.to(device="cpu", dtype=torch.float64)
    for module in twin.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
            hooks.clear()
    for name, tensor in itertools.chain(twin.named_parameters(), twin.named_buffers()):
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 2)
        elif tensor.is_floating_point():
            tensor.normal_().mul_(1 / max(1, tensor[0].numel()) ** 0.5 if tensor.dim() > 1 else 1)
    return twin


def _outputs(forward, twin: nn.Module, x: Tensor, training: bool) -> Tensor:
    buffers = {name: buffer.clone() for name, buffer in twin.named_buffers()}
    twin.train(training)
    torch.default_generator.manual_seed(_SEED)  # dropout and stochastic depth draw alike
    out = forward(x.clone())
    for name, buffer in twin.named_buffers():
        buffer.copy_(buffers[name])
    return out


def _agree(ours: Tensor, own: Tensor) -> bool:
    return ours.shape == own.shape and bool((ours - own).norm() <= _AGREEMENT * own.norm())

