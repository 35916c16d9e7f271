"""Whether a block that can run fused should: by what was measured on this machine, else by what `policy.py` predicts."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from ..backends import choices, policy
from ..backends.selection import is_auto
from ..chain.problem import Chain1dProblem, ChainProblem
from ..ops.packed_weights import one_operator
from .measuring import measure_unasked
from .switches import constant_in_a_trace

NOT_PAYING = "its own forward is not measured to be slower here; backend= asks for the operator"
NOT_TRAINING_FASTER = "its own forward is not measured to train slower here; backend= or recompute=True asks for the operator"


def why_own(
    passes: str, problem: ChainProblem | Chain1dProblem, backend: str, call: tuple[nn.Module, Tensor] | None = None
) -> str | None:
    """None if the block should run fused, else the reason for its own forward. A backend that is asked for is not argued with.

    passes, problem: as for `choices.lookup`. call: the block and its x, where it may be measured now.
    """
    if not is_auto(backend):
        return None
    if not (is_compiling() or torch._C._is_tracing()):
        if call is not None and choices.is_to_be_measured(passes, problem):
            measure_unasked(*call, passes, problem)
        found = choices.lookup(passes, problem)
        if found is not None:
            return f"its own forward is the fastest, {found}" if found.runs_own else None
        if choices.is_pinned():
            return _why_not_predicted(passes, problem)
        if choices.mode() == "own":
            return f"{choices.MODE_VARIABLE}=own, and nothing is measured of such a call: rf.tune measures"
    return _why_not_predicted(passes, problem)


def _why_not_predicted(passes: str, problem: ChainProblem | Chain1dProblem) -> str | None:
    if isinstance(problem, Chain1dProblem):
        return None if policy.chain_pays_1d(problem, passes) else NOT_PAYING
    if passes == "training":
        return None if policy.training_pays(problem) else NOT_TRAINING_FASTER
    if not (one_operator(problem.config) or policy.clamped_chain_pays(problem)):
        return "activations other than ReLU run fused in channels-last only, where clamps are measured to gain, or by backend="
    return _left_to_pytorch(problem.device, problem.dtype)


@constant_in_a_trace
def _left_to_pytorch(device: torch.device, dtype: torch.dtype) -> str | None:
    return policy.why_left_to_pytorch(device, dtype)
