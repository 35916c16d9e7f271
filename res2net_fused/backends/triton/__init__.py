"""Backend `triton`: one launch per convolution on GPUs from sm_80 on, or the same kernels in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Hashable

from ...chain.problem import Chain1dProblem, ChainProblem
from ..base import Backend
from . import block, chain, chain1d, training


class TritonBackend(Backend):
    """Its abilities, each a function of one file of this folder."""

    name = "triton"
    synchronises = True

    why_not = staticmethod(chain.why_not)
    plan = staticmethod(chain.plan)
    pack = staticmethod(chain.pack)
    forward = staticmethod(chain.forward)
    pack_block = staticmethod(block.pack_block)
    block_forward = staticmethod(block.block_forward)
    why_not_1d = staticmethod(chain1d.why_not_1d)
    plan_1d = staticmethod(chain1d.plan_1d)
    forward_1d = staticmethod(chain1d.forward_1d)
    runs_chain_backward = staticmethod(training.runs_chain_backward)
    chain_backward = staticmethod(training.chain_backward)
    why_not_training = staticmethod(chain.why_not_training)
    plan_training = staticmethod(chain.plan_training)

    def instance(self, problem: ChainProblem | Chain1dProblem) -> Hashable:
        own = chain1d.plan_1d(problem) if isinstance(problem, Chain1dProblem) else chain.tiles(problem)
        return own, super().instance(problem)

    # Methods: they are handed this backend, to convolve by.
    train_forward = training.train_forward
    train_backward = training.train_backward


BACKEND = TritonBackend()
