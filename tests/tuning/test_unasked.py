"""Calls that are measured when they first come, where RES2NET_FUSED_CHOICE asks for it. Times are planted."""

import contextlib
import logging
import os

import pytest
import torch
from tuned_network import images, run

import res2net_fused as rf
from res2net_fused.backends import choices
from res2net_fused.modules import measuring as block_measuring
from res2net_fused.modules.block_state import STATE

pytestmark = pytest.mark.usefixtures("choices_table", "clock")


@contextlib.contextmanager
def mode(name):
    os.environ[choices.MODE_VARIABLE] = name
    try:
        yield
    finally:
        del os.environ[choices.MODE_VARIABLE]


def test_measured_at_the_first_call(network, clock):
    with mode("measured"):
        x = images()
        for _ in range(5):
            run(network, x)
        assert len(clock["calls"]) == 2, "one measurement: how long a call takes, then all"
        assert all(vars(block)[STATE].known.seen is not None for block in network[1:3]), "later calls go by what is known"
        run(network, images(5))
        assert len(clock["calls"]) == 4
    assert rf.explain(network)[0].backend == "cpu"


def test_measured_calls_are_bounded(network, clock, monkeypatch):
    monkeypatch.setattr(choices, "MEASURED_UNASKED", 2)
    with mode("measured"):
        for batch in range(1, 7):
            run(network, images(batch))
    assert len(clock["calls"]) == 4 and "the nearest" in rf.explain(network)[0].reason


def test_what_cannot_be_measured_is_tried_once(network, monkeypatch, caplog):
    monkeypatch.setattr(block_measuring, "bare_copy", lambda *_: 1 / 0)
    with mode("measured"), caplog.at_level(logging.WARNING, "res2net_fused"):
        for _ in range(4):
            run(network, images())
    assert sum("cannot be measured: ZeroDivisionError" in record.message for record in caplog.records) == 1


def test_a_chain_is_measured_at_its_first_call(clock):
    x = torch.randn(2, 4 * 24, 8, 8).contiguous(memory_format=torch.channels_last)
    weights = [torch.randn(24, 24, 3, 3) * 0.1 for _ in range(3)]
    packed = rf.pack_weights(weights)
    expected = rf.hierarchical_conv2d(x.double(), [w.double() for w in weights], backend="reference")
    clock["cpu:direct"] = 0.1
    with mode("measured"):
        for _ in range(3):
            out = rf.hierarchical_conv2d(x, packed)
    assert len(clock["calls"]) == 2
    assert float((out.double() - expected).norm() / expected.norm()) < 5e-6


def test_own_unless_measured(network, clock):
    with mode("own"):
        run(network, images())
        assert "RES2NET_FUSED_CHOICE=own, and nothing is measured" in rf.explain(network)[0].reason
        rf.tune(network, images(), progress=False)
        run(network, images())
        assert rf.explain(network)[0].backend == "cpu"
    with mode("predicted"):
        run(network, images())
        assert "measured" not in rf.explain(network)[0].reason


def test_deterministic_algorithms_measure_nothing(network, clock):
    torch.use_deterministic_algorithms(True)
    try:
        report = rf.tune(network, images())
        assert not report.calls and "nothing is measured" in str(report) and not clock["calls"]
        with mode("measured"):
            run(network, images())
        assert not clock["calls"]
    finally:
        torch.use_deterministic_algorithms(False)
