"""All that the answers about a block depend on, as it was when they were given: one flat comparison tells whether it still is.

The rules are stated where the answers are given (`eligibility.py`, `folding.py`), which asks for the block's parts, hooks,
settings and tensors one by one. Between two calls hardly anything of that changes. Nothing is decided here but that all is as
it was; anything else is asked anew.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from itertools import chain
from operator import attrgetter, getitem, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from .._native import library
from ..ops.recording import replaced, why_recorded
from .block_state import STATE, FusedState
from .switches import MODULE_ATTRIBUTES, Elsewhere, is_fixed, settled
from .weight_cache import capturing

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CONTENTS = ("_modules", "_parameters", "_buffers")


class Snapshot:
    """A block, the modules inside and all their tensors as they are now.

    It is held by the block and holds neither the block nor its dictionary: a block is freed with the last reference to it. The
    modules and tensors inside it does hold, until the block is called again; only so is an identity more than an address.
    Slots: what is held is the block's own, none of it kept for it.
    """

    __slots__ = (
        "changing", "children", "classes", "contents", "copies", "elsewhere", "empty", "held", "modules", "opaque", "own",
        "own_of", "own_size", "same", "saved", "single_names", "single_places", "singles", "tensors", "watched",
    )  # fmt: skip

    def __init__(self, block: nn.Module, opaque: Collection[nn.Module]) -> None:
        """opaque: modules of the block that are called as such, whose insides change no answer."""
        own = _saved(block.__dict__)
        self.own_size = len(own)
        own.pop(STATE, None)
        self.own_of: Any = itemgetter(*own)
        self.own = tuple(own.values())
        found = list(_inside(block, opaque))
        self.children = [module._modules for module in (block, *found) if module._modules and module not in opaque]
        self.modules = list(chain.from_iterable(map(dict.values, self.children)))
        self.classes = list(map(type, self.modules))
        self.watched = [module for module in found if module not in opaque]
        self.opaque = [module for module in found if module in opaque]
        self.saved = [_saved(vars(module)) for module in self.watched]
        contents = [vars(m)[name] for m in (block, *self.watched) for name in _CONTENTS]
        looked_at = contents + [vars(m)[name] for m in self.watched for name in _HOOKS]
        self.empty = [d for d in looked_at if not d]
        self.contents = [d for d in looked_at if d]
        self.copies = [dict(d) for d in self.contents]
        tensors = [(d, name, value) for d in contents for name, value in d.items() if isinstance(value, Tensor)]
        self.tensors = [tensor for _, _, tensor in tensors]
        # Two tensors of several elements are never equal, since their comparison has no truth value; these could be.
        singles = [(d, name, tensor) for d, name, tensor in tensors if tensor.numel() == 1]
        self.single_places, self.single_names = [d for d, _, _ in singles], [name for _, name, _ in singles]
        self.singles = [tensor for _, _, tensor in singles]
        self.elsewhere = Elsewhere(block, self.watched)
        # The same at half of the time, where all is the very object that it was. It borrows what is held here.
        dicts = [vars(module) for module in self.watched]
        self.held = [list(d.items()) for d in dicts]
        # Of what may change in place, the copies; all else is what it was if it is the same object.
        self.changing = [
            (now, name, value)
            for now, saved in zip(dicts, self.saved, strict=True)
            for name, value in saved.items()
            if now.get(name) is not value and not is_fixed(now.get(name))
        ]
        same_dicts = library.same_dicts()
        self.same = None if same_dicts is None else same_dicts(self.watched, [*self.contents, *self.empty])

    def alike(self, block: nn.Module) -> bool:
        """Whether all is as it was. Any doubt is a no, such as a comparison that fails."""
        own = block.__dict__
        try:
            return (
                len(own) == self.own_size
                and self.own_of(own) == self.own
                and (self._identical() or self._equal())
                and list(map(type, self.modules)) == self.classes
                and self.elsewhere.alike(block)
            )
        except Exception:
            return False

    def _identical(self) -> bool:
        same = self.same
        return same is not None and same.alike() and all([d[name] == value for d, name, value in self.changing])

    def _equal(self) -> bool:
        modules = list(chain.from_iterable(map(dict.values, self.children)))
        return (
            len(modules) == len(self.modules)
            and all(map(is_, modules, self.modules))
            and list(map(vars, self.watched)) == self.saved
            and not any(self.empty)
            and self.contents == self.copies
            and all(map(is_, map(getitem, self.single_places, self.single_names), self.singles))
        )


def take_snapshot(block: nn.Module, opaque: Collection[nn.Module]) -> Snapshot | None:
    """A snapshot of the block, or None where it could not tell: of plain tensors in place of parameters, and foreign kinds.

    None too while something records or changes what is asked of tensors, as torch.jit.trace does with their sizes.
    """
    if needs_asking():
        return None
    modules = list(_inside(block, opaque))
    plain = all(isinstance(vars(m).get(name), dict) for m in (block, *modules) for name in (*_CONTENTS, *_HOOKS))
    if not plain or any(isinstance(value, Tensor) for m in (block, *modules) for value in vars(m).values()):
        return None
    if any(
        isinstance(t, (UninitializedParameter, UninitializedBuffer)) for m in (block, *modules) for t in _tensors_of(m)
    ):  # which has no shape yet
        return None
    return Snapshot(block, opaque)


def _tensors_of(module: nn.Module) -> Iterator[object]:
    return chain(module._parameters.values(), module._buffers.values())


def _inside(block: nn.Module, opaque: Collection[nn.Module]) -> Iterator[nn.Module]:
    """The modules inside, each once, but for those inside the opaque ones."""
    pending, seen = [block], {id(block)}
    while pending:
        module = pending.pop()
        for child in module._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                yield child
                if child not in opaque:
                    pending.append(child)


def _saved(attributes: dict[str, Any]) -> dict[str, Any]:
    """What a module's dictionary is compared with: of what may change in place a copy."""
    saved = attributes.copy()  # which shares the table of names with all modules of the class
    for name, value in attributes.items():
        if name not in MODULE_ATTRIBUTES:
            saved[name] = settled(value)[0]
    return saved


class Known:
    """Base of what a block has found out about itself, for the calls that find it as it was."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.used = False

    def holds(self, block: nn.Module, state: FusedState, x: object, given: Tensor | None = None) -> bool:
        """Whether a call with x, and what is `given` beside it, may go by this: of plain tensors, without gradients."""
        if type(x) is not Tensor or needs_asking():
            return False
        if torch.is_grad_enabled() and self._differentiable(x, given):
            return False
        if x.is_cuda and capturing():
            return False
        if not self.snapshot.alike(block):
            state.forget(self.used)
            return False
        self.used = True
        return True

    def _differentiable(self, x: Tensor, given: Tensor | None) -> bool:
        if x.requires_grad or (given is not None and given.requires_grad) or any(map(_requires_grad, self.snapshot.tensors)):
            return True
        return any(p.requires_grad for module in self.snapshot.opaque for p in module.parameters())


_requires_grad = attrgetter("requires_grad")


def needs_asking() -> bool:
    """Whether something around this call may change the answers about any block: who traces, records, transforms or hooks."""
    return (
        torch._C._is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
        or nn.modules.module._has_any_global_hook()
        or replaced()
        or (torch._C._len_torch_function_stack() > 0 and why_recorded() is not None)
    )
