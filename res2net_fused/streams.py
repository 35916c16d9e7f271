"""Weights that are made on one CUDA stream, kept, and read by calls on other streams.

PyTorch orders nothing between streams. Whoever calls a block on a second stream has ordered it behind the writes to the block's
parameters, but knows nothing of the kernels that fold and pack them, nor of the moment at which the result is freed.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree


class MadeOn:
    """The stream on which tensors of a CUDA device are being made, and the moment at which they will be there."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)
        self.event = self.stream.record_event()

    def wait(self) -> None:
        """Until the tensors are there, which lets every stream read them."""
        self.event.synchronize()

    def lend(self, value: object) -> None:
        """Lets the current stream read value's tensors: it waits for them, and they keep their memory until it is through."""
        stream = torch.cuda.current_stream(self.stream.device)
        if stream == self.stream:
            return
        # A graph must not wait for work outside it, and lives longer than any call: only frozen weights, which have been waited
        # for, come here then, and whoever replays the graph keeps the model frozen.
        if torch.cuda.is_current_stream_capturing():
            return
        stream.wait_event(self.event)
        for leaf in _pytree.tree_leaves(vars(value)):
            if isinstance(leaf, Tensor):
                leaf.record_stream(stream)


class Made(Protocol):
    """A dataclass of tensors, lists of them and more."""

    made: MadeOn | None


Kept = TypeVar("Kept", bound=Made)


def made_here(value: Kept, device: torch.device) -> Kept:
    """`value`, whose tensors the current stream has just been told to make, with a note of that; for keeping."""
    if device.type == "cuda":
        value.made = MadeOn(device)
    return value


def use_kept(value: Kept) -> Kept:
    """`value` for a call on the current stream."""
    if value.made is not None and not torch.compiler.is_compiling():
        value.made.lend(value)
    return value
