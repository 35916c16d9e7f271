"""Backend `triton`: one launch per convolution on GPUs from sm_80 on, or the same kernels in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ...chain.batch_norm import Gradients, Statistics
from ...chain.block_weights import BlockWeights
from ...chain.config import ChainConfig
from ...chain.problem import ChainProblem
from ..base import Backend
from . import block, chain, training


class TritonBackend(Backend):
    """Calls the files of this folder, each of which holds one ability."""

    name = "triton"
    synchronises = True

    def why_not(self, problem: ChainProblem) -> str | None:
        return chain.why_not(problem)

    def plan(self, problem: ChainProblem) -> str:
        return chain.plan(problem)

    def pack(self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig) -> list[Tensor]:
        return chain.pack(weights, biases, config)

    def forward(
        self,
        problem: ChainProblem,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor] | None,
        packed: Sequence[Tensor] | None,
    ) -> Tensor:
        return chain.forward(problem, x, weights, biases, packed)

    def pack_block(self, folded: BlockWeights, config: ChainConfig) -> list[Tensor]:
        return block.pack_block(folded, config)

    def block_forward(
        self, problem: ChainProblem, x: Tensor, shortcut: Tensor | None, folded: BlockWeights, relu: bool
    ) -> Tensor:
        return block.block_forward(problem, x, shortcut, folded, relu)

    def runs_chain_backward(self, problem: ChainProblem, by_name: bool) -> bool:
        return training.runs_chain_backward(problem, by_name)

    def chain_backward(
        self, problem: ChainProblem, grad: Tensor, x: Tensor, out: Tensor, weights: Sequence[Tensor], needed: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        return training.chain_backward(problem, grad, x, out, weights, needed)

    def why_not_training(self, problem: ChainProblem) -> str | None:
        return chain.why_not_training(problem)

    def plan_training(self, problem: ChainProblem) -> str:
        return chain.plan_training(problem)

    def train_forward(
        self,
        problem: ChainProblem,
        x: Tensor,
        weights: Sequence[Tensor],
        gammas: Sequence[Tensor],
        betas: Sequence[Tensor],
        eps: Sequence[float],
        keep: bool,
        group: str,
    ) -> tuple[Tensor, Statistics, list[Tensor]] | None:
        return training.train_forward(self, problem, x, weights, gammas, betas, eps, keep, group)

    def train_backward(
        self,
        problem: ChainProblem,
        grad: Tensor,
        x: Tensor,
        out: Tensor,
        z: Sequence[Tensor],
        mean: Tensor,
        invstd: Tensor,
        weights: Sequence[Tensor],
        gammas: Sequence[Tensor],
        needed: Sequence[bool],
        group: str,
    ) -> Gradients | None:
        return training.train_backward(self, problem, grad, x, out, z, mean, invstd, weights, gammas, needed, group)


BACKEND = TritonBackend()
