"""The least time that a network could take on this machine, from rates that the same run measures.

A network's floor is the sum of its stem's, its blocks' and its head's. Each of these takes the longer one of

    products:  FLOPs / rate of sgemm, where a chain's 3x3 convolutions count a quarter of their FLOPs, which are the products of
               F(4x4, 3x3), at 60 % of the rate: its transforms take the rest;
    memory:    bytes of input, output and parameters, each moved once / bandwidth of a copy.

The rate is that of a square sgemm of 2048; in a second floor, each 1x1 convolution has the rate of an sgemm of its own size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._timing import Contender, measure
from ..models.network import Network
from .work import Work, least_work, on_meta, parts_of_network

# Fields of a row, and what people read.
FLOORS = {"sgemm_floor_ms": "floor at 2048", "own_sizes_floor_ms": "floor at own sizes"}
WINOGRAD_PRODUCTS = 36 / 144  # of F(4x4, 3x3): multiplications for 16 pixels, of those of nine taps
WINOGRAD_SHARE = 0.6
SQUARE = (2048, 2048, 2048)
_COPIED_BYTES = 1 << 26  # beyond every L2
_REPEATS = 9
Size = tuple[int, int, int]  # rows, columns and depth of a product of matrices


@dataclass(frozen=True)
class Products:
    """The products of matrices of a stem, a block or a head. pointwise: sizes of its 1x1 convolutions and linear layers."""

    pointwise: tuple[Size, ...]
    chain_flops: int
    stem_flops: int

    @property
    def pointwise_flops(self) -> int:
        return sum(2 * math.prod(size) for size in self.pointwise)


@dataclass(frozen=True)
class Part:
    """One of the kernels that a network could be."""

    work: Work
    products: Products


@dataclass(frozen=True)
class Rates:
    """What was measured: FLOPs a second of sgemm by size, SQUARE among them, and bytes a second of a copy."""

    sgemm: dict[Size, float]
    bandwidth: float

    def __str__(self) -> str:
        return f"sgemm of 2048 at {self.sgemm[SQUARE] / 1e9:.0f} GFLOP/s, a copy at {self.bandwidth / 1e9:.1f} GB/s"

    def best(self, other: Rates) -> Rates:
        """The higher one of each."""
        sgemm = {size: max(rate, other.sgemm[size]) for size, rate in self.sgemm.items()}
        return Rates(sgemm, max(self.bandwidth, other.bandwidth))


def parts(network: Network, shape: Sequence[int]) -> list[Part]:
    """Stem, blocks and head of a network for fp32 images of this shape (N, 3, H, W); nothing is computed."""
    twin, x = on_meta(network, shape, "float32")
    found = []
    with torch.no_grad():
        for name, part in parts_of_network(twin):
            products, out = _products(name, part, x)
            found.append(Part(least_work(part, x.shape, "float32"), products))
            x = out
    return found


def _products(name: str, part: nn.Module, x: Tensor) -> tuple[Products, Tensor]:
    pointwise: list[Size] = []
    flops = {"stem": 0, "block": 0}

    def note(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
        if isinstance(layer, nn.Linear):
            pointwise.append((out.numel() // out.shape[-1], layer.out_features, layer.in_features))
        elif isinstance(layer, nn.Conv2d):
            rows, depth = out.numel() // out.shape[1], math.prod(layer.weight.shape[1:])
            if layer.kernel_size == (1, 1) and name == "block":
                pointwise.append((rows, out.shape[1], depth))
            else:
                flops[name] += 2 * rows * out.shape[1] * depth

    hooks = [layer.register_forward_hook(note) for layer in part.modules()]
    try:
        out = part(x)
    finally:
        for hook in hooks:
            hook.remove()
    return Products(tuple(pointwise), flops["block"], flops["stem"]), out


def floor_ms(parts: Iterable[Part], rates: Rates, own_sizes: bool) -> float:
    """The floor of a network in milliseconds. own_sizes: each 1x1 convolution at the rate of its own size."""
    square = rates.sgemm[SQUARE]
    total = 0.0
    for part in parts:
        products = part.products
        seconds = sum(2 * math.prod(size) / (rates.sgemm[size] if own_sizes else square) for size in products.pointwise)
        seconds += products.chain_flops * WINOGRAD_PRODUCTS / (WINOGRAD_SHARE * square) + products.stem_flops / square
        total += max(seconds, (part.work.activations + part.work.parameters) / rates.bandwidth)
    return 1e3 * total


def fields(parts: Sequence[Part], rates: Rates) -> dict[str, float]:
    """Both floors of a network, as the fields of a row."""
    return dict(zip(FLOORS, (floor_ms(parts, rates, own_sizes) for own_sizes in (False, True)), strict=True))


def sizes_of(networks: Iterable[Sequence[Part]]) -> list[Size]:
    """Each size of a 1x1 convolution once."""
    return list(dict.fromkeys(size for parts in networks for part in parts for size in part.products.pointwise))


def measure_rates(sizes: Iterable[Size], repeats: int = _REPEATS) -> Rates:
    """The rates of these sizes, of SQUARE and of a copy by PyTorch's threads: medians of `repeats` calls, size by size."""

    def seconds(call: Callable[[Tensor], Tensor], x: Tensor) -> float:
        one = {"call": Contender(call, [x])}
        return measure(one, "cpu", seconds=0, min_repeats=repeats, max_repeats=repeats, peaks=False)["call"].median_ms / 1e3

    sgemm = {}
    for rows, columns, depth in (*sizes, SQUARE):
        weights, out = torch.ones(depth, columns), torch.empty(rows, columns)
        call = functools.partial(torch.mm, mat2=weights, out=out)
        sgemm[rows, columns, depth] = 2 * rows * columns * depth / seconds(call, torch.ones(rows, depth))
    source = torch.ones(_COPIED_BYTES // 4)
    return Rates(sgemm, 2 * source.nbytes / seconds(torch.empty_like(source).copy_, source))
