"""Weights for products in TF32. Tensor cores cut off what float32 has more of, which errs twice as much as rounding does.

PyTorch's precision may change between packing and a call, so packed float32 weights are kept both as they are and rounded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def round_to_tf32(values: Tensor) -> Tensor:
    """float32 `values` rounded to the nearest TF32 number, away from zero at equal distance; Inf and NaN stay."""
    rounded = ((values.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values)


def for_precision(weights: Tensor, precision: str) -> Tensor:
    """Return what a kernel multiplies by at `precision`, as `tl.dot` names it."""
    return round_to_tf32(weights) if precision == "tf32" else weights


def for_every_precision(weights: Tensor, only: str | None = None) -> Tensor:
    """(1, ...), or of float32 weights (2, ...): for "ieee" and for "tf32". only: the one precision that will be used."""
    if only is not None or weights.dtype != torch.float32:
        return for_precision(weights, only or "ieee")[None]
    return torch.stack([weights, round_to_tf32(weights)])


def of_precision(weights: Tensor, precision: str) -> Tensor:
    """Return one precision's weights out of what `for_every_precision` returned."""
    return weights[-1 if precision == "tf32" else 0]
