"""What is timed, first compared with float64: in its tile, at its size, and, where it is a replay, from poisoned memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from .._timing import Contender
from ..patching.explain import explain
from ..testing.parity import ParityRow, poisoned_allocations, relative_error
from . import runtimes
from .candidates import Model, is_ours
from .timed_case import TimedCase
from .training import worst
from .turns import Wrong

CHECKED_IMAGES = 32  # of each input, the first and the last among them, are compared with float64
CHECKED_IMAGES_OF_NETWORKS = 4
# A peer is no competitor in exactness: it has to compute the same function, and may fold or fuse in its own precision.
PEER_OVER_OURS = 4.0


class Miss(Wrong):
    """A result that differs too far from float64."""

    def __init__(self, row: ParityRow) -> None:
        super().__init__(
            f"wrong {row.stage}: its relative error is {row.error:.2g}; at most {row.bound:.2g} is allowed "
            f"(eager's is {row.eager_error:.2g})"
        )


def allowed(bound: float, name: str) -> float:
    """bound: of ours."""
    return bound if is_ours(name) else max(PEER_OVER_OURS * bound, runtimes.BOUND)


class Truth:
    """What a case's module, in eval mode, computes in float64 for each of the inputs that will be timed."""

    def __init__(
        self, case: TimedCase, module: nn.Module, inputs: Sequence[Tensor], images: int, bound: Callable[[float], float]
    ) -> None:
        """images: how many of each input are compared. bound: of ours, from eager's error."""
        self.case, self.inputs = case, inputs
        batch = len(inputs[0])
        self._some = sorted({round(i * (batch - 1) / max(1, images - 1)) for i in range(images)})
        exact = copy.deepcopy(module).double()
        with torch.inference_mode():
            self._expected = [exact(x[self._some].double()) for x in inputs]
            own = [module(x[self._some]) for x in inputs]
        self.eager_error = worst(relative_error(out, expected) for out, expected in zip(own, self._expected, strict=True))
        self.bound = bound(self.eager_error)

    def check(self, name: str, contender: Contender, model: Model) -> ParityRow:
        """Compares a candidate as it will be timed, on these inputs; Miss if it misses."""
        outputs = contender.outputs()
        errors = [self._error(out, i) for i, out in enumerate(outputs)]
        del outputs
        if len(errors) != len(self.inputs):
            raise RuntimeError(f"{len(errors)} outputs for {len(self.inputs)} inputs")
        if model.plain is not None:
            with torch.inference_mode(), poisoned_allocations():
                errors.append(self._error(model.plain(contender.inputs[0]), 0))
            for block in explain(model.plain) if isinstance(model.plain, nn.Module) else ():
                if not block.fused:
                    raise RuntimeError(f"block {block.name or 'itself'} did not run fused: {block.reason}")
        case = self.case
        stage = "logits" if case.stage is None else f"{case.stage} {case.variant}"
        row = ParityRow(
            case.workload, case.config_name, stage, case.batch, name, case.dtype, worst(errors), self.eager_error,
            allowed(self.bound, name),
        )  # fmt: skip
        if not row.ok:
            raise Miss(row)
        return row

    def _error(self, out: Tensor, i: int) -> float:
        """NaN where an image is missing or not finite, also among those that are not compared."""
        if len(out) != len(self.inputs[i]) or not out.isfinite().all():
            return float("nan")
        return relative_error(out[self._some], self._expected[i])
