"""What a fused block knows about itself, and when it forgets it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from ..chain.block_weights import BlockWeights
from ..chain.config import ChainConfig
from ..chain.problem import ChainProblem
from .block_parts import PUBLISHED, BlockPaths
from .weight_cache import CacheKey, Frozen, KeepsWeights

if TYPE_CHECKING:
    from typing_extensions import Self

STATE = "_res2net_fused"  # the attribute that holds a block's BlockState


@dataclass
class BlockState(KeepsWeights):
    """What a fused block knows about itself; of this only the fields before `kept` are copied and pickled."""

    config: ChainConfig
    backend: str
    geometry: tuple[object, ...]  # of the convolutions and the pool when they were recognised: `block_geometry`
    recompute: bool = False  # in training: whether backward convolves again rather than keep the convolutions' outputs
    shortcut: str | None = None  # forward's second parameter, if what is given for it is known to be added in x's place
    layout: BlockPaths = PUBLISHED  # where the block keeps its parts
    # One tuple, read and written at once: DataParallel's replicas share it among threads.
    kept: tuple[CacheKey, BlockWeights] | None = field(default=None, repr=False)
    frozen: Frozen[BlockWeights] | None = field(default=None, repr=False)
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
