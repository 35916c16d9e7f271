"""BatchNorm folded into the convolution before it, and the rules by which a folded block may be kept.

In eval mode BatchNorm is the affine map y = (z - mean) * weight / sqrt(var + eps) + bias, so that
bn(conv(x)) = conv'(x) + b' with conv' = conv * scale and b' = (conv.bias - mean) * scale + bias.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import _get_current_dispatch_mode

from .layouts import BlockParts
from .streams import Made, MadeOn, made_here, use_kept

_PLAIN_TYPES = (torch.Tensor, nn.Parameter, nn.Buffer)
# Another object after every optimizer step: fused optimizers write parameters without bumping `_version`. No counter, which
# steps in several threads could set back to a number that kept weights still have.
_epoch = object()


def _advance_epoch(*_: object) -> None:
    global _epoch
    _epoch = object()


register_optimizer_step_post_hook(_advance_epoch)


@dataclass
class FoldedBlock:
    """A block's convolutions with their BatchNorms folded in, and, where kept for many calls, one backend's layout of them."""

    conv1_weight: Tensor  # (s*w, inplanes, 1, 1)
    conv1_bias: Tensor  # (s*w,), fp32 (fp64 for an fp64 block), as all biases here
    weights: list[Tensor]  # each (w, w/groups, 3, 3)
    biases: list[Tensor]  # each (w,)
    conv3_weight: Tensor  # (planes * 4, s*w, 1, 1)
    conv3_bias: Tensor  # (planes * 4,)
    # Of the shortcut, where it is a 1x1 convolution and BatchNorm behind at most a pool; None where there is none to fold.
    projection_weight: Tensor | None = None  # (planes * 4, inplanes, 1, 1)
    projection_bias: Tensor | None = None  # (planes * 4,)
    projection_stride: int = 1
    packed: list[Tensor] | None = None
    layout: str = "plain"
    made: MadeOn | None = None  # where it is kept
    overflowed: bool = False  # of one that is kept, if float16 may be asked of it: what `overflows` said

    def to(self, dtype: torch.dtype, device: torch.device) -> FoldedBlock:
        """The plain weights in `dtype`, all on `device`; biases keep their dtype."""
        projection, bias = self.projection_weight, self.projection_bias
        return FoldedBlock(
            self.conv1_weight.to(device, dtype), self.conv1_bias.to(device),
            [weight.to(device, dtype) for weight in self.weights], [bias.to(device) for bias in self.biases],
            self.conv3_weight.to(device, dtype), self.conv3_bias.to(device),
            None if projection is None else projection.to(device, dtype), None if bias is None else bias.to(device),
            self.projection_stride, overflowed=self.overflowed,
        )  # fmt: skip

    def overflow(self) -> Tensor:
        """NaN if a folded weight is beyond float16's range, for 1 / sqrt(eps) may be a large factor, else zero; shape ()."""
        weights = (self.conv1_weight, *self.weights, self.conv3_weight, self.projection_weight)
        halves = [weight.detach().half() for weight in weights if weight is not None]
        return torch.stack([(half - half).sum(dtype=torch.float32) for half in halves]).sum()

    def overflows(self) -> bool:
        """Whether that is so; a device is waited for, which no CUDA graph may while it is captured."""
        valueless = self.conv1_weight.is_meta or isinstance(self.conv1_weight, FakeTensor)
        return not valueless and bool(self.overflow().isnan())


def fold(conv: nn.Conv2d, bn: nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """conv' in `dtype` and b' in fp32 (fp64 for an fp64 block); differentiable. Half-precision factors multiply in fp32."""
    scale, shift = affine_of(bn, conv.weight.dtype)
    bias = shift if conv.bias is None else conv.bias.to(scale.dtype) * scale + shift
    weight = conv.weight.to(scale.dtype) * scale.reshape(-1, 1, 1, 1)
    return weight.to(dtype), bias


def affine_of(bn: nn.BatchNorm1d | nn.BatchNorm2d, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """BatchNorm in eval mode as bn(z) = scale * z + shift, both (C,), in fp32 (fp64 for `dtype` fp64); differentiable."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert bn.running_mean is not None and bn.running_var is not None  # `why_not_folded` has looked
    scale = torch.rsqrt(bn.running_var.to(wide) + getattr(bn, "eps", 0.0))  # some frozen norms have no eps
    if bn.weight is not None:
        scale = scale * bn.weight.to(wide)
    shift = -bn.running_mean.to(wide) * scale
    return scale, shift if bn.bias is None else shift + bn.bias.to(wide)


def fold_block(block: BlockParts, dtype: torch.dtype) -> FoldedBlock:
    """Folds conv1, convs and conv3, and the shortcut's projection if it can be, into weights of `dtype`; differentiable."""
    folded = [fold(conv, bn, dtype) for conv, bn in zip(block.convs, block.bns, strict=True)]
    weights, biases = [weight for weight, _ in folded], [bias for _, bias in folded]
    result = FoldedBlock(*fold(block.conv1, block.bn1, dtype), weights, biases, *fold(block.conv3, block.bn3, dtype))
    projection = projection_of(block)
    if projection is not None:
        _, conv, bn = projection
        result.projection_weight, result.projection_bias = fold(conv, bn, dtype)
        result.projection_stride = conv.stride[0]
    return result


def projection_of(block: BlockParts) -> tuple[nn.Module | None, nn.Conv2d, nn.BatchNorm2d] | None:
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
    """Whether nothing comes between conv3 and the addition of the shortcut."""
    return is_identity(block.se) and is_identity(block.drop_path)


def is_identity(module: nn.Module | None) -> bool:
    return module is None or type(module) is nn.Identity


def is_frozen(bn: nn.Module) -> bool:
    """Whether this is a FrozenBatchNorm2d as the detection libraries have it: BatchNorm of which nothing is learned."""
    if isinstance(bn, nn.modules.batchnorm._NormBase) or bn._parameters:
        return False
    return all(name in bn._buffers for name in ("weight", "bias", "running_mean", "running_var"))


def why_not_folded(bn: nn.Module) -> str | None:
    """None if this norm layer can be folded now, else the reason."""
    if is_frozen(bn):
        return None
    if type(bn) not in (nn.BatchNorm2d, nn.SyncBatchNorm):
        return f"norm layer {type(bn).__name__} cannot be folded"
    if bn.training:
        return "BatchNorm is in training mode: batch statistics cannot be folded"
    if bn.running_mean is None or bn.running_var is None:
        return "BatchNorm has no running statistics to fold"
    return None


def why_not_bypassed(module: nn.Module) -> str | None:
    """None if nobody would miss this module's own call, else the reason."""
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"a hook on a {type(module).__name__} inside the block must see its call"
    if "forward" in vars(module):
        return f"a {type(module).__name__} inside the block has a forward of its own"
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


def cacheable(tensors: Iterable[Tensor]) -> bool:
    """Whether folded tensors may outlive this call: not while something traces, captures or wraps tensors."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _get_current_dispatch_mode() is not None:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if capturing():
        return False
    return all(type(tensor) in _PLAIN_TYPES and not tensor.is_inference() for tensor in tensors)


def capturing() -> bool:
    """Whether a CUDA graph is being captured: it holds the launches, and what they read has to outlive it."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


class CacheKey:
    """Tells whether a block's tensors are the ones that were folded, unchanged as far as PyTorch can tell."""

    def __init__(self, tensors: list[Tensor], settings: tuple[object, ...]) -> None:
        self.settings = settings
        self.epoch = _epoch
        self.references = [weakref.ref(tensor) for tensor in tensors]
        self.fingerprints = [_fingerprint(tensor) for tensor in tensors]

    def matches(self, tensors: list[Tensor], settings: tuple[object, ...]) -> bool:
        if self.epoch is not _epoch or self.settings != settings or len(tensors) != len(self.references):
            return False
        for tensor, reference, fingerprint in zip(tensors, self.references, self.fingerprints, strict=True):
            if reference() is not tensor or _fingerprint(tensor) != fingerprint:
                return False
        return True


def _fingerprint(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.dtype, tensor.device, tensor._version


class KeepsWeights:
    """Of a block's state: what is kept from call to call, and when that is dropped.

    Any number of threads may call the block while others drop or freeze what is kept. The fields are each read and written at
    once, and `generation`, another object after every drop, tells weights that were read before it from later ones.
    """

    kept: tuple[CacheKey, Any] | None
    frozen: Frozen[Any] | None
    generation: object = None

    def drop(self, frozen: bool = True) -> None:
        if not torch.compiler.is_compiling():  # which would guard on it
            self.generation = object()  # first: what is being made now must not be kept
        self.kept = None
        if frozen:
            self.frozen = None

    def keep(self, tensors: list[Tensor], settings: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """What is kept if nothing changed, else what `make` returns, which is kept from now on."""
        settings = (self.generation, *settings)
        kept = self.kept
        if kept is None or not kept[0].matches(tensors, settings):
            key = CacheKey(tensors, settings)  # before the work: a write meanwhile must show as a mismatch
            self.kept = kept = key, made_here(make(), tensors[0].device)
        return use_kept(kept[1])

    def unchanged(self, tensors: list[Tensor], settings: tuple[object, ...]) -> Any | None:
        """What is kept if nothing changed, not to be read but to be asked, else None."""
        kept = self.kept
        return kept[1] if kept is not None and kept[0].matches(tensors, (self.generation, *settings)) else None

    def freeze(self, make: Callable[[], Frozen[Any]]) -> None:
        """Keeps what `make` returns until it is dropped."""
        generation = self.generation
        self.frozen = make()
        if self.generation is not generation:
            self.frozen = None  # dropped meanwhile


class Freezable(Made, Protocol):
    """What `Frozen` keeps: weights that can be had in another dtype, on another device."""

    def to(self, dtype: torch.dtype, device: torch.device) -> Any: ...


Weights = TypeVar("Weights", bound=Freezable)


class Frozen(Generic[Weights]):
    """A block's weights as they were when it was frozen, in every dtype and on every device that its calls compute with.

    All of them come from one original, so that neither a later write to the parameters nor the replicas of DataParallel, which
    share the state of their model, make a difference between them. Each is made once, at the first call that needs it, ready on
    every stream, and kept: at most one for each dtype of a network (its own and autocast's two) on each device.
    """

    def __init__(
        self, original: Weights, device: torch.device, pack: Callable[[Weights], Weights], dtype: torch.dtype
    ) -> None:
        """original: plain weights on `device`, which nobody else writes. pack: adds a backend's layout. dtype: of the first."""
        self.original = _ready(original, device)
        self.pack = pack
        self.held: dict[tuple[torch.dtype, torch.device], Weights] = {}
        self._make(dtype, device)

    def weights(self, dtype: torch.dtype, device: torch.device) -> Weights:
        """For a call on the current stream."""
        held = self.held.get((dtype, device))
        return self._make(dtype, device) if held is None else use_kept(held)

    def _make(self, dtype: torch.dtype, device: torch.device) -> Weights:
        if torch.compiler.is_compiling():
            return self.original.to(dtype, device)
        with torch.inference_mode(False), torch.no_grad():
            weights = use_kept(self.original).to(dtype, device)
            if not cacheable(()):  # a CUDA graph's, made again at every replay, or what some mode makes in place of tensors
                return self.pack(weights) if capturing() else weights
            self.held[dtype, device] = weights = _ready(self.pack(weights), device)
        return weights


def _ready(weights: Weights, device: torch.device) -> Weights:
    """The same, waited for: a CUDA graph may read them, which must not wait for what lies outside it."""
    made = made_here(weights, device).made
    if made is not None:
        made.wait()
    return weights
