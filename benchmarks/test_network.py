"""Res2Net-50 26w4s on two photographs: `pytest benchmarks/test_network.py`."""

import pytest

from res2net_fused.bench.providers import PROVIDERS


@pytest.mark.parametrize("provider", [name for name in PROVIDERS if not PROVIDERS[name].slow_start])
def test_network(time_module, network, provider):
    time_module(provider, network.network, [network.images])
