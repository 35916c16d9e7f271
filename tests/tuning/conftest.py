"""A network to tune, and the times that its measurements find."""

import pytest
from tuned_network import small_network

from res2net_fused._timing import Timing
from res2net_fused.backends import measuring, selection
from res2net_fused.tuning import tune as tuning


@pytest.fixture
def clock(monkeypatch):
    """Milliseconds by choice that every measurement finds; every trial runs once all the same."""
    planted = {"own": 5.0, "reference": 4.0, "cpu": 2.0, "cpu:direct": 3.0, "cpu:winograd": 3.0}
    measured = []

    def measure(trials, device, **options):
        for trial in trials.values():
            trial.run()
        measured.append(list(trials))
        return {name: Timing(planted.get(name, 9.0), 1, 1, 1, 0) for name in trials}

    monkeypatch.setattr(measuring, "measure", measure)
    monkeypatch.setattr(tuning, "measure", measure)
    planted["calls"] = measured
    yield planted
    selection._aside.clear()


@pytest.fixture
def network():
    return small_network()
