"""The least that a module asks of a device, and how many inputs take turns so that none of it is found in a cache."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..models.network import Network
from ..testing.cases import TORCH_DTYPES

_CPU_ROTATED = 4  # inputs on a CPU, whose caches PyTorch does not tell


@dataclass(frozen=True)
class Work:
    """What one kernel cannot avoid: bytes of its input and output, and of its parameters, moved once; FLOPs of its products."""

    activations: int
    parameters: int
    flops: int


def least_work(module: nn.Module, shape: Sequence[int], dtype: str) -> Work:
    """The work of a module that runs as one kernel on an input of this shape (N, C, H, W); nothing is computed."""
    twin, x = on_meta(module, shape, dtype)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        out = twin(x)
    parameters = sum(parameter.nbytes for parameter in twin.parameters())
    return Work(x.nbytes + out.nbytes, parameters, counter.get_total_flops())


def least_work_of_network(network: Network, shape: Sequence[int], dtype: str) -> list[Work]:
    """Stem, every block and head of a network, each as one kernel."""
    twin, x = on_meta(network, shape, dtype)
    parts = []
    with torch.no_grad():
        for _, part in parts_of_network(twin):
            parts.append(least_work(part, x.shape, dtype))
            x = part(x)
    return parts


def parts_of_network(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """("stem", ...), ("block", ...) for every block, and ("head", ...), in the order of the calls."""
    yield "stem", nn.Sequential(*(network.get_submodule(name) for name in ("conv1", "bn1", "relu", "maxpool")))
    for i in (1, 2, 3, 4):
        yield from (("block", block) for block in network.get_submodule(f"layer{i}").children())
    yield "head", nn.Sequential(network.get_submodule("avgpool"), nn.Flatten(), network.get_submodule("fc"))


def on_meta(module: nn.Module, shape: Sequence[int], dtype: str) -> tuple[nn.Module, Tensor]:
    """A twin of a module and an input of this shape, both without data."""
    twin = copy.deepcopy(module).to("meta", TORCH_DTYPES[dtype])
    return twin, torch.empty(tuple(shape), dtype=TORCH_DTYPES[dtype], device="meta")


def l2_bytes(device: str) -> int | None:
    """Size of a GPU's L2 cache; None for a CPU."""
    return torch.cuda.get_device_properties(device).L2_cache_size if torch.device(device).type == "cuda" else None


def rotation_count(bytes_per_call: int, l2: int | None) -> int:
    """How many inputs take turns, so that inputs and outputs together are twice the L2 and none is found there again."""
    return _CPU_ROTATED if l2 is None else max(1, math.ceil(2 * l2 / bytes_per_call))
