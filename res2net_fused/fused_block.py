"""How a Res2Net block runs fused: the mixin that stands in front of a block class's own forward.

`Bottle2neck` has it by inheritance, the blocks of other libraries get it from `accelerate`. In eval mode it folds the
BatchNorms, keeps the folded and packed weights, and calls the operator; in training mode `trained_block.py` takes over, with an
operator that has BatchNorm in it. Whatever cannot run fused runs the class's own forward.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backends.selection import requested
from .chain import ChainConfig, ChainProblem, memory_format
from .folding import (
    CacheKey,
    FoldedBlock,
    Frozen,
    KeepsWeights,
    adds_at_once,
    block_tensors,
    cacheable,
    capturing,
    fold_block,
    is_frozen,
    is_identity,
    projection_of,
    why_not_bypassed,
    why_not_folded,
)
from .layouts import PUBLISHED, BlockLayout, BlockParts, parts_of, wrappers
from .operator import fused_bottle2neck, hierarchical_conv2d
from .packing import PackedWeights, one_operator, pack_block
from .reference import activate, apply_optional, finish_bottle2neck
from .trained_block import is_auto, run_trained, uses_batch_statistics, why_not_trained

if TYPE_CHECKING:
    from typing_extensions import Self  # typing's from Python 3.11 on

STATE = "_res2net_fused"  # the attribute that holds a block's BlockState
OVERFLOWED = "a folded weight is beyond float16's range: a BatchNorm with hardly any variance or eps"
UNSEEN = "a CUDA graph is captured in float16 and no call before it has seen that its range holds these folded weights"


@dataclass
class BlockState(KeepsWeights):
    """What a fused block knows about itself; of this only the fields before `kept` are copied and pickled."""

    config: ChainConfig
    backend: str
    geometry: tuple[object, ...]  # of the convolutions and the pool when they were recognised: `block_geometry`
    recompute: bool = False  # in training: whether backward convolves again rather than keep the convolutions' outputs
    shortcut: str | None = None  # forward's second parameter, if what is given for it is known to be added in x's place
    layout: BlockLayout = PUBLISHED  # where the block keeps its parts
    # One tuple, read and written at once: DataParallel's replicas share it among threads.
    kept: tuple[CacheKey, FoldedBlock] | None = field(default=None, repr=False)
    frozen: Frozen[FoldedBlock] | None = field(default=None, repr=False)
    last_problem: ChainProblem | None = None  # of the last fused call
    last_trained: bool = False  # whether that call had batch statistics
    last_refusal: str | None = None  # why the last call ran the class's own forward

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("config", "backend", "geometry", "recompute", "shortcut", "layout")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]


# The mixins come before a class of modules; by themselves they are none.
if TYPE_CHECKING:
    _Mixin = nn.Module
else:
    _Mixin = object


class FusedModule(_Mixin):
    """Mixin of all modules that run fused: what they keep under STATE is dropped where PyTorch changes their tensors."""

    def train(self, mode: bool = True) -> Self:
        getattr(self, STATE).drop(frozen=mode)
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        getattr(self, STATE).drop()
        return super()._apply(fn, recurse)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        getattr(self, STATE).drop()
        return super()._load_from_state_dict(*args, **kwargs)


class FusedForward(FusedModule):
    """Mixin before an nn.Module class of the Res2Net kind; its instances carry a BlockState."""

    def forward(self, x: Tensor, *args: object, **kwargs: object) -> Tensor:
        state: BlockState = getattr(self, STATE)
        parts = parts_of(self, state.layout)
        refusal = why_not_fused(parts, state, x, args, kwargs)
        if not torch.compiler.is_compiling():
            state.last_refusal = refusal
        if any(bn.training and not is_frozen(bn) for bn in parts.norms):
            state.drop()  # running statistics change without a trace
        if refusal is not None:
            return super().forward(x, *args, **kwargs)
        shortcut = given_shortcut(state.shortcut, args, kwargs)[0]
        if any(map(uses_batch_statistics, parts.bns)):
            if not torch.compiler.is_compiling():
                state.last_problem, state.last_trained = chain_problem(parts, x, state), True
            return run_trained(parts, x, shortcut, state.config, state.recompute, state.backend)
        out = run_fused(parts, x, shortcut, state)
        if not isinstance(out, str):
            return out
        if not torch.compiler.is_compiling():
            state.last_refusal = out
        return super().forward(x, *args, **kwargs)


def run_fused(block: BlockParts, x: Tensor, given: Tensor | None, state: BlockState) -> Tensor | str:
    """The block in eval mode, (N, inplanes, H, W) as the class's own: one operator, or its parts where that does not do.

    given: the shortcut (N, planes * 4, H', W') of a caller who passes one, else None. The reason where a folded weight
    overflows, or may; with gradients on, when every call folds, only CPUs look: others would have to wait for the answer.
    """
    weight = block.conv1.weight
    dtype = compute_dtype(weight)
    x_in = x.to(dtype)
    differentiable = torch.is_grad_enabled() and (
        any(t is not None and t.requires_grad for t in (x, given))
        or any(t.requires_grad for t in itertools.chain(block.module.parameters(), block_tensors(block)))
    )
    if not torch.compiler.is_compiling():
        state.last_problem, state.last_trained = chain_problem(block, x, state), False
    if differentiable or not is_identity(block.drop_block):
        folded = fold_block(block, dtype)
        if dtype == torch.float16 and x.device.type == "cpu" and cacheable(block_tensors(block)) and folded.overflows():
            return OVERFLOWED
        return finish_bottle2neck(block, _run_parts(block, x_in, folded, folded.weights, state), x, given)
    kept = folded_weights(block, dtype, weight.device, state)
    if kept is None:
        return UNSEEN
    folded = kept
    if folded.overflowed and dtype == torch.float16:
        return OVERFLOWED
    if not one_operator(state.config):
        chain = PackedWeights.of_block(folded, state.config)
        return finish_bottle2neck(block, _run_parts(block, x_in, folded, chain, state), x, given)
    entry = entry_pixels(block, x_in)
    if not adds_at_once(block):
        out = fused_bottle2neck(entry, None, folded, False, state.config, state.backend)
        return finish_bottle2neck(block, out, x, given)
    shortcut = _shortcut(block, x_in, x, folded) if given is None else given
    return fused_bottle2neck(entry, shortcut, folded, True, state.config, state.backend)


def _run_parts(
    block: BlockParts, x: Tensor, folded: FoldedBlock, weights: list[Tensor] | PackedWeights, state: BlockState
) -> Tensor:
    """conv1, the chain and conv3 one by one, before attention, shortcut and the last activation."""
    config, dtype = state.config, x.dtype
    biases = None if isinstance(weights, PackedWeights) else folded.biases
    out = F.conv2d(x, folded.conv1_weight, folded.conv1_bias.to(dtype), block.conv1.stride)
    out = out.relu_() if config.activation == "relu" else activate(out, config.activation)  # (N, s*w, H, W)
    out = hierarchical_conv2d(out, weights, biases, **config.settings(), backend=state.backend)
    out = apply_optional(block, "drop_block", out)
    return F.conv2d(out, folded.conv3_weight, folded.conv3_bias.to(dtype))


def entry_pixels(block: BlockParts, x: Tensor) -> Tensor:
    """The pixels that conv1 reads: all, or those at its stride, then in x's memory format, which odd strides hide."""
    rows, columns = block.conv1.stride
    return x if rows == columns == 1 else x[:, :, ::rows, ::columns].contiguous(memory_format=memory_format(x))


def _shortcut(block: BlockParts, x_in: Tensor, x: Tensor, folded: FoldedBlock) -> Tensor:
    """What the operator adds, before the projection that it applies itself."""
    if block.downsample is None:
        return x
    if folded.projection_weight is None:
        return block.downsample(x)
    projection = projection_of(block)
    pool = None if projection is None else projection[0]
    return x_in if pool is None else pool(x_in)


def folded_weights(block: BlockParts, dtype: torch.dtype, device: torch.device, state: BlockState) -> FoldedBlock | None:
    """The frozen weights, the cached ones if nothing changed, or newly folded ones.

    None where a CUDA graph is captured in float16 and no call before it has kept these weights: whether they overflow cannot be
    asked now.
    """
    frozen = state.frozen
    if frozen is not None:
        folded = frozen.weights(dtype, device)
        if folded.projection_weight is not None and projection_of(block) is None:  # hooked, replaced or trained since
            folded = replace(folded, projection_weight=None, packed=None, layout="plain")
        return folded
    if torch.compiler.is_compiling():
        return fold_block(block, dtype)
    tensors = block_tensors(block)
    keeps = cacheable(tensors)
    if not keeps and not capturing():
        return fold_block(block, dtype)
    projection = projection_of(block)
    settings = (
        dtype, requested(state.backend), tuple(getattr(bn, "eps", 0.0) for bn in block.norms),
        None if projection is None else (projection[1].stride, getattr(projection[2], "eps", 0.0)),
    )  # fmt: skip
    if keeps:
        return state.keep(tensors, settings, lambda: fold_and_pack(block, dtype, state))
    return _folded_in_a_graph(block, dtype, state, state.unchanged(tensors, settings))


def _folded_in_a_graph(
    block: BlockParts, dtype: torch.dtype, state: BlockState, kept: FoldedBlock | None
) -> FoldedBlock | None:
    """For a CUDA graph, which folds at every replay, and packs as calls before it did: so it launches kernels that are loaded.

    kept: what such a call has kept of the same weights, or None. In float16 that says whether they overflow: nothing else can
    while the graph is captured.
    """
    if dtype == torch.float16 and (kept is None or kept.overflowed):
        return kept
    return fold_and_pack(block, dtype, state, in_graph=True)


def fold_and_pack(block: BlockParts, dtype: torch.dtype, state: BlockState, in_graph: bool = False) -> FoldedBlock:
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

    def frozen() -> Frozen[FoldedBlock]:
        weight = block.conv1.weight
        with torch.inference_mode(False), torch.no_grad():
            folded = fold_block(block, weight.dtype)
            folded.overflowed = weight.dtype != torch.float64 and folded.overflows()
        pack = functools.partial(pack_block, config=state.config, backend=state.backend)
        return Frozen(folded, weight.device, pack, compute_dtype(weight))

    state.freeze(frozen)


def chain_problem(block: BlockParts, x: Tensor, state: BlockState) -> ChainProblem:
    """The call of the chain inside, for the block's x."""
    rows, columns = block.conv1.stride
    problem = ChainProblem.of(x, block.convs[0].in_channels, len(block.convs), state.config)
    dtype = compute_dtype(block.conv1.weight)
    if rows == columns == 1 and dtype == x.dtype:
        return problem
    height, width = (problem.height - 1) // rows + 1, (problem.width_pixels - 1) // columns + 1
    return replace(problem, dtype=dtype, height=height, width_pixels=width)


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which the convolutions of such weights run: autocast's where it is on, else their own."""
    kind = weight.device.type
    if kind != "meta" and torch.is_autocast_enabled(kind) and weight.dtype != torch.float64:
        return torch.get_autocast_dtype(kind)
    return weight.dtype


# Eligibility: cheap, at every call, since users hook, replace and parametrize submodules at any time ------------------


def why_not_fused(
    block: BlockParts, state: BlockState, x: object, args: tuple[object, ...], kwargs: dict[str, object]
) -> str | None:
    """None if this call may run fused, else the reason."""
    if torch.onnx.is_in_onnx_export():
        return "exported to ONNX, which knows PyTorch's own operators only"
    shortcut, reason = given_shortcut(state.shortcut, args, kwargs)
    if reason is not None:
        return reason
    if shortcut is not None and block.downsample is not None:
        return "called with a shortcut, beside a downsample of its own"
    if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point():
        return "x is not a 4-D floating-point tensor"
    weight_dtype = block.conv1.weight.dtype
    if x.dtype != weight_dtype and (
        torch.float64 in (x.dtype, weight_dtype) or not torch.is_autocast_enabled(x.device.type)
    ):
        return f"x is {x.dtype} but the weights are {weight_dtype}"
    if not torch.compiler.is_compiling() and transformed():
        return "torch.func transforms and forward-mode derivatives need PyTorch's own operators"
    training = any(map(uses_batch_statistics, block.bns))
    if training and getattr(block.module, "with_cp", False):
        return "with_cp: in training its own forward checkpoints it"
    if training:
        reason = why_not_trained(block, chain_problem(block, x, state), state.backend, state.recompute)
    else:
        reason = why_not_foldable(block)
    if reason is not None:
        return reason
    if fused_activation(block.relu) != state.config.activation:
        return f"activation {type(block.relu).__name__} is not fused"
    if block_geometry(block) != state.geometry:
        return "a convolution or the pool was replaced, parametrized or given another geometry since it was recognised"
    if not one_operator(state.config) and is_auto(state.backend) and not clamped_chain_pays(chain_problem(block, x, state)):
        return "clamped activations are measured to gain in channels-last only; backend= asks for the operator"
    if torch.nn.modules.module._has_any_global_hook():
        return "global module hooks must see every submodule's call"
    # In training they are called as modules.
    outer: tuple[nn.Module, ...] = () if training else (block.conv1, block.bn1, block.conv3, block.bn3)
    outer += tuple(wrappers(block.module, state.layout)) if state.layout.wraps else ()
    for module in (*outer, *block.convs, *block.bns, block.relu, block.pool):
        if module is None:
            continue
        reason = why_not_bypassed(module)
        if reason is not None:
            return reason
    return None


def given_shortcut(
    name: str | None, args: tuple[object, ...], kwargs: dict[str, object]
) -> tuple[Tensor | None, str | None]:
    """What a caller passes as `name` to be added in x's place, or None; and why the call cannot run fused, or None."""
    shortcut = args[0] if args else kwargs.get(name) if name is not None else None
    others = [*args[1:], *(value for key, value in kwargs.items() if args or key != name)]
    if any(other is not None for other in others) or (shortcut is not None and name is None):
        return None, "called with more than x" + ("" if name is None else f" and {name}")
    if shortcut is not None and not isinstance(shortcut, Tensor):
        return None, f"{name} is a {type(shortcut).__name__}, not a tensor"
    return shortcut, None


def clamped_chain_pays(problem: ChainProblem) -> bool:
    """Whether a block that is not one operator should be fused.

    On one AVX-512 core, blocks of speaker networks, fp32: 1.1 to 1.55 times as fast in channels-last, but for a strided one of
    few channels at batch 1 (0.8); 0.73 to 1.5 times as fast in NCHW, whose groups are converted for the chain.
    """
    return problem.channels_last or problem.device.type != "cpu"


def transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp) or forward-mode AD is at work, for which the operators have no rules."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def why_not_foldable(block: BlockParts) -> str | None:
    """None if every norm of the block can be folded now, else the reason."""
    return next(filter(None, map(why_not_folded, block.norms)), None)


def fused_activation(module: nn.Module) -> str | None:
    """The chain's name for this activation, also under a derived class that only has settings of its own."""
    forward = type(module).forward
    if forward is nn.ReLU.forward:
        return "relu"
    if isinstance(module, nn.Hardtanh) and forward is nn.Hardtanh.forward and (module.min_val, module.max_val) == (0, 20):
        return "hardtanh20"
    return None


_POOL_SETTINGS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")


def block_geometry(block: BlockParts) -> tuple[object, ...]:
    """All of the block's convolutions and pool that changes the result beyond their tensors, comparable at every call."""
    pool = block.pool
    pool_settings = None if pool is None else (type(pool), *(getattr(pool, name, None) for name in _POOL_SETTINGS))
    return pool_settings, *(
        (type(conv), conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
         conv.groups, conv.padding_mode)
        for conv in (block.conv1, *block.convs, block.conv3)
    )  # fmt: skip
