"""Fused kernels for Res2Net: the add-then-convolve chain in one operator, a drop-in block, and `accelerate(model)`."""

from . import _moved
from .backends.choices import load_choices
from .modules.bottle2neck import Bottle2neck
from .ops._library import answer_native_bodies, decompositions
from .ops.hierarchical_conv1d import hierarchical_conv1d
from .ops.hierarchical_conv2d import hierarchical_conv2d
from .ops.packed_weights import PackedWeights, pack_weights
from .patching.accelerate import accelerate, freeze, refresh, restore
from .patching.explain import BlockReport, explain
from .tuning.report import TuneReport
from .tuning.tune import tune, warm_up

__version__ = "0.1.0"
__all__ = [
    "BlockReport",
    "Bottle2neck",
    "PackedWeights",
    "TuneReport",
    "accelerate",
    "decompositions",
    "explain",
    "freeze",
    "hierarchical_conv1d",
    "hierarchical_conv2d",
    "load_choices",
    "pack_weights",
    "refresh",
    "restore",
    "tune",
    "warm_up",
]

_moved.install()
answer_native_bodies()
