"""The roofline: what a device copies and multiplies at most, as measured, and the time that the least work takes there."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from res2net_fused._timing import Contender, measure
from res2net_fused.bench.work import Work
from res2net_fused.testing.cases import TORCH_DTYPES


@dataclass(frozen=True)
class Rates:
    """What one device does in a second: 10^9 bytes that a copy reads and writes, and 10^12 FLOPs of a large product."""

    copy_gb_s: float
    matrix_tflops: dict[str, float]  # by dtype


def floor_ms(parts: Iterable[Work], rates: Rates, dtype: str) -> float:
    """The least milliseconds for kernels that run one after the other: each moves or multiplies, whichever is longer."""
    moved, multiplied = rates.copy_gb_s * 1e9, rates.matrix_tflops[dtype] * 1e12
    return sum(1e3 * max((part.activations + part.parameters) / moved, part.flops / multiplied) for part in parts)


def measure_rates(device: str, dtypes: Sequence[str], quick: bool = False) -> Rates:
    """Times a copy between two tensors far larger than any cache, and one square product for each dtype."""
    large = torch.device(device).type == "cuda" and not quick
    elements, side = (2**29, 8192) if large else (2**24, 512 if quick else 1024)
    source = torch.ones(elements, dtype=torch.float32, device=device)
    copy_ms = _best_ms(torch.empty_like(source).copy_, source, device)
    moved = 2 * source.nbytes
    del source
    tflops = {}
    for dtype in dtypes:
        # Random: products of zeros draw less power, so the clock would be higher than with data.
        a = torch.randn(side, side, device=device).to(TORCH_DTYPES[dtype])
        b = torch.randn(side, side, device=device).to(TORCH_DTYPES[dtype])
        tflops[dtype] = 2 * side**3 / (_best_ms(lambda x, b=b: x @ b, a, device) * 1e9)
    return Rates(moved / (copy_ms * 1e6), tflops)


def _best_ms(call, x: Tensor, device: str) -> float:
    # The 20th percentile: a ceiling that a neighbour's noise lowers would flatter every share of it.
    return measure({"": Contender(call, [x])}, device, seconds=0.4, min_repeats=10)[""].p20_ms
