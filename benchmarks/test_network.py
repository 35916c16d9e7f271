"""Res2Net-50 26w4s and 14w8s and ResNet-50 on two photographs: `pytest benchmarks/test_network.py -k 'resnet50 and batch1'`."""

import pytest

from res2net_fused.bench.providers import PROVIDERS


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("batch", [1, 8], ids="batch{}".format)
def test_network(time_module, benchmark, network, batch, provider):
    benchmark.group = f"{network.name} batch {batch}"
    time_module(provider, network.network, [network.batch(batch)])
