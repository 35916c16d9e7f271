"""A model brought into the memory format that the kernels read, in place, and back.

PyTorch's convolutions hand on the format of their weights and inputs: behind one that has either in channels-last everything
is. By default only weights change whose memory is the same in both formats, those of 1x1 kernels or of one input channel: they
get other strides and not a byte moves. So `view(-1)` of a weight (pruning, parameters_to_vector, LBFGS) and an optimizer that
walks through memory beside an older state, as PyTorch's fused ones on CPUs, stay right. The other convolutions in front of the
first fused block, the stem, convert their images in a hook.

Blocks with nothing in front, which people put into networks and loops of their own, keep the strides of all weights: they
convert x themselves where they run fused, and their own forward trains in the format that it is given.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Tuple  # noqa: UP035  # TorchScript compiles the hook and knows this one only

import torch
from torch import Tensor, nn

from ..backends import policy
from ..chain.memory_format import strides_of
from ..modules.block_state import STATE, BlockState
from ..modules.fused_forward import FusedForward
from ..modules.weight_cache import cacheable

_BEFORE = "_res2net_fused_weight_strides"  # on a convolution whose weight was converted: its strides before

FORMATS = (None, torch.preserve_format, torch.contiguous_format, torch.channels_last)


def convert(model: nn.Module, wanted: torch.memory_format | None) -> None:
    """Bring a model into a format, in place: its Parameters, their values, keys and sharing stay.

    wanted: of the weights of all 2-D convolutions; None for channels-last where no byte moves, and in the stem by a hook, if
    the model has 2-D blocks whose kernels gain by it, of which bare ones convert by themselves; preserve_format for no change.
    """
    if not cacheable(()):
        return  # something traces or watches: that is no time to change tensors
    if wanted is torch.preserve_format or (wanted is None and not _gains(model)):
        return
    bare = wanted is None and not any(module._parameters for module in _front(model))
    for _, state in _blocks(model):
        state.hands_on = bare
    if bare:
        return
    stem = list(_stem(model)) if wanted is None else []
    _unhook(model, stem)
    for conv in stem:
        if hand_on not in conv._forward_pre_hooks.values():
            conv.register_forward_pre_hook(hand_on)
    shared = None if wanted is None else _memory_users(model)
    for conv in _convolutions(model):
        weight = conv.weight
        strides = strides_of(weight, wanted is not torch.contiguous_format)
        if strides == weight.stride() or not (_same_memory(weight) or (shared is not None and _alone(weight, shared))):
            continue
        conv.__dict__.setdefault(_BEFORE, weight.stride())
        _restride(weight, strides)


def revert(model: nn.Module) -> None:
    """Give the converted weights the strides back that they had, and take the hooks away."""
    _unhook(model)
    for conv in _convolutions(model):
        before = conv.__dict__.pop(_BEFORE, None)
        if before is not None and len(before) == conv.weight.dim():
            _restride(conv.weight, before)


def hand_on(self: nn.Module, input: Tuple[torch.Tensor]) -> Tuple[torch.Tensor]:  # noqa: UP006
    """Give a convolution its images in channels-last; annotated and written as TorchScript compiles it."""
    x = input[0]
    if not torch.jit.is_scripting():
        if not isinstance(x, torch.Tensor):
            return input  # FX traces what is inside a convolution
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    return (x,)


def _unhook(model: nn.Module, but: Sequence[nn.Module] = ()) -> None:
    for module in model.modules():
        if module in but:
            continue
        for key in [key for key, hook in module._forward_pre_hooks.items() if hook is hand_on]:
            del module._forward_pre_hooks[key]


def _stem(model: nn.Module) -> Iterator[nn.Conv2d]:
    """The convolutions in front of the first fused block, by their order in the model, whose weights keep their strides."""
    plain = [module for module in _front(model) if type(module) is nn.Conv2d]
    fitting = {id(conv) for conv in _convolutions(model)}
    return (conv for conv in plain if id(conv) in fitting and not _same_memory(conv.weight))


def _front(model: nn.Module) -> Iterator[nn.Module]:
    """The modules in front of the first fused block, by their order in the model, and those around it."""
    return itertools.takewhile(lambda module: not isinstance(module, FusedForward), model.modules())


def _blocks(model: nn.Module) -> Iterator[tuple[nn.Module, BlockState]]:
    for module in model.modules():
        if isinstance(module, FusedForward) and STATE in vars(module):
            yield module, vars(module)[STATE]


def _gains(model: nn.Module) -> bool:
    return any(
        state.backend != "reference" and any(policy.channels_last_pays(p.device, p.dtype) for p in block.parameters())
        for block, state in _blocks(model)
    )


def _same_memory(weight: Tensor) -> bool:
    """Whether both formats lay the values out alike."""
    return weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)


def _restride(weight: Tensor, strides: tuple[int, ...]) -> None:
    with torch.inference_mode(False), torch.no_grad():
        data = weight.detach()
        if _same_memory(weight):
            weight.data = data.as_strided(data.shape, strides)
        else:
            weight.data = torch.empty_strided(data.shape, strides, dtype=data.dtype, device=data.device).copy_(data)


def _convolutions(model: nn.Module) -> Iterator[nn.Conv2d]:
    """The 2-D convolutions whose weights are plain Parameters, not quantized, parametrized, sharded or on the meta device.

    None under DistributedDataParallel, which has laid out its buckets by the strides of before.
    """
    modules = list(model.modules())
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in modules):
        return
    for module in modules:
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 4 and _is_plain(weight) and not weight.is_inference():
                yield module  # type: ignore[misc]


def _is_plain(tensor: Tensor) -> bool:
    kinds = (nn.Parameter, Tensor, nn.Buffer)
    return type(tensor) in kinds and tensor.device.type in ("cpu", "cuda") and tensor.layout is torch.strided


def _memory_users(model: nn.Module) -> Counter[int]:
    """How many tensors of the model lie in each storage, by its address."""
    tensors = {id(t): t for m in model.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
    return Counter(t.untyped_storage().data_ptr() for t in tensors.values() if _is_plain(t))


def _alone(weight: Tensor, users: Counter[int]) -> bool:
    """Whether the weight has its memory for itself: what others share with it, here or in other processes, stays shared."""
    storage = weight.untyped_storage()
    if users[storage.data_ptr()] > 1 or storage.nbytes() != weight.numel() * weight.element_size():
        return False
    return weight.device.type != "cpu" or not weight.is_shared()
