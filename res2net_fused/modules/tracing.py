"""Blocks as leaves of the graphs that FX traces."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.fx import Proxy, Tracer

# Of torchvision, and timm through it: what asks for nodes by name, and the local variable that holds these; None for all names.
_FEATURES = "torchvision.models.feature_extraction"
_ASKS = {"create_feature_extractor": "mode_return_nodes", "get_graph_node_names": None}


def leaf_call(block: nn.Module, x: object, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
    """The Proxy of a call of the whole block, where FX traces the model around it and does not ask for what is inside; or None.

    The block's hooks would run while FX traces and again in the graph: with hooks it is no leaf.
    """
    if isinstance(x, Tensor) or not isinstance(x, Proxy) or not isinstance(x.tracer, Tracer):
        return None
    tracer: Any = x.tracer
    if tracer.root is block or type(args) is not tuple or block._forward_hooks or block._forward_pre_hooks:
        return None
    if any("quant" in f"{cls.__module__}.{cls.__name__}".lower() for cls in type(tracer).__mro__):
        return None
    try:
        path = tracer.path_of_module(block)
    except NameError:  # not a part of the root
        return None
    inside = next((name for name, module in block.named_modules() if isinstance(module, nn.modules.conv._ConvNd)), None)
    opens = inside is not None and not tracer.is_leaf_module(block.get_submodule(inside), f"{path}.{inside}")
    if opens or _asked_for_inside(path):
        return None
    return tracer.create_proxy("call_module", path, (x, *args), kwargs)


def _asked_for_inside(path: str) -> bool:
    """Whether somebody further up in this thread's calls asked for nodes inside the module at `path`, or for all names."""
    features = sys.modules.get(_FEATURES)
    asks = {getattr(features, name).__code__: variable for name, variable in _ASKS.items() if hasattr(features, name)}
    frame: FrameType | None = sys._getframe(1) if asks else None
    while frame is not None:
        if frame.f_code in asks:
            variable = asks[frame.f_code]
            nodes = [] if variable is None else frame.f_locals.get(variable, {}).values()
            return variable is None or any(name.startswith(f"{path}.") for names in nodes for name in names)
        frame = frame.f_back
    return False
