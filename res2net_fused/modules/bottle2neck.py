"""The drop-in blocks: `Bottle2neck` and DLA's, with the published signatures, attribute names and state_dict keys."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from ..backends.base import BACKENDS
from ..chain.config import one_of
from .block_parts import parts_of
from .block_state import STATE, BlockState, forward_like
from .eligibility import block_geometry, fused_activation
from .fused_forward import FusedForward
from .reference_blocks import ReferenceBottle2neck, ReferenceDlaBottle2neck

# What timm's ResNet passes to every block besides; only values that change nothing are accepted.
_NEUTRAL = {"reduce_first": 1, "aa_layer": None, "drop_block": None, "device": None, "dtype": None}
_LAYERS = ("act_layer", "norm_layer", "attn_layer", "drop_path")


class Bottle2neck(FusedForward, ReferenceBottle2neck):
    """The Res2Net bottleneck, running fused in eval and in training mode.

    inplanes: channels of x; the output has planes * 4. stride: of the 3x3 convolutions (stype='stage' only).
    downsample: the module of the shortcut, or None. baseWidth: w = floor(planes * baseWidth / 64) * cardinality.
    scale: s, the number of groups. stype: 'normal', or 'stage' (no adds, pooled pass-through).
    cardinality, dilation: groups and dilation of the 3x3 convolutions.
    passthrough: the group without a convolution, "last", "none", "first" or "first_added".
    backend: of `hierarchical_conv2d`.
    timm_keywords: base_width, first_dilation, act_layer, norm_layer, attn_layer, drop_path, as timm's block takes them. timm
        decides for itself which block is 'stage' (stride > 1 or a downsample), and so does this one where base_width is given.

    forward: (N, inplanes, H, W) -> (N, planes * 4, ceil(H/stride), ceil(W/stride)).
    Raises ValueError or TypeError, naming the argument, for values that do not fit.
    """

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        baseWidth: int = 26,
        scale: int = 4,
        stype: str = "normal",
        *,
        cardinality: int = 1,
        dilation: int = 1,
        passthrough: str = "last",
        backend: str = "auto",
        **timm_keywords: Any,
    ) -> None:
        one_of("backend", backend, BACKENDS)
        if "base_width" in timm_keywords:
            baseWidth = timm_keywords.pop("base_width")
            stype = "stage" if stride > 1 or downsample is not None else "normal"
        dilation = timm_keywords.pop("first_dilation", None) or dilation
        layers = {name: timm_keywords.pop(name) for name in _LAYERS if timm_keywords.get(name) is not None}
        _refuse_others("Bottle2neck", timm_keywords)
        super().__init__(
            inplanes, planes, stride, downsample, baseWidth, scale, stype,
            cardinality=cardinality, dilation=dilation, passthrough=passthrough, **layers,
        )  # fmt: skip
        setattr(self, STATE, _state(self, backend))

    forward = forward_like(FusedForward.forward, ReferenceBottle2neck.forward)


class DlaBottle2neck(FusedForward, ReferenceDlaBottle2neck):
    """The Res2Net bottleneck of DLA, running fused in eval and in training mode; also where timm's DLA takes a `block`.

    Arguments and forward are those of `ReferenceDlaBottle2neck`; backend: of `hierarchical_conv2d`.
    """

    def __init__(self, *arguments: Any, backend: str = "auto", **keywords: Any) -> None:
        one_of("backend", backend, BACKENDS)
        passed_by_timm = ("device", "dtype")
        others: dict[str, object] = {name: keywords.pop(name) for name in passed_by_timm if name in keywords}
        _refuse_others("DlaBottle2neck", others)
        super().__init__(*arguments, **keywords)
        setattr(self, STATE, _state(self, backend, shortcut="shortcut"))

    forward = forward_like(FusedForward.forward, ReferenceDlaBottle2neck.forward)


def _state(block: ReferenceBottle2neck, backend: str, shortcut: str | None = None) -> BlockState:
    """What a new block needs to run fused; its chain has the activation of the block's own `act_layer`."""
    parts = parts_of(block)
    config = replace(block.chain_config, activation=fused_activation(parts.relu) or "relu")  # of another each call says so
    return BlockState(config, backend, block_geometry(parts), shortcut=shortcut)


def _refuse_others(block: str, keywords: dict[str, object]) -> None:
    for name, value in keywords.items():
        if name not in _NEUTRAL and name not in _LAYERS:
            raise TypeError(f"{block} has no argument {name!r}")
        if value != _NEUTRAL.get(name):
            raise ValueError(f"{name} is {value!r}; only {_NEUTRAL.get(name)!r} is supported")
