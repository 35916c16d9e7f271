"""Which activations the code of a block calls, as modules or as functions: seen while it runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..chain.activations import CLAMPS, SLOPE, leaky_relu
from .confirmation import of_memory

_PLAIN = frozenset({"relu", "hardswish", "silu", "mish"})
_BOUNDS = {bounds: name for name, bounds in CLAMPS.items()}


class CalledActivations(TorchDispatchMode):
    """Counts the activations that are called inside, by the names that a chain has for them."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: Counter[str] = Counter()

    @property
    def names(self) -> list[str]:
        """The most called first, and last of all none."""
        return [name for name, _ in self._calls.most_common()] + ["none"]

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        name = _name_of(func.overloadpacket.__name__.rstrip("_"), args[1:], kwargs or {})
        if name is not None:
            self._calls[name] += 1
        return func(*args, **(kwargs or {}))


def seen_activations(
    forward: Callable[[nn.Module, Tensor], Any], twin: nn.Module, x: Tensor
) -> tuple[Any, list[str]] | Exception:
    """What a class's own forward gives for a copy of x, and the activations that it calls; what it raises, but for memory."""
    try:
        with CalledActivations() as called:
            return forward(twin, x.clone()), called.names
    except Exception as error:
        if of_memory(error):
            raise
        return error


def _name_of(operator: str, settings: Sequence[Any], named: dict[str, Any]) -> str | None:
    if operator in _PLAIN:
        return operator
    if operator == "leaky_relu":
        return leaky_relu(float(settings[0] if settings else named.get("negative_slope", SLOPE)))
    if operator == "gelu":
        return "gelu_tanh" if named.get("approximate") == "tanh" else "gelu"
    if operator in ("hardtanh", "clamp", "clamp_min"):
        low, high = (*settings, *named.values(), None, None)[:2]
        return _BOUNDS.get((low, float("inf") if high is None else high))
    return None
