"""Several streams, threads with a stream each, and graphs whose weights change: on a GPU."""

import copy
import functools

import pytest
import torch
from gpu_cases import recorded
from helpers import assert_close, randomize, run_together
from torch import nn

from res2net_fused import Bottle2neck, accelerate, explain, freeze, refresh
from res2net_fused.modules.block_state import STATE
from res2net_fused.testing.parity import unavailable_backends

LONG = 200_000_000  # cycles, about 0.1 s: what a stream is busy with while the host and others go on
BACKENDS = ("cuda", "triton", "reference", "auto")
backends = pytest.mark.parametrize("backend", BACKENDS)


def launches(parameters, capability):
    """The results of inference by this backend, and of a step of training."""
    if parameters["backend"] == "reference" or refusal(parameters["backend"]) is not None:
        return []
    block, x = build(parameters["backend"])
    with recorded() as calls:
        infer(block, x)
        if parameters["backend"] == "triton":
            gradients("triton")
    return calls


def refusal(backend):
    """Why the backend cannot run here, or None."""
    why = unavailable_backends("cuda").get(backend)
    return None if why is None or "fp32_precision" in why else why  # of float32 alone


def build(backend, seed=0):
    block = randomize(Bottle2neck(104, 26), seed).cuda().bfloat16().to(memory_format=torch.channels_last).eval()
    accelerate(block, backend=backend)
    x = torch.randn(4, 104, 28, 28, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    return block, x


def make(backend, seed=0):
    """A block, its images, and what it gives. Skips where the backend cannot run here."""
    if (why := refusal(backend)) is not None:
        pytest.skip(why)
    block, x = build(backend, seed)
    expected = infer(block, x)  # kernels are compiled now
    assert explain(block)[0].fused
    exact = copy.deepcopy(block).double()
    accelerate(exact, backend="reference")
    assert_close(expected, infer(exact, x.double()))
    torch.cuda.synchronize()
    return block, x, expected


def infer(model, x):
    with torch.inference_mode():
        return model(x)


@backends
def test_weights_folded_on_one_stream_are_waited_for_on_others(backend):
    block, x, expected = make(backend)
    refresh(block)
    folding, others = torch.cuda.Stream(), [torch.cuda.Stream() for _ in range(2)]
    with torch.cuda.stream(folding):
        torch.cuda._sleep(LONG)
        first = infer(block, x)
    results = []
    for stream in others:
        with torch.cuda.stream(stream):
            results.append(infer(block, x))
    torch.cuda.synchronize()
    assert all(torch.equal(result, expected) for result in (first, *results))


@backends
@pytest.mark.parametrize("drop", ["refresh", "train", "freeze"])
def test_dropped_weights_stay_until_the_streams_that_read_them_are_through(drop, backend):
    block, x, expected = make(backend)
    if drop == "freeze":
        freeze(block)
    reader = torch.cuda.Stream()
    with torch.cuda.stream(reader):
        infer(block, x)  # for which the stream is lent to, once for all
        torch.cuda._sleep(LONG)
        result = infer(block, x)
    if drop == "train":
        block.train().eval()
    else:
        refresh(block)
    # What was freed on this stream is given out again at once, and overwritten before the reader wakes up.
    junk = [torch.full((size,), torch.nan, device="cuda") for size in (64, 1024, 1 << 14, 1 << 16, 1 << 18) for _ in range(32)]
    torch.cuda.synchronize()
    assert torch.equal(result, expected) and junk


@backends
def test_frozen_weights_are_there_on_every_stream(backend):
    block, x, expected = make(backend)
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(LONG)
        freeze(block)
    result = infer(block, x)
    torch.cuda.synchronize()
    assert torch.equal(result, expected)


@pytest.mark.usefixtures("impatient_threads")
@backends
def test_threads_with_a_stream_each(backend):
    block, x, expected = make(backend)

    def call(stream):
        with torch.cuda.stream(stream):
            right = [torch.equal(infer(block, x), expected) for _ in range(10)]  # which waits for the stream
        return all(right)

    streams = [torch.cuda.Stream() for _ in range(4)]
    for _ in range(5):
        refresh(block)
        torch.cuda.synchronize()
        assert all(run_together(*(functools.partial(call, stream) for stream in streams)))


def captured(call):
    """A graph of `call` after a call on the side, as PyTorch's documentation has it, and the output that replays write."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    return graph, out


@backends
def test_a_graph_sees_changed_weights(backend):
    """What is not frozen is folded inside the graph, from the parameters as they are at each replay."""
    block, x, expected = make(backend)
    graph, out = captured(functools.partial(infer, block, x))
    graph.replay()
    assert torch.equal(out, expected)
    for seed in (1, 2):
        block.load_state_dict(make(backend, seed)[0].state_dict())
        graph.replay()
        assert torch.equal(out, infer(block, x))
        assert not torch.equal(out, expected)


@backends
def test_a_graph_of_a_frozen_model_keeps_its_weights(backend):
    block, x, expected = make(backend)
    freeze(block)
    graph, out = captured(functools.partial(infer, block, x))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.mul_(2)
    frozen = getattr(block, STATE).frozen
    for _ in range(2):
        with torch.inference_mode():  # of which out is
            out.fill_(torch.nan)
        graph.replay()
        assert torch.equal(out, expected)
    assert frozen is getattr(block, STATE).frozen


def gradients(backend):
    """The results of a step of training, with the buffers that it leaves."""
    block = randomize(Bottle2neck(104, 26)).cuda().to(memory_format=torch.channels_last).train()
    accelerate(block, backend=backend)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 104, 28, 28, generator=generator).cuda().contiguous(memory_format=torch.channels_last)
    nn.functional.mse_loss(block(x), x).backward()
    return [p.grad for p in block.parameters()] + [b.clone() for b in block.buffers()]


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_training_on_a_side_stream_gives_the_same_bits(backend):
    why = unavailable_backends("cuda").get(backend)
    if why is not None:
        pytest.skip(why)
    torch.use_deterministic_algorithms(True)
    try:
        expected = gradients(backend)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = gradients(backend)
        torch.cuda.synchronize()
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("backend", ["auto"])
def test_a_write_that_pytorch_does_not_see_is_noticed_without_waiting(backend):
    if (why := refusal("triton")) is not None:
        pytest.skip(f"on a GPU a kernel of Triton's compares the samples: {why}")
    block, x, expected = make(backend)
    for _ in range(3):
        infer(block, x)
    for parameter in block.parameters():
        parameter.data.mul_(1.25)
    with pytest.warns(UserWarning, match="call refresh"):
        infer(block, x)
        torch.cuda.synchronize()
        out = infer(block, x)
        infer(block, x)
    assert not torch.equal(out, expected) and torch.equal(out, infer(refresh(block), x))
