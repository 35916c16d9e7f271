"""Who is compared: the ways to run one module. Each gets its inputs in its own memory format beforehand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch._inductor.config
from torch import Tensor, nn

from .._timing import Contender, GraphedContender
from ..patching.accelerate import freeze
from ..testing.cases import channels_last, fused
from . import runtimes

Model = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Provider:
    """One way to run a module.

    build(module, backend): the model to call; may change `module`, which is a copy of its own.
    channels_last: of the inputs. devices: where it exists. slow_start: it compiles for seconds before its first result.
    forms: on a GPU, its calls launched one by one (False), replayed from a CUDA graph (True), or both in turn.
    networks_only: it differs from another one in what lies around the blocks.
    """

    build: Callable[[nn.Module, str], Model]
    channels_last: bool = True
    devices: tuple[str, ...] = ("cpu", "cuda")
    slow_start: bool = False
    forms: tuple[bool, ...] = (False, True)
    networks_only: bool = False


def _frozen(model: Model) -> Model:
    return freeze(model) if isinstance(model, nn.Module) else model


def _compiled(module: Model, **options: Any) -> Model:
    return torch.compile(module, fullgraph=True, dynamic=False, **options)


def _compiled_frozen(module: Model) -> Model:
    """Weights folded and packed by Inductor, for a first call without gradients.

    Dynamo asks for the global setting while it traces; given as an option of torch.compile alone, nothing is frozen.
    """
    compiled = _compiled(module)
    traced = False

    def model(x: Tensor) -> Tensor:
        nonlocal traced
        if traced:
            return compiled(x)
        with torch._inductor.config.patch(freezing=True):
            out = compiled(x)
        traced = True
        return out

    return model


def _runtime(name: str) -> Provider:
    return Provider(lambda module, _: runtimes.ExportedModel(name, module), channels_last=False, devices=("cpu",))


PROVIDERS = {
    "eager": Provider(lambda module, _: module, channels_last=False, forms=(False,)),
    "eager_channels_last": Provider(lambda module, _: channels_last(module)),
    "compile": Provider(lambda module, _: _compiled(channels_last(module)), slow_start=True),
    "compile_freezing": Provider(lambda module, _: _compiled_frozen(channels_last(module)), slow_start=True, forms=(True,)),
    # Captured as ours is: the CUDA graph that torch.compile makes copies every input first.
    "compile_max_autotune": Provider(
        lambda module, _: _compiled(channels_last(module), mode="max-autotune-no-cudagraphs"),
        devices=("cuda",),
        slow_start=True,
        forms=(True,),
    ),
    runtimes.TENSORRT: Provider(lambda module, _: runtimes.tensorrt(module), channels_last=False, devices=("cuda",)),
    **{name: _runtime(name) for name in runtimes.RUNTIMES},
    # The README's lines as they stand: `accelerate` and nothing else, on images as everybody has them.
    "ours_plain": Provider(
        lambda module, backend: fused(module, backend), channels_last=False, forms=(False,), networks_only=True
    ),
    "ours": Provider(lambda module, backend: fused(channels_last(module), backend), forms=(False,)),
    # What lies around the blocks compiled as a peer's is.
    "ours_compile": Provider(
        lambda module, backend: _compiled_frozen(_frozen(fused(channels_last(module), backend))),
        slow_start=True,
        forms=(True,),
        networks_only=True,
    ),
    # Frozen, since a captured block would fold its BatchNorms at every replay.
    "ours_graph": Provider(
        lambda module, backend: _frozen(fused(channels_last(module), backend)), devices=("cuda",), forms=(True,)
    ),
}
PLAIN = "ours_plain"
OURS = (PLAIN, "ours", "ours_compile", "ours_graph")
PYTORCH = tuple(name for name in PROVIDERS if name not in (*OURS, *runtimes.RUNTIMES, runtimes.TENSORRT))


def select(device: str, workload: str, peers: str, quick: bool = False, dtype: str = "float32") -> list[str]:
    """Names of the providers for one workload; "all" leaves none out.

    "default" peers are what runs the module as it is, torch.compile of blocks and, on a GPU, also what folds BatchNorms of
    blocks and networks as ours does. Other runtimes are among both, where they are installed, but not among the quick ones.
    """
    kind = torch.device(device).type
    names = [name for name, provider in PROVIDERS.items() if kind in provider.devices]
    names = [name for name in names if workload == "network" or not PROVIDERS[name].networks_only]
    absent = unavailable(device, dtype)
    names = [name for name in names if name not in absent and not (quick and name in (*runtimes.RUNTIMES, runtimes.TENSORRT))]
    if peers == "all":
        return names
    compiled = set()
    if not quick:
        compiled |= {"compile"} if workload == "block" else set()
        compiled |= {"compile_freezing", "ours_compile"} if kind == "cuda" and workload != "chain" else set()
    return [name for name in names if not PROVIDERS[name].slow_start or name in compiled]


def candidates(names: Sequence[str], device: str) -> tuple[tuple[str, bool], ...]:
    """Each with whether its calls are replayed from a CUDA graph, once for each of its forms."""
    if torch.device(device).type != "cuda":
        return tuple((name, False) for name in names)
    return tuple((name, graph) for name in names for graph in PROVIDERS[name].forms)


def unavailable(device: str, dtype: str = "float32") -> dict[str, str]:
    """The providers of this device that cannot be timed here, each with the reason."""
    if torch.device(device).type == "cuda":
        reasons = {runtimes.TENSORRT: runtimes.why_not_tensorrt()}
    else:
        reasons = {name: runtimes.why_not(name, dtype) for name in runtimes.RUNTIMES}
    return {name: why for name, why in reasons.items() if why is not None}


def label(row: Mapping[str, Any]) -> str:
    """The provider of a row for people; a star says that its calls are replayed from a CUDA graph, where the name does not."""
    name = row["provider"]
    return name + ("*" if row.get("graph") and not name.endswith("_graph") else "")


def contender(name: str, module: nn.Module, inputs: Sequence[Tensor], backend: str = "auto", graph: bool = False) -> Contender:
    """The provider ready to be timed on a module in eval mode; neither the module nor the inputs are changed."""
    provider = PROVIDERS[name]
    layout = torch.channels_last if provider.channels_last else torch.contiguous_format
    own = [x.clone(memory_format=layout) for x in inputs]
    model = provider.build(copy.deepcopy(module), backend)
    return (GraphedContender if graph else Contender)(model, own)


def forget_compiled() -> None:
    """Drops what torch.compile holds: beyond a number of graphs for one class it would silently run eager."""
    torch.compiler.reset()
