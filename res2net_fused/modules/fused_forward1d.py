"""How a 1-D Res2Net block runs fused: the mixin before the blocks of speaker networks (ECAPA-TDNN).

Some modules are the chain alone (SpeechBrain, WeSpeaker), others a whole bottleneck (ESPnet), whose outer convolutions stay its
own. In eval mode the affine maps of the BatchNorms after ReLU are kept, and the chain is one operator; in training mode, where
those norms need the statistics of the batch, the class's own forward runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..backends import policy
from ..backends.cpu.chain1d import pack_1d
from ..backends.selection import is_auto, requested
from ..backends.selection1d import choose_1d, plan_1d
from ..chain.config import Chain1dConfig
from ..chain.problem import Chain1dProblem
from ..ops.hierarchical_conv1d import call_1d
from .block_parts import Path, resolve
from .block_state import STATE, FusedModule
from .eligibility import compute_dtype, given_shortcut, transformed
from .folding import affine_of, why_not_bypassed
from .weight_cache import CacheKey, Frozen, KeepsWeights, MadeOn, cacheable


@dataclass(frozen=True)
class Layout1d:
    """Paths of the chain's convolutions and norms. outer: whether conv1, bn1, conv3 and bn3 stand around the chain."""

    convs: Path
    bns: Path
    outer: bool


@dataclass
class Chain1dWeights:
    """A chain's tensors as the operator takes them; packed and affine maps worked out where they are kept."""

    weights: list[Tensor]  # each (w, w, k)
    biases: list[Tensor] | None  # each (w,), as the affine maps
    scale: list[Tensor]
    shift: list[Tensor]
    packed: list[Tensor] | None = None
    made: MadeOn | None = None  # where it is kept

    def to(self, dtype: torch.dtype, device: torch.device) -> Chain1dWeights:
        """The plain weights in `dtype`, all on `device`; what is added and scaled keeps its dtype."""
        biases = None if self.biases is None else [bias.to(device) for bias in self.biases]
        scale, shift = [scale.to(device) for scale in self.scale], [shift.to(device) for shift in self.shift]
        return Chain1dWeights([weight.to(device, dtype) for weight in self.weights], biases, scale, shift)


@dataclass
class BlockState1d(KeepsWeights):
    """What a fused 1-D block knows about itself; of this only the fields before `kept` are copied and pickled."""

    config: Chain1dConfig
    backend: str
    layout: Layout1d
    geometry: list[object]  # of all its modules when they were recognised: `geometry_1d`
    kept: tuple[CacheKey, Chain1dWeights] | None = field(default=None, repr=False)
    frozen: Frozen[Chain1dWeights] | None = field(default=None, repr=False)
    last_problem: Chain1dProblem | None = None  # of the last fused call
    last_refusal: str | None = None  # why the last call ran the class's own forward

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("config", "backend", "layout", "geometry")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class FusedForward1d(FusedModule):
    """Mixin before an nn.Module class with a 1-D chain; its instances carry a BlockState1d."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        state: BlockState1d = getattr(self, STATE)
        convs, bns = parts_1d(self, state.layout)
        refusal = why_not_fused_1d(self, state, convs, bns, x, args, kwargs)
        if not torch.compiler.is_compiling():
            state.last_refusal = refusal
        if refusal is not None:
            return super().forward(x, *args, **kwargs)
        if not state.layout.outer:
            return run_chain_1d(convs, bns, x, state)
        inner = enter_block_1d(self, x)  # (N, s*w, L)
        return finish_block_1d(self, run_chain_1d(convs, bns, inner, state), x)


def enter_block_1d(block: Any, x: Tensor) -> Tensor:
    """What a whole bottleneck has before the chain. block: a module with conv1, bn1 and relu."""
    return block.bn1(block.relu(block.conv1(x)))


def finish_block_1d(block: Any, out: Tensor, x: Tensor) -> Tensor:
    """What follows the chain of a whole bottleneck: conv3, attention, and the addition of x."""
    out = block.bn3(block.relu(block.conv3(out)))
    attention = block._modules.get("se")
    return (out if attention is None else attention(out)) + x


def run_chain_1d(convs: Sequence[nn.Conv1d], bns: Sequence[nn.BatchNorm1d], x: Tensor, state: BlockState1d) -> Tensor:
    """(N, s*w, L) -> (N, s*w, L)."""
    weight = convs[0].weight
    dtype = compute_dtype(weight)
    if not torch.compiler.is_compiling():
        state.last_problem = chain_problem_1d(convs, x, weight, dtype, state)
    chain = chain_weights(convs, bns, x, dtype, weight.device, state)
    return call_1d(x, chain.weights, chain.biases, chain.scale, chain.shift, chain.packed, state.config, state.backend)


def chain_problem_1d(
    convs: Sequence[nn.Conv1d], x: Tensor, weight: Tensor, dtype: torch.dtype, state: BlockState1d
) -> Chain1dProblem:
    """The call of the chain in `dtype`, for an x of this batch and length; weight: of the first convolution."""
    batch, _, length = x.shape
    width, _, kernel_size = weight.shape
    return Chain1dProblem(state.config, x.device, dtype, batch, length, width, len(convs), kernel_size)


def chain_weights(
    convs: Sequence[nn.Conv1d],
    bns: Sequence[nn.BatchNorm1d],
    x: Tensor,
    dtype: torch.dtype,
    device: torch.device,
    state: BlockState1d,
) -> Chain1dWeights:
    """The frozen tensors, the kept ones if nothing changed, both in `dtype` on `device`, or the block's own."""
    if _differentiable(convs, bns, x):
        return resolve_weights(convs, bns)
    frozen = state.frozen
    if frozen is not None:
        return frozen.weights(dtype, device)
    tensors = _tensors(convs, bns)
    if not cacheable(tensors):
        return resolve_weights(convs, bns)
    settings = dtype, requested(state.backend), tuple(bn.eps for bn in bns)
    return state.keep(tensors, settings, lambda: resolve_and_pack(convs, bns, dtype))


def _tensors(convs: Sequence[nn.Conv1d], bns: Sequence[nn.BatchNorm1d]) -> list[Tensor]:
    """Everything that is worked out of, and each num_batches_tracked, which tells when running statistics moved."""
    modules = (*convs, *bns)
    return [t for m in modules for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]


def resolve_weights(convs: Sequence[nn.Conv1d], bns: Sequence[nn.BatchNorm1d]) -> Chain1dWeights:
    """Differentiable."""
    found = [conv.bias for conv in convs if conv.bias is not None]
    biases = found if len(found) == len(convs) else None
    weights = [conv.weight for conv in convs]
    affine = [affine_of(bn, weight.dtype) for bn, weight in zip(bns, weights, strict=True)]
    return Chain1dWeights(weights, biases, [scale for scale, _ in affine], [shift for _, shift in affine])


def resolve_and_pack(convs: Sequence[nn.Conv1d], bns: Sequence[nn.BatchNorm1d], dtype: torch.dtype) -> Chain1dWeights:
    """For keeping: ordinary tensors outside autograd, also in inference mode."""
    with torch.inference_mode(False), torch.no_grad():
        return _pack(_detached(resolve_weights(convs, bns)).to(dtype, convs[0].weight.device))


def _detached(chain: Chain1dWeights, copy: bool = False) -> Chain1dWeights:
    """Outside autograd; copy: with weights and biases that are not the block's own."""

    def detached(tensors: list[Tensor]) -> list[Tensor]:
        return [tensor.detach().clone() if copy else tensor.detach() for tensor in tensors]

    return replace(chain, weights=detached(chain.weights), biases=None if chain.biases is None else detached(chain.biases))


def _pack(chain: Chain1dWeights) -> Chain1dWeights:
    """The same with its weights also in the layout of the backend that will run it."""
    return replace(chain, packed=pack_1d(chain.weights) if chain.weights[0].device.type == "cpu" else None)


def freeze_chain(convs: Sequence[nn.Conv1d], bns: Sequence[nn.BatchNorm1d], state: BlockState1d) -> None:
    """Keeps the chain's tensors as they are until that is dropped; packed in the dtype that a call would have now."""

    def frozen() -> Frozen[Chain1dWeights]:
        weight = convs[0].weight
        with torch.inference_mode(False), torch.no_grad():
            chain = _detached(resolve_weights(convs, bns), copy=True)
        return Frozen(chain, weight.device, _pack, compute_dtype(weight))

    state.freeze(frozen)


def parts_1d(block: nn.Module, layout: Layout1d) -> tuple[list[nn.Conv1d], list[nn.BatchNorm1d]]:
    """The chain's convolutions and norms now; the types are those of recognised blocks."""
    convs, bns = list(resolve(block, layout.convs)), list(resolve(block, layout.bns))
    return cast(list[nn.Conv1d], convs), cast(list[nn.BatchNorm1d], bns)


# Eligibility ------------------------------------------------------------------------------------------------------------


def why_not_fused_1d(
    block: nn.Module,
    state: BlockState1d,
    convs: Sequence[nn.Conv1d],
    bns: Sequence[nn.BatchNorm1d],
    x: object,
    args: tuple[object, ...],
    kwargs: dict[str, object],
) -> str | None:
    """None if this call may run fused, else the reason."""
    if torch.onnx.is_in_onnx_export():
        return "exported to ONNX, which knows PyTorch's own operators only"
    reason = given_shortcut(None, args, kwargs)[1] if args or kwargs else None
    if reason is not None:
        return reason
    if not isinstance(x, Tensor) or x.dim() != 3 or not x.is_floating_point():
        return "x is not a 3-D floating-point tensor"
    if not torch.compiler.is_compiling() and transformed():
        return "torch.func transforms and forward-mode derivatives need PyTorch's own operators"
    modules = descendants(block)
    if block.training or any(module.training for module in modules):
        return "in training mode its BatchNorms, which come after ReLU, need the batch's statistics; that is not fused in 1-D"
    if geometry_1d(modules) != state.geometry:
        return "a module was replaced, parametrized or given another geometry since it was recognised"
    weight = convs[0].weight
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"x is {x.dtype} but the weights are {weight.dtype}"
    if any(bn.running_mean is None or bn.running_var is None for bn in bns):
        return "BatchNorm has no running statistics"
    if torch.nn.modules.module._has_any_global_hook():
        return "global module hooks must see every submodule's call"
    reason = next(filter(None, map(why_not_bypassed, modules)), None)
    if reason is None and is_auto(state.backend) and not _pays(convs, bns, x, state):
        return "its own forward is not measured to be slower here; backend= asks for the operator"
    return reason


def _pays(convs: Sequence[nn.Conv1d], bns: Sequence[nn.BatchNorm1d], x: Tensor, state: BlockState1d) -> bool:
    """In inference; an x of a whole bottleneck has the chain's rows."""
    weight = convs[0].weight
    dtype = compute_dtype(weight)
    return not _differentiable(convs, bns, x) and policy.chain_pays_1d(chain_problem_1d(convs, x, weight, dtype, state))


def _differentiable(convs: Sequence[nn.Conv1d], bns: Sequence[nn.BatchNorm1d], x: Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or any(t.requires_grad for t in _tensors(convs, bns)))


def descendants(block: nn.Module) -> list[nn.Module]:
    """All modules inside, in a fixed order; one that stands twice is there twice."""
    found = [m for m in block._modules.values() if m is not None]
    for module in found:
        if module._modules:
            found += [m for m in module._modules.values() if m is not None]
    return found


def geometry_1d(modules: Sequence[nn.Module]) -> list[object]:
    """The kinds of all modules, and what changes a convolution's result beyond its tensors."""
    return [
        (m.kernel_size, m.stride, m.padding, m.dilation, m.groups, m.padding_mode) if type(m) is nn.Conv1d else type(m)
        for m in modules
    ]


def report_1d(state: BlockState1d) -> tuple[bool | None, str, str, str]:
    """For `explain`: whether the last call ran fused, the backend, the reason and the plan."""
    if state.last_refusal is not None:
        return False, "", state.last_refusal, ""
    if state.last_problem is None:
        return None, "", "not run yet", ""
    try:
        choice = choose_1d(state.last_problem, state.backend)
    except RuntimeError as error:
        return False, "", str(error), ""
    return True, choice.name, choice.reason, f"{state.last_problem}: {plan_1d(state.last_problem, choice.name)}"
