"""Tensors that one CUDA stream made, lent to calls on others: PyTorch orders nothing between streams."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils import _pytree

_MANY_STREAMS = 256  # PyTorch's own are 32 of each priority a device; foreign ones may be made for ever


class MadeOn:
    """Tensors that a stream of a CUDA device has been told to make, the moment they are there, and the streams that read them.

    A stream is lent to once, at its first call, and that covers all its later ones. It waits for the event: what it is given
    afterwards runs behind that. And it is recorded with every tensor, which is no promise about the work of that moment: the
    allocator keeps the streams with the memory and, when the memory is freed, on whatever stream and however late, gives it
    out again behind all work "queued on `stream` at the time of deallocation" (Tensor.record_stream). A call holds its weights
    until its launches are queued, so a drop comes behind the launches of every call that has read them.

    Streams are known by their ids. PyTorch's own live as long as the process. A foreign one's id is its handle, by which the
    allocator knows it too: what is recorded holds for the next stream with that handle, and CUDA releases the handle of a
    destroyed stream when that has done its work, the wait for the event included.
    """

    def __init__(self, value: object, device: torch.device) -> None:
        stream = torch.cuda.current_stream(device)
        self.device = device
        self.event = stream.record_event()
        self.tensors = tensors_of(value)
        self.readers = {stream.stream_id}

    def wait(self) -> None:
        """Waits until the tensors are there, which lets every stream read them."""
        self.event.synchronize()

    def lend(self) -> None:
        """Lets the current stream read the tensors: it waits for them, and they keep their memory until it is through."""
        stream = torch.cuda.current_stream(self.device)
        if stream.stream_id in self.readers:
            return
        # A graph must not wait for work outside it, and lives longer than any call: only frozen weights, which have been waited
        # for, come here then, and whoever replays the graph keeps the model frozen.
        if torch.cuda.is_current_stream_capturing():
            return
        stream.wait_event(self.event)
        for tensor in self.tensors:
            tensor.record_stream(stream)
        if len(self.readers) >= _MANY_STREAMS:
            self.readers = set()
        self.readers.add(stream.stream_id)  # last: another thread on this stream may rely on it


def tensors_of(value: object) -> list[Tensor]:
    return [leaf for leaf in _pytree.tree_leaves(vars(value)) if isinstance(leaf, Tensor)]
