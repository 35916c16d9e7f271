"""The paths at which classes of 2-D blocks keep their parts: names are data here, semantics are confirmed in `recognition.py`.

A layout is found once for a block and kept with it; `parts_of` then reads the block's present modules at every call, since
users replace and hook them at any time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from .switches import constant_in_a_trace, may_read, named_switches, switches

Path = tuple[str, ...]  # of attribute names; "*" stands for every module of a ModuleList
Paths = Path | tuple[Path, ...]  # of several parts: with a "*", or each by itself

# Pairs of a convolution and the norm behind it, the likeliest first. A norm inside its convolution is applied by that one.
_FIRST = (("conv1", "bn1"), ("conv1", "{norm1_name}"), ("conv1", "conv1.norm"), ("branch2a.conv", "branch2a.norm"))
_MIDDLE = (("convs.*", "bns.*"), ("conv2.*", "bn2.*"), ("branch2b.*.conv", "branch2b.*.norm"))
_LAST = (("conv3", "bn3"), ("conv3", "{norm3_name}"), ("conv3", "conv3.norm"), ("branch2c.conv", "branch2c.norm"))
OPTIONAL = {
    "relu": ("relu", "act", "activation", "nonlinearity"),
    "downsample": ("downsample", "shortcut", "short"),
    "pool": ("pool",),
    "se": ("se", "se_module", "attn"),
    "drop_block": ("drop_block",),
    "drop_path": ("drop_path",),
}
_FUNCTIONAL_RELU = nn.ReLU(inplace=True)  # of blocks that call a function where others have a module
NO_NORM = nn.Identity().eval()  # of blocks whose convolutions have no norm

# What follows bn3: whether the shortcut is added, and whether the activation comes after that, before it, or not at all.
ENDINGS = ("add_act", "act_add", "act", "add", "none")


@dataclass(frozen=True)
class BlockPaths:
    """Paths of a block's parts, by default as the published code names them.

    Of relu () stands for a function, of norms for none, of others for no such part. acts: the activations beside relu, in
    blocks with one for each convolution. ending: one of ENDINGS.
    """

    conv1: Path = ("conv1",)
    bn1: Path = ("bn1",)
    convs: Paths = ("convs", "*")
    bns: Paths = ("bns", "*")
    conv3: Path = ("conv3",)
    bn3: Path = ("bn3",)
    relu: Path = ("relu",)
    downsample: Path = ("downsample",)
    pool: Path = ("pool",)
    se: Path = ("se",)
    drop_block: Path = ("drop_block",)
    drop_path: Path = ("drop_path",)
    acts: tuple[Path, ...] = ()
    ending: str = "add_act"
    if TYPE_CHECKING:
        roots: frozenset[str] = frozenset()  # names of the block's own children that are parts or hold them

    @property
    def wraps(self) -> bool:
        """Whether parts lie inside modules of the block that have a call of their own."""
        return len(self.conv1) > 1 or len(self.convs) > 2 or len(self.conv3) > 1 or isinstance(self.convs[0], tuple)

    def __post_init__(self) -> None:
        names = [field.name for field in fields(self) if field.name != "ending"]
        roots = frozenset(path[0] for name in names for path in _each(getattr(self, name)) if path)
        object.__setattr__(self, "roots", roots)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()  # older versions saved none


@dataclass(slots=True)
class BlockParts:
    """A block's modules at this moment, under the published names; None where it has no such part.

    The types are those of recognised blocks; recognition itself looks before it believes them. A norm may also be a
    FrozenBatchNorm2d, which has BatchNorm2d's tensors (`folding.is_frozen`), or an Identity, folded by somebody else.
    """

    module: nn.Module
    conv1: nn.Conv2d
    bn1: nn.BatchNorm2d
    convs: list[nn.Conv2d]
    bns: list[nn.BatchNorm2d]
    conv3: nn.Conv2d
    bn3: nn.BatchNorm2d
    relu: nn.Module
    downsample: nn.Module | None = None
    pool: nn.Module | None = None
    se: nn.Module | None = None
    drop_block: nn.Module | None = None
    drop_path: nn.Module | None = None
    acts: Sequence[nn.Module | None] = ()
    ending: str = "add_act"

    @property
    def norms(self) -> tuple[nn.BatchNorm2d, ...]:
        return self.bn1, *self.bns, self.bn3

    def convolutions(self) -> list[tuple[str, nn.Conv2d]]:
        """All convolutions by name."""
        return [("conv1", self.conv1), *((f"convs[{i}]", conv) for i, conv in enumerate(self.convs)), ("conv3", self.conv3)]

    def modules(self) -> Iterator[Any]:
        """All parts, and None for each that the block has not."""
        for field in fields(self)[1:-1]:
            part = getattr(self, field.name)
            yield from part if isinstance(part, (list, tuple)) else (part,)


def _each(given: Paths) -> tuple[Path, ...]:
    """One path, or several, as several."""
    return given if given and isinstance(given[0], tuple) else (given,)  # type: ignore[return-value]


PUBLISHED = BlockPaths()
_NAMES = tuple(field.name for field in fields(BlockPaths) if field.name not in ("acts", "ending"))


@constant_in_a_trace
def _names() -> tuple[str, ...]:
    """_NAMES, of which a graph would guard each."""
    return _NAMES


def find_layout(module: nn.Module) -> BlockPaths | None:
    """The layout of a module that has the parts of a Res2Net bottleneck, whatever it computes."""
    found: dict[str, Any] = {}
    for names, pairs in ((("conv1", "bn1"), _FIRST), (("convs", "bns"), _MIDDLE), (("conv3", "bn3"), _LAST)):
        paths = next(filter(None, (_present(module, pair) for pair in pairs)), None)
        if paths is None:
            return None
        found.update(zip(names, paths, strict=True))
    for name, alternatives in OPTIONAL.items():
        # What a block lacks may still be given later, under its usual name, if its code would call it.
        absent = alternatives[:1] if name != "relu" and may_read(type(module), alternatives[0]) else ()
        found[name] = next(((other,) for other in alternatives if _part(module, other) is not None), absent)
    return BlockPaths(**found)


def _present(module: nn.Module, pair: tuple[str, str]) -> tuple[Path, ...] | None:
    """The two paths if the module has something at both, with names that the module itself gives filled in."""
    paths = []
    for path in pair:
        if path.startswith("{"):
            named = getattr(module, path.strip("{}"), None)
            if not isinstance(named, str):
                return None
            path = named
        paths.append(tuple(path.split(".")))
    modules = [list(resolve(module, path)) for path in paths]
    if not modules[0] or not all(isinstance(m, nn.Module) for m in itertools.chain(*modules)):
        return None
    alone = "*" not in paths[0]
    if any(isinstance(m, nn.ModuleList) for m in itertools.chain(*modules)) or (alone and len(modules[0]) != 1):
        return None
    return tuple(paths) if modules[1] else None


def resolve(module: nn.Module | None, path: tuple[Any, ...]) -> Iterator[nn.Module | None]:
    """What is at the path, one or `Paths`: one module, or all of a list; nothing where an ordinary module stands for one."""
    for i, name in enumerate(path):
        if isinstance(name, tuple):
            yield from resolve(module, name)
            if i + 1 == len(path):
                return
            continue
        if name == "*":
            if isinstance(module, nn.ModuleList):
                for child in module._modules.values():
                    yield from resolve(child, path[i + 1 :])
            return
        module = None if module is None else module._modules.get(name)
    yield module


def parts_of(module: nn.Module, layout: BlockPaths = PUBLISHED) -> BlockParts:
    """The block's parts now. Dictionaries, not attributes: nn.Module.__getattr__ would be most of a cached call's cost."""
    parts: list[Any] = []
    for name in _names():
        path = getattr(layout, name)
        if not path:
            parts.append(_without(name, parts))
        elif name in ("convs", "bns"):
            parts.append(list(resolve(module, path)))
        elif len(path) == 1:
            parts.append(_part(module, path[0]))
        else:
            parts.append(next(resolve(module, path)))
    parts += list(resolve(module, layout.acts)) if layout.acts else (), layout.ending
    return BlockParts(module, *parts)


def _without(name: str, parts: list[Any]) -> Any:
    """What stands for a part that the block has not. parts: those before it."""
    if name == "bns":
        return [NO_NORM] * len(parts[-1])
    return _FUNCTIONAL_RELU if name == "relu" else NO_NORM if name in ("bn1", "bn3") else None


def _part(module: nn.Module, name: str) -> Callable[[Tensor], Tensor] | None:
    """The submodule of that name, or a function in its place."""
    part = module._modules.get(name)
    if part is None:
        part = module.__dict__.get(name)
    return part if callable(part) else None


def wrappers(module: nn.Module, layout: BlockPaths) -> list[nn.Module]:
    """The modules on the way to the parts, whose own calls a fused block leaves out too."""
    found: dict[int, nn.Module] = {}
    for name in _NAMES if layout.wraps else ():
        for path in _each(getattr(layout, name)):
            for end in range(1, len(path)):
                if path[end] != "*":
                    found.update((id(m), m) for m in resolve(module, path[:end]) if m is not None)
    return list(found.values())


def strangers(block: BlockParts, layout: BlockPaths, around: list[nn.Module]) -> dict[str, nn.Module]:
    """Modules of the block that are no parts and hold none: its own forward may call them, so they compute nothing yet."""
    # Not a difference of sets: the compiler of torch 2.11 knows none between keys and a frozenset.
    found = {name: m for name, m in block.module._modules.items() if m is not None and name not in layout.roots}
    if around:
        known = {id(part) for part in itertools.chain(block.modules(), around)}
        inside = {f"{i}.{k}": m for i, w in enumerate(around) for k, m in w._modules.items() if m is not None}
        found.update({name: m for name, m in inside.items() if id(m) not in known})
    return found


def surroundings(block: BlockParts, around: list[nn.Module], others: dict[str, nn.Module]) -> tuple[object, ...]:
    """All that the block's own code may read besides its parts, comparable at every call. others: its `strangers`."""
    code = (switches(block.module), *[switches(module) for module in around])
    return code if not others else (*code, *((name, _reading(others[name])) for name in sorted(others)))


def _reading(stranger: nn.Module) -> tuple[object, ...]:
    return tuple((type(m), m.extra_repr(), switches(m)) for m in stranger.modules())


def changed_surroundings(module: nn.Module, now: tuple[object, ...], then: tuple[object, ...]) -> str:
    """The name of what is not as it was `then`."""
    if now[0] != then[0] and isinstance(then[0], tuple):
        pairs = zip(named_switches(module).items(), then[0], strict=False)
        return next((name for (name, value), old in pairs if value != old), "a setting")
    names = {entry[0] for entry in set(now) ^ set(then) if isinstance(entry, tuple) and entry and isinstance(entry[0], str)}
    return ", ".join(sorted(names)) or "a setting"
