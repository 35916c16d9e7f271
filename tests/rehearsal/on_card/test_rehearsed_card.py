"""The stand-in card itself: what it must do and refuse as a real one, or every rehearsal on it would be worth nothing."""

import copy

import card
import pytest
import torch
from card.triton_driver import LAUNCHES
from helpers import Chain, assert_close, randomize, relative_error
from on_card import capture, counter
from torch import nn

from res2net_fused import Bottle2neck, explain, freeze, hierarchical_conv2d


def test_torch_sees_the_card():
    settings = card.Settings.of(__import__("os").environ["STAND_IN_CARD"])
    model = card.CARDS[settings.card]
    assert torch.cuda.is_available() and torch.cuda.device_count() == settings.count
    assert torch.cuda.get_device_name(1) == model.name and torch.cuda.get_device_capability() == model.capability
    assert torch.cuda.get_device_properties(0).L2_cache_size == model.l2
    with pytest.raises(RuntimeError, match="invalid device"):
        torch.cuda.set_device(settings.count)


def test_tensors_are_ordinary_ones_on_the_card():
    x = torch.randn(2, 3, 8, 8, device="cuda:1")
    assert type(x) is torch.Tensor and x.is_cuda and x.device == torch.device("cuda", 1)
    assert torch.empty(1, device="cuda").device.index == torch.cuda.current_device() == 0
    with torch.cuda.device(1):
        assert torch.empty(1, device="cuda").device.index == 1
    view = x[:, 1:]
    view.zero_()
    assert x[:, 1:].abs().sum() == 0 and x._version == view._version == 1
    weight = torch.randn(4, 3, 3, 3, device="cuda:1", requires_grad=True)
    torch.nn.functional.conv2d(x, weight).relu().sum().backward()
    assert weight.grad.device == weight.device


def test_two_cards_and_card_and_host_do_not_mix():
    x = torch.ones(3, device="cuda:0")
    with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cuda:1"):
        x + torch.ones(3, device="cuda:1")
    with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cpu"):
        x + torch.ones(3)
    assert (x + torch.tensor(1.0)).sum() == 6  # a scalar may come from the host
    assert x.copy_(torch.zeros(3)).sum() == 0


def test_a_graph_computes_at_its_replays_and_not_before():
    x = torch.randn(5, device="cuda")
    graph, out = capture(lambda: (x * 2).cumsum(0) + 1)
    assert out.isnan().all()
    for _ in range(2):
        x.normal_()
        graph.replay()
        assert torch.equal(out, (x * 2).cumsum(0) + 1)


@pytest.mark.parametrize(
    "wait",
    [lambda x: x.sum().item(), lambda x: bool((x > 0).all()), lambda x: x.nonzero(), lambda x: x.cpu(),
     lambda x: torch.cuda.synchronize(), lambda x: torch.cuda.current_stream().synchronize()],
    ids=["item", "bool", "nonzero", "copy", "synchronize", "stream"],
)  # fmt: skip
def test_the_host_must_not_wait_in_a_capture(wait):
    x = torch.randn(5, device="cuda")
    with pytest.raises(RuntimeError, match="CUDA error: operation"):
        capture(lambda: wait(x))
    assert torch.cuda.is_current_stream_capturing() is False
    wait(x)


def test_a_capture_must_not_wait_for_work_outside_it():
    outside = torch.cuda.Stream().record_event()
    with pytest.raises(RuntimeError, match="CUDA error"):
        capture(lambda: torch.cuda.current_stream().wait_event(outside))


def test_streams_are_current_in_their_context_and_counted():
    side = torch.cuda.Stream()
    before = counter("waits")
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() == side
        side.wait_stream(torch.cuda.default_stream())
    assert torch.cuda.current_stream() == torch.cuda.default_stream() != side
    assert counter("waits") == before + 1


def test_memory_is_counted():
    before = torch.cuda.memory_allocated()
    x = torch.empty(1000, device="cuda")
    assert torch.cuda.memory_allocated() - before == 4000 <= torch.cuda.max_memory_allocated()
    del x
    assert torch.cuda.memory_allocated() == before


def test_a_launch_goes_through_triton(poisoned_memory):
    x = torch.randn(2, 104, 14, 14, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(26, 26, 3, 3, device="cuda", dtype=torch.bfloat16) / 15 for _ in range(3)]
    with LAUNCHES.recorded() as launches:
        out = hierarchical_conv2d(x, weights, backend="triton")
    assert [launch.kernel for launch in launches] == ["conv3x3_fwd"] * 3
    assert all(launch.constants["CHANNELS"] == 26 and launch.grid[0] > 1 for launch in launches)
    assert_close(out.cpu(), hierarchical_conv2d(x.double().cpu(), [w.double().cpu() for w in weights], backend="reference"))


def test_a_captured_network_part_follows_its_input():
    block = freeze(Bottle2neck(104, 26).cuda().eval())
    static = torch.randn(2, 104, 7, 7, device="cuda")
    with torch.inference_mode():
        block(static)
        graph, out = capture(lambda: block(static))
        for seed in range(2):
            static.copy_(torch.randn(static.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert relative_error(out, block(static)) == 0
    assert explain(block)[0].fused


def test_gradients_and_copies_over_two_cards():
    block = Bottle2neck(104, 26).cuda().train()
    twin = copy.deepcopy(block).to("cuda:1")
    x = torch.randn(4, 104, 7, 7, device="cuda")
    parallel = torch.nn.DataParallel(copy.deepcopy(block).eval(), [0, 1])
    assert_close(parallel(x), block.eval()(x))
    twin.train()(x.to("cuda:1")).square().mean().backward()
    assert all(p.grad.device.index == 1 for p in twin.parameters())


@pytest.mark.parametrize(("layer", "name"), [(nn.SiLU, "silu"), (nn.GELU, "gelu"), (nn.LeakyReLU, "leaky_relu:0.01")])
def test_activations_that_the_cuda_kernel_has_not_go_to_triton(layer, name):
    block = randomize(Bottle2neck(104, 26, act_layer=lambda inplace: layer())).cuda().half().eval()
    x = torch.randn(4, 104, 7, 7, device="cuda", dtype=torch.half)
    with torch.no_grad():
        block(x)
    (report,) = explain(block)
    assert report.fused and report.backend == "triton"
    assert f"cuda: activation is '{name}'; this backend runs 'relu', 'none', 'hardtanh20', 'relu6'" in report.reason
    x, weights, biases = Chain({"activation": name}, width=26).tensors((2, 7, 7), torch.half, "cuda")
    with pytest.raises(RuntimeError, match=f"backend='cuda' cannot run.*activation is '{name}'"):
        hierarchical_conv2d(x, weights, biases, activation=name, backend="cuda")


def test_clamps_run_on_the_cuda_kernel():
    block = randomize(Bottle2neck(104, 26, act_layer=nn.ReLU6)).cuda().half().eval()
    with torch.no_grad():
        block(torch.randn(4, 104, 7, 7, device="cuda", dtype=torch.half))
    (report,) = explain(block)
    assert report.fused and report.backend == "cuda"
