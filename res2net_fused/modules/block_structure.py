"""Where a module keeps the parts of a Res2Net bottleneck, proposed by their structure where the names are nobody's.

Looked for is a pair of 1x1 convolutions with s*w channels between them and, in the same module, s or s - 1 equal convolutions
of w channels. What the module computes is for `patching/recognition.py` to confirm.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .block_parts import OPTIONAL, BlockPaths, Path
from .confirmation import equal_settings

_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
_POOLS = (nn.AvgPool2d, nn.MaxPool2d)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)


@dataclass
class Unit:
    """One convolution and what stands with it: alone, or in a wrapper or Sequential.

    top: the path of the module that is called. conv, norm, act: paths of those parts, which need not lie inside it.
    """

    top: Path
    path: Path
    conv: Any
    norm: Path | None = None
    act: Path | None = None


@dataclass
class Structure:
    """A module's parts as a bottleneck: its outer convolutions, the chain, and what else it has."""

    first: Unit
    chain: list[Unit]
    last: Unit
    acts: list[Path]
    others: dict[Path, nn.Module]


@dataclass
class _Found:
    units: list[Unit]
    norms: dict[Path, nn.Module]
    acts: list[Path]
    others: dict[Path, nn.Module]


def is_activation(module: nn.Module) -> bool:
    """Whether this is an activation of PyTorch's, or of a class derived from one."""
    own = {cls.__module__ for cls in type(module).__mro__}
    return nn.ReLU.__module__ in own and not isinstance(module, nn.MultiheadAttention)


def _is_step(conv: Any) -> bool:
    sizes = conv.kernel_size
    return conv.in_channels == conv.out_channels and (sizes == (3, 3) if len(sizes) == 2 else min(sizes) > 1)


def _is_pointwise(conv: Any) -> bool:
    return all(size == 1 for size in conv.kernel_size)


def _inside(module: nn.Module) -> list[Any]:
    return [m for m in module.modules() if isinstance(m, _CONVOLUTIONS)]


def _convolutions_of(module: nn.Module) -> list[Any]:
    return _inside(module) if module._modules and type(module) not in _CONTAINERS else []


def _walk(module: nn.Module, prefix: Path, found: _Found, kind: type[nn.Module]) -> None:
    for name, child in module._modules.items():
        if child is None or type(child) is nn.Identity:
            continue
        path, convs = (*prefix, name), _inside(child)
        steps = [conv for conv in convs if _is_step(conv)]
        if len(convs) == 1 and isinstance(convs[0], kind):
            found.units.append(_unit(child, path))
        elif steps and (type(child) in _CONTAINERS or len(steps) == len(convs) == len(set(map(id, convs)))):
            _walk(child, path, found, kind)
        elif convs:
            found.others[path] = child
        elif isinstance(child, _NORMS) or (type(child) in _CONTAINERS[:2] and child._modules):
            norms = {path: child} if isinstance(child, _NORMS) else {(*path, n): m for n, m in child._modules.items()}
            if all(isinstance(norm, _NORMS) for norm in norms.values()):
                found.norms.update(norms)  # type: ignore[arg-type]
            elif all(norm is not None and is_activation(norm) for norm in norms.values()):
                found.acts += list(norms)
            else:
                found.others[path] = child
        elif is_activation(child):
            found.acts.append(path)
        else:
            found.others[path] = child


def _unit(module: nn.Module, top: Path) -> Unit:
    unit = Unit(top, top, module)
    for name, inner in module.named_modules():
        path = (*top, *filter(None, name.split(".")))
        if isinstance(inner, _CONVOLUTIONS):
            unit.conv, unit.path = inner, path
        elif isinstance(inner, _NORMS):
            unit.norm = unit.norm or path
        elif inner is not module and is_activation(inner):
            unit.act = unit.act or path
    return unit


def structures(module: nn.Module, kind: type[nn.Module]) -> Iterator[Structure]:
    """The ways to see a bottleneck with convolutions of that kind in the module, the likeliest first; mostly none."""
    convs = _convolutions_of(module)
    if len(convs) < 3 or not any(map(_is_step, convs)) or sum(map(_is_pointwise, convs)) < 2:
        return
    found = _found(module, kind)
    if any(_is_step(conv) and conv.groups < conv.in_channels for other in found.others.values() for conv in _inside(other)):
        return  # a stage of blocks, or a block beside another
    groups: dict[tuple[object, ...], list[Unit]] = {}
    for unit in found.units:
        if _is_step(unit.conv):
            groups.setdefault(equal_settings(unit.conv), []).append(unit)
    outer = [unit for unit in found.units if _is_pointwise(unit.conv)]
    for chain in groups.values():
        width = chain[0].conv.in_channels
        for first, last in itertools.combinations(outer, 2):
            inner = first.conv.out_channels
            places = [found.units.index(unit) for unit in (first, *chain, last)]
            weak = len(chain) == 1 or 1 < width == chain[0].conv.groups
            if weak and places != sorted(places):
                continue  # one convolution proves little, nor do depthwise ones: stages and other blocks look alike
            if inner == last.conv.in_channels and inner % width == 0 and _is_scale(inner // width, len(chain)):
                rest = {unit.top: module.get_submodule(".".join(unit.top)) for unit in found.units if unit not in chain}
                others = {path: m for path, m in (rest | found.others).items() if path not in (first.top, last.top)}
                yield Structure(first, chain, last, found.acts, others)


def _is_scale(scale: int, steps: int) -> bool:
    return scale > 1 and scale - steps in (0, 1)


def chain_alone(module: nn.Module, kind: type[nn.Module]) -> list[Unit]:
    """Equal convolutions that are all which the module has, at least two of them, or nothing."""
    convs = _convolutions_of(module)
    if len(convs) < 2 or len(set(map(id, convs))) < len(convs) or len({equal_settings(conv) for conv in convs}) > 1:
        return []
    units = _found(module, kind).units if _is_step(convs[0]) else []
    return units if len(units) == len(convs) else []


def _found(module: nn.Module, kind: type[nn.Module]) -> _Found:
    """What the module consists of; norms that stand apart are dealt to the convolutions before them."""
    found = _Found([], {}, [], {})
    _walk(module, (), found, kind)
    order = {name: i for i, (name, _) in enumerate(module.named_modules())}
    left = dict(found.norms)
    for unit in found.units:
        if unit.norm is None:
            channels = unit.conv.out_channels
            fits = [path for path, norm in left.items() if getattr(norm, "num_features", None) == channels]
            fits.sort(key=lambda path: (order[".".join(path)] < order[".".join(unit.path)], order[".".join(path)]))
            unit.norm = fits[0] if fits else None
            left.pop(unit.norm, None)  # type: ignore[arg-type]
    return found


def find_by_structure(module: nn.Module) -> Iterator[BlockPaths]:
    """The layouts that a module may have as a 2-D bottleneck, whatever its parts are called; mostly none."""
    for s in structures(module, nn.Conv2d):
        own = [unit.act for unit in (s.first, *s.chain, s.last) if unit.act is not None]
        relu, *acts = list(dict.fromkeys((*own, *s.acts))) or [()]
        found = BlockPaths(
            s.first.path, s.first.norm or (), tuple(unit.path for unit in s.chain), norms_of(s.chain),
            s.last.path, s.last.norm or (), relu, acts=tuple(acts),
        )  # fmt: skip
        yield replace(found, **_roles(s))


def norms_of(chain: list[Unit]) -> tuple[Path, ...]:
    """The paths of the chain's norms, or () where some have none."""
    norms = tuple(unit.norm for unit in chain if unit.norm is not None)
    return norms if len(norms) == len(chain) else ()


def _roles(s: Structure) -> dict[str, Any]:
    """What the modules beside the chain may be: the shortcut, the pool, and what stands between conv3 and the addition."""
    roles: dict[str, Path] = {}
    outside = s.first.conv.in_channels, s.last.conv.out_channels
    for path, module in s.others.items():
        named = next((role for role, names in OPTIONAL.items() if path[0] in names), None)
        ends = [conv for conv in _inside(module) if _is_pointwise(conv)]
        if isinstance(module, _POOLS):
            role = "pool"
        elif named is not None:
            role = named
        elif len(ends) == 1 and (ends[0].in_channels, ends[0].out_channels) == outside:
            role = "downsample"
        else:
            role = "drop_path" if "se" in roles else "se"
        roles.setdefault(role, path)
    return {"downsample": (), "pool": (), "se": (), "drop_block": (), "drop_path": ()} | roles


# Along rows -------------------------------------------------------------------------------------------------------------


Ends = tuple[tuple[Path, ...], tuple[Path, ...], Path]  # before, after and shortcut of a `Layout1d`


def find_rows(module: nn.Module) -> tuple[list[Unit], Structure | None]:
    """The chain of a module along rows, and the bottleneck around it; ([], None) where it has none.

    Where a child is the chain alone, that child is the block.
    """
    chain = chain_alone(module, nn.Conv1d)
    if chain:
        return chain, None
    for s in structures(module, nn.Conv1d):
        child = module._modules[s.chain[0].top[0]]
        if len(s.chain[0].top) == 1 or type(child) in _CONTAINERS:
            return s.chain, s
    return [], None


def ends_of(s: Structure) -> Iterator[Ends]:
    """The orders in which a bottleneck may call what it has beside its chain, the likeliest first."""
    relu = s.acts[0] if s.acts else ()
    rest = [path for path, module in s.others.items() if not isinstance(module, nn.modules.dropout._DropoutNd)]
    shortcuts = [path for path in rest if _inside(s.others[path])]
    for shortcut, added in (*((path, True) for path in shortcuts), ((), True), ((), False)):
        tail = [path for path in rest if path != shortcut][:3]
        orders = [order for count in range(len(tail), -1, -1) for order in itertools.permutations(tail, count)]
        both = _called(s.first, relu), _called(s.last, relu)
        alike = list(zip(*both, strict=True)) if len(both[0]) == len(both[1]) else itertools.product(*both)
        for (before, after), order in itertools.product(alike, orders):
            for place in range(len(order) + 1) if added else (0,):
                addition = (("+",),) if added else ()
                steps = (*after, *order[:place], *addition, *order[place:])
                yield before, steps, shortcut
                yield before, (*steps, relu), shortcut


def _called(unit: Unit, relu: Path) -> list[tuple[Path, ...]]:
    """The orders in which a convolution, the norm and the activation that stand with it may be called."""
    apart = unit.norm is not None and unit.norm[: len(unit.top)] != unit.top
    norm = (unit.norm,) if apart and unit.norm is not None else ()
    own = [(unit.top, *norm)]
    return [*own, (unit.top, relu, *norm)] if unit.act else [(unit.top, relu, *norm), (unit.top, *norm, relu), *own]
