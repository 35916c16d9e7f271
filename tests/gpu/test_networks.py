"""Networks on a GPU: captured in a CUDA graph, and compiled with one."""

import copy
import functools

import pytest
import torch
from gpu_cases import STAND_IN, kernel_calls, network_blocks, recorded
from helpers import relative_error
from networks import FAMILIES, images_for, pair, quick

from res2net_fused import accelerate, explain, freeze
from res2net_fused._timing import GraphedContender
from res2net_fused.bench.networks import random_network
from res2net_fused.bench.sample_images import calibrate, sample_images
from res2net_fused.chain.tolerances import network_bound

BATCH = 1 if STAND_IN else 32


def launches(parameters, capability):
    if "name" in parameters:
        return launches_of(parameters["name"])
    return kernel_calls(network_blocks("bfloat16", BATCH), capability)


@functools.cache
def launches_of(name):
    """The name of the backend that is chosen on this card."""
    network = pair(name)[1].cuda().bfloat16().to(memory_format=torch.channels_last)
    x = images_for(name).cuda().bfloat16().contiguous(memory_format=torch.channels_last)
    with recorded() as calls, torch.inference_mode():
        network(x)
    return calls


def on_gpu(name, dtype=torch.bfloat16):
    """Images, a frozen network and the float64 results for these and for other images, with the bounds on them."""
    plain, fused = pair(name)
    images = [images_for(name).cuda().to(dtype), images_for(name).flip(3).cuda().to(dtype)]
    images = [x.contiguous(memory_format=torch.channels_last) for x in images]
    plain = plain.cuda().to(dtype).to(memory_format=torch.channels_last)
    fused.load_state_dict(plain.state_dict())
    fused = freeze(fused.cuda().to(dtype).to(memory_format=torch.channels_last))
    exact = copy.deepcopy(plain).double()
    with torch.inference_mode():
        expected = [exact(x.double()) for x in images]
        bounds = [network_bound(relative_error(plain(x), e)) for x, e in zip(images, expected, strict=True)]
    return images, fused, expected, bounds


@pytest.mark.parametrize("name", FAMILIES)
def test_a_captured_graph_gives_the_results_of_new_images(name):
    images, fused, expected, bounds = on_gpu(name)
    static = images[0].clone()
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            fused(static)  # kernels compile and workspaces are allocated before the capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = fused(static)
        for x, exact, bound in zip(images, expected, bounds, strict=True):
            static.copy_(x)
            out.fill_(float("nan"))
            graph.replay()
            assert relative_error(out, exact) <= bound
    assert all(report.fused for report in explain(fused))


# Inductor compiles all around the blocks, which no pool does for it.
@pytest.mark.parametrize("name", quick(FAMILIES, "res2net50_26w_4s"))
def test_torch_compile_makes_a_graph(name):
    images, fused, expected, bounds = on_gpu(name)
    torch._dynamo.reset()
    compiled = torch.compile(fused, mode="reduce-overhead", fullgraph=True)
    with torch.inference_mode():
        for _ in range(3):  # warmed up, captured, replayed
            for x, exact, bound in zip(images, expected, bounds, strict=True):
                torch.compiler.cudagraph_mark_step_begin()
                assert relative_error(compiled(x).clone(), exact) <= bound


def test_a_graph_of_res2net50_at_batch_32():
    """26w4s at 224x224, every launch that the record's first network makes, from memory that holds NaN."""
    network = calibrate(random_network("res2net50_26w4s"), sample_images()).requires_grad_(False).cuda().bfloat16()
    model = freeze(accelerate(copy.deepcopy(network)).to(memory_format=torch.channels_last))
    images = torch.randn(BATCH, 3, 224, 224, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    contender = GraphedContender(model, [images])
    (out,) = contender.outputs()
    with torch.inference_mode():
        expected = copy.deepcopy(network).double()(images[:2].double())
        bound = network_bound(relative_error(network(images)[:2], expected))
    assert relative_error(out[:2], expected) <= bound
