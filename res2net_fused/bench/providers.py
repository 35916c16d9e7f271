"""Who is compared: the ways to run one module. Each gets its inputs in its own memory format beforehand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..accelerate import freeze
from .measure import Contender, GraphedContender
from .workloads import fused

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One way to run a module.

    build(module, backend): the model to call; may change `module`, which is a copy of its own.
    channels_last: of the inputs. devices: where it exists. slow_start: it compiles for seconds before its first result.
    graph: whether its calls are replayed from a CUDA graph.
    """

    build: Callable[[nn.Module, str], Model]
    channels_last: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    slow_start: bool = False
    graph: bool = False


def _channels_last(module: nn.Module) -> nn.Module:
    return module.to(memory_format=torch.channels_last)


def _frozen(model: Model) -> Model:
    return freeze(model) if isinstance(model, nn.Module) else model


def _compiled(module: nn.Module, **options: object) -> Model:
    return torch.compile(_channels_last(module), fullgraph=True, dynamic=False, **options)


PROVIDERS = {
    "eager": Provider(lambda module, _: module, channels_last=False),
    "eager_channels_last": Provider(lambda module, _: _channels_last(module)),
    "compile": Provider(lambda module, _: _compiled(module), slow_start=True),
    "compile_freezing": Provider(
        lambda module, _: _compiled(module, options={"freezing": True}), devices=("cpu",), slow_start=True
    ),
    # Its CUDA graph is captured as ours is: the one that torch.compile makes copies every input first.
    "compile_max_autotune": Provider(
        lambda module, _: _compiled(module, mode="max-autotune-no-cudagraphs"), devices=("cuda",), slow_start=True, graph=True
    ),
    "ours": Provider(lambda module, backend: fused(_channels_last(module), backend)),
    # Frozen, since a captured block would fold its BatchNorms at every replay.
    "ours_graph": Provider(
        lambda module, backend: _frozen(fused(_channels_last(module), backend)), devices=("cuda",), graph=True
    ),
}
OURS = ("ours", "ours_graph")


def select(device: str, workload: str, peers: str, quick: bool = False) -> list[str]:
    """Names of the providers for one workload. "default" peers compile blocks only and in one way; "all" leaves none out."""
    kind = torch.device(device).type
    names = [name for name, provider in PROVIDERS.items() if kind in provider.devices]
    if peers == "all":
        return names
    compiled = ("compile",) if workload == "block" and not quick else ()
    return [name for name in names if not PROVIDERS[name].slow_start or name in compiled]


def contender(name: str, module: nn.Module, inputs: Sequence[Tensor], backend: str = "auto") -> Contender:
    """The provider ready to be timed on a module in eval mode; neither the module nor the inputs are changed."""
    provider = PROVIDERS[name]
    layout = torch.channels_last if provider.channels_last else torch.contiguous_format
    own = [x.clone(memory_format=layout) for x in inputs]
    model = provider.build(copy.deepcopy(module), backend)
    return (GraphedContender if provider.graph else Contender)(model, own)


def forget_compiled() -> None:
    """Drops what torch.compile holds: beyond a number of graphs for one class it would silently run eager."""
    torch.compiler.reset()
