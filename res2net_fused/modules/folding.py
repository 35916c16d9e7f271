"""BatchNorm folded into the convolution before it, and which norms and shortcuts can be.

In eval mode BatchNorm is the affine map y = (z - mean) * weight / sqrt(var + eps) + bias, so that
bn(conv(x)) = conv'(x) + b' with conv' = conv * scale and b' = (conv.bias - mean) * scale + bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn import Identity
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase

from ..chain.block_weights import BlockWeights
from .block_parts import BlockParts
from .confirmation import eps_of
from .switches import stand_in


def fold(conv: nn.Conv2d, bn: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """conv' in `dtype` and b' in fp32 (fp64 for an fp64 block); differentiable. Half-precision factors multiply in fp32."""
    if is_identity(bn):
        wide = _wide(conv.weight.dtype)
        bias = conv.weight.new_zeros(conv.out_channels, dtype=wide) if conv.bias is None else conv.bias.to(wide)
        return conv.weight.to(dtype), bias
    scale, shift = affine_of(bn, conv.weight.dtype)
    bias = shift if conv.bias is None else conv.bias.to(scale.dtype) * scale + shift
    weight = conv.weight.to(scale.dtype) * scale.reshape(-1, 1, 1, 1)
    return weight.to(dtype), bias


def affine_of(bn: nn.BatchNorm1d | nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval mode as bn(z) = scale * z + shift, both (C,), in fp32 (fp64 for `dtype` fp64); differentiable."""
    wide, eps = _wide(dtype), eps_of(bn)
    assert bn.running_mean is not None and bn.running_var is not None and eps is not None  # `why_not_folded` has looked
    scale = torch.rsqrt(bn.running_var.to(wide) + eps)
    weight, bias = getattr(bn, "weight", None), getattr(bn, "bias", None)  # frozen norms may have none
    if weight is not None:
        scale = scale * weight.to(wide)
    shift = -bn.running_mean.to(wide) * scale
    return scale, shift if bias is None else shift + bias.to(wide)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def fold_block(block: BlockParts, dtype: torch.dtype) -> BlockWeights:
    """Folds conv1, convs and conv3, and the shortcut's projection if it can be, into weights of `dtype`; differentiable."""
    folded = [fold(conv, bn, dtype) for conv, bn in zip(block.convs, block.bns, strict=True)]
    weights, biases = [weight for weight, _ in folded], [bias for _, bias in folded]
    result = BlockWeights(*fold(block.conv1, block.bn1, dtype), weights, biases, *fold(block.conv3, block.bn3, dtype))
    projection = projection_of(block)
    if projection is not None:
        _, conv, bn = projection
        result.projection_weight, result.projection_bias = fold(conv, bn, dtype)
        result.projection_stride = conv.stride[0]
    return result


Projection: TypeAlias = tuple[nn.Module | None, nn.Conv2d, nn.BatchNorm2d]


def projection_of(block: BlockParts) -> Projection | None:
    """(pool or None, 1x1 convolution, norm) of the block's shortcut, or None where it has to run as it is."""
    if not adds_at_once(block):
        return None
    downsample = block.downsample
    if type(downsample) is not nn.Sequential or len(downsample) not in (2, 3):
        return None
    *pool, conv, bn = downsample
    if type(conv) is not nn.Conv2d or any(why_not_bypassed(module) for module in (downsample, conv, bn)):
        return None
    geometry = (conv.kernel_size, conv.padding, conv.groups)
    if geometry != ((1, 1), (0, 0), 1) or conv.stride[0] != conv.stride[1] or why_not_folded(bn) is not None:
        return None
    return (pool[0] if pool else None), conv, cast(nn.BatchNorm2d, bn)  # or a frozen one


def adds_at_once(block: BlockParts) -> bool:
    """Whether nothing comes between conv3 and the addition of the shortcut, and the activation behind that."""
    return does_nothing(block.se) and does_nothing(block.drop_path) and block.ending == "add_act"


def is_identity(module: nn.Module | None) -> bool:
    return module is None or type(module) is Identity


def does_nothing(part: nn.Module | None) -> bool:
    """Whether a part need not be called: an Identity that nobody watches, or none."""
    return part is None or (type(part) is Identity and why_not_bypassed(part) is None)


def is_frozen(bn: nn.Module) -> bool:
    """Whether this may be a FrozenBatchNorm2d as the detection libraries have it; `why_not_folded` says what it computes."""
    if isinstance(bn, _NormBase):
        return False
    return {"running_mean", "running_var"} <= bn._buffers.keys() | bn._parameters.keys()


def why_not_folded(bn: nn.Module) -> str | None:
    """None if this norm layer can be folded now, else the reason."""
    if is_identity(bn):
        return None
    if isinstance(bn, _BatchNorm):
        if bn.training:
            return "BatchNorm is in training mode: batch statistics cannot be folded"
        if bn.running_mean is None or bn.running_var is None:
            return "BatchNorm has no running statistics to fold"
    return f"norm layer {type(bn).__name__} cannot be folded" if eps_of(bn) is None else None


def why_not_bypassed(module: nn.Module, ours: object = None) -> str | None:
    """None if this module's own call may be left out, else why not: it has hooks or a patched `forward`.

    ours: a hook before the call that is of no use without it.
    """
    hooked = _why_hooked(module, ours)
    if hooked is None and (_has_own(module, "forward") or _has_own(module, "_conv_forward")):  # as tiling puts it there
        return f"a {type(module).__name__} inside the block has a forward of its own"
    return hooked


def _has_own(module: nn.Module, method: str) -> bool:
    own = method in module.__dict__
    if not own and is_compiling() and hasattr(type(module), method):
        getattr(module, method)  # a graph guards that this is the class's, but not what it misses in a dict
    return own


def why_not_unwrapped(module: nn.Module) -> str | None:
    """The same of a wrapper around parts: of these `switches` tells which method of theirs is in forward's place."""
    if not _has_own(module, "forward") or stand_in(module) is None:
        return why_not_bypassed(module)
    return _why_hooked(module)


def _why_hooked(module: nn.Module, ours: object = None) -> str | None:
    before = any(hook is not ours for hook in module._forward_pre_hooks.values())
    if module._forward_hooks or before or module._backward_hooks or module._backward_pre_hooks:
        return f"a hook on a {type(module).__name__} inside the block must see its call"
    return None


def block_tensors(block: BlockParts) -> list[Tensor]:
    """Everything that folding reads, and each num_batches_tracked, which tells when running statistics moved."""
    parts = [block.conv1, *block.norms, block.conv3, *(projection_of(block) or ())[1:]]
    return [
        tensor
        for module in itertools.chain(parts, block.convs)
        for tensor in itertools.chain(module._parameters.values(), module._buffers.values(), _plain_tensors(module))
        if tensor is not None
    ]


def _plain_tensors(module: nn.Module) -> Iterable[Tensor]:
    """Weights that are ordinary attributes, as in DataParallel's replicas and under FSDP."""
    if "weight" in module._parameters and "bias" in module._parameters:
        return ()
    return (value for value in vars(module).values() if isinstance(value, Tensor))
