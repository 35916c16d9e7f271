"""Weights in the layout of the backend that will read them, packed once for many calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.utils import _pytree

from ..backends.selection import choose, get_backend, requested
from ..chain.block_weights import BlockWeights
from ..chain.checks import check_types, check_weights
from ..chain.config import ChainConfig
from ..chain.problem import ChainProblem


@dataclass(frozen=True)
class PackedWeights:
    """What `pack_weights` returns: the plain tensors, one backend's layout of them, and the settings they were packed for.

    weights: each (w, w/groups, 3, 3). biases: each (w,), or None. packed, layout: what the backend of that name packed, in
    its own shapes; [] and "plain" where nothing is packed. stride, dilation, groups: of the convolutions.

    Made for inference: the tensors are detached. A pytree, so `torch.utils._pytree.tree_map` reaches its tensors. A backend
    whose layout this is not packs again from the plain weights.
    """

    weights: list[Tensor]
    biases: list[Tensor] | None
    packed: list[Tensor]
    layout: str
    stride: int
    dilation: int
    groups: int

    @classmethod
    def from_block(cls, folded: BlockWeights, config: ChainConfig) -> PackedWeights:
        """The chain's weights of a block that is not one operator, in the layout that `pack_block` gave `folded`.

        config: of the chain, from which stride, dilation and groups are taken.
        """
        packed = folded.packed or []
        return cls(folded.weights, folded.biases, packed, folded.layout, config.stride, config.dilation, config.groups)

    def settings(self, *, biases: object, stride: int, dilation: int, groups: int) -> tuple[int, int, int]:
        """(stride, dilation, groups) of the pack.

        Raises ValueError where the call says something else: other values than these or 1, or biases of its own.
        """
        if biases is not None:
            raise ValueError("biases is given beside packed weights, which carry their own; pass biases to pack_weights")
        for name, given in (("stride", stride), ("dilation", dilation), ("groups", groups)):
            own = getattr(self, name)
            if given not in (1, own):
                raise ValueError(f"{name} is {given} but the weights were packed for {name}={own}")
        return self.stride, self.dilation, self.groups


_CONTEXT = ("layout", "stride", "dilation", "groups")
_pytree.register_pytree_node(
    PackedWeights,
    lambda p: ([p.weights, p.biases, p.packed], tuple(getattr(p, name) for name in _CONTEXT)),
    lambda children, context: PackedWeights(*children, *context),
    serialized_type_name="res2net_fused.PackedWeights",
    to_dumpable_context=list,
    from_dumpable_context=tuple,
)


def pack_weights(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None = None,
    *,
    stride: int = 1,
    dilation: int = 1,
    groups: int = 1,
    backend: str = "auto",
) -> PackedWeights:
    """Packs the weights of a chain for many calls of `hierarchical_conv2d`, in inference.

    weights: one tensor (w, w/groups, 3, 3) for each convolution, fp32, fp64, fp16 or bf16.
    biases: None, or one tensor (w,) for each convolution, of the weights' dtype or fp32.
    stride, dilation, groups: of the 3x3 convolutions, as in the calls.
    backend: whose layout; with "auto" that of the first backend that can run on the weights' device. While a graph is traced
        nothing is packed: the operator then packs inside its own body.

    Raises ValueError or TypeError for arguments that do not fit, RuntimeError where an explicit backend cannot run.
    """
    check_types(torch.empty(0), weights, biases)
    config = ChainConfig(stride=stride, dilation=dilation, groups=groups, passthrough="none")
    width = check_weights(weights, biases, config)
    weights = [weight.detach() for weight in weights]
    biases = None if biases is None else [bias.detach() for bias in biases]
    layout, packed = "plain", []
    if not is_compiling():
        layout = choose(_nominal_problem(weights, width, config, backend), backend).name
        packed = get_backend(layout).pack(weights, biases, config)
    return PackedWeights(weights, biases, packed, layout, stride, dilation, groups)


def one_operator(config: ChainConfig) -> bool:
    """Whether the whole block is one operator, whose 1x1 convolutions know no activation but ReLU; else only its chain is."""
    return config.activation == "relu"


def pack_block(folded: BlockWeights, config: ChainConfig, backend: str) -> BlockWeights:
    """The folded block with its weights also in the layout of the backend that will run it; on the meta device nothing does."""
    if folded.conv1_weight.is_meta:
        return folded
    layout = choose(_nominal_problem(folded.weights, folded.weights[0].shape[0], config, backend), backend).name
    chosen = get_backend(layout)
    if one_operator(config):
        packed = chosen.pack_block(folded, config)
    else:
        packed = chosen.pack(folded.weights, folded.biases, config)
    return replace(folded, packed=packed, layout=layout, gathered=None)


def pack_to_be_kept(folded: BlockWeights, config: ChainConfig, backend: str) -> BlockWeights:
    """The same for weights that stay: in one tensor, where the backend reads them there."""
    packed = pack_block(folded, config, backend)
    return get_backend(packed.layout).gather_block(packed) if packed.packed and one_operator(config) else packed


def _nominal_problem(weights: Sequence[Tensor], width: int, config: ChainConfig, backend: str) -> ChainProblem:
    """A call with these weights: backends state their reasons for whole problems, and x is not known yet.

    In the published models channels x rows is much the same at every stage, 104 x 56 at the first of 26w4s. A backend that is
    asked for by name is packed for if it runs the smallest x: whether a larger one fits the device is said at its call.
    """
    size = max(7, 104 * 56 // (config.scale(len(weights)) * width)) if requested(backend)[0] == "auto" else 1
    return ChainProblem(config, weights[0].device, weights[0].dtype, 32, size, size, width, len(weights), True)
