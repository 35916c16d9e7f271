"""Fused kernels for Res2Net: the add-then-convolve chain in one operator, a drop-in block, and `accelerate(model)`."""

from .accelerate import accelerate, freeze, refresh, restore
from .bottle2neck import Bottle2neck
from .explain import BlockReport, explain
from .operator import hierarchical_conv2d
from .operator1d import hierarchical_conv1d
from .packing import PackedWeights, pack_weights

__version__ = "0.1.0"
__all__ = [
    "BlockReport",
    "Bottle2neck",
    "PackedWeights",
    "accelerate",
    "explain",
    "freeze",
    "hierarchical_conv1d",
    "hierarchical_conv2d",
    "pack_weights",
    "refresh",
    "restore",
]
