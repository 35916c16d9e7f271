"""Backend `cuda`: the whole chain in one launch of a native CUDA kernel, inference, from sm_80 on.

fp16, bf16, and float32 where cuDNN's convolutions may use TF32: the factors of every product are then rounded to TF32, to the
nearest, sums and results are float32.

Calls with few pixels are shared by thread-block clusters, from sm_90 on (csrc/cuda/chain/cluster_kernel.cuh). Wide groups in
half precision run on Hopper's wgmma where that is predicted to be faster (csrc/cuda/chain/wgmma_kernel.cuh); it is compiled for
sm_90a alone.

The launch plan comes from a C++ function of the CPU library (csrc/cuda/plan), so `plan_chain` works on machines with no GPU.
"""

from __future__ import annotations

from collections.abc import Hashable

from ...chain.problem import ChainProblem
from ..base import Backend
from . import block, chain, packing


class CudaBackend(Backend):
    """Its abilities, each a function of one file of this folder."""

    name = "cuda"

    why_not = staticmethod(chain.why_not)
    why_not_auto = staticmethod(chain.why_not_auto)
    plan = staticmethod(chain.plan)
    native_settings = staticmethod(chain.native_settings)
    forward = staticmethod(chain.forward)
    ways = staticmethod(chain.ways)
    pack = staticmethod(packing.pack)
    pack_block = staticmethod(block.pack_block)
    block_forward = staticmethod(block.block_forward)

    def instance(self, problem: ChainProblem) -> Hashable:
        return tuple(chain.chosen_plan(problem).launch_arguments().values()), super().instance(problem)


BACKEND = CudaBackend()
