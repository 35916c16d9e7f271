"""Backend `cpu`: the native kernels of `csrc/cpu`, a fused Winograd chain with direct convolution beside it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...chain.problem import Chain1dProblem, ChainProblem
from ..base import Backend
from . import backward, batch_norm, block, chain, chain1d
from .convolution import WinogradConvolver


class CpuBackend(WinogradConvolver, Backend):
    """Its abilities, each a function of one file of this folder."""

    name = "cpu"
    projects = True

    why_not = staticmethod(chain.why_not)
    plan = staticmethod(chain.plan)
    pack = staticmethod(chain.pack)
    forward = staticmethod(chain.forward)
    ways = staticmethod(chain.ways)
    pack_block = staticmethod(block.pack_block)
    gather_block = staticmethod(block.gather_block)
    block_forward = staticmethod(block.block_forward)
    prepared_block = staticmethod(block.prepared_block)
    why_not_1d = staticmethod(chain1d.why_not_1d)
    plan_1d = staticmethod(chain1d.plan_1d)
    forward_1d = staticmethod(chain1d.forward_1d)
    runs_chain_backward = staticmethod(backward.runs_chain_backward)
    chain_backward = staticmethod(backward.chain_backward)
    why_not_training = staticmethod(chain.why_not)
    plan_training = staticmethod(chain.plan_training)
    # Methods: they are handed this backend, to convolve by.
    train_forward = batch_norm.train_forward
    train_backward = batch_norm.train_backward

    def native_settings(self, problem: ChainProblem | Chain1dProblem, x: Tensor, packed: bool) -> Sequence[int] | None:
        return chain1d.native_settings(problem) if isinstance(problem, Chain1dProblem) else chain.native_settings(problem)


BACKEND = CpuBackend()
