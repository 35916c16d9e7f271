"""What tests on the stand-in card ask of it."""

import card
import torch

COUNTERS = {name: i for i, name in enumerate(("recorded", "waits", "host_waits", "recorded_tensors", "operators", "launches"))}


def counter(name):
    return card.inserted.c.card_counter(COUNTERS[name])


def capture(work):
    graph = torch.cuda.CUDAGraph()
    # PyTorch leaves the capture's stream the current one where a capture fails.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        out = work()
    return graph, out
