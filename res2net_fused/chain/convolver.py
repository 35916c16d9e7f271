"""Who computes one 3x3 convolution and its gradients: ATen, unless somebody faster is handed in."""

from __future__ import annotations

import torch
from torch import Tensor

from .problem import ChainProblem


class Convolver:
    """One 3x3 convolution of a chain and its gradients. Every method may return None: ATen's operator is then called.

    The class itself always does. Backends derive from it; the mathematics in this folder chooses none of them.
    """

    def convolution(self, problem: ChainProblem, u: Tensor, weight: Tensor) -> Tensor | None:
        """Return z (N, w, H', W') of u (N, w, H, W), without bias or activation. problem: of that convolution alone."""
        return None

    def input_gradient(self, problem: ChainProblem, dz: Tensor, weight: Tensor) -> Tensor | None:
        """Return du (N, w, H, W), which is itself a convolution of dz (N, w, H, W) at stride 1."""
        return None

    def weight_gradient(
        self, problem: ChainProblem, dz: Tensor, u: Tensor, weight_format: torch.memory_format
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (dK (w, w/groups, 3, 3), db (w,)); dK in `weight_format`."""
        return None, None


ATEN = Convolver()
