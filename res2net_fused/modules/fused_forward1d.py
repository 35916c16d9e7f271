"""How a 1-D Res2Net block runs fused: the mixin before the blocks of speaker networks (ECAPA-TDNN).

Some modules are the chain alone (SpeechBrain, WeSpeaker), others a whole bottleneck (ESPnet), whose outer convolutions stay its
own. In eval mode the affine maps of the BatchNorms after ReLU are kept, and the chain is one operator; in training mode, where
those norms need the statistics of the batch, the class's own forward runs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..backends import choices
from ..backends.cpu.chain1d import pack_1d
from ..backends.selection import requested
from ..chain.block_weights import Chain1dWeights
from ..chain.config import Chain1dConfig
from ..chain.problem import Chain1dProblem
from ..ops.hierarchical_conv1d import call_1d
from .block_parts import NO_NORM, Path, Paths, resolve
from .block_state import FusedModule, FusedState
from .choosing import why_own
from .eligibility import (
    compute_dtype,
    fused_activation,
    is_floating,
    under_autocast,
    why_not_called,
    why_not_left_out,
    why_not_of_dtype,
)
from .folding import affine_of, is_identity
from .snapshot import Known, Snapshot, take_snapshot
from .switches import switches
from .tracing import leaf_call
from .weight_cache import Frozen, cacheable

NORMS = (nn.BatchNorm1d, nn.SyncBatchNorm)  # in eval mode one is what the other is
ADDITION: Path = ("+",)  # the step at which the shortcut is added


@dataclass(frozen=True)
class Layout1d:
    """Paths of the chain's convolutions and norms, () for none. outer: whether the module is a whole bottleneck.

    before, after: the modules called on either side of its chain, by default as ESPnet's blocks have them; () is a function for
    ReLU, and what the block has not is left out. shortcut: the module of the shortcut, () for x itself.
    """

    convs: Paths
    bns: Paths
    outer: bool
    before: tuple[Path, ...] = (("conv1",), ("relu",), ("bn1",))
    after: tuple[Path, ...] = (("conv3",), ("relu",), ("bn3",), ("se",), ADDITION)
    shortcut: Path = ()


class ChainParts(NamedTuple):
    """A 1-D chain's modules at this moment; the types are those of recognised blocks."""

    convs: list[nn.Conv1d]
    bns: list[nn.BatchNorm1d]

    def tensors(self) -> list[Tensor]:
        """Everything that `resolve_weights` reads, and each num_batches_tracked, which tells when running statistics moved."""
        modules = (*self.convs, *self.bns)
        return [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]

    def differentiable(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in self.tensors()))

    def problem(self, x: Tensor, config: Chain1dConfig) -> Chain1dProblem:
        """The call of the chain for an x of this batch and length, which those of a whole bottleneck share with it."""
        weight = self.convs[0].weight
        return replace(Chain1dProblem.from_tensor(x, weight, len(self.convs), config), dtype=compute_dtype(weight))


@dataclass
class BlockState1d(FusedState):
    """What a fused 1-D block knows about itself."""

    config: Chain1dConfig
    geometry: list[object]  # of all its modules: `geometry_1d`
    layout: Layout1d
    switches: Any = None  # of the block and all its modules, when it was recognised


class FusedForward1d(FusedModule):
    """Mixin before an nn.Module class with a 1-D chain; its instances carry a BlockState1d."""

    def _res2net_fused_forward(
        self, state: BlockState1d, x: Tensor, args: tuple[object, ...], kwargs: dict[str, object]
    ) -> Tensor | str:
        compiling = is_compiling()  # a graph would watch all that is looked at here
        known: KnownChain | None = None if compiling else state.known
        if known is not None and not args and not kwargs:
            out = known.run(self, state, x)
            if out is not None:
                return out
        leaf = leaf_call(self, x, args, kwargs)
        if leaf is not None:
            return leaf
        # Before anything is asked, since another thread may change the block meanwhile.
        snapshot = take_snapshot(self, ()) if not compiling and state.is_due() else None
        chain = parts_1d(self, state.layout)
        refusal = why_not_fused_1d(self, state, chain, x, args, kwargs)
        if not compiling:
            if state.asked(refusal is None and cacheable(chain.tensors())) and snapshot is not None:
                state.known = KnownChain(snapshot, chain)
        if refusal is not None:
            return refusal
        if not state.layout.outer:
            return run_chain_1d(chain, x, state)
        inner = enter_block_1d(self, x, state.layout)  # (N, s*w, L)
        return finish_block_1d(self, run_chain_1d(chain, inner, state), x, state.layout)


class KnownChain(Known):
    """What a call in eval mode has found out."""

    def __init__(self, snapshot: Snapshot, chain: ChainParts) -> None:
        super().__init__(snapshot)
        self.chain, self.weight = chain, chain.convs[0].weight
        self.tensors, self.settings = chain.tensors(), _settings_of(chain)
        # What is asked of x, the problem that it makes, and why the block's own forward should run it.
        self.seen: tuple[tuple[object, ...], Chain1dProblem, str | None] | None = None

    def run(self, block: nn.Module, state: BlockState1d, x: Tensor) -> Tensor | str | None:
        """The block for this x, or why its own forward has to run; None where all has to be asked anew."""
        if not self.holds(block, state, x):
            return None
        weight = self.weight
        autocast = torch._C._is_any_autocast_enabled() and (under_autocast(x.device.type), compute_dtype(weight))
        kind = x.dtype, x.device, x.shape, weight.dtype, weight.device, weight.shape, autocast
        facts = *kind, requested(state.backend), choices.version()
        seen = self.seen
        if seen is None or seen[0] != facts:
            if not is_floating(x, 3) or why_not_of_dtype(x, weight) is not None:
                return None
            problem = self.chain.problem(x, state.config)
            if choices.is_to_be_measured("inference", problem):
                return None
            self.seen = seen = facts, problem, why_own("inference", problem, state.backend)
        _, problem, reason = seen
        if reason is not None:
            return reason
        state.last_problem = problem
        inner = enter_block_1d(block, x, state.layout) if state.layout.outer else x  # (N, s*w, L)
        out = call_1d(inner, self._weights(problem.dtype, weight.device, state), state.config, state.backend)
        return finish_block_1d(block, out, x, state.layout) if state.layout.outer else out

    def _weights(self, dtype: torch.dtype, device: torch.device, state: BlockState1d) -> Chain1dWeights:
        if state.frozen is not None:
            return state.frozen.weights(dtype, device)
        settings = dtype, requested(state.backend), self.settings
        return state.keep(self.tensors, settings, lambda: _resolve_and_pack(self.chain, dtype, device))


def parts_1d(block: nn.Module, layout: Layout1d) -> ChainParts:
    """The chain's convolutions and norms now."""
    convs = list(resolve(block, layout.convs))
    bns = list(resolve(block, layout.bns)) if layout.bns else [NO_NORM] * len(convs)
    return ChainParts(cast(list[nn.Conv1d], convs), cast(list[nn.BatchNorm1d], bns))


def enter_block_1d(block: nn.Module, x: Tensor, layout: Layout1d) -> Tensor:
    """What a whole bottleneck has before the chain."""
    for path in layout.before:
        x = _called(block, path, x)
    return x


def finish_block_1d(block: nn.Module, out: Tensor, x: Tensor, layout: Layout1d) -> Tensor:
    """What follows the chain of a whole bottleneck."""
    for path in layout.after:
        if path == ADDITION:
            out = out + (_called(block, layout.shortcut, x) if layout.shortcut else x)
        else:
            out = _called(block, path, out)
    return out


def _called(block: nn.Module, path: Path, x: Tensor) -> Tensor:
    if not path:
        return x.relu()
    module = next(resolve(block, path), None)
    return x if module is None else module(x)


def run_chain_1d(chain: ChainParts, x: Tensor, state: BlockState1d) -> Tensor:
    """Runs the chain; (N, s*w, L) -> (N, s*w, L)."""
    if not is_compiling():
        state.last_problem = chain.problem(x, state.config)
    return call_1d(x, chain_weights(chain, x, state), state.config, state.backend)


# Weights ----------------------------------------------------------------------------------------------------------------


def chain_weights(chain: ChainParts, x: Tensor, state: BlockState1d) -> Chain1dWeights:
    """The frozen tensors, the kept ones if nothing changed, both in the dtype that is computed in, or the block's own."""
    if chain.differentiable(x):
        return resolve_weights(chain)
    weight = chain.convs[0].weight
    dtype, device = compute_dtype(weight), weight.device
    frozen = state.frozen
    if frozen is not None:
        return frozen.weights(dtype, device)
    tensors = chain.tensors()
    if not cacheable(tensors):
        return resolve_weights(chain)
    return state.keep(tensors, _settings(chain, dtype, state), lambda: _resolve_and_pack(chain, dtype, device))


def _settings(chain: ChainParts, dtype: torch.dtype, state: BlockState1d) -> tuple[object, ...]:
    """What kept weights depend on beside the chain's tensors."""
    return dtype, requested(state.backend), _settings_of(chain)


def _settings_of(chain: ChainParts) -> tuple[object, ...]:
    """The part of them that lies in the chain's modules."""
    return tuple(getattr(bn, "eps", 0.0) for bn in chain.bns)


def _resolve_and_pack(chain: ChainParts, dtype: torch.dtype, device: torch.device) -> Chain1dWeights:
    with torch.inference_mode(False), torch.no_grad():  # ordinary tensors outside autograd
        return _pack(resolve_weights(chain).detached().to(dtype, device))


def reads_old_weights_1d(chain: ChainParts, dtype: torch.dtype, state: BlockState1d) -> bool:
    """Whether a call in `dtype` would read kept weights that are no longer the parameters': makes them anew to tell."""
    make = functools.partial(_resolve_and_pack, chain, dtype, chain.convs[0].weight.device)
    return state.frozen is None and state.outdated(chain.tensors(), _settings(chain, dtype, state), make)


def resolve_weights(chain: ChainParts) -> Chain1dWeights:
    """The chain's weights, and its norms as affine maps; differentiable."""
    found = [conv.bias for conv in chain.convs if conv.bias is not None]
    biases = found if len(found) == len(chain.convs) else None
    weights = [conv.weight for conv in chain.convs]
    if all(map(is_identity, chain.bns)):
        return Chain1dWeights(weights, biases)
    affine = [affine_of(bn, weight.dtype) for bn, weight in zip(chain.bns, weights, strict=True)]
    return Chain1dWeights(weights, biases, [scale for scale, _ in affine], [shift for _, shift in affine])


def _pack(weights: Chain1dWeights) -> Chain1dWeights:
    """The same with its weights also in the layout of the backend that will run it."""
    return replace(weights, packed=pack_1d(weights.weights) if weights.weights[0].device.type == "cpu" else None)


def freeze_chain(chain: ChainParts, state: BlockState1d) -> None:
    """Keeps the chain's tensors as they are until that is dropped; packed in the dtype that a call would have now."""

    def frozen() -> Frozen[Chain1dWeights]:
        weight = chain.convs[0].weight
        with torch.inference_mode(False), torch.no_grad():
            weights = resolve_weights(chain).detached(copy=True)
        return Frozen(weights, weight.device, _pack, compute_dtype(weight))

    state.freeze(frozen)


# Eligibility ------------------------------------------------------------------------------------------------------------


def why_not_fused_1d(
    block: nn.Module,
    state: BlockState1d,
    chain: ChainParts,
    x: Any,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> str | None:
    """None if this call may run fused, else the reason."""
    _, reason = why_not_called(3, None, x, args, kwargs)
    if reason is not None:
        return reason
    modules = descendants(block)
    reason = why_not_alike_1d(block, state, modules)
    if reason is not None:
        return reason
    if block.training or any(module.training for module in modules):
        if all(map(is_identity, chain.bns)):
            return "in training mode a block along rows runs its own forward"
        return "in training mode its BatchNorms, which come after ReLU, need the batch's statistics; that is not fused in 1-D"
    weight = chain.convs[0].weight
    reason = why_not_of_dtype(x, weight)
    if reason is not None:
        return reason
    if any(not is_identity(bn) and (bn.running_mean is None or bn.running_var is None) for bn in chain.bns):
        return "BatchNorm has no running statistics"
    reason = why_not_left_out(modules)
    if reason is None:
        passes = "gradients" if chain.differentiable(x) else "inference"
        reason = why_own(passes, chain.problem(x, state.config), state.backend, (block, x))
    return reason


def why_not_alike_1d(block: nn.Module, state: BlockState1d, modules: Sequence[nn.Module] | None = None) -> str | None:
    """None if the block has the modules and settings that it was recognised with, else the reason. modules: `descendants`."""
    modules = descendants(block) if modules is None else modules
    geometry = geometry_1d(modules)
    if geometry != state.geometry:
        name = _changed_1d(block, geometry, state)
        return f"{name} was replaced, parametrized or given another geometry since it was recognised"
    now = switches_1d(block, modules)
    if state.switches is None and not is_compiling():
        state.switches = now  # of a block that an older version has saved
    if state.switches is None or now == state.switches:
        return None
    return "a setting of the block or of a module inside was changed since it was recognised"


def _changed_1d(block: nn.Module, geometry: list[object], state: BlockState1d) -> str:
    """The name of a module that is not as it was, as far as it can be told."""
    parts = {
        "convs": ((nn.Conv1d,), list(resolve(block, state.layout.convs))),
        "bns": (NORMS, list(resolve(block, state.layout.bns)) if state.layout.bns else []),
    }
    for name, (kinds, found) in parts.items():
        for i, part in enumerate(found):
            if type(part) not in kinds:
                return f"{name}[{i}] (now {'missing' if part is None else type(part).__name__})"
    names = {id(module): name for name, module in block.named_modules()}
    pairs = zip(descendants(block), geometry, state.geometry, strict=False)
    return next((f"{names[id(m)]} ({type(m).__name__})" for m, now, then in pairs if now != then), "a module")


def switches_1d(block: nn.Module, modules: Sequence[nn.Module]) -> tuple[object, ...]:
    """The settings that the code of the block and of the modules inside reads."""
    return tuple(map(switches, (block, *modules)))


def descendants(block: nn.Module) -> list[nn.Module]:
    """All modules inside, in a fixed order; one that stands twice is there twice."""
    found = [m for m in block._modules.values() if m is not None]
    for module in found:
        if module._modules:
            found += [m for m in module._modules.values() if m is not None]
    return found


def geometry_1d(modules: Sequence[nn.Module]) -> list[object]:
    """The kinds of all modules, and what changes the result of a convolution beyond its tensors, or of an activation."""
    return [
        (m.kernel_size, m.stride, m.padding, m.dilation, m.groups, m.padding_mode) if type(m) is nn.Conv1d else _kind(m)
        for m in modules
    ]


def _kind(module: nn.Module) -> object:
    name = fused_activation(module)
    return type(module) if name is None or name == "relu" else (type(module), name)
