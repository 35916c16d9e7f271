"""`accelerate(model)`: the Res2Net blocks that a model already has made to run fused, in place, by swapping their class.

A block's class becomes a generated subclass with `FusedForward` in front, so that isinstance, state_dict, hooks and the
block's own forward stay. The subclass pickles as (mixin, original class) and is generated again where it is loaded.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..backends.base import BACKENDS
from ..chain.config import one_of
from ..modules.block_parts import BlockParts, BlockPaths, parts_of, strangers, surroundings, wrappers
from ..modules.block_state import STATE, BlockState, FusedModule
from ..modules.confirmation import NOTE
from ..modules.eligibility import block_geometry, why_not_alike, why_not_convolutions, why_not_foldable, why_not_read
from ..modules.fused_forward import FusedForward, freeze_block
from ..modules.fused_forward1d import (
    BlockState1d,
    FusedForward1d,
    descendants,
    freeze_chain,
    geometry_1d,
    parts_1d,
    switches_1d,
    why_not_alike_1d,
)
from ..modules.weight_cache import capturing
from . import channels_last
from .class_swap import _generating, fused_class, originals, own_class, without
from .recognition import layout_of, recognise
from .recognition1d import layout_1d_of, recognise_1d
from .stem import STEM_REFUSAL, FusedStem, freeze_stem, fused_stems, take_over_stems

Model = TypeVar("Model", bound=nn.Module)

REFUSAL = "_res2net_fused_refusal"  # why `accelerate` left a look-alike alone, for `explain`
LOST = "it no longer has the parts of a Res2Net block"

# Blocks are tried on copies, which fail where another thread swaps classes or puts hooks meanwhile.
_swapping = threading.RLock()  # a class's own forward runs under it


def accelerate(
    model: Model, backend: str = "auto", *, recompute: bool = False, memory_format: torch.memory_format | None = None
) -> Model:
    """Makes every recognised Res2Net block of `model`, 2-D or along rows, run fused, in place, and returns the model.

    model: any nn.Module; blocks keep class, parameters, state_dict keys and hooks.
    backend: of `hierarchical_conv2d`, for all blocks. recompute: whether backward in training mode convolves again rather than
    keep the convolutions' outputs: less memory for one more convolution a step.
    memory_format: of the weights of the model's 2-D convolutions, given in place (same Parameters, values and keys); they hand
    it on to what they compute. None gives the strides of channels-last, which the kernels read, to all whose memory is the same
    in both formats (1x1 kernels), and a hook to the convolutions in front of the first block, which converts their input, if
    the model has 2-D blocks that run fused and their device gains by it. torch.channels_last and torch.contiguous_format
    convert all weights, torch.preserve_format none. Weights that are quantized, parametrized, sharded, or under
    DistributedDataParallel stay as they are, as do those that share the memory that would be laid out anew.
    Blocks that are no Res2Net blocks, or compute something else than their class promises, are left alone; `explain(model)`
    lists them with the reason. `restore(model)` takes it back. Other threads may call the model meanwhile.
    Raises TypeError for what is no nn.Module, ValueError for an unknown backend or memory format.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; an nn.Module is needed")
    one_of("backend", backend, BACKENDS)
    one_of("memory_format", memory_format, channels_last.FORMATS)
    with _swapping:
        for module in model.modules():
            if isinstance(module, FusedStem):
                continue  # a network
            if type(module) in originals or not isinstance(module, FusedModule):
                _take_over(module, backend, recompute)  # one that runs fused is looked at anew: it may have other parts by now
            elif (state := module.__dict__.get(STATE)) is not None:  # fused by its own class, or under a class of others
                state.backend = backend
                if isinstance(state, BlockState):
                    state.recompute = recompute
                state.drop()
        take_over_stems(model, backend)
        channels_last.convert(model, memory_format)
    return model


def _take_over(module: nn.Module, backend: str, recompute: bool) -> None:
    """Makes the module run fused if it is a Res2Net block, and notes the reason if it only looks like one."""
    mixin: Any = FusedForward
    state: BlockState | BlockState1d | None = None
    original = own_class(module)
    if (layout_1d := layout_1d_of(module)) is not None:
        mixin = FusedForward1d
        found, reason = recognise_1d(module, layout_1d)
        if found is not None:
            modules = descendants(module)
            state = BlockState1d(found[0], backend, geometry_1d(modules), found[1], switches_1d(module, modules))
    elif (layout := layout_of(module)) is not None:
        recognised, reason = recognise(module, layout)
        if recognised is not None:
            layout = recognised.layout
            parts = parts_of(module, layout)
            why_not_convolutions(parts), why_not_foldable(parts)  # tried now, since a trace cannot
            geometry, read = block_geometry(parts), _surroundings(parts, layout)
            state = BlockState(recognised.config, backend, geometry, recompute, recognised.shortcut, layout, read)
    elif type(module) is original:
        return
    else:
        reason = LOST
    module.__dict__.pop(REFUSAL, None)
    if state is None:
        module.__dict__[REFUSAL] = reason
        if type(module) is not original:
            module.__class__ = original
            del module.__dict__[STATE]
        return
    module.__dict__[STATE] = state
    module.__class__ = fused_class(original, mixin)


def restore(model: Model) -> Model:
    """Gives the accelerated blocks of `model` their original classes and strides back, in place, and returns the model.

    Classes that others put on top later stay on top. A `Bottle2neck` is fused by its own class and stays so.
    Not while another thread calls the model: a call that has begun needs what this takes away.
    """
    with _swapping:
        for module in model.modules():
            for name in (REFUSAL, STEM_REFUSAL, NOTE):
                module.__dict__.pop(name, None)
            generated = next((c for c in type(module).__mro__ if c in originals), None)
            if generated is None:
                continue  # never accelerated; a Bottle2neck is fused by its own class
            own: Any = type(module)
            with _generating:
                module.__class__ = without(own, generated)
            module.__dict__.pop(STATE, None)
        channels_last.revert(model)
    return model


def freeze(model: Model) -> Model:
    """Folds and packs the weights of all fused blocks of `model` now and keeps them, also under torch.compile, until `refresh`.

    For inference with parameters that no longer change: frozen blocks are not checked for changed weights, but compute with
    what they were when frozen, in every dtype and on every device. `train()`, `.to()` and `load_state_dict` thaw them. The
    folding is y = K x * scale + shift with scale = weight / sqrt(running_var + eps) (docs/mathematics.md).

    The folded weights have the parameters' dtype. Under autocast they are rounded to its dtype, once: here if freeze is called
    under it, else at the first call under it, on another device (a replica of DataParallel) at the first call there. What is
    made once is kept too, at most one copy for each dtype and device. Inside a CUDA graph nothing is made for keeping: a graph
    that is captured before such a call rounds and packs at every replay, and a compiled one rounds.

    Other threads may call the model meanwhile. A CUDA graph captured of a frozen model reads the frozen weights: keep the model
    frozen as long as the graph is replayed. Returns the model.
    Raises RuntimeError for a block whose BatchNorm is in training mode, nothing is frozen then, and while a CUDA graph is
    captured.
    """
    if capturing():
        raise RuntimeError("freeze waits for the weights that it makes, but a CUDA graph is being captured; freeze before")
    for name, block in fused_blocks(model):
        if any(isinstance(bn, _BatchNorm) and bn.training for bn in _norms(block)):
            raise RuntimeError(f"block {name!r} has a BatchNorm in training mode; call model.eval() before freeze")
    for _, block in fused_blocks(model):
        state = getattr(block, STATE)
        if isinstance(state, BlockState1d):
            if why_not_alike_1d(block, state) is None:
                freeze_chain(parts_1d(block, state.layout), state)
            continue
        parts = parts_of(block, state.layout)
        if why_not_read(parts) is not None:
            continue  # it runs its class's own forward; `explain` tells
        why_not_alike(parts, state, _surroundings(parts, state.layout))  # else a call notes them, which graphs guard
        if why_not_convolutions(parts) is None and why_not_foldable(parts) is None:
            freeze_block(parts, state)  # any other likewise
    for _, network in fused_stems(model):
        freeze_stem(network)
    return model


def _surroundings(parts: BlockParts, layout: BlockPaths) -> tuple[object, ...]:
    around = wrappers(parts.module, layout)
    return surroundings(parts, around, strangers(parts, layout, around))


def _norms(block: nn.Module) -> Iterable[nn.Module]:
    state = getattr(block, STATE)
    return parts_1d(block, state.layout).bns if isinstance(state, BlockState1d) else parts_of(block, state.layout).norms


def refresh(model: Model) -> Model:
    """Drops all weights that the fused blocks of `model` keep, and returns the model.

    Needed to undo `freeze`, and after writes that PyTorch cannot see (`.data`, NumPy), of which not all are noticed
    (docs/troubleshooting.md).
    Other threads may call the model meanwhile: calls that begin after it has returned see what was written before it.
    """
    for _, block in fused_blocks(model):
        getattr(block, STATE).drop()
    for _, network in fused_stems(model):
        getattr(network, STATE).drop()
    return model


def fused_blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every block of the model that has the fused forward, with its name."""
    for name, module in model.named_modules():
        if isinstance(module, FusedModule) and STATE in module.__dict__:
            yield name, module
