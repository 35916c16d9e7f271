"""What a backend offers: a class with a default for every ability that one may lack."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..chain.batch_norm import BatchNormPasses
from ..chain.block_weights import BlockWeights, Chain1dWeights
from ..chain.config import ChainConfig
from ..chain.memory_format import with_format
from ..chain.problem import Chain1dProblem, ChainProblem

BACKENDS = ("auto", "reference", "triton", "cpu", "cuda")  # what `backend=` may be


PreparedBlock = Callable[[Tensor, Tensor | None], Tensor]


class Backend(BatchNormPasses):
    """One way to run the chain.

    A backend has to say `why_not`, `plan` and `forward`. Everything else has a default: nothing is packed, 1x1 convolutions
    are ATen's, the mathematics of `chain` computes gradients, and BatchNorm in training mode is not run.
    """

    name: str
    projects = False  # whether `block_forward` applies the shortcut's projection itself
    synchronises = False  # whether `train_forward` and `train_backward` take statistics over several processes

    # Inference ---------------------------------------------------------------------------------------------------------

    def why_not(self, problem: ChainProblem) -> str | None:
        """Return None where the call can run, else the reason: first what the machine lacks, then the problem."""
        raise NotImplementedError

    def why_not_auto(self, problem: ChainProblem) -> str | None:
        """Return a reason for `auto` to prefer a later backend although this one could run.

        It is ignored where only `reference` remains.
        """
        return None

    def plan(self, problem: ChainProblem) -> str:
        """Return one line for `explain`: how this call would run."""
        raise NotImplementedError

    def pack(self, weights: Sequence[Tensor], biases: Sequence[Tensor] | None, config: ChainConfig) -> list[Tensor]:
        """Return the weights in this backend's own layout; empty where it reads them as they are."""
        return []

    def forward(
        self,
        problem: ChainProblem,
        x: Tensor,  # (N, s*w, H, W), any strides
        weights: Sequence[Tensor],  # each (w, w/groups, 3, 3)
        biases: Sequence[Tensor] | None,  # each (w,), the weights' dtype or fp32
        packed: Sequence[Tensor] | None,  # what `pack` returned for these weights, or None
    ) -> Tensor:
        """Return a new tensor (N, s*w, H/stride, W/stride) in the memory format that `memory_format(x)` names."""
        raise NotImplementedError

    def native_settings(self, problem: Any, x: Tensor, packed: bool) -> Sequence[int] | None:
        """Return what the operator's native body needs to run calls of this kind by itself; None where Python runs them.

        It holds for all x of these strides and this alignment. packed: whether weights are given in this backend's layout.
        """
        return None

    def pack_block(self, folded: BlockWeights, config: ChainConfig) -> list[Tensor]:
        """Return a whole block's weights in the layout that `block_forward` reads from `folded.packed`."""
        return self.pack(folded.weights, folded.biases, config)

    def gather_block(self, folded: BlockWeights) -> BlockWeights:
        """Return weights that `pack_block` has packed, in one tensor if a native body reads them there, else as they are."""
        return folded

    def block_forward(
        self, problem: ChainProblem, x: Tensor, shortcut: Tensor | None, folded: BlockWeights, relu: bool
    ) -> Tensor:
        """Return relu(conv3(chain(relu(conv1(x)))) + shortcut), a new tensor (N, planes * 4, H', W') in any memory format.

        shortcut: already projected, unless this backend `projects`. relu: whether the last activation is applied.
        """
        u = F.conv2d(x, folded.conv1_weight, folded.conv1_bias.to(x.dtype)).relu_()  # (N, s*w, H, W)
        if problem.batch:
            u = self.forward(problem, u, folded.weights, folded.biases, folded.packed)  # (N, s*w, H', W')
        else:
            u = u.new_empty(0, u.shape[1], problem.output_height, problem.output_width)
        out = F.conv2d(u, folded.conv3_weight, folded.conv3_bias.to(x.dtype))
        if shortcut is not None:
            out += shortcut
        if relu:
            out.relu_()
        return out

    def ways(self, problem: ChainProblem) -> tuple[str, ...]:
        """Return the choices that a measurement tries of this backend: its name, and behind a colon ways to compute."""
        return (self.name,)

    def prepared_block(self, problem: ChainProblem, folded: BlockWeights, relu: bool) -> PreparedBlock | None:
        """Return `block_forward` of x and shortcut for calls of this kind by `folded.packed`; None where it needs more."""
        return None

    def instance(self, problem: Any) -> Hashable:
        """Return what the kernels of one call are told by from those of others; sizes count by powers of two."""
        pixels = (
            problem.batch * problem.length
            if isinstance(problem, Chain1dProblem)
            else problem.batch * problem.output_height * problem.output_width
        )
        return problem.config, problem.device, problem.dtype, problem.width, problem.steps, pixels.bit_length()

    # The 1-D chain, whose gradients the mathematics computes -----------------------------------------------------------

    def why_not_1d(self, problem: Chain1dProblem) -> str | None:
        """Return what `why_not` does, for a 1-D chain."""
        return "it has no 1-D kernels"

    def plan_1d(self, problem: Chain1dProblem) -> str:
        """Return what `plan` does, for a 1-D chain."""
        raise NotImplementedError

    def forward_1d(
        self, problem: Chain1dProblem, x: Tensor, weights: Chain1dWeights, keep: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Return out as x (N, s*w, L), contiguous, and with `keep` relu(K_i u_i + b_i) of every convolution, each (N, w, L)."""
        raise NotImplementedError

    # Gradients of a chain without batch statistics ---------------------------------------------------------------------

    def runs_chain_backward(self, problem: ChainProblem, by_name: bool) -> bool:
        """Return whether `chain_backward` takes a call that this backend can train. by_name: `backend=` names it."""
        return False

    def chain_backward(
        self,
        problem: ChainProblem,
        grad: Tensor,  # as out, any strides
        x: Tensor,
        out: Tensor,
        weights: Sequence[Tensor],
        needed: Sequence[bool],  # x, weights, biases
    ) -> tuple[Tensor | None, list[Tensor], list[Tensor]]:
        """Return the gradients of (x, weights, biases) that `needed` names."""
        raise NotImplementedError

    # The chain with BatchNorm in training mode -------------------------------------------------------------------------

    def why_not_training(self, problem: ChainProblem) -> str | None:
        """Return None where such a call can run, else the reason."""
        return "it has no kernels for BatchNorm in training mode"

    def plan_training(self, problem: ChainProblem) -> str:
        """Return a few words for `explain`. `train_forward` and `train_backward` are inherited."""
        raise NotImplementedError


def run_block(
    backend: Backend, problem: ChainProblem, x: Tensor, shortcut: Tensor | None, folded: BlockWeights, relu: bool
) -> Tensor:
    """Run the whole block on `backend`; (N, inplanes, H, W) -> (N, planes * 4, H', W') in x's memory format.

    An empty batch never reaches a backend's own kernels.
    """
    run = backend if problem.batch else Backend()
    if shortcut is not None and folded.projection_weight is not None and not run.projects:
        assert folded.projection_bias is not None
        bias = folded.projection_bias.to(shortcut.dtype)
        shortcut = F.conv2d(shortcut, folded.projection_weight, bias, folded.projection_stride)
    return with_format(run.block_forward(problem, x, shortcut, folded, relu), problem.channels_last)
