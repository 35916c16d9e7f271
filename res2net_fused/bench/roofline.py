"""The roofline: what a device copies and multiplies at most, as measured, and the least that a module asks of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.network import Network
from ..testing.cases import TORCH_DTYPES
from .timing import Contender, measure

_CPU_ROTATED = 4  # inputs on a CPU, whose caches PyTorch does not tell


@dataclass(frozen=True)
class Rates:
    """Of one device: 10^9 bytes read and written in a second by a copy, and 10^12 FLOPs in a second of a large product."""

    copy_gb_s: float
    matrix_tflops: dict[str, float]  # by dtype


@dataclass(frozen=True)
class Work:
    """What one kernel cannot avoid: bytes of its input and output, and of its parameters, moved once; FLOPs of its products."""

    activations: int
    parameters: int
    flops: int

    def floor_ms(self, rates: Rates, dtype: str) -> float:
        moving = (self.activations + self.parameters) / (rates.copy_gb_s * 1e9)
        return 1e3 * max(moving, self.flops / (rates.matrix_tflops[dtype] * 1e12))


def floor_ms(parts: Iterable[Work], rates: Rates, dtype: str) -> float:
    """The least milliseconds for kernels that run one after the other."""
    return sum(part.floor_ms(rates, dtype) for part in parts)


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


def least_work(module: nn.Module, shape: Sequence[int], dtype: str) -> Work:
    """Of a module run as one kernel on an input of this shape (N, C, H, W); nothing is computed."""
    twin, x = _on_meta(module, shape, dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = twin(x)
    parameters = sum(parameter.nbytes for parameter in twin.parameters())
    return Work(x.nbytes + out.nbytes, parameters, counter.get_total_flops())


def least_work_of_network(network: Network, shape: Sequence[int], dtype: str) -> list[Work]:
    """Stem, every block and head of a network, each as one kernel."""
    twin, x = _on_meta(network, shape, dtype)
    stem = nn.Sequential(*(twin.get_submodule(name) for name in ("conv1", "bn1", "relu", "maxpool")))
    blocks = [block for i in (1, 2, 3, 4) for block in twin.get_submodule(f"layer{i}").children()]
    head = nn.Sequential(twin.get_submodule("avgpool"), nn.Flatten(), twin.get_submodule("fc"))
    parts = []
    with torch.no_grad():
        for part in (stem, *blocks, head):
            parts.append(least_work(part, x.shape, dtype))
            x = part(x)
    return parts


def _on_meta(module: nn.Module, shape: Sequence[int], dtype: str) -> tuple[nn.Module, Tensor]:
    twin = copy.deepcopy(module).to("meta", TORCH_DTYPES[dtype])
    return twin, torch.empty(tuple(shape), dtype=TORCH_DTYPES[dtype], device="meta")


def l2_bytes(device: str) -> int | None:
    """Size of a GPU's L2 cache; None for a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if torch.device(device).type == "cuda" else None


def rotation_count(bytes_per_call: int, l2: int | None) -> int:
    """How many inputs take turns, so that inputs and outputs together are twice the L2 and none is found there again."""
    return _CPU_ROTATED if l2 is None else max(1, math.ceil(2 * l2 / bytes_per_call))
