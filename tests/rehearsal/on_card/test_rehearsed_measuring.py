"""Measuring on the stand-in card: on the device that was asked for, replays looked at, peers as free as ours."""

from dataclasses import replace

import pytest
import torch

from res2net_fused import _timing as timing
from res2net_fused.backends import selection
from res2net_fused.bench import networks, providers, results
from res2net_fused.bench.network_runner import NetworkRunner, TurnConditions
from res2net_fused.bench.record_file import Record
from res2net_fused.bench.timed_case import TimedCase
from res2net_fused.bench.work import rotation_count
from res2net_fused.models.registry import create_model  # noqa: F401  # registers the networks
from res2net_fused.testing import parity
from res2net_fused.testing.cases import Case, WidthScale

SECOND = torch.device("cuda", 1)
BOTH = ("eager_channels_last", False), ("eager_channels_last", True), ("ours", False), ("ours_graph", True)


@pytest.fixture
def timer(tmp_path):
    record = Record(tmp_path / "bench-cuda.json", results.environment("cuda:1", "x"))
    record.begin_run()
    yield NetworkRunner(TurnConditions("cuda:1", "auto", True, 0, 1), record)
    record.close()


def small_network():
    images = torch.randn(2, 3, 32, 32)
    network = networks.calibrate(networks.random_network("res2net50_26w4s", (1, 1, 1, 1)), images).requires_grad_(False)
    network, images = network.to(SECOND, torch.bfloat16), images.to(SECOND, torch.bfloat16)
    return networks.NetworkCase("res2net50_26w4s", "bfloat16", network, images)


def cells(rows):
    return {(row["provider"], row["graph"]) for row in rows}


# One device -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [False, True])
def test_everything_is_done_on_the_device_of_the_inputs(graph, monkeypatch):
    """Streams, events, captures and figures of memory, whatever device is the current one."""
    where, events = set(), []

    class Event(torch.cuda.Event):
        def record(self, stream=None):
            events.append((stream or torch.cuda.current_stream()).device)
            return super().record(stream)

    def model(x):
        where.add((torch.cuda.current_device(), torch.cuda.current_stream().device))
        return x * 2

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert torch.cuda.current_device() == 0
    inputs = [torch.ones(1000, device=SECOND)]
    contender = (timing.GraphedContender if graph else timing.Contender)(model, inputs)
    found = timing.measure({"a": contender}, "cuda:1", seconds=0, min_repeats=2, max_repeats=2)["a"]
    assert where == {(1, SECOND)} and set(events) == {SECOND} and found.peak_mb >= 0
    assert torch.cuda.current_device() == 0
    assert [out.device for out in contender.outputs()] == [SECOND]


def test_peak_memory_is_that_of_the_device_that_was_asked_for(monkeypatch):
    asked = []
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats", "synchronize"):
        own = getattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, lambda device=None, own=own: asked.append(device) or own(device))
    timing.peak_mb(timing.Contender(lambda x: x * 2, [torch.ones(10, device=SECOND)]), "cuda:1")
    assert asked and set(asked) == {"cuda:1"}


def test_the_device_is_the_current_one_from_the_start():
    try:
        timing.use_device("cuda:1")
        assert torch.cuda.current_device() == 1
        timing.use_device("cuda")  # whichever is the current one
        timing.use_device("cpu")
        assert torch.cuda.current_device() == 1
    finally:
        torch.cuda.set_device(0)


# Replays --------------------------------------------------------------------------------------------------------------


def test_networks_are_timed_in_both_forms(timer):
    found = timer.time_networks([small_network()], 2, BOTH)
    assert not found.failures and cells(found.rows) == set(BOTH)
    assert {row["device"] for row in found.rows} == {"cuda:1"}
    assert {row["backend"] for row in found.rows if row["provider"] == "ours_graph"} == {"triton"}
    assert all("cuda: " in row["reason"] for row in found.rows if row["provider"].startswith("ours"))


@pytest.mark.parametrize("unit", ["network", "chain"])
def test_a_replay_that_writes_nothing_is_a_failure(timer, monkeypatch, unit):
    """Its memory may hold what an earlier call left, and its time would be 0 ms."""
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: None)
    if unit == "network":
        found = timer.time_networks([small_network()], 2, BOTH)
    else:
        found = timer.time(TimedCase("chain", WidthScale(26, 4), 4, "normal", 2, "bfloat16", BOTH))
    assert cells(found.rows) == {one for one in BOTH if not one[1]}
    assert len(found.failures) == 2 and all("CUDA graph" in name for name in found.failures)
    assert all("relative error is nan" in reason for reason in found.failures.values())


# Fairness -------------------------------------------------------------------------------------------------------------


def test_everybody_is_timed_with_the_fastest_of_cudnn_and_past_the_l2(timer, monkeypatch):
    """Inputs and outputs of one turn are twice the L2, for peers as for ours."""
    seen, own = {}, providers.PROVIDERS["eager_channels_last"]

    def build(module, backend):
        def model(x):
            seen.setdefault("benchmark", set()).add(torch.backends.cudnn.benchmark)
            return run(x)

        run = own.build(module, backend)
        return model

    def note(contenders, *rest, **settings):
        seen["counts"] = {name: (len(one.inputs), one.calls) for name, one in contenders.items()}
        seen["bytes"] = {len({x.data_ptr() for x in one.inputs}) for one in contenders.values()}
        return {}

    monkeypatch.setitem(providers.PROVIDERS, "eager_channels_last", replace(own, build=build))
    monkeypatch.setattr("res2net_fused.bench.turns.measure", note)
    case = Case("chain", WidthScale(26, 4), 4, 8, "bfloat16", "cuda:1")
    moved = 2 * case.inputs()[0].nbytes
    timer.conditions = replace(timer.conditions, l2=5 * moved)
    before = torch.backends.cudnn.benchmark
    timer.time(TimedCase("chain", case.config, case.stage, "normal", case.batch, case.dtype, BOTH))
    assert seen["benchmark"] == {True} and torch.backends.cudnn.benchmark is before
    assert len(seen["counts"]) == 4 and {count for count, _ in seen["counts"].values()} == {10} == seen["bytes"]
    assert rotation_count(moved, 5 * moved) == 10
    assert {calls for (_, one), (_, calls) in seen["counts"].items() if one[1]} == {10}


# The parity gate ------------------------------------------------------------------------------------------------------


def test_backends_are_chosen_under_the_precision_that_is_checked(monkeypatch):
    """The cuda backend runs fp32 in TF32 alone: asked before it is set, it would refuse afterwards."""
    seen, own = [], selection.get_backend("reference").why_not

    def why_not(problem):
        seen.append(torch.backends.cudnn.conv.fp32_precision)
        return own(problem)

    monkeypatch.setattr(selection.get_backend("reference"), "why_not", why_not)
    for dtype, word in (("float32", "ieee"), ("tf32", "tf32")):
        seen.clear()
        report = parity.check_case(Case("chain", WidthScale(26, 4), 4, 1, dtype, "cuda"))
        assert report.ok and set(seen) == {word}


def test_a_capture_that_fails_leaves_the_stream_to_who_comes_next():
    def model(x):
        return x * x.sum().item() if torch.cuda.is_current_stream_capturing() else x

    with pytest.raises(RuntimeError, match="CUDA error"):
        timing.GraphedContender(model, [torch.ones(3, device="cuda")])
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
