"""Backend `cuda`: the whole chain in one launch of a native CUDA kernel, inference, from sm_80 on.

fp16, bf16, and float32 where cuDNN's convolutions may use TF32: the factors of every product are then rounded to TF32, to the
nearest, sums and results are float32.

Calls with few pixels are shared by thread-block clusters, from sm_90 on (csrc/cuda/chain/cluster_kernel.cuh). Wide groups in
half precision run on Hopper's wgmma where that is predicted to be faster (csrc/cuda/chain/wgmma_kernel.cuh); it is compiled for
sm_90a alone.

The launch plan comes from a C++ function of the CPU library (csrc/cuda/plan), so `plan_chain` works on machines with no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...chain.block_weights import BlockWeights
from ...chain.config import ChainConfig
from ...chain.problem import ChainProblem
from ..base import Backend
from . import block, chain, packing


class CudaBackend(Backend):
    """Calls the files of this folder, each of which holds one ability."""

    name = "cuda"

    def why_not(self, problem: ChainProblem) -> str | None:
        return chain.why_not(problem)

    def why_not_auto(self, problem: ChainProblem) -> str | None:
        return chain.why_not_auto(problem)

    def plan(self, problem: ChainProblem) -> str:
        return chain.plan(problem)

    def forward(
        self,
        problem: ChainProblem,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None,
        packed: Sequence[Tensor] | None,
    ) -> Tensor:
        return chain.forward(problem, x, weights, biases, packed)

    def pack(self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig) -> list[Tensor]:
        return packing.pack(weights, biases, config)

    def pack_block(self, folded: BlockWeights, config: ChainConfig) -> list[Tensor]:
        return block.pack_block(folded, config)

    def block_forward(
        self, problem: ChainProblem, x: Tensor, shortcut: Tensor | None, folded: BlockWeights, relu: bool
    ) -> Tensor:
        return block.block_forward(problem, x, shortcut, folded, relu)


BACKEND = CudaBackend()
