"""Whether a call may run fused. Asked at every call, since users hook, replace and parametrize submodules at any time."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.modules.module import _has_any_global_hook

from .._native.library import release
from ..chain.activations import CLAMPS, leaky_relu
from ..chain.memory_format import hands_on
from ..chain.problem import ChainProblem
from ..ops.recording import overrides, why_recorded
from .block_parts import BlockParts, changed_surroundings, strangers, surroundings, wrappers
from .block_state import BlockState, geometry_named
from .choosing import why_own
from .confirmation import is_convolution
from .folding import block_tensors, why_not_bypassed, why_not_folded, why_not_unwrapped
from .switches import constant_in_a_trace, switches
from .training import uses_batch_statistics, why_not_trained

OVERRIDDEN = "x or a tensor of the block is of a class that has operators of its own (__torch_function__)"


def chain_problem(block: BlockParts, x: Tensor, state: BlockState, trained: bool) -> ChainProblem:
    """The call of the chain inside, for the block's x. trained: whether that is by itself, with the batch's statistics."""
    rows, columns = block.conv1.stride
    around = None if trained else (block.conv1.in_channels, block.conv3.out_channels)
    problem = ChainProblem.from_tensor(x, block.convs[0].in_channels, len(block.convs), state.config, around)
    dtype = compute_dtype(block.conv1.weight)
    if not problem.channels_last and computes_in_channels_last(block.conv1.weight, state):
        problem = replace(problem, channels_last=True)
    if rows == columns == 1 and dtype == x.dtype:
        return problem
    height, width = (problem.height - 1) // rows + 1, (problem.width_pixels - 1) // columns + 1
    return replace(problem, dtype=dtype, height=height, width_pixels=width)


def computes_in_channels_last(weight: Tensor, state: BlockState) -> bool:
    """Whether a block with this weight of conv1 turns an x in NCHW into channels-last where it runs fused."""
    return hands_on(weight) or state.hands_on


def handed_on(weight: Tensor, x: Tensor, state: BlockState) -> Tensor:
    """Return x (N, inplanes, H, W) in the memory format in which such a block computes."""
    if x.is_contiguous(memory_format=torch.channels_last) or not computes_in_channels_last(weight, state):
        return x
    return x.contiguous(memory_format=torch.channels_last)


def differentiates(block: BlockParts, x: Tensor, given: Tensor | None) -> bool:
    """Whether autograd records the call. given: what a caller adds in x's place, or None."""
    return torch.is_grad_enabled() and (
        any(t is not None and t.requires_grad for t in (x, given))
        or any(t.requires_grad for t in itertools.chain(block.module.parameters(), block_tensors(block)))
    )


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the convolutions of such weights run: autocast's where it is on, else their own."""
    if weight.dtype != torch.float64 and under_autocast(weight.device.type):
        return torch.get_autocast_dtype(weight.device.type)
    return weight.dtype


def under_autocast(device_type: str) -> bool:
    """Whether autocast is on for tensors of that type of device; some types, such as meta, know none."""
    try:
        return device_type != "meta" and torch.is_autocast_enabled(device_type)
    except RuntimeError:  # unknown device type for autocast
        return False


# Before torch 2.13 its compiler fails on classes in a constant: a graph guards every value there.
_ONE_GUARD = release(torch.__version__) >= (2, 13)


# Eligibility: cheap, at every call, since users hook, replace and parametrize submodules at any time ------------------


def why_not_fused(
    block: BlockParts, state: BlockState, x: Any, args: tuple[object, ...], kwargs: dict[str, object]
) -> str | None:
    """None if this call may run fused, else the reason."""
    shortcut, reason = why_not_called(4, state.shortcut, x, args, kwargs)
    around = wrappers(block.module, state.layout)
    others = strangers(block, state.layout, around)
    reason = reason or why_not_read(block) or why_not_alike(block, state, surroundings(block, around, others))
    if reason is not None:
        return reason
    if not is_compiling() and any(map(overrides, block_tensors(block))):
        return OVERRIDDEN
    if shortcut is not None and block.downsample is not None:
        return "called with a shortcut, beside a downsample of its own"
    reason = why_not_of_dtype(x, block.conv1.weight)
    if reason is not None:
        return reason
    training = any(map(uses_batch_statistics, block.bns))
    if training and block.module.training and getattr(block.module, "with_cp", False):
        return "with_cp: in training its own forward checkpoints it"
    if training:
        reason = why_not_trained(block, x, chain_problem(block, x, state, trained=True), state.backend, state.recompute)
    else:
        reason = why_not_foldable(block)
    if reason is not None:
        return reason
    if fused_activation(block.relu) != state.config.activation:
        return f"activation {type(block.relu).__name__} is not fused"
    other = next((a for a in block.acts if a is None or fused_activation(a) != state.config.activation), block)
    if other is not block:
        return f"activation {type(other).__name__} is not fused beside {type(block.relu).__name__}"
    geometry = block_geometry(block)
    named = _ONE_GUARD and is_compiling()
    then = geometry_named(state.shared.name) if named else state.geometry
    if geometry != then and _without_types(geometry) != _without_types(then):
        return "a convolution or the pool was replaced, parametrized or given another geometry since it was recognised"
    reason = why_not_convolutions(block)
    if reason is not None:
        return reason
    # In training they are called as modules.
    outer: tuple[nn.Module, ...] = () if training else (block.conv1, block.bn1, block.conv3, block.bn3)
    outer += tuple(m for child in others.values() for m in child.modules()) if others else ()
    reason = why_not_left_out((*outer, *block.convs, *block.bns, block.relu, *block.acts, block.pool), around)
    if reason is not None or training:
        return reason
    passes = "gradients" if differentiates(block, x, shortcut) else "inference"
    return why_own(passes, chain_problem(block, x, state, trained=False), state.backend, (block.module, x))


def why_not_of_dtype(x: Tensor, weight: Tensor) -> str | None:
    """None if a convolution with this weight takes an x of its dtype here, else the reason."""
    if x.dtype != weight.dtype and (torch.float64 in (x.dtype, weight.dtype) or not under_autocast(x.device.type)):
        return f"x is {x.dtype} but the weights are {weight.dtype}"
    return None


def why_not_read(block: BlockParts) -> str | None:
    """None if the parts are of kinds whose attributes can be read, else the reason, which names the part that is not."""
    if not block.convs or len(block.convs) != len(block.bns):
        return f"{len(block.convs)} convolutions and {len(block.bns)} norms are found in convs and bns"
    if not _are_plain(block):
        for name, conv in block.convolutions():
            if not isinstance(conv, nn.Conv2d):
                return f"{name} is {_kind(conv)}, not a Conv2d"
    parts: list[Any] = [*block.norms, block.relu]
    if block.pool is not None:
        parts.append(block.pool)
    if all([isinstance(part, nn.Module) for part in parts]):
        return None
    names = ("bn1", *(f"bns[{i}]" for i in range(len(block.bns))), "bn3", "relu", "pool")
    found = zip(names, parts, strict=False)
    return next(f"{name} is {_kind(part)}, not a module" for name, part in found if not isinstance(part, nn.Module))


def _are_plain(block: BlockParts) -> bool:
    return {type(block.conv1), type(block.conv3), *map(type, block.convs)} == {nn.Conv2d}


def _kind(part: object) -> str:
    return "missing" if part is None else f"a {type(part).__name__}"


def why_not_alike(block: BlockParts, state: BlockState, now: tuple[object, ...]) -> str | None:
    """None if the `surroundings` of a block are as they were when it was recognised, else the reason."""
    compiling = is_compiling()
    if state.surroundings is None and not compiling:
        state.surroundings = now  # of a block that is saved by an older version, or made by its constructor
    if state.surroundings is None or now == state.surroundings:
        return None
    name = "a setting" if compiling else changed_surroundings(block.module, now, state.surroundings)
    return f"{name} of the block was changed since it was recognised"


def why_not_convolutions(block: BlockParts) -> str | None:
    """None if convolutions of unknown classes compute what their weights say now, else the reason."""
    for name, conv in () if _are_plain(block) else block.convolutions():
        if "weight" not in conv._parameters and "weight" not in vars(conv):
            return f"{name} was parametrized since it was recognised"
        if not is_convolution(conv):
            return f"{name} ({type(conv).__name__}) is not what its weights and norm compute"
    return None


def why_not_called(
    dimensions: int, shortcut: str | None, x: object, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Tensor | None, str | None]:
    """What a caller passes as `shortcut`, or None; and why a call with these arguments cannot run fused anywhere, or None."""
    recorded = why_recorded()
    if recorded is not None:
        return None, recorded
    given, reason = given_shortcut(shortcut, args, kwargs)
    if reason is not None:
        return None, reason
    if not isinstance(x, Tensor) or not is_floating(x, dimensions):
        return None, f"x is not a {dimensions}-D floating-point tensor"
    if not is_compiling() and overrides(x):
        return None, OVERRIDDEN
    if vmapped() if is_compiling() else transformed():
        return None, "torch.func transforms and forward-mode derivatives need PyTorch's own operators"
    return given, None


def is_floating(x: Tensor, dimensions: int) -> bool:
    return x.dim() == dimensions and x.is_floating_point()


def why_not_left_out(modules: Iterable[nn.Module | None], around: Iterable[nn.Module] = ()) -> str | None:
    """None if the calls of all these modules, and of those around them, may be left out, else the reason."""
    if _has_any_global_hook():
        return "global module hooks must see every submodule's call"
    for module in modules:  # not by `:=` in a generator, which the compiler of torch 2.11 does not take
        reason = None if module is None else why_not_bypassed(module)
        if reason is not None:
            return reason
    for module in around:
        reason = why_not_unwrapped(module)
        if reason is not None:
            return reason
    return None


def given_shortcut(name: str | None, args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[Tensor | None, str | None]:
    """What a caller passes as `name` to be added in x's place, or None; and why the call cannot run fused, or None."""
    shortcut = args[0] if args else kwargs.get(name) if name is not None else None
    others = [*args[1:], *(value for key, value in kwargs.items() if args or key != name)]
    if any(other is not None for other in others) or (shortcut is not None and name is None):
        return None, "called with more than x" + ("" if name is None else f" and {name}")
    if shortcut is not None and not isinstance(shortcut, Tensor):
        return None, f"{name} is a {type(shortcut).__name__}, not a tensor"
    return shortcut, None


def transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp) or forward-mode AD is at work, for which the operators have no rules."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


@constant_in_a_trace  # which is inside torch.func's transforms itself while it follows them
def vmapped() -> bool:
    """Whether vmap is at work: its tensors do not tell their memory format. Graphs hand other transforms to the operators."""
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in levels)


def why_not_foldable(block: BlockParts) -> str | None:
    """None if every norm of the block can be folded now, else the reason."""
    return next(filter(None, map(why_not_folded, block.norms)), None)


def fused_activation(module: nn.Module) -> str | None:
    """The chain's name for this activation, also under a derived class that only has settings of its own."""
    name = _ACTIVATIONS.get(getattr(type(module), "forward", None))
    return name(module) if callable(name) else name


def _clamp(module: Any) -> str | None:
    bounds = module.min_val, module.max_val
    return next((name for name, known in CLAMPS.items() if bounds == known), None)


def _leaky(module: Any) -> str | None:
    slope = module.negative_slope
    return leaky_relu(float(slope)) if isinstance(slope, (int, float)) and math.isfinite(slope) else None


def _gelu(module: Any) -> str | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(module.approximate)


# By forward: the name, or what reads it off the module's settings. ReLU6 has Hardtanh's forward.
_ACTIVATIONS: dict[Any, str | Callable[[nn.Module], str | None]] = {
    nn.ReLU.forward: "relu",
    nn.SiLU.forward: "silu",
    nn.Mish.forward: "mish",
    nn.Hardswish.forward: "hardswish",
    nn.Hardtanh.forward: _clamp,
    nn.LeakyReLU.forward: _leaky,
    nn.GELU.forward: _gelu,
}


_POOL_SETTINGS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def block_geometry(block: BlockParts) -> tuple[object, ...]:
    """All of the block's convolutions and pool that changes the result beyond their tensors, comparable at every call."""
    pool = block.pool
    return None if pool is None else _pool_settings(pool), *(
        (type(conv), conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
         conv.groups, conv.padding_mode)
        for conv in (block.conv1, *block.convs, block.conv3)
    )  # fmt: skip


def _pool_settings(pool: nn.Module) -> tuple[object, ...]:
    names = (*_POOL_SETTINGS, "dilation", "return_indices") if isinstance(pool, nn.MaxPool2d) else _POOL_SETTINGS
    return type(pool), *[getattr(pool, name, None) for name in names], *switches(pool)


def _without_types(geometry: tuple[Any, ...]) -> tuple[object, ...]:
    """The geometry without the classes of convolutions, which are looked at by themselves."""
    pool, *convolutions = geometry
    return pool, *(convolution[1:] for convolution in convolutions)
