"""How a Res2Net block runs fused: the mixin that stands in front of a block class's own forward.

`Bottle2neck` has it by inheritance, the blocks of other libraries get it from `accelerate`. In eval mode it folds the
BatchNorms, keeps the folded and packed weights, and calls the operator; in training mode `training.py` takes over, with an
operator that has BatchNorm in it. Whatever cannot run fused runs the class's own forward.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..backends import choices
from ..backends.base import PreparedBlock
from ..backends.selection import is_auto, requested
from ..chain.activations import activate
from ..chain.block_weights import BlockWeights
from ..chain.config import ChainConfig
from ..chain.memory_format import memory_format
from ..ops.bottle2neck import fused_bottle2neck, prepared_bottle2neck
from ..ops.frozen_bottle2neck import call_bottle2neck
from ..ops.hierarchical_conv2d import hierarchical_conv2d
from ..ops.packed_weights import PackedWeights, one_operator, pack_block, pack_to_be_kept
from .block_parts import BlockParts, parts_of, strangers, wrappers
from .block_state import BlockState, FusedModule
from .choosing import why_own
from .confirmation import eps_of
from .eligibility import (
    chain_problem,
    compute_dtype,
    differentiates,
    given_shortcut,
    handed_on,
    is_floating,
    under_autocast,
    why_not_fused,
    why_not_of_dtype,
)
from .folding import Projection, adds_at_once, block_tensors, does_nothing, fold_block, is_frozen, is_identity, projection_of
from .reference_blocks import apply_optional, finish_bottle2neck
from .snapshot import Known, Snapshot, take_snapshot
from .switches import has_code
from .tracing import leaf_call
from .training import run_trained, uses_batch_statistics
from .weight_cache import Frozen, cacheable, capturing

OVERFLOWED = "a folded weight is beyond float16's range: a BatchNorm with hardly any variance or eps"

UNSEEN = "a CUDA graph is captured in float16 and no call before it has seen that its range holds these folded weights"


class FusedForward(FusedModule):
    """Mixin before an nn.Module class of the Res2Net kind; its instances carry a BlockState."""

    def _res2net_fused_forward(
        self, state: BlockState, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Tensor | str:
        compiling = is_compiling()  # a graph would watch all that is looked at here
        known: KnownBlock | None = None if compiling else state.known
        if known is not None:
            out = known.run(self, state, x, args, kwargs)
            if out is not None:
                return out
        leaf = None if compiling else leaf_call(self, x, args, kwargs)
        if leaf is not None:
            return leaf
        # Before anything is asked, since another thread may change the block meanwhile.
        snapshot = self._snapshot(state) if not compiling and state.is_due() else None
        parts = parts_of(self, state.layout)
        refusal = why_not_fused(parts, state, x, args, kwargs)
        if any(getattr(bn, "training", False) and not (is_frozen(bn) or is_identity(bn)) for bn in parts.norms):
            state.drop()  # running statistics change without a trace
        if not compiling:
            foldable = refusal is None and does_nothing(parts.drop_block) and not any(map(uses_batch_statistics, parts.bns))
            if state.asked(foldable and cacheable(block_tensors(parts))) and snapshot is not None:
                state.known = KnownBlock(snapshot, parts)
        if refusal is not None:
            return refusal
        shortcut = given_shortcut(state.shortcut, args, kwargs)[0]
        if any(map(uses_batch_statistics, parts.bns)):
            if not is_compiling():
                state.last_problem, state.last_trained = chain_problem(parts, x, state, trained=True), True
            return run_trained(
                parts, handed_on(parts.conv1.weight, x, state), shortcut, state.config, state.recompute, state.backend
            )
        return run_fused(parts, x, shortcut, state)

    def _snapshot(self, state: BlockState) -> Snapshot | None:
        parts = parts_of(self, state.layout)
        read = strangers(parts, state.layout, wrappers(self, state.layout))
        if any(has_code(m) for stranger in read.values() for m in stranger.modules()):  # whose `extra_repr` may say anything
            return None
        return take_snapshot(self, _opaque(parts))


def _opaque(block: BlockParts) -> list[nn.Module]:
    """Parts that a fused block calls as modules, whatever is inside them."""
    called = [part for part in (block.se, block.drop_path) if isinstance(part, nn.Module) and not is_identity(part)]
    downsample = block.downsample
    return called + ([downsample] if isinstance(downsample, nn.Module) and type(downsample) is not nn.Sequential else [])


class KnownBlock(Known):
    """What a call in eval mode has found out.

    Later ones ask for nothing but what comes with x, and whether the tensors still hold what was folded.
    """

    def __init__(self, snapshot: Snapshot, parts: BlockParts) -> None:
        super().__init__(snapshot)
        self.parts = replace(parts, module=cast(Any, None))  # which holds this
        self.weight = parts.conv1.weight
        self.tensors = block_tensors(parts)
        self.settings = _settings_of(parts)
        self.norms = [type(bn) for bn in parts.norms]
        self.whole = adds_at_once(parts)
        self.projection = projection_of(parts)
        self.seen: tuple[tuple[object, ...], _Seen] | None = None

    def run(self, block: nn.Module, state: BlockState, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        """The block for this x, as `run_fused` returns it; None where all has to be asked anew."""
        given = None
        if args or kwargs:
            given, reason = given_shortcut(state.shortcut, args, kwargs)
            if reason is not None or (given is not None and self.parts.downsample is not None):
                return None
        if not self.holds(block, state, x, given):
            return None
        weight = self.weight
        autocast = torch._C._is_any_autocast_enabled() and (under_autocast(x.device.type), compute_dtype(weight))
        device = weight.device
        kind = x.dtype, x.device, x.shape, x.stride(), weight.dtype, device, weight.stride(), autocast
        asked = requested(state.backend)
        facts = *kind, asked, choices.version()
        seen = self.seen
        if seen is None or seen[0] != facts:
            if not is_floating(x, 4) or why_not_of_dtype(x, weight) is not None:
                return None
            fresh = _Seen(self.parts, x, state)
            if choices.is_to_be_measured("inference", fresh.problem):
                return None
            self.seen = seen = facts, fresh
        found = seen[1]
        if found.why_own is not None:
            return found.why_own
        state.last_problem, state.last_trained = found.problem, False
        if found.converts:
            x = x.contiguous(memory_format=torch.channels_last)
        x_in = x if x.dtype is found.dtype else x.to(found.dtype)
        folded: BlockWeights = self._folded(found.dtype, device, state, asked)
        return _run_folded(self.parts, x, x_in, given, folded, state, self.whole, self.projection, found)

    def _folded(self, dtype: torch.dtype, device: torch.device, state: BlockState, asked: tuple[str, str]) -> BlockWeights:
        """asked: what `requested` says of the backend now, which reads the environment."""
        frozen = state.frozen
        if frozen is not None and state.frozen_norms == self.norms:
            return _without_projection(frozen.weights(dtype, device), self.projection)
        settings = (dtype, asked, *self.settings)
        return state.keep(self.tensors, settings, lambda: fold_and_pack(self.parts, dtype, state))


class _Seen:
    """What follows from an x of one shape and kind, beside weights of one dtype, while nobody asks for another backend."""

    def __init__(self, block: BlockParts, x: Tensor, state: BlockState) -> None:
        weight = block.conv1.weight
        self.dtype = compute_dtype(weight)
        self.converts = handed_on(weight, x, state) is not x
        self.problem = chain_problem(block, x, state, trained=False)
        self.why_own = why_own("inference", self.problem, state.backend)
        self.measured = choices.lookup("inference", self.problem)
        self.prepared: tuple[BlockWeights, PreparedBlock | None] | None = None

    def call(self, entry: Tensor, shortcut: Tensor, folded: BlockWeights, state: BlockState) -> Tensor:
        """`fused_bottle2neck`, which is asked once for weights, if its backend can be called without it."""
        prepared = self.prepared
        known = prepared is not None and prepared[0] is folded
        if prepared is not None and known and prepared[1] is not None:
            return prepared[1](entry, shortcut)
        out = fused_bottle2neck(entry, shortcut, folded, True, state.config, state.backend)
        if not known:
            self.prepared = folded, prepared_bottle2neck(entry, folded, True, state.config, state.backend)
        return out


def run_fused(block: BlockParts, x: Tensor, given: Tensor | None, state: BlockState) -> Tensor | str:
    """The block in eval mode, (N, inplanes, H, W) as the class's own: one operator, or its parts where that does not do.

    given: the shortcut (N, planes * 4, H', W') of a caller who passes one, else None. The reason where a folded weight
    overflows, or may; with gradients on, when every call folds, only CPUs look: others would have to wait for the answer.
    """
    weight = block.conv1.weight
    dtype = compute_dtype(weight)
    x = handed_on(weight, x, state)
    x_in = x.to(dtype)
    differentiable = differentiates(block, x, given)
    if not is_compiling():
        state.last_problem, state.last_trained = chain_problem(block, x, state, trained=False), False
    if differentiable or not does_nothing(block.drop_block):
        folded = fold_block(block, dtype)
        if dtype == torch.float16 and x.device.type == "cpu" and cacheable(block_tensors(block)) and folded.overflows():
            return OVERFLOWED
        return finish_bottle2neck(block, _run_parts(block, x_in, folded, folded.weights, state), x, given)
    kept = folded_weights(block, dtype, weight.device, state)
    if kept is None:
        return UNSEEN
    return _run_folded(block, x, x_in, given, kept, state, adds_at_once(block), projection_of(block), None)


def _run_folded(
    block: BlockParts,
    x: Tensor,
    x_in: Tensor,
    given: Tensor | None,
    folded: BlockWeights,
    state: BlockState,
    whole: bool,
    projection: Projection | None,
    seen: _Seen | None,
) -> Tensor | str:
    """The same with the weights that it has now. x_in: x in their dtype. whole: `adds_at_once`. projection: `projection_of`.

    seen: calls like this one, where there were any.
    """
    if folded.overflowed and x_in.dtype == torch.float16:
        return OVERFLOWED
    if not one_operator(state.config):
        chain = PackedWeights.from_block(folded, state.config)
        return finish_bottle2neck(block, _run_parts(block, x_in, folded, chain, state), x, given)
    entry = entry_pixels(block, x_in)
    if not is_compiling():
        measured = choices.lookup("inference", state.last_problem) if seen is None else seen.measured
        folded = folded if measured is None else _packed_as(measured, folded, state)
    shortcut = (_shortcut(block, x_in, x, folded, projection) if given is None else given) if whole else None
    if shortcut is None or not _fits(shortcut, entry, folded, state.config):
        out = call_bottle2neck(entry, None, folded, False, state.config, state.backend)
        return finish_bottle2neck(block, out, x, given)
    if seen is None or type(shortcut) is not Tensor:
        return call_bottle2neck(entry, shortcut, folded, True, state.config, state.backend)
    return seen.call(entry, shortcut, folded, state)


def _packed_as(found: choices.Found, folded: BlockWeights, state: BlockState) -> BlockWeights:
    """The weights in the layout of the backend that was measured to be the fastest for this call, which may be another one."""
    if folded.packed is None or found.backend in ("", "reference", folded.layout) or not is_auto(state.backend) or capturing():
        return folded
    packed = folded.others.get(found.backend)
    if packed is None:
        with torch.inference_mode(False), torch.no_grad():
            folded.others[found.backend] = packed = pack_block(folded, state.config, found.backend)
    return packed


def _fits(shortcut: Tensor, entry: Tensor, folded: BlockWeights, config: ChainConfig) -> bool:
    """Whether a shortcut has the size of what it is added to, or is broadcast. entry: what conv1 reads, (N, inplanes, H, W)."""
    if folded.projects or shortcut is entry:
        return True
    batch, _, height, width = entry.shape
    return shortcut.shape == (batch, folded.out_channels, config.output_size(height), config.output_size(width))


def _run_parts(
    block: BlockParts, x: Tensor, folded: BlockWeights, weights: list[Tensor] | PackedWeights, state: BlockState
) -> Tensor:
    """conv1, the chain and conv3 one by one, before attention, shortcut and the last activation."""
    config, dtype = state.config, x.dtype
    biases = None if isinstance(weights, PackedWeights) else folded.biases
    out = F.conv2d(x, folded.conv1_weight, folded.conv1_bias.to(dtype), block.conv1.stride)
    out = out.relu_() if config.activation == "relu" else activate(out, config.activation)  # (N, s*w, H, W)
    out = hierarchical_conv2d(out, weights, biases, **config.as_kwargs(), backend=state.backend)
    out = apply_optional(block, "drop_block", out)
    return F.conv2d(out, folded.conv3_weight, folded.conv3_bias.to(dtype))


def entry_pixels(block: BlockParts, x: Tensor) -> Tensor:
    """The pixels that conv1 reads: all, or those at its stride, then in x's memory format, which odd strides hide."""
    rows, columns = block.conv1.stride
    return x if rows == columns == 1 else x[:, :, ::rows, ::columns].contiguous(memory_format=memory_format(x))


def _shortcut(block: BlockParts, x_in: Tensor, x: Tensor, folded: BlockWeights, projection: Projection | None) -> Tensor:
    """What the operator adds, before the projection that it applies itself."""
    if block.downsample is None:
        return x
    if not folded.projects:
        return block.downsample(x)
    pool = None if projection is None else projection[0]
    return x_in if pool is None else pool(x_in)


def folded_weights(block: BlockParts, dtype: torch.dtype, device: torch.device, state: BlockState) -> BlockWeights | None:
    """The frozen weights, the cached ones if nothing changed, or newly folded ones.

    None where a CUDA graph is captured in float16 and no call before it has kept these weights: whether they overflow cannot be
    asked now.
    """
    frozen = state.frozen
    if frozen is not None and state.frozen_norms == [type(bn) for bn in block.norms]:  # else they were replaced
        return _without_projection(frozen.weights(dtype, device), projection_of(block))
    if is_compiling():
        return fold_block(block, dtype)
    tensors = block_tensors(block)
    keeps = cacheable(tensors)
    if not keeps and not capturing():
        return fold_block(block, dtype)
    settings = _settings(block, dtype, state)
    if keeps:
        return state.keep(tensors, settings, lambda: fold_and_pack(block, dtype, state))
    return _folded_in_a_graph(block, dtype, state, state.unchanged(tensors, settings))


def _without_projection(folded: BlockWeights, projection: Projection | None) -> BlockWeights:
    """Frozen weights without the projection, where it has been hooked, replaced, trained or given another stride since."""
    if folded.projects and (projection is None or projection[1].stride[0] != folded.projection_stride):
        return replace(folded, projection_weight=None, packed=None, gathered=None, layout="plain")
    return folded


def _settings(block: BlockParts, dtype: torch.dtype, state: BlockState) -> tuple[object, ...]:
    """What folded weights depend on beside the block's tensors."""
    return dtype, requested(state.backend), *_settings_of(block)


def _settings_of(block: BlockParts) -> tuple[object, ...]:
    """The part of them that lies in the block's modules."""
    projection = projection_of(block)
    return (
        tuple([eps_of(bn) for bn in block.norms]),
        None if projection is None else (projection[1].stride, eps_of(projection[2])),
    )  # fmt: skip


def reads_old_weights(block: BlockParts, dtype: torch.dtype, state: BlockState) -> bool:
    """Whether a call in `dtype` would read kept weights that are no longer the parameters': folds them anew to tell."""
    fold = functools.partial(fold_and_pack, block, dtype, state)
    return state.frozen is None and state.outdated(block_tensors(block), _settings(block, dtype, state), fold)


def _folded_in_a_graph(
    block: BlockParts, dtype: torch.dtype, state: BlockState, kept: BlockWeights | None
) -> BlockWeights | None:
    """Folds in a CUDA graph, again at every replay, and packs as calls before it did: so it launches kernels that are loaded.

    kept: what such a call has kept of the same weights, or None. In float16 that says whether they overflow: nothing else can
    while the graph is captured.
    """
    if dtype == torch.float16 and (kept is None or kept.overflowed):
        return kept
    return fold_and_pack(block, dtype, state, in_graph=True)


def fold_and_pack(block: BlockParts, dtype: torch.dtype, state: BlockState, in_graph: bool = False) -> BlockWeights:
    """Folded and packed: ordinary tensors outside autograd, also when called in inference mode.

    in_graph: whether a CUDA graph does it, again at each replay. No Python looks at the weights that are there then: where one
    overflows, conv3's bias becomes NaN, and with it all that the block returns.
    """
    with torch.inference_mode(False), torch.no_grad():
        folded = fold_block(block, dtype)
        if dtype == torch.float16 and in_graph:
            folded.conv3_bias = folded.conv3_bias + folded.overflow()
        elif dtype == torch.float16:
            folded.overflowed = folded.overflows()
        return pack_block(folded, state.config, state.backend)


def freeze_block(block: BlockParts, state: BlockState) -> None:
    """Folds the block's weights and keeps that until it is dropped; packed in the dtype that a call would have now."""

    def make() -> Frozen[BlockWeights]:
        weight = block.conv1.weight
        with torch.inference_mode(False), torch.no_grad():
            folded = fold_block(block, weight.dtype)
            folded.overflowed = weight.dtype != torch.float64 and folded.overflows()
        pack = functools.partial(pack_to_be_kept, config=state.config, backend=state.backend)
        dtype = compute_dtype(weight)
        frozen = Frozen(folded, weight.device, pack, dtype)
        if dtype == weight.dtype:
            frozen.original = frozen.weights(dtype, weight.device)  # not twice in memory, where packing has moved them
        return frozen

    state.frozen_norms = [type(bn) for bn in block.norms]
    state.freeze(make)
